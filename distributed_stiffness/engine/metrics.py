"""What replicas count for Ray's dashboard and for Prometheus, on top of their receipts."""

from __future__ import annotations

from typing import Any

from distributed_stiffness.engine.replica import Receipt
from distributed_stiffness.plan import Plan


class Metrics:
    """Counters of one replica; Ray adds its node and its process as tags.

    Args:
        counter: `ray.util.metrics.Counter`; given, so that one module alone imports ray.
        gauge: `ray.util.metrics.Gauge`.
    """

    def __init__(self, counter: Any, gauge: Any) -> None:
        self._counters = {
            name: counter(f"stiffness_{name}", description=what)
            for name, what in (
                ("tiles", "Tiles written, both triangles."),
                ("operations", "Floating-point operations of gradients and their products."),
                ("bytes_written", "Bytes of tiles, before compression."),
                ("gradients", "Per-example gradients made."),
                ("seconds", "Seconds of work."),
                ("making_seconds", "Seconds of work that made gradients."),
                ("write_seconds", "Seconds of work that wrote tiles."),
                ("store_retries", "Requests to the store that were made again."),
            )
        }
        self._peak = gauge("stiffness_peak_memory_bytes", description="Of the process, so far.")
        self._rate = gauge("stiffness_operations_per_second", description="Of the last task.")

    def count(self, receipt: Receipt, plan: Plan) -> None:
        """Count what a task took."""
        operations = receipt.operations(plan)
        for name, value in (
            ("tiles", receipt.task.n_tiles),
            ("operations", operations),
            ("bytes_written", receipt.bytes_written),
            ("gradients", receipt.gradients),
            ("seconds", receipt.seconds),
            ("making_seconds", receipt.making_seconds),
            ("write_seconds", receipt.write_seconds),
            ("store_retries", receipt.retries),
        ):
            if value > 0:  # Ray refuses to count nothing
                self._counters[name].inc(value)
        self._peak.set(receipt.peak_memory)
        if receipt.seconds > 0:
            self._rate.set(operations / receipt.seconds)
