"""The search under Ray Tune, with Tune's schedulers, loggers and experiment directory.

``FPPMOSearch`` is the probability model as a search algorithm: each trial is a proposal.
``prune_trainable`` makes the trainable that scores it, in *rungs*, so that schedulers such as ASHA
can stop bad masks after a few fine-tuning steps. If no trial is stopped early, masks and scores
are those of ``fppmo_ray.search`` with the same seed. No baseline is trained, no finalists are
rescored, and there is no journal: a run is restored from Tune's experiment directory.

Example:
    >>> problem = build_problem(network, image_classification(dataset), settings)  # doctest: +SKIP
    >>> rungs = (0, 10, 25, 50)
    >>> tuner = tune.Tuner(  # doctest: +SKIP
    ...     prune_trainable(problem, rungs),
    ...     tune_config=tune.TuneConfig(
    ...         search_alg=FPPMOSearch.for_problem(problem, rungs),
    ...         scheduler=ASHAScheduler(metric="val_loss", mode="min", max_t=4, reduction_factor=2),
    ...         num_samples=-1,  # the searcher says when it is done
    ...         reuse_actors=True,
    ...     ),
    ...     run_config=tune.RunConfig(
    ...         failure_config=tune.FailureConfig(max_failures=3),
    ...         checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=True),
    ...     ),
    ... )
    >>> best, *others = ranked_trials(problem, tuner.fit())  # doctest: +SKIP
    >>> smaller = trained_network(problem, best)  # doctest: +SKIP

``max_failures`` says how often Tune repeats a trial whose worker or node was lost. A trial that
still ends with an error, or reports a figure that is not finite, is a failed proposal and never
enters the update. Without ``max_failures``, a single lost worker makes its proposal a failed one.
"""

from fppmo_ray.service.image_task import image_classification
from fppmo_ray.service.problem import Problem
from fppmo_ray.service.tune.searcher import FPPMOSearch
from fppmo_ray.service.tune.trials import (
    PruneTrainable,
    Trial,
    build_problem,
    prune_trainable,
    ranked_trials,
    trained_network,
)

__all__ = [
    "FPPMOSearch",
    "Problem",
    "PruneTrainable",
    "Trial",
    "build_problem",
    "image_classification",
    "prune_trainable",
    "ranked_trials",
    "trained_network",
]
