"""Before long work: wrong rules are caught, and networks whose examples depend on each other."""

from __future__ import annotations

import pytest
import reference
import torch
from torch import nn
from torch.nn import functional as F

from distributed_stiffness.errors import GradientError
from distributed_stiffness.gradients import PerExampleGradients, gram, self_check
from distributed_stiffness.gradients.rules import convolution, embedding, linear, normalisation
from distributed_stiffness.models import cnn, fully_connected, resnet20


def images(n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 3, 8, 8), torch.arange(n) % 4


class TestGoodNetworks:
    @pytest.mark.parametrize(
        "model",
        [
            fully_connected((3, 8, 8), 4, widths=(20, 10)),
            cnn((3, 8, 8), 4),
            resnet20((3, 8, 8), 4, normalisation="batch").eval(),
        ],
        ids=["fully_connected", "cnn", "resnet20"],
    )
    def test_pass(self, model):
        """The networks of the package pass, and what was checked comes back."""
        checked = self_check(model, "cross_entropy", *images())

        assert checked.n_parameters == sum(p.numel() for p in model.parameters())

    @pytest.mark.parametrize("n", [3, 5, 8, 20])
    def test_any_number_of_examples(self, n):
        """Three are enough, and of many only some are taken."""
        self_check(fully_connected((3, 8, 8), 4, widths=(5,)), "cross_entropy", *images(n))

    def test_a_network_that_has_fitted_its_examples(self):
        """1 − p of 1e-300 is no reason to refuse."""
        model = fully_connected((3, 8, 8), 4, widths=())
        x, y = images()
        with torch.no_grad():
            model[1].bias[0] = 690.0

        self_check(model, "cross_entropy", x, torch.zeros_like(y))

    def test_parameters_and_loss_are_the_callers(self):
        """What is checked is what will be computed."""
        checked = self_check(
            cnn((3, 8, 8), 4),
            lambda outputs, targets: outputs.square().sum(1) + targets,
            *images(),
            parameters=["0.*"],
        )

        assert list(checked.parameters) == ["0.weight", "0.bias"]


class CentredOverTheBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.last(x - x.mean(0))


class AttentionOverTheBatch(nn.Module):
    """Rows and columns confused: attention between the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.last = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.last(torch.softmax(self.key(x) @ x.T, 1) @ x)


class FunctionalDropout(nn.Module):
    """Dropout that no module shows: `training` is left at its default."""

    def __init__(self) -> None:
        super().__init__()
        self.noisy = nn.Linear(6, 4)

    def forward(self, x):
        return self.noisy(F.dropout(x, 0.5))


class NormalisedOverTheBatch(nn.Module):
    """Batch statistics that no module shows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale = nn.Linear(6, 8), nn.Parameter(torch.ones(4))

    def forward(self, x):
        x = self.first(x).unflatten(1, (4, 2))
        return F.batch_norm(x, None, None, self.scale, training=True).tanh().sum(2)


def vectors(n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 6), torch.arange(n) % 4


class TestExamplesThatDependOnEachOther:
    @pytest.mark.parametrize(
        ("model", "parameter"),
        [
            (CentredOverTheBatch(), "first|last"),
            (AttentionOverTheBatch(), "key|last"),
            (FunctionalDropout(), "noisy"),
            (NormalisedOverTheBatch(), "first|scale"),
        ],
        ids=["centred", "attention", "dropout", "batch statistics"],
    )
    @pytest.mark.filterwarnings("ignore:no structured rule")
    def test_are_refused_with_a_parameter(self, model, parameter):
        """The message names a parameter, and says that examples depend on each other."""
        with pytest.raises(GradientError, match=rf"'({parameter})[.\w]*'.*depend on each other"):
            self_check(model, "cross_entropy", *vectors())

    def test_a_network_that_needs_company(self):
        """What fails on one example alone is refused as such."""

        class NeedsCompany(nn.Linear):
            def forward(self, x):
                return F.batch_norm(super().forward(x), None, None, training=True)

        with pytest.raises(GradientError, match=r"one example alone|depend on each other"):
            self_check(NeedsCompany(6, 4), "cross_entropy", *vectors(3))

    @pytest.mark.parametrize(
        ("layer", "message"),
        [
            (nn.BatchNorm1d(6), r"'1'.*training mode.*model\.eval\(\)"),
            (nn.Dropout(0.5), r"'1'.*active.*model\.eval\(\)"),
            (nn.AlphaDropout(0.5), r"'1'.*active.*model\.eval\(\)"),
            (nn.MultiheadAttention(6, 2, dropout=0.1), r"'1'.*active.*model\.eval\(\)"),
            (nn.LSTM(6, 6, num_layers=2, dropout=0.1), r"'1'.*active.*model\.eval\(\)"),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_layers_in_training_mode_are_refused_by_name(self, layer, message):
        """The message names the layer, before anything is computed."""
        model = nn.Sequential(nn.Linear(6, 6), layer, nn.Linear(6, 4))

        with pytest.raises(GradientError, match=message):
            self_check(model, "cross_entropy", *vectors())
        with pytest.raises(GradientError, match=message):
            PerExampleGradients(model, "cross_entropy", vectors())

    def test_batch_norm_without_running_statistics(self):
        """In evaluation mode too its statistics are those of the batch."""
        layer = nn.BatchNorm1d(6, track_running_stats=False)
        model = nn.Sequential(nn.Linear(6, 6), layer, nn.Linear(6, 4)).eval()

        with pytest.raises(GradientError, match=r"'1'.*no running statistics"):
            self_check(model, "cross_entropy", *vectors())

    def test_inactive_dropout_is_no_reason(self):
        """In evaluation mode, or with probability 0, dropout does nothing."""
        layers = [nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 4)]
        self_check(nn.Sequential(*layers).eval(), "cross_entropy", *vectors())
        self_check(nn.Sequential(nn.Dropout(0.0), *layers[::2]), "cross_entropy", *vectors())


class EveryRule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.positions = nn.Linear(4, 4)
        self.layer_norm = nn.LayerNorm(4)
        self.convolution = nn.Conv1d(4, 4, 3, groups=2)
        self.group_norm = nn.GroupNorm(2, 4)
        self.batch_norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 4)

    def forward(self, tokens):
        x = self.layer_norm(self.positions(self.embedding(tokens)))
        x = self.group_norm(self.convolution(x.transpose(1, 2)))
        return self.head(torch.tanh(self.batch_norm(x)).mean(2))


