"""Products of rows, by torch's own routine and by that of oneDNN, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from distributed_stiffness.gradients import precision
from distributed_stiffness.gradients.gram import folded_product
from distributed_stiffness.gradients.precision import onednn_product, product_of_rows


@pytest.fixture(params=["torch", "oneDNN"])
def routine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Whichever is best for this processor and the other one, if torch was built with it."""
    chosen = None
    if request.param == "oneDNN":
        if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            pytest.skip("this torch was built without oneDNN")
        onednn_product.cache_clear()
        monkeypatch.setattr(
            torch.cpu,
            "get_capabilities",
            lambda: {"cpu_name": "Another", "avx512_f": True},
            raising=False,
        )
        chosen = onednn_product()
        assert chosen is not None
    monkeypatch.setattr(precision, "onednn_product", lambda: chosen)
    yield request.param
    onednn_product.cache_clear()


def unit_rows(n: int, length: int, common: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(n + length)
    rows = torch.randn(n, length, generator=generator)
    rows += common * torch.randn(length, generator=generator)
    return F.normalize(rows)


@pytest.mark.parametrize("length", [1, 63, 785, 20_000, 150_000])
@pytest.mark.parametrize("common", [0.0, 3.0])
@pytest.mark.usefixtures("routine")
def test_are_right_to_a_few_units_in_the_last_place(length: int, common: float) -> None:
    """
    Of rows of any length, unlike each other or much alike.
    """
    X, Y = unit_rows(40, length, common), unit_rows(24, length, common)

    found = folded_product(X, Y)

    torch.testing.assert_close(found.double(), X.double() @ Y.double().T, atol=6e-7, rtol=0)


@pytest.mark.usefixtures("routine")
def test_do_not_depend_on_how_rows_lie() -> None:
    """
    Rows may be part of longer ones, or every other of more.
    """
    whole = torch.randn(60, 900)
    X, Y = whole[::2, 100:400], whole[1::2, 300:600]

    found = product_of_rows(X, Y)

    assert torch.equal(found, product_of_rows(X.contiguous(), Y.contiguous()))


@pytest.mark.usefixtures("routine")
@pytest.mark.parametrize(("n", "m", "length"), [(0, 3, 4), (3, 0, 4), (3, 2, 0)])
def test_of_nothing_are_zeros(n: int, m: int, length: int) -> None:
    """
    No rows, no columns, or rows without a number.
    """
    found = product_of_rows(torch.ones(n, length), torch.ones(m, length))

    assert torch.equal(found, torch.zeros(n, m))


@pytest.mark.usefixtures("routine")
def test_what_is_not_finite_stays_so() -> None:
    """
    A gradient that overflowed must not come out as a number.
    """
    X = torch.tensor([[torch.nan, 1.0], [torch.inf, 1.0], [1.0, 2.0]])

    found = product_of_rows(X, torch.ones(1, 2))[:, 0]

    assert found[:1].isnan().all()
    assert found[1:].tolist() == [torch.inf, 3.0]
