"""Modules beside a script travel to the workers whole; installed ones by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import ray
import torchvision
from torch import nn

from fppmo_ray.service.pool.own_modules import carried
from fppmo_ray.training import build_network

pickle = ray.cloudpickle


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    (tmp_path / "beside_a_script.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential): pass\n"
        "def score(network, seed): return 1.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import beside_a_script

    yield beside_a_script
    sys.modules.pop("beside_a_script")


def names_it(thing: object) -> bool:
    """Whether whoever unpickles must be able to import the module."""
    content: bytes = pickle.dumps(thing)
    module = sys.modules.pop("beside_a_script")
    path, sys.path[:] = [*sys.path], [entry for entry in sys.path if "pytest-of" not in entry]
    try:
        pickle.loads(content)
    except ModuleNotFoundError:
        return True
    finally:
        sys.path[:] = path
        sys.modules["beside_a_script"] = module
    return False


def test_a_network_and_functions_beside_a_script_travel_whole(beside: ModuleType) -> None:
    network = nn.Sequential(beside.Net(nn.Conv2d(1, 2, 3)))
    assert names_it(network)
    with carried(network):
        assert not names_it(network)
        assert not names_it(beside.score)
    assert names_it(network)
    with carried(nn.Identity(), beside.score, None):
        assert not names_it(beside.score)


def test_installed_modules_travel_by_name() -> None:
    before = pickle.list_registry_pickle_by_value()
    with (
        carried(torchvision.models.resnet18(), max),
        carried(build_network("resnet20", 10, seed=0)),
    ):
        assert pickle.list_registry_pickle_by_value() == before


def test_a_module_that_travelled_whole_before_does_so_afterwards(beside: ModuleType) -> None:
    pickle.register_pickle_by_value(beside)
    with carried(beside.Net()):
        pass
    assert not names_it(beside.Net())
    pickle.unregister_pickle_by_value(beside)
