"""Time and memory of the reductions, on one matrix of a made-up store.

Each row runs in a process of its own, whose peak memory is the row's; a first run warms the page
cache. Prints one table, with ratios to reading the matrix alone, from one run.

    python benchmarks/analysis.py --examples 10000 --classes 100
    python benchmarks/analysis.py --examples 50000 --not-stored --once --only class_matrix summary
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import xarray as xr
import zarr
import zarr.codecs

import distributed_stiffness.analysis as analysis

WORK = {
    "read and average": lambda ds: ds["cosine"].mean().compute(),
    "one-hot products, cosine alone": lambda ds: _one_hot(ds).compute(),
    "class_matrix": lambda ds: analysis.compute(analysis.class_matrix(ds)),
    "within_between": lambda ds: analysis.compute(analysis.within_between(ds)),
    "row_sums": lambda ds: analysis.compute(analysis.row_sums(ds)),
    "distance_profile": lambda ds: analysis.compute(analysis.distance_profile(ds)),
    "super-class matrix, contrast": lambda ds: analysis.compute_together(
        [analysis.superclass_matrix(ds), analysis.superclass_contrast(ds)]
    ),
    "summary, 50 bins (all of them)": lambda ds: analysis.summary(ds, bins=50),
}


def main() -> None:
    options = _options()
    if options.row:
        _run_row(options.row, options)
        return
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder, "store.zarr"))
        size = 0
        if not options.not_stored:
            size = make_store(
                store, options.examples, options.classes, options.chunk, options.checkpoints
            )
        print(
            f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {platform.processor() or 'cpu'},"
            f" {os.cpu_count()} cores, dask {dask.__version__}, zarr {zarr.__version__}"
        )
        print(
            f"N = {options.examples:,}, {options.classes} classes, chunk {options.chunk:,},"
            f" {options.checkpoints} checkpoint(s): {size / 1e6:,.0f} MB on disk\n"
        )
        print(f"{'work':<34}{'seconds':>9}{'to reading':>12}{'peak MB':>9}{'above start':>13}")
        first = None
        for row in WORK:
            if options.only and row.split(",")[0] not in options.only:
                continue
            seconds, peak, start = _measured(row, store, options)
            first = first or seconds
            print(
                f"{row:<34}{seconds:>9.2f}{seconds / first:>12.1f}{peak:>9.0f}{peak - start:>13.0f}"
            )


def make_store(path: str, n: int, n_classes: int, chunk: int, checkpoints: int) -> int:
    """Write cosines of unit vectors with class structure, and distances of others; return bytes."""
    random = np.random.default_rng(0)
    labels = np.sort(random.integers(0, n_classes, n))
    random.shuffle(labels)
    group = zarr.create_group(path)
    for name, dims in (
        ("cosine", ("learning_rate", "seed", "iteration", "example", "other")),
        ("distance", ("example", "other")),
    ):
        units = _units(random, labels, n_classes)
        lead = (1, 1, checkpoints) if name == "cosine" else ()
        array = group.create_array(
            name,
            shape=(*lead, n, n),
            chunks=(*(1 for _ in lead), chunk, chunk),
            dtype="float32",
            fill_value=np.nan,
            dimension_names=dims,
            compressors=[
                zarr.codecs.BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle"),
                zarr.codecs.Crc32cCodec(),
            ],
        )
        for start in range(0, n, chunk):
            rows = units[start : start + chunk] @ units.T
            for at in np.ndindex(lead):
                array[(*at, slice(start, start + chunk))] = rows if lead else 1 - rows
    _write_labels(group, labels, checkpoints)
    return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())


def _units(random: np.random.Generator, labels: np.ndarray, n_classes: int) -> np.ndarray:
    centres = random.standard_normal((n_classes, 64)).astype("f4")
    units = 0.5 * centres[labels] + random.standard_normal((len(labels), 64)).astype("f4")
    return np.asarray(units / np.linalg.norm(units, axis=1, keepdims=True))


def _write_labels(group: zarr.Group, labels: np.ndarray, checkpoints: int) -> None:
    coordinates = {
        "learning_rate": (("learning_rate",), np.array([1e-3])),
        "seed": (("seed",), np.array([0])),
        "iteration": (("iteration",), np.arange(checkpoints)),
        "gradient_norm": (
            ("learning_rate", "seed", "iteration", "example"),
            np.ones((1, 1, checkpoints, len(labels))),
        ),
    }
    for dim, prefix in (("example", ""), ("other", "other_")):
        coordinates[dim] = ((dim,), np.arange(len(labels)))
        names = np.array([f"class {k}" for k in labels], dtype=object)
        coordinates[f"{prefix}class_name"] = ((dim,), names)
        above = np.array([f"group {k // 5}" for k in labels], dtype=object)
        coordinates[f"{prefix}superclass_name"] = ((dim,), above)
    for name, (dims, values) in coordinates.items():
        array = group.create_array(
            name,
            shape=values.shape,
            dtype=str if values.dtype == object else values.dtype,
            dimension_names=dims,
        )
        array[...] = values
    group.attrs["coordinates"] = "class_name other_class_name superclass_name other_superclass_name"


def _open(path: str) -> xr.Dataset:
    return xr.open_zarr(path, chunks={}, consolidated=False)


def _one_hot(ds: xr.Dataset) -> da.Array:
    """Class sums of the cosine by products: what sorting the columns is measured against."""
    codes = np.unique(ds["class_name"].values.astype(object), return_inverse=True)[1]
    matrices = ds["cosine"].data[0, 0]
    one_hot = da.from_array(np.eye(codes.max() + 1)[codes], chunks=(matrices.chunks[-1], -1))
    return da.stack([one_hot.T @ (matrix @ one_hot) for matrix in matrices])


def not_stored(options: argparse.Namespace) -> xr.Dataset:
    """Return the like of a store whose blocks are made when they are asked for."""
    n, lead = options.examples, ("learning_rate", "seed", "iteration")
    random = np.random.default_rng(0)
    labels = random.integers(0, options.classes, n)
    cosine, other = (_products(random, labels, options) for _ in range(2))
    ds = xr.Dataset(
        {
            "cosine": (
                (*lead, "example", "other"),
                da.stack([cosine] * options.checkpoints)[None, None],
            ),
            "distance": (("example", "other"), 1 - other),
            "gradient_norm": ((*lead, "example"), np.ones((1, 1, options.checkpoints, n))),
        },
        coords={"learning_rate": [1e-3], "seed": [0], "iteration": np.arange(options.checkpoints)},
    )
    for dim, prefix in (("example", ""), ("other", "other_")):
        ds = ds.assign_coords({dim: np.arange(n)})
        for name, of in (("class", labels), ("superclass", labels // 5)):
            names = np.array([f"{name} {k}" for k in of], dtype=object)
            ds = ds.assign_coords({f"{prefix}{name}_name": (dim, names)})
    return ds


def _products(
    random: np.random.Generator, labels: np.ndarray, options: argparse.Namespace
) -> da.Array:
    units = da.from_array(_units(random, labels, options.classes), chunks=(options.chunk, -1))
    return units @ units.T


def _run_row(row: str, options: argparse.Namespace) -> None:
    ds = not_stored(options) if options.not_stored else None
    start = _peak_megabytes()
    seconds = []
    for _ in range(1 if options.once else 2):
        began = time.perf_counter()
        WORK[row](_open(options.store) if ds is None else ds)
        seconds.append(time.perf_counter() - began)
    print(min(seconds), _peak_megabytes(), start)


def _measured(row: str, store: str, options: argparse.Namespace) -> tuple[float, float, float]:
    command = [sys.executable, __file__, "--row", row, "--store", store]
    for name in ("examples", "classes", "chunk", "checkpoints"):
        command += [f"--{name}", str(getattr(options, name))]
    command += ["--not-stored"] * options.not_stored + ["--once"] * options.once
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, peak, start = map(float, done.stdout.split())
    return seconds, peak, start


def _peak_megabytes() -> float:
    """Largest resident memory of this process so far (Linux)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1e3 if found else float("nan")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--examples", type=int, default=10_000, help="N")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--chunk", type=int, default=1_000, help="edge of a chunk, in examples")
    parser.add_argument("--checkpoints", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=[row.split(",")[0] for row in WORK])
    parser.add_argument("--once", action="store_true", help="measure the first run")
    parser.add_argument(
        "--not-stored",
        action="store_true",
        help="make blocks when they are asked for: nothing on disk, and their time counts",
    )
    parser.add_argument("--row", choices=list(WORK), help="run one row alone (used inside)")
    parser.add_argument("--store", help="store of --row (used inside)")
    return parser.parse_args()


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="Consolidated metadata")
    main()
