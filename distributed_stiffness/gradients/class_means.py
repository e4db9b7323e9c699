"""Mean cosines of pairs of classes from sums of gradients: no pair is made."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from distributed_stiffness.errors import ModelError
from distributed_stiffness.gradients.batch_check import CHECKED_SHARE
from distributed_stiffness.gradients.batches import (
    Examples,
    Nest,
    count_examples,
    stream,
    take,
)
from distributed_stiffness.gradients.budget import free_memory
from distributed_stiffness.gradients.error_bound import FEWEST, bound_of, refuse_bound
from distributed_stiffness.gradients.evidence import ALL_ZERO
from distributed_stiffness.gradients.from_evidence import gradients_of_evidence
from distributed_stiffness.gradients.gram import cosine
from distributed_stiffness.gradients.loss_head import Loss
from distributed_stiffness.gradients.per_example import PerExampleGradients
from distributed_stiffness.gradients.self_check import check_gradients
from distributed_stiffness.gradients.surroundings import in_fresh_surroundings
from distributed_stiffness.tiling import pieces

# Labels below this are counted from 0; sums of so many bytes are made whatever the memory.
_COUNTED, _ALWAYS = 10_000, 2**28

Labels = Tensor | np.ndarray | Sequence[int]


@in_fresh_surroundings
def class_cosine_matrix(
    model: nn.Module,
    loss: Loss,
    examples: Examples,
    labels: Labels | Iterable[Labels] | None = None,
    *,
    parameters: Sequence[str] | str | None = None,
    memory: int | None = None,
    allow_error: bool = False,
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
        labels: class of each example, any whole numbers: (N,) as a tensor, an array or a list, or
            an iterable of such parts in the order of the examples, of any lengths. None takes the
            targets.
        parameters: as in `cosine_matrix`.
        memory: bytes that gradients may take.
        allow_error: as in `cosine_matrix`.

    Returns:
        Dims (label, other_label), with the labels as coordinates: from 0 to the largest, or, where
        some are negative or above 10,000, those that there are; float64; NaN of a class without
        examples, and within one of one example. Attribute `error_bound`: of the cosines that
        these are means of.

    Raises:
        GradientError: as `cosine_matrix`.
        ModelError: there are not as many labels as examples, or sums of so many classes do not fit
            into the memory.
    """
    batches = iter(stream(examples))
    first = next(batches, None)
    if first is None:
        raise ModelError("there are no examples")
    gradients = _checked(model, loss, first, parameters)
    room = memory or free_memory()
    size = max(1, min(256, room // (32 * gradients.n_parameters)))
    gradients.checked_share = 1.0  # of the first batch all, of later ones a part
    sums: dict[int, Tensor] = {}
    counts: Counter[int] = Counter()
    of = _Labels(labels)
    for inputs, targets in itertools.chain([first], batches):
        for rows in pieces(slice(0, count_examples(inputs)), size):
            part = take((inputs, targets), rows)
            classes = of.take(part[1], count_examples(part[0]))
            units = _unit_vectors(gradients, *part)
            gradients.checked_share = CHECKED_SHARE
            has_gradient = units.any(1)
            for label in torch.unique(classes).tolist():
                is_in = classes == label
                sums[label] = sums.get(label, 0) + units[is_in].sum(0)
                counts[label] += int(has_gradient[is_in].sum())
            if 8 * len(sums) * gradients.n_parameters > max(room, _ALWAYS):
                raise ModelError(
                    f"there are {len(sums)} labels and more, whose sums of gradients take"
                    f" {8 * len(sums) * gradients.n_parameters:,} bytes, above the {room:,} that"
                    " are given: give labels of fewer classes, or memory="
                )
    of.require_end()
    if not counts.total():
        warnings.warn(ALL_ZERO, stacklevel=3)
    names = sorted(label for label in sums if counts[label] or label >= 0) or sorted(sums)
    if names[0] >= 0 and names[-1] < _COUNTED:
        names = list(range(names[-1] + 1))  # counted from 0
    nothing = torch.zeros(gradients.n_parameters, dtype=torch.float64, device="cpu")
    totals = torch.stack([sums.get(label, nothing) for label in names])
    n = torch.tensor([float(counts[label]) for label in names], dtype=torch.float64)
    products = totals @ totals.T
    own = (products.diagonal() - n) / (n * (n - 1))
    own[n < 2] = torch.nan
    means = products / (n[:, None] * n)
    means.diagonal().copy_(own)
    return xr.DataArray(
        means.numpy(),
        dims=("label", "other_label"),
        coords={"label": names, "other_label": names},
        name="cosine",
        attrs={
            "long_name": "mean cosine of two classes, self-pairs left out",
            "units": "1",
            **_bound(gradients, first, room, allow_error=allow_error),
        },
    )


def _checked(
    model: nn.Module,
    loss: Loss,
    examples: tuple[Nest, Nest],
    parameters: Sequence[str] | str | None,
) -> PerExampleGradients:
    """Return float64 gradients whose rows are dense, checked on some examples."""
    n = count_examples(examples[0])

    def read(some: np.ndarray) -> tuple[Nest, Nest]:
        found: tuple[Nest, Nest] = take(examples, torch.from_numpy(some))
        return found

    gradients, evidence = gradients_of_evidence(
        model, loss, read, n, parameters=parameters, precision="float64", factored=()
    )
    check_gradients(gradients, *read(evidence.places))
    # Sums of many rows keep the digits that float32 rows would lose.
    gradients.precision = replace(gradients.precision, rows=torch.float64)
    return gradients


def _unit_vectors(gradients: PerExampleGradients, inputs: Nest, targets: Nest) -> Tensor:
    """Return unit gradients, (N, P) float64 on the CPU; 0 stays 0."""
    rows, recipe = gradients.rows(inputs, targets), gradients.recipe
    scaled = rows.dense_NP.double()
    length = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    scaled = scaled / torch.where(length > 0, length, 1.0)
    if not recipe.unused:
        return scaled.cpu()
    sizes = [recipe.numbers[name] for name in recipe.dense]
    there = dict(zip(recipe.dense, torch.split(scaled, sizes, 1), strict=True))
    n = len(scaled)
    parts = [
        there[name] if name in there else scaled.new_zeros(n, size)
        for name, size in recipe.numbers.items()
    ]
    return torch.cat(parts, 1).cpu()


def _bound(
    gradients: PerExampleGradients, examples: tuple[Nest, Nest], memory: int, *, allow_error: bool
) -> dict[str, Any]:
    """Return the error bound, measured on some examples of the first batch."""
    n = count_examples(examples[0])
    places = np.sort(np.random.default_rng(0).permutation(n)[:FEWEST])
    some = take(examples, torch.from_numpy(places))
    rows = gradients.rows(*some)
    true = gradients.plain.cosines(*some, memory=memory).numpy()
    bound = bound_of(cosine(rows, rows).cpu().numpy(), true, symmetric=True)
    if not allow_error:
        refuse_bound(bound, gradients, (places, some), n_sample=len(places))
    return {"error_bound": bound.bound, "error_bound_examples": len(places)}


class _Labels:
    """Labels, handed out as examples come."""

    def __init__(self, labels: Labels | Iterable[Labels] | None) -> None:
        self._parts: Iterator[Labels] | None = None
        if labels is not None:
            is_one = hasattr(labels, "__array__") or (
                isinstance(labels, Sequence) and all(isinstance(k, Integral) for k in labels)
            )
            given: Any = labels
            if not is_one and (isinstance(given, str) or not isinstance(given, Iterable)):
                raise ModelError(f"labels are {given!r}: expected whole numbers, (N,)")
            self._parts = iter([given] if is_one else given)
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
            self._left = torch.cat([self._left, _whole_numbers(part)])
        found, self._left = self._left[:n], self._left[n:]
        return found

    def require_end(self) -> None:
        """Check that every label has been used."""
        if len(self._left) or (self._parts is not None and next(self._parts, None) is not None):
            raise ModelError("there are more labels than examples")


def _whole_numbers(labels: Labels) -> Tensor:
    try:
        found = torch.as_tensor(labels if isinstance(labels, Tensor) else np.array(labels)).cpu()
    except (TypeError, ValueError) as error:
        raise ModelError(f"labels are {labels!r}: expected whole numbers, (N,)") from error
    if found.is_floating_point() or found.is_complex() or found.dim() != 1:
        raise ModelError(
            f"labels are {str(found.dtype).removeprefix('torch.')} of shape {tuple(found.shape)}:"
            " expected whole numbers, (N,)"
        )
    return found.long()