def text() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(0, 5, (8, 6)), torch.arange(8) % 4


BROKEN = [
    (linear.Linear, "(positions|head)"),
    (convolution.Convolution, "convolution"),
    (embedding.Embedding, "embedding"),
    (normalisation.LayerNorm, "layer_norm"),
    (normalisation.GroupNorm, "group_norm"),
    (normalisation.BatchNorm, "batch_norm"),
]


def require_caught(model, examples, match):
    """What a broken rule made is seen, said, and made right by another way."""
    with pytest.warns(UserWarning, match=match):
        checked = self_check(model, "cross_entropy", *examples)
    expected = reference.per_example_gradients(model, reference.cross_entropy, *examples)
    for name, found in checked.materialised(*examples).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-9, atol=1e-12)


class TestBrokenRules:
    def test_a_good_network_first(self):
        """The network of these tests passes with all rules whole."""
        self_check(EveryRule().eval(), "cross_entropy", *text())

    @pytest.mark.parametrize(("rule", "module"), BROKEN, ids=[module for _, module in BROKEN])
    @pytest.mark.parametrize(
        "fault",
        [
            lambda g: g / 2,
            lambda g: -g,
            lambda g: torch.zeros_like(g),
            lambda g: g.mean(0, keepdim=True).expand_as(g),
            lambda g: g.float().double() * (1 + 1e-6),
        ],
        ids=["halved", "sign", "zero", "mean over the batch", "last digits"],
    )
    def test_are_caught_and_the_parameter_named(self, monkeypatch, rule, module, fault):
        """Any wrong digit is seen, both sides being float64; the gradients go another way."""
        right = rule.per_example
        monkeypatch.setattr(
            rule, "per_example", lambda self, role, *rest: fault(right(self, role, *rest))
        )

        require_caught(EveryRule().eval(), text(), rf"'{module}\.")

    def test_groups_averaged(self, monkeypatch):
        """A grouped convolution whose gradient is averaged over its groups is caught."""
        right = convolution.Convolution.per_example

        def averaged(self, role, call, grad):
            g = right(self, role, call, grad)
            groups = call.settings["groups"]
            if role == "bias" or groups == 1:
                return g
            return g.unflatten(1, (groups, -1)).mean(1, keepdim=True).expand_as(
                g.unflatten(1, (groups, -1))
            ).flatten(1, 2)  # fmt: skip

        monkeypatch.setattr(convolution.Convolution, "per_example", averaged)
        require_caught(EveryRule().eval(), text(), r"'convolution\.weight'")

    def test_the_second_use_forgotten(self, monkeypatch):
        """A shared layer whose uses are not added up is caught."""
        shared = nn.Linear(6, 6)
        model = nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(6, 4))
        right, calls = linear.Linear.per_example, []

        def first_only(self, role, call, grad):
            g = right(self, role, call, grad)
            if call.parameters["weight"].shape != (6, 6):
                return g
            calls.append(role)
            return g if calls.count(role) % 2 else torch.zeros_like(g)

        monkeypatch.setattr(linear.Linear, "per_example", first_only)
        require_caught(model, vectors(), r"'0\.(weight|bias)'")

    def test_wrong_products_of_factors(self, monkeypatch):
        """Right gradients are not enough: the cosines that come of them are checked too."""
        right = gram.Factors.gram
        monkeypatch.setattr(gram.Factors, "gram", lambda f, g, p: right(f, g, p) * 0.99)

        x, y = vectors()
        wide = nn.Sequential(nn.Linear(6, 300), nn.Tanh(), nn.Linear(300, 300))
        with pytest.raises(GradientError, match="cosine differs"):
            self_check(wide, "cross_entropy", x, y)

    def test_a_wrong_rule_in_a_fitted_network(self, monkeypatch):
        """Also where every gradient is below 1e-200."""
        model = EveryRule().eval()
        with torch.no_grad():
            model.head.bias[0] = 600.0
        monkeypatch.setattr(
            normalisation.GroupNorm, "per_example", lambda _s, _r, _c, grad: 3 * grad.sum(2)
        )

        tokens, y = text()
        with pytest.warns(UserWarning, match=r"'group_norm\."):
            self_check(model, "cross_entropy", tokens, torch.zeros_like(y))
