"""Models of transformers and timm, small, as their configurations build them.

What is true is autograd on one example at a time, in float64. A model whose code cannot run in
float64, or that keeps tables while evaluating, is built again in a form that can and keeps none.

Axis letters: N examples, T positions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from field_truth import assert_cosines, class_loss, one_at_a_time_at_most, taken, true_cosines
from torch import Tensor, nn

from distributed_stiffness import cosine_matrix

N, VOCABULARY, CLASSES = 16, 40, 3
LABELS = torch.arange(N) % CLASSES
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_labels": CLASSES,
    "pad_token_id": 0,
}
DECODER = SMALL | {"intermediate_size": 24, "num_key_value_heads": 1}


def texts(longest: int = 7) -> dict[str, Tensor]:
    """Padded token ids and their mask."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(3, longest + 1, (N,), generator=generator)
    ids = torch.randint(1, VOCABULARY, (N, longest), generator=generator)
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def pictures(size: int) -> Tensor:
    return torch.randn(N, 3, size, size, generator=torch.Generator().manual_seed(4))


def of_pictures(size: int) -> Callable[[], Any]:
    return lambda: {"pixel_values": pictures(size)}


def sounds() -> dict[str, Tensor]:
    return {"input_values": torch.randn(N, 200, generator=torch.Generator().manual_seed(5))}


def translated() -> dict[str, Tensor]:
    ids = texts()
    return ids | {"decoder_input_ids": ids["input_ids"][:, :5] * 0 + torch.arange(1, 6)}


def spoken() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(6)
    return {
        "input_features": torch.randn(N, 8, 16, generator=generator),
        "decoder_input_ids": torch.randint(1, VOCABULARY, (N, 4), generator=generator),
    }


def last_token(outputs: Any, targets: Tensor) -> Tensor:
    """Cross-entropy of the next token: a callable loss of a network's own outputs."""
    logits = getattr(outputs, "logits", outputs)
    return nn.functional.cross_entropy(logits[:, -1, :CLASSES], targets, reduction="none")


def experts(**own: Any) -> dict[str, Any]:
    """How a model computes in float64: grouped products have no such numbers."""
    return {"experts_implementation": "eager"} | own


@dataclass(frozen=True)
class Model:
    """A model's classes, what it is configured with, and its inputs.

    Args:
        name: what stands before Config and the head's name.
        how: of the configuration.
        inputs: makes them.
        head: what stands behind.
        loss: what the product is given.
        exact: what else the configuration of the true network has.
    """

    name: str
    how: dict[str, Any]
    inputs: Callable[[], Any] = texts
    head: str = "ForSequenceClassification"
    loss: Any = "cross_entropy"
    exact: dict[str, Any] | None = None

    def build(self, **own: Any) -> nn.Module:
        torch.manual_seed(2)
        config = getattr(transformers, f"{self.name}Config")(**self.how, **own)
        net = getattr(transformers, f"{self.name}{self.head}")(config).eval()
        with torch.no_grad():  # as far from the initial values as a trained one
            for p in net.parameters():
                p.add_(torch.randn_like(p) * 0.1)
        return net


MODELS = {
    "Mixtral": Model(
        "Mixtral", DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2}, exact=experts()
    ),
    "Qwen2-MoE": Model(
        "Qwen2Moe",
        DECODER
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
        | {"shared_expert_intermediate_size": 8},
        exact=experts(),
    ),
    "OLMoE": Model(
        "Olmoe",
        DECODER | {"num_experts": 4, "num_experts_per_tok": 2},
        head="ForCausalLM",
        loss=last_token,
        exact=experts(),
    ),
    "Llama": Model("Llama", DECODER),
    "Gemma": Model("Gemma", DECODER | {"head_dim": 8}),
    "GPT-2": Model(
        "GPT2",
        {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 12}
        | {"num_labels": CLASSES, "pad_token_id": 0},
    ),
    "BERT": Model("Bert", SMALL | {"intermediate_size": 24, "max_position_embeddings": 12}),
    "T5": Model(
        "T5",
        {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1}
        | {"num_heads": 2, "decoder_start_token_id": 0, "pad_token_id": 0},
        translated,
        "ForConditionalGeneration",
        last_token,
    ),
    "ViT": Model(
        "ViT",
        {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2}
        | {"num_attention_heads": 2, "intermediate_size": 24, "num_labels": CLASSES},
        of_pictures(8),
        "ForImageClassification",
    ),
    "Swin": Model(
        "Swin",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2]}
        | {"window_size": 4, "num_labels": CLASSES},
        of_pictures(16),
        "ForImageClassification",
    ),
    "Whisper": Model(
        "Whisper",
        {"vocab_size": VOCABULARY, "num_mel_bins": 8, "d_model": 16, "encoder_layers": 1}
        | {"decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        | {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_source_positions": 8}
        | {"max_target_positions": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        | {"decoder_start_token_id": 1},
        spoken,
        "ForConditionalGeneration",
        last_token,
    ),
    "Wav2Vec2": Model(
        "Wav2Vec2",
        {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"intermediate_size": 24, "conv_dim": (8, 8), "conv_stride": (5, 2)}
        | {"conv_kernel": (10, 3), "num_conv_pos_embeddings": 4, "num_feat_extract_layers": 2}
        | {"num_conv_pos_embedding_groups": 2, "num_labels": CLASSES}
        | {"classifier_proj_size": 8},
        sounds,
    ),
    "Mamba": Model(
        "Mamba",
        {"vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 1, "state_size": 4}
        | {"time_step_rank": 2, "pad_token_id": 0},
        lambda: {"input_ids": texts()["input_ids"]},
        "ForCausalLM",
        last_token,
    ),
}


class TestModelsOfTransformers:
    @pytest.mark.parametrize("name", MODELS)
    def test_as_it_comes(self, name):
        """As its configuration builds it, nothing chosen for us."""
        self.compare(name, torch.arange(N))

    @pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name].inputs is texts])
    def test_short_texts_first(self, name):
        """Texts in the order of their lengths."""
        sizes = texts()["attention_mask"].sum(1)
        self.compare(name, sizes.argsort(stable=True))

    def compare(self, name: str, order: Tensor) -> None:
        model = MODELS[name]
        net, inputs = model.build(), taken(model.inputs(), order)
        targets = LABELS[order]
        exact = model.build(**(model.exact or {}))
        value = class_loss

        if model.loss is last_token:

            def value(wide: nn.Module, one: Any, target: Tensor) -> Tensor:
                return last_token(wide(**one), target)

        true = true_cosines(exact, inputs, targets, value)
        with one_at_a_time_at_most():
            got = cosine_matrix(net, model.loss, (inputs, targets))
            assert_cosines(got, true)


