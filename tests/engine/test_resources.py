"""What replicas ask of a node, and what is said when no node has it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_stiffness.engine.resources import (
    MEMORY_SHARE,
    Node,
    ReplicaShape,
    choose_shape,
    require_fit,
)
from distributed_stiffness.errors import ClusterError

GB = 10**9
node_lists = st.lists(
    st.builds(
        Node,
        cpus=st.integers(0, 64),
        gpus=st.integers(0, 8),
        memory=st.integers(1, 512).map(lambda n: n * GB),
    ),
    min_size=1,
    max_size=4,
)
devices = st.sampled_from(["auto", "cpu", "cuda"])
threads_given = st.none() | st.integers(1, 16)


def shape_of(*nodes: Node, device: str = "auto", threads=None, memory=None) -> ReplicaShape:
    return choose_shape(nodes, device=device, threads=threads, memory=memory)


def refused(nodes, *, device, threads) -> str | None:
    """Return what is said where no node holds a replica."""
    try:
        require_fit(nodes, device=device, threads=threads)
    except ClusterError as error:
        return str(error)
    return None


@settings(max_examples=200)
@given(node_lists, devices, threads_given)
def test_either_a_replica_fits_or_it_is_said(nodes, device, threads):
    """Whenever the check passes, some node holds a replica of the shape that is chosen."""
    if (refusal := refused(nodes, device=device, threads=threads)) is not None:
        assert f"{nodes[0].cpus} CPUs" in refusal
        return
    shape = choose_shape(nodes, device=device, threads=threads, memory=None)

    assert sum(shape.fits_on(node) for node in nodes) >= 1
    if shape.device == "cpu":
        assert shape.memory > 0


@settings(max_examples=200)
@given(node_lists, threads_given)
def test_replicas_share_a_nodes_memory(nodes, threads):
    """All replicas that a node holds stay within its share of memory, and within its cores."""
    if refused(nodes, device="cpu", threads=threads) is not None:
        return
    shape = choose_shape(nodes, device="cpu", threads=threads, memory=None)

    for node in nodes:
        assert shape.fits_on(node) * shape.memory <= MEMORY_SHARE * node.memory
        assert shape.fits_on(node) * shape.threads <= node.cpus


class TestChoice:
    def test_one_gpu_each_where_there_are_gpus(self):
        """A replica asks for a whole GPU and one core to feed it."""
        shape = shape_of(Node(16, 4, 64 * GB))

        assert shape.device == "cuda"
        assert shape.resources() == {"num_gpus": 1, "num_cpus": 1}
        assert shape.fits_on(Node(16, 4, 64 * GB)) == 4
        assert shape.fits_on(Node(2, 4, 64 * GB)) == 2

    def test_a_quarter_of_the_cores_elsewhere(self):
        """Threads = cores / replicas, so that replicas do not fight for cores."""
        shape = shape_of(Node(16, 0, 64 * GB))

        assert (shape.device, shape.threads) == ("cpu", 4)
        assert shape.resources() == {"num_cpus": 4}
        assert shape.fits_on(Node(16, 0, 64 * GB)) == 4
        assert shape.memory == 8 * GB

    def test_small_machines(self):
        """Two cores hold two replicas of one thread."""
        assert shape_of(Node(2, 0, 8 * GB)).threads == 1

    def test_the_smallest_node_decides(self):
        """A replica fits on every node that holds one at all; a head without cores is none."""
        nodes = Node(32, 0, 64 * GB), Node(8, 0, 64 * GB), Node(0, 0, 4 * GB)

        assert shape_of(*nodes).threads == 2

    def test_gpus_that_nobody_can_feed(self):
        """A GPU on a node without a free core is of no use."""
        assert shape_of(Node(0, 1, GB), Node(4, 0, GB)).device == "cpu"

    def test_what_is_asked_for_is_taken(self):
        """Device, threads and memory given by the caller go before any choice."""
        shape = shape_of(Node(16, 4, 64 * GB), device="cpu", threads=8, memory=3 * GB)

        assert shape == ReplicaShape("cpu", 8, 3 * GB)
        assert shape.with_memory(GB) == ReplicaShape("cpu", 8, GB)

    def test_for_people(self):
        """One line says what a replica has."""
        assert ReplicaShape("cpu", 4, 8 * GB).describe() == (
            "replicas: 4 CPU thread(s) each, 8.0 GB"
        )
        assert "one GPU each" in ReplicaShape("cuda", 1, 8 * GB).describe()


class TestRefusal:
    """The message says what was asked, what there is, and what helps."""

    def test_no_gpu(self):
        with pytest.raises(ClusterError, match=r"one GPU.*has 4 CPUs, 0 GPUs.*--device cpu"):
            require_fit([Node(4, 0, GB)], device="cuda", threads=None)

    def test_too_many_threads(self):
        with pytest.raises(ClusterError, match=r"asks for 8 CPUs.*4 CPUs.*fewer --threads"):
            require_fit([Node(4, 2, GB), Node(4, 0, GB)], device="cpu", threads=8)

    def test_no_node(self):
        with pytest.raises(ClusterError, match=r"no node at all.*--wait-for-nodes"):
            require_fit([], device="auto", threads=None)

    def test_gpus_without_cores(self):
        with pytest.raises(ClusterError, match="0 CPUs, 8 GPUs"):
            require_fit([Node(0, 8, GB)], device="auto", threads=None)
