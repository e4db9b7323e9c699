"""The examples that are measured: anything that a notebook holds, as the data of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distributed_stiffness.data.foreign import labelled
from distributed_stiffness.data.labels import subset
from distributed_stiffness.data.preprocessing import AsGiven
from distributed_stiffness.data.selection import StudyData, select
from distributed_stiffness.errors import ModelError
from distributed_stiffness.gradients.batches import Examples, pair
from distributed_stiffness.study import Data, build_study

IN_MEMORY = "a sample in memory"


def described(sample: Examples | str, examples: int | None) -> Data:
    """Return how a study names the sample."""
    return build_study(
        lambda: Data(
            name=sample if isinstance(sample, str) else IN_MEMORY,
            validation_examples=examples,
            standardise=False,
            unit_norm=False,
        )
    )


def load_sample(
    sample: Examples | str, examples: int | None, class_names: Sequence[str] | None
) -> StudyData:
    """Return the examples, or a draw of them with the classes in proportion.

    Args:
        sample: (inputs, labels), a Dataset of such pairs, or batches of them; inputs are a tensor
            or tensors by name. Or data by name, as `stiffness gram --data` takes them.
        examples: how many; None: all.
        class_names: in label order; None: the numbers, or what the named data say.

    Raises:
        ModelError: it is something else.
        DataError: labels do not fit, or there are fewer examples.
    """
    if isinstance(sample, str):
        return select(described(sample, examples), every_class=False)
    inputs, labels = pair(sample)
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() != 1:
        raise ModelError(
            "the sample's targets are no labels: expected whole numbers from 0, (N,), since"
            " stiffness is reported by class"
        )
    both = {"validation": (_arrays(inputs), labels.cpu().numpy()), "class_names": class_names}
    whole = labelled(both | {"source": "Given by the training that was watched."}, IN_MEMORY)
    chosen, index = subset(
        whole.validation, examples, seed=0, n_classes=whole.n_classes, every_class=False
    )
    return StudyData(
        labelled=whole,
        preprocessing=AsGiven(),
        examples=chosen,
        split=("validation",) * len(chosen),
        index=index.astype(np.int64),
    )


def _arrays(inputs: Any) -> Any:
    if isinstance(inputs, tuple | list) and len(inputs) == 1:
        (inputs,) = inputs
    if isinstance(inputs, Tensor):
        floating = inputs.is_floating_point()
        return inputs.detach().to("cpu", torch.float32 if floating else inputs.dtype).numpy()
    if isinstance(inputs, Mapping):
        return {str(name): _arrays(part) for name, part in inputs.items()}
    raise ModelError(
        f"the sample's inputs are a {type(inputs).__name__}: expected a tensor, or a dict of"
        " tensors by the names that the network calls them"
    )
