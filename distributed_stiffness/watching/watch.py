"""Stiffness of a sample, measured between the steps of a training loop of one's own.

The store is an ordinary one that grows along its iterations: after each measurement everything in
it is complete. What a killed training has left is continued, and where a training has gone back and
taken another way, what it left behind is taken out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from distributed_stiffness.certainty import allowed_error
from distributed_stiffness.checkpoints import Checkpoints, TrainingRun, weights_hash
from distributed_stiffness.data.selection import StudyData
from distributed_stiffness.engine.lease import Lease
from distributed_stiffness.engine.prediction import predict
from distributed_stiffness.engine.prepare import Run
from distributed_stiffness.engine.serial import MEMORY
from distributed_stiffness.engine.speed import measure
from distributed_stiffness.errors import StiffnessError, StoreError, StudyError
from distributed_stiffness.gradients.batches import Examples, Nest, from_numpy, map_tensors
from distributed_stiffness.gradients.budget import fit, free_memory
from distributed_stiffness.gradients.evidence import ALL_ZERO, EXAMPLES
from distributed_stiffness.gradients.from_evidence import gradients_of_evidence
from distributed_stiffness.gradients.loss_head import Loss, WholeLoss
from distributed_stiffness.gradients.self_check import check_gradients
from distributed_stiffness.gradients.surroundings import undisturbed
from distributed_stiffness.models import check_outputs
from distributed_stiffness.paths import Location
from distributed_stiffness.plan import Plan, in_words
from distributed_stiffness.progress import Progress
from distributed_stiffness.store import (
    WHOLE_MATRIX_CHECK,
    Store,
    create_or_continue,
    is_there,
    now,
    refuse_another_study,
    stored_plan,
    weights_key,
)
from distributed_stiffness.study import (
    NOT_GIVEN,
    Study,
    build_study,
    fingerprint,
    training_identity,
)
from distributed_stiffness.tiling import Checkpoint
from distributed_stiffness.watching.clock import Clock
from distributed_stiffness.watching.live import LiveReplica, evaluation_copy
from distributed_stiffness.watching.sample import described, load_sample

BUDGET = 0.05


@dataclass(frozen=True)
class Measurement:
    """What was measured at a step; the matrix is in the store."""

    iteration: int
    within: float  # mean sign stiffness within a class; NaN where no class has two examples
    between: float  # and between classes
    loss: float  # mean over the sample, nats
    seconds: float  # that it took
    share: float  # of the training's time so far that all measurements took, in [0, 1]
    left_out: int  # due since the one before, and left out to keep the budget
    error_bound: float  # of a cosine
    is_certain: bool  # the bound is not above what is allowed

    def __str__(self) -> str:
        doubt = "" if self.is_certain else f"; NOT CERTAIN: error bound {self.error_bound:.2g}"
        left_out = f" ({self.left_out} left out to keep the budget)" if self.left_out else ""
        return (
            f"stiffness at step {self.iteration:,}: sign {self.within:+.3f} within,"
            f" {self.between:+.3f} between classes, loss {self.loss:.4g}; took"
            f" {self.seconds:.2g} s, {self.share:.1%} of the time so far{left_out}{doubt}"
        )

    def metrics(self) -> dict[str, float]:
        """For a logger."""
        return {
            "stiffness/within": self.within,
            "stiffness/between": self.between,
            "stiffness/sample_loss": self.loss,
            "stiffness/share_of_time": self.share,
            "stiffness/error_bound": self.error_bound,
        }


def watch(
    network: nn.Module,
    loss: Loss,
    sample: Examples | str,
    *,
    store: Location,
    every: int | Collection[int] = 100,
    budget: float | None = BUDGET,
    examples: int | None = None,
    class_names: Sequence[str] | None = None,
    learning_rate: float = NOT_GIVEN,
    seed: int = 0,
    parameters: Sequence[str] | None = None,
    precision: str = "float32",
    memory: int | None = None,
    model_name: str | None = None,
    title: str | None = None,
    quiet: bool = False,
) -> Watch:
    """Measure the stiffness of a sample during a training loop, into a store.

        with watch(model, "cross_entropy", (x, y), store="run.zarr", every=100) as stiffness:
            stiffness.step(0)
            for step, (inputs, labels) in enumerate(batches, 1):
                ...
                optimizer.step()
                stiffness.step(step)

    A copy of the network in evaluation mode is measured; its weights, modes, gradients and all
    random states stay what they are, so that the training takes the same steps. Run the training
    again after it was killed, with the same store, and the measurements go on.

    Args:
        network: as it is trained. What it is wrapped in by torch.compile or data parallelism is
            looked through.
        loss: "cross_entropy", a callable (outputs, labels) -> (N,), or a `WholeLoss`.
        sample: (inputs, labels), a Dataset of such pairs, or batches of them; inputs are a tensor,
            or tensors by name. Or the name of data, as `stiffness gram --data` takes it.
        store: path or URL; one training run a store.
        every: a measurement is due at multiples of so many steps, or at these steps.
        budget: share of the time that measurements may take from the second one on, in (0, 1):
            what would go beyond is left out. None: whatever is due.
        examples: how many of the sample, drawn with the classes in proportion; None: all. N
            gradients and N² products are what a measurement takes.
        class_names: in label order.
        learning_rate: label of the run in the store; 0: not given.
        seed: label of the run in the store.
        parameters: glob patterns of the parameters in play; None: all that require gradients.
        precision: as in a study.
        memory: bytes that gradients may take; None: 2 GB, or half of what is free.
        model_name: `package.module:factory` of the network. The measured weights are then kept
            beside the store, and where the sample is a name too, `stiffness verify` computes a
            sample of the numbers again.
        title: of the report.
        quiet: show nothing.

    Raises:
        StiffnessError: the network, the loss or the sample do not fit, before any step; or the
            store is another training's.
    """
    due: Any = every
    if isinstance(due, Iterable) and not isinstance(due, str) and getattr(due, "ndim", True):
        every = frozenset(map(_whole_number, due))
    elif (every := _whole_number(due)) < 1:
        raise StudyError(f"every is {every}: expected 1 step or more, or a collection of steps")
    if budget is not None and not 0 < budget < 1:
        raise StudyError(f"budget is {budget}: expected a share of the time in (0, 1), or None")
    fields = {
        "title": title or f"{type(network).__name__} while it is trained",
        "data": described(sample, examples),
        "model": {"name": model_name or type(network).__name__},
        "training": {
            "imported": True,  # nobody here trains it
            "learning_rates": [_rate(learning_rate)],
            "seeds": [seed],
            "iterations": [0],
        },
        "gradients": {"parameters": parameters, "precision": precision},
        "loss": _name_of_loss(loss),
    }
    study = build_study(lambda: Study.model_validate(fields))
    return Watch(
        network,
        loss,
        study,
        lambda: load_sample(sample, examples, class_names),
        run=Run(store=store, memory=memory, quiet=quiet),
        every=every,
        budget=budget,
        keeps_weights=model_name is not None,
    )


class Watch:
    """Measures at the steps that are due; see `watch`, which makes it."""

    def __init__(
        self,
        network: nn.Module,
        loss: Loss,
        study: Study,
        load: Callable[[], StudyData],
        *,
        run: Run,
        every: int | Collection[int],
        budget: float | None,
        keeps_weights: bool,
    ) -> None:
        self._network, self._loss, self._study, self._load = network, loss, study, load
        self._run, self._every, self._keeps_weights = run, every, keeps_weights
        self._progress = Progress(quiet=run.quiet)
        self._clock = Clock(budget)
        self._open = contextlib.ExitStack()
        self._store: Store | None = None
        self._done: tuple[int, ...] = ()  # iterations whose numbers are all in the store
        self._measured = self._left_out = 0
        self._own: list[int] = []  # steps that this training has measured
        self._begun_again = False  # steps that are counted anew are those of no training

    def __enter__(self) -> Self:
        """Look at network, loss and sample, and at what an earlier run has left."""
        with undisturbed():
            self._data = self._load()
            self._plan = self._fitted(evaluation_copy(self._network))
        url = self._run.store_url
        with contextlib.ExitStack() as opened:
            opened.enter_context(Lease(url).held(self._progress))
            if is_there(url):
                self._continue(Store(url))
            self._open = opened.pop_all()
        self._clock = Clock(self._clock.budget)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Say in the store that it is complete, if the training came to its end."""
        if self._left_out:
            self._progress.say(
                f"{self._left_out} more measurements were due, and left out to keep within"
                f" {self._clock.budget:.3g} of the time: one takes {self._clock.longest:.2g} s."
                " Fewer examples take less; a larger budget, or budget=None, allows more"
            )
        with self._open:
            if kind is None and self._store is not None and "finished" not in self._store.attrs:
                self._store.set_attrs(finished=now())

    def step(self, iteration: int) -> Measurement | None:
        """Measure, if it is due and the budget allows it.

        The first measurement raises what is wrong with it. What goes wrong later is a warning, for
        no measurement is worth a training.

        Args:
            iteration: optimiser steps done.

        Returns:
            What was measured; None: nothing.

        Raises:
            StiffnessError: the first measurement failed.
        """
        try:
            iteration = _whole_number(iteration)
        except StudyError as error:
            if not self._measured:
                raise
            warnings.warn(f"no stiffness is measured: {error}", stacklevel=2)
            return None
        if not self._is_due(iteration):
            return None
        if not self._clock.allows():
            self._left_out += 1
            return None
        began = self._clock.now()
        try:
            with undisturbed():
                is_new = self._measure(iteration)
        except Exception as error:  # whatever it is, the training goes on
            if not self._measured and isinstance(error, StiffnessError):
                raise
            what = str(error) if isinstance(error, StiffnessError) else repr(error)
            warnings.warn(f"no stiffness at step {iteration:,}: {what}", stacklevel=2)
            return None
        finally:
            self._clock.add(self._clock.now() - began)
        if not is_new:
            return None
        found = self._summary(iteration, seconds=self._clock.now() - began)
        if not found.is_certain:
            warnings.warn(
                f"the stiffness at step {iteration:,} is not certain: the error bound of a cosine"
                f" is {found.error_bound:.2g}, above the {self._allowed:g} that is allowed. It is"
                " marked in the store; try precision='float64', or a loss of (outputs, labels)",
                stacklevel=2,
            )
        self._measured, self._left_out = self._measured + 1, 0
        self._progress.say(str(found))
        return found

    def _is_due(self, iteration: int) -> bool:
        if isinstance(self._every, int):
            return iteration % self._every == 0
        return iteration in self._every

    # Before the first step

    def _fitted(self, network: nn.Module) -> Plan:
        """Check the network on a few examples, and fit the gradients into the memory."""
        study, data = self._study, self._data
        device = next(network.parameters()).device
        if data.n_examples < 2:
            raise StudyError(f"{data.n_examples} example has no pairs: expected 2 or more")

        def read(some: slice | np.ndarray) -> tuple[Nest, torch.Tensor]:
            found: tuple[Nest, torch.Tensor] = map_tensors(
                lambda t: t.to(device), _examples(data, some)
            )
            return found

        check_outputs(
            network,
            read(slice(0, EXAMPLES))[0],
            data.labelled.n_classes,
            study.model.name,
            loss="own" if callable(self._loss) else "cross_entropy",
            exactly=False,
        )
        gradients, evidence = gradients_of_evidence(
            network,
            self._loss,
            read,
            data.n_examples,
            parameters=study.gradients.parameters,
            precision=study.gradients.precision,
        )
        check_gradients(gradients, *read(evidence.places))
        if evidence.is_zero:
            self._progress.say(f"note: {ALL_ZERO}")
        memory = self._run.memory or min(MEMORY, free_memory())
        _, plan = fit(gradients, n_examples=data.n_examples, memory=memory)
        plan = stored_plan(self._run.store_url, plan)
        plan = replace(plan, allow_error=True)  # a bound above what is allowed is a warning here
        batch = read(slice(0, min(plan.batch, data.n_examples)))
        speed = measure(gradients.with_factored(plan.factored), batch, plan)
        seconds = predict(plan, replicas=1, speed=speed).seconds or 0.0
        self._progress.say(
            f"stiffness of {data.n_examples:,} examples: about {seconds:.2g} s a measurement, and a"
            f" check in float64; up to {in_words(4 * data.n_examples**2)} each"
        )
        return plan

    def _continue(self, store: Store) -> None:
        """Take up what an earlier run of the same training has left.

        Raises:
            StoreError: the store is of something else.
        """
        there = store.study()
        refuse_another_study(store.url, self._of(there.iterations), self._data, tile=None)
        checked = {checkpoint.iteration for checkpoint in store.contents().checked}
        self._done = tuple(step for k, step in enumerate(there.iterations) if k in checked)
        store.resize_iterations(len(self._done))  # a run that was killed may have left a part
        self._store = store
        if self._done:
            self._progress.say(f"{store.url} holds the steps up to {self._done[-1]:,}: going on")

    # One measurement

    def _measure(self, iteration: int) -> bool:
        """Measure into the store; False: it holds these weights' numbers already."""
        network = evaluation_copy(self._network)
        tensors = {n: t for n, t in network.state_dict().items() if isinstance(t, torch.Tensor)}
        weights = {name: tensor.cpu() for name, tensor in tensors.items()}
        place, sha256 = self._place(iteration), weights_hash(weights)
        hashes = dict(self._store.attrs["weights"]) if self._store else {}
        if iteration in self._done and hashes.get(place) == sha256:
            return False
        kept = tuple(step for step in self._done if step < iteration)
        first = next((step for step in self._own if step), None)  # 0 is before all epochs
        self._begun_again |= bool(self._own) and (not kept or iteration == first)
        if self._begun_again:
            raise StoreError(
                f"the steps have begun again, at {iteration:,} after {self._done[-1]:,}: count them"
                " over all epochs. Nothing more is measured; what was, is kept"
            )
        if len(kept) < len(self._done):
            self._go_back(kept, iteration)
        study = self._of((*kept, iteration))
        store = self._with_room(study, len(kept))
        if self._keeps_weights:
            identity = training_identity(study, content=self._data.training_hash)
            folder = Checkpoints(self._run.checkpoint_folder, identity=identity)
            source = json.dumps({"watched": sha256})
            folder.put(self._training_run, iteration, weights, source)
        replica = LiveReplica(
            study, self._data, self._plan, store=store.url, network=network, loss=self._loss
        )
        means = replica.measure_all(Checkpoint(0, 0, len(kept)))
        kept_hashes = {self._place(step): hashes[self._place(step)] for step in kept}
        attrs: dict[str, Any] = {"weights": kept_hashes | {place: sha256}}
        if means is not None:
            run = dataclasses.asdict(self._training_run)
            where = {**run, "iteration": iteration}
            attrs[WHOLE_MATRIX_CHECK] = where | dataclasses.asdict(means)
        bound = float(store.of_checkpoints("error_bound")[0, 0, len(kept)])
        if not bound <= self._allowed:
            attrs["allow_error"] = True
        store.set_attrs(**attrs)
        self._publish(store, study)
        self._done = (*kept, iteration)
        self._own.append(iteration)
        return True

    def _go_back(self, kept: tuple[int, ...], iteration: int) -> None:
        """Take out what was measured on a way that the training has left.

        Raises:
            StoreError: it is another training's.
        """
        assert self._store is not None
        if not kept or "finished" in self._store.attrs:
            raise StoreError(
                f"{self._store.url} is of another training: it had other weights at step"
                f" {iteration:,}, or did not measure there, and goes to step {self._done[-1]:,}."
                " Give another store"
            )
        self._progress.say(
            f"the training has gone back to step {iteration:,} and takes another way: its"
            f" measurements up to {self._done[-1]:,} are taken out"
        )
        self._publish(self._store, self._of(kept))
        self._store.resize_iterations(len(kept))

    def _with_room(self, study: Study, place: int) -> Store:
        """Return the store with empty room for one more iteration."""
        if self._store is None:
            plan = replace(self._plan, n_checkpoints=1)
            self._store = create_or_continue(self._run.store_url, study, self._data, plan)
        else:
            self._store.resize_iterations(place + 1)
        return self._store

    def _publish(self, store: Store, study: Study) -> None:
        plan = replace(self._plan, n_checkpoints=len(study.iterations))
        identity = fingerprint(study, content=self._data.content_hash(), tile=plan.tile)
        store.publish_iterations(study, identity, plan)

    def _summary(self, iteration: int, seconds: float) -> Measurement:
        assert self._store is not None
        at, everything = Checkpoint(0, 0, len(self._done) - 1), slice(0, self._data.n_examples)
        cosines = self._store.read("cosine", at, everything, everything)
        (loss,) = self._store.numbers(at, "loss")
        within, between = sign_stiffness(cosines, self._data.examples.labels)
        bound = float(self._store.of_checkpoints("error_bound")[dataclasses.astuple(at)])
        return Measurement(
            iteration=iteration,
            within=within,
            between=between,
            loss=float(loss.mean()),
            seconds=seconds,
            share=self._clock.share,
            left_out=self._left_out,
            error_bound=bound,
            is_certain=bound <= self._allowed,
        )

    @property
    def _allowed(self) -> float:
        return allowed_error(self._study.gradients.precision)

    def _of(self, iterations: tuple[int, ...]) -> Study:
        training = self._study.training.model_copy(update={"iterations": iterations})
        return self._study.model_copy(update={"training": training})

    @property
    def _training_run(self) -> TrainingRun:
        training = self._study.training
        return TrainingRun(training.learning_rates[0], training.seeds[0])

    def _place(self, iteration: int) -> str:
        return weights_key(self._training_run, iteration)


