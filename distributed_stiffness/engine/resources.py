"""What a replica asks of a node. Pure: takes a list of nodes, knows no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from distributed_stiffness.errors import ClusterError

# Of what Ray counts as a node's memory; the rest is for training, the object store's copy of the
# data, and the libraries of each process.
MEMORY_SHARE = 0.5


@dataclass(frozen=True)
class Node:
    """What a node offers."""

    cpus: int
    gpus: int
    memory: int  # bytes


@dataclass(frozen=True)
class ReplicaShape:
    """Device, threads and memory of each replica, and of each training run."""

    device: str
    threads: int
    memory: int  # bytes: of the GPU, or of the node

    def resources(self) -> dict[str, float]:
        """Return what Ray is asked for."""
        if self.device == "cuda":
            return {"num_gpus": 1, "num_cpus": 1}
        return {"num_cpus": self.threads}

    def fits_on(self, node: Node) -> int:
        """Return how many replicas a node holds."""
        if self.device == "cuda":
            return min(node.gpus, node.cpus)
        return node.cpus // self.threads

    def with_memory(self, memory: int) -> ReplicaShape:
        """Return the same with another budget."""
        return replace(self, memory=memory)

    def describe(self) -> str:
        """One line for people."""
        what = "one GPU each" if self.device == "cuda" else f"{self.threads} CPU thread(s) each"
        return f"replicas: {what}, {self.memory / 1e9:.1f} GB"


def require_fit(nodes: Sequence[Node], *, device: str, threads: int | None) -> None:
    """Check that some node holds a replica.

    Raises:
        ClusterError: none does; says what was asked and what there is.
    """
    wants_gpu = device == "cuda"
    asked = "one GPU and one CPU" if wants_gpu else f"{threads or 1} CPUs"
    fits = any(
        node.cpus >= (1 if wants_gpu else threads or 1) and (node.gpus >= 1 or not wants_gpu)
        for node in nodes
    )
    if not fits:
        offers = "; ".join(f"{n.cpus} CPUs, {n.gpus} GPUs" for n in nodes) or "no node at all"
        raise ClusterError(
            f"no node holds a replica: it asks for {asked} on one node, the cluster has {offers}."
            " Give --device cpu or fewer --threads, add nodes, or --wait-for-nodes SECONDS where"
            " an autoscaler brings them"
        )


def choose_shape(
    nodes: Sequence[Node], *, device: str, threads: int | None, memory: int | None
) -> ReplicaShape:
    """Choose one GPU a replica where there are GPUs, else a quarter of the smallest node's cores.

    Args:
        nodes: alive; at least one holds a replica.
        device: "auto", "cpu" or "cuda".
        threads: of a CPU replica, or None.
        memory: bytes of a replica, or None.
    """
    if device == "cuda" or (device == "auto" and any(n.gpus and n.cpus for n in nodes)):
        return ReplicaShape("cuda", 1, memory or 0)
    cores = min(n.cpus for n in nodes if n.cpus >= (threads or 1))
    # Several replicas a node overlap computing with writing; many would hold the same rows often.
    chosen = threads or max(1, cores // 4)
    share = min(
        int(MEMORY_SHARE * n.memory) // (n.cpus // chosen) for n in nodes if n.cpus >= chosen
    )
    return ReplicaShape("cpu", chosen, memory or share)
