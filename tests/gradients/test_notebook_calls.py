"""What a notebook calls, on small networks: losses, examples, groups, refusals, memory.

Axis letters: N examples, T positions, d features, P parameters.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from distributed_stiffness.errors import GradientError, ModelError, StudyError
from distributed_stiffness.gradients import (
    PerExampleGradients,
    WholeLoss,
    class_cosine_matrix,
    cosine_matrix,
    gradient_norms,
    gram_matrix,
    layer_cosines,
)
from distributed_stiffness.gradients.gram import cosine
from distributed_stiffness.gradients.rules import Linear

N = 12
CLASSES = 3
# The promise on a float32 cosine.
FLOAT32 = 2e-6
# A number of bfloat16 is off by 1e-3, and ten thousands of them in a row average that out.
BFLOAT16 = 3e-4
# Two right ways in float64, relative to the example's gradient.
EXACT = 1e-9


def network() -> nn.Module:
    """Two layers, a norm and a scale."""
    return nn.Sequential(
        nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.PReLU(), nn.Linear(5, CLASSES)
    ).eval()


def data(n: int = N) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 6), torch.arange(n) % CLASSES


def class_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def expected_gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """g_NP, one example after the other, in float64 and on copies."""
    model = copy.deepcopy(model).double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i in range(len(y)):
        one = x[i : i + 1].clone()
        outputs = model(one.double() if one.is_floating_point() else one)
        grads = torch.autograd.grad(F.cross_entropy(outputs, y[i : i + 1]), parameters)
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def expected_cosines(model: nn.Module, x: Tensor, y: Tensor) -> np.ndarray:
    unit = F.normalize(expected_gradients(model, x, y))
    return (unit @ unit.T).numpy()


def assert_right(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Gradients, cosines in every form, and a whole call."""
    expected = expected_gradients(model, x, y)
    exact = PerExampleGradients(model, "cross_entropy", (x, y), precision="float64")
    found = torch.cat([g.reshape(len(y), -1) for g in exact.materialised(x, y).values()], 1)
    assert ((found - expected).norm(dim=1) <= EXACT * expected.norm(dim=1)).all()
    cosines = expected_cosines(model, x, y)
    for weights in ((), tuple(exact.recipe.layers)):
        rows = PerExampleGradients(model, "cross_entropy", (x, y), factored=weights).rows(x, y)
        assert abs(cosine(rows, rows).numpy() - cosines).max() <= FLOAT32
    assert abs(cosine_matrix(model, "cross_entropy", (x, y)).values - cosines).max() <= FLOAT32


class TestLosses:
    @pytest.mark.filterwarnings("ignore:a WholeLoss")
    @pytest.mark.parametrize("precision", ["float32", "float64"])
    def test_a_whole_loss_equals_the_loss(self, precision):
        """A loss that runs the network itself gives the numbers of the same loss of its outputs."""
        model, examples = network(), data()
        whole = WholeLoss(lambda model, batch: class_loss(model(batch[0]), batch[1]))

        for call in (cosine_matrix, gram_matrix, layer_cosines, gradient_norms):
            found = call(model, whole, examples, precision=precision)
            expected = call(model, class_loss, examples, precision=precision)
            np.testing.assert_allclose(found.values, expected.values, atol=FLOAT32)

    @pytest.mark.filterwarnings("ignore:a WholeLoss")
    def test_a_whole_loss_may_call_the_network_twice(self):
        """Two views of an example, as in contrastive learning: both uses of a weight add up."""
        model, (x, _) = network(), data()
        other = x + 0.1 * torch.randn_like(x)
        whole = WholeLoss(lambda m, batch: (m(batch[0]["a"]) * m(batch[0]["b"])).sum(1).tanh())
        inputs = {"a": x, "b": other}
        found = gram_matrix(model, whole, (inputs, torch.zeros(N)))

        double, rows = copy.deepcopy(model).double(), []
        for i in range(N):
            a, b = x[i : i + 1].double(), other[i : i + 1].double()
            value = (double(a) * double(b)).sum().tanh()
            grads = torch.autograd.grad(value, list(double.parameters()))
            rows.append(torch.cat([g.flatten() for g in grads]))
        g_NP = torch.stack(rows)
        scale = float(g_NP.norm(dim=1).max()) ** 2
        np.testing.assert_allclose(found.values, (g_NP @ g_NP.T).numpy(), atol=FLOAT32 * scale)

    def test_class_means_need_labels_of_a_whole_loss(self):
        """Where targets are no labels, labels are given."""
        model, (x, y) = network(), data()
        whole = WholeLoss(lambda model, batch: class_loss(model(batch[0]), batch[1]["y"]))
        examples = (x, {"y": y})
        found = class_cosine_matrix(model, whole, examples, y)

        expected = class_cosine_matrix(model, "cross_entropy", (x, y))
        np.testing.assert_allclose(found.values, expected.values, atol=EXACT)
        with pytest.raises(ModelError, match="give labels"):
            class_cosine_matrix(model, whole, examples)


