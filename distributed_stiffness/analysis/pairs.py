"""Which pairs of a store count, and in which group each of their examples is.

Everything that the reductions must agree on is settled here once: the splits, what a self-pair is,
which gradients are zero, and the order of the classes. All of it is read from labels and gradient
norms, O(N), when a reduction is asked for; the pairs are read only when it is computed.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr

from distributed_stiffness.analysis.identities import (
    COLUMN_IDENTITY,
    COLUMN_ZERO,
    ROW_IDENTITY,
    ROW_ZERO,
    identities,
    occurrences,
    places,
)
from distributed_stiffness.errors import DataError

Splits = tuple[str, str]  # of the rows and of the columns, such as ("train", "validation")

# What a store keeps in place of its pairs, if it was reduced (`reduced`): sums over the pairs of
# each example, by the split of the other one and by its class, or by relation and distance; and
# what kernels need, sums of cosine · norm of the other, and of squares.
CLASS_SUMS, DISTANCE_SUMS = "class_sums", "distance_sums"
WEIGHTED_SUMS, SQUARE_SUMS = "weighted_sums", "square_sums"
OTHER_SPLIT = "split_of_other"
SUMS_DIMS = {
    CLASS_SUMS: ("class_of_other", "sum"),
    DISTANCE_SUMS: ("relation", "distance_bin", "sum"),
    WEIGHTED_SUMS: ("class_of_other",),
    SQUARE_SUMS: ("kernel",),
}

_NO_PART = (
    "this store keeps sums over the pairs of each example with all others, not pairs: no examples"
    " can be left out or drawn again (give splits, or select checkpoints). Select from a store of"
    " pairs, and take `analysis.reduced` of that"
)

# Edge of a block where the data are in memory; a store keeps its own chunks.
BLOCK = 1024
SLAB = 128  # rows of a block that are worked on at a time


@dataclass(frozen=True)
class Grouping:
    """In which group (class, super-class, …) each row and each column is."""

    by: str  # name of the coordinate, such as "class_name"
    names: np.ndarray  # (n_groups,) in class order
    rows: np.ndarray  # (N,) int64, position in `names`
    columns: np.ndarray  # (M,) int64

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Labels:
    """What a block of pairs must know of its rows and columns."""

    rows: np.ndarray  # (i,) int64, identity of the example
    columns: np.ndarray  # (j,) int64, the same number for the same example
    row_groups: np.ndarray  # (i,) int64
    column_groups: np.ndarray  # (j,) int64
    row_zero: np.ndarray  # (…, i) bool, the gradient is zero
    column_zero: np.ndarray  # (…, j) bool

    def of_block(self, block_info: Any) -> Labels:
        """Return the labels of one block, from what dask's map_blocks says of its first array."""
        places: list[Any] = [slice(*place) for place in block_info[0]["array-location"]]
        *lead, i, j = places
        return Labels(
            rows=self.rows[i],
            columns=self.columns[j],
            row_groups=self.row_groups[i],
            column_groups=self.column_groups[j],
            row_zero=self.row_zero[*lead, ..., i],
            column_zero=self.column_zero[*lead, ..., j],
        )

    def transposed(self) -> Labels:
        """Return the labels of the transposed matrix."""
        return Labels(
            rows=self.columns,
            columns=self.rows,
            row_groups=self.column_groups,
            column_groups=self.row_groups,
            row_zero=self.column_zero,
            column_zero=self.row_zero,
        )

    def slabs(self) -> Iterator[tuple[slice, Labels]]:
        """Yield a block's rows a few at a time, so that what is made of them stays in the cache.

        Twice as fast as whole blocks at 2,000 rows, and the same at 1,000.
        """
        for start in range(0, len(self.rows), SLAB):
            part = slice(start, start + SLAB)
            yield (
                part,
                replace(
                    self,
                    rows=self.rows[part],
                    row_groups=self.row_groups[part],
                    row_zero=self.row_zero[..., part],
                ),
            )

    def self_pairs(self) -> np.ndarray | None:
        """Return where row and column are one example (i, j), or None where nowhere."""
        if not np.isin(self.rows, self.columns).any():
            return None
        return np.asarray(self.rows[:, None] == self.columns)

    def zero_pairs(self) -> np.ndarray | None:
        """Return where a gradient of the pair is zero (…, i, j), or None where nowhere."""
        if not (self.row_zero.any() or self.column_zero.any()):
            return None
        return np.asarray(self.row_zero[..., :, None] | self.column_zero[..., None, :])


