"""Public functions on a network and a set of examples: no Ray, no store, fit for a notebook."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from distributed_stiffness.errors import ModelError
from distributed_stiffness.gradients.batches import (
    Examples,
    Nest,
    count_examples,
    pair,
    stream,
    take,
)
from distributed_stiffness.gradients.budget import fit, free_memory
from distributed_stiffness.gradients.error_bound import error_bound, sample_examples
from distributed_stiffness.gradients.gram import Rows, cosine
from distributed_stiffness.gradients.loss_head import Loss, warn_of_own_precision
from distributed_stiffness.gradients.per_example import EXAMPLES, PerExampleGradients, matching
from distributed_stiffness.gradients.precision import precision_mode
from distributed_stiffness.gradients.recipe import Recipe
from distributed_stiffness.gradients.self_check import self_check
from distributed_stiffness.plan import Plan
from distributed_stiffness.progress import Progress
from distributed_stiffness.tiling import pieces


def cosine_matrix(
    model: nn.Module,
    loss: Loss,
    examples: Examples,
    others: Examples | None = None,
    *,
    parameters: Sequence[str] | None = None,
    precision: str = "float32",
    memory: int | None = None,
    check: bool = True,
    progress: bool = False,
) -> xr.DataArray:
    """Return cos(g_i, g_j) of the loss gradients of all pairs (Fort et al. 2019).

    Eight examples are first compared with one-example float64 autograd, in another order and other
    company; at the end a sample of pairs is, which gives the error bound (`check`).

    Args:
        model: in evaluation mode.
        loss: "cross_entropy" (outputs (N, C), or a part of them named `logits`), a callable
            (outputs, targets) -> (N,), or a `WholeLoss` of a callable (model, batch) -> (N,).
        examples: (inputs, targets), N first; inputs and targets are tensors, or tuples or dicts of
            tensors. Or a `Dataset` of such pairs, or an iterable of batches.
        others: the columns; None takes `examples` again, and computes each pair once.
        parameters: glob patterns of parameter names; None takes all that require gradients.
        precision: "float32", "float64", "bf16", "bf16x3" or "tf32" (gradients/precision.py).
        memory: bytes that gradients may take; None takes half of what is free.
        check: whether to compare eight examples and a sample of pairs with float64 autograd.
        progress: whether to show a bar.

    Returns:
        Dims (example, other), float32 in [−1, 1]; 0 where a gradient is 0. Attributes:
        `parameters` (names), and, with `check` and without `others`, `error_bound` and
        `undecided_signs` (pairs i < j with |cosine| below it).

    Raises:
        GradientError: per-example gradients are not defined or not finite.
        ModelError: the network does not fit the examples.
        StudyError: the memory holds no block of gradients, or there is no such precision.

    Examples:
        >>> import torch
        >>> net = torch.nn.Linear(3, 2).eval()
        >>> x, y = torch.eye(3), torch.tensor([0, 1, 0])
        >>> cosine_matrix(net, "cross_entropy", (x, y)).shape
        (3, 3)
    """
    work = _work(model, loss, examples, others, parameters, precision, memory, check)
    (values,), _ = work.matrices(progress=progress)
    attrs: dict[str, Any] = {"parameters": list(work.gradients.parameters)}
    if check and others is None and len(values) > 1:
        attrs |= work.bound(values)
    return _labelled(values, "cosine of two loss gradients", attrs)


def gram_matrix(
    model: nn.Module,
    loss: Loss,
    examples: Examples,
    others: Examples | None = None,
    *,
    parameters: Sequence[str] | None = None,
    precision: str = "float32",
    memory: int | None = None,
    check: bool = True,
    progress: bool = False,
) -> xr.DataArray:
    """Return g_i·g_j of all pairs, dims (example, other), float64; arguments as `cosine_matrix`."""
    work = _work(model, loss, examples, others, parameters, precision, memory, check)
    (values,), ((rows, columns),) = work.matrices(progress=progress)
    products = torch.from_numpy(values).double()
    products *= torch.from_numpy(rows).unsqueeze(1)
    products *= torch.from_numpy(columns)
    return _labelled(
        products.numpy(),
        "dot product of two loss gradients",
        {"parameters": list(work.gradients.parameters)},
    )


def layer_cosines(
    model: nn.Module,
    loss: Loss,
    examples: Examples,
    others: Examples | None = None,
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    parameters: Sequence[str] | None = None,
    precision: str = "float32",
    memory: int | None = None,
    check: bool = True,
    progress: bool = False,
) -> xr.DataArray:
    """Return one cosine matrix for each group of parameters, all from the same passes.

    Args:
        model: as in `cosine_matrix`, and so all that is not named here.
        loss: see there.
        examples: see there.
        others: see there.
        groups: name -> glob patterns of its parameters; None makes a group of each module that
            holds parameters.
        parameters: see there; groups are made of these.
        precision: see there.
        memory: see there.
        check: see there.
        progress: see there.

    Returns:
        Dims (parameter_group, example, other), float32. Coordinate `parameter_group` holds the
        names. A matrix is 0 where a group's gradient is 0. A group whose gradient is 0 but for
        rounding (a bias before a normalisation, alone) has the cosines of that rounding.

    Raises:
        ModelError: a group has no parameter; else as `cosine_matrix`.
    """
    work = _work(model, loss, examples, others, parameters, precision, memory, check)
    chosen = _groups(tuple(work.gradients.parameters), groups)
    recipes = [work.gradients.recipe.restricted(names) for names in chosen.values()]
    values, _ = work.matrices(recipes, progress=progress)
    found = _labelled(
        values, "cosine of two loss gradients", {}, dims=("parameter_group", "example", "other")
    )
    return found.assign_coords(parameter_group=np.array(list(chosen), dtype=object))


def gradient_norms(
    model: nn.Module,
    loss: Loss,
    examples: Examples,
    *,
    parameters: Sequence[str] | None = None,
    precision: str = "float32",
    memory: int | None = None,
    check: bool = True,
) -> xr.DataArray:
    """Return ‖g_i‖ at true scale, dims (example,), float64; arguments as `cosine_matrix`."""
    work = _work(model, loss, examples, None, parameters, precision, memory, check)
    make = work.makes(work.examples, [work.gradients.recipe])
    blocks = pieces(slice(0, count_examples(work.examples[0])), work.plan.block)
    norms = [rows.norm.cpu() for block in blocks for rows in make(block)]
    return xr.DataArray(
        torch.cat(norms).numpy(),
        dims=("example",),
        name="gradient_norm",
        attrs={"long_name": "norm of the loss gradient", "units": "1"},
    )


def class_cosine_matrix(
    model: nn.Module,
    loss: Loss,
    examples: Examples,
    labels: Tensor | Iterable[Tensor] | None = None,
    *,
    parameters: Sequence[str] | None = None,
    memory: int | None = None,
) -> xr.DataArray:
    """Return the mean cosine of each pair of classes without making a pair, in O(N·P).

    With unit gradients u and class sums U_a = Σ u_i, the mean over pairs i ≠ j is
    U_a·U_b/(n_a n_b) between classes and (|U_a|² − n_a)/(n_a(n_a − 1)) within one. It shares no
    code with the products of pairs, and so checks a whole matrix.

    Args:
        model: in evaluation mode.
        loss: as in `cosine_matrix`.
        examples: as in `cosine_matrix`; or an iterator of batches of any length, of which one is
            held at a time.
        labels: class of each example, counted from 0: (N,), or an iterable of such parts in the
            order of the examples, of any lengths. None takes the targets.
        parameters: as in `cosine_matrix`.
        memory: bytes that gradients may take.

    Returns:
        Dims (label, other_label), float64; NaN within a class of one example.

    Raises:
        ModelError: there are not as many labels as examples.
    """
    batches = iter(stream(examples))
    first = next(batches, None)
    if first is None:
        raise ModelError("there are no examples")
    few = take(first, slice(EXAMPLES))
    gradients = self_check(model, loss, *few, parameters=parameters)
    n_parameters = gradients.n_parameters
    size = max(1, min(256, (memory or free_memory()) // (32 * n_parameters)))
    sums = torch.zeros(0, n_parameters, dtype=torch.float64)
    counts = torch.zeros(0, dtype=torch.float64)
    of = _Labels(labels)
    for inputs, targets in itertools.chain([first], batches):
        for rows in pieces(slice(0, count_examples(inputs)), size):
            part = take((inputs, targets), rows)
            classes = of.take(part[1], count_examples(part[0]))
            missing = max(0, int(classes.max()) + 1 - len(counts))
            sums = torch.cat([sums, sums.new_zeros(missing, n_parameters)])
            counts = torch.cat([counts, counts.new_zeros(missing)])
            parts = gradients.materialised(*part, unit=True)
            flat = (p.reshape(len(p), -1).double().cpu() for p in parts.values())
            units = torch.cat(list(flat), dim=1)
            sums.index_add_(0, classes, units)
            counts.index_add_(0, classes, units.any(1).double())
    of.require_end()
    products = sums @ sums.T
    own = (products.diagonal() - counts) / (counts * (counts - 1))
    own[counts < 2] = torch.nan
    means = products / (counts[:, None] * counts)
    means.diagonal().copy_(own)
    return xr.DataArray(
        means.numpy(),
        dims=("label", "other_label"),
        name="cosine",
        attrs={"long_name": "mean cosine of two classes, self-pairs left out", "units": "1"},
    )


class _Labels:
    """Labels, handed out as examples come."""

    def __init__(self, labels: Tensor | Iterable[Tensor] | None) -> None:
        self._parts: Iterator[Tensor] | None = None
        if labels is not None:
            self._parts = iter([labels] if isinstance(labels, Tensor) else labels)
        self._left = torch.empty(0, dtype=torch.int64)

    def take(self, targets: Nest, n: int) -> Tensor:
        """Return the labels of the next n examples, whose targets are these."""
        if self._parts is None:
            if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.dim() != 1:
                raise ModelError("the targets are not labels (N,): give labels")
            return targets.long().cpu()
        while len(self._left) < n:
            part = next(self._parts, None)
            if part is None:
                raise ModelError(f"there are fewer labels than examples: {n - len(self._left)} more"
                                 " are needed at least")  # fmt: skip
            self._left = torch.cat([self._left, part.long().cpu()])
        found, self._left = self._left[:n], self._left[n:]
        return found

    def require_end(self) -> None:
        """Check that every label has been used."""
        if len(self._left) or (self._parts is not None and next(self._parts, None) is not None):
            raise ModelError("there are more labels than examples")


@dataclass(frozen=True)
class _Work:
    """Gradients, examples and plan of one call."""

    gradients: PerExampleGradients
    loss: Loss
    examples: tuple[Nest, Nest]
    others: tuple[Nest, Nest] | None
    plan: Plan

    def matrices(
        self, recipes: Sequence[Recipe] | None = None, *, progress: bool = False
    ) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
        """Return all cosines by recipe, (recipes, N, M), and the norms of rows and columns."""
        recipes = recipes or [self.gradients.recipe]
        n = count_examples(self.examples[0])
        columns = self.others or self.examples
        m = count_examples(columns[0])
        found = torch.empty(len(recipes), n, m)
        norms = [(np.empty(n), np.empty(m)) for _ in recipes]
        make_row, make_column = self.makes(self.examples, recipes), self.makes(columns, recipes)
        with Progress(quiet=not progress) as bars:
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

    def bound(self, values: np.ndarray) -> dict[str, Any]:
        """Return the error bound of a matrix, and how many of its pairs lie below it."""
        sample = sample_examples(len(values), lambda r, c: values[np.ix_(r, c)], seed=(0,))
        inputs, targets = take(self.examples, torch.from_numpy(sample.examples))
        bound = error_bound(
            self.gradients.model,
            self.loss,
            inputs,
            targets,
            sample.cosines,
            names=list(self.gradients.parameters),
            memory=self.plan.memory,
        )
        return {
            "error_bound": bound,
            "undecided_signs": int(np.triu(np.abs(values) < bound, 1).sum()),
        }

    def makes(
        self, examples: tuple[Nest, Nest], recipes: Sequence[Recipe]
    ) -> Callable[[slice], list[Rows]]:
        """Return what makes rows of some examples, one block for each recipe."""
        return lambda rows: self.gradients.rows_of(
            lambda some: take(examples, some),
            rows,
            batch=self.plan.batch,
            mended_together=self.plan.block,
            recipes=recipes,
        )


def _work(
    model: nn.Module,
    loss: Loss,
    examples: Examples,
    others: Examples | None,
    parameters: Sequence[str] | None,
    precision: str,
    memory: int | None,
    check: bool,
) -> _Work:
    # Of who calls the function that calls this one.
    warn_of_own_precision(loss, precision_mode(precision), stacklevel=3)
    rows = pair(examples)
    columns = None if others is None else pair(others)
    few = take(rows, slice(EXAMPLES))
    gradients = PerExampleGradients(model, loss, few, parameters=parameters, precision=precision)
    if check:
        self_check(model, loss, *few, parameters=parameters)
    gradients, plan = fit(
        gradients, n_examples=count_examples(rows[0]), memory=memory or free_memory()
    )
    return _Work(gradients, loss, rows, columns, plan)


def _groups(
    names: Sequence[str], groups: Mapping[str, Sequence[str]] | None
) -> dict[str, tuple[str, ...]]:
    if groups is None:
        found: dict[str, tuple[str, ...]] = {}
        for name in names:
            module = name.rpartition(".")[0] or name
            found[module] = (*found.get(module, ()), name)
        return found
    chosen = {group: matching(names, patterns) for group, patterns in groups.items()}
    for group, members in chosen.items():
        if not members:
            raise ModelError(
                f"no parameter matches group {group!r} ({', '.join(groups[group])}); there are:"
                f" {', '.join(names)}"
            )
    return chosen


def _labelled(
    values: np.ndarray,
    long_name: str,
    attrs: dict[str, Any],
    dims: Sequence[str] = ("example", "other"),
) -> xr.DataArray:
    return xr.DataArray(
        values,
        dims=dims,
        name=long_name.split()[0],
        attrs={"long_name": long_name, "units": "1", **attrs},
    )
