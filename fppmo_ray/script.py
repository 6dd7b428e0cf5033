"""``fppmo_ray.search``: a search in a script or a notebook, which shows what a job shows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import ParamSpec

from fppmo_ray.job import log_of_search, show_result
from fppmo_ray.service import search as service
from fppmo_ray.service.callbacks import ConsoleProgress
from fppmo_ray.service.result import SearchResult

_Arguments = ParamSpec("_Arguments")


def _shown(run: Callable[_Arguments, SearchResult]) -> Callable[_Arguments, SearchResult]:
    """Return a search that logs what it does, draws its figures and prints its table.

    Args:
        run: The search.
    """

    @wraps(run)
    def shown(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> SearchResult:
        callbacks = kwargs.get("callbacks") or ()
        assert isinstance(callbacks, list | tuple)
        given = [one.console for one in callbacks if isinstance(one, ConsoleProgress)]
        is_quiet = any(console.quiet for console in given)
        with nullcontext() if is_quiet else log_of_search():
            result = run(*args, **kwargs)
        show_result(result.run_dir, given[0] if given else None)
        return result

    return shown


search = _shown(service.search)
