"""Attention over short sequences: another routine, the same numbers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distributed_stiffness.gradients import attention, cosine_matrix
from distributed_stiffness.gradients.attention import ShortAttention


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", [5, 300])
def test_is_what_torch_makes_of_it(
    length: int, is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Outputs and gradients, of short sequences and of long ones.
    """
    monkeypatch.setattr(attention, "onednn_multiplies", lambda: True)
    query, key, value = (
        torch.randn(2, 3, length, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)
    )
    inputs = tuple(t.float().detach().requires_grad_() for t in (query, key, value))

    with ShortAttention():
        found = F.scaled_dot_product_attention(*inputs, is_causal=is_causal)
    gradients = torch.autograd.grad(found.square().sum(), inputs)

    true = F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)
    true_gradients = torch.autograd.grad(true.square().sum(), (query, key, value))
    torch.testing.assert_close(found.double(), true, atol=2e-6, rtol=0)
    for one, exact in zip(gradients, true_gradients, strict=True):
        torch.testing.assert_close(one.double(), exact, atol=1e-5, rtol=0)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths for which the plain formula was taken."""
    monkeypatch.setattr(attention, "onednn_multiplies", lambda: True)
    plain, lengths = attention._plain, []
    assert plain is not None

    def noted(query: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        lengths.append(query.shape[-2])
        return plain(query, *args, **kwargs)

    monkeypatch.setattr(attention, "_plain", noted)
    return lengths


@pytest.mark.parametrize(
    ("length", "width", "is_plain"), [(16, 8, True), (300, 64, False), (100, 8, False)]
)
def test_plain_formula_for_short_sequences_alone(
    length: int, width: int, is_plain: bool, asked: list[int]
) -> None:
    """
    Long ones, and narrow ones, keep torch's fused kernel, which makes no T² numbers.
    """
    x = torch.randn(2, 4, length, width)

    with ShortAttention():
        F.scaled_dot_product_attention(x, x, value=x)

    assert asked == [length] * is_plain


class Classifier(nn.Module):
    """torch's own attention with a mask, and a linear layer on the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(7, 7).triu(1).bool()
        mixed, _ = self.attention(x, x, x, attn_mask=mask, need_weights=False)
        return self.last(mixed.mean(1))


def test_gradients_of_torchs_own_module(asked: list[int]) -> None:
    """
    Cosines are those of float64, and the plain formula has made them.
    """
    torch.manual_seed(0)
    model, x, y = Classifier().eval(), torch.randn(9, 7, 16), torch.arange(9) % 3

    found = cosine_matrix(model, "cross_entropy", (x, y), check=False)
    assert set(asked) == {7}
    exact = cosine_matrix(model, "cross_entropy", (x, y), precision="float64", check=False)

    np.testing.assert_allclose(found, exact, atol=2e-6)


def test_no_setting_of_the_process_is_changed(asked: list[int]) -> None:
    """
    Threads that are inside at once leave torch's kernels as they were.
    """
    x = torch.randn(8, 4, 64, 32)

    def work(_: int) -> None:
        with ShortAttention():
            F.scaled_dot_product_attention(x, x, x)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(40)))

    assert asked == [64] * 40
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()
