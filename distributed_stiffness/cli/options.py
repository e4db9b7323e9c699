"""Options that several commands have: one name, one text, one list of choices each."""

from __future__ import annotations

from typing import Annotated, Any, get_args

import typer

from distributed_stiffness.study import Gradients, Training

ENGINES = ("ray", "serial")
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS: tuple[str, ...] = get_args(Gradients.model_fields["precision"].annotation)
OPTIMIZERS: tuple[str, ...] = get_args(Training.model_fields["optimizer"].annotation)


def choice(names: tuple[str, ...], meaning: str) -> Any:
    """Return an option whose choices are listed in --help and completed by the shell.

    What is no choice is refused later, by the same message as in a study file.
    """
    return typer.Option(
        metavar=f"[{'|'.join(names)}]", help=meaning, autocompletion=lambda: list(names)
    )


# What is read and written.
StudyFile = Annotated[str, typer.Argument(help="A study file: JSON, YAML or TOML.")]
StorePath = Annotated[str, typer.Argument(help="Path or URL of a store.")]
Store = Annotated[
    str, typer.Option(help="Store of the results: a path, or a URL such as s3://…, gs://….")
]
Figures = Annotated[
    str | None, typer.Option(help="Folder of figures and report; default: beside the store.")
]
CheckpointFolder = Annotated[
    str | None, typer.Option(help="Folder or URL of checkpoints; default: beside the store.")
]
DataDir = Annotated[
    str | None,
    typer.Option(
        help="Folder of data sets; default: $STIFFNESS_DATA_DIR, else a cache folder in your home."
    ),
]
Download = Annotated[bool, typer.Option(help="Download data that are missing.")]
Title = Annotated[str | None, typer.Option(help="Of the report.")]

# What is computed.
SampleSeed = Annotated[int, typer.Option(help="Draws the examples, balanced over classes.")]
AcceptUnverified = Annotated[
    bool,
    typer.Option(
        "--accept-unverified-data/--verified-data-only",
        help="Read files whose checksums are not the published ones, after checking shapes, ranges,"
        " counts and names; the store says so.",
    ),
]
Standardise = Annotated[
    bool,
    typer.Option(
        "--standardise/--no-standardise", help="Standardise inputs over the training split."
    ),
]
UnitNorm = Annotated[
    bool,
    typer.Option("--unit-norm/--no-unit-norm", help="Scale standardised inputs to unit norm."),
]
Loss = Annotated[
    str, typer.Option(help="cross_entropy, or package.module:function of (outputs, targets).")
]
Parameters = Annotated[
    list[str] | None,
    typer.Option(help="Pattern of the parameters in play, such as 'layer4.*'; repeatable."),
]
ReduceOnly = Annotated[
    bool,
    typer.Option(
        "--reduce-only/--keep-pairs",
        help="Keep no pairs, only sums over each example's pairs by class and distance.",
    ),
]
DistanceBins = Annotated[int, typer.Option(help="Bins of distance, with --reduce-only.")]
TrainExamples = Annotated[
    int, typer.Option(help="Examples of the training split, put before the others.")
]
ModelOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--model-option",
        help="NAME=VALUE for the model, such as normalisation=batch or widths=[500,300];"
        " repeatable.",
    ),
]
DataOptions = Annotated[
    list[str] | None,
    typer.Option("--data-option", help="NAME=VALUE for the data, such as resize=256; repeatable."),
]
Precision = Annotated[
    str,
    choice(
        PRECISIONS,
        "float64: exact on over-fitted nets, slower gradients; bf16: products several times as"
        " fast, coarser; bf16x3 and tf32: on GPUs.",
    ),
]
Tile = Annotated[int | None, typer.Option(help="Edge of a tile; default: about 1,000 examples.")]

# Who computes it, and where.
Engine = Annotated[str, choice(ENGINES, "Serial: in this process alone.")]
Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster to join; default: $RAY_ADDRESS, else start Ray here."),
]
Device = Annotated[str, choice(DEVICES, "Auto: a GPU where there is one.")]
MaxReplicas = Annotated[
    int | None, typer.Option(help="Replicas at most; default: as many as there is room.")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads of a replica.")]
Memory = Annotated[
    str | None, typer.Option(help="Memory of a replica, such as 4GB; default: its share.")
]
AllowError = Annotated[
    bool,
    typer.Option(
        "--allow-error",
        help="Keep the numbers of a checkpoint whose error bound is above 0.01 (0.1 in bf16 and"
        " tf32); store and report say so.",
    ),
]
WaitForNodes = Annotated[
    float | None,
    typer.Option(help="Seconds to wait for a node that fits; default: if autoscaled."),
]
Rows = Annotated[
    str | None,
    typer.Option(help="FIRST:LAST, rows to compute now; a later run adds the rest."),
]

# What is said.
PlanOnly = Annotated[bool, typer.Option("--plan", help="Say what it will cost, and stop.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="For machines: one JSON object on standard output.")
]
