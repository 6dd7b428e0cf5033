"""The results of a finished search, and the export of its network."""

from __future__ import annotations

import copy
import importlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn

from fppmo_ray.distribution import BoolArray
from fppmo_ray.pruning import load_network
from fppmo_ray.pruning.export import ExchangeFormat, export_network
from fppmo_ray.pruning.files import read_interface, write_safetensors
from fppmo_ray.service.journal.artifacts import (
    FPPMO,
    budgets_asked,
    history_of,
    network_files,
    read_figures,
)
from fppmo_ray.service.journal.facts import Chosen, Fact
from fppmo_ray.service.journal.run_directory import begun_stages, read_journal
from fppmo_ray.service.journal.storage import local_folder


@dataclass(frozen=True, kw_only=True)
class Best:
    """The chosen mask of a budget, and the figures of its network."""

    finalist: str
    """Name of the chosen finalist: ``mode``, ``averaged mode``, ``sample <id>``, ``allocation`` or
    ``importance-only``."""
    keep: BoolArray
    """``(num_filters,)``, True = kept."""
    budget: float
    """The ``macs_cut`` of the settings."""
    macs: int
    """Multiply-accumulates of the network for one input."""
    macs_cut: float
    """Share of the dense network's MACs that is removed: at least ``budget``."""
    widths: dict[str, int]
    """Kept filters of each channel group."""
    test_score_before: float
    """Figure on the test split before fine-tuning: accuracy in [0, 1], or the task's own score."""
    test_score: float
    """The same figure after fine-tuning."""
    test_score_distilled: float | None = None
    """The same figure after distillation, before fine-tuning; None: nothing was distilled."""

    @property
    def test_accuracy_before(self) -> float:
        """The same as ``test_score_before``, for image classification."""
        return self.test_score_before

    @property
    def test_accuracy(self) -> float:
        """The same as ``test_score``, for image classification."""
        return self.test_score


@dataclass(frozen=True)
class SearchResult:
    """A finished search.

    Args:
        run_dir: Its run directory, a folder or a URI.
        dense: A network with the architecture of the dense network; its weights do not matter.
    """

    run_dir: str | Path
    dense: nn.Module

    @cached_property
    def figures(self) -> dict[str, Any]:
        """The content of result.json."""
        return read_figures(self.run_dir, self._facts)

    @property
    def best(self) -> Best:
        """The chosen mask.

        Raises:
            ValueError: the search had several budgets; see ``front``.
        """
        front = self.front
        if len(front) > 1:
            listed = ", ".join(str(item.budget) for item in front)
            raise ValueError(
                f"the search had several budgets ({listed}), and none is the best: "
                "take one of result.front"
            )
        return front[0]

    @cached_property
    def front(self) -> tuple[Best, ...]:
        """The chosen mask of every budget, the widest first."""
        facts, figures = self._facts, self.figures
        chosen = {fact.macs_cut: fact for fact in facts if isinstance(fact, Chosen)}
        rows = [row for row in figures["variants"] if row["name"] == FPPMO]
        return tuple(_best(row, chosen[row.get("budget")], figures) for row in rows)

    @cached_property
    def history(self) -> pd.DataFrame:
        """One row for every proposal with feedback, by ascending id; see ``history_of``.

        A search in stages has the rows of all stages, with a column ``stage`` counted from 1.
        """
        stages = begun_stages(self.run_dir)
        if not stages:
            return history_of(self._facts)
        rows = [
            history_of(read_journal(place)).assign(stage=number)
            for number, place in enumerate(stages, start=1)
        ]
        return pd.concat(rows, ignore_index=True)

    @cached_property
    def _facts(self) -> list[Fact]:
        return read_journal(self.run_dir)

    def network(self, macs_cut: float | None = None, *, distilled: bool = False) -> nn.Module:
        """Return the smaller, fine-tuned network, in eval mode on the CPU.

        Args:
            macs_cut: Budget of the network; None: the only one.
            distilled: Whether to return the network after distillation and before fine-tuning.

        Raises:
            ValueError: the search had no such budget, or several budgets and ``macs_cut`` is None;
                or it distilled no network.
        """
        with network_files(self.run_dir, macs_cut, distilled=distilled) as (_, recipe):
            return load_network(recipe, constructor=lambda: copy.deepcopy(self.dense).cpu())