class Rows(Dataset):
    """Examples one by one, as a user's data set gives them."""

    def __init__(self, x: Any, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> Any:
        if isinstance(self.x, dict):
            return {key: value[i] for key, value in self.x.items()}, int(self.y[i])
        return self.x[i], int(self.y[i])


class TestExamples:
    CALLS = (cosine_matrix, gram_matrix, layer_cosines, gradient_norms, class_cosine_matrix)

    @pytest.mark.parametrize("call", CALLS)
    def test_a_data_set_or_a_loader_is_the_pair(self, call):
        """A data set, a loader with batches of any size and an iterable give the pair's numbers."""
        model, (x, y) = network(), data()
        expected = call(model, "cross_entropy", (x, y))

        rows = Rows(x, y)
        for examples in (
            rows,
            DataLoader(rows, batch_size=5),
            [(x[:4], y[:4]), (x[4:], y[4:])],
            iter([(x[:9], y[:9]), (x[9:], y[9:])]),
        ):
            found = call(model, "cross_entropy", examples)
            np.testing.assert_allclose(found.values, expected.values, atol=FLOAT32)

    def test_a_data_set_of_dicts(self):
        """Inputs by name are stacked name by name."""

        class Named(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.left, self.right = nn.Linear(6, CLASSES), nn.Linear(2, CLASSES)

            def forward(self, left: Tensor, right: Tensor) -> Tensor:
                return torch.tanh(self.left(left)) + self.right(right)

        model, (x, y) = Named(), data()
        inputs = {"right": torch.randn(N, 2), "left": x}
        expected = cosine_matrix(model, "cross_entropy", (inputs, y))

        rows = Rows(inputs, y)
        for examples in (rows, DataLoader(rows, batch_size=7)):
            found = cosine_matrix(model, "cross_entropy", examples)
            np.testing.assert_allclose(found.values, expected.values, atol=FLOAT32)

    @pytest.mark.parametrize("as_others", [lambda x, y: (x, y), Rows])
    def test_others_are_the_columns(self, as_others):
        """Rows are examples, columns are the others, in cosines, products and groups."""
        model, (x, y) = network(), data()
        others = as_others(x[8:], y[8:])
        for call, last in ((cosine_matrix, 2), (gram_matrix, 2), (layer_cosines, 3)):
            found = call(model, "cross_entropy", (x[:8], y[:8]), others)
            joint = call(model, "cross_entropy", (x, y))
            assert found.dims[last - 2 :] == ("example", "other")
            np.testing.assert_allclose(
                found.values, joint.values[..., :8, 8:], atol=FLOAT32 * abs(joint.values).max()
            )
            assert found.attrs["error_bound"] <= 4e-6

    def test_others_may_be_texts_of_another_length(self):
        """As long as a gradient is over the same parameters, its example may have any shape."""

        class Texts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.word, self.mix = nn.Embedding(50, 30), nn.Linear(30, 30)
                self.head = nn.Linear(30, CLASSES)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(torch.tanh(self.mix(self.word(x))).mean(1))

        model = Texts()
        short = torch.randint(0, 50, (5, 2)), torch.arange(5) % CLASSES
        long = torch.randint(0, 50, (4, 9)), torch.arange(4) % CLASSES
        found = cosine_matrix(model, "cross_entropy", short, long)

        left, right = (F.normalize(expected_gradients(model, *part)) for part in (short, long))
        assert abs(found.values - (left @ right.T).numpy()).max() <= FLOAT32


class TestGroups:
    def test_every_module_is_a_group(self):
        """By default each module that holds parameters is one, in their order."""
        model, examples = network(), data()
        found = layer_cosines(model, "cross_entropy", examples)

        assert found.dims == ("parameter_group", "example", "other")
        assert found.parameter_group.values.tolist() == ["0", "2", "3", "4"]
        for group in found.parameter_group.values:
            alone = cosine_matrix(model, "cross_entropy", examples, parameters=[f"{group}.*"])
            part = found.sel(parameter_group=group).values
            np.testing.assert_allclose(part, alone.values, atol=FLOAT32)

    def test_named_groups_may_overlap(self):
        """A name with patterns; a parameter may be in several groups, or in none."""
        model, examples = network(), data()
        groups = {"biases": ["*.bias"], "head": ["4.*"], "all": ["*"]}
        found = layer_cosines(model, "cross_entropy", examples, groups=groups)

        assert found.parameter_group.values.tolist() == ["biases", "head", "all"]
        for group, patterns in groups.items():
            alone = cosine_matrix(model, "cross_entropy", examples, parameters=patterns)
            part = found.sel(parameter_group=group).values
            np.testing.assert_allclose(part, alone.values, atol=FLOAT32)

    def test_groups_of_the_parameters_in_play(self):
        """`parameters` comes first, groups are made of what it leaves."""
        found = layer_cosines(network(), "cross_entropy", data(), parameters=["*.bias"])

        assert found.parameter_group.values.tolist() == ["0", "2", "4"]

    def test_raw_parameters_are_groups_of_their_own(self):
        """A parameter of the network itself goes by its own name."""

        class Raw(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale, self.temperature = nn.Parameter(torch.ones(6)), nn.Parameter(
                    torch.tensor(2.0)
                )  # fmt: skip
                self.layers = network()

            def forward(self, x: Tensor) -> Tensor:
                return self.layers(x * self.scale) / self.temperature

        found = layer_cosines(Raw(), "cross_entropy", data())
        expected = ["scale", "temperature", "layers.0", "layers.2", "layers.3", "layers.4"]
        assert found.parameter_group.values.tolist() == expected
        assert abs(abs(found.sel(parameter_group="temperature").values) - 1).max() <= FLOAT32

    def test_a_group_without_parameters_is_refused(self):
        """The message names the group, its patterns and the parameters that there are."""
        with pytest.raises(ModelError, match=r"'tail' \(5\.\*\); there are: 0\.weight, 0\.bias"):
            layer_cosines(
                network(), "cross_entropy", data(), groups={"head": ["4.*"], "tail": ["5.*"]}
            )


class Centred(nn.Module):
    """The mean over the batch is taken off."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(torch.tanh(x - x.mean(0)))


class AcrossTheBatch(nn.Module):
    """Examples attend to each other: (N, d) is taken for one sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x)[0])


class PathOfInputs(nn.Module):
    """A second layer takes part as soon as one example of a batch is large."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Linear(6, CLASSES), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        is_large = x[:, :1] > 5
        return (
            torch.where(is_large, self.large(x), self.small(x)) if is_large.any() else self.small(x)
        )


class FunctionalDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.dropout(x, 0.5))


class FunctionalStatistics(nn.Module):
    """Batch normalisation without a module, by the batch's own statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.batch_norm(self.first(x), None, None, training=True))


class TestRefusals:
    CALLS = (cosine_matrix, gram_matrix, layer_cosines, gradient_norms, class_cosine_matrix)

    @pytest.mark.parametrize("call", CALLS)
    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (nn.Sequential(nn.Dropout(), nn.Linear(6, CLASSES)), "dropout of '0' is active"),
            (
                nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, CLASSES)),
                "'0' is in training mode",
            ),
            (
                nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3)).eval(),
                "'0' keeps no running statistics",
            ),
            (AcrossTheBatch(), "examples depend on each other"),
            (Centred(), "examples depend on each other"),
            (FunctionalDropout(), "chance"),
            (FunctionalStatistics(), "per-example gradients are not defined"),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
    )
    @pytest.mark.filterwarnings("ignore:no structured rule and no torch.func")
    def test_networks_whose_examples_are_not_alone(self, call, model, message):
        """Where a gradient would depend on chance or company there is none; the reason is told."""
        with pytest.raises(GradientError, match=message):
            call(model, "cross_entropy", data())

    @pytest.mark.parametrize("at", [0, 10])
    def test_examples_of_different_kinds(self, at):
        """A path that an example takes alone is no matter, wherever the other kind stands."""
        x, y = data()
        x[at, 0] = 9.0
        model = PathOfInputs()
        found = cosine_matrix(model, "cross_entropy", (x, y))
        expected = reference.cosine_matrix(model, reference.cross_entropy, x, y)
        np.testing.assert_allclose(found.values, expected.numpy(), atol=FLOAT32)

    def test_examples_of_one_kind_on_the_other_path(self):
        """Where all examples take one path there is nothing to refuse; what is unused is 0."""
        x, y = data()
        assert_same = cosine_matrix(PathOfInputs(), "cross_entropy", (x, y))
        assert np.isfinite(assert_same.values).all()
        with pytest.warns(UserWarning, match="gradients of all examples are 0"):
            norms = gradient_norms(PathOfInputs(), "cross_entropy", (x, y), parameters=["large.*"])
        assert (norms == 0).all()

    def test_gradients_of_rounding_errors(self):
        """A bias before a norm has a gradient of 0 but for rounding: alone it is refused."""
        model = nn.Sequential(
            nn.Conv1d(1, 3, 3), nn.InstanceNorm1d(3), nn.Flatten(), nn.Linear(12, CLASSES)
        ).eval()
        examples = torch.randn(N, 1, 6), torch.arange(N) % CLASSES

        with pytest.raises(GradientError):
            cosine_matrix(model, "cross_entropy", examples, parameters=["0.bias"])

    @pytest.mark.parametrize("error", [1e-6, 1e-3])
    def test_a_rule_that_is_slightly_wrong(self, error, monkeypatch):
        """A network that computes in float64 is held to float64, whatever its examples are."""
        right = Linear.per_example
        monkeypatch.setattr(
            Linear, "per_example", lambda self, *args: (1 + error) * right(self, *args)
        )
        with pytest.warns(UserWarning, match="differs from one-example autograd"):
            cosine_matrix(network(), "cross_entropy", data())


