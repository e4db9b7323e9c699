"""What a notebook user may hand over by mistake."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distributed_stiffness import cosine_matrix
from distributed_stiffness.errors import ModelError


@pytest.mark.parametrize(
    ("examples", "said"),
    [
        ((np.zeros((5, 3)), torch.zeros(5, dtype=torch.long)), r"numpy\.ndarray.*from_numpy"),
        ((torch.zeros(5, 3), np.zeros(5)), r"numpy\.ndarray.*from_numpy"),
        (torch.zeros(5, 3), r"Tensor.*\(inputs, targets\)"),
        ({"x": torch.zeros(5, 3)}, r"dict.*\(inputs, targets\)"),
        (torch.utils.data.TensorDataset(torch.zeros(5, 3)), r"\(inputs, targets\)"),
        ((torch.zeros(5, 3), torch.zeros(4, dtype=torch.long)), r"5 inputs, but 4 targets"),
    ],
)
def test_examples_of_a_wrong_kind(examples, said):
    """The message says what came and what is expected."""
    with pytest.raises(ModelError, match=said):
        cosine_matrix(torch.nn.Linear(3, 2).eval(), "cross_entropy", examples)
