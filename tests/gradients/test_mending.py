"""Examples near a kink, of many passes, are looked at again together."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from networks import Cancelling
from torch import Tensor, nn
from torch.nn import functional as F

from distributed_stiffness.gradients import cosine_matrix
from distributed_stiffness.gradients.gram import cosine
from distributed_stiffness.gradients.kinks import Kinks
from distributed_stiffness.gradients.mending import Doubtful, together
from distributed_stiffness.gradients.per_example import PerExampleGradients
from distributed_stiffness.gradients.reference import Reference

TINY = 1e-8  # beside 1, within rounding


def two_calls(x: Tensor) -> Tensor:
    return F.relu(F.relu(x[:, 0]) + x[:, 1])


def examples(first: dict[int, float], second: dict[int, float], n: int = 6) -> Tensor:
    """Inputs of `two_calls`, in which some have a unit near the first kink, or the second."""
    x = 1.0 + torch.rand(n, 2, 40, generator=torch.Generator().manual_seed(0))
    for number, value in first.items():
        x[number, 0, 3] = value
    for number, value in second.items():
        x[number, 0, 5], x[number, 1, 5] = 1.0, value - 1.0
    return x


def doubtful(x: Tensor, start: int = 0) -> Doubtful:
    with Kinks(len(x)) as kinks:
        two_calls(x)
    return Doubtful.of(kinks, x, torch.arange(len(x)), start)


def test_those_near_a_kink_are_kept_with_their_places() -> None:
    """
    Their inputs and targets alone, and where their rows are.
    """
    x = examples({4: TINY}, {1: TINY})

    found = doubtful(x, start=10)

    assert found.places.tolist() == [11, 14]
    assert found.targets.tolist() == [1, 4]
    assert torch.equal(found.inputs, x[[1, 4]])


def test_passes_are_joined_and_cut_into_new_ones() -> None:
    """
    Every example once, and none twice; those that are near a kink early come first.
    """
    parts = [
        doubtful(examples({0: TINY, 3: TINY}, {2: TINY}), start=0),
        doubtful(examples({}, {}), start=6),
        doubtful(examples({5: -TINY}, {0: TINY, 5: TINY, 1: -TINY}), start=12),
    ]

    pieces = list(together(parts, 3))

    assert [piece.places.tolist() for piece in pieces] == [[0, 2, 3], [12, 13, 17]]
    assert [piece.places.tolist() for piece in together(parts, 2)] == [[0, 3], [2, 12], [13, 17]]
    assert list(together([], 3)) == []


def test_those_on_another_side_without_rounding_are_found() -> None:
    """
    In either call, whichever passes they come from.
    """
    parts = [
        doubtful(examples({0: TINY, 3: TINY}, {2: TINY}), start=0),
        doubtful(examples({}, {4: TINY}), start=6),
    ]

    def run(inputs: Tensor, targets: Tensor) -> None:
        true = inputs.double().clone()
        true[targets == 3, 0, 3] = -TINY
        true[targets == 4, 1, 5] = -1.0 + TINY
        two_calls(true)

    wrong = [part.on_the_wrong_side(run) for part in together(parts, 8)]

    assert torch.cat([part.places for part in wrong]).tolist() == [3, 10]


def test_passes_that_made_other_calls_are_not_joined() -> None:
    """
    Which of their units are the same is not known.
    """
    x = examples({1: TINY}, {})
    with Kinks(len(x)) as kinks:
        F.relu(x[:, 0])
    other = Doubtful.of(kinks, x, torch.arange(len(x)), 6)

    with Kinks(len(x)) as kinks:
        two_calls(x[:, :, :30])
    shorter = Doubtful.of(kinks, x[:, :, :30], torch.arange(len(x)), 12)

    pieces = list(together([doubtful(x), other, shorter], 8))

    assert [piece.places.tolist() for piece in pieces] == [[1], [7], [13]]


def test_a_network_without_kinks_is_not_copied() -> None:
    """
    In float64, for nothing.
    """
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    gradients = PerExampleGradients(
        model, "cross_entropy", (torch.randn(8, 4), torch.arange(8) % 3)
    )

    gradients.rows(torch.randn(8, 4), torch.arange(8) % 3)

    assert "_in_float64" not in vars(gradients)


def test_what_waits_is_let_go_with_every_window() -> None:
    """
    However many examples are near a kink.
    """
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 3)).eval()
    with torch.no_grad():
        model[0].bias[0] = 0.0
    x, y = torch.zeros(40, 4), torch.arange(40) % 3  # one unit is on the kink: by chance
    gradients = PerExampleGradients(model, "cross_entropy", (x[:8], y[:8]))
    waiting: list[int] = []
    mend = PerExampleGradients._mend

    def counted(
        self: PerExampleGradients, made: Any, doubtful: Any, *rest: Any, share: float
    ) -> None:
        waiting.append(sum(map(len, doubtful)))
        mend(self, made, doubtful, *rest, share=share)

    with mock.patch.object(PerExampleGradients, "_mend", counted):
        gradients.rows_of(
            lambda some: (x[some], y[some]), slice(0, 40), batch=4, mended_together=16
        )

    assert waiting == [16, 16, 8]


@pytest.mark.parametrize(("batch", "mended_together"), [(23, 23), (4, 8), (4, 1), (5, 100)])
def test_rows_do_not_depend_on_how_examples_were_put_together(
    batch: int, mended_together: int
) -> None:
    """
    Of batches that do not divide their number, with rows mended by batches or all at once.
    """
    torch.manual_seed(0)
    model = Cancelling(far_beyond=6).eval()
    with torch.no_grad():
        model.last.weight[:, 0] = torch.tensor([3.0, -2.0, 1.0])
    x, y = 1 + torch.rand(23, 4), torch.arange(23) % 3
    names = [name for name, _ in model.named_parameters()]
    expected = Reference(model, "cross_entropy", names).cosines(x, y, memory=10**8)
    gradients = PerExampleGradients(model, "cross_entropy", (x[:8], y[:8]))
    asked: list[int] = []

    def read(some: slice) -> tuple[Tensor, Tensor]:
        asked.append(some.stop - some.start)
        return x[some], y[some]

    (rows,) = gradients.rows_of(read, slice(0, 23), batch=batch, mended_together=mended_together)

    assert sum(asked) == 23
    assert max(asked) == min(batch, 23)
    torch.testing.assert_close(cosine(rows, rows).double(), expected, atol=2e-6, rtol=0)
    (again,) = gradients.rows_of(
        read, slice(7, 23), batch=batch, mended_together=mended_together, into=[rows[7:]]
    )
    assert again.dense_NP.data_ptr() == rows[7:].dense_NP.data_ptr()
    torch.testing.assert_close(cosine(rows, rows).double(), expected, atol=2e-6, rtol=0)


class Images(nn.Module):
    """Has parameters of channels and places, and a unit as `Cancelling` has it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second = (nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8))
        shape = (8, 6, 6) if kind == "three dimensions" else (1, 8, 6, 6)
        self.places = nn.Parameter(torch.randn(shape))
        self.norm = nn.LayerNorm([8, 6, 6])
        self.last = nn.Linear(8, 3)
        with torch.no_grad():
            self.last.weight[:, 0] = torch.tensor([9.0, -6.0, 3.0])

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = {
            "times": lambda: h * self.places,
            "by torch.func": lambda: torch.atan2(h, self.places),
            "normalised": lambda: self.norm(h),
        }.get(self.kind, lambda: h + self.places)()
        h = self.second(torch.tanh(h))
        total = x.flatten(1).sum(1)[:, None, None, None]
        big = total.abs() + 5
        lost = (big + 3e-9) - big  # 0 in float32
        unit = h[:, :1] - h[:, :1].detach() + lost - 1e-9 + (total > 0)
        return self.last(F.relu(torch.cat([unit, h[:, 1:]], 1)).mean((2, 3)))


@pytest.mark.parametrize(
    "kind", ["plus", "three dimensions", "times", "by torch.func", "normalised"]
)
@pytest.mark.filterwarnings("ignore:parameters .* are not used")
def test_mended_rows_have_the_order_of_the_others(kind: str) -> None:
    """
    Passes in float32 keep channels last in memory on a CPU, those in float64 do not.
    """
    torch.manual_seed(0)
    model = Images(kind).eval()
    x, y = torch.randn(12, 3, 6, 6), torch.arange(12) % 3
    names = [name for name, _ in model.named_parameters()]
    expected = Reference(model, "cross_entropy", names).cosines(x, y, memory=10**8)

    found = cosine_matrix(model, "cross_entropy", (x, y), check=False)

    is_mended = x.flatten(1).sum(1) <= 0
    assert is_mended.any()
    assert not is_mended.all()
    torch.testing.assert_close(torch.from_numpy(found.values).double(), expected, atol=2e-6, rtol=0)
