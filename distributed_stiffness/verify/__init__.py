"""Looking a store over: every chunk, every number's range, and a sample computed again."""

from distributed_stiffness.verify.faults import Fault, Verification
from distributed_stiffness.verify.run import verify_store

__all__ = ["Fault", "Verification", "verify_store"]
