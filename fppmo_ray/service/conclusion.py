"""The conclusion of a search: equal fine-tuning for its networks, and their figures."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fppmo_ray.distribution import BoolArray
from fppmo_ray.distribution.limits import cost_of
from fppmo_ray.pruning import extract, save_network
from fppmo_ray.service.cut_figures import cut_figures, table_figures
from fppmo_ray.service.finalists import Choice
from fppmo_ray.service.pool.work import Work
from fppmo_ray.service.record.artifacts import (
    DENSE,
    FPPMO,
    IMPORTANCE_ONLY,
    RESULT,
    named,
    network_names,
)
from fppmo_ray.service.record.facts import (
    Failed,
    Finished,
    Rescored,
    Scored,
    Started,
    ends_of_scores,
)
from fppmo_ray.service.rounds import Context, RoundWeights
from fppmo_ray.service.settings import SearchSettings
from fppmo_ray.service.training_tasks import Training
from fppmo_ray.service.whole_trainings import train_whole
from fppmo_ray.service.workers.assignments import Evaluation, TrainingTask
from fppmo_ray.service.workers.latency import Latency
from fppmo_ray.training import state_from_bytes


@dataclass(frozen=True, kw_only=True)
class _Variant:
    """A network of the final table, with its mask (None: dense)."""

    name: str
    keep: BoolArray | None
    weights: RoundWeights
    """The dense weights that it is cut from."""
    macs_cut: float | None = None
    """The one it is for, of several."""

    @property
    def task(self) -> str:
        """The name of its fine-tuning in the journal."""
        return named(self.name, self.macs_cut)


def conclude(
    context: Context,
    weights: RoundWeights,
    *,
    choices: Sequence[Choice],
    source: Mapping[str, Any] | None,
    others: RoundWeights,
    teacher: RoundWeights,
) -> None:
    """Fine-tune dense, importance-only and chosen networks alike; write networks and result.

    The test split is read here, once per network and state, and nothing is decided by it.

    Args:
        context: Of the search.
        weights: The dense weights that the chosen networks are cut from.
        choices: One for every budget.
        source: How to construct the dense network.
        others: The dense weights of the networks that they are compared with.
        teacher: The dense weights to be distilled from.
    """
    variants = _variants(choices, weights, others)
    states = _fine_tune(context, teacher, variants)
    [started] = context.run.all(Started)
    result = {
        "settings": context.settings.journaled(),
        "compute": asdict(context.compute),
        "chosen": ", ".join(choice.chosen.name for choice in choices),
        "num_filters": context.problem.tracing.space.num_filters,
        "inputs": [
            {"shape": list(tensor.shape[1:]), "dtype": str(tensor.dtype).removeprefix("torch.")}
            for tensor in context.problem.example_inputs
        ],
        **({"task": started.identity["task"]} if "task" in started.identity else {}),
        "epochs_between_stages": _epochs_between_stages(context.settings),
        **table_figures(context),
        "variants": _figures(context, variants, states),
        "score_noise": _score_noise(context),
        "scores": _score_costs(context),
    }
    for variant in variants:
        if variant.name == FPPMO:
            _keep_network(context, variant, states[variant.task], source)
    content = json.dumps(result, indent=2).encode()
    sha256 = context.run.write_artifact(RESULT, content)
    context.run.record([Finished(artifact=RESULT, sha256=sha256)])


def _epochs_between_stages(settings: SearchSettings) -> int:
    """Epochs that the chosen network has had in advance of those that it is compared with."""
    return settings.stage_epochs * (len(settings.stage_settings()) - 1)


def _variants(
    choices: Sequence[Choice], weights: RoundWeights, others: RoundWeights
) -> list[_Variant]:
    """The largest network first: it takes longest."""
    return [_Variant(name=DENSE, keep=None, weights=others)] + [
        _Variant(name=name, keep=finalist.keep, weights=origin, macs_cut=choice.macs_cut)
        for choice in choices
        for name, finalist, origin in (
            (IMPORTANCE_ONLY, choice.importance_only, others),
            (FPPMO, choice.chosen, weights),
        )
    ]


def _fine_tune(
    context: Context, teacher: RoundWeights, variants: Sequence[_Variant]
) -> dict[str, bytes]:
    """The final state of every variant, by its task."""
    settings = context.settings
    trainings = [
        Training(
            task=TrainingTask(
                name=variant.task, keep=variant.keep, recipe=settings.recipe, seed=settings.seed
            ),
            weights=variant.weights.reference,
            teacher=teacher.reference,
        )
        for variant in variants
    ]
    return train_whole(trainings, context.problem, context.pool, context.run)


def _figures(
    context: Context,
    variants: Sequence[_Variant],
    states: dict[str, bytes],
) -> list[dict[str, Any]]:
    evaluations = context.pool.run(
        [
            _evaluation(variant, state)
            for variant in variants
            for state in (None, states[variant.task])  # before and after
        ]
    )
    masks = [variant.keep for variant in variants]
    # Alone, and in one call, so that nothing else slows the networks down.
    work = Work(
        name="latencies", method="latencies", arguments=(variants[0].weights.reference, masks)
    )
    [latencies] = context.pool.run([work])
    return [
        _row(context, variant, latency, {"before": before, "after": after})
        | ({"cuts": cuts} if cuts else {})
        for variant, latency, cuts, before, after in zip(
            *(variants, latencies, cut_figures(context, masks)),
            *(evaluations[::2], evaluations[1::2]),
            strict=True,
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
            moment: {"choose_val": at.choose_val.figures(), "test": at.test.figures()}
            for moment, at in evaluated.items()
        },
    }


def _evaluation(variant: _Variant, state: bytes | None) -> Work:
    return Work(
        name=f"evaluation of {variant.task}",
        method="evaluate",
        arguments=(variant.weights.reference, variant.keep, state),
    )


def _score_noise(context: Context) -> dict[str, float] | None:
    """Standard deviation of an importance-only mask's scores on search-val over fresh seeds.

    Of several budgets, the mean over their masks; of several stages, the last.
    """
    by_mask: dict[str, list[Rescored]] = {}
    rescored = context.run.all(Rescored)
    last = max((fact.stage for fact in rescored), default=0)
    for fact in rescored:
        if fact.split == "search_val" and fact.stage == last:
            by_mask.setdefault(fact.mask, []).append(fact)
    repeated = [facts for facts in by_mask.values() if len(facts) > 1]
    if not repeated:
        return None
    return {
        "repeats": min(map(len, repeated)),
        **{
            name: statistics.fmean(
                statistics.stdev(getattr(fact, name) for fact in facts) for facts in repeated
            )
            for name in ("val_loss", "val_accuracy")
            if getattr(repeated[0][0], name) is not None
        },
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
    context: Context, variant: _Variant, state: bytes, source: Mapping[str, Any] | None
) -> None:
    """Save a chosen network's files as artifacts: the weights first, the recipe names them."""
    keep = variant.keep
    assert keep is not None  # what was chosen is a mask
    names = network_names(variant.macs_cut)
    with tempfile.TemporaryDirectory() as folder:
        save_network(
            _rebuild(context, keep, state),
            Path(folder) / names[0].removesuffix(".pt"),
            tracing=context.problem.tracing,
            keep=keep,
            source=dict(source or {}),
        )
        for name in names:
            context.run.write_artifact(name, (Path(folder) / name).read_bytes())


def _rebuild(context: Context, keep: BoolArray, state: bytes) -> nn.Module:
    """The chosen network in its final state, on the CPU."""
    network = extract(context.problem.network, context.problem.tracing, keep)
    network.load_state_dict(state_from_bytes(state).network)
    return network.eval()
