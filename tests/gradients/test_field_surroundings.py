"""What a caller has switched on around a call, and how few examples may come.

Axis letters: N examples, d features.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from field_truth import (
    FEATURES,
    assert_cosines,
    one_at_a_time_at_most,
    right_or_said,
    true_cosines,
    true_rows,
)
from torch import Tensor, nn
from torch.nn import functional as F

from distributed_stiffness import (
    WholeLoss,
    class_cosine_matrix,
    cosine_matrix,
    explain,
    gradient_norms,
    gram_matrix,
    layer_cosines,
)

N = 36
LABELS = torch.arange(N) % 3
FUNCTIONS = [cosine_matrix, gram_matrix, layer_cosines, gradient_norms, class_cosine_matrix]
functions = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
either_way = pytest.mark.parametrize("check", [True, False])


class Usual(nn.Module):
    """Convolution, norm, embedding and layers: what makes tensors of its own on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.n = nn.Conv1d(1, 3, 3), nn.BatchNorm1d(3)
        self.e, self.l = nn.Embedding(5, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.n(self.c(x[:, None])).relu().flatten(1)
        at = torch.arange(len(x), device=x.device) * 0 + (x[:, 0] > 0).long()
        return self.l(h * self.e(at))


def data(n: int = N) -> tuple[Tensor, Tensor]:
    return torch.randn(n, FEATURES), torch.arange(n) % 3


def own(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """A loss that runs the network."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def norms_agree(got: Any, rows: Tensor) -> None:
    np.testing.assert_allclose(got.values, rows.norm(dim=1), rtol=1e-5, atol=1e-12)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
        assert torch.get_default_device() == torch.device(device)
    finally:
        torch.set_default_device(None)


class TestDefaultType:
    @either_way
    @pytest.mark.parametrize("default", [torch.float64, torch.float16, torch.bfloat16])
    def test_a_network_of_float32(self, default, check):
        """Made before the default was changed."""
        net, (x, y) = Usual().eval(), data()
        true = true_cosines(net, x, y)
        with default_dtype(default), one_at_a_time_at_most():
            got = cosine_matrix(net, "cross_entropy", (x, y), check=check)
        assert_cosines(got, true)

    @either_way
    @pytest.mark.parametrize("precision", ["float32", "float64"])
    def test_a_network_of_float64(self, precision, check):
        """Made after it, as GPyTorch, e3nn and many codes of physics do."""
        with default_dtype(torch.float64), one_at_a_time_at_most():
            net, (x, y) = Usual().eval(), data()
            assert x.dtype == torch.float64
            true = true_cosines(net, x, y)
            got = cosine_matrix(net, "cross_entropy", (x, y), check=check, precision=precision)
            assert_cosines(got, true)

    @functions
    @pytest.mark.parametrize("made", [torch.float32, torch.float64])
    def test_every_function(self, function, made):
        """The same as under the usual default."""
        net, (x, y) = Usual().to(made).eval(), data()
        x = x.to(made)
        usual = function(net, "cross_entropy", (x, y)).values
        with default_dtype(torch.float64), one_at_a_time_at_most():
            got = function(net, "cross_entropy", (x, y)).values
        np.testing.assert_allclose(got, usual, rtol=1e-5, atol=1e-6)

    def test_a_loss_that_runs_the_network(self):
        """With a WholeLoss too."""
        with default_dtype(torch.float64), one_at_a_time_at_most("WholeLoss"):
            net, (x, y) = Usual().eval(), data()
            got = cosine_matrix(net, WholeLoss(own), (x, y))
            assert_cosines(got, true_cosines(net, x, y))

    def test_a_network_of_float64_under_the_usual_default(self):
        """Network and features in double precision, nothing switched."""
        net, (x, y) = Usual().double().eval(), data()
        with one_at_a_time_at_most():
            got = cosine_matrix(net, "cross_entropy", (x.double(), y))
            assert_cosines(got, true_cosines(net, x, y))


class TestDefaultDevice:
    @functions
    def test_meta(self, function):
        """A default device without numbers, around a call on a network that has them."""
        net, (x, y) = Usual().eval(), data()
        usual = function(net, "cross_entropy", (x, y)).values
        with default_device("meta"), one_at_a_time_at_most():
            got = function(net, "cross_entropy", (x, y)).values
        np.testing.assert_allclose(got, usual, rtol=1e-5, atol=1e-6)

    def test_others_and_a_context(self):
        """`with torch.device`, and columns apart."""
        net, (x, y) = Usual().eval(), data()
        true = true_cosines(net, x, y)
        with torch.device("meta"), one_at_a_time_at_most():
            got = cosine_matrix(net, "cross_entropy", (x[:7], y[:7]), others=(x, y))
        assert_cosines(got, true[:7])


AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True),
    "saved on the CPU": torch.autograd.graph.save_on_cpu,
    "deterministic": lambda: deterministic(),
    "no views of graphs": lambda: torch.autograd.set_multithreading_enabled(False),
}


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


class TestModesOfAutograd:
    @pytest.mark.filterwarnings("ignore:Anomaly Detection")
    @pytest.mark.parametrize(
        ("name", "function"),
        [(name, cosine_matrix) for name in AROUND]
        + [(name, f) for name in ("no_grad", "inference_mode") for f in FUNCTIONS[1:]],
    )
    def test_around_the_call(self, name, function):
        """A call switches on what it needs, and leaves what was."""
        net, (x, y) = Usual().eval(), data()
        usual = function(net, "cross_entropy", (x, y)).values
        with AROUND[name](), one_at_a_time_at_most("Anomaly Detection"):
            modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            got = function(net, "cross_entropy", (x, y)).values
            assert modes == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        np.testing.assert_allclose(got, usual, rtol=1e-5, atol=1e-6)

    def test_gradients_switched_off_for_good(self):
        """`set_grad_enabled(False)` at the top of a notebook."""
        net, (x, y) = Usual().eval(), data()
        true = true_cosines(net, x, y)
        torch.set_grad_enabled(False)
        try:
            with one_at_a_time_at_most():
                got = cosine_matrix(net, "cross_entropy", (x, y))
            assert not torch.is_grad_enabled()
        finally:
            torch.set_grad_enabled(True)
        assert_cosines(got, true)

    @functions
    @either_way
    def test_inputs_made_in_inference_mode(self, function, check):
        """Features of a frozen backbone, cached."""
        net, (x, y) = Usual().eval(), data()
        usual = function(net, "cross_entropy", (x, y)).values
        with torch.inference_mode():
            cached, labels = x * 1, y * 1
        keywords = {} if function is class_cosine_matrix else {"check": check}
        with one_at_a_time_at_most():
            got = function(net, "cross_entropy", (cached, labels), **keywords).values
        np.testing.assert_allclose(got, usual, rtol=1e-5, atol=1e-6)

    def test_others_made_in_inference_mode(self):
        """Columns too, and a tuple of inputs."""
        net, (x, y) = Usual().eval(), data()
        with torch.inference_mode():
            cached = x * 1
        with one_at_a_time_at_most():
            got = cosine_matrix(net, "cross_entropy", ((x,), y), others=((cached,), y))
            assert_cosines(got, true_cosines(net, x, y))

    def test_a_network_made_in_inference_mode(self):
        """Its parameters cannot be differentiated in place: right, or refused by that name."""
        (x, y), usual = data(), Usual().eval()
        with torch.inference_mode():
            net = Usual().eval()
            for p, q in zip(net.state_dict().values(), usual.state_dict().values(), strict=True):
                p.copy_(q)
        with one_at_a_time_at_most():
            got, said = right_or_said(lambda: cosine_matrix(net, "cross_entropy", (x, y)))
            if got is None:
                assert "inference" in said
            else:
                assert_cosines(got, true_cosines(usual, x, y))


# Precision switches: each in a process of its own, since some cannot be set back.

SWITCHES = [
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "torch.backends.cuda.matmul.allow_tf32 = False",
    "torch.backends.cudnn.allow_tf32 = False",
    "torch.set_float32_matmul_precision('medium')",
    "torch.set_float32_matmul_precision('high')",
    "torch.set_float32_matmul_precision('highest')",
    "torch.backends.fp32_precision = 'ieee'",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.cudnn.fp32_precision = 'ieee'",
    "torch.backends.cudnn.fp32_precision = 'tf32'",
    "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
    "torch.backends.cudnn.conv.fp32_precision = 'tf32'",
    "torch.backends.cudnn.rnn.fp32_precision = 'ieee'",
    "torch.backends.mkldnn.fp32_precision = 'bf16'",
    "torch.backends.mkldnn.matmul.fp32_precision = 'ieee'",
    "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "torch.backends.mkldnn.matmul.fp32_precision = 'tf32'",
    "torch.backends.mkldnn.conv.fp32_precision = 'bf16'",
    "torch.backends.mkldnn.rnn.fp32_precision = 'bf16'",
    "torch.backends.fp32_precision = 'tf32'; torch.backends.cudnn.conv.fp32_precision = 'ieee'",
    "torch.set_float32_matmul_precision('medium'); torch.backends.fp32_precision = 'ieee'",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'; torch.backends.cudnn.allow_tf32 = True",
    "torch.backends.mkldnn.enabled = False",
]
PRECISIONS = ["float32", "bf16"]
SCRIPT = """
    import json, os, sys, warnings
    import torch
    torch.set_num_threads(1)
    from torch import nn
    from distributed_stiffness import cosine_matrix
    from field_truth import true_cosines

    def state():
        found = {}
        new = ("", "cuda.matmul.", "cudnn.", "cudnn.conv.", "cudnn.rnn.", "mkldnn.",
               "mkldnn.matmul.", "mkldnn.conv.", "mkldnn.rnn.")
        names = ["torch.backends." + n + "fp32_precision" for n in new]
        names += ["torch.backends.cuda.matmul.allow_tf32", "torch.backends.cudnn.allow_tf32",
                  "torch.get_float32_matmul_precision()", "torch.backends.mkldnn.enabled"]
        for name in names:
            try:
                found[name] = eval(name)
            except Exception as error:
                found[name] = type(error).__name__
        return found

    def tried(switch):
        before = None
        try:
            exec(switch)
            before = state()
            off = {}
            for precision in %r:
                got = cosine_matrix(net, "cross_entropy", (x, y), precision=precision)
                off[precision] = float((torch.tensor(got.values) - true).abs().max())
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}", "before": before}
        return {"off": off, "before": before, "after": state()}

    warnings.simplefilter("error")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Unflatten(1, (1, 12)), nn.Conv1d(1, 3, 3), nn.ReLU(), nn.Flatten(),
                        nn.Linear(30, 24), nn.Tanh(), nn.Linear(24, 3)).eval()
    x, y = torch.randn(36, 12), torch.arange(36) %% 3
    true = true_cosines(net, x, y)
    for precision in %r:  # what is made once is made before
        cosine_matrix(net, "cross_entropy", (x, y), precision=precision)
    found = {}
    for switch in json.loads(sys.argv[1]):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.write(write, json.dumps(tried(switch)).encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            found[switch] = json.load(pipe)
        os.waitpid(child, 0)
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def switched() -> dict[str, Any]:
    """Switch -> what a call said under it, and the switches before and after."""
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), *sys.path]
    ran = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(SCRIPT % (PRECISIONS, PRECISIONS)),
            json.dumps(SWITCHES),
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("switch", SWITCHES)
class TestPrecisionSwitches:
    def test_numbers(self, switched, switch):
        """What was asked for is what is computed, whatever the user has set before."""
        said = switched[switch]
        assert "error" not in said, said["error"]
        for precision, off in said["off"].items():
            assert off <= (1e-2 if precision == "bf16" else 1e-5), precision

    def test_they_stay_as_they_were(self, switched, switch):
        """Each switch reads afterwards as before, those that torch refuses to read too."""
        said = switched[switch]
        assert "error" not in said, said["error"]
        assert said["after"] == said["before"]


