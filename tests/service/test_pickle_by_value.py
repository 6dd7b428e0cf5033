"""Code of modules beside a script is pickled by value, that of installed modules by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import ray
import torch
import torchvision
from torch import nn

from fppmo_ray.service.user_functions import line_of_user, pickled_by_value
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


def is_pickled_by_name(thing: object) -> bool:
    """Whether the module must be importable where ``thing`` is unpickled."""
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


def test_a_network_and_functions_beside_a_script_are_pickled_by_value(beside: ModuleType) -> None:
    network = nn.Sequential(beside.Net(nn.Conv2d(1, 2, 3)))
    assert is_pickled_by_name(network)
    with pickled_by_value(network):
        assert not is_pickled_by_name(network)
        assert not is_pickled_by_name(beside.score)
    assert is_pickled_by_name(network)
    with pickled_by_value(nn.Identity(), beside.score, None):
        assert not is_pickled_by_name(beside.score)


def test_installed_modules_are_pickled_by_name() -> None:
    before = pickle.list_registry_pickle_by_value()
    with (
        pickled_by_value(torchvision.models.resnet18(), max),
        pickled_by_value(build_network("resnet20", 10, seed=0)),
    ):
        assert pickle.list_registry_pickle_by_value() == before


def test_a_module_that_was_pickled_by_value_before_is_so_afterwards(beside: ModuleType) -> None:
    pickle.register_pickle_by_value(beside)
    with pickled_by_value(beside.Net()):
        pass
    assert not is_pickled_by_name(beside.Net())
    pickle.unregister_pickle_by_value(beside)


@pytest.mark.parametrize("name", ["torch", "beside_a_script"])
def test_packages_in_an_overlay_are_pickled_by_name(
    name: str, beside: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = pickle.list_registry_pickle_by_value()
    module = sys.modules[name]
    monkeypatch.setattr(module, "__file__", str(tmp_path / name / "__init__.py"))
    if name == "beside_a_script":
        (tmp_path / "beside_a_script-1.0.dist-info").mkdir()
    monkeypatch.setattr(beside.Net, "__module__", name)
    with pickled_by_value(beside.Net()):
        assert pickle.list_registry_pickle_by_value() == before


def test_the_line_of_an_error_is_the_users_own(beside: ModuleType) -> None:
    with pytest.raises(RuntimeError) as raised:
        beside.Net(nn.Conv2d(1, 2, 3))(torch.zeros(5))
    assert line_of_user(raised.value).startswith(f"{__file__}:")
