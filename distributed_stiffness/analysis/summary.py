"""Every statistic of a study that figures, findings and report need, from one pass."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import xarray as xr

from distributed_stiffness.analysis.blocks import blocks_of, split_blocks
from distributed_stiffness.analysis.classes import class_matrix, within_between
from distributed_stiffness.analysis.critical_length import critical_length
from distributed_stiffness.analysis.curves import checkpoint_curves
from distributed_stiffness.analysis.distance import distance_edges, distance_profile
from distributed_stiffness.analysis.equal_loss import at_equal_losses, common_losses
from distributed_stiffness.analysis.metric import DISTANCE, Distance
from distributed_stiffness.analysis.neighbours import neighbours_of
from distributed_stiffness.analysis.one_pass import compute_together
from distributed_stiffness.analysis.paired import paired_curves
from distributed_stiffness.analysis.pairs import DISTANCE_SUMS, Splits, with_labels_in_memory
from distributed_stiffness.analysis.selection import is_one_set, one_set
from distributed_stiffness.analysis.spectrum import spectrum_of
from distributed_stiffness.analysis.sums import SUMS
from distributed_stiffness.analysis.superclasses import superclass_contrast, superclass_matrix
from distributed_stiffness.analysis.teaching import teaching
from distributed_stiffness.progress import Progress

LARGEST_SUMS = 2**28  # bytes of the sums of one checkpoint that are held together


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
    neighbours: xr.Dataset | None  # None: rows and columns are different examples
    spectrum: xr.Dataset | None  # None also of sums, and of more than 2,000 examples
    teaching: xr.Dataset
    blocks: xr.Dataset | None  # of `split_blocks`; None: examples of one split only
    equal_loss: xr.Dataset | None  # of `at_equal_losses`; None: no loss that several rates pass
    paired: xr.Dataset | None  # of `paired_curves`; None: no store to compare with was given
    curves: xr.Dataset  # of `checkpoint_curves`
    sizes: Mapping[Hashable, int]  # of the store
    attrs: Mapping[Hashable, Any]  # of the store
    data_directory: str | None = None  # where pictures are looked for; None: the default


def summary(
    ds: xr.Dataset,
    *,
    bins: int = 20,
    splits: Splits | None = None,
    distance: Distance = DISTANCE,
    against: xr.Dataset | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Compute every statistic of a store; each chunk of cosines is read once.

    Three times, where the sums of each example are large: those by class, those of the neighbouring
    measures and those by distance are not held together then.

    Args:
        ds: a store.
        bins: of the distance profile.
        splits: of rows and columns, as in `class_matrix`.
        distance: that profile and critical length are over, as in `distance_profile`.
        against: a store of the same examples to compare with, pair by pair.
        progress: shows how far it is.

    Raises:
        DataError: the store lacks what is asked for.
    """
    ds = with_labels_in_memory(ds)  # once for all
    lazy = {
        "class_matrix": class_matrix(ds, splits=splits),
        "within_between": within_between(ds, splits=splits),
        "curves": checkpoint_curves(ds),
        "teaching": teaching(ds, splits=splits),
    }
    if is_one_set(ds, splits):
        selection = one_set(ds, splits=splits)
        lazy["neighbours"] = neighbours_of(selection)
        if selection.keeps_pairs and selection.is_small:
            lazy["spectrum"] = spectrum_of(selection)
    if "superclass_name" in ds.coords:
        lazy["superclass_matrix"] = superclass_matrix(ds, splits=splits)
        lazy["superclass_contrast"] = superclass_contrast(ds, splits=splits)
    if not isinstance(distance, str) or distance != DISTANCE or _has_distances(ds):
        of: Any = {"distance": distance, "splits": splits}
        edges = distance_edges(ds, bins, **of)  # reads the distances: once for both
        lazy["distance_profile"] = distance_profile(ds, edges=edges, **of)
        lazy["critical_length"] = critical_length(ds, edges=edges, **of)
    if len(blocks_of(ds)) > 1:
        lazy["blocks"] = split_blocks(ds)
    if against is not None:
        lazy["paired"] = paired_curves(ds, against, splits=splits)
    done: dict[str, xr.Dataset] = {}
    for names in _passes(list(lazy), ds, bins):
        results = compute_together([lazy[name] for name in names], progress)
        done |= zip(names, results, strict=True)
    return Summary(
        class_matrix=done["class_matrix"],
        superclass_matrix=done.get("superclass_matrix"),
        superclass_contrast=done.get("superclass_contrast"),
        within_between=done["within_between"],
        distance_profile=done.get("distance_profile"),
        critical_length=done.get("critical_length"),
        neighbours=done.get("neighbours"),
        spectrum=done.get("spectrum"),
        teaching=done["teaching"],
        blocks=done.get("blocks"),
        equal_loss=_equal_loss(done["within_between"]),
        paired=done.get("paired"),
        curves=done["curves"],
        sizes=dict(ds.sizes),
        attrs=dict(ds.attrs),
    )


def _passes(names: list[str], ds: xr.Dataset, bins: int) -> list[list[str]]:
    """Return what is computed together: everything, or class by class, neighbours, distances."""
    n, n_classes = ds.sizes["example"], len(set(ds["class_name"].values.tolist()))
    if 8 * len(SUMS) * n * (n_classes + 2 * bins) <= LARGEST_SUMS:
        return [names]
    apart = [["neighbours", "spectrum"], ["distance_profile", "critical_length"]]
    rest = [name for name in names if not any(name in some for some in apart)]
    parts = [rest, *([name for name in some if name in names] for some in apart)]
    return [part for part in parts if part]


def _has_distances(ds: xr.Dataset) -> bool:
    return DISTANCE in ds or DISTANCE_SUMS in ds


def _equal_loss(result: xr.Dataset) -> xr.Dataset | None:
    """Return means at equal training loss, where there are rates to compare at one."""
    if result.sizes.get("learning_rate", 1) < 2 or "iteration" not in result.dims:
        return None
    if "train_loss" not in result.coords or not (losses := common_losses(result["train_loss"])):
        return None
    return at_equal_losses(result, losses)
