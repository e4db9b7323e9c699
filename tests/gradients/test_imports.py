"""What the gradient engine may import, seen from a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys


def modules_after(statement: str) -> set[str]:
    """Import in a new process; return the names of all modules it then has."""
    code = f"{statement}; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_gradients_import_neither_ray_nor_store_nor_study():
    """A notebook or a laptop needs no cluster to compute gradients."""
    modules = modules_after("import distributed_stiffness.gradients")

    assert "torch" in modules
    assert not modules & {
        "ray",
        "zarr",
        "distributed_stiffness.store",
        "distributed_stiffness.study",
    }


def test_planning_is_pure():
    """Tiles, plans and studies need neither torch nor ray nor a store."""
    names = ("tiling", "plan", "study")
    modules = modules_after("; ".join(f"import distributed_stiffness.{name}" for name in names))

    assert "distributed_stiffness.plan" in modules
    assert not modules & {"torch", "ray", "zarr"}


def test_deciding_needs_no_ray():
    """The scheduler and the choice of resources are tested, and simulated, without a cluster."""
    modules = modules_after(
        "import distributed_stiffness.engine.scheduler, distributed_stiffness.engine.resources"
    )

    assert "ray" not in modules
