"""The end of a search: equal fine-tuning for its networks, and their figures."""

from __future__ import annotations

import json
import logging
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fppmo_ray.distribution import BoolArray, PruningSpace
from fppmo_ray.distribution.limits import Resource, cost_of, dense_cost
from fppmo_ray.pruning import check_equivalence, extract, save_network
from fppmo_ray.pruning.export import describe_tensors
from fppmo_ray.pruning.latency import Latency
from fppmo_ray.service.choices import Found, score_costs, score_noise
from fppmo_ray.service.ddp_training import train_whole
from fppmo_ray.service.dense_network import Context
from fppmo_ray.service.journal.artifacts import (
    ALLOCATION,
    DENSE,
    FPPMO,
    IMPORTANCE_ONLY,
    RESULT,
    name_for_budget,
    network_names,
)
from fppmo_ray.service.journal.facts import (
    Finished,
    Started,
)
from fppmo_ray.service.measured_latency import table_figures
from fppmo_ray.service.pool.call import Call
from fppmo_ray.service.trainings import Training, train_side_by_side
from fppmo_ray.service.worker_protocol import Evaluation, SharedWeights, TrainingTask, Worker
from fppmo_ray.training import state_from_bytes
from fppmo_ray.training.distill import FEW_IMAGES

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Variant:
    """A network of the final table."""

    name: str
    """``dense``, ``importance-only``, ``allocation`` or ``fppmo``."""
    keep: BoolArray | None
    """Its mask; None: the dense network."""
    weights: SharedWeights
    """The dense weights that it is cut from."""
    macs_cut: float | None = None
    """Its budget, in a search with several; else None."""
    same_as: str | None = None
    """The name of the variant that is the same network, so that it is trained once; else None."""

    @property
    def task(self) -> str:
        """The name of its fine-tuning in the journal."""
        return name_for_budget(self.same_as or self.name, self.macs_cut)


def finalize(context: Context, found: Found, source: Mapping[str, Any] | None) -> None:
    """Fine-tune all networks of the table alike; write the chosen networks and the result.

    The test split is read here, once per network and state, and nothing is decided by it.

    Args:
        context: The search, its pool with nothing unfinished.
        found: The chosen masks.
        source: How to construct the dense network, for the saved recipe.

    Raises:
        ValueError: a chosen network is not the dense one without the removed filters.
    """
    problem = context.problem
    variants = _variants(found)
    for variant in variants:
        if variant.name == FPPMO:
            check_equivalence(
                problem.network, problem.tracing, problem.task.inputs(), keep=variant.keep
            )
    distilled = _distill(context, found.given, variants)
    states = _fine_tune(context, found.given, variants, distilled)
    settings = context.settings
    [started] = context.run.all(Started)
    result = {
        "settings": settings.journaled(),
        "compute": asdict(context.compute),
        "training_compute": asdict(context.training_compute or context.compute),
        "chosen": ", ".join(choice.chosen.name for choice in found.choices),
        "num_filters": problem.space.num_filters,
        "inputs": describe_tensors(problem.task.inputs()),
        "interface": problem.task.interface().to_json(),
        **({"task": started.identity["task"]} if "task" in started.identity else {}),
        "epochs_between_stages": settings.gradual.stage_epochs * (found.stages - 1),
        **table_figures(context.run),
        "source": dict(source or {}),
        "images": problem.task.num_images(),
        "variants": _figures(context, variants, distilled, states),
        "score_noise": score_noise(found),
        "scores": score_costs(found),
    }
    artifacts: dict[str, str] = {}
    for variant in variants:
        if variant.name == FPPMO:
            for is_distilled, networks in ((False, states), (True, distilled)):
                if variant.task in networks:
                    names = network_names(variant.macs_cut, distilled=is_distilled)
                    state = networks[variant.task]
                    artifacts |= _keep_network(context, variant, state, source, names)
    _warn_if_missed(result["variants"])
    content = json.dumps(result, indent=2).encode()
    artifacts[RESULT] = context.run.write_artifact(RESULT, content)
    context.run.record([Finished(artifacts=artifacts, at=time.time())])


def _warn_if_missed(rows: Sequence[dict[str, Any]]) -> None:
    """Warn of every chosen network that the importance-only mask of its budget beats on test."""
    plain = {row.get("budget"): row for row in rows if row["name"] == IMPORTANCE_ONLY}
    for row in rows:
        beaten_by = plain.get(row.get("budget"))
        if row["name"] != FPPMO or beaten_by is None:
            continue
        ours, theirs = (one["after"]["test"] for one in (row, beaten_by))
        figure = "accuracy" if "accuracy" in ours else "score"
        if ours[figure] < theirs[figure]:
            logger.warning(
                "the chosen network's test %s of %.4f misses that of the importance-only mask, "
                "%.4f; more proposals, or more held-out images, make a better choice likely",
                *(figure, ours[figure], theirs[figure]),
            )


