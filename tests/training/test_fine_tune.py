from __future__ import annotations

import copy
import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fppmo_ray.training import (
    PLAIN_COMPUTE,
    ComputeConfig,
    ImageArrays,
    Recipe,
    build_network,
    evaluate,
    fine_tune,
    load_dataset,
    open_images,
    state_from_bytes,
    state_to_bytes,
    train_epoch,
    train_steps,
)
from fppmo_ray.training.checkpoints import capture, read_checkpoint, write_checkpoint
from fppmo_ray.training.feature_match import FeatureMatch, compare_on

RECIPE = Recipe(epochs=3, batch_size=32, learning_rate=0.05, distillation_weight=0.0)
VARIANTS = {
    "plain": (RECIPE, PLAIN_COMPUTE),
    "bfloat16": (RECIPE, ComputeConfig(dtype="bfloat16")),
    "contiguous": (RECIPE, ComputeConfig(channels_last=False)),
    "one cycle, smoothing, clipping": (
        replace(RECIPE, schedule="one_cycle", label_smoothing=0.1, clip_norm=1.0),
        PLAIN_COMPUTE,
    ),
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.fixture
def images(digits):
    return open_images(digits.train, np.arange(200), digits)


def fresh(seed=0):
    """The digits network with dropout, so that torch's own generators matter too."""
    network = build_network("digits_cnn", 10, seed=seed)
    network.linear = nn.Sequential(nn.Dropout(0.2), network.linear)
    return network


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize(("recipe", "compute"), VARIANTS.values(), ids=VARIANTS)
def test_stopping_after_every_epoch_changes_no_bit(images, recipe, compute):
    straight = fresh()
    fine_tune(straight, images, recipe, seed=5, compute=compute)
    content = None
    network = fresh()
    for epoch in range(3):
        state = None if content is None else state_from_bytes(content)
        state, _ = train_epoch(
            network, images, recipe, epoch=epoch, seed=5, state=state, compute=compute
        )
        content = state_to_bytes(state)
        torch.manual_seed(epoch)
        network = fresh(seed=99)  # another process starts with other weights
    assert same(straight.state_dict(), state_from_bytes(content).network)


def test_training_equals_one_plain_loop_with_one_optimizer(images):
    network = build_network("digits_cnn", 10).to(memory_format=torch.channels_last)
    ours = copy.deepcopy(network)
    fine_tune(ours, images, RECIPE, seed=5)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    steps = [
        batch for epoch in range(3) for batch in images.training_batches(32, seed=5, epoch=epoch)
    ]
    for step, (batch, labels) in enumerate(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * (step / 18))) / 2
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(batch), labels).backward()
        optimizer.step()
    assert len(steps) == 18
    assert same(ours.state_dict(), network.state_dict())


def test_an_epoch_leaves_the_state_it_starts_from_alone(images):
    first, _ = train_epoch(fresh(), images, RECIPE, epoch=0, seed=0, state=None)
    before = copy.deepcopy(first)
    second, _ = train_epoch(fresh(), images, RECIPE, epoch=1, seed=0, state=first)
    assert same(first.network, before.network)
    assert same(first.momentum, before.momentum)
    again, _ = train_epoch(fresh(), images, RECIPE, epoch=1, seed=0, state=first)
    assert same(second.network, again.network)
    assert (first.epochs_done, second.epochs_done) == (1, 2)


def test_other_seeds_train_other_networks(images):
    first, second = (
        train_epoch(fresh(), images, RECIPE, epoch=0, seed=seed, state=None)[0] for seed in (0, 1)
    )
    assert not same(first.network, second.network)


def test_a_training_stopped_between_epochs_goes_on_from_its_checkpoint(images, tmp_path):
    straight = fresh()
    fine_tune(straight, images, RECIPE, seed=1)
    path = tmp_path / "training.pt"

    class Stopped(Exception):
        pass

    def stop_after_second(report):
        if report.epoch == 1:
            raise Stopped

    with pytest.raises(Stopped):
        fine_tune(fresh(), images, RECIPE, seed=1, checkpoint=path, on_epoch=stop_after_second)
    resumed, epochs = fresh(seed=7), []
    fine_tune(
        resumed,
        images,
        RECIPE,
        seed=1,
        checkpoint=path,
        on_epoch=lambda report: epochs.append(report.epoch),
    )
    assert epochs == [2]
    assert same(straight.state_dict(), resumed.state_dict())
    finished = fresh(seed=8)
    fine_tune(finished, images, RECIPE, seed=1, checkpoint=path)
    assert same(straight.state_dict(), finished.state_dict())
    assert [entry.name for entry in tmp_path.iterdir()] == ["training.pt"]


