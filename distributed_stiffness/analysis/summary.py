"""Every statistic of a study that figures, findings and report need, from one pass."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import xarray as xr

from distributed_stiffness.analysis.classes import class_matrix, within_between
from distributed_stiffness.analysis.critical_length import critical_length
from distributed_stiffness.analysis.curves import checkpoint_curves
from distributed_stiffness.analysis.distance import distance_edges, distance_profile
from distributed_stiffness.analysis.one_pass import compute_together
from distributed_stiffness.analysis.pairs import DISTANCE_SUMS, Splits, with_labels_in_memory
from distributed_stiffness.analysis.superclasses import superclass_contrast, superclass_matrix
from distributed_stiffness.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The statistics of one study, in memory.

    Each is what the function of the same name returns.
    """

    class_matrix: xr.Dataset
    superclass_matrix: xr.Dataset | None  # None: the data set has no super-classes
    superclass_contrast: xr.Dataset | None
    within_between: xr.Dataset
    distance_profile: xr.Dataset | None  # None: the store has no distances
    critical_length: xr.Dataset | None
    curves: xr.Dataset  # of `checkpoint_curves`
    sizes: Mapping[Hashable, int]  # of the store
    attrs: Mapping[Hashable, Any]  # of the store


def summary(
    ds: xr.Dataset,
    *,
    bins: int = 20,
    splits: Splits | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Compute every statistic of a store; each chunk of cosines is read once.

    Args:
        ds: a store.
        bins: of the distance profile.
        splits: of rows and columns, as in `class_matrix`.
        progress: shows how far it is.

    Raises:
        DataError: the store lacks what is asked for.
    """
    ds = with_labels_in_memory(ds)  # once for all
    lazy = {
        "class_matrix": class_matrix(ds, splits=splits),
        "within_between": within_between(ds, splits=splits),
        "curves": checkpoint_curves(ds),
    }
    if "superclass_name" in ds.coords:
        lazy["superclass_matrix"] = superclass_matrix(ds, splits=splits)
        lazy["superclass_contrast"] = superclass_contrast(ds, splits=splits)
    if "distance" in ds or DISTANCE_SUMS in ds:
        edges = distance_edges(ds, bins, splits=splits)  # reads the distances: once for both
        lazy["distance_profile"] = distance_profile(ds, edges=edges, splits=splits)
        lazy["critical_length"] = critical_length(ds, edges=edges, splits=splits)
    done = dict(zip(lazy, compute_together(list(lazy.values()), progress), strict=True))
    return Summary(
        class_matrix=done["class_matrix"],
        superclass_matrix=done.get("superclass_matrix"),
        superclass_contrast=done.get("superclass_contrast"),
        within_between=done["within_between"],
        distance_profile=done.get("distance_profile"),
        critical_length=done.get("critical_length"),
        curves=done["curves"],
        sizes=dict(ds.sizes),
        attrs=dict(ds.attrs),
    )
