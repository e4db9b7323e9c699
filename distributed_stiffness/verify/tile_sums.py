"""Whether the sums of a tile can be what they say they are, and the same from float64. Pure.

Axis letters: N rows of a tile (I, J), S splits and C classes of its columns, R relations, K bins of
distances; last, what is summed: cosines, signs, pairs in the cosines, pairs; or of which kernel the
squares are: of cosines, and of cosines times the norm of the column.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distributed_stiffness.analysis.sums import SUMS
from distributed_stiffness.store import EXPONENTS
from distributed_stiffness.verify.numbers import Wrong
from distributed_stiffness.verify.recompute import ANY, DISTANCE, MOST, SINGLE, allowed_error

_COSINE, _SIGN, _COSINE_PAIRS, _PAIRS = range(len(SUMS))
# Sums of the same float64 numbers in another order, for each pair in them; and of a few.
_ROUNDING, _SMALLEST = 1e-12, 1e-11
# Signs that float32 may turn: of most examples so many of their pairs, of any one SINGLE.
_TURNED = 0.01
_SMALLEST_NORM = 1e-150  # whose square float64 can say
_SLACK = 1e-9  # of a sum against that of its squares


@dataclass(frozen=True)
class Labels:
    """What is known of all examples, (N,) each."""

    classes: np.ndarray  # int64
    splits: np.ndarray  # int64, in the order of the store's splits
    n_classes: int
    n_splits: int

    def counts(self, rows: slice, columns: slice, *, counted: np.ndarray) -> np.ndarray:
        """Count the pairs of each row with the columns, by split and class, (N, S, C).

        Self-pairs are in none.

        Args:
            rows: examples of I.
            columns: examples of J.
            counted: examples whose pairs count, (all examples,) bool.
        """
        groups = self.groups(columns)[counted[columns]]
        by_group = np.bincount(groups, minlength=self.n_splits * self.n_classes)
        found = np.where(counted[rows, None], by_group, 0)
        if rows == columns:
            found[np.arange(len(found)), self.groups(rows)] -= counted[rows]
        return found.reshape(-1, self.n_splits, self.n_classes)

    def added(self, examples: slice, values: np.ndarray) -> np.ndarray:
        """Add up a number of some examples, of (all examples,), by split and class, (S, C)."""
        size = self.n_splits * self.n_classes
        total = np.bincount(self.groups(examples), weights=values[examples], minlength=size)
        return total.reshape(self.n_splits, self.n_classes)

    def groups(self, examples: slice | np.ndarray) -> np.ndarray:
        """Return split · C + class of some examples."""
        groups: np.ndarray = self.splits[examples] * self.n_classes + self.classes[examples]
        return groups


@dataclass(frozen=True)
class Sums:
    """What a store keeps of one tile."""

    by_class: np.ndarray  # (N, S, C, 4)
    by_distance: np.ndarray  # (N, S, R, K, 4)
    weighted: np.ndarray  # (N, S, C)
    squares: np.ndarray  # (N, S, 2)
    near_zero: np.ndarray  # (exponents,)


def not_finite(sums: np.ndarray, first: int) -> Wrong | None:
    """Look for what is no number in the sums of a tile, (N, …), whose first row is `first`."""
    bad = ~np.isfinite(sums)
    if not bad.any():
        return None
    return "not finite", f"{int(bad.sum()):,} are not finite: example {_at(bad, first)}"


def wrong_sums(sums: np.ndarray, first: int, *, tolerance: float) -> Wrong | None:
    """Look for sums that no pairs have.

    Args:
        sums: by class or by distance, (N, …, 4).
        first: its first row, among all examples.
        tolerance: how far beyond 1 a cosine may be.
    """
    if (wrong := not_finite(sums, first)) is not None:
        return wrong
    cosine, sign, cosine_pairs, pairs = np.moveaxis(sums, -1, 0)
    for bad, sentence in (
        ((sums[..., _SIGN:] != np.round(sums[..., _SIGN:])).any(-1), "counts are not whole"),
        ((cosine_pairs < 0) | (cosine_pairs > pairs), "counts are below 0, or above all pairs"),
        (np.abs(cosine) > (1 + tolerance) * cosine_pairs, "sums of cosines exceed their pairs"),
        (np.abs(sign) > cosine_pairs, "sums of signs exceed their pairs"),
    ):
        if bad.any():
            return "out of range", f"{int(bad.sum()):,} {sentence}: example {_at(bad, first)}"
    return None


def wrong_counts(
    by_class: np.ndarray, first: int, pairs: np.ndarray, cosine_pairs: np.ndarray
) -> Wrong | None:
    """Compare the pairs that were counted with those that there are, (N, S, C).

    Args:
        by_class: (N, S, C, 4).
        first: its first row, among all examples.
        pairs: that the labels say.
        cosine_pairs: those without zero gradients; NaN: not known.
    """
    bad = by_class[..., _PAIRS] != pairs
    if bad.any():
        n, of = int(bad.sum()), np.unravel_index(int(np.argmax(bad)), bad.shape)
        return "inconsistent", (
            f"{n:,} counts of pairs are not what labels and tiles say, the first"
            f" {by_class[of][_PAIRS]:.0f} for {pairs[of]:.0f}: example {_at(bad, first)}"
        )
    bad = (by_class[..., _COSINE_PAIRS] != cosine_pairs) & ~np.isnan(cosine_pairs)
    if bad.any():
        return "zero gradient", (
            f"{int(bad.sum()):,} counts of pairs without a zero gradient are not what gradient_norm"
            f" says: example {_at(bad, first)}"
        )
    return None


def disagreement(
    by_class: np.ndarray, by_distance: np.ndarray, classes: np.ndarray, first: int
) -> Wrong | None:
    """Compare the sums within a class and between classes, by class and by distance.

    Args:
        by_class: (N, S, C, 4).
        by_distance: (N, S, R, K, 4), of the same tile.
        classes: of the rows, (N,).
        first: the first row, among all examples.
    """
    within = by_class[np.arange(len(by_class)), :, classes]
    expected = np.stack([within, by_class.sum(2) - within], axis=2)
    bad = _differ(by_distance.sum(3), expected)
    if bad.any():
        return "inconsistent", (
            f"{int(bad.sum()):,} sums over distances are not those over classes:"
            f" example {_at(bad, first)}"
        )
    return None


def asymmetry_of_sums(
    tile: Sums, mirror: Sums, rows: slice, columns: slice, labels: Labels
) -> Wrong | None:
    """Compare what the pairs of (I, J) and of (J, I) add up to.

    Args:
        tile: of (I, J).
        mirror: of (J, I).
        rows: examples of I.
        columns: examples of J.
        labels: of all examples.
    """
    there = _by_groups(tile.by_class, labels, rows)
    back = _by_groups(mirror.by_class, labels, columns)
    bad = _differ(there, back.transpose(2, 3, 0, 1, 4))
    if not bad.any():
        there = _by_split(tile.by_distance, labels, rows)
        bad = _differ(there, _by_split(mirror.by_distance, labels, columns).swapaxes(0, 1))
    if not bad.any():
        return None
    return "asymmetric", (
        f"{int(bad.sum()):,} sums over all its pairs are not those of the transposed tile"
    )


def wrong_squares(
    squares: np.ndarray,
    by_class: np.ndarray,
    weighted: np.ndarray,
    first: int,
    *,
    tolerance: float,
) -> Wrong | None:
    """Look for sums of squares that no pairs have.

    Args:
        squares: (N, S, 2), finite.
        by_class: sums by class of the same tile, (N, S, C, 4).
        weighted: of the same tile, (N, S, C).
        first: its first row, among all examples.
        tolerance: how far beyond 1 a cosine may be.
    """
    pairs = by_class[..., _COSINE_PAIRS].sum(-1)
    sums = np.stack([by_class[..., _COSINE].sum(-1), weighted.sum(-1)], axis=-1)
    # (Σ x)² ≤ n Σ x², as roots: the squares of small norms are below what float64 can say.
    room = np.sqrt(pairs)[..., None] * (np.sqrt(squares.clip(0)) + _SMALLEST_NORM)
    for bad, sentence in (
        (squares < 0, "are below 0"),
        (squares[..., 0] > (1 + tolerance) ** 2 * pairs, "exceed their pairs"),
        ((1 - _SLACK) * np.abs(sums) > room, "are too small for the sums of the same pairs"),
    ):
        if bad.any():
            return "out of range", f"{int(bad.sum()):,} {sentence}: example {_at(bad, first)}"
    return None


def asymmetry_of_weighted(
    tile: Sums, mirror: Sums, rows: slice, columns: slice, labels: Labels, norms: np.ndarray
) -> Wrong | None:
    """Compare what the products of gradients of (I, J) and of (J, I) add up to.

    They are the same with the norms that the tiles were made with, so that most tiles of other
    weights are found too.

    Args as of `asymmetry_of_sums`, and the norms of all examples; NaN: not known.
    """
    of_rows, of_columns = (_scaled(norms, part) for part in (rows, columns))
    there, back = (
        _by_groups(
            own[part][:, None, None] * (sums.weighted / _largest(norms, others)), labels, part
        )
        for sums, own, part, others in (
            (tile, of_rows, rows, columns),
            (mirror, of_columns, columns, rows),
        )
    )
    size = np.multiply.outer(labels.added(rows, of_rows), labels.added(columns, of_columns))
    bad = np.abs(there - back.transpose(2, 3, 0, 1)) > ANY * size
    return _asymmetric(bad, "with norms")


def asymmetry_of_squares(
    tile: Sums, mirror: Sums, rows: slice, columns: slice, labels: Labels, norms: np.ndarray
) -> Wrong | None:
    """As `asymmetry_of_weighted`, of squares: of cosines, and of products of gradients."""
    there = _by_split(tile.squares[..., 0], labels, rows)
    back = _by_split(mirror.squares[..., 0], labels, columns).T
    bad = np.abs(there - back) > _ROUNDING * np.maximum(1, there)
    largest = [_largest(norms, part) for part in (rows, columns)]
    if not bad.any() and min(largest) > _SMALLEST_NORM:
        of_rows, of_columns = (np.square(_scaled(norms, part)) for part in (rows, columns))
        of_tile, of_mirror = (
            sums.squares[..., 1] / of_others**2
            for sums, of_others in zip((tile, mirror), largest[::-1], strict=True)
        )
        there = _by_split(of_rows[rows, None] * of_tile, labels, rows)
        back = _by_split(of_columns[columns, None] * of_mirror, labels, columns).T
        size = np.multiply.outer(
            labels.added(rows, of_rows).sum(-1), labels.added(columns, of_columns).sum(-1)
        )
        bad = np.abs(there - back) > 2 * ANY * size
    return _asymmetric(bad, "of squares")


def wrong_near_zero(
    counts: np.ndarray,
    by_class: np.ndarray | None,
    *,
    diagonal: bool,
    below: bool,
    tolerance: float,
) -> Wrong | None:
    """Look at counts of pairs below each power of two, (exponents,).

    Args:
        counts: of a tile.
        by_class: its sums by class, (N, S, C, 4); None: not known.
        diagonal: whether it is one of the diagonal, whose pairs are counted once.
        below: whether it lies below the diagonal, where none is counted.
        tolerance: how far beyond 1 a cosine may be.
    """
    if below:
        return None if not counts.any() else ("inconsistent", "counts pairs below the diagonal")
    if (counts < 0).any() or (np.diff(counts) < 0).any():
        return "out of range", "counts do not rise from 0 with the power of two"
    if by_class is None:
        return None
    total = by_class.sum((0, 1, 2)) / (2 if diagonal else 1)
    cosine, sign, most = (total[k] for k in (_COSINE, _SIGN, _COSINE_PAIRS))
    # Pairs that help less those that harm are the sum of signs; both together were counted here.
    if not abs(sign) <= counts[-1] <= most or (counts[-1] - sign) % 2:
        return "inconsistent", (
            f"{counts[-1]:,} pairs, but the sums have {most:,.0f}, with signs that add up to"
            f" {sign:,.0f}"
        )
    largest = np.diff(counts, prepend=0) @ 2.0**EXPONENTS
    if abs(cosine) > largest * (1 + tolerance) + _SMALLEST:
        return "inconsistent", (
            f"pairs so near zero add up to {largest:.6g} at most, but the sums say {cosine:.6g}"
        )
    return None


# The same from float64


def wrong_cosine_sums(stored: np.ndarray, true: np.ndarray, bound: float) -> str | None:
    """Compare sampled rows of a tile with sums that need no pair.

    A sum may be off by as much as its pairs, so that means are compared (`recompute.wrong_pairs`).

    Args:
        stored: by class, (n, S, C, 4).
        true: sums of cosines, (n, S, C).
        bound: the checkpoint's error bound; NaN: not known.
    """
    pairs = stored[..., _COSINE_PAIRS]
    there = pairs > 0
    difference = np.abs(stored[..., _COSINE] - true)[there] / pairs[there]
    if not len(difference):
        return None
    difference.sort()
    typical, largest = difference[len(difference) // 4], difference[-1]
    if typical <= allowed_error(bound) and largest <= max(np.nan_to_num(bound), SINGLE):
        return None
    return (
        f"{len(difference)} sums computed again in float64 differ by {np.median(difference):.1e}"
        f" (median) and up to {largest:.1e} a pair; the store's error bound is {bound:.1e}"
    )


@dataclass(frozen=True)
class Rows:
    """The pairs of n sampled examples with the M examples of J."""

    labels: Labels
    columns: slice
    sampled: np.ndarray  # (n,)

    @property
    def is_self(self) -> np.ndarray:
        """Whether it is the pair of an example with itself, (n, M)."""
        columns: np.ndarray = np.arange(self.columns.start, self.columns.stop)
        is_self: np.ndarray = self.sampled[:, None] == columns
        return is_self

    def by_class(self, values: np.ndarray) -> np.ndarray:
        """Add up numbers of the pairs, (n, M), by split and class: (n, S, C)."""
        shape = self.labels.n_splits, self.labels.n_classes
        groups = np.broadcast_to(self.labels.groups(self.columns), values.shape)
        return _added(groups, np.where(self.is_self, 0.0, values), shape)

    def by_distance(
        self, values: np.ndarray, distances: np.ndarray, edges: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Add up numbers of the pairs by split, relation and bin, (n, S, R, K).

        Returns:
            The sums, and how many pairs may belong to a bin or to its neighbour: those nearer to
            an edge than float32 can tell.
        """
        shape = self.labels.n_splits, 2, len(edges) - 1
        classes = self.labels.classes
        between = classes[self.columns] != classes[self.sampled, None]
        relation = self.labels.splits[self.columns] * 2 + between
        low, at, high = (
            relation * shape[-1] + np.clip(np.searchsorted(edges, D, "right") - 1, 0, shape[-1] - 1)
            for D in (distances - DISTANCE, distances, distances + DISTANCE)
        )
        unsure = np.where(self.is_self, 0.0, low != high)
        open_pairs = _added(low, unsure, shape) + _added(high, unsure, shape)
        return _added(at, np.where(self.is_self, 0.0, values), shape), open_pairs


