"""Public functions on a network and a set of examples: no Ray, no store, fit for a notebook."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import psutil
import torch
import xarray as xr
from torch import Tensor, nn

from distributed_stiffness.errors import ModelError
from distributed_stiffness.gradients.batches import Inputs, count_examples, map_inputs, take
from distributed_stiffness.gradients.error_bound import error_bound, sample_examples
from distributed_stiffness.gradients.gram import Rows, concatenate, cosine
from distributed_stiffness.gradients.loss_head import Loss
from distributed_stiffness.gradients.per_example import PerExampleGradients
from distributed_stiffness.plan import Plan, make_plan
from distributed_stiffness.tiling import pieces

Examples = tuple[Inputs, Tensor]


def cosine_matrix(
    model: nn.Module,
    loss: Loss,
    examples: Examples,
    others: Examples | None = None,
    *,
    parameters: Sequence[str] | None = None,
    precision: str = "float32",
    memory: int | None = None,
) -> xr.DataArray:
    """Return cos(g_i, g_j) of the loss gradients of all pairs (Fort et al. 2019).

    Args:
        model: in evaluation mode.
        loss: "cross_entropy" or a callable (outputs, targets) -> (N,).
        examples: (inputs, targets), N first.
        others: the columns; None takes `examples` again.
        parameters: glob patterns of parameter names; None takes all that require gradients.
        precision: "float32" or "float64" (gradients/precision.py).
        memory: bytes that gradients may take; None takes half of what is free.

    Returns:
        Dims (example, other), float32 in [−1, 1]; 0 where a gradient is 0. Attributes:
        `parameters` (names), and, without `others`, `error_bound` and `undecided_signs` (pairs
        i < j with |cosine| below it).

    Raises:
        GradientError: per-example gradients are not defined or not finite.
        ModelError: the network does not fit the examples.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(3, 2).eval()
        >>> x, y = torch.eye(3), torch.tensor([0, 1, 0])
        >>> cosine_matrix(net, "cross_entropy", (x, y)).shape
        (3, 3)
    """
    gradients = _gradients(model, loss, examples, parameters, precision)
    values, _ = _matrix(gradients, examples, others, memory)
    attrs: dict[str, Any] = {"parameters": list(gradients.parameters)}
    if others is None and len(values) > 1:
        sample = sample_examples(len(values), lambda r, c: values[np.ix_(r, c)], seed=(0,))
        chosen = torch.from_numpy(sample.examples)
        bound = error_bound(
            gradients.model,
            loss,
            take(examples[0], chosen),
            examples[1][chosen],
            sample.cosines,
            names=list(gradients.parameters),
            memory=memory or _free_memory(),
        )
        undecided = int(np.triu(np.abs(values) < bound, 1).sum())
        attrs |= {"error_bound": bound, "undecided_signs": undecided}
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
) -> xr.DataArray:
    """Return g_i·g_j of all pairs, dims (example, other), float64; arguments as `cosine_matrix`."""
    gradients = _gradients(model, loss, examples, parameters, precision)
    values, norms = _matrix(gradients, examples, others, memory)
    products = values.astype(np.float64) * norms[0][:, None] * norms[1]
    return _labelled(
        products, "dot product of two loss gradients", {"parameters": list(gradients.parameters)}
    )


def gradient_norms(
    model: nn.Module,
    loss: Loss,
    examples: Examples,
    *,
    parameters: Sequence[str] | None = None,
    precision: str = "float32",
    memory: int | None = None,
) -> xr.DataArray:
    """Return ‖g_i‖ at true scale, dims (example,), float64; arguments as `cosine_matrix`."""
    gradients = _gradients(model, loss, examples, parameters, precision)
    plan = _plan(gradients, examples, memory)
    make, n = _rows_of(gradients, examples), count_examples(examples[0])
    norms = [make(block).norm.cpu() for block in pieces(slice(0, n), plan.block)]
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
    labels: Tensor,
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
        examples: (inputs, targets), N first.
        labels: class of each example, (N,), counted from 0.
        parameters: as in `cosine_matrix`.
        memory: bytes that gradients may take.

    Returns:
        Dims (label, other_label), float64; NaN within a class of one example.
    """
    gradients = _gradients(model, loss, examples, parameters, "float64")
    n, n_classes = count_examples(examples[0]), int(labels.max()) + 1
    budget = memory or _free_memory()
    block = max(1, min(256, n, budget // (32 * gradients.n_parameters)))
    sums = torch.zeros(n_classes, gradients.n_parameters, dtype=torch.float64)
    counts = torch.zeros(n_classes, dtype=torch.float64)
    for rows in pieces(slice(0, n), block):
        parts = gradients.materialised(take(examples[0], rows), examples[1][rows], unit=True)
        units = torch.cat([p.flatten(1).double().cpu() for p in parts.values()], dim=1)
        sums.index_add_(0, labels[rows], units)
        counts.index_add_(0, labels[rows], units.any(1).double())
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


def _gradients(
    model: nn.Module,
    loss: Loss,
    examples: Examples,
    parameters: Sequence[str] | None,
    precision: str,
) -> PerExampleGradients:
    _require_a_target_each(examples)
    inputs, targets = examples
    sample = take(inputs, slice(3)), targets[:3]
    return PerExampleGradients(model, loss, sample, parameters=parameters, precision=precision)


def _require_a_target_each(examples: Examples) -> None:
    if not isinstance(examples, tuple | list) or len(examples) != 2:
        raise ModelError(
            f"examples are a {type(examples).__name__}: expected (inputs, targets), N first"
        )
    inputs, targets = examples
    map_inputs(_require_tensor, inputs)
    _require_tensor(targets)
    if len(targets) != count_examples(inputs):
        raise ModelError(f"{count_examples(inputs)} inputs, but {len(targets)} targets")


def _require_tensor(value: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        raise ModelError(
            f"examples hold a {type(value).__module__}.{type(value).__name__}: expected torch"
            " tensors, N first; torch.from_numpy makes them of arrays"
        )
    return value


def _matrix(
    gradients: PerExampleGradients,
    examples: Examples,
    others: Examples | None,
    memory: int | None,
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Return all cosines, panel by panel, and the norms of rows and columns."""
    plan = _plan(gradients, examples, memory)
    columns = others or examples
    _require_a_target_each(columns)
    n, m = count_examples(examples[0]), count_examples(columns[0])
    values = np.empty((n, m), dtype=np.float32)
    norms = np.empty(n), np.empty(m)
    make_row, make_column = _rows_of(gradients, examples), _rows_of(gradients, columns)
    for panel in pieces(slice(0, n), plan.panel_rows):
        held = concatenate(map(make_row, pieces(panel, plan.block)), panel.stop - panel.start)
        norms[0][panel] = held.norm.cpu().numpy()
        first = panel.start if others is None else 0  # below it: known by symmetry
        for block in pieces(slice(first, m), plan.block):
            is_held = others is None and block.stop <= panel.stop
            there = slice(block.start - panel.start, block.stop - panel.start)
            made = held[there] if is_held else make_column(block)
            norms[1][block] = made.norm.cpu().numpy()
            values[panel, block] = cosine(held, made).cpu().numpy()
    if others is None:
        upper = np.triu(values)
        values, norms = upper + np.triu(upper, 1).T, (norms[0], norms[0])
    return values, norms


def _rows_of(gradients: PerExampleGradients, examples: Examples) -> Callable[[slice], Rows]:
    inputs, targets = examples
    return lambda block: gradients.rows(take(inputs, block), targets[block])


def _plan(gradients: PerExampleGradients, examples: Examples, memory: int | None) -> Plan:
    few = slice(3)
    row_bytes, making_bytes = gradients.bytes_per_example(take(examples[0], few), examples[1][few])
    n = count_examples(examples[0])
    return make_plan(
        n_examples=n,
        n_checkpoints=1,
        row_bytes=row_bytes,
        making_bytes=making_bytes,
        memory=memory or _free_memory(),
    )


def _free_memory() -> int:
    return int(psutil.virtual_memory().available // 2)


def _labelled(values: np.ndarray, long_name: str, attrs: dict[str, Any]) -> xr.DataArray:
    return xr.DataArray(
        values,
        dims=("example", "other"),
        name=long_name.split()[0],
        attrs={"long_name": long_name, "units": "1", **attrs},
    )
