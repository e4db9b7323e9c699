"""Stiffness while a network trains: a sample is measured every so many steps, into a store."""

from distributed_stiffness.watching.lightning import lightning_callback
from distributed_stiffness.watching.watch import Measurement, Watch, watch

__all__ = ["Measurement", "Watch", "lightning_callback", "watch"]
