"""Checkpoints that were trained elsewhere: found, placed on a study's grid, and copied into it."""

from distributed_stiffness.importing.imports import Imports, gather, measure_checkpoints

__all__ = ["Imports", "gather", "measure_checkpoints"]
