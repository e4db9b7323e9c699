"""A study: the frozen description of a run, checked when it is built.

What a study says can change a number, and is hashed into the store's fingerprint. Where and how it
runs (folders, replicas, memory) is in `Run` and is not.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from distributed_stiffness.errors import StudyError
from distributed_stiffness.tiling import Checkpoint

S = TypeVar("S", bound=BaseModel)
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Option = bool | int | float | str | list[int] | list[float]


def _rate(value: float, info: ValidationInfo) -> float:
    """Refuse a learning rate of 0 where the study trains; elsewhere it says: not given."""
    if value == NOT_GIVEN and not info.data.get("imported"):
        raise ValueError("Input should be greater than 0")
    return value


NOT_GIVEN = 0.0  # the learning rate of a checkpoint of which nobody said it; no training has it


def rate_in_words(learning_rate: float) -> str:
    """Write a learning rate for people."""
    return "not given" if learning_rate == NOT_GIVEN else f"{learning_rate:g}"


def named_values(name: str, *values: float) -> str:
    """Write learning rates, seeds or iterations with their name."""
    words = map(rate_in_words if name == "learning_rate" else str, values)
    return f"{name.replace('_', ' ')}{'s' if len(values) > 1 else ''} {', '.join(words)}"


def is_given(values: Sequence[float], *, trained_here: bool) -> bool:
    """Whether learning rates, seeds or steps were given, and so are said.

    Of networks that were trained elsewhere one that is 0, and the only one, was not: it says
    nothing, and tells nothing apart.
    """
    return trained_here or len(values) > 1 or values[0] != 0


Rate = Annotated[float, Field(ge=0, allow_inf_nan=False), AfterValidator(_rate)]

# Raised by one whenever the gradient code can give other numbers for the same study.
GRADIENT_ENGINE_VERSION = 9


class Frozen(BaseModel):
    """Immutable, and a misspelt field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Data(Frozen):
    """Which examples."""

    name: str = "digits"
    options: dict[str, Option] = Field(default_factory=dict)  # of what `name` calls or reads
    validation_examples: Annotated[int, Field(ge=0)] | None = None  # None: the whole split
    train_examples: Annotated[int, Field(ge=0)] = 0  # of the training split, put before these
    sample_seed: Seed = 0  # draws the examples, balanced over classes
    permuted_labels: Annotated[float, Field(ge=0, le=1)] = 0.0  # share of training labels
    permutation_seed: Seed = 0
    standardise: bool = True  # over the training split; False: inputs are taken as they are
    unit_norm: bool = True  # each standardised input on the unit sphere, as in the paper
    accept_unverified: bool = False  # read files whose checksums are not the published ones

    @model_validator(mode="after")
    def _as_they_are(self) -> Self:
        if self.unit_norm and not self.standardise:
            raise ValueError(
                "unit_norm scales inputs that are standardised: with standardise false, give"
                " unit_norm false too"
            )
        return self

    @property
    def preprocessing(self) -> dict[str, bool]:
        """What is done to the inputs, for hashes; a field that came later only where it is set."""
        return {"unit_norm": self.unit_norm} | ({} if self.standardise else {"standardise": False})


class Model(Frozen):
    """Which network."""

    name: str = "fully_connected"
    options: dict[str, Option] = Field(default_factory=dict)


