"""Prune a CIFAR-10 network by feedback under Ray Tune, where ASHA stops the bad masks early.

python jobs/tune_cifar10.py --data DIR --network resnet56 --weights FILE --macs-cut 0.57 \
        --score-steps 50 --run-dir runs/resnet56-tune
fppmo-ray submit jobs/tune_cifar10.py ... --run-dir /absolute/path --address http://HEAD:8265
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler
from rich.console import Console
from rich.table import Table

from fppmo_ray import Dataset, Resources, SearchSettings, Splits, load_dataset, save_network
from fppmo_ray.job import require_lasting, run_job
from fppmo_ray.service.resources import connection
from fppmo_ray.service.stopping import SearchStopped
from fppmo_ray.service.tune import (
    FPPMOSearch,
    Problem,
    Trial,
    build_problem,
    image_classification,
    prune_trainable,
    ranked_trials,
    trained_network,
)
from fppmo_ray.training import build_network, load_weights, source_of, splits_from_files

_NUM_SHOWN = 10
_MAX_FAILURES = 3  # per trial: workers and nodes are lost, masks are not to blame


def main(
    data: Path,
    run_dir: Path,
    settings: SearchSettings,
    resources: Resources,
    *,
    weights: Path,
    network: str = "resnet56",
    search_val_rows: Path | None = None,
    rungs: tuple[int, ...] = (0, 10, 25, 50),
    resume: bool = False,
    resume_or_start: bool = False,
) -> None:
    """Search, and save the best trial's network with the fine-tuning of its score.

    Control-C and ``fppmo-ray stop`` end it once Tune has saved its state; trials that were running
    are run again by --resume.

    Args:
        data: Folder with CIFAR-10 as parquet files or in torchvision's layout.
        run_dir: Folder of Tune's experiment and of the network, which every node sees.
        settings: What to search for; Tune trains no baseline and rescores no finalists.
        resources: Where it runs; as many trials at a time as workers. Tune has no timeouts.
        weights: The network's trained weights.
        network: Which network to prune: resnet20, 32, 44, 56 or 110 (``_b``: projection shortcuts),
            or vgg16_bn.
        search_val_rows: .npy file of training rows that the weights have never seen; by default
            6 % of every class.
        rungs: Fine-tuning steps after which trials report and may be stopped, up to --score-steps.
        resume: Go on with the experiment in the run directory.
        resume_or_start: The same, but begin it where there is none yet.
    """
    if resources.score_timeout is not None or resources.call_timeout is not None:
        raise ValueError(
            "Tune has no limit for a trial's time: leave --score-timeout and --call-timeout out"
        )
    require_lasting(run_dir)
    run_dir = run_dir.resolve()
    resume = resume or (resume_or_start and _holds_experiment(run_dir))
    _require_fit(run_dir, resume=resume)
    dataset = load_dataset("cifar10", data)
    dense = build_network(network, dataset.num_classes)
    load_weights(dense, weights)
    splits = _splits(dataset, search_val_rows, settings.seed)
    task = image_classification(dataset, splits, seed=settings.seed)
    problem = build_problem(dense, task, settings, resources=resources)
    trainable = prune_trainable(problem, rungs)
    searcher = FPPMOSearch.for_problem(problem, rungs)
    if resume:
        searcher.restore_from_dir(str(run_dir))  # refuses other settings; Tune would ignore them
    with connection(resources), _stopped_by_sigterm():
        if resume:
            tuner = tune.Tuner.restore(str(run_dir), trainable)
        else:
            scheduler = _asha(searcher, len(rungs))
            tuner = _tuner(trainable, searcher, scheduler, resources.workers, run_dir)
        best = ranked_trials(problem, tuner.fit())
    _require_end(searcher, run_dir, settings.num_proposals)
    _show(best[:_NUM_SHOWN], problem)
    path = save_network(
        trained_network(problem, best[0]),
        run_dir / "network",
        tracing=problem.tracing,
        keep=best[0].proposal.keep,
        source=source_of(network, dataset.num_classes),
    )
    Console().print(f"network of the first: {path}", soft_wrap=True)


def _require_fit(run_dir: Path, *, resume: bool) -> None:
    holds_experiment = _holds_experiment(run_dir)
    if resume and not holds_experiment:
        raise ValueError(f"--resume: {run_dir} holds no experiment; start it without --resume")
    if holds_experiment and not resume:
        raise ValueError(
            f"{run_dir} already holds an experiment; go on with it by --resume, or choose another "
            "run directory"
        )


def _holds_experiment(run_dir: Path) -> bool:
    """Whether Tune has saved a state there; what ended before that is begun again."""
    states = "experiment_state-*.json", FPPMOSearch.CKPT_FILE_TMPL.format("*")
    return tune.Tuner.can_restore(str(run_dir)) and all(any(run_dir.glob(s)) for s in states)


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """End Tune on the first SIGTERM as it ends on Control-C, after it has saved its state.

    Enter this after Ray has started, which handles SIGTERM in a way of its own.
    """

    def obey(*_: object) -> None:
        signal.signal(signal.SIGTERM, before)
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGTERM, obey)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _require_end(searcher: FPPMOSearch, run_dir: Path, num_proposals: int) -> None:
    searcher.restore_from_dir(str(run_dir))  # a restored tuner has told another one
    if searcher.num_ended < num_proposals:
        raise SearchStopped(
            f"stopped: {searcher.num_ended} of {num_proposals} proposals have ended; go on with "
            "--resume"
        )


def _splits(dataset: Dataset, search_val: Path | None, seed: int) -> Splits | None:
    if search_val is None:
        return None
    return splits_from_files(dataset.train.labels, search_val=search_val, seed=seed)


def _asha(searcher: FPPMOSearch, num_rungs: int) -> AsyncHyperBandScheduler:
    """Of the masks that get to a report, those worse than the median are stopped there."""
    return AsyncHyperBandScheduler(
        metric=searcher.metric,
        mode=searcher.mode,
        grace_period=1,
        max_t=num_rungs,
        reduction_factor=2,
    )


def _tuner(
    trainable: type[tune.Trainable],
    searcher: FPPMOSearch,
    scheduler: AsyncHyperBandScheduler,
    workers: int,
    run_dir: Path,
) -> tune.Tuner:
    return tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=-1,  # the searcher says when it is done
            max_concurrent_trials=workers,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=run_dir.name,
            storage_path=str(run_dir.parent),
            failure_config=tune.FailureConfig(max_failures=_MAX_FAILURES),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=True),
        ),
    )


def _show(trials: list[Trial], problem: Problem) -> None:
    table = Table(title="best trials, on search-val", caption="the first of many owes some to luck")
    for column in ("proposal", "generation", "steps", "val loss", "val accuracy, %", "MACs cut, %"):
        table.add_column(column, justify="right")
    for trial in trials:
        proposal, feedback = trial.proposal, trial.feedback
        assert feedback.val_accuracy is not None  # images are classified
        table.add_row(
            f"{proposal.proposal_id}",
            f"{proposal.generation}",
            f"{feedback.steps}",
            f"{feedback.val_loss:.4f}",
            f"{100 * feedback.val_accuracy:.2f}",
            f"{100 - 100 * proposal.macs / problem.space.dense_macs:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    run_job(main)
