"""Super-classes: do they show in the stiffness between classes, though no label tells of them?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import combinations

import numpy as np
import xarray as xr

from distributed_stiffness.analysis.cells import cell_errors
from distributed_stiffness.analysis.classes import (
    cell_means,
    cell_totals,
    class_means,
    differences,
    membership,
    relation_coordinate,
    superclasses_of_classes,
    with_mean_errors,
)
from distributed_stiffness.analysis.jackknife import MEASURES, Examples, slabs
from distributed_stiffness.analysis.pairs import Splits, select
from distributed_stiffness.analysis.sums import grouped_sums
from distributed_stiffness.errors import DataError

PERMUTATIONS = 10_000
_BATCH = 2**20  # cells that are looked up at a time
_WHAT = "Mean within a super-class, of different classes, minus mean between super-classes"


def superclass_matrix(ds: xr.Dataset, *, splits: Splits | None = None) -> xr.Dataset:
    """Return the matrix of stiffness between super-classes; every pair of examples weighs the same.

    It is added up from the sums by class, so that both matrices cost one pass.

    Returns:
        As `class_matrix`, over (superclass_name, other_superclass_name).

    Raises:
        DataError: the store has no super-classes.
    """
    chosen = select(ds, splits)
    above = superclasses_of_classes(chosen)
    sums = grouped_sums(chosen, "class_name")
    totals = cell_totals(sums)
    inside = membership(above.rows, above.names, "class_name", above.by)
    merged = totals.map(lambda sums: xr.dot(inside, sums, dim="class_name"))
    merge = partial(_merged_errors, sums.examples.grouped(above.rows), inside.values)
    inside = inside.rename(class_name="other_class_name", superclass_name="other_superclass_name")
    merged = merged.map(lambda sums: xr.dot(sums, inside, dim="other_class_name"))
    merged = merged.transpose(..., "superclass_name", "other_superclass_name")
    size = len(above.names)
    errors = sums.leave_one_out(
        merge, {"superclass_name": size, "other_superclass_name": size, "measure": 2}
    )
    return cell_means(merged.assign_attrs(totals.attrs), errors, ds)


def superclass_contrast(
    ds: xr.Dataset, *, splits: Splits | None = None, permutations: int = PERMUTATIONS
) -> xr.Dataset:
    """Return mean stiffness between different classes of one super-class, and across super-classes.

    A contrast, the first minus the second, above 0 means that a network finds super-classes that no
    label tells it of (Fort et al., v1 and v3, on CIFAR-100). Its error says how far other examples
    of the same classes would move it. Its p-value asks something else: whether the super-classes
    fit the matrix better than classes put together at random. It is the share of assignments of
    the classes to super-classes of the same sizes with a contrast as large: of all of them where
    they are at most `permutations`, else (1 + count) / (1 + permutations) from seeded random ones.

    Args:
        ds: a store with super-classes, or what `class_matrix` returned for one. A class matrix no
            longer knows its examples: then there are no errors.
        splits: of rows and columns, as in `class_matrix`.
        permutations: random assignments to compare with.

    Returns:
        Lazy Dataset over leading dimensions + (relation: same_superclass, other_superclass): sign
        and cosine, means over ordered pairs of different classes, with sign_error and
        cosine_error; over leading dimensions: sign_contrast and cosine_contrast, their errors
        (sign_contrast_error, …), and sign_p_value and cosine_p_value (NaN where a pair of classes
        has no pair of examples, or there is nothing to permute).

    Raises:
        DataError: there are no super-classes.
    """
    sums = None if "class_name" in ds.dims else grouped_sums(select(ds, splits), "class_name")
    matrix = ds if sums is None else cell_means(cell_totals(sums), None, ds)
    if "superclass_name" not in matrix.coords:
        raise DataError("the class matrix has no super-classes: its data set has none")
    different = matrix["class_name"] != matrix["other_class_name"]
    same = matrix["superclass_name"] == matrix["other_superclass_name"]
    masks = different & same, different & ~same
    parts = [class_means(matrix, mask, weight="every pair of classes alike") for mask in masks]
    result = xr.concat(parts, dim="relation").transpose(..., "relation")
    result = result.assign_attrs(matrix.attrs)
    if sums is None:
        result = result.assign(differences(result, "contrast", _WHAT))
    else:
        values = (masks[0].values, masks[1].values)
        result = with_mean_errors(result, sums, values, difference="contrast", text=_WHAT)
    result = result.assign(_p_values(matrix, permutations))
    return result.assign_coords(relation_coordinate("same_superclass", "other_superclass"))


def _merged_errors(
    examples: Examples, inside: np.ndarray, as_row: np.ndarray, as_column: np.ndarray
) -> np.ndarray:
    """Return cell errors after the classes of each super-class are merged in the sums."""
    # One array stays one: that is how `cell_errors` knows a symmetric matrix.
    merged = _merged(as_row, inside)
    other = merged if as_column is as_row else _merged(as_column, inside)
    return cell_errors(examples, merged, other)


def _merged(sums: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Add up the classes of each super-class: (E, C, S) to (E, G, S)."""
    merged = np.empty((len(sums), inside.shape[1], sums.shape[2]))
    for some in slabs(len(sums)):
        merged[some] = np.einsum("ecs,cg->egs", sums[some], inside, optimize=True)
    return merged


