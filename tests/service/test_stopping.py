from __future__ import annotations

import subprocess
import sys

_SLEEPS = """
import ctypes
from fppmo_ray.service.stopping import process_ends_after

with process_ends_after(60):
    pass
with process_ends_after(0.2):
    ctypes.PyDLL(None).usleep(50_000)  # a PyDLL call holds the interpreter's lock
print("in time", flush=True)
with process_ends_after(0.2):
    ctypes.PyDLL(None).sleep(30)
print("never")
"""


def test_a_process_ends_with_a_block_that_takes_too_long_even_in_native_code() -> None:
    done = subprocess.run([sys.executable, "-c", _SLEEPS], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "in time\n")
    assert "Timeout (0:00:00.200000)!" in done.stderr
