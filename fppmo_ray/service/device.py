"""The device of a worker's process, claimed before anything is computed there."""

from __future__ import annotations

import logging

import torch

from fppmo_ray.service.problem import Prunable
from fppmo_ray.training import Engine, bfloat16_slowdown, keep_freed_memory

logger = logging.getLogger(__name__)

_SLOW = 1.5  # bfloat16 over float32, above which nobody can have wanted it


def claim_device(problem: Prunable) -> torch.device:
    """Fix this process's threads and memory share, before anything is computed.

    Raises:
        RuntimeError: a GPU was promised and torch sees none.
    """
    torch.set_num_threads(problem.threads)
    if problem.device_type == "cpu":
        keep_freed_memory()
        _warn_of_slow_bfloat16(problem.engine)
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError(
            "this worker holds a GPU of the cluster but torch sees no CUDA device; "
            "install a CUDA build of torch on the node, or set gpus_per_worker to 0"
        )
    if problem.gpu_share < 1:
        torch.cuda.set_per_process_memory_fraction(problem.gpu_share)
    return torch.device("cuda")


def _warn_of_slow_bfloat16(engine: Engine) -> None:
    """Only where it was asked for: else a measurement chooses it, or does not."""
    if engine.dtype != "bfloat16":
        return
    slowdown = bfloat16_slowdown()
    if slowdown > _SLOW:
        logger.warning(
            "bfloat16 takes %.1f times as long as float32 on this CPU, which has no units for it; "
            "use dtype float32, or auto, which takes the faster of the two",
            slowdown,
        )
