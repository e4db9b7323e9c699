"""What a researcher has who never read this package: a network, data, a loss, a text classifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

N, FEATURES, CLASSES, TOKENS, LENGTH = 24, 6, 3, 11, 5


def build(width: int = 8) -> nn.Module:
    """Six features, three classes."""
    return nn.Sequential(nn.Linear(FEATURES, width), nn.Tanh(), nn.Linear(width, CLASSES))


def validation(n: int = N) -> tuple[Tensor, Tensor]:
    """The same examples each time."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, FEATURES, generator=generator), torch.arange(n) % CLASSES


def as_dataset() -> Dataset[tuple[Tensor, ...]]:
    """The same, one by one."""
    return TensorDataset(*validation())


def both_splits() -> dict[str, object]:
    """With a training split, and names."""
    x, y = validation(60)
    return {
        "train": (x[N:], y[N:]),
        "validation": (x[:N], y[:N]),
        "class_names": ["red", "green", "blue"],
    }


def smoothed(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with smoothed labels, one number an example."""
    return nn.functional.cross_entropy(outputs, targets, reduction="none", label_smoothing=0.1)


class TextClassifier(nn.Module):
    """One layer of attention over token ids, and their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(N, T) -> (N, C)."""
        padding = None if attention_mask is None else attention_mask == 0
        h = self.layer(self.embed(input_ids), src_key_padding_mask=padding)
        keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        pooled = (h * keep.unsqueeze(2)).sum(1) / keep.sum(1, keepdim=True)
        outputs: Tensor = self.head(pooled)
        return outputs


def text() -> tuple[Tensor, Tensor]:
    """Token ids."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, TOKENS, (N, LENGTH), generator=generator)
    return ids, torch.arange(N) % CLASSES


def padded_text() -> tuple[dict[str, Tensor], Tensor]:
    """Token ids with a mask of what is text."""
    ids, labels = text()
    lengths = torch.arange(N) % (LENGTH - 2) + 3
    return {"input_ids": ids, "attention_mask": (torch.arange(LENGTH) < lengths[:, None]).long()}, (
        labels
    )


def weights(seed: int = 0, build=build) -> dict[str, Tensor]:
    """A state dict, as good as trained."""
    torch.manual_seed(seed)
    return build().state_dict()
