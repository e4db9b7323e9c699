"""Single examples: how much each helps its own class and the rest, and which stand out."""

from __future__ import annotations

from functools import partial

import dask.array as da
import numpy as np
import xarray as xr

from distributed_stiffness.analysis.classes import relation_coordinate
from distributed_stiffness.analysis.jackknife import MEASURES, means
from distributed_stiffness.analysis.pairs import (
    Splits,
    as_text,
    checkpoint_coordinates,
    leading_dims,
    origin,
    select,
)
from distributed_stiffness.analysis.sums import (
    COSINE,
    COSINE_PAIRS,
    PAIRS,
    SIGN,
    grouped_sums,
    in_one_piece,
)
from distributed_stiffness.errors import DataError

RELATIONS = ("within", "between", "all")
ENDS = ("most", "least")
_TEXTS = {
    "cosine": COSINE,
    "sign": SIGN,
    "cosine_pairs": COSINE_PAIRS | {"long_name": "pairs in the cosine mean"},
    "pairs": PAIRS | {"long_name": "pairs counted"},
}


def teaching(ds: xr.Dataset, *, splits: Splits | None = None) -> xr.Dataset:
    """Return each example's mean stiffness with its own class, with the rest, and with all.

    To first order, a small gradient step on one example lowers the loss of those that it is stiff
    with: it teaches where its mean is high, and conflicts where it is below 0. Self-pairs are left
    out, and every pair weighs the same.

    Args:
        ds: a store of pairs or of sums.
        splits: of the examples, and of those that they are compared with, as in `class_matrix`.

    Returns:
        Lazy Dataset over leading dimensions + (example, relation: within, between, all): cosine and
        sign (float64, NaN where there is no pair), cosine_pairs and pairs (int64), with the labels
        of the examples as coordinates.

    Raises:
        DataError: the store lacks what is asked for.
    """
    sums = grouped_sums(select(ds, splits), "class_name")
    chosen, n_lead = sums.chosen, len(leading_dims(sums.chosen))
    by_class = in_one_piece(sums.sides[0], n_lead)
    n_groups = by_class.shape[-2]
    own = (sums.groups.rows[:, None] == np.arange(n_groups)).astype(np.float64)
    within = (by_class * own[..., None]).sum(axis=-2)
    every = by_class.sum(axis=-2)
    of_relation = da.stack([within, every - within, every], axis=n_lead + 1)
    averaged = of_relation.map_blocks(
        means, dtype=np.float64, chunks=(*of_relation.chunks[:-1], (len(MEASURES),))
    )
    dims = (*leading_dims(chosen), "example", "relation")
    counts = of_relation[..., 2:].astype(np.int64)
    result = xr.Dataset(
        {
            "cosine": (dims, averaged[..., 0]),
            "sign": (dims, averaged[..., 1]),
            "cosine_pairs": (dims, counts[..., 0]),
            "pairs": (dims, counts[..., 1]),
        },
        coords={name: c for name, c in chosen.coords.items() if c.dims == ("example",)},
        attrs=origin(ds) | {"splits": chosen.attrs["splits"]},
    )
    for name, attrs in _TEXTS.items():
        result[name].attrs = dict(attrs)
    result = result.assign_coords(relation_coordinate(*RELATIONS))
    return result.assign_coords(checkpoint_coordinates(ds))


def teaching_extremes(
    ds: xr.Dataset,
    n: int = 10,
    *,
    measure: str = "cosine",
    relation: str = "all",
    by_class: bool = False,
    splits: Splits | None = None,
) -> xr.Dataset:
    """Return the examples that teach most, and those that conflict most, at every checkpoint.

    Args:
        ds: a store, or what `teaching` returned.
        n: how many at each end; the places that there are no examples for are empty.
        measure: "cosine" or "sign".
        relation: with whom: its own class ("within"), the rest ("between"), or "all".
        by_class: look for them in each class.
        splits: as in `teaching`, of a store.

    Returns:
        Lazy Dataset over leading dimensions + (class_name, where asked for; end: most, least;
        place): position (int64, among the examples of the result of `teaching`; -1 where there is
        none) and value (float64); the best, and the worst, come first. The labels of examples are
        found by `teaching(ds).isel(example=position)`.

    Raises:
        DataError: n is below 1, there is no such measure or relation, or the store lacks what is
            asked for.
    """
    if n < 1:
        raise DataError(f"n is {n}: expected 1 or more examples")
    for name, value, known in (("measure", measure, MEASURES), ("relation", relation, RELATIONS)):
        if value not in known:
            raise DataError(f"{name} is {value!r}: expected one of {', '.join(known)}")
    of = ds if "relation" in ds.dims and "other" not in ds.dims else teaching(ds, splits=splits)
    values = of[measure].sel(relation=relation, drop=True)
    classes = of["class_name"].values
    names = list(dict.fromkeys(sorted(classes.tolist())))
    masks = np.stack([(classes == name) | (not by_class) for name in names])
    masks = masks if by_class else masks[:1]
    found = xr.apply_ufunc(
        partial(_ends, masks, n),
        values.drop_vars([name for name in values.coords if "example" in values[name].dims]),
        input_core_dims=[["example"]],
        output_core_dims=[["class_name", "end", "place", "what"]],
        dask="parallelized",
        dask_gufunc_kwargs={
            "output_sizes": {"class_name": len(masks), "end": 2, "place": n, "what": 2},
            "allow_rechunk": True,
        },
        output_dtypes=[np.float64],
    )
    if not by_class:
        found = found.isel(class_name=0)
    result = xr.Dataset(
        {
            "position": found.isel(what=0).astype(np.int64),
            "value": found.isel(what=1),
        },
        attrs=of.attrs | {"measure": measure, "relation": relation},
    ).assign_coords({"end": as_text(ENDS)} | ({"class_name": as_text(names)} if by_class else {}))
    result["position"].attrs = {
        "long_name": "position of the example",
        "units": "1",
        "description": "Of the examples that teach most or conflict most; -1 where there is none.",
    }
    result["value"].attrs = dict(of[measure].attrs)
    return result


def _ends(masks: np.ndarray, n: int, values: np.ndarray) -> np.ndarray:
    """Return positions and values of the highest and lowest: (…, E) to (…, masks, 2, n, 2)."""
    out = np.full((*values.shape[:-1], len(masks), 2, n, 2), np.nan)
    out[..., 0] = -1
    for at in np.ndindex(values.shape[:-1]):
        for k, mask in enumerate(masks):
            places = np.flatnonzero(mask & np.isfinite(values[at]))
            order = places[np.argsort(values[at][places], kind="stable")]
            for end, some in enumerate((order[::-1][:n], order[:n])):
                out[(*at, k, end)][: len(some)] = np.stack([some, values[at][some]], axis=-1)
    return out