def select(ds: xr.Dataset, splits: Splits | None) -> xr.Dataset:
    """Return the pairs of two splits, in dask blocks, with what tells which pairs count.

    Args:
        ds: a store, or a part of one.
        splits: of the rows and of the columns; None: validation with validation where there are
            several splits, else the one that there is.

    Returns:
        Dataset with cosine (…, example, other); distance (…, example, other) where `ds` has it (of
        a store that keeps sums in their place: these, of rows and of columns); ROW_ZERO (…,
        example) and COLUMN_ZERO (…, other), true where a gradient is zero; ROW_IDENTITY (example)
        and COLUMN_IDENTITY (other), equal for a self-pair.

    Raises:
        DataError: there are no cosines, or not the splits asked for.
    """
    checkpoint_dims(ds)
    if not ds.sizes["example"] * ds.sizes["other"]:
        raise DataError("there is no example in the rows, or none in the columns: no pairs")
    ds = with_labels_in_memory(ds)
    rows, columns = identities(ds)
    kept = _sums_kept(ds, rows, columns) if CLASS_SUMS in ds else _pairs_kept(ds)
    kept |= {ROW_IDENTITY: ("example", rows), COLUMN_IDENTITY: ("other", columns)}
    kept |= _zero_gradients(ds, rows, columns)
    labels = {name: c for name, c in ds.coords.items() if c.dims in (("example",), ("other",))}
    chosen = xr.Dataset(kept, coords=labels, attrs=ds.attrs)
    chosen, attr = _of_splits(chosen, splits)
    return _in_blocks(chosen).assign_attrs(splits=attr)


def _pairs_kept(ds: xr.Dataset) -> dict[str, Any]:
    kept = {"cosine": ds["cosine"].transpose(..., "example", "other")}
    if "distance" in ds:
        kept["distance"] = ds["distance"].transpose(..., "example", "other")
    return kept


def _sums_kept(ds: xr.Dataset, rows: np.ndarray, columns: np.ndarray) -> dict[str, Any]:
    """Return sums over each example's pairs as a row, and as a column: the matrix is symmetric.

    Sums over parts that are not computed yet are NaN in a store, and no pairs here.

    Raises:
        DataError: some examples are left out of the rows or of the columns alone.
    """
    if not np.array_equal(np.sort(rows), np.sort(columns)):
        raise DataError(_NO_PART)
    place, kept, most = places(rows, columns), dict[str, Any](), _most_pairs(ds, rows, columns)
    for name, dims in SUMS_DIMS.items():
        if name in ds:
            sums = ds[name].transpose(..., "example", OTHER_SPLIT, *dims)
            sums = sums.fillna(0.0)
            sums = sums.sum("other_part") if "other_part" in sums.dims else sums
            if "sum" in dims:
                sums = _of_these_alone(sums, most)
            bare = sums.drop_vars([c for c in sums.coords if "example" in sums[c].dims])
            of_columns = bare.isel(example=place).rename(example="other")
            kept |= {f"row_{name}": sums, f"column_{name}": of_columns}
    return kept


def _most_pairs(ds: xr.Dataset, rows: np.ndarray, columns: np.ndarray) -> xr.DataArray:
    """Count the columns of each split that are not the row's own example, (example, split)."""
    splits = (
        ds["other_split"].values if "other_split" in ds.coords else np.full(len(columns), "all")
    )
    kept = ds[OTHER_SPLIT].values if OTHER_SPLIT in ds.coords else np.unique(splits)
    of_splits = [columns[splits.astype(str) == str(name)] for name in kept]
    counts = np.stack([len(some) - occurrences(rows, some) for some in of_splits], axis=-1)
    return xr.DataArray(counts, dims=("example", OTHER_SPLIT))