def _p_values(matrix: xr.Dataset, permutations: int) -> dict[str, xr.DataArray]:
    above = np.unique(matrix["superclass_name"].values.astype(str), return_inverse=True)[1]
    classes = ["class_name", "other_class_name"]
    values = {}
    for measure in MEASURES:
        cells = matrix[measure].drop_vars(
            [name for name, c in matrix.coords.items() if set(c.dims) & set(classes)]
        )
        p_value = xr.apply_ufunc(
            _p_value_of_each,
            cells.chunk(dict.fromkeys(classes, -1)) if cells.chunks else cells,
            input_core_dims=[classes],
            kwargs={"above": above, "permutations": permutations},
            dask="parallelized",
            output_dtypes=[np.float64],
        )
        values[f"{measure}_p_value"] = p_value.assign_attrs(
            long_name=f"p-value of the contrast of {measure} stiffness",
            units="1",
            description="Share of assignments of the classes to super-classes of these sizes whose"
            " contrast is at least as large, in [0, 1].",
        )
    return values


def _p_value_of_each(cells: np.ndarray, above: np.ndarray, permutations: int) -> np.ndarray:
    arrangements, exact = _arrangements(above, permutations)
    values = np.empty(cells.shape[:-2])
    for at in np.ndindex(values.shape):
        values[at] = _p_value(cells[at], above, arrangements, exact=exact)
    return values


def _p_value(
    cells: np.ndarray, above: np.ndarray, arrangements: np.ndarray, *, exact: bool
) -> float:
    """Compare the sum of the cells within super-classes with those of other arrangements.

    All else in the contrast is the same for each of them.

    Args:
        cells: class matrix (C, C).
        above: super-class of each class.
        arrangements: (B, C), the class that is put in the place of each class.
        exact: whether `arrangements` are all that there are.
    """
    a, b = np.triu_indices(len(cells), 1)
    within = above[a] == above[b]
    if not within.any() or within.all() or not np.isfinite(cells[a, b] + cells[b, a]).all():
        return math.nan
    a, b = a[within], b[within]
    both = cells + cells.T
    observed = both[a, b].sum()
    least = observed - 1e-12 * np.abs(both).max() * len(a)  # equal sums differ in rounding
    batch = max(1, _BATCH // len(a))
    count = sum(
        int((both[some[:, a], some[:, b]].sum(1) >= least).sum())
        for some in np.array_split(arrangements, math.ceil(len(arrangements) / batch))
    )
    return count / len(arrangements) if exact else (1 + count) / (1 + len(arrangements))


def _arrangements(above: np.ndarray, permutations: int) -> tuple[np.ndarray, bool]:
    """Return arrangements (B, C) of classes in super-classes, and whether they are all."""
    sizes = np.bincount(above)
    n = len(above)
    if math.factorial(n) // math.prod(math.factorial(size) for size in sizes) > permutations:
        random = np.random.default_rng(0)
        return random.permuted(np.tile(np.arange(n), (permutations, 1)), axis=1), False
    places = np.argsort(above, kind="stable")
    everything = np.array(list(_divided(tuple(range(n)), sizes.tolist())))
    arrangements = np.empty_like(everything)
    arrangements[:, places] = everything
    return arrangements, True


def _divided(classes: tuple[int, ...], sizes: list[int]) -> Iterator[tuple[int, ...]]:
    """Yield every way to put classes into groups of these sizes, one group after the other."""
    if not sizes:
        yield ()
        return
    for first in combinations(classes, sizes[0]):
        rest = tuple(k for k in classes if k not in first)
        for others in _divided(rest, sizes[1:]):
            yield first + others
