"""What holds for any network and any examples."""

from __future__ import annotations

import json

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from distributed_stiffness.errors import GradientError, ModelError, StudyError
from distributed_stiffness.gradients import (
    PerExampleGradients,
    class_cosine_matrix,
    cosine_matrix,
    gradient_norms,
    gram_matrix,
)

# Other blocks sum in another order: the last digits of a float32 row and product move.
MOVED = 1e-6
# The promise on a float32 cosine.
FLOAT32 = 2e-6
CLASSES = 4


def network(seed: int) -> nn.Module:
    """Factored, structured and functional parameters together."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv1d(1, 3, 3, padding=1),
        nn.GroupNorm(3, 3),
        nn.PReLU(3),
        nn.Flatten(),
        nn.Linear(18, CLASSES),
    )


def data(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 6, generator=generator)
    return x, torch.randint(0, CLASSES, (n,), generator=generator)


def cosines(model, examples, others=None, **options):
    """The numbers, without the long checks: these are compared in test_self_check.py and others."""
    options = {"check": False} | options
    return cosine_matrix(model, "cross_entropy", examples, others, **options).values


def smallest_memory(n: int) -> int:
    """Return a budget that holds about eight gradients of `network`: many blocks and panels."""
    x, y = data(n)
    gradients = PerExampleGradients(network(0), "cross_entropy", (x, y))
    row, making = gradients.bytes_per_example()
    return 7 * max(8 * row, 2 * making)


seeds = st.integers(0, 1000)
sizes = st.integers(3, 30)


@given(n=st.integers(9, 60), seed=seeds, share=st.floats(1, 10))
def test_blocks_and_panels_do_not_matter(n, seed, share):
    """With little memory the matrix is made in many blocks and panels, and is the same."""
    model, examples = network(seed), data(n, seed)
    little = cosines(model, examples, memory=int(share * smallest_memory(n)))

    assert abs(little - cosines(model, examples, memory=2**30)).max() <= MOVED


@given(seed=seeds, n=st.integers(9, 40), m=st.integers(1, 40))
def test_blocks_and_panels_do_not_matter_between_two_sets(seed, n, m):
    """The same of a rectangle."""
    model, examples, others = network(seed), data(n, seed), data(m, seed + 1)
    little = cosines(model, examples, others, memory=smallest_memory(n))

    assert little.shape == (n, m)
    assert abs(little - cosines(model, examples, others, memory=2**30)).max() <= MOVED


@given(seed=seeds, n=sizes, data_=st.data())
def test_permuted_examples_permute_the_matrix(seed, n, data_):
    """Nothing depends on where an example stands."""
    order = torch.tensor(data_.draw(st.permutations(range(n))))
    model, (x, y) = network(seed), data(n, seed)

    permuted = cosines(model, (x[order], y[order]))
    assert abs(permuted - cosines(model, (x, y))[np.ix_(order, order)]).max() <= MOVED


@given(seed=seeds, n=sizes)
def test_a_matrix_of_cosines(seed, n):
    """Symmetric to the last bit, 1 on the diagonal, within [−1, 1], finite."""
    found = cosines(network(seed), data(n, seed))

    assert (found == found.T).all()
    assert abs(found.diagonal() - 1).max() <= MOVED
    assert (abs(found) <= 1).all()


@given(seed=seeds, n=sizes)
def test_equal_examples(seed, n):
    """An example that is there twice has cosine 1 with itself, and equal rows."""
    x, y = data(n, seed)
    x[-1], y[-1] = x[0], y[0]
    found = cosines(network(seed), (x, y))

    assert found[0, -1] == pytest.approx(1, abs=MOVED)
    assert abs(found[0] - found[-1]).max() <= MOVED


@given(seed=seeds, powers=st.lists(st.floats(-150, 150), min_size=3, max_size=20))
def test_the_size_of_a_loss_does_not_matter(seed, powers):
    """A positive factor on each example's loss changes no cosine, and multiplies its norm."""
    factor = 10.0 ** torch.tensor(powers, dtype=torch.float64)
    model, (x, y) = network(seed), data(len(powers), seed)

    def scaled(outputs, targets):
        weight, label = targets.double()[:, 1], targets[:, 0].long()
        return weight * F.cross_entropy(outputs, label, reduction="none")

    examples = x, torch.stack([y.double(), factor], 1)
    assert abs(
        cosine_matrix(model, scaled, examples).values - cosines(model, (x, y))
    ).max() <= MOVED  # fmt: skip
    np.testing.assert_allclose(
        gradient_norms(model, scaled, examples).values,
        factor.numpy() * gradient_norms(model, "cross_entropy", (x, y)).values,
        rtol=1e-5,
    )