def _of_these_alone(sums: xr.DataArray, most: xr.DataArray) -> xr.DataArray:
    """Refuse sums over pairs with examples that are not among the columns, when they are read."""
    after = sums.dims[sums.get_axis_num("example") + 1 :]  # split of the others, …, sum
    kept: xr.DataArray = xr.apply_ufunc(
        _refused_above,
        sums,
        most,
        input_core_dims=[after, after[:1]],
        output_core_dims=[after],
        kwargs={"between": len(after) - 2},
        dask="parallelized",
        output_dtypes=[np.float64],
        keep_attrs=True,
    )
    return kept


def _refused_above(sums: np.ndarray, most: np.ndarray, *, between: int) -> np.ndarray:
    if (sums[..., 3].sum(tuple(range(-between, 0))) > most).any():
        raise DataError(_NO_PART)
    return sums


def labels(chosen: xr.Dataset, groups: Grouping) -> Labels:
    """Return what blocks must know, from `select` and `grouping`."""
    lead = {dim: chosen.sizes[dim] for dim in leading_dims(chosen)}
    zero = {}
    for field, name, dim in (
        ("row_zero", ROW_ZERO, "example"),
        ("column_zero", COLUMN_ZERO, "other"),
    ):
        missing = {d: n for d, n in lead.items() if d not in chosen[name].dims}
        zero[field] = chosen[name].expand_dims(missing).transpose(*lead, dim).values
    return Labels(
        rows=chosen[ROW_IDENTITY].values,
        columns=chosen[COLUMN_IDENTITY].values,
        row_groups=groups.rows,
        column_groups=groups.columns,
        **zero,
    )


def origin(ds: xr.Dataset) -> dict[Hashable, Any]:
    """Return the attributes of a store that a result keeps: what was looked at."""
    kept = ("title", "dataset", "model", "preprocessing")
    return {name: ds.attrs[name] for name in kept if name in ds.attrs}


def with_labels_in_memory(ds: xr.Dataset) -> xr.Dataset:
    """Read coordinates and gradient norms, which every reduction looks at."""
    if "gradient_norm" in ds and "other" in ds["gradient_norm"].dims:
        # Where some pairs of a Dataset are masked each has a norm: all are the row's.
        ds = ds.assign(gradient_norm=ds["gradient_norm"].max("other"))
    small = ds.drop_vars([name for name in ds.data_vars if name != "gradient_norm"]).compute()
    text = {
        name: coordinate.copy(data=as_text(coordinate.values.tolist()))
        for name, coordinate in small.coords.items()
        if _is_text(coordinate)
    }
    ds = ds.assign_coords(small.coords).assign_coords(text)
    return ds.assign(gradient_norm=small["gradient_norm"]) if "gradient_norm" in ds else ds


def grouping(chosen: xr.Dataset, by: str) -> Grouping:
    """Return the groups of rows and columns by one of their coordinates.

    The order of the groups is that of the store's attribute with the names of all classes
    (`class_names`, `superclass_names`), else alphabetical. Groups without an example are left out.

    Raises:
        DataError: the coordinate is not there.
    """
    twin = f"other_{by}"
    if by not in chosen.coords or twin not in chosen.coords:
        hint = (
            "this data set has no super-classes; use class_matrix"
            if by == "superclass_name"
            else "give both, or group by one that is there"
        )
        raise DataError(
            f"cannot group by {by!r}: the store has no coordinates {by!r} and {twin!r}, only"
            f" {sorted(map(str, chosen.coords))}: {hint}"
        )
    if chosen[by].isnull().any() or chosen[twin].isnull().any():
        raise DataError(f"cannot group by {by!r}: some examples have none; leave them out")
    rows, columns = chosen[by].values, chosen[twin].values
    found = {*rows.tolist(), *columns.tolist()}
    ordered = [name for name in _listed(chosen.attrs.get(f"{by}s")) if name in found]
    names = ordered + sorted(found - set(ordered))
    place = {name: k for k, name in enumerate(names)}
    return Grouping(
        by=by,
        names=as_text(names) if all(isinstance(name, str) for name in names) else np.array(names),
        rows=np.array([place[name] for name in rows.tolist()], dtype=np.int64),
        columns=np.array([place[name] for name in columns.tolist()], dtype=np.int64),
    )


