"""What every update rule must do when asked and told, and how generations overlap."""

from __future__ import annotations

import numpy as np
import pytest
from planted_optimum import (
    chain_space,
    packed,
    resnet20_landscape,
    run_shuffled,
    run_to_end,
    small_importance,
    small_optimizer,
    small_score,
)

from fppmo_ray.distribution import (
    RULES,
    Budget,
    Feedback,
    MaskOptimizer,
    OptimizerSettings,
)


def trajectory(proposals):
    return [(p.proposal_id, p.generation, packed(p.keep), p.score_seed) for p in proposals]


def failed(proposal):
    return Feedback(proposal_id=proposal.proposal_id, error="CUDA error: illegal memory access")


@pytest.mark.parametrize("rule", RULES)
class TestEveryRule:
    def test_every_proposal_meets_its_budget(self, rule):
        optimizer = small_optimizer(rule)
        space = chain_space([8, 8, 8])
        proposals = run_to_end(optimizer)
        assert len(proposals) == 28
        for proposal in proposals:
            assert proposal.macs == space.macs(proposal.keep)
            assert proposal.macs <= 0.5 * space.dense_macs

    def test_min_keep_and_multiples_are_respected(self, rule):
        space = chain_space([16, 20, 64], multiple=8, min_keep=0.3)
        for proposal in run_to_end(small_optimizer(rule, space)):
            assert set(space.widths(proposal.keep)[:2].tolist()) <= {8, 16, 20}
            assert space.widths(proposal.keep)[2] in (24, 32, 40, 48, 56, 64)

    def test_proposals_are_numbered_and_share_their_generations_score_seed(self, rule):
        proposals = run_to_end(small_optimizer(rule))
        assert [p.proposal_id for p in proposals] == list(range(28))
        assert [p.generation for p in proposals] == [i // 6 for i in range(28)]
        assert {p.score_seed for p in proposals} == {(3, g) for g in range(5)}

    def test_the_same_seed_gives_the_same_trajectory(self, rule):
        first, again = (trajectory(run_to_end(small_optimizer(rule))) for _ in range(2))
        assert first == again
        assert first != trajectory(run_to_end(small_optimizer(rule, seed=4)))

    @pytest.mark.parametrize("lag", [0, 1, 2])
    def test_the_order_of_feedback_is_irrelevant(self, rule, lag):
        in_order, shuffled = (small_optimizer(rule, lag=lag) for _ in range(2))
        expected = trajectory(run_to_end(in_order))
        assert trajectory(run_shuffled(shuffled)) == expected
        assert np.array_equal(shuffled.prune_prob(), in_order.prune_prob())
        assert [f.name for f in shuffled.finalists()] == [f.name for f in in_order.finalists()]

    def test_duplicates_are_ignored(self, rule):
        once, twice = small_optimizer(rule), small_optimizer(rule)
        for proposal in once.ask():
            assert once.tell(small_score(proposal)) is True
        for proposal in twice.ask():
            assert twice.tell(small_score(proposal)) is True
            assert twice.tell(failed(proposal)) is False
        assert twice.generation == 1
        assert np.array_equal(twice.prune_prob(), once.prune_prob())

    def test_an_unknown_id_is_refused(self, rule):
        optimizer = small_optimizer(rule)
        optimizer.ask()
        for proposal_id in (-1, 6):
            with pytest.raises(ValueError, match=f"6 proposals .* got proposal {proposal_id}"):
                optimizer.tell(Feedback(proposal_id=proposal_id, val_loss=1.0, val_accuracy=0.1))

    def test_a_score_that_is_not_a_number_is_refused_and_leaves_no_trace(self, rule):
        optimizer = small_optimizer(rule)
        proposal = optimizer.ask()[0]
        with pytest.raises(ValueError, match="must be finite"):
            optimizer.tell(
                Feedback(proposal_id=proposal.proposal_id, val_loss=np.nan, val_accuracy=0.5)
            )
        assert optimizer.tell(small_score(proposal))

    def test_a_replay_equals_the_live_search(self, rule):
        expected = trajectory(run_to_end(small_optimizer(rule)))
        live, flying, journal = small_optimizer(rule), [], []
        for _ in range(17):
            flying += live.ask()
            journal.append(small_score(flying.pop(len(flying) // 2)))
            live.tell(journal[-1])

        replayed, asked = small_optimizer(rule), []
        for feedback in journal:
            while generation := replayed.ask():
                asked += generation
            replayed.tell(feedback)
        assert replayed.generation == live.generation == 2
        assert np.array_equal(replayed.prune_prob(), live.prune_prob())
        for proposal in asked:
            replayed.tell(small_score(proposal))
        assert trajectory(asked + run_to_end(replayed)) == expected

    def test_failed_proposals_are_left_out_of_the_update(self, rule):
        def prune_prob_without(*lost):
            # Of seven and of five scored, one is the best quarter and one the worst.
            optimizer = small_optimizer(rule, population_size=7)
            for proposal in optimizer.ask():
                i = proposal.proposal_id
                score = Feedback(proposal_id=i, val_loss=1.0 + i, val_accuracy=0.5)
                optimizer.tell(failed(proposal) if i in lost else score)
            assert optimizer.generation == 1
            assert not {f"sample {i}" for i in lost} & {f.name for f in optimizer.finalists(9)}
            return optimizer.prune_prob()

        assert np.array_equal(prune_prob_without(2, 4), prune_prob_without())
        if rule != "random":
            assert not np.array_equal(prune_prob_without(0, 1), prune_prob_without())

    def test_one_score_alone_makes_no_update(self, rule):
        optimizer = small_optimizer(rule)
        before = optimizer.prune_prob()
        first, *others = optimizer.ask()
        optimizer.tell(small_score(first))
        for proposal in others:
            optimizer.tell(failed(proposal))
        assert optimizer.generation == 1
        assert np.array_equal(optimizer.prune_prob(), before)
        run_to_end(optimizer)

    def test_a_generation_that_failed_as_a_whole_ends_the_search_with_its_first_error(self, rule):
        optimizer = small_optimizer(rule)
        asked = optimizer.ask()
        for proposal in asked[:0:-1]:
            optimizer.tell(failed(proposal))
        with pytest.raises(RuntimeError, match=r"all 6 proposals of generation 0 .* out of memory"):
            optimizer.tell(Feedback(proposal_id=0, error="out of memory"))

    def test_only_the_ranks_of_scores_matter(self, rule):
        def squashed(proposal):
            score = small_score(proposal)
            return Feedback(
                proposal_id=proposal.proposal_id,
                val_loss=np.exp(9 * score.val_loss),
                val_accuracy=score.val_accuracy,
            )

        plain, monotone = small_optimizer(rule), small_optimizer(rule)
        assert trajectory(run_to_end(plain)) == trajectory(run_to_end(monotone, squashed))

    @pytest.mark.parametrize(("population_size", "num_proposals"), [(2, 2), (3, 10), (7, 15)])
    def test_odd_populations_and_a_last_generation_of_one_work(
        self, rule, population_size, num_proposals
    ):
        optimizer = small_optimizer(
            rule, population_size=population_size, num_proposals=num_proposals
        )
        assert len(run_to_end(optimizer)) == num_proposals
        assert optimizer.generation == optimizer.num_generations
        assert optimizer.ask() == []


@pytest.mark.parametrize("rule", ["elite", "layer_es"])
def test_learning_beats_random_masks_on_a_planted_optimum(rule):
    def found_loss(name, seed):
        landscape, importance = resnet20_landscape(seed)
        noise = np.random.default_rng(seed)
        settings = OptimizerSettings(macs_cut=0.57, num_proposals=320, rule=name, seed=seed)
        optimizer = MaskOptimizer(landscape.space, importance, settings)
        run_to_end(
            optimizer,
            lambda proposal: Feedback(
                proposal_id=proposal.proposal_id,
                val_loss=landscape.loss(proposal.keep) + 0.05 * noise.standard_normal(),
                val_accuracy=0.5,
            ),
        )
        return min(landscape.loss(finalist.keep) for finalist in optimizer.finalists())

    # The optimum has a loss of about 0.3; the start of about 0.95.
    for seed in range(2):
        assert found_loss(rule, seed) < 0.85 * found_loss("random", seed)


def test_two_generations_are_in_flight_by_default():
    optimizer = small_optimizer("layer_es")
    first, second = optimizer.ask(), optimizer.ask()
    assert [len(first), len(second)] == [6, 6]
    assert optimizer.ask() == []
    for proposal in first[:-1]:
        optimizer.tell(small_score(proposal))
    assert optimizer.ask() == []
    optimizer.tell(small_score(first[-1]))
    assert optimizer.ask()[0].generation == 2


def test_without_lag_a_generation_waits_for_the_one_before():
    optimizer = small_optimizer("layer_es", lag=0)
    first = optimizer.ask()
    assert optimizer.ask() == []
    for proposal in first:
        optimizer.tell(small_score(proposal))
    assert [p.generation for p in optimizer.ask()] == [1] * 6


def test_a_generation_is_sampled_from_the_beliefs_that_its_lag_allows():
    # All feedback of generations 0 and 1 comes in at once; generation 2 must not know of 1.
    optimizer = small_optimizer("layer_es")
    first, second = optimizer.ask(), optimizer.ask()
    for proposal in [*second, *first]:
        optimizer.tell(small_score(proposal))
    assert optimizer.generation == 2
    third = trajectory(optimizer.ask())

    early = small_optimizer("layer_es")
    for proposal in early.ask():
        early.ask()
        early.tell(small_score(proposal))
    assert early.generation == 1
    assert trajectory(early.ask()) == third


def test_equal_scores_are_ranked_by_id():
    def equal(proposal):
        return Feedback(proposal_id=proposal.proposal_id, val_loss=1.0, val_accuracy=0.5)

    optimizer = small_optimizer("elite")
    run_to_end(optimizer, equal)
    names = [finalist.name for finalist in optimizer.finalists(num_samples=2)]
    assert names == ["mode", "averaged mode", "sample 0", "sample 1", "importance-only"]


@pytest.mark.parametrize(("num_proposals", "num_averaged"), [(28, 2), (6 * 24, 3), (6 * 25, 4)])
def test_the_averaged_mode_is_that_of_the_last_eighth(num_proposals, num_averaged):
    optimizer = small_optimizer("layer_es", chain_space([40] * 4), num_proposals=num_proposals)
    logits = [optimizer.keep_logits()]
    for proposal in iter_asked(optimizer):
        optimizer.tell(small_score(proposal))
        if optimizer.generation == len(logits):
            logits.append(optimizer.keep_logits())
    budget = Budget.from_cut(chain_space([40] * 4), 0.5)
    found = {finalist.name: finalist.keep for finalist in optimizer.finalists()}
    expected = budget.fill(np.mean(logits[-num_averaged:], axis=0))
    assert found.get("averaged mode", found["mode"]).tolist() == expected.tolist()


def iter_asked(optimizer):
    while proposals := optimizer.ask():
        yield from proposals


@pytest.mark.parametrize(("rank_by", "best"), [("val_loss", 3), ("val_accuracy", 7)])
def test_the_search_ranks_by_the_score_it_is_told_to(rank_by, best):
    def score(proposal):
        i = proposal.proposal_id
        return Feedback(proposal_id=i, val_loss=abs(i - 3) + 1.0, val_accuracy=1 / (1 + abs(i - 7)))

    optimizer = small_optimizer("random", rank_by=rank_by)
    run_to_end(optimizer, score)
    assert f"sample {best}" in [finalist.name for finalist in optimizer.finalists(num_samples=1)]


def test_a_search_that_ranks_by_accuracy_refuses_a_score_without():
    optimizer = small_optimizer("random", rank_by="val_accuracy")
    optimizer.ask()
    with pytest.raises(ValueError, match="rank_by=val_accuracy needs a score with val_acc"):
        optimizer.tell(Feedback(proposal_id=0, val_loss=1.0))
    assert optimizer.tell(Feedback(proposal_id=0, error="diverged"))


def test_a_deeper_score_outranks_every_shallower_one():
    def told(steps_of):
        optimizer = small_optimizer("elite", population_size=8, num_proposals=8)
        for proposal in optimizer.ask():
            i = proposal.proposal_id
            loss = 1.0 + i  # by score alone, 0 is best; elites are two of eight
            feedback = Feedback(proposal_id=i, val_loss=loss, val_accuracy=0.5, steps=steps_of(i))
            optimizer.tell(feedback)
        return optimizer

    by_score = told(lambda i: 0)
    by_steps = told(lambda i: 50 if i in (6, 7) else 10)
    last_are_best = small_optimizer("elite", population_size=8, num_proposals=8)
    for proposal in last_are_best.ask():
        i = proposal.proposal_id
        loss = {6: 0.1, 7: 0.2}.get(i, 1.0 + i)
        last_are_best.tell(Feedback(proposal_id=i, val_loss=loss, val_accuracy=0.5))
    assert np.array_equal(by_steps.prune_prob(), last_are_best.prune_prob())
    assert not np.array_equal(by_steps.prune_prob(), by_score.prune_prob())


def test_the_best_samples_among_the_finalists_are_the_deepest_scores():
    def score(proposal):
        i = proposal.proposal_id
        steps = {4: 25, 11: 25, 20: 25}.get(i, 10)
        return Feedback(proposal_id=i, val_loss=1 / (1 + i), val_accuracy=0.5, steps=steps)

    optimizer = small_optimizer("random")
    run_to_end(optimizer, score)
    names = [f.name for f in optimizer.finalists(4) if f.name.startswith("sample")]
    assert names == ["sample 20", "sample 11", "sample 4", "sample 27"]


def test_a_depth_that_all_share_changes_nothing():
    def deep(proposal):
        score = small_score(proposal)
        return Feedback(
            proposal_id=score.proposal_id,
            val_loss=score.val_loss,
            val_accuracy=score.val_accuracy,
            steps=50,
        )

    shallow, deeper = small_optimizer("layer_es"), small_optimizer("layer_es")
    assert trajectory(run_to_end(shallow)) == trajectory(run_to_end(deeper, deep))


def test_finalists_are_distinct_legal_and_end_with_the_importance_only_mask():
    optimizer = small_optimizer("layer_es")
    proposals = {p.proposal_id: p for p in run_to_end(optimizer)}
    finalists = optimizer.finalists(num_samples=4)
    assert len({packed(finalist.keep) for finalist in finalists}) == len(finalists)
    assert finalists[0].name == "mode"
    assert finalists[-1].name == "importance-only"
    assert np.array_equal(finalists[-1].keep, optimizer.importance_only())
    space = chain_space([8, 8, 8])
    for finalist in finalists:
        assert space.macs(finalist.keep) <= 0.5 * space.dense_macs
        if finalist.name.startswith("sample"):
            proposal_id = int(finalist.name.split()[1])
            assert np.array_equal(finalist.keep, proposals[proposal_id].keep)


def test_before_any_feedback_the_finalists_come_from_the_start():
    names = [finalist.name for finalist in small_optimizer("layer_es").finalists()]
    assert names in (["mode", "importance-only"], ["importance-only"])


def test_the_importance_only_mask_is_uniform_and_cannot_be_changed_from_outside():
    optimizer = small_optimizer("layer_es")
    keep = optimizer.importance_only()
    widths = chain_space([8, 8, 8]).widths(keep)
    assert widths.max() - widths.min() <= 1
    keep[:] = False
    assert optimizer.importance_only().any()


def test_masks_of_proposals_cannot_change_the_search():
    untouched, meddled = small_optimizer("elite"), small_optimizer("elite")
    expected = trajectory(run_to_end(untouched))
    seen = []
    while not meddled.finished:
        for proposal in meddled.ask():
            seen += trajectory([proposal])
            feedback = small_score(proposal)
            proposal.keep[:] = False
            meddled.tell(feedback)
    assert seen == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"macs_cut": 0.0}, r"macs_cut must be in \(0, 1\), got 0.0"),
        ({"macs_cut": 1.0}, r"macs_cut must be in \(0, 1\), got 1.0"),
        ({"population_size": 1}, "population_size must be at least 2"),
        ({"num_proposals": 15}, "num_proposals must be at least population_size = 16, got 15"),
        ({"rule": "adam"}, "rule must be one of layer_es, local_es, widths, elite, random"),
        ({"lag": -1}, "lag must be at least 0, got -1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"rank_by": "loss"}, "rank_by must be val_loss or val_accuracy, got 'loss'"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        OptimizerSettings(**{"macs_cut": 0.5, "num_proposals": 32} | changes)


def test_an_unreachable_cut_is_refused_before_the_search():
    space = chain_space([4, 4], min_keep=0.5)
    settings = OptimizerSettings(macs_cut=0.6, num_proposals=16)
    with pytest.raises(ValueError, match=r"macs_cut must be at most 0\.5588"):
        MaskOptimizer(space, small_importance(space), settings)
