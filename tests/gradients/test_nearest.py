"""The compiled look for the unit that is nearest to a kink, against torch's own operations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from distributed_stiffness.gradients.nearest import FEW, Nearest, nearest, nearest_pairs

SIZES = st.sampled_from([0.0, -0.0, 1.0, -2.5, 1e-30, -1e-45, math.inf, -math.inf])


ALIKE = torch.ones(())


def by_torch(x: Tensor, distance: Tensor, weight: Tensor = ALIKE) -> Nearest:
    weighted = (distance.abs() * weight).flatten(1)
    is_far = (weighted == 0) & ((weighted == 0).sum(1, keepdim=True) > FEW)
    size = x.double().square().flatten(1).mean(1).sqrt()
    return Nearest(weighted.masked_fill(is_far, math.inf).amin(1), size.to(x.dtype))


def assert_same(found: Nearest, expected: Nearest) -> None:
    assert found.distance.tolist() == expected.distance.tolist()
    torch.testing.assert_close(found.size, expected.size)


@given(
    st.lists(st.lists(SIZES, min_size=12, max_size=12), min_size=1, max_size=4),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_the_nearest_counts_and_zeros_only_where_they_are_few(
    rows: list[list[float]], dtype: torch.dtype
) -> None:
    """
    Of either sign, below the smallest normal number, infinite; in compiled loops and by torch.
    """
    x = torch.tensor(rows, dtype=dtype)

    assert_same(nearest(x, x, ALIKE), by_torch(x, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_so_many_zeros_may_be_there_by_chance(dtype: torch.dtype) -> None:
    """
    One more is so by construction.
    """
    x = torch.ones(2, 50, dtype=dtype)
    x[0, :FEW] = x[1, : FEW + 1] = 0

    assert nearest(x, x, ALIKE).distance.tolist() == [0, 1]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_large_images_in_any_layout(layout: torch.memory_format) -> None:
    """
    Several threads look at shares of the examples.
    """
    x = torch.randn(70, 16, 64, 64).contiguous(memory_format=layout)
    weight = 1 + torch.rand(16, 64, 64)

    assert_same(nearest(x, x, weight), by_torch(x, x, weight))
    assert_same(nearest(x, x, weight[:, :1, :1]), by_torch(x, x, weight[:, :1, :1]))


@pytest.mark.parametrize("length", [1, 2048, 2049, 5000])
def test_rows_of_any_length(length: int) -> None:
    """
    The smallest may be first or last.
    """
    x = 1 + torch.rand(2, length)
    x[0, 0] = x[1, -1] = -0.5
    weight = 1 + torch.rand(length)

    assert_same(nearest(x, x, weight), by_torch(x, x, weight))


def test_the_size_is_that_of_the_units_whatever_their_distance() -> None:
    """
    A kink at 6: what a unit was rounded by does not depend on it.
    """
    x = 100 + torch.rand(3, 50)

    assert_same(nearest(x, x - 100, ALIKE), by_torch(x, x - 100))


def test_a_number_that_is_none_is_far() -> None:
    """
    A network that has diverged is not looked at again.
    """
    x = torch.full((1, 3), math.nan)

    assert not bool(nearest(x, x, ALIKE).distance < 1.0)


@pytest.mark.parametrize(
    ("size", "step"),
    [((2, 2), (2, 2)), ((3, 3), (2, 2)), ((1, 3), (1, 1)), ((3, 1), (1, 3)), ((2, 4), (3, 5))],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("has_ties", [False, True])
def test_the_largest_of_a_window_against_the_second(
    size: tuple[int, int], step: tuple[int, int], layout: torch.memory_format, has_ties: bool
) -> None:
    """
    What ReLU has cut off is a tie of every precision; other ties are of this one.
    """
    x = torch.randn(6, 5, 13, 12)
    x = F.relu(x.mul(4).round() / 4 if has_ties else x + 0.5).contiguous(memory_format=layout)
    windows = x.unfold(2, size[0], step[0]).unfold(3, size[1], step[1]).flatten(4)
    top, second = windows.topk(2, dim=4).values.unbind(4)
    gap = top - second
    weight = 2.0 ** torch.randint(0, 4, gap.shape[1:])  # which rounds nothing
    tie = torch.finfo(torch.float32).tiny
    gap = torch.where((gap == 0) & (top > 0), tie / weight, gap)

    assert_same(nearest_pairs(x, weight, size, step), by_torch(x, gap, weight))


def test_windows_of_a_black_image_are_far_from_any_kink() -> None:
    """
    Also where columns lie under no window.
    """
    x = torch.zeros(2, 3, 9, 9)

    assert nearest_pairs(x, ALIKE, (2, 2), (2, 2)).distance.tolist() == [math.inf] * 2