def wrong_distance_counts(
    stored: np.ndarray, rows: Rows, distances: np.ndarray, edges: np.ndarray
) -> str | None:
    """Compare how many pairs of sampled rows are in each bin.

    Args:
        stored: by distance, (n, S, R, K, 4).
        rows: the pairs.
        distances: of the inputs, in float64, (n, M).
        edges: of the bins, (K + 1,).
    """
    true, unsure = rows.by_distance(np.ones_like(distances), distances, edges)
    bad = np.abs(stored[..., _PAIRS] - true) > unsure
    if not bad.any():
        return None
    return f"{int(bad.sum()):,} bins of {len(stored)} examples hold pairs of other distances"


def wrong_rows(
    by_class: np.ndarray,
    by_distance: np.ndarray,
    rows: Rows,
    *,
    cosines: np.ndarray,
    distances: np.ndarray,
    edges: np.ndarray,
    bound: float,
) -> tuple[str | None, str | None]:
    """Compare sums of signs by class, and of cosines by distance, with those of the pairs.

    A pair whose cosine is nearer to 0 than the bound may have either sign, one near an edge may be
    in either bin.

    Args:
        by_class: stored, of n sampled rows, (n, S, C, 4).
        by_distance: stored, (n, S, R, K, 4).
        rows: the pairs.
        cosines: in float64, 0 where a gradient is 0, (n, M).
        distances: of the inputs, in float64, (n, M).
        edges: of the bins, (K + 1,).
        bound: the checkpoint's error bound; NaN: not known.

    Returns:
        What is wrong by class, and by distance.
    """
    allowed, pairs = allowed_error(bound), np.maximum(1, by_class[..., _PAIRS].sum((1, 2)))
    either = rows.by_class((np.abs(cosines) <= allowed) & (cosines != 0))
    off = np.abs(by_class[..., _SIGN] - rows.by_class(np.sign(cosines))) - 2 * either
    turned = off.clip(0).sum((1, 2)) / (2 * pairs)
    true, unsure = rows.by_distance(cosines, distances, edges)
    off = np.abs(by_distance[..., _COSINE] - true) - unsure
    moved = off.clip(0).sum((1, 2, 3)) / pairs
    return (
        _beyond(turned, _TURNED, SINGLE, "of the signs of an example's pairs"),
        _beyond(moved, allowed, max(np.nan_to_num(bound), SINGLE), "a pair, by distance"),
    )


