"""Products of float32, by torch's own routine and by that of oneDNN, against float64."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distributed_stiffness.gradients import cosine_matrix, precision
from distributed_stiffness.gradients.gram import Factors, folded_product
from distributed_stiffness.gradients.precision import (
    fast_float32,
    full_float32,
    leave_is_not_taken,
    onednn_multiplies,
    product_of_rows,
)

ON_CPU: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


@pytest.fixture(params=["torch", "oneDNN"])
def routine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whichever is best for this processor and the other one, if it multiplies in full here."""
    is_onednn = request.param == "oneDNN"
    if is_onednn and not leave_is_not_taken():
        pytest.skip("oneDNN rounds to bfloat16 on this processor where it may")
    monkeypatch.setattr(precision, "onednn_multiplies", lambda: is_onednn)
    return str(request.param)


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


@pytest.mark.parametrize("length", [0, 785, 3072, 12_288])
@pytest.mark.usefixtures("routine")
def test_of_factors_keep_their_digits_where_all_terms_are_alike(length: int) -> None:
    """
    As those of a picture's even background: a long sum of such rounds them all the same way.
    """
    generator = torch.Generator().manual_seed(0)
    brightness = 0.5 + torch.rand(40, 1, generator=generator)
    pictures = F.normalize(brightness + 0.05 * torch.rand(40, length, generator=generator))
    factors = Factors(pictures[:, None], torch.ones(40, 1, 1), torch.zeros(40, 1))

    with fast_float32():
        found = factors.gram(factors)

    expected = pictures.double() @ pictures.double().T
    torch.testing.assert_close(found.double(), expected, atol=5e-7, rtol=0)


@pytest.mark.parametrize("name", ["float32", "float64", "bf16"])
@pytest.mark.parametrize("length", [200, 785])
def test_of_factors_are_not_rounded_to_bfloat16(
    name: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Whichever processor would take the leave to do so: two roundings would multiply.
    """
    rounded: list[Tensor] = []
    product = precision._bf16_product

    def noted(X: Tensor, Y: Tensor) -> Tensor:
        rounded.append(X)
        return product(X, Y)

    monkeypatch.setattr(precision, "_bf16_product", noted)
    factors = Factors(unit_rows(8, length)[:, None], torch.ones(8, 1, 1), torch.zeros(8, 1))

    with fast_float32():
        factors.gram(factors, precision.precision_mode(name))

    assert rounded == []


@pytest.mark.parametrize("n", [1, 127, 128, 129, 513])
@pytest.mark.usefixtures("routine")
def test_of_rows_with_themselves_are_made_once_and_mirrored(n: int) -> None:
    """
    Of any number of rows, also where strips do not divide it.
    """
    X = unit_rows(n, 300)

    found = folded_product(X, X)

    assert torch.equal(found, found.T)
    torch.testing.assert_close(found.double(), X.double() @ X.double().T, atol=6e-7, rtol=0)


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


@pytest.mark.usefixtures("routine")
@pytest.mark.parametrize(
    "shape", [(7, 1, 3, 5), (24, 16, 1024, 48), (8, 64, 64, 576), (3, 33, 900, 27), (2, 512, 64, 1)]
)
@pytest.mark.parametrize("is_transposed", [False, True])
def test_of_many_small_matrices_are_right_too(
    shape: tuple[int, int, int, int], is_transposed: bool
) -> None:
    """
    As per-example gradients are made, of matrices however they lie.
    """
    n, p, length, d = shape
    D, A = unit_rows(n * p, length).reshape(n, p, length), torch.randn(n, length, d)
    if is_transposed:
        D = D.transpose(1, 2).contiguous().transpose(1, 2)

    with fast_float32():
        found = torch.bmm(D, A)

    torch.testing.assert_close(found.double(), D.double() @ A.double(), atol=3e-6, rtol=0)


@pytest.fixture
def tried_anew() -> Iterator[None]:
    yield
    onednn_multiplies.cache_clear()


@pytest.fixture
def allowed_bfloat16() -> Iterator[None]:
    before = ON_CPU.fp32_precision
    ON_CPU.fp32_precision = "bf16"
    yield
    ON_CPU.fp32_precision = before


@pytest.mark.usefixtures("routine", "allowed_bfloat16")
def test_in_full_float32_whatever_is_allowed_outside() -> None:
    """
    A user may have allowed bfloat16, which rounds to 4e-3; so it is again afterwards.
    """
    X = unit_rows(64, 512)

    for settings in (full_float32, fast_float32):
        with settings():
            inside = X @ X.T
        torch.testing.assert_close(inside.double(), X.double() @ X.double().T, atol=2e-6, rtol=0)
    assert ON_CPU.fp32_precision == "bf16"


def test_settings_last_until_the_last_thread_has_left() -> None:
    """
    Threads come and go in any order, and none takes the setting from under another.
    """
    before = ON_CPU.fp32_precision
    expected = "bf16" if onednn_multiplies() else "ieee"
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))
    seen = []

    def first() -> None:
        with fast_float32():
            first_is_in.set()
            second_is_in.wait(10)
        first_is_out.set()

    def second() -> None:
        first_is_in.wait(10)
        with fast_float32():
            seen.append(ON_CPU.fp32_precision)
            second_is_in.set()
            first_is_out.wait(10)
            seen.append(ON_CPU.fp32_precision)

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert seen == [expected] * 2
    assert ON_CPU.fp32_precision == before


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_f": True}, True),
        ({"cpu_name": "AMD EPYC", "avx512_f": True, "amx_bf16": True}, False),
        ({"cpu_name": "AMD EPYC", "avx512_f": False}, False),
        ({"cpu_name": "Intel Xeon", "avx512_f": True}, False),
        ({}, False),
    ],
)
@pytest.mark.usefixtures("tried_anew")
def test_onednn_multiplies_where_torch_is_slow_and_it_cannot_round(
    capabilities: dict[str, Any], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    On a processor that is not Intel's, with AVX-512, without AMX: and if it was tried.
    """
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    for is_full in (True, False):
        monkeypatch.setattr(precision, "leave_is_not_taken", lambda is_full=is_full: is_full)
        onednn_multiplies.cache_clear()
        assert onednn_multiplies() == (expected and is_full)


def test_a_setting_that_torch_refuses_leaves_the_others_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    They are changed together or not at all; and another try starts anew.
    """
    before, switched = torch.backends.cudnn.allow_tf32, precision._switched

    def refused(place: tuple[str, str], value: str) -> Any:
        if place == ("mkldnn", "matmul"):
            raise RuntimeError("mix of the legacy and new APIs")
        return switched(place, value)

    torch.backends.cudnn.allow_tf32 = True
    with monkeypatch.context() as refusing:
        refusing.setattr(precision, "_switched", refused)
        with pytest.raises(RuntimeError, match="mix"), full_float32():
            pass
    assert torch.backends.cudnn.allow_tf32
    with full_float32(), full_float32():
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    assert torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = before


def test_a_network_runs_by_torchs_own_routine() -> None:
    """
    It may ask torch what is set, and a fused kernel of attention is slow by another one.
    """

    class Asks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            asked.append((torch.get_float32_matmul_precision(), ON_CPU.fp32_precision))
            return super().forward(x)

    asked: list[tuple[str, str]] = []
    cosine_matrix(Asks(4, 3).eval(), "cross_entropy", (torch.randn(9, 4), torch.arange(9) % 3))

    assert {setting for _, setting in asked} <= {"ieee", ON_CPU.fp32_precision}
