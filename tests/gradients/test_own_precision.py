"""A loss that runs the network itself is differentiated in float32, of which users are warned."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import cosine_matrix as true_cosines
from reference import cross_entropy as true_loss
from torch import Tensor, nn

from distributed_stiffness import WholeLoss, cosine_matrix, explain
from distributed_stiffness.gradients import (
    class_cosine_matrix,
    gradient_norms,
    gram_matrix,
    layer_cosines,
)

PUBLIC: list[Callable[..., Any]] = [cosine_matrix, gram_matrix, gradient_norms, layer_cosines]


def well_fitted() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A network whose outputs leave every example a 1 − p of 1e-9 or so, and forty examples."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=generator)
    x = torch.randn(40, 6, generator=generator)
    y = model(x).argmax(1)
    odds = torch.topk(model(x), 2).values
    with torch.no_grad():
        for parameter in model[2].parameters():
            parameter *= 20 / float((odds[:, 0] - odds[:, 1]).median())
    return model.eval(), (x, y)


def own_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy as a network would return it."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def apart(outputs: Tensor, targets: Tensor) -> Tensor:
    """The same of outputs and targets."""
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


class TestWarning:
    @pytest.mark.parametrize("function", PUBLIC, ids=lambda f: f.__name__)
    def test_it_says_what_may_go_wrong_and_how_to_have_it_right(
        self, function: Callable[..., Any]
    ) -> None:
        """
        Signs may be noise; a loss of (outputs, targets), or float64, is the way out. It points at
        the caller's own line.
        """
        model, examples = well_fitted()

        with pytest.warns(UserWarning, match="WholeLoss") as caught:
            function(model, WholeLoss(own_loss), examples, allow_error=True)

        (said,) = caught
        for words in ("signs and cosines may be noise", "(outputs, targets) -> (N,)", "float64"):
            assert words in str(said.message)
        assert said.filename == __file__

    def test_nothing_is_said_where_nothing_can_go_wrong(self) -> None:
        """
        Not of a loss that is given apart, nor with float64, in which class means are made anyway.
        """
        model, examples = well_fitted()

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cosine_matrix(model, "cross_entropy", examples)
            cosine_matrix(model, apart, examples)
            cosine_matrix(model, WholeLoss(own_loss), examples, precision="float64")
            class_cosine_matrix(model, WholeLoss(own_loss), examples)

    @pytest.mark.filterwarnings("ignore:a WholeLoss")
    def test_what_it_warns_of_happens_and_the_way_out_is_one(self) -> None:
        """
        Of well-fitted examples a WholeLoss gets cosines wrong; the same loss given apart, and
        float64, get them right.
        """
        model, examples = well_fitted()
        truth = true_cosines(model, true_loss, *examples).numpy()

        def worst(loss: Any, **options: str) -> float:
            found = cosine_matrix(model, loss, examples, check=False, **options)  # type: ignore[arg-type]
            return float(abs(found.values - truth).max())

        assert worst(WholeLoss(own_loss)) > 0.01
        assert worst(apart) < 1e-4
        assert worst(WholeLoss(own_loss), precision="float64") < 1e-4


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ("cross_entropy", "cross_entropy, in float64 and with every example scaled"),
        (apart, "apart, in float64 and with every example scaled"),
        (WholeLoss(own_loss), "own precision, unscaled.*give a loss of \\(outputs, targets\\)"),
    ],
    ids=["named", "a function", "whole"],
)
def test_explain_says_which_head_a_loss_has(loss: Any, said: str) -> None:
    """Whether the loss is differentiated in float64, with every example scaled."""
    model, examples = well_fitted()

    found = explain(model, loss, examples)

    assert re.search(said, found.loss_head)
    assert found.loss_head in str(found)
