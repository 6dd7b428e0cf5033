"""A real S3 server on loopback, for whatever keeps its run directory on an object store."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# A process of its own: pyarrow may hold the interpreter's lock while it waits for an answer.
_SERVER = """
import sys
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("port", server.get_host_and_port()[1], flush=True)
sys.stdin.read()  # until whoever started it closes the pipe, or is gone
"""
_CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "tester",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",  # or the client asks the cloud that is not there
}
BUCKET = "runs"


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The address of a server with an empty bucket ``runs``; credentials are in the environment."""
    pytest.importorskip("moto", reason="needs the extra test")
    import boto3

    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    word, port = server.stdout.readline().split()
    assert word == "port"
    endpoint = f"http://127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _CREDENTIALS.items():
            patch.setenv(name, value)
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=BUCKET)
        yield endpoint
    server.communicate()  # closes its pipe


@pytest.fixture(scope="session")
def s3_run_dir(s3_endpoint: str) -> Callable[[], str]:
    """Makes URIs of run directories where nothing is yet."""
    numbers = itertools.count()
    return lambda: f"s3://{BUCKET}/run-{next(numbers)}/here?endpoint_override={s3_endpoint}"


@pytest.fixture(params=["local", "s3"])
def run_dir(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A run directory where nothing is yet, of either kind."""
    if request.param == "local":
        return str(tmp_path / "run")
    make: Callable[[], str] = request.getfixturevalue("s3_run_dir")
    return make()
