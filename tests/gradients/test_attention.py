"""Attention over short sequences: another routine, the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distributed_stiffness.gradients import attention
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


@pytest.mark.parametrize(("length", "expected"), [(16, "Math"), (300, "Flash")])
def test_plain_formula_for_short_sequences_alone(
    length: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Long ones keep torch's fused kernel, which makes no T² numbers. Also in torch's own module.
    """
    monkeypatch.setattr(attention, "onednn_multiplies", lambda: True)
    chosen = []
    kernel = attention.sdpa_kernel

    def noted(backend: attention.SDPBackend) -> object:
        chosen.append(backend)
        return kernel(backend)

    monkeypatch.setattr(attention, "sdpa_kernel", noted)
    with ShortAttention():
        x = torch.randn(2, 4, length, 8)
        F.scaled_dot_product_attention(x, x, value=x)

    assert bool(chosen) == (expected == "Math")


def test_multi_head_attention_keeps_its_gradients() -> None:
    """
    Queries, keys and values by name or by place, with a mask.
    """
    torch.manual_seed(0)
    module = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x, mask = torch.randn(3, 7, 16, requires_grad=True), torch.ones(7, 7).triu(1).bool()

    with ShortAttention():
        found, _ = module(x, x, x, attn_mask=mask, need_weights=False)
    plain, _ = module(x, x, x, attn_mask=mask, need_weights=False)

    for one, other in zip(
        torch.autograd.grad(found.sum(), (x, *module.parameters()), retain_graph=True),
        torch.autograd.grad(plain.sum(), (x, *module.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
