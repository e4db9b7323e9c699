"""The data of one study: training and validation splits as they are trained on, and the examples
whose pairs are computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from distributed_stiffness.data.catalogue import load
from distributed_stiffness.data.examples import LabelledData, Split
from distributed_stiffness.data.labels import permute_labels, require_every_class, subset
from distributed_stiffness.data.preprocessing import AsGiven, Preprocessing
from distributed_stiffness.errors import DataError
from distributed_stiffness.paths import Location
from distributed_stiffness.progress import Progress
from distributed_stiffness.study import Data


@dataclass(frozen=True, kw_only=True)
class StudyData:
    """What training runs and replicas need; raw inputs, normalised a batch at a time."""

    labelled: LabelledData  # training labels permuted where the study says so
    preprocessing: Preprocessing | AsGiven
    examples: Split  # in the order of the store: training examples, then validation examples
    split: tuple[str, ...]  # "train" or "validation" of each example
    index: np.ndarray  # position of each example in its split, int64

    @property
    def n_examples(self) -> int:
        """N."""
        return len(self.examples.labels)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays; the examples may be copies."""
        splits = (self.labelled.train, self.labelled.validation, self.examples)
        return sum(s.inputs.nbytes + s.labels.nbytes for s in splits if s is not None)

    @property
    def n_train(self) -> int:
        """Training examples that there are."""
        return 0 if self.labelled.train is None else len(self.labelled.train)

    def inputs(self, examples: slice | np.ndarray) -> np.ndarray:
        """Return inputs as the network sees them: float32, unless they are whole numbers."""
        return self.preprocessing(self.examples.inputs[examples])

    def features(self, examples: slice | np.ndarray) -> np.ndarray:
        """Return inputs as vectors, (n, ...) float32, for distances; several side by side."""
        X = self.inputs(examples)
        parts = [X[name] for name in X.dtype.names] if X.dtype.names else [X]
        flat = [part.reshape(len(part), -1).astype(np.float32, copy=False) for part in parts]
        return flat[0] if len(flat) == 1 else np.concatenate(flat, axis=1)

    @cached_property
    def training_hash(self) -> str:
        """Hash of all that training sees; taken once, of up to hundreds of megabytes."""
        return self.labelled.content_hash()

    def content_hash(self) -> str:
        """Return a hash of the examples, in order, and of all that training sees."""
        digest = hashlib.sha256(self.training_hash.encode())
        digest.update(",".join(self.split).encode())
        digest.update(np.ascontiguousarray(self.index).tobytes())
        return digest.hexdigest()


def select(
    data: Data,
    *,
    directory: Location | None = None,
    download: bool = True,
    every_class: bool = True,
    progress: Progress | None = None,
) -> StudyData:
    """Load a data set and draw the examples of a study.

    `every_class`: it is refused that a class has no example.

    Raises:
        DataError: the data are missing or broken, more examples are asked for than there are, or
            a class has no example.
    """
    labelled = load(
        data.name,
        directory=directory,
        download=download,
        accept_unverified=data.accept_unverified,
        options=data.options,
        progress=progress,
    )
    _require_training_split(data, labelled)
    if data.permuted_labels and labelled.train is not None:
        labels = permute_labels(
            labelled.train.labels, seed=data.permutation_seed, share=data.permuted_labels
        )
        labelled = replace(labelled, train=replace(labelled.train, labels=labels))
    n_classes = len(labelled.class_names)
    parts: list[tuple[str, Split, np.ndarray]] = []
    for name, option, split, wanted in (
        ("train", "--train-examples", labelled.train, data.train_examples),
        ("validation", "--examples", labelled.validation, data.validation_examples),
    ):
        if wanted == 0 or split is None:
            continue
        chosen, index = subset(
            split,
            wanted,
            seed=data.sample_seed,
            n_classes=n_classes,
            every_class=every_class,
            where=f"{name} split",
            option=option,
        )
        if every_class:
            require_every_class(chosen.labels, labelled.class_names, where=f"{name} examples")
        parts.append((name, chosen, index))
    return StudyData(
        labelled=labelled,
        preprocessing=_preprocessing(data, labelled),
        examples=_joined([part for _, part, _ in parts]),
        split=tuple(name for name, part, _ in parts for _ in part.labels),
        index=np.concatenate([index for _, _, index in parts]).astype(np.int64),
    )


def _preprocessing(data: Data, labelled: LabelledData) -> Preprocessing | AsGiven:
    if not data.standardise or labelled.train is None:
        return AsGiven()
    return Preprocessing.fit(labelled.train, unit_norm=data.unit_norm)


def _require_training_split(data: Data, labelled: LabelledData) -> None:
    """Refuse what needs a training split where there is none."""
    if labelled.train is not None:
        return
    wanting = {
        "to standardise inputs": data.standardise,
        f"{data.train_examples:,} training examples": data.train_examples > 0,
        "permuted training labels": data.permuted_labels > 0,
    }
    for what, wanted in wanting.items():
        if wanted:
            raise DataError(
                f"{labelled.name} has no training split, which is needed {_for(what)}: give"
                " 'train' too, or leave that out"
            )


def _for(what: str) -> str:
    return what if what.startswith("to ") else f"for {what}"


def _joined(splits: Sequence[Split]) -> Split:
    if len(splits) == 1:
        return splits[0]
    return Split(
        inputs=np.concatenate([s.inputs for s in splits]),
        labels=np.concatenate([s.labels for s in splits]),
    )
