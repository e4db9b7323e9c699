"""The command line: parses options, calls the package. Thin.

A module for each group of commands; `options` has what they share, `ending` the exit codes.
"""

from distributed_stiffness.cli.app import app, main
from distributed_stiffness.cli.ending import run_app
from distributed_stiffness.cli.jobs import job
from distributed_stiffness.cli.parsing import read_study

__all__ = ["app", "job", "main", "read_study", "run_app"]
