"""Training runs, one for each learning rate and seed, with checkpoints at given iterations.

A run is a generator of events, so that the same code runs in this process or as a Ray task whose
events stream back. It continues from its last checkpoint; the order of the training examples comes
from (seed, epoch) alone, so a continued run takes the same steps as an undisturbed one.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from distributed_stiffness.checkpoints import Checkpoints, TrainingRun
from distributed_stiffness.data.examples import Split
from distributed_stiffness.data.preprocessing import AsGiven, Preprocessing
from distributed_stiffness.data.selection import StudyData
from distributed_stiffness.errors import TrainingError
from distributed_stiffness.factories import import_loss
from distributed_stiffness.gradients.batches import Nest, call, from_numpy, map_tensors
from distributed_stiffness.gradients.loss_head import cross_entropy, logits_of
from distributed_stiffness.models import build
from distributed_stiffness.study import Study, Training

EVENT_SECONDS = 0.5  # between two reports of a run's progress
EVALUATION_BATCH = 1000


@dataclass(frozen=True)
class TrainingEvent:
    """Where a run is."""

    run: TrainingRun
    step: int
    loss: float
    checkpoint: int | None = None  # set when the checkpoint of this iteration was written


def build_model(study: Study, data: StudyData, seed: int) -> nn.Module:
    """Build the study's network with the initial weights of a seed."""
    return build(
        study.model.name,
        input_shape=data.labelled.input_shape,
        n_classes=data.labelled.n_classes,
        options=study.model.options,
        seed=seed,
    )


def train(
    study: Study,
    run: TrainingRun,
    data: StudyData,
    checkpoints: Checkpoints,
    *,
    device: str = "cpu",
) -> Iterator[TrainingEvent]:
    """Train up to the last iteration, writing checkpoints; yield where it is.

    Besides the iterations asked for, one checkpoint an epoch is kept to continue from, and deleted
    when a later one is there.

    Raises:
        TrainingError: the loss or a weight is not finite; names the step, the rate and the seed.
        StoreError: a checkpoint cannot be written or read.
    """
    wanted = study.iterations
    model = build_model(study, data, run.seed).to(device)
    optimizer = _optimizer(study.training, model, run.learning_rate)
    torch.manual_seed(run.seed)  # dropout and the like
    step = _continue(run, checkpoints, wanted, model, optimizer)
    steps_per_epoch = study.training.steps_per_epoch(data.n_train)
    batches = _Batches(data, study.training, run.seed, device)
    loss, last_event = math.nan, time.monotonic()
    yield TrainingEvent(run, step, loss)  # it has begun: an evaluation may take long
    while True:
        if step in wanted and not checkpoints.exists(run, step):
            metrics = evaluate(model, data, device, study.loss)
            _require_finite(model, metrics, run, step)
            checkpoints.save(run, step, model, optimizer, metrics)
            _forget(checkpoints, run, before=step + 1)
            yield TrainingEvent(run, step, loss, checkpoint=step)
        elif step and step % steps_per_epoch == 0 and step not in wanted:
            checkpoints.save(run, step, model, optimizer, {}, rolling=True)
            _forget(checkpoints, run, before=step)
        if step >= wanted[-1]:
            return
        loss = _take_step(model, optimizer, study.loss, *batches(step), run=run, step=step)
        step += 1
        if time.monotonic() - last_event > EVENT_SECONDS:
            last_event = time.monotonic()
            yield TrainingEvent(run, step, loss)


@torch.no_grad()
def evaluate(
    model: nn.Module, data: StudyData, device: str, loss: str = "cross_entropy"
) -> dict[str, float]:
    """Return mean loss and accuracy on both whole splits, in evaluation mode."""
    was_training, own_loss = model.training, import_loss(loss)
    model.eval()
    metrics: dict[str, float] = {}
    for name, split in (
        ("train", data.labelled.train),
        ("validation", data.labelled.validation),
    ):
        if split is None:
            continue
        total, right = 0.0, 0
        for start in range(0, len(split.labels), EVALUATION_BATCH):
            chosen = np.arange(start, min(start + EVALUATION_BATCH, len(split.labels)))
            inputs, targets = _batch(split, data.preprocessing, chosen, device)
            outputs = call(model, inputs)
            if isinstance(own_loss, str):
                losses = cross_entropy(logits_of(outputs).double(), targets)
            else:
                losses = own_loss(outputs, targets)
            total += float(losses.double().sum())
            right += int((logits_of(outputs).argmax(1) == targets).sum())
        metrics[f"{name}_loss"] = total / len(split.labels)
        metrics[f"{name}_accuracy"] = right / len(split.labels)
    model.train(was_training)
    return metrics