def test_a_checkpoint_of_another_run_is_refused(images, tmp_path):
    path = tmp_path / "training.pt"
    recipe = replace(RECIPE, epochs=1)
    fine_tune(fresh(), images, recipe, seed=1, checkpoint=path)
    with pytest.raises(ValueError, match=r"its seed is \[1\], this run's is \[2\]"):
        fine_tune(fresh(), images, recipe, seed=2, checkpoint=path)
    with pytest.raises(ValueError, match=r"its momentum is 0\.9, this run's is 0\.8"):
        fine_tune(fresh(), images, replace(recipe, momentum=0.8), seed=1, checkpoint=path)
    with pytest.raises(ValueError, match="the training state holds the weights of another network"):
        fine_tune(build_network("digits_cnn", 10), images, recipe, seed=1, checkpoint=path)


def test_every_change_of_a_checkpoint_shows_and_torch_still_reads_it(tmp_path):
    network = nn.Sequential(nn.Conv2d(1, 4, 3))
    path, run = tmp_path / "checkpoint.pt", {"seed": 1}
    write_checkpoint(path, capture(network, None, 3), run)
    content = path.read_bytes()
    assert torch.load(path, weights_only=True)["epochs_done"] == 3
    for place in range(0, len(content), 13):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        for damaged in (changed, content[:place]):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"checkpoint\.pt is corrupt or truncated; delete"):
                read_checkpoint(path, run)
    path.write_bytes(content)
    state = read_checkpoint(path, run)
    assert state is not None
    assert torch.equal(state.network["0.weight"], network[0].weight)


def test_a_corrupt_checkpoint_is_refused(images, tmp_path):
    path = tmp_path / "training.pt"
    state = fine_tune(fresh(), images, replace(RECIPE, epochs=1), seed=1)
    content = state_to_bytes(state)
    for broken in (b"", content[:1000], content[:-5]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"training\.pt is corrupt or truncated"):
            fine_tune(fresh(), images, RECIPE, seed=1, checkpoint=path)
        with pytest.raises(ValueError, match="the training state is corrupt or truncated"):
            state_from_bytes(broken)
    buffer = io.BytesIO()
    torch.save({"weights": 1}, buffer)
    with pytest.raises(ValueError, match="lacks 'network'"):
        state_from_bytes(buffer.getvalue())


def test_epochs_out_of_turn_are_refused(images):
    state, _ = train_epoch(fresh(), images, RECIPE, epoch=0, seed=0, state=None)
    with pytest.raises(ValueError, match=r"next epoch is 1 of a recipe of 3 .*, got epoch 2"):
        train_epoch(fresh(), images, RECIPE, epoch=2, seed=0, state=state)
    with pytest.raises(ValueError, match="next epoch is 0 of a recipe of 0"):
        train_epoch(fresh(), images, replace(RECIPE, epochs=0), epoch=0, seed=0, state=None)


def test_a_recipe_of_no_epochs_leaves_the_network(images):
    network = fresh()
    before = copy.deepcopy(network.state_dict())
    state = fine_tune(network, images, replace(RECIPE, epochs=0), seed=0)
    assert same(before, network.state_dict())
    assert same(before, state.network)


def test_reports_follow_the_schedule_and_the_learning(images):
    reports = []
    fine_tune(fresh(), images, RECIPE, seed=0, on_epoch=reports.append)
    assert [report.epoch for report in reports] == [0, 1, 2]
    assert [report.learning_rate for report in reports] == pytest.approx([0.05, 0.0375, 0.0125])
    assert reports[2].loss < reports[1].loss < reports[0].loss
    assert reports[2].accuracy > 0.5


def test_steps_are_a_function_of_weights_recipe_and_seed(images):
    first, second, other = fresh(), fresh(), fresh()
    train_steps(first, images, RECIPE, steps=9, seed=(0, 3))
    torch.manual_seed(123)
    train_steps(second, images, replace(RECIPE, epochs=50), steps=9, seed=(0, 3))
    train_steps(other, images, RECIPE, steps=9, seed=(0, 4))
    assert same(first.state_dict(), second.state_dict())
    assert not same(first.state_dict(), other.state_dict())
    assert first.bn1.num_batches_tracked == 9  # six batches an epoch: the second one is begun


def test_no_steps_change_nothing_and_fewer_are_refused(images):
    network = fresh()
    before = copy.deepcopy(network.state_dict())
    train_steps(network, images, RECIPE, steps=0, seed=0)
    assert same(before, network.state_dict())
    with pytest.raises(ValueError, match="steps must be at least 0, got -1"):
        train_steps(network, images, RECIPE, steps=-1, seed=0)


def test_training_leaves_modes_and_torchs_generator_alone(images):
    network = fresh().eval()
    before = torch.get_rng_state()
    train_steps(network, images, RECIPE, steps=2, seed=0)
    assert torch.equal(before, torch.get_rng_state())
    assert not any(module.training for module in network.modules())


def test_weights_stay_float32_in_bfloat16(images):
    network = fresh()
    train_steps(network, images, RECIPE, steps=2, seed=0, compute=ComputeConfig(dtype="bfloat16"))
    assert {value.dtype for value in network.parameters()} == {torch.float32}


