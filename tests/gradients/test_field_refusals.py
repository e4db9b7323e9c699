"""What has no per-example gradient, or is handed over in another form: right, or one sentence.

A refusal is an error of this package that says what it is, names no bug of ours and is not torch's.

Axis letters: N examples, d features, C classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
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
from reference import cosine
from torch import Tensor, nn
from torch.nn import functional as F

from distributed_stiffness import (
    WholeLoss,
    class_cosine_matrix,
    cosine_matrix,
    gradient_norms,
    gram_matrix,
    layer_cosines,
)
from distributed_stiffness.errors import StiffnessError

N = 36
LABELS = torch.arange(N) % 3
FUNCTIONS = [cosine_matrix, gram_matrix, layer_cosines, gradient_norms, class_cosine_matrix]
functions = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)


def network(inputs: int = FEATURES, outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs)).eval()


def flat() -> Tensor:
    return torch.randn(N, FEATURES)


def refused(call: Callable[[], Any], *words: str) -> None:
    """An error of ours, in a sentence that has the words."""
    with pytest.raises(StiffnessError) as caught:
        call()
    said = str(caught.value)
    assert "please report" not in said
    for word in words:
        assert re.search(word, said, re.IGNORECASE), said


# Examples that depend on each other.


def contrastive(o: Tensor, _t: Tensor) -> Tensor:
    return F.cross_entropy(o @ o.T, torch.arange(len(o)), reduction="none")


def supervised(o: Tensor, t: Tensor) -> Tensor:
    """Distances within a class against all others of the batch."""
    d = torch.cdist(o, o)
    same = (t[:, None] == t).to(o.dtype)
    return (d * same).mean(1) - (d * (1 - same)).mean(1)


def of_the_batch(o: Tensor, t: Tensor) -> Tensor:
    """Weights by how often a class is in the batch."""
    share = F.one_hot(t, 3).to(o.dtype).mean(0)
    return F.cross_entropy(o, t, reduction="none") / share[t]


class Normalised(nn.Module):
    """Statistics of the batch, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.l = nn.Linear(FEATURES, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.l(((h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt()).tanh())


class Attends(Normalised):
    """Attention from example to example."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.l(((h @ h.T).softmax(-1) @ h).tanh())


class Centred(Normalised):
    """Only the mean of the batch is taken off, and no gradient goes through it."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.l((h - h.mean(0).detach()).tanh())


class Shifted(Normalised):
    """Each example sees the one before it, as temporal shifts over folded frames do."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.l(torch.cat([h[:1] * 0, h[:-1]]).tanh() + 0 * h)


class LargestOfAll(Normalised):
    """Scaled by the largest of the batch, as dynamic quantisation does."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.l((h / h.abs().max()).tanh())


class ByTheFunction(Normalised):
    """Batch statistics by the function, whatever mode the module is in."""

    def forward(self, x: Tensor) -> Tensor:
        return self.l(F.batch_norm(self.a(x), None, None, training=True).tanh())


class TestExamplesThatDependOnEachOther:
    @functions
    @pytest.mark.parametrize("loss", [contrastive, supervised, of_the_batch])
    def test_losses(self, function, loss):
        """A loss of the batch is no example's."""
        labels = {"labels": LABELS} if function is class_cosine_matrix else {}
        y = LABELS.clone()
        y[5:20] = 0  # not as often, each
        refused(lambda: function(network(), loss, (flat(), y), **labels), "depend on each other")

    @functions
    @pytest.mark.parametrize(
        "made", [Normalised, Attends, Centred, Shifted, LargestOfAll, ByTheFunction]
    )
    def test_networks(self, function, made):
        """So is a network that looks from example to example."""
        net = made().eval()
        said = "depend on each other|one example alone"
        refused(lambda: function(net, "cross_entropy", (flat(), LABELS)), said)

    def test_a_loss_that_runs_the_network(self):
        """InfoNCE as a WholeLoss."""

        def loss(model: nn.Module, x: Tensor) -> Tensor:
            z = F.normalize(model(x), dim=1)
            return F.cross_entropy(z @ z.T / 0.1, torch.arange(len(z)), reduction="none")

        with one_at_a_time_at_most("WholeLoss"):
            refused(
                lambda: cosine_matrix(network(), WholeLoss(loss), (flat(), None)),
                "depend on each other",
            )

    def test_in_long_batches_alone(self):
        """What a few examples do not show: said, or each is taken by itself, with a warning."""

        class Mixes(Normalised):
            def forward(self, x: Tensor) -> Tensor:
                h = self.a(x)
                return self.l(h.tanh() + (h.mean(0) if len(x) > 8 else 0))

        net, x = Mixes().eval(), flat()
        with one_at_a_time_at_most():
            got, said = right_or_said(lambda: cosine_matrix(net, "cross_entropy", (x, LABELS)))
            if got is None:
                assert "depend on each other" in said
            else:
                assert_cosines(got, true_cosines(net, x, LABELS))


class TestLossesThatSayNothing:
    @functions
    def test_one_output(self, function):
        """Cross-entropy of one output is always 0: a binary loss was meant."""
        refused(
            lambda: function(network(outputs=1), "cross_entropy", (flat(), 0 * LABELS)), "output"
        )

    @functions
    @pytest.mark.parametrize(
        "loss",
        [
            lambda o, _: torch.ones(len(o)),
            lambda o, _: o.detach().square().sum(1),
            lambda o, t: (o.argmax(1) != t).to(o.dtype),
            lambda o, _: torch.from_numpy(o.detach().numpy()).sum(1),
        ],
        ids=["ones", "detached", "errors", "through numpy"],
    )
    def test_a_constant(self, function, loss):
        """A loss that does not depend on the outputs has no gradient."""
        labels = {"labels": LABELS} if function is class_cosine_matrix else {}
        refused(lambda: function(network(), loss, (flat(), LABELS), **labels), "loss")

    def test_of_a_frozen_network(self):
        """No parameter requires a gradient."""
        frozen = network().requires_grad_(False)
        refused(lambda: cosine_matrix(frozen, "cross_entropy", (flat(), LABELS)), "gradient")

    def test_a_mean(self):
        """A number for the batch, where one an example is wanted."""
        refused(
            lambda: cosine_matrix(network(), lambda o, t: F.cross_entropy(o, t), (flat(), LABELS)),
            "one number an example|\\(N,\\)",
        )


# Inputs of another kind.


class Ragged(torch.utils.data.Dataset):
    """Features of different lengths."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.randn(3 + i % 4), i % 3


class Pictures(torch.utils.data.Dataset):
    """Pictures as PIL has them: no transform was given."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> tuple[Any, int]:
        from PIL import Image

        return Image.new("L", (3, 2), i), i % 3


INPUTS: dict[str, Callable[[], Any]] = {
    "bytes": lambda: (torch.randint(0, 256, (N, FEATURES), dtype=torch.uint8), LABELS),
    "whole numbers": lambda: (torch.randint(0, 9, (N, FEATURES)), LABELS),
    "truth values": lambda: (torch.rand(N, FEATURES) > 0.5, LABELS),
    "sparse": lambda: (torch.randn(N, FEATURES).to_sparse(), LABELS),
    "sparse rows": lambda: (torch.randn(N, FEATURES).to_sparse_csr(), LABELS),
    "ragged": Ragged,
    "PIL": Pictures,
    "strings": lambda: (["a text"] * N, LABELS),
    "too few features": lambda: (torch.randn(N, FEATURES - 1), LABELS),
    "no examples": lambda: (torch.randn(0, FEATURES), LABELS[:0]),
    "not a number": lambda: (torch.full((N, FEATURES), torch.nan), LABELS),
    "a number too large": lambda: (torch.full((N, FEATURES), torch.inf), LABELS),
    "labels of another size": lambda: (torch.randn(N, FEATURES), LABELS[:-1]),
    "labels beyond the outputs": lambda: (torch.randn(N, FEATURES), LABELS + 1),
    "labels as numbers": lambda: (torch.randn(N, FEATURES), LABELS.float()),
    "labels in columns": lambda: (torch.randn(N, FEATURES), LABELS[:, None]),
}


class TestInputsOfAnotherKind:
    @pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
    @functions
    @pytest.mark.parametrize("name", INPUTS)
    def test_refused_or_right(self, name, function):
        """Where a number comes out it is that of the same examples as float32."""
        examples = INPUTS[name]()
        net = network()
        with one_at_a_time_at_most():
            got, said = right_or_said(lambda: function(net, "cross_entropy", examples))
        if got is None:
            assert said
            return
        assert name in ("bytes", "whole numbers", "truth values", "sparse", "sparse rows")
        x, y = examples
        usual = function(net, "cross_entropy", (x.to_dense().float(), y))
        np.testing.assert_allclose(got.values, usual.values, rtol=1e-5, atol=1e-6)


# Labels of classes.


def by_class(net: nn.Module, x: Tensor, y: Tensor, labels: Tensor) -> np.ndarray:
    """Means over pairs of different examples."""
    true, n = true_cosines(net, x, y), int(labels.max()) + 1
    means = np.full((n, n), np.nan)
    for a in range(n):
        for b in range(n):
            pairs = (labels[:, None] == a) & (labels == b) & ~torch.eye(len(y), dtype=torch.bool)
            if pairs.any():
                means[a, b] = float(true[pairs].mean())
    return means


GIVEN: dict[str, Callable[[Tensor], Any]] = {
    "numpy": lambda y: y.numpy(),
    "numpy, 32 bits": lambda y: y.numpy().astype(np.int32),
    "numpy, bytes": lambda y: y.numpy().astype(np.uint8),
    "a list": lambda y: y.tolist(),
    "a tuple": lambda y: tuple(y.tolist()),
    "a range of numpy numbers": lambda y: list(y.numpy()),
    "int32": lambda y: y.int(),
    "parts": lambda y: iter(y.split(7)),
    "parts of numpy": lambda y: [part.numpy() for part in y.split(7)],
    "an array of pandas": lambda y: __import__("pandas").Series(y.numpy()),
}


class TestLabelsOfClasses:
    @pytest.mark.parametrize("name", GIVEN)
    def test_in_any_form(self, name):
        """NumPy, lists, parts: the same means."""
        net, x = network(), flat()
        labels = LABELS.roll(1)
        with one_at_a_time_at_most():
            got = class_cosine_matrix(net, "cross_entropy", (x, LABELS), labels=GIVEN[name](labels))
        np.testing.assert_allclose(got.values, by_class(net, x, LABELS, labels), atol=1e-6)

    @pytest.mark.parametrize(
        "labels",
        [
            LABELS.float() + 0.5,
            LABELS[:-1],
            LABELS[:, None].expand(-1, 2),
            ["cat"] * N,
            3,
        ],
        ids=["halves", "too few", "two columns", "words", "a number"],
    )
    def test_refused(self, labels):
        """What is no class of each example, counted from 0."""
        refused(
            lambda: class_cosine_matrix(
                network(), "cross_entropy", (flat(), LABELS), labels=labels
            ),
            "label",
        )

    @pytest.mark.parametrize("ids", [(0, 7, 10**5), (0, 7, 10**6), (0, 1, 2**40), (-1, 0, 1)])
    def test_ids_of_a_catalogue(self, ids):
        """Ids up to a million are no million of classes: refused, or as many as there are."""
        net, x = network(), flat()
        labels = torch.tensor(ids)[LABELS]
        got, said = right_or_said(
            lambda: class_cosine_matrix(net, "cross_entropy", (x, LABELS), labels=labels)
        )
        if got is None:
            assert "label" in said
        else:
            assert got.shape == (3, 3)
            np.testing.assert_allclose(got.values, by_class(net, x, LABELS, LABELS), atol=1e-6)

    def test_targets_that_are_ignored(self):
        """A target of −100 is no class: refused, or left out."""
        net, x, y = network(), flat(), LABELS.clone()
        y[:5] = -100

        def loss(o: Tensor, t: Tensor) -> Tensor:
            return F.cross_entropy(o, t, reduction="none")

        got, said = right_or_said(lambda: class_cosine_matrix(net, loss, (x, y)))
        if got is None:
            assert "label" in said
        else:
            counted = got.values[-3:, -3:]  # a class of ignored ones may stand before
            np.testing.assert_allclose(counted, by_class(net, x[5:], y[5:], y[5:]), atol=1e-6)


# A string where a list of patterns is meant.


class TestPatterns:
    @pytest.mark.parametrize("pattern", ["0.*", "2.weight", "*.bias"])
    def test_a_string_is_one_pattern(self, pattern):
        """Its characters are no patterns."""
        net, x = network(), flat()
        rows = true_rows(net, x, LABELS)
        names = [(n, p.numel()) for n, p in net.named_parameters()]
        wanted = re.compile(pattern.replace(".", r"\.").replace("*", ".*"))
        chosen = torch.cat([torch.full((k,), bool(wanted.fullmatch(n))) for n, k in names])
        true = cosine(rows[:, chosen])
        for call in (
            lambda: layer_cosines(net, "cross_entropy", (x, LABELS), groups={"first": pattern})[0],
            lambda: cosine_matrix(net, "cross_entropy", (x, LABELS), parameters=pattern),
        ):
            got, said = right_or_said(call)
            if got is None:
                assert re.search("list|sequence", said)
                assert pattern in said
            else:
                assert_cosines(got, true)

    @functions
    def test_a_star(self, function):
        """A star alone is all parameters, as a string and in a list."""
        net, examples = network(), (flat(), LABELS)
        usual = function(net, "cross_entropy", examples, parameters=["*"])
        got, said = right_or_said(lambda: function(net, "cross_entropy", examples, parameters="*"))
        if got is None:
            assert re.search("list|sequence", said)
        else:
            np.testing.assert_allclose(got.values, usual.values, atol=1e-6)

    @pytest.mark.parametrize("groups", [{"first": []}, {}, {"first": "nothing"}, ["0.*"], "0.*"])
    def test_no_groups(self, groups):
        """No group, an empty one, one that matches nothing, and what is no mapping."""
        refused(lambda: layer_cosines(network(), "cross_entropy", (flat(), LABELS), groups=groups))
