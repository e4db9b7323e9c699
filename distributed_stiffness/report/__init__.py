"""The report of a study: findings in words, and one HTML page with every figure."""

from distributed_stiffness.report.findings import findings
from distributed_stiffness.report.page import write_report
from distributed_stiffness.report.present import plot, present

__all__ = ["findings", "plot", "present", "write_report"]