def test_frozen_parameters_stay(images):
    network = fresh()
    network.conv1.weight.requires_grad_(False)
    before = network.conv1.weight.clone()
    train_steps(network, images, RECIPE, steps=3, seed=0)
    assert torch.equal(before, network.conv1.weight)


def test_clipped_gradients_move_weights_no_further_than_the_rate_times_the_norm(images):
    recipe = replace(RECIPE, clip_norm=1e-3, weight_decay=0.0)
    network = fresh()
    before = [parameter.detach().clone() for parameter in network.parameters()]
    train_steps(network, images, recipe, steps=1, seed=0)
    moved = torch.cat(
        [(new - old).flatten() for new, old in zip(network.parameters(), before, strict=True)]
    ).norm()
    # Nesterov's first step is (1 + momentum) gradients long.
    assert moved.item() == pytest.approx(1.9 * 1e-3 * 0.05, rel=1e-2)


def test_a_diverging_run_says_so(images):
    wild = replace(RECIPE, learning_rate=1e30, epochs=2)
    with pytest.raises(
        RuntimeError, match=r"diverged: the loss became (nan|inf) by epoch 0, step 5, .*lower the"
    ):
        fine_tune(fresh(), images, wild, seed=0)
    with pytest.raises(RuntimeError, match=r"diverged: the loss became (nan|inf) by step 7,"):
        train_steps(fresh(), images, wild, steps=8, seed=0)
    with pytest.raises(RuntimeError, match="by step 31,"):  # not only at the end
        train_steps(fresh(), images, replace(wild, batch_size=4), steps=200, seed=0)


def test_a_student_of_weight_one_believes_its_teacher_instead_of_the_labels(digits, images):
    teacher = build_network("digits_cnn", 10)
    fine_tune(teacher, images, replace(RECIPE, epochs=6), seed=0)
    for parameter in (teacher.linear.weight, teacher.linear.bias):
        parameter.data = parameter.data.roll(1, dims=0)  # it now says 4 where it sees a 3
    teacher.train()
    before = copy.deepcopy(teacher.state_dict())
    student = fresh(seed=3)
    recipe = replace(RECIPE, distillation_weight=1.0)
    train_steps(student, images, recipe, steps=120, seed=0, teacher=teacher)
    [(batch, labels)] = open_images(digits.test, None, digits).batches(359)
    wrong = (labels + 1) % 10
    assert evaluate(student, [(batch, labels)]).accuracy < 0.05
    assert evaluate(student, [(batch, wrong)]).accuracy > 0.6  # chance is 0.1
    assert same(before, teacher.state_dict())
    assert teacher.training


def test_a_student_learns_its_teachers_features_by_their_weight(digits, images):
    teacher, channels = build_network("digits_cnn", 10, seed=1), np.arange(64)[::-1].copy()
    fine_tune(teacher, images, replace(RECIPE, epochs=1), seed=0)
    recipe = replace(RECIPE, epochs=5, distillation_weight=0.5, learning_rate=0.01)

    def distance(weight: float) -> float:
        student, match = fresh(), FeatureMatch(module="bn4", channels=channels)
        changed = replace(recipe, feature_weight=weight)
        fine_tune(student, images, changed, seed=0, teacher=teacher, matches=[match])
        comparison = compare_on([match], torch.device("cpu"))
        [(batch, _)] = open_images(digits.test, None, digits).batches(359)
        with torch.no_grad():
            with comparison.outputs_of(student.eval()) as own:
                student(batch)
            with comparison.outputs_of(teacher.eval()) as wished:
                teacher(batch)
        assert torch.equal(wished["bn4"][:, channels], wished["bn4"].flip(1))
        return float(comparison.error(own, wished))

    assert distance(10.0) < 0.5 * distance(0.0)


def test_distillation_without_a_teacher_is_refused(images):
    recipe = replace(RECIPE, distillation_weight=0.5)
    with pytest.raises(ValueError, match=r"distillation_weight 0\.5 needs a teacher"):
        train_steps(fresh(), images, recipe, steps=1, seed=0)


def test_read_only_arrays_train(digits):
    source = ImageArrays(digits.train.images[:64].copy(), digits.train.labels[:64].copy())
    source.images.flags.writeable = False
    source.labels.flags.writeable = False
    before = source.images.copy()
    network = fresh()
    train_steps(network, open_images(source, None, digits), RECIPE, steps=1, seed=0)
    assert np.array_equal(source.images, before)
    assert not same(network.state_dict(), fresh().state_dict())


def test_the_digits_network_learns_digits_in_seconds(digits):
    network = build_network("digits_cnn", 10)
    recipe = replace(RECIPE, epochs=8, batch_size=64, learning_rate=0.1, schedule="one_cycle")
    fine_tune(network, open_images(digits.train, None, digits), recipe, seed=0)
    test = open_images(digits.test, None, digits)
    assert evaluate(network, test.batches(359)).accuracy > 0.97
    assert math.isfinite(evaluate(network, test.batches(359), dtype="bfloat16").loss)
