"""The report: one HTML page that holds everything, figures included, and needs no network."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import xarray as xr

from distributed_stiffness.analysis import Summary, summary
from distributed_stiffness.figures import VIEWS
from distributed_stiffness.figures.checkpoints import of_seed, seeds_note, with_run_dims
from distributed_stiffness.report.findings import (
    errors_note,
    findings,
    interval_text,
    measured,
    number,
)
from distributed_stiffness.study import rate_in_words

Table = dict[str, Any]  # head: names of columns, rows: cells as text


def write_report(
    ds: xr.Dataset | Summary,
    figures: Mapping[str, Path],
    path: str | Path,
    *,
    store: str | None = None,
) -> Path:
    """Write the report of a study as one HTML file.

    Args:
        ds: a store, or its summary where it is at hand.
        figures: PNG files by name, as `draw_all` returns them; they are copied into the page.
        path: of the page; its folder is made.
        store: path or URL of the store, for the lines that open it; None: where `ds` is from.

    Returns:
        `path`.
    """
    numbers = ds if isinstance(ds, Summary) else summary(ds)
    if store is None and isinstance(ds, xr.Dataset):
        store = ds.encoding.get("source")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html").render(
        title=numbers.attrs.get("title", "Stiffness study"),
        facts=_facts(numbers),
        findings=findings(numbers),
        stages=_stages_table(numbers),
        lengths=_lengths_table(numbers),
        errors=errors_note(with_run_dims(numbers.within_between).sizes["seed"]),
        training=_training_table(numbers),
        figures=[_figure(name, file) for name, file in figures.items()],
        store=store or "STORE",
        keeps_pairs=numbers.attrs.get("keep", "pairs") == "pairs",
        versions=_mapping(numbers.attrs.get("versions")),
        revision=numbers.attrs.get("git_revision"),
        study=_pretty(numbers.attrs.get("study")),
        fingerprint=_pretty(numbers.attrs.get("fingerprint")),
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _facts(numbers: Summary) -> dict[str, str]:
    """What was run, from attributes and sizes."""
    attrs, matrix = numbers.attrs, with_run_dims(numbers.class_matrix)
    source = attrs.get("dataset_source")
    n = numbers.sizes["example"]
    rates = ", ".join(rate_in_words(rate) for rate in matrix["learning_rate"].values)
    seeds = ", ".join(map(str, matrix["seed"].values))
    steps = ", ".join(f"{step:,}" for step in matrix["iteration"].values)
    facts = {
        "Data set": f"{attrs.get('dataset', '–')}" + (f", {source}" if source else ""),
        "Preprocessing": str(attrs.get("preprocessing", "–")),
        "Model": str(attrs.get("model", "–")),
        "Examples": f"{n:,} of {matrix.sizes['class_name']} classes; pairs shown:"
        f" {str(matrix.attrs.get('splits', 'all')).replace('-', ' with ')}",
        "Pairs": f"{n * numbers.sizes['other']:,} at each of {_n_checkpoints(matrix)} checkpoints",
        "Learning rates": rates,
        "Seeds": seeds,
        "Iterations": f"{steps} optimiser steps",
        "Begun": _time(attrs.get("created"), "–"),
        "Finished": _time(attrs.get("finished"), "not yet"),
    }
    if attrs.get("dataset_verified") is False:
        facts["Note"] = "the files of the data set do not have the published checksums"
    return facts


def _time(value: Any, missing: str) -> str:
    """Write an ISO time in UTC to the minute; anything else as it is."""
    if value is None:
        return missing
    try:
        return f"{datetime.fromisoformat(str(value)).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return str(value)


def _n_checkpoints(matrix: xr.Dataset) -> int:
    return int(np.prod([matrix.sizes[dim] for dim in ("learning_rate", "seed", "iteration")]))


def _stages_table(numbers: Summary) -> Table:
    """Within and between at every checkpoint, means over seeds."""
    relations = of_seed(numbers.within_between, None)
    rows = []
    for rate in relations["learning_rate"].values:
        for step in relations["iteration"].values:
            at = relations.sel(learning_rate=rate, iteration=step)
            cells = [
                cell
                for measure, digits in (("sign", 2), ("cosine", 3))
                for cell in (
                    *(measured(at.sel(relation=r), measure, digits) for r in ("within", "between")),
                    measured(at, f"{measure}_gap", digits),
                )
            ]
            rows.append([rate_in_words(rate), f"{step:,}", *cells, f"{int(at['pairs'].sum()):,}"])
    columns = [f"{m}, {r}" for m in ("sign", "cosine") for r in ("within", "between", "gap")]
    return {
        "head": ["learning rate", "step", *columns, "pairs"],
        "rows": rows,
        "note": seeds_note(numbers.within_between, None),
    }


def _lengths_table(numbers: Summary) -> Table | None:
    """ξ at every checkpoint, or None where there are no distances."""
    if numbers.critical_length is None:
        return None
    length = with_run_dims(numbers.critical_length)
    rows = []
    for rate in length["learning_rate"].values:
        for seed in length["seed"].values:
            for step in length["iteration"].values:
                at = length.sel(learning_rate=rate, seed=seed, iteration=step)
                cells = [cell for measure in ("sign", "cosine") for cell in _fit(at, measure)]
                rows.append([rate_in_words(rate), str(seed), f"{step:,}", *cells])
    columns = [f"{c}, {m}" for m in ("sign", "cosine") for c in ("ξ", "interval", "slope")]
    return {"head": ["learning rate", "seed", "step", *columns], "rows": rows}


def _fit(at: xr.Dataset, measure: str) -> list[str]:
    """Return ξ (with a note where it is an extrapolation), its interval and the slope."""
    slope = measured(at, f"{measure}_slope")
    if not np.isfinite(at[f"{measure}_length"]):
        known = np.isfinite(at[f"{measure}_slope"])
        return ["not determined" if known else "–", "–", slope]
    length = measured(at, f"{measure}_length")
    outside = "" if bool(at[f"{measure}_inside"]) else " (extrapolated)"
    return [length + outside, interval_text(at, measure), slope]


def _training_table(numbers: Summary) -> Table:
    """Training curves and error bounds at every checkpoint."""
    curves = with_run_dims(numbers.curves)
    columns = {
        "train_loss": ("training loss", 3),
        "validation_loss": ("validation loss", 3),
        "train_accuracy": ("training accuracy", 3),
        "validation_accuracy": ("validation accuracy", 3),
    }
    there = [name for name in columns if name in curves]
    bounds = "error_bound" in curves
    rows = []
    for rate in curves["learning_rate"].values:
        for seed in curves["seed"].values:
            for step in curves["iteration"].values:
                at = curves.sel(learning_rate=rate, seed=seed, iteration=step)
                cells = [number(float(at[name]), columns[name][1]) for name in there]
                if bounds:
                    cells += [_bound(float(at["error_bound"])), _undecided(at)]
                rows.append([rate_in_words(rate), str(seed), f"{step:,}", *cells])
    head = ["learning rate", "seed", "step", *(columns[name][0] for name in there)]
    return {"head": head + (["error bound", "undecided pairs"] if bounds else []), "rows": rows}


def _bound(value: float) -> str:
    return f"{value:.1e}".replace("e-0", "e-") if np.isfinite(value) else "–"


def _undecided(at: xr.Dataset) -> str:
    if "undecided" not in at or not at["undecided"] >= 0:
        return "–"
    return f"{int(at['undecided']):,}"


def _figure(name: str, file: Path) -> dict[str, str]:
    view = VIEWS[name]
    data = base64.b64encode(Path(file).read_bytes()).decode("ascii")
    return {"name": name, "title": view.title, "caption": view.caption, "data": data}


def _mapping(value: Any) -> dict[str, str]:
    if isinstance(value, str):
        value = json.loads(value)
    return {str(k): str(v) for k, v in value.items()} if isinstance(value, Mapping) else {}


def _pretty(value: Any) -> str | None:
    """Indent JSON, or what can be written as JSON; anything else as it is."""
    if value is None:
        return None
    try:
        return json.dumps(json.loads(value) if isinstance(value, str) else value, indent=2)
    except (TypeError, ValueError):
        return str(value)