class TestPrecisions:
    @pytest.mark.parametrize(
        ("build", "factored"),
        [
            (
                lambda: nn.Sequential(
                    *(nn.Conv2d(3, 64, 3), nn.Tanh(), nn.Conv2d(64, 64, 3), nn.Tanh()),
                    *(nn.Conv2d(64, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
                ),
                (),
            ),
            (
                lambda: nn.Sequential(
                    *(nn.Conv2d(3, 16, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3136, 10))
                ),
                ("3.weight",),
            ),
        ],
        ids=["rows", "factors"],
    )
    def test_bfloat16(self, build, factored):
        """Numbers of bfloat16 lose three digits, which average out; the bound says how many."""
        model = build()
        x, y = torch.randn(40, 3, 16, 16), torch.arange(40) % 10
        recipe = PerExampleGradients(model, "cross_entropy", (x, y), precision="bf16").recipe
        assert recipe.factored == factored
        expected = expected_cosines(model, x, y)
        found = cosine_matrix(model, "cross_entropy", (x, y), precision="bf16")

        error = abs(found.values - expected).max()
        assert FLOAT32 < error <= BFLOAT16
        assert error <= found.attrs["error_bound"]

    @pytest.mark.parametrize("precision", ["tf32", "bf16x3"])
    def test_a_gpu_precision_on_a_cpu(self, precision):
        """It is refused, and the message lists what there is."""
        with pytest.raises(
            StudyError, match=rf"'{precision}' needs a CUDA.*float32, float64, bf16"
        ):
            cosine_matrix(network(), "cross_entropy", data(), precision=precision)


class FoldedFrames(nn.Module):
    """Frames (N, T, d) are folded with the examples for a convolution, in either order."""

    def __init__(self, outside: bool) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(1, 2, 3), nn.Linear(2 * 4 * 5, CLASSES)
        self.outside = outside

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        rows = x if self.outside else x.transpose(0, 1)
        y = torch.tanh(self.conv(rows.reshape(n * t, 1, d)))
        y = y.reshape(n, t, -1) if self.outside else y.reshape(t, n, -1).transpose(0, 1)
        return self.head(y.flatten(1))


class CheckpointedCells(nn.Module):
    """A recurrent layer whose steps are computed again in the backward pass."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 3), nn.Linear(3, CLASSES)
        self.cells = kind(3, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return self.cells(self.first(x))[0][:, -1]

        return self.head(checkpoint(run, x, use_reentrant=False))


class WritesItsInput(nn.Module):
    """The input is centred and scaled in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.sub_(0.5).mul_(2.0))


class WritesItsImage(nn.Module):
    """The same of images, for a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(channels, 2, 3), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x.sub_(0.5).mul_(2.0))).flatten(1))


class Temperature(nn.Module):
    """A parameter without a dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.temperature = network(), nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) / self.temperature


