"""One set of examples and its kernels: what measures of a whole kernel are made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import dask.array as da
import numpy as np
import xarray as xr

from distributed_stiffness.analysis.identities import (
    COLUMN_IDENTITY,
    ROW_IDENTITY,
    identities,
    places,
)
from distributed_stiffness.analysis.jackknife import Examples, examples_of
from distributed_stiffness.analysis.pairs import (
    SQUARE_SUMS,
    WEIGHTED_SUMS,
    Grouping,
    Splits,
    as_text,
    checkpoint_coordinates,
    grouping,
    leading_dims,
    origin,
    select,
    with_labels_in_memory,
)
from distributed_stiffness.errors import DataError

KERNELS = ("cosine", "gram")
# Up to so many examples a checkpoint's whole matrix is looked at at once: two float64 copies of it
# are 64 MB, and all its eigenvalues take a second.
WHOLE = 2_000


@dataclass(frozen=True)
class Selection:
    """One set of examples, each of which is a row and a column, and its kernels."""

    chosen: xr.Dataset
    groups: Grouping
    examples: Examples
    kernels: tuple[str, ...]
    norms: np.ndarray  # (lead…, E) float64, of the gradients; 1 where they are not known
    origin: xr.Dataset  # the store, with its labels in memory

    @property
    def keeps_pairs(self) -> bool:
        """Whether single pairs are there, and not their sums alone."""
        return "cosine" in self.chosen

    @property
    def keeps_squares(self) -> bool:
        """Whether sums of squares can be had: an earlier version's store of sums has none."""
        return self.keeps_pairs or f"row_{SQUARE_SUMS}" in self.chosen

    @property
    def is_small(self) -> bool:
        """Whether a checkpoint's whole matrix may be looked at at once."""
        return len(self.examples.groups) <= WHOLE

    @property
    def members(self) -> np.ndarray:
        """Which examples are in each kernel: (lead…, E, K) float64, 0 or 1."""
        cosine = (self.norms > 0).astype(np.float64)
        of = {"cosine": cosine, "gram": np.ones_like(cosine)}
        return np.stack([of[kernel] for kernel in self.kernels], axis=-1)

    def require_pairs(self, what: str) -> None:
        """Refuse what cannot be had from sums.

        Raises:
            DataError: the store keeps sums.
        """
        if not self.keeps_pairs:
            raise DataError(
                f"this store keeps sums over each example's pairs, not pairs: {what} cannot be had;"
                " make a store with keep: pairs"
            )

    def require_squares(self, what: str) -> None:
        """Refuse what cannot be had without sums of squares.

        Raises:
            DataError: the store keeps sums, and these are not among them.
        """
        if not self.keeps_squares:
            raise DataError(
                f"this store keeps sums over each example's pairs without {SQUARE_SUMS}, as an"
                f" earlier version did: {what} cannot be had; compute the study anew"
            )

    def cosines(self) -> da.Array:
        """Return the cosines (lead…, E, E), columns in the order of the rows."""
        rows, columns = (self.chosen[of].values for of in (ROW_IDENTITY, COLUMN_IDENTITY))
        cosine = self.chosen["cosine"].data
        if np.array_equal(rows, columns):
            return cosine
        return cosine[..., places(columns, rows)]

    def whole(self) -> da.Array:
        """Return the same with one chunk for each checkpoint."""
        cosine = self.cosines()
        n = cosine.ndim
        return cosine.rechunk({axis: -1 if axis >= n - 2 else 1 for axis in range(n)})

    def described(
        self, variables: Mapping[str, xr.DataArray], attrs: Mapping[str, Mapping[str, str]]
    ) -> xr.Dataset:
        """Return a result with its descriptions and the coordinates of the checkpoints."""
        attrs_of_kernel = {"long_name": "kernel of the pairs"}
        kernel = xr.DataArray(as_text(self.kernels), dims="kernel", attrs=attrs_of_kernel)
        result = xr.Dataset(
            {name: v.assign_attrs(attrs[name]) for name, v in variables.items()},
            coords={"kernel": kernel},
            attrs=origin(self.origin) | {"splits": self.chosen.attrs["splits"]},
        )
        return result.assign_coords(checkpoint_coordinates(self.origin))


