"""The same as a callback of Lightning, which is imported when one is made."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from distributed_stiffness.errors import StudyError
from distributed_stiffness.gradients.batches import Examples
from distributed_stiffness.gradients.loss_head import Loss
from distributed_stiffness.watching.watch import Watch, watch

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def lightning_callback(
    sample: Examples | str,
    *,
    store: str,
    loss: Loss = "cross_entropy",
    network: Callable[[Any], nn.Module] | None = None,
    **choices: Any,
) -> Any:
    """Return a callback of Lightning that measures the stiffness of a sample while it trains.

        trainer = Trainer(callbacks=[lightning_callback((x, y), store="run.zarr", every=100)])

    Iterations are the trainer's `global_step`. What is measured goes to the trainer's loggers too.

    Args:
        sample: as in `watch`.
        store: path or URL; one training run a store.
        loss: as in `watch`: of the network's outputs and the labels.
        network: from the LightningModule to the network whose outputs the loss takes; None: the
            module itself.
        choices: all others of `watch`, by name: every, budget, examples, class_names, …

    Raises:
        StudyError: neither `lightning` nor `pytorch_lightning` is installed.
    """
    kind = type("StiffnessCallback", (_Hooks, _callback_class()), {})
    return kind(sample, {"store": store, "loss": loss, **choices}, network)


def _callback_class() -> type:
    """Return the base class of the package that the caller has imported, or of one there is.

    A trainer takes only callbacks of its own package.
    """
    import importlib

    for name in sorted(_PACKAGES, key=lambda name: name not in sys.modules):
        try:
            found: type = importlib.import_module(name).Callback
        except ImportError:
            continue
        return found
    raise StudyError(
        "the callback needs Lightning: pip install 'distributed_stiffness[lightning]', or call"
        " `watch` in a loop of your own"
    )


class _Hooks:
    """What happens when: the hooks that are used, of any Lightning."""

    def __init__(
        self,
        sample: Examples | str,
        choices: dict[str, Any],
        network: Callable[[Any], nn.Module] | None,
    ) -> None:
        super().__init__()
        self._sample, self._choices, self._network = sample, choices, network
        self._watch: Watch | None = None
        self._step = -1

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Look at network and sample, and measure the step that the training starts from."""
        if not trainer.is_global_zero:
            return
        choices = dict(self._choices)
        network = self._network(pl_module) if self._network else pl_module
        self._watch = watch(network, choices.pop("loss"), self._sample, **choices).__enter__()
        self._take(trainer)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Measure, if an optimiser step was taken that is due."""
        self._take(trainer)

    def on_train_end(self, *_: Any) -> None:
        """Say in the store that it is complete."""
        self._close(None)

    def on_exception(self, _trainer: Any, _module: Any, exception: BaseException) -> None:
        """Leave the store to be continued."""
        self._close(exception)

    def _take(self, trainer: Any) -> None:
        if self._watch is None or trainer.global_step == self._step:
            return  # another process, or gradients that are accumulated
        self._step = trainer.global_step
        found = self._watch.step(self._step)
        if found is not None:
            for logger in trainer.loggers:
                logger.log_metrics(found.metrics(), step=self._step)

    def _close(self, error: BaseException | None) -> None:
        watching, self._watch = self._watch, None
        if watching is not None:
            watching.__exit__(None if error is None else type(error), error, None)