class TestFoundAmongRandomNetworks:
    """What test_random_networks.py has found, each in its own network."""

    @pytest.mark.parametrize(
        ("layers", "shape"),
        [
            ([nn.Linear(6, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 3)], (4, 6)),
            (
                [
                    nn.InstanceNorm2d(2, affine=True),
                    nn.ELU(inplace=True),
                    nn.Flatten(),
                    nn.Linear(18, CLASSES),
                ],
                (2, 3, 3),
            ),
        ],
        ids=["linear", "instance norm"],
    )
    def test_views_that_are_written_in_place(self, layers, shape):
        """A layer on positions returns a view: an activation in place does not cut it off."""
        assert_right(
            nn.Sequential(nn.Tanh(), *layers), torch.randn(N, *shape), torch.arange(N) % CLASSES
        )

    @pytest.mark.parametrize("outside", [True, False])
    def test_frames_folded_for_a_convolution(self, outside):
        """Its weight is right as factors too: the positions of all frames are the example's."""
        assert_right(FoldedFrames(outside), torch.randn(N, 4, 7), torch.arange(N) % CLASSES)

    @pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
    @pytest.mark.filterwarnings("ignore:no structured rule and no torch.func")
    def test_checkpointed_recurrent_layers(self, kind):
        """What the backward pass computes again is what the forward pass computed."""
        assert_right(CheckpointedCells(kind), torch.randn(N, 3, 4), torch.arange(N) % CLASSES)

    def test_parameters_without_a_dimension(self):
        """A temperature is a parameter like any other."""
        model, (x, y) = Temperature(), data()
        assert_right(model, x, y)
        norms = gradient_norms(model, "cross_entropy", (x, y)).values
        expected = expected_gradients(model, x, y).norm(dim=1).numpy()
        np.testing.assert_allclose(norms, expected, rtol=1e-5)
        assert class_cosine_matrix(model, "cross_entropy", (x, y)).shape == (CLASSES, CLASSES)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_inputs_that_are_written_in_place(self, dtype):
        """Each pass sees the examples as they were given, and so does the caller afterwards."""
        model, (x, y) = WritesItsInput(), data()
        x = x.to(dtype)
        given = x.clone()
        expected = expected_cosines(model, x, y)

        for precision in ("float32", "float64"):
            found = cosine_matrix(model, "cross_entropy", (x, y), precision=precision)
            assert torch.equal(x, given)
            assert abs(found.values - expected).max() <= FLOAT32
        norms = gradient_norms(model, "cross_entropy", (x, y))
        assert torch.equal(x, given)
        expected = expected_gradients(model, x, y).norm(dim=1).numpy()
        np.testing.assert_allclose(norms.values, expected, rtol=1e-5)

    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_images_that_are_written_in_place(self, channels, memory_format):
        """However an image lies in memory, it is left as it is."""
        model, y = WritesItsImage(channels), torch.arange(N) % CLASSES
        x = torch.randn(N, channels, 4, 4).contiguous(memory_format=memory_format)
        given = x.clone()
        expected = expected_cosines(model, x, y)

        found = cosine_matrix(model, "cross_entropy", (x, y))
        assert torch.equal(x, given)
        assert abs(found.values - expected).max() <= FLOAT32


