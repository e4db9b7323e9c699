"""Which rows belong to which example: whatever the first examples are, and in whatever order.

Every network of the field is compared with autograd on one example at a time, in float64.

Axis letters: N examples, M others, P parameters.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import reference
import torch
from field_networks import LAYOUTS
from field_routes import ROUTES
from field_truth import assert_cosines, one_at_a_time_at_most, taken, true_rows
from torch import Tensor, nn

from distributed_stiffness import cosine_matrix
from distributed_stiffness.errors import StudyError

N, M = 28, 15
CASES = LAYOUTS | ROUTES
# Near others: in one order, with zero gradients and with others.
NEAR = [
    "frames folded",
    "frames, grouped",
    "examples before windows",
    "convolution of windows",
    "packed GRU",
    "unpadded RMSNorm",
    "unpadded GroupNorm",
    "unpadded BatchNorm",
    "places of an example",
    "gathered weights",
    "stacked weights",
    "trees by level",
    "pieces of the batch",
]
ALL = pytest.mark.parametrize("name", CASES)
MOST = pytest.mark.parametrize("name", [name for name in CASES if name not in NEAR])


@lru_cache
def known(name: str) -> tuple[nn.Module, tuple, tuple, Tensor, Tensor]:
    """A network, its examples and others, and the true unit gradients of both."""
    case = CASES[name]
    torch.manual_seed(1)
    net = case.network().eval()
    made = []
    for n, longest, seed in ((N, case.longest[0], 2), (M, case.longest[1], 3)):
        examples = case.inputs(n, longest, seed), torch.arange(n) % 3
        made.append((examples, reference.unit(true_rows(net, *examples))))
    (examples, unit), (others, unit_of_others) = made
    return net, examples, others, unit, unit_of_others


def in_order(name: str, order: Tensor) -> None:
    """Cosines of the examples in an order are the true ones, in that order."""
    net, (x, y), _, unit, _ = known(name)
    with one_at_a_time_at_most():
        got = cosine_matrix(net, "cross_entropy", (taken(x, order), y[order]))
        assert_cosines(got, (unit @ unit.T)[order][:, order])


def sizes_of(name: str) -> Tensor:
    net, (x, _), *_ = known(name)
    return CASES[name].sizes(net, x)


@MOST
class TestOrder:
    def test_in_reverse(self, name):
        """From the last to the first."""
        in_order(name, torch.arange(N).flip(0))

    def test_small_ones_first(self, name):
        """The first few are the shortest, or all go one way; the last the longest."""
        in_order(name, sizes_of(name).argsort(stable=True))

    def test_the_first_eight_are_alike(self, name):
        """What eight examples of one size show is not believed of the others."""
        sizes = sizes_of(name)
        alike = (sizes == sizes.mode().values).nonzero().squeeze(1)[:8]
        assert len(alike) == 8
        rest = torch.tensor([i for i in range(N) if i not in alike.tolist()])
        in_order(name, torch.cat([alike, rest]))


@ALL
def test_any_order(name):
    """The matrix of permuted examples is the permuted matrix."""
    in_order(name, torch.randperm(N))


@ALL
def test_the_first_eight_have_no_gradient(name):
    """Labels that the loss ignores are nobody's evidence of a layout; their cosines are 0."""
    net, (x, y), _, unit, _ = known(name)
    y, unit = y.clone(), unit.clone()
    y[:8], unit[:8] = -100, 0
    with one_at_a_time_at_most():
        got = cosine_matrix(net, reference.cross_entropy, (x, y))
        assert_cosines(got, unit @ unit.T)


@ALL
def test_others_of_another_size(name):
    """Columns are longer texts, films or graphs than rows; so are rows than columns."""
    net, examples, others, unit, unit_of_others = known(name)
    for a, b, true in (
        (examples, others, unit @ unit_of_others.T),
        (others, examples, unit_of_others @ unit.T),
    ):
        with one_at_a_time_at_most():
            got = cosine_matrix(net, "cross_entropy", a, others=b)
            assert_cosines(got, true)


@MOST
def test_several_blocks(name):
    """As little memory as is taken: several batches, of which some are shorter than the first."""
    net, examples, _, unit, _ = known(name)
    of_ten = 40 * unit.shape[1]  # bytes of the gradients of ten examples
    for times in range(1, 100, 3):
        try:
            with one_at_a_time_at_most():
                got = cosine_matrix(net, "cross_entropy", examples, memory=times * of_ten)
                assert_cosines(got, unit @ unit.T)
            return
        except StudyError:
            continue
    raise AssertionError("no memory was enough")
