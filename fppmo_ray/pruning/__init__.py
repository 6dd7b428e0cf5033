"""Filters of a trained network: which can be removed, and the smaller network without them.

``trace`` analyses a network once and returns a ``Tracing``: its space of masks and, for every
tensor axis, the filter that each position belongs to (``AxisUnits``). ``extract`` builds the
physically smaller network of a mask. ``importance`` rates every filter by the weights alone.
``score`` evaluates a ``Candidate`` at its ``Fidelity`` (``ScoreInRungs`` also after fewer steps).
``save_network`` and ``load_network`` write and read pruned networks.
"""

from fppmo_ray.pruning.equivalence import check_equivalence
from fppmo_ray.pruning.extract import AxisUnits, extract
from fppmo_ray.pruning.files import load_network, save_network
from fppmo_ray.pruning.importance import Criterion, importance
from fppmo_ray.pruning.score import Candidate, Fidelity, Score, ScoreInRungs, score
from fppmo_ray.pruning.trace import Tracing, trace

__all__ = [
    "AxisUnits",
    "Candidate",
    "Criterion",
    "Fidelity",
    "Score",
    "ScoreInRungs",
    "Tracing",
    "check_equivalence",
    "extract",
    "importance",
    "load_network",
    "save_network",
    "score",
    "trace",
]