class Keys(nn.Module):
    """Attention of one layer."""

    def __init__(self, d: int = 128) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(d, d), nn.Linear(d, d, bias=False), nn.Linear(d, d)
        self.head = nn.Linear(d, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        heads = (f(x).unflatten(-1, (4, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(*heads)
        return self.head(mixed.transpose(1, 2).flatten(2).mean(1))


class TestDigitsThatCancel:
    @pytest.mark.parametrize("precision", ["float32", "float64"])
    def test_keys_of_similar_tokens(self, precision):
        """Gradients of keys add up to 0 over an example's tokens, so that alike tokens cancel.

        Tokens of deep transformers are alike: a cosine of 0.99 here.
        """
        model, y = Keys(), torch.arange(8) % CLASSES
        x = torch.randn(8, 1, 128) + 0.1 * torch.randn(8, 5, 128)
        for name, p in model.named_parameters():
            p.requires_grad_(name == "k.weight")
        expected = expected_cosines(model, x, y)

        for weights in ((), ("k.weight",)):
            gradients = PerExampleGradients(
                model, "cross_entropy", (x, y), precision=precision, factored=weights
            )
            rows = gradients.rows(x, y)
            error = float(abs(cosine(rows, rows).numpy() - expected).max())
            assert error <= FLOAT32, weights
        found = cosine_matrix(model, "cross_entropy", (x, y), precision=precision)
        assert abs(found.values - expected).max() <= FLOAT32


MEASURE = textwrap.dedent(
    """
    import torch

    torch.set_num_threads(1)
    from distributed_stiffness.gradients import gram_matrix
    from distributed_stiffness.models import resnet20

    def status(key):
        with open("/proc/self/status") as file:
            line = next(line for line in file if line.startswith(key))
        return 1024 * int(line.split()[1])

    torch.manual_seed(0)
    model = resnet20((3, 32, 32), 10)
    x, y = torch.randn({n}, 3, 32, 32), torch.arange({n}) % 10
    gram_matrix(model, "cross_entropy", (x[:16], y[:16]), memory={budget}, check={check})
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    found = gram_matrix(model, "cross_entropy", (x, y), memory={budget}, check={check})
    print(sum(p.numel() for p in model.parameters()), status("VmHWM") - before)
    """
)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("check", [True, False])
def test_gradients_that_do_not_fit_are_never_held_together(check):
    """The budget holds: the process grows by it, by the matrices and by little else.

    All gradients together would take 2.7 times the budget.
    """
    n, budget, allowance = 256, 100 * 10**6, 100 * 10**6
    done = subprocess.run(
        [sys.executable, "-c", MEASURE.format(n=n, budget=budget, check=check)],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    n_parameters, growth = map(int, done.stdout.split())

    assert 4 * n * n_parameters > 2.5 * budget
    matrices = n * n * (4 + 8)
    assert growth <= budget + matrices + allowance, f"{growth / 1e6:.0f} MB"


class WritesItsInputBesideAPower(nn.Module):
    """An input overwritten in place, and a parameter that no rule covers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.power = nn.Linear(4, 3), nn.Parameter(torch.full((3,), 1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.sub_(0.5).mul_(2.0)
        return self.linear(x).sigmoid() ** self.power


def test_inputs_written_in_place_beside_a_parameter_without_a_rule():
    """torch.func runs the network once more: on the same inputs, and not on the caller's."""
    model, x, y = WritesItsInputBesideAPower(), torch.randn(10, 4), torch.arange(10) % 3
    kept = x.clone()
    found = cosine_matrix(model, "cross_entropy", (x, y))

    assert torch.equal(x, kept)
    assert abs(found.values - expected_cosines(model, kept, y)).max() <= FLOAT32
