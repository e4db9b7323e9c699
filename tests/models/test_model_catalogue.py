"""Networks by name: the paper's, and anyone's `package.module:factory`."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

from distributed_stiffness.errors import ModelError
from distributed_stiffness.models import MODELS, build, check_outputs, cnn

IMAGE = (3, 32, 32)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def make(name: str, shape=IMAGE, n_classes=10, **options) -> nn.Module:
    return build(name, input_shape=shape, n_classes=n_classes, **options)


@pytest.fixture
def factories(monkeypatch):
    """Return a module of somebody else's, importable as `somebodys`."""
    module = types.ModuleType("somebodys")
    monkeypatch.setitem(sys.modules, "somebodys", module)
    return module


class TestThePapersNetworks:
    @pytest.mark.parametrize("name", MODELS)
    def test_one_output_a_class(self, name):
        """Every network takes 32×32 colour images and gives one output a class."""
        model = make(name, n_classes=7)

        check_outputs(model, torch.randn(2, *IMAGE), 7, name)

    @pytest.mark.parametrize(
        ("name", "shape", "parameters"),
        [
            # 784·500 + 500 + 500·300 + 300 + 300·100 + 100 + 100·10 + 10
            ("fully_connected", (1, 28, 28), 573_910),
            # 27·16 + 16 + 144·32 + 32 + 288·32 + 32 + 512·10 + 10
            ("cnn", IMAGE, 19_466),
            ("resnet18", IMAGE, 11_173_962),  # the usual one for CIFAR-10
        ],
    )
    def test_sizes(self, name, shape, parameters):
        """The networks have as many parameters as those of the literature."""
        assert count(make(name, shape)) == pytest.approx(parameters, rel=1e-3)

    def test_resnet20(self):
        """0.27 million parameters; without batch normalisation unless it is asked for."""
        plain = make("resnet20")
        normalised = make("resnet20", options={"normalisation": "batch"})

        assert count(plain) == pytest.approx(270_000, rel=0.03)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
        assert any(isinstance(m, nn.BatchNorm2d) for m in normalised.modules())

    def test_widths(self):
        """The fully connected network's hidden layers are an option."""
        model = make("fully_connected", (4,), 3, options={"widths": [6, 5]})

        assert [m.out_features for m in model if isinstance(m, nn.Linear)] == [6, 5, 3]

    @pytest.mark.parametrize("name", ["cnn", "resnet20", "resnet18"])
    def test_images_are_needed(self, name):
        """Vectors are refused with their shape and the network that takes them."""
        with pytest.raises(ModelError, match=r"\(64,\).*fully_connected"):
            make(name, (64,))

    def test_images_that_cannot_be_halved(self):
        """The CNN halves three times; the message says how large an image must be."""
        with pytest.raises(ModelError, match=r"at least 8 pixels.*\(1, 7, 9\)"):
            cnn((1, 7, 9), 10)

    def test_odd_sides(self):
        """Sides need not be powers of two."""
        check_outputs(cnn((1, 9, 13), 10), torch.randn(2, 1, 9, 13), 10, "cnn")


class TestSeeds:
    @pytest.mark.parametrize("name", MODELS)
    def test_the_seed_decides_the_weights(self, name):
        """One seed, one network; another seed, another."""
        first, again, other = (
            torch.cat([p.flatten() for p in make(name, seed=seed).parameters()])
            for seed in (1, 1, 2)
        )

        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_the_callers_random_state_is_left_alone(self):
        """Building draws from a state of its own."""
        before = torch.get_rng_state()
        make("cnn", seed=5)

        assert torch.equal(torch.get_rng_state(), before)


class TestFactories:
    def test_a_class(self, factories):
        """Any callable that makes a network will do; it gets the options."""
        factories.Net = nn.Linear
        model = make("somebodys:Net", options={"in_features": 4, "out_features": 3})

        assert (model.in_features, model.out_features) == (4, 3)

    def test_gets_what_it_asks_for(self, factories):
        """The shape of the inputs and the number of classes, where it has such parameters."""
        factories.make = lambda input_shape, n_classes, depth=1: nn.Linear(
            input_shape[0] * depth, n_classes
        )
        model = make("somebodys:make", (4,), 3, options={"depth": 2})

        assert (model.in_features, model.out_features) == (8, 3)

    def test_an_unknown_name(self):
        """The message lists the names that there are, and the other way."""
        with pytest.raises(ModelError, match=r"'resnet50'.*resnet20.*package\.module:factory"):
            make("resnet50")

    @pytest.mark.parametrize(
        "name", ["no_such_package:make", "math:no_such_name", "somebodys:", ":make"]
    )
    def test_what_cannot_be_imported(self, factories, name):  # noqa: ARG002
        """The message names what was asked for."""
        with pytest.raises(ModelError, match=f"'{name}'"):
            make(name)

    def test_what_is_not_callable(self):
        """A constant is no factory."""
        with pytest.raises(ModelError, match=r"'math:pi' is a float"):
            make("math:pi")

    def test_what_is_no_network(self, factories):
        """The message says what came."""
        factories.make = lambda: 3
        with pytest.raises(ModelError, match=r"returned int, expected a torch\.nn\.Module"):
            make("somebodys:make")

    @pytest.mark.parametrize("options", [{"width": [3]}, {"n_classes_": 3}])
    def test_options_that_it_does_not_take(self, options):
        """The message names the wrong option and those that there are."""
        with pytest.raises(ModelError, match=f"'{next(iter(options))}'.*takes widths"):
            make("fully_connected", options=options)


class TestCheckOutputs:
    def test_the_wrong_number_of_outputs(self):
        """The message holds both shapes."""
        with pytest.raises(ModelError, match=r"'mine'.*\(2, 3\).*2 examples.*10 classes"):
            check_outputs(nn.Linear(4, 3), torch.randn(2, 4), 10, "mine")

    def test_several_outputs(self):
        """A tuple is named as such."""
        with pytest.raises(ModelError, match="tuple"):
            check_outputs(nn.LSTM(4, 3), torch.randn(2, 4), 3, "mine")

    @pytest.mark.parametrize(
        "model",
        [nn.Linear(5, 3), nn.BatchNorm2d(4), nn.Bilinear(4, 4, 3), nn.Embedding(3, 3)],
        ids=lambda model: type(model).__name__,
    )
    def test_inputs_that_do_not_fit(self, model):
        """Whatever the layer raises, the message holds the network's name and the shape."""
        with pytest.raises(ModelError, match=r"'mine'.*\(2, 4\)"):
            check_outputs(model, torch.randn(2, 4), 3, "mine")

    def test_the_network_is_left_in_its_mode(self):
        """It is tried in evaluation mode, and put back."""
        model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
        before = model[0].running_mean.clone()
        check_outputs(model, torch.randn(2, 4), 3, "mine")

        assert model.training
        assert torch.equal(model[0].running_mean, before)