def _variants(found: Found) -> list[_Variant]:
    """Return the networks of the final table, the largest first: it takes longest."""
    variants = [_Variant(name=DENSE, keep=None, weights=found.given)]
    for choice in found.choices:
        chosen = _Variant(
            name=FPPMO, keep=choice.chosen.keep, weights=found.weights, macs_cut=choice.macs_cut
        )
        plain = replace(
            chosen, name=IMPORTANCE_ONLY, keep=choice.importance_only.keep, weights=found.given
        )
        variants.append(plain)
        if choice.allocation is not None:
            keep = choice.allocation.keep
            same_as = FPPMO if np.array_equal(keep, choice.chosen.keep) else None
            variants.append(replace(plain, name=ALLOCATION, keep=keep, same_as=same_as))
        variants.append(chosen)
    return variants


def _distill(
    context: Context, teacher: SharedWeights, variants: Sequence[_Variant]
) -> dict[str, bytes]:
    """Distil every pruned network, if asked to; return the states to train on from, by task."""
    steps, seed = context.settings.calibration.distill_steps, context.settings.seed
    if not steps:
        return {}
    trainings = {
        variant.task: Training(
            task=TrainingTask(
                name=f"{variant.task}-distilled",
                keep=variant.keep,
                recipe=replace(FEW_IMAGES, epochs=1),
                seed=seed,
                distill_steps=steps,
            ),
            weights=variant.weights,
            teacher=teacher,
        )
        for variant in variants
        if variant.same_as is None and variant.keep is not None
    }
    states = train_side_by_side(list(trainings.values()), context.pool, context.run)
    return {name: states[training.task.name] for name, training in trainings.items()}


def _fine_tune(
    context: Context,
    teacher: SharedWeights,
    variants: Sequence[_Variant],
    distilled: Mapping[str, bytes],
) -> dict[str, bytes]:
    """Return the final training state of every variant, by its task."""
    recipe, seed = context.settings.fine_tune, context.settings.seed
    trainings = [
        Training(
            task=TrainingTask(
                name=variant.task,
                keep=variant.keep,
                recipe=recipe,
                seed=seed,
                compute=context.training_compute,
            ),
            weights=variant.weights,
            teacher=teacher,
            start=distilled.get(variant.task),
        )
        for variant in variants
        if variant.same_as is None
    ]
    return train_whole(trainings, context.problem, context.pool, context.run)


def _figures(
    context: Context,
    variants: Sequence[_Variant],
    distilled: Mapping[str, bytes],
    states: Mapping[str, bytes],
) -> list[dict[str, Any]]:
    moments = [
        (variant, moment, state)
        for variant in variants
        for moment, state in (
            ("before", None),
            ("distilled", distilled.get(variant.task)),
            ("after", states[variant.task]),
        )
        if moment != "distilled" or state is not None
    ]
    found = context.pool.run([_evaluation(variant, state) for variant, _, state in moments])
    evaluated: dict[tuple[str, float | None], dict[str, Evaluation]] = {}
    for (variant, moment, _), evaluation in zip(moments, found, strict=True):
        evaluated.setdefault((variant.name, variant.macs_cut), {})[moment] = evaluation
    masks = [variant.keep for variant in variants]
    # Alone, and in one call, so that nothing else slows the networks down.
    weights = variants[0].weights.shared
    call: Call[Worker, list[tuple[Latency, ...]]] = Call(
        "latencies", lambda worker: worker.latencies(weights, masks)
    )
    [latencies] = context.pool.run([call])
    return [
        _row(context, variant, latency, evaluated[variant.name, variant.macs_cut])
        | ({"cuts": cuts} if cuts else {})
        | _against(variant, evaluated)
        for variant, latency, cuts in zip(
            variants, latencies, _cut_figures(context, masks), strict=True
        )
    ]


def _against(
    variant: _Variant, evaluated: Mapping[tuple[str, float | None], Mapping[str, Evaluation]]
) -> dict[str, Any]:
    """Return a network's test accuracy minus that of those it is compared with, with intervals.

    Args:
        variant: The network. Only chosen ones are compared.
        evaluated: Evaluations by name and budget, and by moment.
    """
    own = evaluated[variant.name, variant.macs_cut]["after"].test_right
    if variant.name != FPPMO or own is None:
        return {}
    found = {}
    for name, budget in ((DENSE, None), (IMPORTANCE_ONLY, variant.macs_cut)):
        other = evaluated[name, budget]["after"].test_right
        assert other is not None  # of the same task
        found[name] = {"difference": float(own.mean() - other.mean()), "half": _half(own, other)}
    return {"against": found}