@given(seed=seeds, n=sizes)
def test_gram_is_cosine_times_norms(seed, n):
    """g_i·g_j = cos(g_i, g_j) ‖g_i‖ ‖g_j‖, each row with its own norm."""
    model, examples = network(seed), data(n, seed)
    norm = gradient_norms(model, "cross_entropy", examples, check=False).values
    gram = gram_matrix(model, "cross_entropy", examples, check=False).values
    g_NP = reference.flat(
        reference.per_example_gradients(model, reference.cross_entropy, *examples)
    )

    np.testing.assert_allclose(norm, g_NP.norm(dim=1).numpy(), rtol=1e-5)
    np.testing.assert_allclose(gram, cosines(model, examples) * np.outer(norm, norm), rtol=1e-6)
    scale = np.outer(norm, norm)
    assert (
        abs(gram - reference.gram(g_NP).numpy()) <= 2 * FLOAT32 * scale + 1e-5 * abs(gram)
    ).all()


@given(seed=seeds, n=sizes, m=sizes)
def test_others_are_a_block_of_the_joint_matrix(seed, n, m):
    """The matrix of two sets is a block of the matrix of both together."""
    model, examples, others = network(seed), data(n, seed), data(m, seed + 1)
    joint = tuple(torch.cat(pair) for pair in zip(examples, others, strict=True))

    block = cosines(model, examples, others)
    assert abs(block - cosines(model, joint)[:n, n:]).max() <= MOVED
    gram = gram_matrix(model, "cross_entropy", examples, others, check=False).values
    whole = gram_matrix(model, "cross_entropy", joint, check=False).values
    np.testing.assert_allclose(gram, whole[:n, n:], atol=MOVED * abs(whole).max())