class TestFewExamples:
    @pytest.mark.parametrize("n", [1, 2])
    @functions
    @either_way
    def test_one_and_two(self, n, function, check):
        """A matrix of one, and of two."""
        net, (x, y) = Usual().eval(), data(n)
        rows, cosine = true_rows(net, x, y), true_cosines(net, x, y)
        keywords = {} if function is class_cosine_matrix else {"check": check}
        with one_at_a_time_at_most():
            got = function(net, "cross_entropy", (x, y), **keywords)
        if function is cosine_matrix:
            assert_cosines(got, cosine)
        elif function is gram_matrix:
            np.testing.assert_allclose(got.values, rows @ rows.T, rtol=1e-4, atol=1e-6)
        elif function is gradient_norms:
            norms_agree(got, rows)
        elif function is layer_cosines:
            assert got.shape[1:] == (n, n)
            last = F.normalize(rows[:, -39:])
            assert_cosines(got.sel(parameter_group="l"), last @ last.T)
        else:
            expected = np.full((n, n), np.nan)
            if n == 2:
                expected[0, 1] = expected[1, 0] = cosine[0, 1]
            np.testing.assert_allclose(got.values, expected, atol=1e-6)

    @pytest.mark.parametrize("n", [1, 2])
    def test_explain(self, n):
        """What it would cost is said of one example too."""
        net, examples = Usual().eval(), data(n)
        with one_at_a_time_at_most():
            assert "l" in str(explain(net, "cross_entropy", examples))

    @pytest.mark.parametrize(("rows", "columns"), [(1, N), (2, N), (N, 1), (N, 2), (1, 1)])
    @pytest.mark.parametrize("function", [cosine_matrix, layer_cosines], ids=lambda f: f.__name__)
    def test_a_query_against_others(self, function, rows, columns):
        """One query against many, as influence asks, and many against one."""
        net, (x, y) = Usual().eval(), data()
        cosine = true_cosines(net, x, y)
        keywords = {} if function is cosine_matrix else {"groups": {"all": ["*"]}}
        with one_at_a_time_at_most():
            got = function(
                net,
                "cross_entropy",
                (x[:rows], y[:rows]),
                others=(x[-columns:], y[-columns:]),
                **keywords,
            )
        if function is layer_cosines:
            got = got.sel(parameter_group="all")
        assert_cosines(got, cosine[:rows, -columns:])

    def test_a_query_whose_gradient_is_zero(self):
        """Of a query without a loss all cosines are 0."""
        net, (x, y) = Usual().eval(), data()

        def loss(o: Tensor, t: Tensor) -> Tensor:
            return F.cross_entropy(o, t, reduction="none")

        with one_at_a_time_at_most("0"):
            nothing = x[:1], y[:1] * 0 - 100
            got, said = right_or_said(lambda: cosine_matrix(net, loss, nothing, others=(x, y)))
            assert "gradient" in said if got is None else not got.values.any()