def sign_stiffness(cosines: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Return the mean sign within a class and between two, each class or pair of classes weighing
    the same; the means of `analysis.within_between`, without its errors.

    Args:
        cosines: (N, N), symmetric.
        labels: (N,).
    """
    classes, counts = np.unique(labels, return_counts=True)
    member_NC = (labels[:, None] == classes).astype(np.float32)
    sign = np.sign(cosines, out=cosines)
    np.fill_diagonal(sign, 0)
    sums = (member_NC.T @ sign @ member_NC).astype(np.float64)
    pairs = np.outer(counts, counts) - np.diag(counts)
    means = np.full_like(sums, np.nan)
    np.divide(sums, pairs, out=means, where=pairs > 0)
    own = np.diag(means)[counts > 1]
    other = means[~np.eye(len(classes), dtype=bool)]
    return _mean(own), _mean(other)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


def _examples(data: StudyData, chosen: slice | np.ndarray) -> tuple[Nest, torch.Tensor]:
    return from_numpy(data.inputs(chosen)), torch.from_numpy(data.examples.labels[chosen].copy())


def _whole_number(step: Any) -> int:
    """Return a step of whatever kind: NumPy's, a tensor's.

    Raises:
        StudyError: it is no whole number of 0 or more.
    """
    try:
        number = step.item() if hasattr(step, "item") else step
        if int(number) == number and number >= 0:
            return int(number)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise StudyError(f"the step is {step!r}: expected a whole number of steps done, 0 or more")


def _rate(learning_rate: Any) -> float:
    """Return a learning rate of whatever kind as it is written: 0.001 of float32, and not more."""
    value = learning_rate
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype.itemsize < 4 else value).numpy()
    try:
        return float(str(value))
    except ValueError as error:
        raise StudyError(
            f"the learning rate is {learning_rate!r}: expected a number such as 0.001"
        ) from error


def _name_of_loss(loss: Loss) -> str:
    """Return how a study names the loss; what has no name that can be imported is named all the
    same.
    """
    if isinstance(loss, str):
        return loss
    function = loss.function if isinstance(loss, WholeLoss) else loss
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"