class TestClassCosineMatrix:
    def means(self, matrix, labels, dead=None):
        """Class means over all pairs, self-pairs and zero gradients left out, in a plain loop."""
        n_classes = int(labels.max()) + 1
        alive = np.ones(len(labels), dtype=bool) if dead is None else ~dead
        expected = np.full((n_classes, n_classes), np.nan)
        for a in range(n_classes):
            for b in range(n_classes):
                pairs = [
                    matrix[i, j]
                    for i in np.flatnonzero((labels.numpy() == a) & alive)
                    for j in np.flatnonzero((labels.numpy() == b) & alive)
                    if i != j
                ]
                if pairs:
                    expected[a, b] = np.mean(pairs, dtype=np.float64)
        return expected

    @given(seed=seeds, n=st.integers(8, 40))
    def test_means_of_the_full_matrix(self, seed, n):
        """Class means without a pair being made are those of all pairs, self-pairs left out."""
        model, (x, y) = network(seed), data(n, seed)
        found = class_cosine_matrix(model, "cross_entropy", (x, y), y)

        expected = self.means(cosines(model, (x, y)), y)
        np.testing.assert_allclose(found.values, expected, atol=FLOAT32)

    def test_labels_need_not_be_the_targets(self):
        """Any grouping will do, super-classes for instance."""
        model, (x, y) = network(0), data(30)
        found = class_cosine_matrix(model, "cross_entropy", (x, y), y // 2)

        assert found.dims == ("label", "other_label")
        expected = self.means(cosines(model, (x, y)), y // 2)
        np.testing.assert_allclose(found.values, expected, atol=FLOAT32)

    def test_blocks_do_not_matter(self):
        """Little memory means many blocks, and the same means."""
        model, (x, y) = network(0), data(50)
        many = class_cosine_matrix(model, "cross_entropy", (x, y), y, memory=1)

        one = class_cosine_matrix(model, "cross_entropy", (x, y), y)
        np.testing.assert_allclose(many.values, one.values, atol=1e-12)

    def test_a_class_of_one_or_none(self):
        """Within a class of one example there is no pair, and of none no mean: NaN."""
        model, (x, _) = network(0), data(6)
        labels = torch.tensor([0, 0, 1, 3, 3, 3])
        found = class_cosine_matrix(model, "cross_entropy", (x, labels), labels).values

        assert np.isnan(found[1, 1])
        assert np.isnan(found[2]).all()
        assert np.isfinite(found[np.ix_([0, 3], [0, 1, 3])]).all()

    def test_zero_gradients_are_left_out(self):
        """An example without a gradient belongs to no mean."""
        model, x, y, dead = with_zero_gradients()
        found = class_cosine_matrix(model, squared_hinge, (x, y), y)

        expected = self.means(cosine_matrix(model, squared_hinge, (x, y)).values, y, dead)
        np.testing.assert_allclose(found.values, expected, atol=FLOAT32)

    def test_gradients_of_1e_200(self):
        """Well fitted examples count like all others."""
        model, (x, y) = network(0), data(20)
        with torch.no_grad():
            model[-1].weight.zero_()
            model[-1].weight += 1e-3 * torch.randn_like(model[-1].weight)
            model[-1].bias.copy_(torch.tensor([500.0, 0.0, 0.0, 0.0]))
        y[:10] = 0
        norms = gradient_norms(model, "cross_entropy", (x, y)).values
        assert norms.min() < 1e-200

        found = class_cosine_matrix(model, "cross_entropy", (x, y), y)
        expected = self.means(cosines(model, (x, y)), y)
        np.testing.assert_allclose(found.values, expected, atol=FLOAT32)


def squared_hinge(outputs, targets):
    """Zero, with a gradient of zero, as soon as the target's output is at least 1."""
    return F.relu(1 - outputs.gather(1, targets.unsqueeze(1)).squeeze(1)).square()


def with_zero_gradients():
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    x, y = torch.randn(20, 3), torch.arange(20) % CLASSES
    with torch.no_grad():
        model[2].weight *= 4
        model[2].bias += 1
        dead = (squared_hinge(model(x), y) == 0).numpy()
    assert 3 < dead.sum() < 17
    return model, x, y, dead


class TestZeroGradients:
    def test_cosine_and_norm_are_zero(self):
        """A gradient of 0 has norm 0 and cosine 0 with all, itself included; no NaN, no 1."""
        model, x, y, dead = with_zero_gradients()
        found = cosine_matrix(model, squared_hinge, (x, y)).values
        norms = gradient_norms(model, squared_hinge, (x, y)).values

        assert (found[dead] == 0).all()
        assert (found[:, dead] == 0).all()
        assert abs(found.diagonal()[~dead] - 1).max() <= MOVED
        assert ((norms == 0) == dead).all()

    def test_a_dead_network(self):
        """Where every gradient is 0 the matrix is 0."""
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3, bias=False))
        with torch.no_grad():
            model[0].bias.fill_(-100.0)
        with pytest.warns(UserWarning, match="gradients of all examples are 0"):
            found = cosine_matrix(model, "cross_entropy", (torch.eye(3), torch.arange(3)))

        assert (found.values == 0).all()
        assert found.attrs["undecided_signs"] == 3


@pytest.mark.parametrize("parameters", [None, ["0.*"]])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [1e-25, 1e-15, 1e15, 1e25])
def test_the_size_of_activations_does_not_matter(size, bias, parameters):
    """A linear layer's inputs may be of any size that float32 holds, as in diverged networks."""
    model = nn.Sequential(nn.Linear(4, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3, bias=bias))
    x, y = torch.randn(12, 4) * size, torch.arange(12) % 3
    with torch.no_grad():
        model[0].weight /= size
    names = None if parameters is None else ["0.weight", "0.bias"][: 1 + bias]
    expected = reference.cosine_matrix(model, reference.cross_entropy, x, y, names)

    found = cosine_matrix(model, "cross_entropy", (x, y), parameters=parameters)
    assert abs(found.values - expected.numpy()).max() <= FLOAT32


