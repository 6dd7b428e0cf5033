"""A task of the user's own: what a network is for, where that is not to classify images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

from torch import Tensor, nn

from fppmo_ray.service.settings import SearchSettings

_OF_IMAGES = (
    *("score_steps", "screen_steps", "rescore_steps", "rank_by", "capacity_weight"),
    *("score_images", "score_recalibrate_images", "rescore_images", "recalibrate_images"),
    *("baseline_epochs", "adapt_epochs", "stages", "dtype", "autotune", "recipe"),
)
"""Settings that say how images are scored and trained on, which a task does by itself."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """What pruned networks are scored by and how they are fine-tuned, as plain callables.

    Workers call them, each with a network of its own: a copy on the worker's device, which they
    may change as they like. They travel as Ray pickles functions, with all that they refer to;
    large data is better loaded by them, on the worker. What they raise is an error of the mask's
    own if another worker raises it too. torch's generators are seeded before every call, so a
    callable that draws from nothing else gives the same again.

    A search moves by the order of scores within a generation and never looks at ``test``.
    """

    example_inputs: Tensor | tuple[Tensor, ...]
    """What the network's forward takes, with a batch axis; only shapes and types matter."""
    score: Callable[[nn.Module, int], float]
    """(network, seed) -> how good the network is, on held-out training data; the higher the
    better, and finite. The seed is for what is random in it, such as which data it looks at: all
    masks of a generation have the same, finalists have others. Begins in eval mode."""
    fine_tune: Callable[[nn.Module], None] | None = None
    """Trains a network in place, as long as it should be trained in the end. None: networks are
    handed out as they were cut. Begins in training mode."""
    test: Callable[[nn.Module], float] | None = None
    """How good a network is on data that decides nothing: the figure in the result. None: the
    score, at a seed of its own."""
    recalibrate: Callable[[nn.Module], None] | None = None
    """Mends in place what a cut breaks without training, before a pruned network is scored,
    fine-tuned or tested: ``fppmo_ray.recalibrate_batchnorm``, say. A network with batch norms
    scores badly without."""
    measure: str = "score"
    """What ``score`` and ``test`` return, in a word with its unit, for tables: ``PSNR, dB``."""

    def __post_init__(self) -> None:
        for name in ("score", "fine_tune", "test", "recalibrate"):
            given = getattr(self, name)
            if not callable(given) and (given is not None or name == "score"):
                raise ValueError(f"{name} of a task must be a function, got {given!r}")

    def inputs(self) -> tuple[Tensor, ...]:
        """``example_inputs``, one by one."""
        given = self.example_inputs
        return given if isinstance(given, tuple) else (given,)

    def functions(self) -> tuple[Callable[..., Any] | None, ...]:
        """Those that were given."""
        return self.score, self.fine_tune, self.test, self.recalibrate

    def identity(self) -> dict[str, Any]:
        """What is known of it without looking into its functions: their names."""
        called = {name: _name(getattr(self, name)) for name in ("score", "fine_tune", "test")}
        return {"measure": self.measure, **called, "recalibrate": _name(self.recalibrate)}


def _name(function: Any) -> str | None:
    """Of a function or method; of any other callable, its class's."""
    if function is None:
        return None
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def settings_of_task(settings: SearchSettings, task: Task) -> SearchSettings:
    """The settings of a search whose task scores and trains by itself.

    Its fine-tuning counts as one epoch.

    Raises:
        ValueError: they say how images are scored or trained on.
    """
    defaults = {
        one.name: one.default if one.default_factory is MISSING else one.default_factory()
        for one in fields(SearchSettings)
        if one.name in _OF_IMAGES
    }
    changed = [name for name, value in defaults.items() if getattr(settings, name) != value]
    if changed:
        raise ValueError(
            f"a task scores and trains by itself, so {', '.join(changed)} must be left at the "
            "default; do in score and fine_tune what they would do"
        )
    if settings.importance == "taylor":
        raise ValueError(
            "importance taylor needs the gradients of classified images; for a task give l1, l2, "
            "fpgm or bn_scale"
        )
    epochs = 0 if task.fine_tune is None else 1
    recipe = replace(settings.recipe, epochs=epochs)
    # Weighing is for losses: a task's scores may have any sign.
    return replace(settings, recipe=recipe, capacity_weight=0.0)
