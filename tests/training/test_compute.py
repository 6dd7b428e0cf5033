"""The compute configuration, the number format that is chosen, and the memory that is kept."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from fppmo_ray.training import PLAIN_COMPUTE, ComputeConfig, DType, lay_out, native_dtype


def test_a_compute_configuration_says_what_it_does() -> None:
    assert str(PLAIN_COMPUTE) == "float32, channels last, scored by 250, 1 thread"
    compute = ComputeConfig(
        dtype="bfloat16",
        channels_last=False,
        fold_batchnorm=True,
        cuda_graphs=True,
        scoring_batch=1000,
        threads=4,
    )
    assert str(compute) == ("bfloat16, folded batch norm, CUDA graphs, scored by 1000, 4 threads")


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"dtype": "float16"}, r"dtype must be one of .*, got 'float16'"),
        ({"scoring_batch": 0}, "scoring_batch must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ComputeConfig(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("channels_last", [True, False])
def test_weights_are_laid_out_as_the_compute_configuration_says(channels_last: bool) -> None:
    network = nn.Conv2d(4, 8, 3)
    lay_out(network, ComputeConfig(channels_last=not channels_last))
    lay_out(network, ComputeConfig(channels_last=channels_last))
    is_channels_last = network.weight.is_contiguous(memory_format=torch.channels_last)
    assert (is_channels_last, network.weight.is_contiguous()) == (channels_last, not channels_last)


@pytest.mark.parametrize(
    ("avx512_bf16", "amx", "dtype"),
    [
        (False, False, "float32"),
        (True, False, "bfloat16"),  # AMD Zen 4, Intel Cooper Lake
        (False, True, "bfloat16"),
        (True, True, "bfloat16"),  # Intel Sapphire Rapids
    ],
)
def test_a_cpu_computes_in_bfloat16_where_it_has_units_for_it(
    monkeypatch: pytest.MonkeyPatch, avx512_bf16: bool, amx: bool, dtype: DType
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert native_dtype(torch.device("cpu")) == dtype


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((7, 5), "float32"), ((8, 0), "bfloat16"), ((8, 6), "bfloat16"), ((10, 0), "bfloat16")],
)
def test_a_gpu_computes_in_bfloat16_from_capability_8_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: DType
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert native_dtype(torch.device("cuda")) == dtype


FAULTS = """
import resource, sys
import torch
from fppmo_ray.training import keep_freed_memory

torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_memory()

def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(16_000_000)  # 64 MB, 15,625 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(2)
print(faults(10))
"""


def page_faults(how: str) -> int:
    command = [sys.executable, "-c", FAULTS, how]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc gives memory back so eagerly")
def test_the_kernel_clears_no_page_twice() -> None:
    assert page_faults("keep") < 20_000  # a small block in the way may cost one tensor's pages
    assert page_faults("give back") > 100_000  # of ten tensors
