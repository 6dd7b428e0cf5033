"""The conclusion of a search: equal fine-tuning for three networks, and their figures."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fppmo_ray.distribution import BoolArray, Finalist
from fppmo_ray.pruning import extract, save_network
from fppmo_ray.service.latency import Latency
from fppmo_ray.service.record.facts import Failed, Finished, Rescored, Scored, ends_of_scores
from fppmo_ray.service.rounds import Context, RoundWeights
from fppmo_ray.service.training_tasks import train
from fppmo_ray.service.work import Work
from fppmo_ray.service.worker import Evaluation, TrainingTask
from fppmo_ray.training import state_from_bytes

RESULT = "result.json"
NETWORK = "network"
NETWORK_FILES = f"{NETWORK}.pt", f"{NETWORK}.json"


@dataclass(frozen=True, kw_only=True)
class _Variant:
    """A network of the final table, with its mask (None: dense)."""

    name: str
    keep: BoolArray | None


def conclude(
    context: Context,
    weights: RoundWeights,
    *,
    chosen: Finalist,
    importance_only: Finalist,
    source: Mapping[str, Any] | None,
) -> None:
    """Fine-tune dense, importance-only and chosen network alike; write network and result.

    The test split is read here, once per network and state, and nothing is decided by it.
    """
    variants = (  # the dense one first: it takes longest
        _Variant(name="dense", keep=None),
        _Variant(name="importance-only", keep=importance_only.keep),
        _Variant(name="fppmo", keep=chosen.keep),
    )
    states = _fine_tune(context, weights, variants)
    result = {
        "settings": asdict(context.settings),
        "engine": asdict(context.engine),
        "chosen": chosen.name,
        "num_filters": context.problem.tracing.space.num_filters,
        "variants": _figures(context, weights, variants, states),
        "score_noise": _score_noise(context),
        "scores": _score_costs(context),
    }
    _keep_network(context, chosen.keep, states["fppmo"], source)
    content = json.dumps(result, indent=2).encode()
    sha256 = context.run.write_artifact(RESULT, content)
    context.run.record([Finished(artifact=RESULT, sha256=sha256)])


def _fine_tune(
    context: Context, weights: RoundWeights, variants: tuple[_Variant, ...]
) -> dict[str, bytes]:
    settings = context.settings
    tasks = [
        TrainingTask(
            name=variant.name, keep=variant.keep, recipe=settings.recipe, seed=settings.seed
        )
        for variant in variants
    ]
    return train(tasks, context.pool, context.run, weights=weights.reference)


def _figures(
    context: Context,
    weights: RoundWeights,
    variants: tuple[_Variant, ...],
    states: dict[str, bytes],
) -> list[dict[str, Any]]:
    evaluations = context.pool.run(
        [
            _evaluation(weights, variant, state)
            for variant in variants
            for state in (None, states[variant.name])  # before and after
        ]
    )
    masks = [variant.keep for variant in variants]
    # Alone, and in one call, so that nothing else slows the networks down.
    work = Work(name="latencies", method="latencies", arguments=(weights.reference, masks))
    [latencies] = context.pool.run([work])
    return [
        _row(context, variant, latency, {"before": before, "after": after})
        for variant, latency, before, after in zip(
            variants, latencies, evaluations[::2], evaluations[1::2], strict=True
        )
    ]


def _row(
    context: Context,
    variant: _Variant,
    latency: tuple[Latency, ...],
    evaluated: dict[str, Evaluation],
) -> dict[str, Any]:
    space = context.problem.tracing.space
    macs = space.dense_macs if variant.keep is None else space.macs(variant.keep)
    widths = space.dense_widths if variant.keep is None else space.widths(variant.keep)
    return {
        "name": variant.name,
        "macs": macs,
        "macs_cut": 1 - macs / space.dense_macs,
        "widths": {
            group.name: width for group, width in zip(space.groups, widths.tolist(), strict=True)
        },
        "parameters": evaluated["before"].parameters,
        "file_bytes": evaluated["before"].file_bytes,
        "latency_ms": {str(item.batch): item.milliseconds for item in latency},
        **{
            moment: {"choose_val": asdict(at.choose_val), "test": asdict(at.test)}
            for moment, at in evaluated.items()
        },
    }


def _evaluation(weights: RoundWeights, variant: _Variant, state: bytes | None) -> Work:
    return Work(
        name=f"evaluation of {variant.name}",
        method="evaluate",
        arguments=(weights.reference, variant.keep, state),
    )


def _score_noise(context: Context) -> dict[str, float] | None:
    """Standard deviation of the importance-only mask's scores on search-val over fresh seeds."""
    rescored = [fact for fact in context.run.all(Rescored) if fact.split == "search_val"]
    if len(rescored) < 2:
        return None
    return {
        "repeats": len(rescored),
        "val_loss": statistics.stdev(fact.val_loss for fact in rescored),
        "val_accuracy": statistics.stdev(fact.val_accuracy for fact in rescored),
    }


def _score_costs(context: Context) -> dict[str, Any]:
    scored = context.run.all(Scored)
    by_steps = Counter(fact.rung for fact in scored)
    ends = ends_of_scores(context.run.facts).values()
    return {
        "scored": len(scored),
        "by_steps": {str(steps): by_steps[steps] for steps in sorted(by_steps)},
        "failed": sum(isinstance(end, Failed) for end in ends),
        "mean_seconds": statistics.fmean(fact.seconds for fact in scored),
    }


def _keep_network(
    context: Context, keep: BoolArray, state: bytes, source: Mapping[str, Any] | None
) -> None:
    """Save the chosen network's files as artifacts: the weights first, the recipe names them."""
    with tempfile.TemporaryDirectory() as folder:
        save_network(
            _rebuild(context, keep, state),
            Path(folder) / NETWORK,
            tracing=context.problem.tracing,
            keep=keep,
            source=dict(source or {}),
        )
        for name in NETWORK_FILES:
            context.run.write_artifact(name, (Path(folder) / name).read_bytes())


def _rebuild(context: Context, keep: BoolArray, state: bytes) -> nn.Module:
    """The chosen network in its final state, on the CPU."""
    network = extract(context.problem.network, context.problem.tracing, keep)
    network.load_state_dict(state_from_bytes(state).network)
    return network.eval()