def is_one_set(ds: xr.Dataset, splits: Splits | None) -> bool:
    """Whether the examples of the rows are those of the columns."""
    return _why_not_one_set(select(ds, splits)) is None


def _why_not_one_set(chosen: xr.Dataset) -> str | None:
    rows, columns = (chosen[of].values for of in (ROW_IDENTITY, COLUMN_IDENTITY))
    if not np.array_equal(np.unique(rows), np.unique(columns)):
        return f"the rows are other examples than the columns (splits {chosen.attrs['splits']!r})"
    if len(np.unique(rows)) < max(len(rows), len(columns)):
        return "an example is there several times, and its product with itself has no one place"
    return None


def one_set(
    ds: xr.Dataset, kernels: Sequence[str] | None = None, splits: Splits | None = None
) -> Selection:
    """Choose the examples and the kernels.

    Args:
        ds: a store.
        kernels: of "cosine" and "gram"; None: those that the store has the numbers for.
        splits: of rows and columns, as in `class_matrix`.

    Raises:
        DataError: rows and columns are different examples, there is no such kernel, or the store
            lacks what it is made of.
    """
    ds = with_labels_in_memory(ds)
    chosen = select(ds, splits)
    groups = grouping(chosen, "class_name")
    examples = examples_of(chosen, groups)
    if (why := _why_not_one_set(chosen)) is not None:
        raise DataError(
            f"{why}: expected one set of examples, each once as a row and once as a column, such as"
            " splits ('validation', 'validation')"
        )
    found = _kernels(kernels, chosen, ds)
    return Selection(chosen, groups, examples, found, norms_of(ds, chosen, "row"), ds)


def _kernels(asked: Sequence[str] | None, chosen: xr.Dataset, ds: xr.Dataset) -> tuple[str, ...]:
    lacking = (
        "the store has no variable gradient_norm"
        if "gradient_norm" not in ds
        else f"this store keeps sums of cosines, without {WEIGHTED_SUMS}"
        if "cosine" not in chosen and f"row_{WEIGHTED_SUMS}" not in chosen
        else None
    )
    if asked is None:
        return KERNELS if lacking is None else KERNELS[:1]
    unknown = [kernel for kernel in asked if kernel not in KERNELS]
    if unknown or not asked:
        raise DataError(f"kernels is {tuple(asked)!r}: expected some of {', '.join(KERNELS)}")
    if "gram" in asked and lacking is not None:
        raise DataError(f"there is no Gram of it: {lacking}; leave 'gram' out of kernels")
    return tuple(kernel for kernel in KERNELS if kernel in asked)


def norms_of(ds: xr.Dataset, chosen: xr.Dataset, side: Literal["row", "column"]) -> np.ndarray:
    """Return the gradient norms of a selection's rows or columns (lead…, N); 1 if not known.

    Args:
        ds: the store, each of whose columns is a row too.
        chosen: of `select`.
        side: rows or columns.
    """
    lead = leading_dims(chosen)
    wanted = chosen[ROW_IDENTITY if side == "row" else COLUMN_IDENTITY].values
    shape = {dim: chosen.sizes[dim] for dim in lead}
    if "gradient_norm" not in ds:
        return np.ones((*shape.values(), len(wanted)))
    place = places(identities(ds)[0], wanted)
    norms = xr.DataArray(ds["gradient_norm"].variable).isel(example=place)  # without labels
    missing = {dim: shape[dim] for dim in lead if dim not in norms.dims}
    whole = norms.expand_dims(missing).transpose(*lead, "example")
    return np.asarray(whole.values, dtype=np.float64)
