"""Networks that people use, small, against one-example autograd in float64.

Nothing of the package is used for what is expected. Weights are random: nothing is downloaded.

Axis letters: N examples, T tokens, V words, d features.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from distributed_stiffness.errors import ModelError
from distributed_stiffness.gradients import PerExampleGradients, WholeLoss, cosine_matrix
from distributed_stiffness.gradients.gram import cosine

N = 5
CLASSES = 4
# The promise on a float32 cosine.
FLOAT32 = 2e-6
# EfficientNet in float32: 4.1e-6 in every form, and 3.7e-6 by torch's own autograd one by one.
EFFICIENT = 5e-6
# Rows and products in float32, the passes in float64.
FLOAT64 = 7e-7


# What is expected


def take(nest: Any, i: int) -> Any:
    """Example i of a tensor, a tuple or a dict, its numbers in float64."""
    if isinstance(nest, Mapping):
        return {key: take(value, i) for key, value in nest.items()}
    if isinstance(nest, tuple):
        return tuple(take(value, i) for value in nest)
    one = nest[i : i + 1]
    return one.double() if one.is_floating_point() else one


def run(model: nn.Module, inputs: Any) -> Any:
    """The network on a tensor, or on arguments by name."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def expected_gradients(model: nn.Module, value: Callable, inputs: Any, targets: Any) -> dict:
    """`value(model, inputs, targets)`, one number, of one example after the other: (N, *shape)."""
    model = copy.deepcopy(model).double()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = {name: p.new_empty(N, *p.shape) for name, p in parameters.items()}
    for i in range(N):
        one = value(model, take(inputs, i), take(targets, i))
        found = torch.autograd.grad(one, list(parameters.values()))
        for name, gradient in zip(parameters, found, strict=True):
            rows[name][i] = gradient
    return rows


def expected_cosines(gradients: Mapping[str, Tensor]) -> Tensor:
    """Products over all parameters, divided by both norms."""
    gram = sum(g.flatten(1) @ g.flatten(1).T for g in gradients.values())
    length = gram.diagonal().sqrt()
    assert (length > 0).all()
    return gram / torch.outer(length, length)


# Losses: for the package, and as one number for one example


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over the tokens of a text that are not padding (−100)."""
    loss = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100, reduction="none")
    return loss.sum(1) / (targets != -100).sum(1)


def token_loss_of_logits(outputs: Any, targets: Tensor) -> Tensor:
    return token_loss(outputs.logits, targets)


def plain(loss: Callable[[Any, Any], Tensor]) -> Callable[..., Tensor]:
    return lambda model, inputs, targets: loss(run(model, inputs), targets).sum()


def cross_entropy(outputs: Any, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs if isinstance(outputs, Tensor) else outputs.logits, targets)


# Networks


def settled(model: nn.Module, *size: int) -> nn.Module:
    """Away from initial values: ones and zeros hide mistakes, and statistics fit no data.

    Running statistics are taken from a batch, so that deep networks keep their activations.
    """
    statistics = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("layer_scale"):
                p.uniform_(0.5, 1.5)
            elif p.dim() == 1:
                p.add_(0.1 * torch.randn_like(p))
        if statistics:
            for norm in statistics:
                norm.momentum = 1.0
            model.train()(torch.randn(16, *size))
    return model.eval()


def torchvision_model(name: str, size: int) -> nn.Module:
    build = getattr(torchvision.models, name)
    return settled(build(weights=None, num_classes=CLASSES), 3, size, size)


def vision_transformer() -> nn.Module:
    model = torchvision.models.VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=3,
        num_heads=4,
        hidden_dim=32,
        mlp_dim=64,
        num_classes=CLASSES,
    )
    nn.init.normal_(model.heads.head.weight, std=0.2)  # zero at first: so would be the gradients
    nn.init.normal_(model.class_token, std=0.2)
    return settled(model)


def swin_transformer(**options: Any) -> nn.Module:
    return settled(
        torchvision.models.SwinTransformer(
            patch_size=[2, 2],
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=[4, 4],
            num_classes=CLASSES,
            **options,
        )
    )


class DecoderLayer(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(d), nn.RMSNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d)
        self.wide, self.narrow = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x_NTd: Tensor) -> Tensor:
        n, t, d = x_NTd.shape
        split = self.qkv(self.first(x_NTd)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*split, is_causal=True)
        x_NTd = x_NTd + self.out(mixed.transpose(1, 2).reshape(n, t, d))
        return x_NTd + self.narrow(F.gelu(self.wide(self.second(x_NTd))))


class Decoder(nn.Module):
    """A language model: pre-norm layers, causal attention, the embedding as the head's weight."""

    def __init__(self, words: int = 17, length: int = 10, d: int = 24, layers: int = 3) -> None:
        super().__init__()
        self.word, self.position = nn.Embedding(words, d), nn.Parameter(torch.randn(length, d))
        self.layers = nn.Sequential(*(DecoderLayer(d, 4) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, words, bias=False)
        self.head.weight = self.word.weight

    def forward(self, tokens_NT: Tensor) -> Tensor:
        x_NTd = self.word(tokens_NT) + self.position[: tokens_NT.shape[1]]
        return self.head(self.norm(self.layers(x_NTd)))


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
        num_labels=CLASSES,
    )
    return settled(transformers.BertForSequenceClassification(config))


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=30,
        n_positions=16,
        n_embd=24,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return settled(transformers.GPT2LMHeadModel(config))


