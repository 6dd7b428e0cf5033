"""Where the schemas of Kubernetes' side come from: they are not part of the package."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.fixture(scope="session")
def kuberay_schema() -> Callable[[str], Any]:
    """The schema of a KubeRay kind (``rayclusters``, ``rayjobs``) from its CRD.

    CRDs lie in ``FPPMO_TEST_SCHEMAS`` or ``../shared/schemas``, below ``kuberay``.
    """
    default = Path(__file__).resolve().parents[3] / "shared" / "schemas"
    folder = Path(os.environ.get("FPPMO_TEST_SCHEMAS", default)) / "kuberay"
    if not folder.is_dir():
        pytest.skip(f"no CRDs at {folder}; set FPPMO_TEST_SCHEMAS to a folder that holds kuberay/")

    @functools.cache
    def read(kind: str) -> Any:
        content = (folder / f"ray.io_{kind}.yaml").read_text()
        crd = yaml.load(content, Loader=yaml.CSafeLoader)
        [version] = [item for item in crd["spec"]["versions"] if item["storage"]]
        schema = version["schema"]["openAPIV3Schema"]
        schema["properties"]["metadata"] = {"type": "object"}  # the API server's own business
        return schema

    return read