def _best(row: dict[str, Any], chosen: Chosen, figures: dict[str, Any]) -> Best:
    return Best(
        finalist=chosen.finalist,
        keep=chosen.keep,
        budget=row.get("budget", budgets_asked(figures)[0]),
        macs=row["macs"],
        macs_cut=row["macs_cut"],
        widths=row["widths"],
        test_score_before=_test_score(row["before"]),
        test_score=_test_score(row["after"]),
        test_score_distilled=_test_score(row["distilled"]) if "distilled" in row else None,
    )


def _test_score(moment: dict[str, Any]) -> float:
    metrics: dict[str, float] = moment["test"]
    return metrics["accuracy"] if "accuracy" in metrics else metrics["score"]


Format = Literal["torch", "safetensors"] | ExchangeFormat
"""File formats; ``torch`` and ``safetensors`` are a state dict and the recipe that rebuilds the
network."""


def export_result(
    run_dir: str | Path,
    output: Path,
    *,
    format: Format = "torch",
    macs_cut: float | None = None,
    constructor: Callable[[], nn.Module] | None = None,
    fixed_batch: int | None = None,
) -> list[Path]:
    """Check the network of a search by rebuilding it from its recipe, and write its files.

    Args:
        run_dir: The search's run directory, a folder or a URI.
        output: A folder on this machine. It is created if it does not exist.
        format: The file format.
        macs_cut: The budget whose network to export, if the search had several budgets.
        constructor: Constructs the dense network, as for ``load_network``.
        fixed_batch: The only batch size that a file of ``torchscript``, ``torch.export`` or
            ``onnx`` has to take, >= 1; None: any.

    Returns:
        The files written to ``output``.

    Raises:
        ValueError: the search has not finished, it has no such budget, or its network cannot be
            rebuilt or exported.
    """
    if fixed_batch is not None and format in ("torch", "safetensors"):
        raise ValueError(
            f"fixed_batch = {fixed_batch} has no meaning for the format {format!r}, which holds "
            "weights only; leave it out, or take torchscript, torch.export or onnx"
        )
    folder = local_folder(run_dir)
    if folder is not None and output.resolve() == folder.resolve():
        raise ValueError(f"the network is in {run_dir} already; choose another output folder")
    with network_files(run_dir, macs_cut) as (weights, recipe):
        network = load_network(recipe, constructor)
        if format == "torch":
            output.mkdir(parents=True, exist_ok=True)
            return [Path(shutil.copy(path, output)) for path in (weights, recipe)]
        if format == "safetensors":
            return write_safetensors(recipe, output)
        target, inputs = output / recipe.stem, _example_inputs(run_dir)
        interface = read_interface(recipe)
        return [
            export_network(
                network,
                target,
                format=format,
                example_inputs=inputs,
                interface=interface,
                fixed_batch=fixed_batch,
            )
        ]


def load_constructor(name: str) -> Callable[[], nn.Module]:
    """Return the function that ``MODULE:FUNCTION`` names, after importing the module.

    Args:
        name: ``MODULE:FUNCTION``.

    Raises:
        ValueError: there is no such module or function.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"expected MODULE:FUNCTION as a constructor, got {name}: {error}"
        ) from error
    if not callable(found):
        raise ValueError(f"expected MODULE:FUNCTION as a constructor, got {name}: no function")
    constructor: Callable[[], nn.Module] = found
    return constructor


def _example_inputs(run_dir: str | Path) -> tuple[Tensor, ...]:
    """Return zeros of the shapes and types of the network's inputs, with a batch of one."""
    return tuple(
        torch.zeros(1, *one["shape"], dtype=getattr(torch, one["dtype"]))
        for one in read_figures(run_dir)["inputs"]
    )
