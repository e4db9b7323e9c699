"""The loss and its gradient at the outputs, where networks fit their examples well and too well."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from distributed_stiffness.errors import GradientError, ModelError
from distributed_stiffness.gradients import cosine_matrix, gradient_norms, gram_matrix
from distributed_stiffness.gradients.loss_head import loss_head

# The double's last place, and a few operations.
EXACT = 1e-14


def many_digits(outputs, target):
    """Loss and softmax − one-hot of one example with 500 digits: (loss, direction, norm)."""
    with mpmath.workdps(500):
        e = [mpmath.exp(mpmath.mpf(float(z))) for z in outputs]
        delta = [x / mpmath.fsum(e) for x in e]
        delta[target] = -mpmath.fsum(x for k, x in enumerate(delta) if k != target)
        norm = mpmath.sqrt(mpmath.fsum(d * d for d in delta))
        loss = mpmath.log1p(mpmath.fsum(x for k, x in enumerate(e) if k != target) / e[target])
        return float(loss), [float(d / norm) for d in delta], float(norm)


def outputs_with(one_minus_p: float, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of a class each, whose 1 − p is about what is asked."""
    z = torch.randn(classes, classes, dtype=torch.float64)
    targets = torch.arange(classes)
    margin = reference.log_odds(z, targets) - math.log(one_minus_p)
    return z + F.one_hot(targets, classes) * margin.unsqueeze(1), targets


class TestCrossEntropy:
    @pytest.mark.parametrize("one_minus_p", [0.9, 1e-3, 1e-12, 1e-40, 1e-300])
    def test_against_many_digits(self, one_minus_p):
        """Loss, direction and scale are exact to the last digits, however well an example fits."""
        z, targets = outputs_with(one_minus_p)
        head = loss_head("cross_entropy", z, targets)

        for i in range(len(z)):
            loss, direction, norm = many_digits(z[i], int(targets[i]))
            # exp and log carry an error of their argument's size, up to 700 here.
            assert float(head.loss[i]) == pytest.approx(loss, rel=1e-12)
            assert float(head.scale[i]) == pytest.approx(norm, rel=1e-12)
            np.testing.assert_allclose(
                head.directions[0][i].numpy(), direction, rtol=1e-13, atol=1e-17
            )

    @given(
        st.lists(st.floats(-1e4, 1e4), min_size=2, max_size=6),
        st.integers(min_value=0, max_value=5),
    )
    def test_the_direction_has_unit_length_whatever_the_outputs(self, outputs, target):
        """No outputs overflow or underflow: the direction is a unit vector."""
        z, y = torch.tensor([outputs], dtype=torch.float64), torch.tensor([target % len(outputs)])
        head = loss_head("cross_entropy", z, y)

        assert float(head.directions[0].norm()) == pytest.approx(1, abs=EXACT)
        assert float(head.directions[0].sum()) == pytest.approx(0, abs=EXACT)
        assert head.directions[0][0, y].item() < 0
        assert head.loss.item() >= 0
        assert 0 < head.scale.item() <= math.sqrt(2)

    def test_correct(self):
        """An example is right where its target has the largest output."""
        head = loss_head("cross_entropy", torch.eye(3)[[0, 1, 1]], torch.tensor([0, 1, 2]))

        assert head.correct.tolist() == [True, True, False]

    def test_keeps_the_dtype_of_the_outputs(self):
        """The direction goes backward in the network's own precision; the rest is float64."""
        head = loss_head("cross_entropy", torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))

        assert head.directions[0].dtype == torch.float32
        assert head.loss.dtype == head.scale.dtype == torch.float64

    def test_a_single_output_is_no_class(self):
        """With one class the loss is 0 whatever the output: another loss was meant."""
        with pytest.raises(ModelError, match=r"1 output.*binary_cross_entropy_with_logits"):
            loss_head("cross_entropy", torch.randn(3, 1), torch.zeros(3, dtype=torch.int64))


