"""The command `stiffness`: every subcommand, in the order of its help."""

from __future__ import annotations

import typer

from distributed_stiffness.cli.distances import distances
from distributed_stiffness.cli.ending import EPILOG, run_app
from distributed_stiffness.cli.explain import explain
from distributed_stiffness.cli.gram import gram
from distributed_stiffness.cli.reports import PlotCommand, plot, report
from distributed_stiffness.cli.stores import status, verify
from distributed_stiffness.cli.studies import demo, plan, run

app = typer.Typer(
    help="Stiffness of neural networks: all pairs, every checkpoint, on a Ray cluster.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,  # boxes cut long option names short
    add_completion=True,
    pretty_exceptions_enable=False,
)

for command in (demo, run, gram, report, plot, distances, verify, status, plan, explain):
    app.command(cls=PlotCommand if command is plot else None)(command)


def main() -> None:
    """Entry point of `stiffness`."""
    run_app(app)
