"""The bound that is stored with a matrix: a promise about pairs, measured on a sample."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distributed_stiffness.gradients import cosine_matrix, error_bound, gradient_norms
from distributed_stiffness.gradients.error_bound import FLOOR, sample_examples
from distributed_stiffness.gradients.reference import Reference

N = 150
NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]


@pytest.fixture
def checkpoint():
    """Return a network, its examples and their stored cosines."""
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))
    x, y = torch.randn(N, 6), torch.arange(N) % 4
    return model, x, y, cosine_matrix(model, "cross_entropy", (x, y)).values


def draw(matrix):
    return sample_examples(len(matrix), lambda r, c: matrix[np.ix_(r, c)], seed=(1, 2, 3))


def bound_of(model, x, y, sample, *, memory=2**28):
    chosen = torch.from_numpy(sample.examples)
    true = Reference(model, "cross_entropy", NAMES).cosines(x[chosen], y[chosen], memory=memory)
    return error_bound.bound_of(sample.cosines, true.numpy(), symmetric=True).bound


class TestSample:
    def test_two_thousand_pairs_half_of_them_near_zero(self, checkpoint):
        """At least 2,000 pairs, and the examples added are those nearest to zero."""
        *_, matrix = checkpoint
        sample = draw(matrix)

        n = len(sample.examples)
        assert n * (n - 1) // 2 >= 2000
        assert (np.diff(sample.examples) > 0).all()
        assert (sample.cosines == matrix[np.ix_(sample.examples, sample.examples)]).all()
        inside = abs(sample.cosines[np.triu_indices(n, 1)])
        assert np.median(inside) < np.median(abs(matrix[np.triu_indices(N, 1)]))

    def test_the_seed_decides(self, checkpoint):
        """The same seed draws the same examples, so that a check can be repeated."""
        *_, matrix = checkpoint

        assert (draw(matrix).examples == draw(matrix).examples).all()

    @given(n=st.integers(1, 200))
    def test_any_number_of_examples(self, n):
        """Fewer examples than a sample holds are all taken, each once."""
        matrix = np.eye(n, dtype=np.float32)
        examples = draw(matrix).examples

        assert len(set(examples)) == len(examples) == min(n, 96)
        assert examples.min() >= 0
        assert examples.max() < n


class TestBound:
    def test_covers_the_truth_on_the_sample(self, checkpoint):
        """No sampled pair is further from float64 than the bound; nor is any other, here."""
        model, x, y, matrix = checkpoint
        sample = draw(matrix)
        bound = bound_of(model, x, y, sample)

        truth = reference.cosine_matrix(model, reference.cross_entropy, x, y).numpy()
        worst = abs(sample.cosines - truth[np.ix_(sample.examples, sample.examples)]).max()
        assert worst <= bound
        assert abs(matrix - truth).max() <= bound
        assert FLOOR <= bound <= 4e-6

    @pytest.mark.parametrize("size", [1e-5, 1e-3, 0.5])
    def test_grows_when_the_matrix_is_corrupted(self, checkpoint, size):
        """A wrong matrix is seen from its sample."""
        model, x, y, matrix = checkpoint
        wrong = matrix + size * np.random.default_rng(0).choice([-1, 1], matrix.shape)

        assert bound_of(model, x, y, draw(wrong.astype(np.float32))) >= size

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_what_is_not_finite_is_never_within_a_bound(self, checkpoint, value):
        """A pair that was not computed makes the bound NaN or infinite, never small."""
        model, x, y, matrix = checkpoint
        sample = draw(matrix)
        sample.cosines[3, 40] = sample.cosines[40, 3] = value

        assert not bound_of(model, x, y, sample) < 1

    def test_memory_does_not_matter(self, checkpoint):
        """With little memory float64 gradients are made again, and the bound is the same."""
        model, x, y, matrix = checkpoint
        sample = draw(matrix)

        little = bound_of(model, x, y, sample, memory=20_000)
        assert little == pytest.approx(bound_of(model, x, y, sample), rel=1e-6)

    @pytest.mark.parametrize("margin", [30.0, 100.0, 600.0, 730.0, 2000.0])
    def test_stays_small_where_examples_are_fitted(self, checkpoint, margin):
        """1 − p of 1e-13, 1e-260, and far below float64's smallest number."""
        model, x, y, _ = checkpoint
        with torch.no_grad():
            model[2].weight.mul_(0.01)
            model[2].bias.copy_(torch.tensor([margin, 0.0, 0.1, 0.2]))
        y = torch.where(torch.arange(N) % 3 == 0, y, 0)
        found = cosine_matrix(model, "cross_entropy", (x, y), precision="float64")
        truth = reference.cosine_matrix(model, reference.log_odds, x, y).numpy()

        assert abs(found.values - truth).max() <= found.attrs["error_bound"] <= 2e-6


class TestReference:
    """The package's own float64 reference, against the tests' one."""

    def test_gradients(self, checkpoint):
        """Two plain loops, written apart, agree to float64's last digits."""
        model, x, y, _ = checkpoint
        found = Reference(model, "cross_entropy", NAMES)
        expected = reference.per_example_gradients(model, reference.cross_entropy, x[:9], y[:9])

        for i in range(9):
            for name, g in found.gradient(x, y, i).items():
                torch.testing.assert_close(g, expected[name][i], rtol=1e-11, atol=1e-15)
        torch.testing.assert_close(
            found.unit_gradients(x[:9], y[:9]),
            reference.unit(reference.flat(expected)),
            rtol=1e-11,
            atol=1e-15,
        )

    @pytest.mark.parametrize("memory", [1, 10_000, 2**28])
    def test_cosines(self, checkpoint, memory):
        """In any number of blocks."""
        model, x, y, _ = checkpoint
        found = Reference(model, "cross_entropy", NAMES).cosines(x[:20], y[:20], memory=memory)

        expected = reference.cosine_matrix(model, reference.cross_entropy, x[:20], y[:20])
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)

    @pytest.mark.parametrize("confidence", [1, 30, 200], ids="confidence {}".format)
    @pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
    def test_a_sum_of_unit_gradients_is_one_backward_pass(self, checkpoint, loss, confidence):
        """
        It equals the gradients one by one, scaled and added, also where 1 − p is below 1e-80; an
        example without a gradient adds nothing.
        """
        model, x, y, _ = checkpoint
        model[2].weight.data *= confidence
        y = model(x).argmax(1)  # over-fitted: every example is right
        if loss == "mse":
            loss = lambda outputs, targets: (outputs.double()[:, 0] - targets) ** 2  # noqa: E731
        found = Reference(model, loss, NAMES)
        norms = gradient_norms(model, loss, (x, y), precision="float64")
        norms = torch.from_numpy(norms.values).clone()
        norms[3] = 0
        expected = found.unit_gradients(x, y)

        total = found.unit_sum(x, y, norms)

        expected = expected.sum(0) - expected[3]
        torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-8)