class TestAnyLoss:
    @given(st.floats(-190, 150))
    def test_direction_and_scale_of_any_size(self, power):
        """Gradients of 1e-190 or 1e150 have a unit direction: their squares are never made."""

        def loss(outputs, targets):
            return 10.0**power * (outputs - targets).square().sum(1)

        z, targets = torch.tensor([[3.0, 0.0, 4.0]]), torch.zeros(1, 3)
        head = loss_head(loss, z, targets)

        torch.testing.assert_close(head.directions[0], torch.tensor([[0.6, 0.0, 0.8]]))
        assert head.scale.item() == pytest.approx(10 * 10.0**power, rel=1e-12)

    def test_one_output_an_example(self):
        """Outputs (N,), as of a regression, have one direction."""
        head = loss_head(lambda z, t: (z - t).square(), torch.tensor([3.0, 1.0]), torch.ones(2))

        assert head.directions[0].tolist() == [1.0, 0.0]
        assert head.scale.tolist() == [4.0, 0.0]

    def test_a_gradient_of_zero_stays_zero(self):
        """Nothing is divided by a norm of 0."""
        z = torch.ones(2, 3)
        head = loss_head(lambda z, t: (z - t).square().sum(1), z, torch.ones(2, 3))

        assert (head.scale == 0).all()
        assert (head.directions[0] == 0).all()


class TestBadInput:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_outputs_that_are_not_finite(self, value):
        """The message counts the examples with an output that is not finite."""
        z = torch.zeros(3, 2)
        z[1, 0] = value

        with pytest.raises(GradientError, match="not finite for 1 of 3 examples"):
            loss_head("cross_entropy", z, torch.tensor([0, 1, 0]))

    def test_losses_that_are_not_finite(self):
        """A loss that is not finite is refused, and counted."""
        with pytest.raises(GradientError, match="loss of 2 examples is not finite"):
            loss_head(
                lambda z, _: z.log().sum(1), torch.tensor([[-1.0], [1.0], [0.0]]), torch.ones(3)
            )

    @pytest.mark.filterwarnings("ignore:.*anomaly")
    def test_gradients_that_are_not_finite(self):
        """A loss may be finite where its gradient is not: √x at 0. NaN is not taken for 0."""
        with pytest.raises(GradientError, match=r"1 examples? .*not finite"):
            loss_head(lambda z, _: z.sqrt().sum(1), torch.tensor([[0.0], [1.0]]), torch.ones(2))

    @pytest.mark.parametrize(
        ("outputs", "targets"), [((4, 3, 2), (4,)), ((4,), (4,)), ((4, 3), (4, 3)), ((4, 3), (5,))]
    )
    def test_shapes_that_do_not_fit(self, outputs, targets):
        """The message holds both shapes."""
        with pytest.raises(ModelError) as error:
            loss_head(
                "cross_entropy", torch.zeros(outputs), torch.zeros(targets, dtype=torch.int64)
            )

        assert str(outputs) in str(error.value)
        assert str(targets) in str(error.value)

    @pytest.mark.parametrize("label", [3, -1, -100])
    def test_labels_without_an_output(self, label):
        """The message holds the label and the number of outputs."""
        with pytest.raises(ModelError, match=f"3 outputs.*{label}"):
            loss_head("cross_entropy", torch.zeros(2, 3), torch.tensor([0, label]))

    def test_labels_that_are_no_integers(self):
        """Class numbers are integers; the message says what came."""
        with pytest.raises(ModelError, match="float"):
            loss_head("cross_entropy", torch.zeros(2, 3), torch.tensor([0.0, 1.0]))

    def test_a_loss_that_is_one_number(self):
        """A mean over the batch is refused with a hint at reduction='none'."""
        with pytest.raises(ModelError, match=r"\(\) for 2 examples.*reduction='none'"):
            loss_head(F.cross_entropy, torch.zeros(2, 3), torch.tensor([0, 1]))

    def test_an_unknown_loss(self):
        """The message names it."""
        with pytest.raises(ModelError, match="'hinge'"):
            loss_head("hinge", torch.zeros(2, 3), torch.tensor([0, 1]))

    def test_a_network_that_returns_no_tensor(self):
        """The message names what it returned."""

        class Pair(nn.Linear):
            def forward(self, x):
                return super().forward(x), x

        with pytest.raises(ModelError, match="tuple"):
            cosine_matrix(
                Pair(2, 2), "cross_entropy", (torch.eye(3, 2), torch.zeros(3, dtype=torch.int64))
            )

    def test_a_network_that_loses_the_examples(self):
        """The message holds the shape that came."""

        class Mean(nn.Linear):
            def forward(self, x):
                return super().forward(x).mean(0)

        with pytest.raises(ModelError, match=r"\(5,\).*expected N first"):
            cosine_matrix(
                Mean(4, 5), "cross_entropy", (torch.eye(4), torch.zeros(4, dtype=torch.int64))
            )


