"""Commands that show a store: `report`, and `plot` for one figure."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from distributed_stiffness.cli.ending import interruptible
from distributed_stiffness.cli.options import AsJson, DataDir, StorePath, choice
from distributed_stiffness.cli.parsing import split
from distributed_stiffness.cli.work import beside, say, say_json
from distributed_stiffness.errors import StudyError
from distributed_stiffness.progress import Progress

MEASURES = ("sign", "cosine")


def report(
    store: StorePath,
    folder: Annotated[
        str | None,
        typer.Option(
            "--folder", "--out", help="Where figures and report go; default: beside the store."
        ),
    ] = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Draw the figures of a store and write its report.

    Example: stiffness report results/demo.zarr --folder figures
    """
    from distributed_stiffness.report.present import presented

    with interruptible(), Progress() as progress:
        shown = presented(store, folder or beside(store), progress, data_directory=data_dir)
    if as_json:
        say_json(shown.to_json())
    else:
        say(shown.lines())


class PlotCommand(TyperCommand):
    """Its help lists the views, which are imported (matplotlib) only when it is asked for."""

    def format_epilog(self, _ctx: Any, formatter: Any) -> None:
        """Write the views and what each shows."""
        from distributed_stiffness.figures import VIEWS

        with formatter.section("Views"):
            formatter.write_dl([(name, view.sentence) for name, view in VIEWS.items()])


def _view_names() -> list[str]:
    from distributed_stiffness.figures import VIEWS

    return list(VIEWS)


def plot(
    store: StorePath,
    view: Annotated[
        str | None,
        typer.Argument(
            help="Which figure; without it, all are listed.", autocompletion=_view_names
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="A .png, .svg or .pdf; default: VIEW.png beside the store.")
    ] = None,
    learning_rates: Annotated[
        str | None, typer.Option(help="Comma-separated, those to show; default: all.")
    ] = None,
    seed: Annotated[
        str | None, typer.Option(help="Comma-separated; default: the mean over all.")
    ] = None,
    iterations: Annotated[
        str | None, typer.Option(help="Comma-separated, those to show; default: all.")
    ] = None,
    measure: Annotated[
        str | None,
        choice(MEASURES, "Of a view whose name ends in one: class_matrices --measure cosine."),
    ] = None,
    distance: Annotated[
        str,
        typer.Option(
            help="Of the profiles: a variable of the store; `stiffness distances` adds them."
        ),
    ] = "distance",
    against: Annotated[
        str | None,
        typer.Option(help="Of permuted: the other store, such as one with permuted labels."),
    ] = None,
    data_dir: DataDir = None,
    list_views: Annotated[
        bool, typer.Option("--list", help="List the views, a sentence each, and stop.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Draw one figure of a store.

    Example: stiffness plot results/demo.zarr class_matrices_sign --iterations 0,168 --out c.pdf
    """
    from distributed_stiffness.figures import VIEWS, views_in_words
    from distributed_stiffness.report import plot

    if view is None or list_views:
        if as_json:
            say_json({name: of.sentence for name, of in VIEWS.items()})
        else:
            say(views_in_words())
        return
    view = _of_measure(view, measure)
    given = {
        "learning_rate": learning_rates and split("--learning-rates", learning_rates, float),
        "seed": seed and split("--seed", seed, float),
        "iteration": iterations and split("--iterations", iterations, float),
    }
    at = {dim: values for dim, values in given.items() if values}
    with interruptible(), Progress() as progress:
        path = plot(
            store,
            view,
            out or beside(store) / f"{view}.png",
            at=at,
            distance=distance,
            against=against,
            data_directory=data_dir,
            progress=progress,
        )
    if as_json:
        say_json({"store": store, "view": view, "figure": str(path)})
    else:
        say([f"Figure: {path}"])


def _of_measure(view: str, measure: str | None) -> str:
    """Return the view's name with its measure; sign is what is meant where none is given.

    Raises:
        StudyError: there is no such measure, or the view has none.
    """
    from distributed_stiffness.figures import VIEWS

    if measure is not None and measure not in MEASURES:
        raise StudyError(f"--measure is {measure!r}: expected one of {', '.join(MEASURES)}")
    stem = view.removesuffix("_sign").removesuffix("_cosine")
    wanted = f"{stem}_{measure or 'sign'}"
    if view in VIEWS and measure is None:
        return view
    if wanted in VIEWS and view in (stem, wanted):
        return wanted
    if view in VIEWS:
        raise StudyError(f"--measure is {measure!r}, but {view} shows what its name says")
    return view