@pytest.mark.filterwarnings("ignore:the loss gradients of all examples are 0")  # in float32
@pytest.mark.parametrize("weight", [1e-12, 1e-20])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_vanishing_gradients(weight, precision):
    """Where gradients vanish in float32 a cosine may lose its digits: then it is refused."""
    layers = [layer for _ in range(4) for layer in (nn.Linear(4, 4, bias=False), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(4, 3))
    with torch.no_grad():
        for p in model[:-1].parameters():
            p *= weight
    x, y = torch.randn(12, 4), torch.arange(12) % 3
    names = ["0.weight"]
    expected = reference.cosine_matrix(model, reference.cross_entropy, x, y, names)
    loses_all = (precision, weight) == ("float32", 1e-20)
    if loses_all:
        with pytest.raises(GradientError, match=r"error bound .* above the 0\.01"):
            cosine_matrix(model, "cross_entropy", (x, y), parameters=names)
    found = cosine_matrix(
        model,
        "cross_entropy",
        (x, y),
        parameters=names,
        precision=precision,
        allow_error=loses_all,
    )

    assert np.isfinite(found.values).all()
    if precision == "float64":
        assert abs(found.values - expected.numpy()).max() <= 5e-7


class TestWhatComesWithAMatrix:
    def test_labelled(self):
        """Dims, names, units, the parameters in play, the bound and the undecided pairs."""
        found = cosine_matrix(network(0), "cross_entropy", data(10))

        assert found.name == "cosine"
        assert found.dims == ("example", "other")
        assert found.dtype == np.float32
        assert found.attrs["units"] == "1"
        assert json.loads(found.attrs["parameters"]) == [
            name for name, _ in network(0).named_parameters()
        ]
        below = abs(found.values) < found.attrs["error_bound"]
        assert found.attrs["undecided_signs"] == np.triu(below, 1).sum()

    def test_gram_is_float64(self):
        """Products of norms of 1e-200 do not fit into float32."""
        found = gram_matrix(network(0), "cross_entropy", data(5))

        assert found.dims == ("example", "other")
        assert found.dtype == np.float64

    def test_gpu_settings_are_left_as_they_were(self):
        """TF32 is off during the work only."""
        before = torch.backends.cudnn.allow_tf32
        cosine_matrix(network(0), "cross_entropy", data(5))

        assert torch.backends.cudnn.allow_tf32 == before

    def test_the_same_call_gives_the_same_bits(self):
        """Nothing is drawn at random, and the caller's random state is left alone."""
        torch.manual_seed(7)
        first = cosines(network(1), data(20))
        state = torch.get_rng_state()
        second = cosines(network(1), data(20))

        assert (first == second).all()
        torch.manual_seed(1)
        model = network(1)
        state = torch.get_rng_state()
        cosines(model, data(20))
        assert torch.equal(torch.get_rng_state(), state)


class TestBadInput:
    def test_too_little_memory(self):
        """A budget that holds no block is refused with the size that is needed."""
        with pytest.raises(StudyError, match=r"memory.* too small"):
            cosine_matrix(network(0), "cross_entropy", data(10), memory=100)

    def test_unknown_precision(self):
        """The message lists the precisions that there are."""
        with pytest.raises(StudyError, match=r"'half'.*float32, float64"):
            cosine_matrix(network(0), "cross_entropy", data(10), precision="half")

    def test_as_many_targets_as_inputs(self):
        """Each example has one target; both numbers are in the message."""
        x, y = data(10)
        with pytest.raises(ModelError, match="10 inputs, but 9 targets"):
            cosine_matrix(network(0), "cross_entropy", (x, y[:9]))
        with pytest.raises(ModelError, match="10 inputs, but 9 targets"):
            cosine_matrix(network(0), "cross_entropy", data(5), (x, y[:9]))

    @pytest.mark.parametrize("n", [1, 2])
    def test_few_examples(self, n):
        """One or two are as good as many."""
        model, (x, y) = network(0), data(n)
        expected = reference.cosine_matrix(model, reference.cross_entropy, x, y).numpy()

        found = cosine_matrix(model, "cross_entropy", (x, y))
        assert abs(found.values - expected).max() <= FLOAT32

    def test_a_diverged_network(self):
        """Weights that are not finite are named as such, never computed with."""
        model = network(0)
        with torch.no_grad():
            model[-1].weight[0, 0] = torch.nan

        with pytest.raises(GradientError, match="outputs are not finite"):
            cosine_matrix(model, "cross_entropy", data(10))

    def test_an_input_that_is_not_finite(self):
        """One broken example is found."""
        x, y = data(10)
        x[7] = torch.inf

        with pytest.raises(GradientError, match=r"not finite"):
            cosine_matrix(network(0), "cross_entropy", (x, y))