class Training(Frozen):
    """One training run for each learning rate and seed, all with the same iterations."""

    # Trained elsewhere: rates, seeds and iterations say what there is. First, for the rates look.
    imported: bool = False
    learning_rates: tuple[Rate, ...] = (1e-3,)
    seeds: tuple[Seed, ...] = (0,)
    iterations: tuple[Annotated[int, Field(ge=0)], ...] | None = None  # None: four stages
    epochs: Positive = 10.0  # with iterations None: how long
    batch_size: Annotated[int, Field(ge=1)] = 32
    optimizer: Literal["adam", "sgd"] = "adam"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of sgd
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0

    @field_validator("learning_rates", "seeds")
    @classmethod
    def _distinct(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if not values:
            raise ValueError("is empty; give at least one")
        if len(set(values)) != len(values):
            raise ValueError(f"{list(values)} holds a value twice; give each once")
        return tuple(sorted(values))

    @field_validator("iterations")
    @classmethod
    def _ascending(cls, values: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if values is not None:
            if not values:
                raise ValueError("is empty; give at least one, for example 0,100,1000")
            if list(values) != sorted(set(values)):
                raise ValueError(
                    f"{list(values)} is not ascending; give each step once, in order: "
                    f"{','.join(map(str, sorted(set(values))))}"
                )
        return values

    @model_validator(mode="after")
    def _has_iterations(self) -> Self:
        if self.imported and self.iterations is None:
            raise ValueError("imported checkpoints have iterations: name them")
        return self

    @property
    def of_checkpoints(self) -> dict[str, Any]:
        """What says how the checkpoints came about, for hashes."""
        if self.imported:
            named = {"imported", "learning_rates", "seeds", "iterations"}
            return self.model_dump(mode="json", include=named)
        return self.model_dump(mode="json", exclude={"imported", "epochs"})

    def resolved(self, n_train: int) -> Training:
        """Return the same with its iterations written out."""
        if self.iterations is not None:
            return self
        steps = self.steps_per_epoch(n_train)
        return self.model_copy(
            update={"iterations": stages(max(1, round(self.epochs * steps)), steps)}
        )

    def steps_per_epoch(self, n_train: int) -> int:
        """Optimiser steps in one pass; the last, smaller batch is used too."""
        return math.ceil(n_train / self.batch_size)


def stages(total: int, steps_per_epoch: int, count: int = 4) -> tuple[int, ...]:
    """Return the steps of the paper's four stages: before training, an early one, two later.

    The early one lies a quarter of an epoch in (or earlier in a short run), the last at the end,
    those between in geometric progression.
    """
    early = max(1, min(round(steps_per_epoch / 4), total // 4))
    later = np.geomspace(total, early, count - 1).round().astype(int)
    return (0, *sorted(set(later.tolist())))


class Gradients(Frozen):
    """Which gradients, how exact, in which tiles."""

    parameters: tuple[str, ...] | None = None  # glob patterns; None: all that are trained
    precision: Literal["float32", "float64", "bf16", "bf16x3", "tf32"] = "float32"
    tile: Annotated[int, Field(ge=1)] | None = None  # edge of a tile; None: 1,000 or so


class Study(Frozen):
    """Everything that can change a number."""

    title: str = "study"
    data: Data = Data()
    model: Model = Model()
    training: Training = Training()
    gradients: Gradients = Gradients()
    loss: str = "cross_entropy"  # or package.module:function of (outputs, targets) -> (N,)
    keep: Literal["pairs", "sums"] = "pairs"  # in the store; sums: over each example's pairs
    distance_bins: Annotated[int, Field(ge=1)] = 50  # of the sums

    @model_validator(mode="after")
    def _some_examples(self) -> Self:
        if self.data.validation_examples == 0 and self.data.train_examples == 0:
            raise ValueError("no examples: validation_examples and train_examples are both 0")
        return self

    @field_validator("loss")
    @classmethod
    def _named(cls, loss: str) -> str:
        if loss != "cross_entropy" and ":" not in loss:
            raise ValueError("expected cross_entropy, or package.module:function for your own")
        return loss

    def resolved(self, n_train: int) -> Study:
        """Return the same with its iterations written out."""
        return self.model_copy(update={"training": self.training.resolved(n_train)})

    @property
    def iterations(self) -> tuple[int, ...]:
        """The checkpoints' optimiser steps.

        Raises:
            StudyError: they follow from the size of the data and were not written out.
        """
        if self.training.iterations is None:
            raise StudyError("iterations are not known yet: use study.resolved(n_train)")
        return self.training.iterations

    def given(self) -> dict[str, Sequence[float]]:
        """Return learning rates, seeds and iterations by name, those that were given."""
        training = self.training
        values: dict[str, Sequence[float]] = {
            "learning_rate": training.learning_rates,
            "seed": training.seeds,
            "iteration": self.iterations,
        }
        trained_here = not training.imported
        return {name: of for name, of in values.items() if is_given(of, trained_here=trained_here)}

    def name_of(self, checkpoint: Checkpoint) -> str:
        """Name a checkpoint; what was not given is not said."""
        parts = [
            named_values(name, values[getattr(checkpoint, name)])
            for name, values in self.given().items()
        ]
        return ", ".join(parts) or "the checkpoint"

    @property
    def shape(self) -> tuple[int, int, int]:
        """How many learning rates, seeds and iterations."""
        training = self.training
        return len(training.learning_rates), len(training.seeds), len(self.iterations)


def fingerprint(study: Study, *, content: str, tile: int) -> dict[str, Any]:
    """Return every field that can change a number, for the store.

    Two runs with the same fingerprint (and the same weights, whose hashes the store keeps by
    checkpoint) may share a store.

    Args:
        study: resolved.
        content: hash of the examples in play and of the training data, in order.
        tile: edge of a tile.
    """
    sums = {"keep": "sums", "distance_bins": study.distance_bins}
    return (sums if study.keep == "sums" else {}) | {
        "data": content,
        "preprocessing": study.data.preprocessing,
        "labels": {
            "permuted": study.data.permuted_labels,
            "seed": study.data.permutation_seed,
        },
        "model": study.model.model_dump(mode="json"),
        "training": study.training.of_checkpoints,
        "loss": study.loss,
        "parameters": study.gradients.model_dump(mode="json")["parameters"],
        "precision": study.gradients.precision,
        "tile": tile,
        "gradient_engine": GRADIENT_ENGINE_VERSION,
    }


def training_identity(study: Study, *, content: str) -> str:
    """Return a digest of all that decides the weights of a run at a step, for its checkpoints.

    Rates, seeds and iterations are left out: they are in a checkpoint's name.

    Args:
        study: of which the checkpoints are.
        content: hash of the training data, with their labels as they are trained on.
    """
    per_run = {"learning_rates", "seeds", "iterations"}
    training = study.training.of_checkpoints
    return digest(
        {
            "data": content,
            **study.data.preprocessing,
            "model": study.model.model_dump(mode="json"),
            "training": {k: v for k, v in training.items() if k not in per_run},
            "loss": study.loss,
        }
    )


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say in words which fields of two fingerprints differ."""
    lines: list[str] = []
    for key in [*was, *(k for k in now if k not in was)]:
        before, after = was.get(key), now.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += [f"{key}.{line}" for line in differences(before, after)]
        elif before != after:
            lines.append(f"{key} was {json.dumps(before)}, is {json.dumps(after)}")
    return lines


def digest(value: Any) -> str:
    """Return a short hash of anything that JSON can say."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def build_study(build: Callable[[], S]) -> S:
    """Build a study, or a part of one; say what is wrong with it in words.

    Raises:
        StudyError: a field is wrong; the message names it, its value and what is expected.
    """
    try:
        return build()
    except ValidationError as error:
        lines = [_in_words(problem) for problem in error.errors()]
        raise StudyError("these settings do not fit: " + "; ".join(lines)) from error


def _in_words(problem: Mapping[str, Any]) -> str:
    """Say what pydantic found wrong with one field."""
    where, value = ".".join(map(str, problem["loc"])) or "study", problem["input"]
    if problem["type"] == "extra_forbidden":
        section: Any = Study
        for name in problem["loc"][:-1]:
            section = section.model_fields[name].annotation
        return f"{where}: there is no such field; expected {', '.join(section.model_fields)}"
    got = "" if isinstance(value, dict | list) else f" (got {str(value)[:60]!r})"
    return f"{where}: {problem['msg'].removeprefix('Value error, ')}{got}"
