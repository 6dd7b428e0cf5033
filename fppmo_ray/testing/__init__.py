"""What users' own tests may import: simulated workers and searches, and checks of update rules.

The module ``fppmo_ray.testing.pretended_gpu`` is imported by its own name, because it needs torch.
"""

from __future__ import annotations

from fppmo_ray.testing.rule_conformance import CHECKS
from fppmo_ray.testing.simulated_search import (
    SIMULATED_SPACE,
    Pace,
    SimulatedWorker,
    simulated_search,
)

__all__ = ["CHECKS", "SIMULATED_SPACE", "Pace", "SimulatedWorker", "simulated_search"]