def leading_dims(chosen: xr.Dataset) -> tuple[Hashable, ...]:
    """Return the dimensions that tell checkpoints apart."""
    if "cosine" in chosen:
        return tuple(chosen["cosine"].dims[:-2])
    sums = chosen[f"row_{CLASS_SUMS}"]
    return tuple(sums.dims[: sums.get_axis_num("example")])


def checkpoint_dims(ds: xr.Dataset) -> set[Hashable]:
    """Return the dimensions of a store that tell checkpoints apart.

    Raises:
        DataError: it is no store.
    """
    if CLASS_SUMS in ds:
        return set(ds[CLASS_SUMS].dims) - {
            "other_part",
            "example",
            OTHER_SPLIT,
            *SUMS_DIMS[CLASS_SUMS],
        }
    if "cosine" not in ds or not {"example", "other"} <= set(ds["cosine"].dims):
        found = (
            f"one of ({', '.join(map(str, ds['cosine'].dims))})"
            if "cosine" in ds
            else str(list(map(str, ds.data_vars)))
        )
        raise DataError(
            f"expected a variable cosine (…, example, other), found {found}: open a store of this"
            " program with xarray.open_zarr, and keep both dimensions"
        )
    return set(ds["cosine"].dims) - {"example", "other"}


def checkpoint_coordinates(ds: xr.Dataset) -> dict[Hashable, xr.DataArray]:
    """Return the coordinates, and the training curves as coordinates, of the checkpoints.

    They travel with every result, so that a figure can say when a matrix was taken.
    """
    lead = checkpoint_dims(ds)
    known = {
        name: coordinate for name, coordinate in ds.coords.items() if set(coordinate.dims) <= lead
    }
    curves = {
        name: ds[name]
        for name in ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy")
        if name in ds and set(ds[name].dims) <= lead
    }
    return known | curves


def _zero_gradients(
    ds: xr.Dataset, rows: np.ndarray, columns: np.ndarray
) -> dict[str, xr.Variable]:
    """Return which gradients are zero, of rows and of columns.

    A column whose example is not among the rows is taken as not zero: its norm is not known.
    """
    if "gradient_norm" not in ds:
        return {
            ROW_ZERO: xr.Variable("example", np.zeros(len(rows), dtype=bool)),
            COLUMN_ZERO: xr.Variable("other", np.zeros(len(columns), dtype=bool)),
        }
    zero = (ds["gradient_norm"] == 0).transpose(..., "example").variable
    first, position = np.unique(rows, return_index=True)
    place = np.searchsorted(first, columns).clip(max=len(first) - 1)
    found = first[place] == columns
    of_columns = zero.isel(example=position[place])
    column_zero = xr.Variable((*zero.dims[:-1], "other"), of_columns.values & found)
    return {ROW_ZERO: zero, COLUMN_ZERO: column_zero}


def of_either_split(ds: xr.Dataset, splits: Splits | None) -> xr.Dataset:
    """Return a store with the examples of two splits alone, each as a row and as a column.

    Raises:
        DataError: the store has no such splits.
    """
    if (found := _splits_of(ds, splits)) is None:
        return ds
    rows, columns = (
        np.isin(ds[name].values.astype(str), found) for name in ("split", "other_split")
    )
    return ds.isel(example=_indexer(rows), other=_indexer(columns))