def wrong_rows_of_kernels(
    weighted: np.ndarray,
    squares: np.ndarray,
    rows: Rows,
    *,
    cosines: np.ndarray,
    norms: np.ndarray,
    bound: float,
) -> tuple[str | None, str | None]:
    """Compare sums of cosine · norm, and of squares, with those of the pairs.

    Args:
        weighted: stored, of n sampled rows, (n, S, C).
        squares: stored, (n, S, 2).
        rows: the pairs.
        cosines: in float64, 0 where a gradient is 0, (n, M).
        norms: of the columns, (M,); NaN: not known.
        bound: the checkpoint's error bound; NaN: not known.

    Returns:
        What is wrong of the first, and of the second.
    """
    typical, single = allowed_error(bound), max(np.nan_to_num(bound), SINGLE)
    n_pairs, size = cosines.shape[1], norms.sum()
    true = rows.by_class(cosines**2).sum(-1)
    off = np.abs(squares[..., 0] - true).sum(-1) / n_pairs
    of_squares = _beyond(off, 2 * typical, 2 * single, "a pair, of squares")
    if not np.isfinite(size) or size == 0:
        return None, of_squares
    weights = norms / norms.max()
    off = np.abs(weighted / norms.max() - rows.by_class(cosines * weights)).sum((1, 2))
    of_weighted = _beyond(
        off / weights.sum(), typical + MOST, single + ANY, "of the norms of its pairs"
    )
    if of_squares is None and norms.max() > _SMALLEST_NORM:
        true = rows.by_class((cosines * weights) ** 2).sum(-1)
        off = np.abs(squares[..., 1] / norms.max() ** 2 - true).sum(-1) / np.square(weights).sum()
        allowed = 2 * (typical + MOST), 2 * (single + ANY)
        of_squares = _beyond(off, *allowed, "of the squared norms of its pairs")
    return of_weighted, of_squares