def _half(own: BoolArray, other: BoolArray) -> float:
    """Return half of the 95 % interval of the difference of two accuracies on the same images.

    Of Agresti and Min (2005): Wald's interval with half an image added to each of the four counts,
    which is honest where the two networks differ on few images or none.

    Args:
        own: Whether each image is classified correctly, ``(num_images,)``.
        other: The same of the other network.
    """
    gained, lost = int((own & ~other).sum()) + 0.5, int((other & ~own).sum()) + 0.5
    count = len(own) + 2
    return 1.96 * math.sqrt(gained + lost - (gained - lost) ** 2 / count) / count


def _row(
    context: Context,
    variant: _Variant,
    latency: tuple[Latency, ...],
    evaluated: dict[str, Evaluation],
) -> dict[str, Any]:
    space = context.problem.space
    macs = space.dense_macs if variant.keep is None else space.macs(variant.keep)
    widths = space.dense_widths if variant.keep is None else space.widths(variant.keep)
    return {
        "name": variant.name,
        **({} if variant.macs_cut is None else {"budget": variant.macs_cut}),
        "macs": macs,
        "macs_cut": 1 - macs / space.dense_macs,
        "widths": {
            group.name: width for group, width in zip(space.groups, widths.tolist(), strict=True)
        },
        "parameters": evaluated["before"].parameters,
        "file_bytes": evaluated["before"].file_bytes,
        "activation_bytes": cost_of(space, "memory").total(widths),
        "latency_ms": {str(item.batch): item.milliseconds for item in latency},
        **{
            moment: {"choose_val": at.choose_val, "test": at.test}
            for moment, at in evaluated.items()
        },
    }


def _evaluation(variant: _Variant, state: bytes | None) -> Call[Worker, Evaluation]:
    weights, keep = variant.weights.shared, variant.keep
    return Call(
        f"evaluation of {variant.task}", lambda worker: worker.evaluate(weights, keep, state)
    )


def _keep_network(
    context: Context,
    variant: _Variant,
    state: bytes,
    source: Mapping[str, Any] | None,
    names: tuple[str, str],
) -> dict[str, str]:
    """Save a chosen network's weights, then its recipe, as artifacts; return their SHA-256."""
    keep = variant.keep
    assert keep is not None  # what was chosen is a mask
    with tempfile.TemporaryDirectory() as folder:
        save_network(
            _rebuild(context, keep, state),
            Path(folder) / names[0].removesuffix(".pt"),
            tracing=context.problem.tracing,
            keep=keep,
            source=dict(source or {}),
            interface=context.problem.task.interface(),
        )
        return {
            name: context.run.write_artifact(name, (Path(folder) / name).read_bytes())
            for name in names
        }


def _rebuild(context: Context, keep: BoolArray, state: bytes) -> nn.Module:
    """Return the chosen network in its final state, on the CPU."""
    network = extract(context.problem.network, context.problem.tracing, keep)
    network.load_state_dict(state_from_bytes(state).network)
    return network.eval()


def _cut_figures(context: Context, masks: Sequence[BoolArray | None]) -> list[dict[str, Any]]:
    """Return, for every network and limited resource, what is left and what share was cut.

    Latency is given twice: by the table, and measured now in the same way, all networks in turns.

    Args:
        context: The search, its pool with nothing unfinished.
        masks: The mask of each network, the dense one (None) first.
    """
    space, limited = context.problem.space, context.settings.further_cuts
    keeps = [np.ones(space.num_filters, dtype=bool) if keep is None else keep for keep in masks]
    figures: list[dict[str, Any]] = [
        {resource: _exact(space, resource, keep) for resource in limited if resource != "latency"}
        for keep in keeps
    ]
    if "latency" in limited:
        for row, latency in zip(figures, _latencies(context, keeps), strict=True):
            row["latency"] = latency
    return figures


def _exact(space: PruningSpace, resource: Resource, keep: BoolArray) -> dict[str, Any]:
    left = cost_of(space, resource).total(space.widths(keep))
    return {"left": left, "cut": 1 - left / dense_cost(space, resource)}


def _latencies(context: Context, keeps: Sequence[BoolArray]) -> list[dict[str, Any]]:
    space, batch, compute = context.problem.space, context.settings.latency_batch, context.compute
    if context.read_clock is not None:
        measured = [round(1e6 * context.read_clock(keep)) for keep in keeps]
    else:
        call: Call[Worker, list[int]] = Call(
            "latencies", lambda worker: worker.time_masks(compute, keeps, batch)
        )
        [measured] = context.pool.run([call])
    predicted = [cost_of(space, "latency").total(space.widths(keep)) for keep in keeps]
    dense = dense_cost(space, "latency")
    return [
        {
            "predicted_ms": by_table / 1e6,
            "predicted_cut": 1 - by_table / dense,
            "measured_ms": now / 1e6,
            "measured_cut": 1 - now / measured[0],
        }
        for by_table, now in zip(predicted, measured, strict=True)
    ]
