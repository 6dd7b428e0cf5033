"""The device of a worker's process, claimed before anything is computed there."""

from __future__ import annotations

import logging

import torch

from fppmo_ray.service.problem import Prunable
from fppmo_ray.training import keep_freed_memory, native_dtype

logger = logging.getLogger(__name__)


def claim_device(problem: Prunable) -> torch.device:
    """Fix this process's threads and memory share, before anything is computed.

    Raises:
        RuntimeError: a GPU was promised and torch sees none.
    """
    torch.set_num_threads(problem.threads)
    if problem.device_type == "cpu":
        keep_freed_memory()
        cpu = torch.device("cpu")
        if problem.compute.dtype == "bfloat16" and native_dtype(cpu) == "float32":
            logger.warning(
                "this processor has no units for bfloat16 and computes it several times slower "
                "than float32; use dtype float32 or auto"
            )
        return cpu
    if not torch.cuda.is_available():
        raise RuntimeError(
            "this worker holds a GPU of the cluster but torch sees no CUDA device; "
            "install a CUDA build of torch on the node, or set gpus_per_worker to 0"
        )
    if problem.gpu_share < 1:
        torch.cuda.set_per_process_memory_fraction(problem.gpu_share)
    return torch.device("cuda")