# timm


def twice(wide: nn.Module, one: Tensor, target: Tensor) -> Tensor:
    """Half the loss of an example beside its copy.

    The backward pass of torch's BatchNorm2d on a CPU takes the gradient of a batch of one for
    channels-last where it is not, if tokens are made of its output (torch 2.14). A batch of two
    is right.
    """
    return class_loss(wide, torch.cat([one, one]), torch.cat([target, target])) / 2


class Stem(nn.Module):
    """A convolution with BatchNorm before tokens and their norm, as stems of transformers have."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.n = nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4)
        self.t, self.a, self.l = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.t(self.n(self.c(x)).flatten(2).transpose(1, 2))
        return self.l(self.a(tokens).tanh().mean(1))


class TestTokensBehindBatchNorm:
    """Where torch's own gradient of a batch of one is wrong, ours is not."""

    @pytest.mark.parametrize("check", [True, False])
    def test_cosines(self, check):
        """Right to rounding, however many examples a batch has."""
        net, x = Stem().eval(), pictures(9)
        with one_at_a_time_at_most():
            got = cosine_matrix(net, "cross_entropy", (x, LABELS), check=check)
            assert_cosines(got, true_cosines(net, x, LABELS, twice))

    def test_one_query(self):
        """A batch of one."""
        net, x = Stem().eval(), pictures(9)
        with one_at_a_time_at_most():
            got = cosine_matrix(net, "cross_entropy", (x[:1], LABELS[:1]), others=(x, LABELS))
            assert_cosines(got, true_cosines(net, x, LABELS, twice)[:1])


def smallest(name: str) -> nn.Module:
    """A small network of timm whose attention keeps its biases while evaluating."""
    import timm
    from timm.models import efficientformer, levit, tiny_vit

    if name == "levit":
        return levit.Levit(
            img_size=32, num_classes=CLASSES, embed_dim=(16, 24), key_dim=8, depth=(1, 1),
            num_heads=(2, 2), stem_type="s8",
        )  # fmt: skip
    if name == "efficientformer":
        return efficientformer.EfficientFormer(
            depths=(1, 1, 1, 1), embed_dims=(8, 8, 16, 16), num_classes=CLASSES, num_vit=1
        )
    if name == "tiny_vit":
        return tiny_vit.TinyVit(
            num_classes=CLASSES, embed_dims=(8, 16, 16, 16), depths=(1, 1, 1, 1),
            num_heads=(1, 2, 2, 2), window_sizes=(4, 4, 4, 4), drop_path_rate=0.0,
        )  # fmt: skip
    if name == "beit":
        return timm.models.beit.Beit(
            img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=CLASSES,
            use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.1,
        )  # fmt: skip
    return timm.models.swin_transformer.SwinTransformer(
        img_size=16, patch_size=2, embed_dim=8, depths=(2, 1), num_heads=(2, 2), window_size=4,
        num_classes=CLASSES,
    )  # fmt: skip


def size_of(name: str) -> int:
    return {"levit": 32, "efficientformer": 224, "tiny_vit": 64}.get(name, 16)


@pytest.mark.parametrize("validated", [False, True], ids=["fresh", "validated"])
@pytest.mark.parametrize("name", ["levit", "efficientformer", "tiny_vit", "beit", "swin"])
class TestNetworksOfTimm:
    def test_biases_that_are_kept(self, name, validated):
        """The biases of attention have their gradient, kept by a validation or not."""
        torch.manual_seed(2)
        net = smallest(name).eval()
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p) * 0.1)
        exact = copy.deepcopy(net).double()
        for module in exact.modules():
            if hasattr(module, "attention_bias_cache"):
                module.training = True  # keeps nothing
        x = pictures(size_of(name))
        true = true_cosines(exact, x, LABELS, twice)
        if validated:
            with torch.no_grad():
                net(x)
        with one_at_a_time_at_most():
            got = cosine_matrix(net, "cross_entropy", (x, LABELS))
            assert_cosines(got, true)