def saturated(scale: float) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Return a network that fits 40 examples; its outputs times `scale`."""
    n, classes = 40, 4
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, classes))
    x, y = torch.randn(n, 6), torch.arange(n) % classes
    optimizer = torch.optim.Adam(model.parameters(), 3e-2)
    for _ in range(300):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        model[2].weight *= scale
        model[2].bias *= scale
    return model, x, y


def plain_float32_cosines(model, x, y):
    """What autograd and F.cross_entropy give in float32."""
    rows = []
    for i in range(len(y)):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    return reference.cosine(torch.stack(rows))


class TestOverfittedNetwork:
    """Networks that fit their examples far beyond float32's 1 − p."""

    @pytest.mark.parametrize("scale", [3.0, 10.0, 60.0])
    def test_no_sign_is_wrong(self, scale):
        """Plain float32 gets signs wrong there; the float64 head gets none wrong."""
        model, x, y = saturated(scale)
        truth = reference.cosine_matrix(model, reference.log_odds, x, y)
        clear = truth.abs() > 1e-6
        plain = plain_float32_cosines(model, x, y)
        found = cosine_matrix(model, "cross_entropy", (x, y), precision="float64")
        ours = torch.from_numpy(found.values)

        assert (plain.sign() != truth.sign())[clear].float().mean() > 0.05
        assert (ours.sign() == truth.sign())[clear].all()
        assert (ours - truth).abs().max() <= 5e-7

    @pytest.mark.parametrize("scale", [3.0, 10.0, 60.0])
    def test_float32_is_within_its_bound(self, scale):
        """With a float32 network the bound says what is left, and signs beyond it are right."""
        model, x, y = saturated(scale)
        truth = reference.cosine_matrix(model, reference.log_odds, x, y)
        found = cosine_matrix(model, "cross_entropy", (x, y))
        ours, bound = torch.from_numpy(found.values), found.attrs["error_bound"]

        assert (ours - truth).abs().max() <= bound <= 1e-3
        assert (ours.sign() == truth.sign())[truth.abs() > bound].all()

    def test_norms_keep_their_true_scale(self):
        """‖g‖ is that of the loss itself, down to where float64 ends."""
        model, x, y = saturated(60.0)
        odds = reference.flat(reference.per_example_gradients(model, reference.log_odds, x, y))
        z = model.double()(x.double())
        expected = (torch.sigmoid(reference.log_odds(z, y)) * odds.norm(dim=1)).detach().numpy()
        found = gradient_norms(model, "cross_entropy", (x, y), precision="float64").values
        held = expected > 1e-300

        assert expected[held].min() < 1e-200
        np.testing.assert_allclose(found[held], expected[held], rtol=1e-6)

    def test_gradients_that_float64_cannot_hold(self):
        """Where 1 − p is below 1e-308 cosines are still right, and no norm is 0."""
        model, x, y = saturated(600.0)
        truth = reference.cosine_matrix(model, reference.log_odds, x, y)
        found = cosine_matrix(model, "cross_entropy", (x, y), precision="float64")
        norms = gradient_norms(model, "cross_entropy", (x, y), precision="float64")

        assert reference.log_odds(model(x), y).min() < -800
        assert abs(found.values - truth.numpy()).max() <= 5e-7
        assert found.attrs["error_bound"] <= 2e-6
        assert (norms.values > 0).all()
        assert np.isfinite(gram_matrix(model, "cross_entropy", (x, y)).values).all()


def test_a_loss_that_cannot_be_differentiated_is_refused_in_a_sentence():
    """Here activations that are made again, with a cast, come out in another precision."""

    def loss(outputs, targets):
        def run(z):
            return F.cross_entropy(z.float(), targets, reduction="none")

        return checkpoint(run, outputs, use_reentrant=False)

    with pytest.raises(GradientError, match="the loss's backward pass does not run: Checkpoint"):
        cosine_matrix(nn.Linear(4, 3), loss, (torch.randn(9, 4), torch.arange(9) % 3))