class _Batches:
    """The batch of each step; each epoch has its own order, drawn from (seed, epoch)."""

    def __init__(self, data: StudyData, training: Training, seed: int, device: str) -> None:
        if data.labelled.train is None:
            raise TrainingError(f"{data.labelled.name} has no training split to train on")
        self._split, self._preprocessing = data.labelled.train, data.preprocessing
        self._size, self._seed, self._device = training.batch_size, seed, device
        self._per_epoch = training.steps_per_epoch(len(self._split.labels))
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __call__(self, step: int) -> tuple[Nest, torch.Tensor]:
        epoch, batch = divmod(step, self._per_epoch)
        if epoch != self._epoch:
            random = np.random.default_rng((self._seed, epoch))
            self._epoch, self._order = epoch, random.permutation(len(self._split.labels))
        chosen = self._order[batch * self._size : (batch + 1) * self._size]
        return _batch(self._split, self._preprocessing, chosen, self._device)


def _batch(
    split: Split, preprocessing: Preprocessing | AsGiven, chosen: np.ndarray, device: str
) -> tuple[Nest, torch.Tensor]:
    inputs = from_numpy(preprocessing(split.inputs[chosen]))
    return map_tensors(lambda t: t.to(device), inputs), torch.from_numpy(split.labels[chosen]).to(
        device
    )


def _optimizer(training: Training, model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if training.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=learning_rate,
            momentum=training.momentum,
            weight_decay=training.weight_decay,
        )
    return torch.optim.Adam(parameters, lr=learning_rate, weight_decay=training.weight_decay)


def _continue(
    run: TrainingRun,
    checkpoints: Checkpoints,
    wanted: tuple[int, ...],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> int:
    """Go on from the last checkpoint before what is missing; return its step."""
    found = checkpoints.iterations(run)
    missing = min((step for step in wanted if step not in found), default=wanted[-1])
    steps = [(step, False) for step in found if step <= missing]
    steps += [(step, True) for step in checkpoints.iterations(run, rolling=True) if step <= missing]
    if not steps:
        return 0
    step, rolling = max(steps)
    checkpoints.restore(run, step, model, optimizer, rolling=rolling)
    return step


def _take_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    named_loss: str,
    inputs: Nest,
    targets: torch.Tensor,
    *,
    run: TrainingRun,
    step: int,
) -> float:
    model.train()
    optimizer.zero_grad(set_to_none=True)
    own_loss, outputs = import_loss(named_loss), call(model, inputs)
    if isinstance(own_loss, str):
        loss = nn.functional.cross_entropy(logits_of(outputs), targets)
    else:
        loss = own_loss(outputs, targets).mean()
    value = float(loss.detach())
    if not math.isfinite(value):
        raise TrainingError(_diverged("the training loss", value, run, step))
    loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotation here
    optimizer.step()
    return value


def _require_finite(
    model: nn.Module, metrics: dict[str, float], run: TrainingRun, step: int
) -> None:
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise TrainingError(_diverged(name.replace("_", " "), value, run, step))
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise TrainingError(_diverged(f"weight {name!r}", math.nan, run, step))


def _diverged(what: str, value: float, run: TrainingRun, step: int) -> str:
    return (
        f"{what} is {value} at step {step} with {run}: training has diverged. Checkpoints before"
        " this step are kept and computed; try a smaller learning rate"
    )


def _forget(checkpoints: Checkpoints, run: TrainingRun, *, before: int) -> None:
    """Delete the checkpoints that were kept only to continue from, and are behind us."""
    for step in checkpoints.iterations(run, rolling=True):
        if step < before:
            with contextlib.suppress(FileNotFoundError):
                checkpoints.delete(run, step, rolling=True)