def _beyond(off: np.ndarray, typical: float, single: float, what: str) -> str | None:
    """Say how far off sampled rows are, if a quarter of them, or one by far, is too far."""
    off = np.sort(off)
    if not len(off) or (off[len(off) // 4] <= typical and off[-1] <= single):
        return None
    return f"computed again in float64, {np.median(off):.1e} (median), up to {off[-1]:.1e}, {what}"


def _added(groups: np.ndarray, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Add up the numbers of each row by group, (n, M) to (n, *shape)."""
    size = int(np.prod(shape))
    rows = [
        np.bincount(of, weights=some, minlength=size)
        for of, some in zip(groups, values, strict=True)
    ]
    return np.array(rows).reshape(-1, *shape)


def _by_groups(by_class: np.ndarray, labels: Labels, examples: slice) -> np.ndarray:
    """Add up the rows by their split and class, (S, C, S, C, 4)."""
    total = np.zeros((labels.n_splits * labels.n_classes, *by_class.shape[1:]))
    np.add.at(total, labels.groups(examples), by_class)
    return total.reshape(labels.n_splits, labels.n_classes, *by_class.shape[1:])


def _by_split(by_distance: np.ndarray, labels: Labels, examples: slice) -> np.ndarray:
    """Add up the rows by their split, (S, S, R, K, 4)."""
    total = np.zeros((labels.n_splits, *by_distance.shape[1:]))
    np.add.at(total, labels.splits[examples], by_distance)
    return total


def _largest(norms: np.ndarray, examples: slice) -> float:
    """Return the largest norm of some examples; 1 where all are 0, NaN where one is not known."""
    largest = float(norms[examples].max())
    return 1.0 if largest == 0 else largest


def _scaled(norms: np.ndarray, examples: slice) -> np.ndarray:
    """Return the norms of some examples by the largest of them, and 0 for all others, (N,)."""
    scaled = np.zeros_like(norms)
    scaled[examples] = norms[examples] / _largest(norms, examples)
    return scaled


def _asymmetric(bad: np.ndarray, of: str) -> Wrong | None:
    if not bad.any():
        return None
    return "inconsistent", (
        f"{int(bad.sum()):,} sums {of} over all its pairs are not those of the transposed tile"
    )


def _differ(sums: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Whether two sums over the same pairs are not the same, (…, 4)."""
    bad: np.ndarray = sums != expected
    size = np.maximum(1, expected[..., _PAIRS])
    difference = np.abs(sums[..., _COSINE] - expected[..., _COSINE])
    bad[..., _COSINE] = difference > _ROUNDING * size + _SMALLEST
    return bad


def _at(bad: np.ndarray, first: int) -> int:
    return first + int(np.unravel_index(int(np.argmax(bad)), bad.shape)[0])
