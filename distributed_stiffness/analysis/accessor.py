"""`ds.stiffness`: the reductions as methods of any open store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xarray as xr

from distributed_stiffness.analysis.alignment import kernel_alignment
from distributed_stiffness.analysis.blocks import split_blocks
from distributed_stiffness.analysis.classes import class_matrix, within_between
from distributed_stiffness.analysis.coherence import gradient_coherence
from distributed_stiffness.analysis.confusion import gradient_confusion
from distributed_stiffness.analysis.critical_length import critical_length
from distributed_stiffness.analysis.curves import checkpoint_curves
from distributed_stiffness.analysis.distance import distance_profile
from distributed_stiffness.analysis.metric import DISTANCE, Distance
from distributed_stiffness.analysis.neighbours import neighbours
from distributed_stiffness.analysis.paired import paired_differences
from distributed_stiffness.analysis.pairs import Splits, checkpoint_dims
from distributed_stiffness.analysis.spectrum import EIGENVALUES, participation_ratio, spectrum
from distributed_stiffness.analysis.summary import Summary, summary
from distributed_stiffness.analysis.sums import row_sums
from distributed_stiffness.analysis.superclasses import superclass_contrast, superclass_matrix
from distributed_stiffness.analysis.teaching import teaching, teaching_extremes
from distributed_stiffness.errors import DataError
from distributed_stiffness.progress import Progress


@xr.register_dataset_accessor("stiffness")  # type: ignore[no-untyped-call]
class StiffnessAccessor:
    """Reductions of a store that `xarray.open_zarr` opened.

    Each method is the function of the same name in `distributed_stiffness.analysis`; results are
    lazy until `.compute()`.

    Examples:
        >>> import distributed_stiffness.analysis
        >>> matrix = xarray.open_zarr(path).stiffness.class_matrix().compute()
    """

    def __init__(self, ds: xr.Dataset) -> None:
        self._ds = ds

    @property
    def sign(self) -> xr.DataArray:
        """Sign stiffness of every pair: 1, 0 or −1; NaN where it is not computed yet.

        Raises:
            DataError: it is no store, or keeps no pairs.
        """
        checkpoint_dims(self._ds)
        if "cosine" not in self._ds:
            raise DataError("this store keeps sums over each example's pairs, not pairs: no signs")
        cosine = self._ds["cosine"]
        return cosine.copy(data=np.sign(cosine.data)).assign_attrs(
            long_name="sign of the product of two loss gradients",
            units="1",
            description="1 where a small gradient step on one example lowers the loss of the"
            " other, -1 where it raises it; NaN: not computed yet.",
        )

    def row_sums(self, by: str = "class_name", *, splits: Splits | None = None) -> xr.Dataset:
        """See `distributed_stiffness.analysis.row_sums`."""
        return row_sums(self._ds, by, splits=splits)

    def class_matrix(self, by: str = "class_name", *, splits: Splits | None = None) -> xr.Dataset:
        """See `distributed_stiffness.analysis.class_matrix`."""
        return class_matrix(self._ds, by, splits=splits)

    def superclass_matrix(self, *, splits: Splits | None = None) -> xr.Dataset:
        """See `distributed_stiffness.analysis.superclass_matrix`."""
        return superclass_matrix(self._ds, splits=splits)

    def within_between(self, *, splits: Splits | None = None) -> xr.Dataset:
        """See `distributed_stiffness.analysis.within_between`."""
        return within_between(self._ds, splits=splits)

    def distance_profile(
        self,
        bins: int = 20,
        edges: Sequence[float] | np.ndarray | None = None,
        *,
        distance: Distance = DISTANCE,
        splits: Splits | None = None,
    ) -> xr.Dataset:
        """See `distributed_stiffness.analysis.distance_profile`."""
        return distance_profile(self._ds, bins, edges, distance=distance, splits=splits)

    def critical_length(
        self,
        bins: int = 20,
        edges: Sequence[float] | np.ndarray | None = None,
        *,
        relation: str = "within",
        distance: Distance = DISTANCE,
        splits: Splits | None = None,
    ) -> xr.Dataset:
        """See `distributed_stiffness.analysis.critical_length`."""
        return critical_length(
            self._ds, bins, edges, relation=relation, distance=distance, splits=splits
        )

    def split_blocks(
        self, reduction: Callable[..., xr.Dataset] | None = None, **options: Any
    ) -> xr.Dataset:
        """See `distributed_stiffness.analysis.split_blocks`."""
        return split_blocks(self._ds, reduction or within_between, **options)

    def paired_differences(self, second: xr.Dataset, *, splits: Splits | None = None) -> xr.Dataset:
        """See `distributed_stiffness.analysis.paired_differences`."""
        return paired_differences(self._ds, second, splits=splits)

    def superclass_contrast(self, *, splits: Splits | None = None) -> xr.Dataset:
        """See `distributed_stiffness.analysis.superclass_contrast`."""
        return superclass_contrast(self._ds, splits=splits)

    def neighbours(self, *, splits: Splits | None = None) -> xr.Dataset:
        """See `distributed_stiffness.analysis.neighbours`."""
        return neighbours(self._ds, splits=splits)

    def gradient_coherence(self, *, splits: Splits | None = None) -> xr.Dataset:
        """See `distributed_stiffness.analysis.gradient_coherence`."""
        return gradient_coherence(self._ds, splits=splits)

    def gradient_confusion(self, *, splits: Splits | None = None) -> xr.Dataset:
        """See `distributed_stiffness.analysis.gradient_confusion`."""
        return gradient_confusion(self._ds, splits=splits)

    def participation_ratio(self, *, splits: Splits | None = None) -> xr.Dataset:
        """See `distributed_stiffness.analysis.participation_ratio`."""
        return participation_ratio(self._ds, splits=splits)

    def kernel_alignment(self, *, splits: Splits | None = None) -> xr.Dataset:
        """See `distributed_stiffness.analysis.kernel_alignment`."""
        return kernel_alignment(self._ds, splits=splits)

    def spectrum(self, k: int = EIGENVALUES, *, splits: Splits | None = None) -> xr.Dataset:
        """See `distributed_stiffness.analysis.spectrum`."""
        return spectrum(self._ds, k, splits=splits)

    def teaching(self, *, splits: Splits | None = None) -> xr.Dataset:
        """See `distributed_stiffness.analysis.teaching`."""
        return teaching(self._ds, splits=splits)

    def teaching_extremes(
        self,
        n: int = 10,
        *,
        measure: str = "cosine",
        relation: str = "all",
        by_class: bool = False,
        splits: Splits | None = None,
    ) -> xr.Dataset:
        """See `distributed_stiffness.analysis.teaching_extremes`."""
        return teaching_extremes(
            self._ds, n, measure=measure, relation=relation, by_class=by_class, splits=splits
        )

    def curves(self) -> xr.Dataset:
        """See `distributed_stiffness.analysis.checkpoint_curves`."""
        return checkpoint_curves(self._ds)

    def summary(
        self,
        *,
        bins: int = 20,
        splits: Splits | None = None,
        distance: Distance = DISTANCE,
        against: xr.Dataset | None = None,
        progress: Progress | None = None,
    ) -> Summary:
        """Compute everything at once: see `distributed_stiffness.analysis.summary`."""
        return summary(
            self._ds,
            bins=bins,
            splits=splits,
            distance=distance,
            against=against,
            progress=progress,
        )
