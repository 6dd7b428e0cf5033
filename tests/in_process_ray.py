"""A Ray whose actors are objects of this process: for tests of what a search computes.

An actor of a real Ray is a process that imports torch, which takes five seconds on two busy cores.
Here the whole service runs as it is, its driver, pool and journal, and every call is answered when
it is sent. Constructor arguments, arguments and answers are pickled as Ray pickles them. Losses,
time limits and whatever else concerns processes need a real Ray: the fixture ``local_ray``.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from ray import cloudpickle
from ray.exceptions import RayTaskError

from fppmo_ray.service.user_functions import ProcessState

NODE = "0" * 56


class Reference:
    """Looks like a reference to an answer, which has always come."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        self._error: RayTaskError | None = None
        try:
            self._answer = _copied(answer())
        except Exception as error:
            self._error = RayTaskError("call", traceback.format_exc(), error)

    def get(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._answer

    def __reduce__(self) -> Any:
        """Pickle as what it refers to, which Ray hands to the methods of actors."""
        return _itself, (self.get(),)


class Actor:
    """Looks like the handle of an actor."""

    def __init__(self, cls: type, arguments: tuple[Any, ...]) -> None:
        made = Reference(lambda: None)
        try:
            self._object = _copied(cls)(*_copied(arguments))
        except Exception as error:
            raised = error
            made = Reference(lambda: _raise(raised))
        self._made = made

    def __getattr__(self, method: str) -> Method:
        return Method(self, method)


class Method:
    """Looks like a method of an actor's handle."""

    def __init__(self, actor: Actor, name: str) -> None:
        self._actor, self._name = actor, name

    def options(self, **named: Any) -> Method:
        return self

    def remote(self, *arguments: Any, **named: Any) -> Reference:
        def answer() -> Any:
            self._actor._made.get()
            if self._name == "__ray_ready__":
                return True
            given, by_name = _copied((arguments, named))
            return getattr(self._actor._object, self._name)(*given, **by_name)

        return Reference(answer)


class ActorClass:
    """Looks like a class that ``ray.remote`` has made an actor of."""

    def __init__(self, cls: type) -> None:
        self._cls = cls

    def options(self, **named: Any) -> ActorClass:
        return self

    def remote(self, *arguments: Any) -> Actor:
        return Actor(self._cls, arguments)


def _copied(value: Any) -> Any:
    return cloudpickle.loads(cloudpickle.dumps(value))


def _itself(value: Any) -> Any:
    return value


def _raise(error: Exception) -> None:
    raise error


def _get(references: Any, timeout: float | None = None) -> Any:
    if isinstance(references, list):
        return [reference.get() for reference in references]
    return references.get()


def _wait(
    references: Sequence[Reference], num_returns: int = 1, timeout: float | None = None
) -> tuple[list[Reference], list[Reference]]:
    return list(references[:num_returns]), list(references[num_returns:])


@contextmanager
def in_process_ray() -> Iterator[None]:
    """Put this Ray in the place of the real one, with a node of two CPUs.

    What workers change in their process is as before at the end.
    """
    resources = {"CPU": 2.0, "memory": float(2**30)}
    node = {"NodeID": NODE, "Alive": True, "Resources": resources}
    context = SimpleNamespace(get_node_id=lambda: NODE)
    state, threads = ProcessState(), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "remote", lambda **named: ActorClass)
        patch.setattr(ray, "put", lambda value: Reference(lambda: value))
        patch.setattr(ray, "get", _get)
        patch.setattr(ray, "wait", _wait)
        patch.setattr(ray, "kill", lambda actor: None)
        patch.setattr(ray, "nodes", lambda: [node])
        patch.setattr(ray, "available_resources", lambda: resources)
        patch.setattr(ray, "is_initialized", lambda: True)
        patch.setattr(ray, "get_runtime_context", lambda: context)
        try:
            yield
        finally:
            state.restore()
            torch.set_num_threads(threads)
