"""Budgets that limit more than MACs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from planted_optimum import resnet20_space, run_to_end, small_importance

from fppmo_ray.distribution import Budget, MaskOptimizer, OptimizerSettings, PruningSpace
from fppmo_ray.distribution import budget as budget_module
from fppmo_ray.distribution.costs import Activations, TensorSize, Width
from fppmo_ray.distribution.latency_table import LatencyTable, LayerLatency
from fppmo_ray.distribution.limits import Resource, cost_of, dense_cost, limits_of
from fppmo_ray.distribution.logits import project_to_budget, start_logits
from fppmo_ray.distribution.rules import RULES

ALL: dict[Resource, float] = {"params": 0.4, "latency": 0.3, "memory": 0.3}


def priced(space: PruningSpace) -> PruningSpace:
    """With parameters as in convolutions, latencies that rise in steps, and activations."""
    one = Width(constant=1)
    sizes = tuple(
        TensorSize(tensor=c.layer, per_pair=9, out_width=c.out_width, in_width=c.in_width)
        for c in space.layer_costs
    )
    made = tuple(
        TensorSize(
            tensor=c.layer,
            per_pair=4 * c.macs_per_pair // 9,
            out_width=c.out_width,
            in_width=one,
        )
        for c in space.layer_costs
    )
    activations = Activations(
        tensors=made,
        moments=tuple((i, i + 1) for i in range(len(made) - 1)),
        num_groups=len(space.groups),
    )
    layers = tuple(stepped(c.layer, c.out_width, c.in_width, space) for c in space.layer_costs)
    table = LatencyTable(
        num_groups=len(space.groups),
        layers=layers,
        written=activations.written(),
        fs_per_byte=50_000,
        constant_ns=10_000,
        dense_ns=1,
    )
    table = replace(table, dense_ns=table.total(space.dense_widths))
    return replace(
        space,
        tensor_sizes=sizes,
        constant_parameters=1000,
        activations=activations,
        latency=table,
    )


def stepped(layer: str, out: Width, into: Width, space: PruningSpace) -> LayerLatency:
    def points(width: Width) -> tuple[int, ...]:
        if not width.terms:
            return (width.constant,)
        most = space.groups[width.terms[0][0]].num_filters
        return tuple(sorted({1, most // 3, most // 2, most}))

    out_points, in_points = points(out), points(into)
    ns = tuple(tuple(500 + 40 * (o // 5) * (i // 3) for i in in_points) for o in out_points)
    return LayerLatency(
        layer=layer,
        out_width=out,
        in_width=into,
        out_points=out_points,
        in_points=in_points,
        ns=ns,
    )


SPACE = priced(resnet20_space())


def assert_filled(budget: Budget, widths: np.ndarray) -> None:
    """Within all limits, and no group could take a legal step."""
    space = budget.space
    assert space.macs_of_widths(widths) <= budget.max_macs
    assert all(limit.cost.total(widths) <= limit.most for limit in budget.further)
    for index, group in enumerate(space.groups):
        if widths[index] < space.max_widths[index]:
            wider = widths.copy()
            wider[index] = min(widths[index] + group.multiple, space.max_widths[index])
            over = [limit.cost.total(wider) > limit.most for limit in budget.further]
            assert space.macs_of_widths(wider) > budget.max_macs or any(over)


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize(
    ("macs_cut", "cuts"),
    [(0.0, {name: cut}) for name, cut in ALL.items()] + [(0.0, ALL), (0.3, ALL), (0.57, ALL)],
)
def test_masks_meet_every_limit_and_no_legal_step_keeps_to_them_all(
    macs_cut: float, cuts: dict[Resource, float], multiple: int
) -> None:
    budget = Budget.from_cut(SPACE.with_limits(multiple=multiple), macs_cut, cuts)
    rng = np.random.default_rng(0)
    for _ in range(10):
        keep = budget.fill(3 * rng.standard_normal(SPACE.num_filters))
        assert_filled(budget, SPACE.widths(keep))


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize(("macs_cut", "cuts"), [(0.57, {}), (0.0, {"params": 0.4}), (0.3, ALL)])
def test_a_population_is_filled_as_each_of_its_masks_alone(
    macs_cut: float,
    cuts: dict[Resource, float],
    multiple: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    budget = Budget.from_cut(SPACE.with_limits(multiple=multiple), macs_cut, cuts)
    priorities = 3 * np.random.default_rng(0).standard_normal((20, SPACE.num_filters))
    priorities[7] = 1.0  # all of them equal
    alone = [budget.fill(priority).tolist() for priority in priorities]
    assert budget.fill_each(priorities).tolist() == alone
    monkeypatch.setattr(budget_module, "_FILTERS_AT_ONCE", 7 * SPACE.num_filters)
    assert budget.fill_each(priorities).tolist() == alone
    assert budget.fill_each(priorities[:0]).tolist() == []


@pytest.mark.parametrize("rule", RULES)
def test_every_proposal_of_a_search_meets_every_limit(rule: str) -> None:
    settings = OptimizerSettings(
        macs_cut=(0.0, 0.5),
        num_proposals=16,
        population_size=8,
        rule=rule,
        params_cut=0.4,
        latency_cut=0.3,
        memory_cut=0.3,
    )
    search = MaskOptimizer(SPACE, small_importance(SPACE), settings)
    budgets = {cut: Budget.from_cut(SPACE, cut, ALL) for cut in settings.macs_cuts}
    for item in [*run_to_end(search), *search.finalists()]:
        assert item.macs_cut is not None
        assert_filled(budgets[item.macs_cut], SPACE.widths(item.keep))


def test_a_limit_that_never_binds_changes_no_mask() -> None:
    alone, beside = Budget.from_cut(SPACE, 0.57), Budget.from_cut(SPACE, 0.57, {"params": 0.01})
    rng = np.random.default_rng(0)
    for _ in range(10):
        wishes = rng.standard_normal(SPACE.num_filters)
        assert np.array_equal(alone.fill(wishes), beside.fill(wishes))


@pytest.mark.parametrize("resource", ALL)
def test_expected_costs_meet_the_tightest_limit(resource: Resource) -> None:
    budget = Budget.from_cut(SPACE, 0.1, {resource: 0.4})
    logits = project_to_budget(budget, start_logits(budget, small_importance(SPACE)) + 2.0)
    kept = np.add.reduceat(1 / (1 + np.exp(-logits)), SPACE.offsets)
    [limit] = budget.further
    expected = limit.cost.expected(np.maximum(kept, SPACE.min_widths))
    assert expected == pytest.approx(limit.most, rel=1e-3)


def test_a_cut_out_of_reach_is_refused_with_what_is_reachable() -> None:
    space = SPACE.with_limits(min_keep=0.5)
    for resource, cost in ((name, cost_of(space, name)) for name in ALL):
        reachable = 1 - cost.total(space.min_widths) / dense_cost(space, resource)
        sentence = rf"{resource}_cut must be at most {str(reachable)[:5]}\d*, got 0.99: the smalle"
        with pytest.raises(ValueError, match=sentence):
            limits_of(space, {resource: 0.99})


def test_a_table_by_which_the_dense_network_is_fast_enough_is_refused() -> None:
    assert SPACE.latency is not None
    by_table = SPACE.latency.total(SPACE.dense_widths)
    busy = replace(SPACE, latency=replace(SPACE.latency, dense_ns=40 * by_table))
    sentence = rf"the table has {by_table:,} ns for the dense network, and {40 * by_table:,} were"
    with pytest.raises(ValueError, match=sentence):
        limits_of(busy, {"latency": 0.3})
    [limit] = limits_of(busy, {"latency": 0.98})
    assert not limit.is_met(SPACE.dense_widths)


@pytest.mark.parametrize("cut", [0.0, 1.0, -0.1, 30, float("nan")])
@pytest.mark.parametrize("resource", ALL)
def test_a_cut_out_of_range_is_refused(resource: str, cut: float) -> None:
    with pytest.raises(ValueError, match=rf"{resource}_cut must be in \(0, 1\), got"):
        OptimizerSettings(macs_cut=0.5, num_proposals=16, **{f"{resource}_cut": cut})


def test_no_macs_cut_is_allowed_only_beside_another_cut() -> None:
    assert OptimizerSettings(macs_cut=0.0, num_proposals=16, params_cut=0.3).macs_cuts == (0.0,)
    with pytest.raises(ValueError, match=r"macs_cut must be in \(0, 1\).* 0 is allowed beside"):
        OptimizerSettings(macs_cut=0.0, num_proposals=16)


def test_what_a_space_does_not_tell_cannot_be_cut() -> None:
    for resource, needed in (("params", "sizes"), ("latency", "table"), ("memory", "activations")):
        with pytest.raises(ValueError, match=f"{resource}_cut needs a space that tells .*{needed}"):
            Budget.from_cut(resnet20_space(), 0.5, {resource: 0.3})


def test_what_is_measured_of_a_network_does_not_change_which_space_it_is() -> None:
    assert SPACE.fingerprint() == resnet20_space().fingerprint()
