"""The report: one HTML page that holds everything, figures included, and needs no network."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import xarray as xr

from distributed_stiffness.analysis import Summary, summary
from distributed_stiffness.attributes import decoded
from distributed_stiffness.figures import VIEWS, View
from distributed_stiffness.figures.checkpoints import Names, with_run_dims
from distributed_stiffness.paths import Location, local
from distributed_stiffness.report.evidence import evidence, uncertain
from distributed_stiffness.report.findings import errors_note, findings
from distributed_stiffness.report.matrices import heat_maps
from distributed_stiffness.report.tables import tables
from distributed_stiffness.report.words import joined
from distributed_stiffness.study import rate_in_words

_HERE = Path(__file__).parent
SCRIPTS = ("copy.js", "heatmap.js")


def write_report(
    ds: xr.Dataset | Summary,
    figures: Mapping[str, Path],
    path: Location,
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
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    errors, warnings, attrs = errors_note(numbers), uncertain(numbers), decoded(numbers.attrs)
    sizes = with_run_dims(numbers.within_between).sizes
    page = environment.get_template("page.html").render(
        title=numbers.attrs.get("title", "Stiffness study"),
        style=_Inline.of("page.css"),
        script=_Inline.of(*SCRIPTS),
        facts=_facts(numbers),
        warnings=warnings,
        findings=[line for line in findings(numbers) if line not in (errors, *warnings)],
        evidence=evidence(numbers),
        matrices=heat_maps(numbers),
        tables=tables(numbers),
        errors=errors,
        several_rates=sizes["learning_rate"] > 1,
        several_checkpoints=sizes["learning_rate"] * sizes["seed"] * sizes["iteration"] > 1,
        sections=list(_sections(figures, numbers)),
        store=store or "STORE",
        keeps_pairs=numbers.attrs.get("keep", "pairs") == "pairs",
        versions=_mapping(attrs.get("versions")),
        revision=attrs.get("git_revision"),
        study=_pretty(_as_given(attrs.get("study"))),
        fingerprint=_pretty(attrs.get("fingerprint")),
    )
    path = local(path, "the report")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8", errors="backslashreplace")
    return path


@dataclass(frozen=True)
class _Inline:
    """A script or a style sheet that stands in the page, and the hash that allows it there."""

    text: str

    @classmethod
    def of(cls, *files: str) -> _Inline:
        return cls("\n" + "\n".join((_HERE / file).read_text(encoding="utf-8") for file in files))

    @property
    def hash(self) -> str:
        """For a Content-Security-Policy: nothing else is run, and nothing is loaded."""
        digest = hashlib.sha256(self.text.encode("utf-8")).digest()
        return f"sha256-{base64.b64encode(digest).decode('ascii')}"


def _facts(numbers: Summary) -> dict[str, str]:
    """What was run, from attributes and sizes."""
    attrs, matrix = numbers.attrs, with_run_dims(numbers.class_matrix)
    dataset, source = str(attrs.get("dataset", "–")), str(attrs.get("dataset_source", ""))
    n, names = numbers.sizes["example"], Names.of(numbers.curves)
    n_checkpoints = _n_checkpoints(matrix)
    rates = ", ".join(rate_in_words(rate) for rate in matrix["learning_rate"].values)
    seeds = ", ".join(map(str, matrix["seed"].values))
    steps = ", ".join(f"{step:,}" for step in matrix["iteration"].values)
    facts = {
        "Data set": dataset if dataset in source else joined(dataset, source),
        "Preprocessing": str(attrs.get("preprocessing", "–")),
        "Model": str(attrs.get("model", "–")),
        "Examples": f"{n:,} of {matrix.sizes['class_name']} classes; pairs shown:"
        f" {str(matrix.attrs.get('splits', 'all')).replace('-', ' with ')}",
        "Pairs": f"{n * numbers.sizes['other']:,}"
        + (f" at each of {n_checkpoints} checkpoints" if n_checkpoints > 1 else ""),
        "Learning rates": rates if names.rate else "",
        "Seeds": seeds if names.seed else "",
        "Iterations": f"{steps} {names.steps}" if names.step else "",
        "Begun": _time(attrs.get("created"), "–"),
        "Finished": _time(attrs.get("finished"), "not yet"),
    }
    return {name: text for name, text in facts.items() if text}


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


def _sections(
    figures: Mapping[str, Path], numbers: Summary
) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Group figures by the section of their view, in the order of the first views of each."""
    views = [view.of(numbers) for view in VIEWS.values()]
    order = list(dict.fromkeys(view.section for view in views))
    drawn = [view for view in views if view.name in figures]
    by_section = sorted(drawn, key=lambda view: order.index(view.section))
    for section, some in groupby(by_section, key=lambda view: view.section):
        yield section, [_figure(view, figures[view.name]) for view in some]


def _figure(view: View, file: Path) -> dict[str, str]:
    data = base64.b64encode(Path(file).read_bytes()).decode("ascii")
    return {"name": view.name, "title": view.title, "caption": view.caption, "data": data}


def _as_given(study: Any) -> Any:
    """Leave out how a study would train, where nobody here trains."""
    try:
        fields = json.loads(study)
        training = fields["training"]
        if not training["imported"]:
            return study
    except (KeyError, TypeError, ValueError):  # a store of others
        return study
    of_checkpoints = ("imported", "learning_rates", "seeds", "iterations")
    return json.dumps(
        fields | {"training": {k: training[k] for k in of_checkpoints if k in training}}
    )


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
