"""Public functions on a network and a set of examples: no Ray, no store, fit for a notebook."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from distributed_stiffness.errors import ModelError
from distributed_stiffness.gradients.batches import Examples, count_examples
from distributed_stiffness.gradients.in_play import matching, patterns_of
from distributed_stiffness.gradients.loss_head import Loss
from distributed_stiffness.gradients.matrix_work import MatrixWork, warn_of_zeros
from distributed_stiffness.gradients.surroundings import in_fresh_surroundings
from distributed_stiffness.tiling import pieces


@in_fresh_surroundings
def cosine_matrix(
    model: nn.Module,
    loss: Loss,
    examples: Examples,
    others: Examples | None = None,
    *,
    parameters: Sequence[str] | str | None = None,
    precision: str = "float32",
    memory: int | None = None,
    check: bool = True,
    allow_error: bool = False,
    progress: bool = False,
) -> xr.DataArray:
    """Return cos(g_i, g_j) of the loss gradients of all pairs (Fort et al. 2019).

    Some examples of every batch are compared with plain autograd while they are at hand. With
    `check`, eight examples are first compared with one-example float64 autograd, in another order
    and other company; at the end a sample of pairs is, which gives the error bound.

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
        check: whether to compare eight examples and a sample of pairs with float64 autograd. What
            every batch is checked by stays on.
        allow_error: whether to return cosines though their error bound is above 0.01 (0.1 in bf16
            and tf32).
        progress: whether to show a bar.

    Returns:
        Dims (example, other), float32 in [−1, 1]; 0 where a gradient is 0. Attributes:
        `parameters` (names, as JSON text: files of any kind keep it), and with `check`
        `error_bound`, `error_bound_examples` (that it was measured on) and `undecided_signs`
        (pairs, i < j without `others`, whose |cosine| is below the bound).

    Raises:
        GradientError: per-example gradients are not defined or not finite, or the error bound is
            above what is allowed.
        ModelError: the network does not fit the examples.
        StudyError: the memory holds no block of gradients, or there is no such precision.

    Examples:
        >>> import torch
        >>> net = torch.nn.Linear(3, 2).eval()
        >>> x, y = torch.eye(3), torch.tensor([0, 1, 0])
        >>> cosine_matrix(net, "cross_entropy", (x, y)).shape
        (3, 3)
    """
    work = MatrixWork.of(
        model, loss, examples, others, parameters, precision, memory, check, allow_error
    )
    (values,), _ = work.matrices(progress=progress)
    attrs: dict[str, Any] = {"parameters": json.dumps(list(work.gradients.parameters))}
    if check:
        attrs |= work.bound_of_cosines(values[None], allow_error=allow_error)
        below = np.abs(values) < attrs["error_bound"]
        attrs["undecided_signs"] = int((below if others is not None else np.triu(below, 1)).sum())
    return _labelled(values, "cosine of two loss gradients", attrs)


@in_fresh_surroundings
def gram_matrix(
    model: nn.Module,
    loss: Loss,
    examples: Examples,
    others: Examples | None = None,
    *,
    parameters: Sequence[str] | str | None = None,
    precision: str = "float32",
    memory: int | None = None,
    check: bool = True,
    allow_error: bool = False,
    progress: bool = False,
) -> xr.DataArray:
    """Return g_i·g_j of all pairs, dims (example, other), float64; arguments as `cosine_matrix`.

    With `check` the attribute `error_bound` is in units of |g_i| |g_j|.
    """
    work = MatrixWork.of(
        model, loss, examples, others, parameters, precision, memory, check, allow_error
    )
    (values,), ((rows, columns),) = work.matrices(progress=progress)
    attrs: dict[str, Any] = {"parameters": json.dumps(list(work.gradients.parameters))}
    if check:
        attrs |= work.bound_of_products(values, rows, columns, allow_error=allow_error)
    products = torch.from_numpy(values).double()
    products *= torch.from_numpy(rows).unsqueeze(1)
    products *= torch.from_numpy(columns)
    return _labelled(products.numpy(), "dot product of two loss gradients", attrs)


@in_fresh_surroundings
def layer_cosines(
    model: nn.Module,
    loss: Loss,
    examples: Examples,
    others: Examples | None = None,
    *,
    groups: Mapping[str, Sequence[str] | str] | None = None,
    parameters: Sequence[str] | str | None = None,
    precision: str = "float32",
    memory: int | None = None,
    check: bool = True,
    allow_error: bool = False,
    progress: bool = False,
) -> xr.DataArray:
    """Return one cosine matrix for each group of parameters, all from the same passes.

    Args:
        model: as in `cosine_matrix`, and so all that is not named here.
        loss: see there.
        examples: see there.
        others: see there.
        groups: name -> glob patterns of its parameters, or one such pattern; None makes a group of
            each module that holds parameters.
        parameters: see there; groups are made of these.
        precision: see there.
        memory: see there.
        check: see there.
        allow_error: see there.
        progress: see there.

    Returns:
        Dims (parameter_group, example, other), float32. Coordinate `parameter_group` holds the
        names. A matrix is 0 where a group's gradient is 0; with `check` also where it is 0 but for
        rounding (a bias before a normalisation, alone), and the attribute `error_bound` is the
        largest of all groups.

    Raises:
        ModelError: a group has no parameter; else as `cosine_matrix`.
    """
    work = MatrixWork.of(
        model, loss, examples, others, parameters, precision, memory, check, allow_error
    )
    chosen = _groups(tuple(work.gradients.parameters), groups)
    values, _ = work.matrices(list(chosen.values()), progress=progress)
    attrs = {}
    if check:
        attrs = work.bound_of_cosines(values, chosen, allow_error=allow_error)
    found = _labelled(
        values, "cosine of two loss gradients", attrs, dims=("parameter_group", "example", "other")
    )
    return found.assign_coords(parameter_group=np.array(list(chosen), dtype=np.str_))


@in_fresh_surroundings
def gradient_norms(
    model: nn.Module,
    loss: Loss,
    examples: Examples,
    *,
    parameters: Sequence[str] | str | None = None,
    precision: str = "float32",
    memory: int | None = None,
    check: bool = True,
    allow_error: bool = False,
) -> xr.DataArray:
    """Return ‖g_i‖ at true scale, dims (example,), float64; arguments as `cosine_matrix`.

    With `check` the attribute `error_bound` is relative to each norm.
    """
    work = MatrixWork.of(
        model, loss, examples, None, parameters, precision, memory, check, allow_error
    )
    blocks = list(pieces(slice(0, count_examples(work.examples[0])), work.plan.block))

    def make() -> list[Tensor]:
        rows = work.makes(work.examples, None)
        return [some.norm.cpu() for block in blocks for some in rows(block)]

    norms = torch.cat(work.gradients.settled(make)).numpy()
    if not norms.any():
        warn_of_zeros()
    attrs: dict[str, Any] = {"long_name": "norm of the loss gradient", "units": "1"}
    if check:
        attrs |= work.bound_of_norms(norms, allow_error=allow_error)
    return xr.DataArray(norms, dims=("example",), name="gradient_norm", attrs=attrs)


def _groups(
    names: Sequence[str], groups: Mapping[str, Sequence[str] | str] | None
) -> dict[str, tuple[str, ...]]:
    if groups is None:
        found: dict[str, tuple[str, ...]] = {}
        for name in names:
            module = name.rpartition(".")[0] or name
            found[module] = (*found.get(module, ()), name)
        return found
    if not isinstance(groups, Mapping) or not groups:
        raise ModelError(
            f"groups are {groups!r}: expected a mapping of names to patterns, such as"
            " {'first': ['0.*']}"
        )
    patterns = {group: patterns_of(given, f"group {group!r}") for group, given in groups.items()}
    chosen = {group: matching(names, some) for group, some in patterns.items()}
    for group, members in chosen.items():
        if not members:
            raise ModelError(
                f"no parameter matches group {group!r} ({', '.join(patterns[group])}); there are:"
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
