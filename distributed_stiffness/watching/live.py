"""One measurement of a network in memory: the tiles, numbers and checks of any other store.

The network is copied and the copy is put in evaluation mode, so that the training's own keeps its
modes, its gradients and its hooks; the random state is put back.
"""

from __future__ import annotations

from torch import nn

from distributed_stiffness.data.selection import StudyData
from distributed_stiffness.engine.replica import Replica
from distributed_stiffness.engine.whole_matrix import ClassMeans
from distributed_stiffness.gradients.in_play import device_of
from distributed_stiffness.gradients.loss_head import Loss
from distributed_stiffness.gradients.network import private_copy
from distributed_stiffness.plan import Plan
from distributed_stiffness.study import Study
from distributed_stiffness.tiling import Checkpoint, Task, tasks


class LiveReplica(Replica):
    """A replica whose network and loss are at hand, and in no file."""

    def __init__(
        self,
        study: Study,
        data: StudyData,
        plan: Plan,
        *,
        store: str,
        network: nn.Module,
        loss: Loss,
    ) -> None:
        importable = study.model_copy(update={"loss": "cross_entropy"})
        device = str(next(network.parameters()).device)
        super().__init__(importable, data, plan, store=store, checkpoints=store, device=device)
        self.study = study
        self.loss = loss  # type: ignore[assignment]  # gradients take a WholeLoss too
        self._network = network

    def measure_all(self, checkpoint: Checkpoint) -> ClassMeans | None:
        """Compute all that the store has of a checkpoint, and the input distances if it must be.

        Returns:
            How the matrix as a whole compared with sums that need no pairs.

        Raises:
            GradientError: outputs, losses or gradients are not finite.
            StoreError: the store cannot be written.
        """
        there = self.store.contents()
        todo: list[Task] = []
        for kind, of, done in (
            ("distance", None, there.distance),
            ("pairs", checkpoint, there.tiles.get(checkpoint, ())),
        ):
            todo += tasks(
                kind,  # type: ignore[arg-type]  # one of the two names
                of,
                self.plan.tiling,
                panel_chunks=self.plan.panel_chunks,
                done=done,
            )
        for task in todo:
            self.run(task)
        return self.run(Task("check", checkpoint)).class_means

    def _model(self, checkpoint: Checkpoint) -> nn.Module:  # noqa: ARG002  # there is only one
        return self._network


def evaluation_copy(network: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode, of what torch.compile or data parallelism wrap.

    Raises:
        ModelError: the network cannot be copied, or has no parameters.
    """
    copied = private_copy(network, of_training=True)
    if device_of(copied).type not in ("cpu", "cuda"):
        copied = copied.cpu()
    return copied.eval()