def _splits_of(ds: xr.Dataset, splits: Splits | None) -> Splits | None:
    """Return the splits to keep; None where the store does not tell splits apart.

    Raises:
        DataError: they are not there, or have to be given.
    """
    if "split" not in ds.coords or "other_split" not in ds.coords:
        if splits is not None:
            raise DataError(
                f"splits is {splits!r}, but the store does not tell splits apart (no coordinates"
                " split and other_split): leave splits out"
            )
        return None
    if splits is not None and (isinstance(splits, str) or len(splits) != 2):
        raise DataError(
            f"splits is {splits!r}: expected that of the rows and that of the columns, such as"
            " ('train', 'validation')"
        )
    there = [set(ds[name].values.astype(str).tolist()) for name in ("split", "other_split")]
    if splits is None:
        found = sorted(there[0] | there[1])
        if len(found) > 1 and "validation" not in found:
            raise DataError(f"several splits, {found}, and none is 'validation': give splits")
        splits = (found[0], found[0]) if len(found) == 1 else ("validation", "validation")
    for wanted, known in zip(splits, there, strict=True):
        if wanted not in known:
            raise DataError(
                f"splits is {splits!r}, but there is no example of split {wanted!r}; there are"
                f" {sorted(known)}"
            )
    return splits


def _is_text(coordinate: xr.DataArray) -> bool:
    """Whether a coordinate is text of another kind: numpy's of any length, or objects."""
    if coordinate.dtype.kind != "O":
        return coordinate.dtype.kind == "T"
    return all(isinstance(value, str) for value in coordinate.values.flat)


def _of_splits(chosen: xr.Dataset, splits: Splits | None) -> tuple[xr.Dataset, str]:
    """Keep the rows and columns of two splits; say which in one word."""
    if (found := _splits_of(chosen, splits)) is None:
        return _against(chosen, 0, 0), "all"
    rows, columns = (
        chosen["split"].values.astype(str) == found[0],
        chosen["other_split"].values.astype(str) == found[1],
    )
    chosen = chosen.isel(example=_indexer(rows), other=_indexer(columns))
    if OTHER_SPLIT in chosen.dims:
        known = chosen[OTHER_SPLIT].values.astype(str).tolist()
        chosen = _against(chosen, *map(known.index, found))
    return chosen, f"{found[0]}-{found[1]}"


def _against(chosen: xr.Dataset, of_rows: int, of_columns: int) -> xr.Dataset:
    """Keep a row's sums over the columns' split, and a column's sums over the rows' split."""
    kept: dict[Hashable, xr.DataArray] = {}
    for name, variable in chosen.data_vars.items():
        if OTHER_SPLIT in variable.dims:
            split = of_columns if str(name).startswith("row_") else of_rows
            kept[name] = variable.isel({OTHER_SPLIT: split}, drop=True)
    return chosen.assign(kept).drop_dims(OTHER_SPLIT, errors="ignore")


def _indexer(mask: np.ndarray) -> slice | np.ndarray:
    """Return a slice where one will do: it costs dask nothing."""
    where = np.flatnonzero(mask)
    if where[-1] - where[0] + 1 == len(where):
        return slice(int(where[0]), int(where[-1]) + 1)
    return where


def _in_blocks(chosen: xr.Dataset) -> xr.Dataset:
    if "cosine" not in chosen:
        return chosen.chunk() if chosen[f"row_{CLASS_SUMS}"].chunks is None else chosen
    if chosen["cosine"].chunks is not None:
        return chosen
    lead = dict.fromkeys(leading_dims(chosen), 1)
    pairs = chosen[["cosine", *(["distance"] if "distance" in chosen else [])]]
    return chosen.assign(pairs.chunk({**lead, "example": BLOCK, "other": BLOCK}).data_vars)


def _listed(names: object) -> list[str]:
    if isinstance(names, str):
        try:
            names = json.loads(names)
        except ValueError:  # of a store that somebody edited
            return []
    return list(names) if isinstance(names, list | tuple) else []


def as_text(names: Sequence[str]) -> np.ndarray:
    """Return names as text of fixed length.

    Of all kinds of text it is the one that xarray can draw along an axis and cut into chunks of any
    size, and that numpy casts.
    """
    return np.array(names, dtype=np.str_)
