"""The engine: what is left of a study, who computes it, and where."""

from distributed_stiffness.engine.distances import add_distances
from distributed_stiffness.engine.job import StudyFailed
from distributed_stiffness.engine.prepare import Run
from distributed_stiffness.engine.run import run_study

__all__ = ["Run", "StudyFailed", "add_distances", "run_study"]
