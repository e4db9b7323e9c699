"""Stores made from random gradients with class structure, so that their cosines are real ones."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

TILE = 16


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """What a made-up study holds."""

    n_examples: int = 48
    n_classes: int = 4
    n_superclasses: int = 0
    n_train: int = 0  # how many of the examples are of the training split
    learning_rates: Sequence[float] = (1e-3,)
    seeds: Sequence[int] = (0,)
    iterations: Sequence[int] = (0, 100)
    n_parameters: int = 24
    zero_gradients: Sequence[int] = ()  # examples without a gradient, at every checkpoint
    random_seed: int = 0

    def build(self) -> xr.Dataset:
        """Return the store's content, in memory."""
        random = np.random.default_rng(self.random_seed)
        labels = _labels(self, random)
        inputs = _inputs(self, labels, random)
        gradients = _gradients(self, labels, inputs, random)
        norms = np.linalg.norm(gradients, axis=-1)
        units = gradients / np.where(norms == 0, 1, norms)[..., None]
        cosine = np.clip(units @ np.swapaxes(units, -1, -2), -1, 1)
        run = ("learning_rate", "seed", "iteration")
        return xr.Dataset(
            {
                "cosine": ((*run, "example", "other"), cosine.astype(np.float32)),
                "gradient_norm": ((*run, "example"), norms),
                "loss": ((*run, "example"), norms**2),
                "correct": ((*run, "example"), random.random(norms.shape) < 0.8),
                "distance": (("example", "other"), (1 - inputs @ inputs.T).astype(np.float32)),
                **{name: (run, values) for name, values in _curves(self).items()},
                "error_bound": (run, np.full(norms.shape[:-1], 1e-6)),
                "undecided": (run, np.zeros(norms.shape[:-1], dtype=np.int64)),
            },
            coords=_coordinates(self, labels),
            attrs=_attrs(self),
        )


def write(ds: xr.Dataset, path: Path, tile: int = TILE) -> Path:
    """Write a store whose chunks are single tiles, without those that are all NaN."""
    chunks = {dim: tile if dim in ("example", "other") else 1 for dim in ds["cosine"].dims}
    encoding = {
        name: {"chunks": tuple(chunks[dim] for dim in ds[name].dims)} for name in ds.data_vars
    }
    return saved(ds, path, mode="w", encoding=encoding, consolidated=True)


def saved(ds: xr.Dataset, path: Path, **options: Any) -> Path:
    """Save a Dataset as anybody does; zarr 3.1 warns of parts of the format specified since."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        warnings.filterwarnings("ignore", message=r"The data type \(FixedLengthUTF32")
        ds.to_zarr(path, **{"zarr_format": 3, "consolidated": False} | options)
    return path


def class_names(n: int) -> list[str]:
    """Names whose alphabetical order is not the class order."""
    return [f"class {chr(ord('z') - k)}" if n <= 26 else f"class {n - k}" for k in range(n)]


def _labels(made: Synthetic, random: np.random.Generator) -> np.ndarray:
    labels = np.arange(made.n_examples) % made.n_classes
    return np.concatenate(
        [random.permutation(labels[: made.n_train]), random.permutation(labels[made.n_train :])]
    )


def _gradients(
    made: Synthetic, labels: np.ndarray, inputs: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """A class direction that fades, one for each super-class, one for the input, and noise."""
    shape = (len(made.learning_rates), len(made.seeds), len(made.iterations))
    size = (made.n_parameters,)
    classes = random.standard_normal((made.n_classes, *size))
    above = random.standard_normal((max(made.n_superclasses, 1), *size))
    of_inputs = inputs @ random.standard_normal((inputs.shape[1], *size))
    gradients = random.standard_normal((*shape, made.n_examples, *size))
    for at in np.ndindex(shape):
        progress = (at[2] + 1) / shape[2]
        strength = 1.5 / (1 + at[0]) * (1 - 0.6 * progress)
        gradients[at] += strength * classes[labels] + 1.5 * progress * of_inputs
        if made.n_superclasses:
            gradients[at] += 1.2 * progress * above[_above(made)[labels]]
    gradients *= np.exp(random.standard_normal((*shape, made.n_examples, 1)))
    gradients[..., list(made.zero_gradients), :] = 0
    return gradients


def _inputs(made: Synthetic, labels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    centres = random.standard_normal((made.n_classes, 30))
    inputs = 0.9 * centres[labels] + random.standard_normal((made.n_examples, 30))
    return np.asarray(inputs / np.linalg.norm(inputs, axis=1, keepdims=True))


def _curves(made: Synthetic) -> dict[str, np.ndarray]:
    shape = (len(made.learning_rates), len(made.seeds), len(made.iterations))
    fitted = np.log1p(np.asarray(made.iterations, dtype=float)) / 10
    rate = 1 + 0.3 * np.arange(shape[0])[:, None, None] + 0.05 * np.arange(shape[1])[:, None]
    train = np.broadcast_to(2.3 * np.exp(-rate * fitted * 2.5), shape)
    validation = train + 0.25 * fitted**2
    return {
        "train_loss": train,
        "train_accuracy": 1 - 0.9 * train / 2.3,
        "validation_loss": validation,
        "validation_accuracy": 0.95 - 0.85 * train / 2.3,
    }


def _above(made: Synthetic) -> np.ndarray:
    """The super-class of each class: classes that follow each other are in different ones."""
    return np.arange(made.n_classes) % max(made.n_superclasses, 1)


def _text(values: Sequence[str]) -> np.ndarray:
    out = np.empty(len(values), dtype=object)
    out[:] = list(values)
    return out


def _coordinates(made: Synthetic, labels: np.ndarray) -> dict[str, object]:
    names = class_names(made.n_classes)
    index = np.arange(made.n_examples)
    split = ["train"] * made.n_train + ["validation"] * (made.n_examples - made.n_train)
    coordinates: dict[str, object] = {
        "learning_rate": list(made.learning_rates),
        "seed": list(made.seeds),
        "iteration": list(made.iterations),
        "epoch": ("iteration", np.asarray(made.iterations) / 40),
    }
    for dim, prefix in (("example", ""), ("other", "other_")):
        coordinates[dim] = index
        coordinates[f"{prefix}label"] = (dim, labels)
        coordinates[f"{prefix}class_name"] = (dim, _text([names[k] for k in labels]))
        coordinates[f"{prefix}split"] = (dim, _text(split))
        if made.n_superclasses:
            above = _above(made)[labels]
            coordinates[f"{prefix}superclass"] = (dim, above)
            coordinates[f"{prefix}superclass_name"] = (dim, _text([f"group {k}" for k in above]))
    return coordinates


def _attrs(made: Synthetic) -> dict[str, object]:
    attrs: dict[str, object] = {
        "schema_version": 1,
        "title": "Synthetic study",
        "dataset": "synthetic",
        "model": "none: random gradients",
        "study": json.dumps({"title": "Synthetic study", "training": {"optimizer": "adam"}}),
        "fingerprint": {"data": "0"},
        "preprocessing": "Each input is scaled to unit norm.",
        "class_names": json.dumps(class_names(made.n_classes)),
        "versions": {"numpy": np.__version__},
        "git_revision": "0" * 40,
        "created": "2024-01-01T00:00:00+00:00",
        "finished": "2024-01-01T00:10:00+00:00",
    }
    if made.n_superclasses:
        attrs["superclass_names"] = json.dumps([f"group {k}" for k in range(made.n_superclasses)])
    return attrs
