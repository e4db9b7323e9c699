"""The matrices of one call: gradients, examples, plan; and how far the matrices may be off."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import nn

from distributed_stiffness.errors import StudyError
from distributed_stiffness.gradients.batches import (
    Examples,
    Nest,
    count_examples,
    pair,
    take,
)
from distributed_stiffness.gradients.budget import fit, free_memory
from distributed_stiffness.gradients.error_bound import (
    SampleBound,
    bound_of,
    refuse_bound,
    sample_columns,
    sample_examples,
)
from distributed_stiffness.gradients.evidence import ALL_ZERO
from distributed_stiffness.gradients.from_evidence import gradients_of_evidence
from distributed_stiffness.gradients.gram import Rows, cosine
from distributed_stiffness.gradients.loss_head import Loss, warn_of_own_precision
from distributed_stiffness.gradients.per_example import Known, PerExampleGradients
from distributed_stiffness.gradients.precision import precision_mode
from distributed_stiffness.gradients.reference import Products
from distributed_stiffness.gradients.self_check import check_gradients
from distributed_stiffness.plan import Plan
from distributed_stiffness.progress import Progress
from distributed_stiffness.tiling import pieces

# A group whose part of every gradient is smaller, in float64, has a gradient of 0 but for rounding.
_NOTHING = 1e-10
_TINY = 1e-290
# Frames between the user's call and a warning raised here.
_USER = 4


@dataclass(frozen=True)
class MatrixWork:
    """Gradients, examples and plan of one call."""

    gradients: PerExampleGradients
    examples: tuple[Nest, Nest]
    others: tuple[Nest, Nest] | None
    plan: Plan

    @staticmethod
    def of(
        model: nn.Module,
        loss: Loss,
        examples: Examples,
        others: Examples | None,
        parameters: Sequence[str] | str | None,
        precision: str,
        memory: int | None,
        check: bool,
        allow_error: bool,
    ) -> MatrixWork:
        """Look at network and examples, and plan; `check` some gradients first.

        Raises:
            StiffnessError: as `cosine_matrix`.
        """
        warn_of_own_precision(loss, precision_mode(precision), stacklevel=_USER)
        room: Any = memory
        if room is not None and (not isinstance(room, Integral) or room < 1):
            raise StudyError(f"memory is {memory!r}: expected a number of bytes, such as 4 * 10**9")
        rows = pair(examples)
        columns = None if others is None else pair(others)
        n = count_examples(rows[0])

        def read(some: np.ndarray) -> tuple[Nest, Nest]:
            found: tuple[Nest, Nest] = take(rows, torch.from_numpy(some))
            return found

        gradients, evidence = gradients_of_evidence(
            model, loss, read, n, parameters=parameters, precision=precision
        )
        if check:
            check_gradients(gradients, *read(evidence.places))
        gradients, plan = fit(gradients, n_examples=n, memory=memory or free_memory())
        gradients.rounding_is_refused = not check and not allow_error
        return MatrixWork(gradients, rows, columns, plan)

    def matrices(
        self, groups: Sequence[Collection[str]] | None = None, *, progress: bool = False
    ) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
        """Return all cosines by group of parameters, and the norms of rows and columns.

        Args:
            groups: names of their parameters; None: all, once.
            progress: whether to show a bar.

        Returns:
            (groups, N, M) float32; and for each group (N,) and (M,) float64.
        """
        with Progress(quiet=not progress) as bars:
            found = self.gradients.settled(lambda: self._matrices(groups, bars))
        if not any(rows.any() for rows, _ in found[1]):
            warn_of_zeros()
        return found

    def _matrices(
        self, groups: Sequence[Collection[str]] | None, bars: Progress
    ) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
        n_groups, n = len(groups or [()]), count_examples(self.examples[0])
        columns = self.others or self.examples
        m = count_examples(columns[0])
        found = torch.empty(n_groups, n, m, device="cpu")
        norms = [(np.empty(n), np.empty(m)) for _ in range(n_groups)]
        make_row = make_column = self.makes(self.examples, groups)
        if self.others is not None:
            make_column = self.makes(self.others, groups)
        bar = bars.phase("pairs", n, "rows")
        for panel in pieces(slice(0, n), self.plan.panel_rows):
            held = make_row(panel)
            for (rows_norm, _), rows in zip(norms, held, strict=True):
                rows_norm[panel] = rows.norm.cpu().numpy()
            start = 0
            if self.others is None:
                # Left of the panel: known by symmetry.
                for k, rows in enumerate(held):
                    cosine(rows, rows, self.gradients.precision, found[k, panel, panel])
                start = panel.stop
            for block in pieces(slice(start, m), self.plan.block):
                for k, (rows, made) in enumerate(zip(held, make_column(block), strict=True)):
                    norms[k][1][block] = made.norm.cpu().numpy()
                    part = found[k, panel, block]
                    cosine(rows, made, self.gradients.precision, part)
                    if self.others is None:
                        found[k, block, panel] = part.T
            bar.update(panel.stop)
        if self.others is None:
            norms = [(rows, rows) for rows, _ in norms]
        return found.numpy(), norms

    def makes(
        self, examples: tuple[Nest, Nest], groups: Sequence[Collection[str]] | None
    ) -> Callable[[slice], list[Rows]]:
        """Return what makes rows of some examples, one block for each group."""
        known: Known = set()
        return lambda rows: self.gradients.rows_of(
            lambda some: take(examples, some),
            rows,
            batch=self.plan.batch,
            mended_together=self.plan.block,
            groups=groups,
            known=known,
        )

    # How far off they may be

    def bound_of_cosines(
        self,
        values: np.ndarray,
        groups: Mapping[str, Collection[str]] | None = None,
        *,
        allow_error: bool,
    ) -> dict[str, Any]:
        """Return the attributes that say the error bound of cosines, (K, N, M).

        Raises:
            GradientError: it is above what is allowed.
        """
        rows, columns = self._sample(values)
        true = self._true(rows, columns, None if groups is None else list(groups.values()))
        is_nothing = (true.row_parts.amax(1) < _NOTHING).numpy()
        values[is_nothing] = 0.0  # but for rounding
        cosines = true.cosines().numpy()
        cosines[is_nothing] = 0.0
        sampled = values[:, rows][:, :, rows if columns is None else columns]
        bound = bound_of(sampled, cosines, symmetric=columns is None)
        return self._said(bound, rows, columns, "a cosine", allow_error=allow_error)

    def bound_of_products(
        self, cosines: np.ndarray, rows: np.ndarray, columns: np.ndarray, *, allow_error: bool
    ) -> dict[str, Any]:
        """Return the same of dot products, in units of the true norms.

        Args:
            cosines: (N, M).
            rows: their norms, (N,).
            columns: (M,).
            allow_error: whether a bound above what is allowed is let pass.
        """
        some, across = self._sample(cosines[None])
        true = self._true(some, across)
        across_or_some = some if across is None else across
        found = cosines[np.ix_(some, across_or_some)].astype(np.float64)
        found *= _ratio(rows[some], true.row_norms.numpy())[:, None]
        found *= _ratio(columns[across_or_some], true.column_norms.numpy())
        bound = bound_of(found, true.cosines()[0].numpy(), symmetric=False)
        return self._said(bound, some, across, "a cosine", allow_error=allow_error)

    def bound_of_norms(self, norms: np.ndarray, *, allow_error: bool) -> dict[str, Any]:
        """Return the same of norms, (N,), relative to the true ones."""
        order = np.random.default_rng(0).permutation(len(norms))
        order = np.concatenate([order[norms[order] > 0], order[norms[order] == 0]])
        some = np.sort(order[: self.plan.sample])
        plain = self.gradients.in_float64.plain
        ones = (self._examples(some[k : k + 1]) for k in range(len(some)))
        true = np.array([float(plain.gradients(*one)[1]) for one in ones])
        found = _ratio(norms[some], true)[:, None]
        bound = bound_of(found, np.ones_like(found), symmetric=False)
        return self._said(bound, some, None, "a norm", allow_error=allow_error)

    def _sample(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the numbers of sampled rows, and of columns where these are others."""
        mean = values[0] if len(values) == 1 else np.abs(values).mean(0)
        if self.others is None:
            sample = sample_examples(
                len(mean), lambda r, c: mean[np.ix_(r, c)], seed=(0,), size=self.plan.sample
            )
            return sample.examples, None
        return sample_columns(mean, size=self.plan.sample)

    def _true(
        self,
        rows: np.ndarray,
        columns: np.ndarray | None,
        groups: Sequence[Collection[str]] | None = None,
    ) -> Products:
        others = None
        if columns is not None and self.others is not None:
            others = take(self.others, torch.from_numpy(columns))
        plain = self.gradients.in_float64.plain
        memory = self.plan.sample_memory
        return plain.products(self._examples(rows), others, memory=memory, groups=groups)

    def _examples(self, chosen: np.ndarray) -> tuple[Nest, Nest]:
        found: tuple[Nest, Nest] = take(self.examples, torch.from_numpy(chosen))
        return found

    def _said(
        self,
        bound: SampleBound,
        rows: np.ndarray,
        columns: np.ndarray | None,
        what: str,
        *,
        allow_error: bool,
    ) -> dict[str, Any]:
        n = len(rows) + (0 if columns is None else len(columns))
        if not allow_error:
            across = None
            if columns is not None and self.others is not None:
                across = columns, take(self.others, torch.from_numpy(columns))
            refuse_bound(
                bound, self.gradients, (rows, self._examples(rows)), across, n_sample=n, what=what
            )
        return {"error_bound": bound.bound, "error_bound_examples": n}


def warn_of_zeros() -> None:
    """Warn that there is nothing to compare."""
    warnings.warn(ALL_ZERO, stacklevel=_USER + 1)


def _ratio(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Return found / true; 1 where both are so small that float64 loses digits, or 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((found < _TINY) & (true < _TINY), 1.0, found / true)
