"""A warning where all masks of a generation have the same score, so that nothing can be learnt."""

from __future__ import annotations

import logging

from fppmo_ray.service.progress.observation import Listener, Observation

logger = logging.getLogger(__name__)

_SMALLEST_SPREAD = 1e-5  # of the largest score; equal logits differ by rounding alone


def spread_warning() -> Listener:
    """Return a listener that warns once, after the first such generation."""
    warned = False

    def listen(seen: Observation) -> None:
        nonlocal warned
        for generation in seen.touched:
            if warned or not generation.is_complete:
                continue
            scores = [
                [abs(item.val_loss) for item in of_budget if item.val_loss is not None]
                for of_budget in generation.by_budget
            ]
            compared = [found for found in scores if len(found) > 1]
            if compared and all(max(s) - min(s) <= _SMALLEST_SPREAD * max(s) for s in compared):
                warned = True
                logger.warning(
                    "all %d masks of generation %d have the same score, so the search learns "
                    "nothing from them: the dense network may answer the same to all images, or "
                    "the cut may leave too little; look at its accuracy, or cut less",
                    sum(map(len, compared)),
                    generation.index,
                )

    return listen