def llama() -> nn.Module:
    """RMS norms and rotary positions compute in float32, whatever the network's precision."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=30,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
        use_cache=False,
    )
    return settled(transformers.LlamaForCausalLM(config))


def mixtral() -> nn.Module:
    """Each token chooses two of four experts: data decide which weights meet it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=30,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        num_local_experts=4,
        experts_implementation="eager",
        use_cache=False,
    )
    return settled(transformers.MixtralForCausalLM(config))


# Examples


def images(size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(N, 3, size, size), torch.tensor([0, 2, 1, 3, 2])


def texts(words: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, which of them are there, and the next token of each (−100 where there is none)."""
    tokens = torch.randint(1, words, (N, length))
    there = torch.arange(length) < torch.tensor([length, 5, length - 1, 3, 7]).unsqueeze(1)
    tokens = tokens * there
    following = torch.full_like(tokens, -100)
    following[:, :-1] = torch.where(there[:, 1:], tokens[:, 1:], -100)
    return tokens, there.long(), following


def masked_texts(words: int, length: int) -> tuple[dict[str, Tensor], Tensor]:
    tokens, there, following = texts(words, length)
    return {"input_ids": tokens, "attention_mask": there}, following


def classified_texts(words: int, length: int) -> tuple[dict[str, Tensor], Tensor]:
    inputs, _ = masked_texts(words, length)
    return inputs, torch.tensor([0, 2, 1, 3, 2])


of_a_class = plain(cross_entropy)


@dataclass(frozen=True)
class Case:
    """A network, its examples and its loss, for the package and as one number of an example."""

    name: str
    model: Callable[[], nn.Module]
    examples: Callable[[], tuple[Any, Any]]
    loss: Any = "cross_entropy"
    value: Callable[..., Tensor] = of_a_class
    float32: float = FLOAT32


def vision(name: str, size: int, **options: Any) -> Case:
    return Case(
        name,
        functools.partial(torchvision_model, name, size),
        functools.partial(images, size),
        **options,
    )


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """Mean loss of a text, as the network is called by its user."""
    inputs, targets = batch
    return token_loss(model(**inputs).logits, targets)


CASES = [
    vision("resnet18", 32),
    vision("mobilenet_v3_small", 32),
    vision("efficientnet_b0", 32, float32=EFFICIENT),
    vision("convnext_tiny", 32),
    Case("vision transformer", vision_transformer, functools.partial(images, 32)),
    Case("swin transformer", swin_transformer, functools.partial(images, 32)),
    Case(
        "decoder with tied embeddings",
        Decoder,
        lambda: texts(17, 9)[::2],
        token_loss,
        plain(token_loss),
    ),
    Case("BERT", bert, functools.partial(classified_texts, 30, 9)),
    Case(
        "GPT-2",
        gpt2,
        functools.partial(masked_texts, 30, 9),
        token_loss_of_logits,
        plain(token_loss_of_logits),
    ),
    Case(
        "Llama",
        llama,
        functools.partial(masked_texts, 30, 9),
        token_loss_of_logits,
        plain(token_loss_of_logits),
    ),
    Case(
        "GPT-2 with a whole loss",
        gpt2,
        functools.partial(masked_texts, 30, 9),
        WholeLoss(own_loss),
        lambda model, inputs, targets: own_loss(model, (inputs, targets)).sum(),
    ),
]


@pytest.mark.filterwarnings("ignore:a WholeLoss")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_network_that_people_use(case):
    """Every parameter has a rule, and every cosine is that of autograd, whatever the form."""
    model, examples = case.model(), case.examples()
    expected = expected_cosines(expected_gradients(model, case.value, *examples))

    gradients = PerExampleGradients(model, case.loss, examples)
    recipe = gradients.recipe
    assert recipe.functional == recipe.one_by_one == recipe.unused == ()
    found = cosine_matrix(model, case.loss, examples)
    assert abs(found.values - expected.numpy()).max() <= case.float32
    for chosen in (tuple(recipe.layers), ()):
        rows = gradients.with_factored(chosen).rows(*examples)
        assert abs(cosine(rows, rows) - expected).max() <= case.float32


class TestBeyondTheRules:
    def test_biases_that_are_cut_in_place(self):
        """Swin v2 zeroes a part of a copy of its biases: those go one at a time, with a warning."""
        model = swin_transformer(
            block=torchvision.models.swin_transformer.SwinTransformerBlockV2,
            downsample_layer=torchvision.models.swin_transformer.PatchMergingV2,
        )
        examples = images(16)
        expected = expected_cosines(expected_gradients(model, of_a_class, *examples))

        with pytest.warns(UserWarning, match="one example at a time"):
            gradients = PerExampleGradients(model, "cross_entropy", examples)
        recipe = gradients.recipe
        assert recipe.functional == ()
        assert all(name.endswith("attn.qkv.bias") for name in recipe.one_by_one)
        rows = gradients.rows(*examples)
        assert abs(cosine(rows, rows) - expected).max() <= FLOAT32

    def test_experts_that_tokens_choose(self):
        """The experts of Mixtral go one example at a time, with a warning; all else by rules."""
        model, examples = mixtral(), masked_texts(30, 9)
        value = plain(token_loss_of_logits)
        expected = expected_cosines(expected_gradients(model, value, *examples))

        with pytest.warns(UserWarning, match="one example at a time"):
            gradients = PerExampleGradients(model, token_loss_of_logits, examples)
        assert all(".mlp.experts." in name for name in gradients.recipe.one_by_one)
        assert len(gradients.recipe.one_by_one) == 2
        rows = gradients.rows(*examples)
        assert abs(cosine(rows, rows) - expected).max() <= FLOAT32

    def test_digits_that_float32_loses(self, monkeypatch):
        """In DenseNet-121 float32 flips ReLUs, as torch's own does: they are found.

        Were they not, the bound would say so. In float64 the same cosines keep their digits.
        """
        model, examples = torchvision_model("densenet121", 32), images(32)
        expected = expected_cosines(expected_gradients(model, of_a_class, *examples))

        found = cosine_matrix(model, "cross_entropy", examples)
        assert abs(found.values - expected.numpy()).max() <= FLOAT32
        with monkeypatch.context() as blind:
            blind.setattr(PerExampleGradients, "_mend", lambda *_, **__: None)
            flipped = cosine_matrix(model, "cross_entropy", examples)
        error = abs(flipped.values - expected.numpy()).max()
        assert FLOAT32 < error <= flipped.attrs["error_bound"]
        exact = cosine_matrix(model, "cross_entropy", examples, precision="float64")
        assert abs(exact.values - expected.numpy()).max() <= FLOAT64


@pytest.mark.filterwarnings("ignore:a WholeLoss")
def test_a_loss_of_the_whole_batch_is_refused():
    """A network's own loss is a mean over the batch, and no example's."""

    def mean_loss(model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = batch
        return model(**inputs, labels=targets).loss

    with pytest.raises(ModelError, match="one number an example"):
        cosine_matrix(gpt2(), WholeLoss(mean_loss), masked_texts(30, 9))


@pytest.mark.filterwarnings("ignore:a WholeLoss")
def test_inputs_alone():
    """A whole loss needs no targets: the batch is then the inputs."""

    def next_token_loss(model: nn.Module, batch: Any) -> Tensor:
        return token_loss(model(**batch).logits[:, :-1], batch["input_ids"][:, 1:])

    model, (inputs, _) = gpt2(), masked_texts(30, 9)
    gradients = expected_gradients(
        model, lambda model, inputs, _: next_token_loss(model, inputs).sum(), inputs, inputs
    )

    found = cosine_matrix(model, WholeLoss(next_token_loss), (inputs, None))
    assert abs(found.values - expected_cosines(gradients).numpy()).max() <= FLOAT32
