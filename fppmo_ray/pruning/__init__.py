"""Filters of a trained network: which can go, and the smaller network without them.

``trace`` reads a network once and yields a ``Tracing``: its space of masks and, for every tensor
axis, which filter each position belongs to (``AxisUnits``). ``extract`` turns a mask into a
physically smaller network; ``importance`` says what the weights alone think of every filter,
``score`` says how good a ``Candidate``
is at its ``Fidelity`` (``ScoreInRungs``: also on the way there), and ``save_network`` and
``load_network`` carry a pruned network from one machine to another.
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
