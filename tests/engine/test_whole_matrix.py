"""The whole-matrix check finds what a sample of pairs can miss."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from studies import run_options, tiny_study

from distributed_stiffness.engine import StudyFailed, run_study
from distributed_stiffness.engine.whole_matrix import ClassSums, classes_to_check
from distributed_stiffness.errors import GradientError
from distributed_stiffness.gradients.error_bound import SampleBound
from distributed_stiffness.store import WHOLE_MATRIX_CHECK, Store
from distributed_stiffness.tiling import Checkpoint, Tiling

LAST = Checkpoint(1, 0, 1)  # of the tiny study


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run_study(tiny_study(), run_options(folder / "tiny.zarr"))
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished store, with its checkpoints beside it."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path / "tiny.zarr"


def attribute(store: Path) -> dict[str, float] | None:
    found: dict[str, float] | None = Store(store).attrs.get(WHOLE_MATRIX_CHECK)
    return found


def unit_rows(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw gradients, some of them zero, and labels of three classes."""
    random = np.random.default_rng(seed)
    g = random.normal(size=(n, 7))
    is_zero = random.random(n) < 0.2
    g[is_zero] = 0
    length = np.linalg.norm(g, axis=1, keepdims=True)
    return np.divide(g, length, out=g, where=length > 0), random.integers(3, size=n), is_zero


class TestSums:
    @given(n=st.integers(3, 40), tile=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
    def test_means_are_those_over_explicit_pairs(self, n: int, tile: int, seed: int) -> None:
        """
        Whatever the tiles, each mean is that of all pairs of two different examples of the classes
        with gradients; NaN where there are none.
        """
        u, labels, is_zero = unit_rows(n, seed)
        tiling = Tiling(n_examples=n, tile=min(n, tile))
        sums = ClassSums(labels, np.unique(labels))

        for i, j in tiling.upper():
            rows, columns = tiling.examples(i), tiling.examples(j)
            sums.add(rows, columns, u[rows] @ u[columns].T)

        means = sums.means(is_zero)
        for (p, a), (q, b) in itertools.product(enumerate(sums.classes), repeat=2):
            pairs = [
                u[i] @ u[j]
                for i, j in itertools.permutations(np.flatnonzero(~is_zero), 2)
                if labels[i] == a and labels[j] == b
            ]
            expected = np.mean(pairs) if pairs else np.nan
            np.testing.assert_allclose(means[p, q], expected, atol=1e-12)

    def test_a_difference_beyond_the_bound_is_an_error_that_names_the_classes(self) -> None:
        """
        Twice the bound on one cosine is let pass, more is not.
        """
        sums = ClassSums(np.array([0, 0, 4, 4]), np.array([0, 4]))
        sums.add(slice(0, 4), slice(0, 4), np.ones((4, 4)))
        # Two examples a class: (|U|² − 2) / 2 is their mean cosine.
        products, is_zero = np.array([[4, 4], [4, 4 - 2e-3]]), np.zeros(4, bool)

        assert sums.compare(products, is_zero=is_zero, bound=6e-4).largest_difference < 1.1e-3
        with pytest.raises(GradientError, match=r"classes 4 and 4.*0.001 away.*0.0004"):
            sums.compare(products, is_zero=is_zero, bound=4e-4)

    def test_classes_are_as_many_as_may_be_made_again(self) -> None:
        """
        All of a study of four checkpoints; of one, a quarter of the examples; as memory and time
        allow.
        """
        labels = np.repeat(np.arange(10), 1000)

        def number(n_checkpoints: int, memory: int = 10**9, affordable: int = 10**6) -> int:
            return len(
                classes_to_check(
                    labels,
                    n_parameters=1000,
                    n_checkpoints=n_checkpoints,
                    memory=memory,
                    affordable=affordable,
                )
            )

        assert number(4) == 10
        assert number(1) == 2
        assert number(4, memory=3 * 16_000) == 3
        assert number(4, memory=1) == 1
        assert number(4, affordable=5000) == 5
        assert number(4, affordable=1) == 1


class TestInAStudy:
    def test_the_last_checkpoint_has_been_checked(self, finished: Path) -> None:
        """
        Its place, how many classes and examples were compared, and the largest difference of two
        means, of float32 size, are in the attributes that any reader of the store sees.
        """
        with xr.open_zarr(str(finished / "tiny.zarr")) as dataset:
            found = json.loads(dataset.attrs[WHOLE_MATRIX_CHECK])

        assert (found["learning_rate"], found["seed"], found["iteration"]) == (1e-2, 0, 30)
        assert (found["classes"], found["examples"]) == (10, 60)
        assert 0 < found["largest_difference"] < 1e-6

    def test_a_wrong_tile_that_looks_sound_ends_the_study(self, copy: Path) -> None:
        """
        Two tiles are swapped: each is symmetric with its mirror and within [−1, 1]. The check
        names the classes that differ most, and says how to mend it.
        """
        store, tiling = Store(copy), Tiling(n_examples=60, tile=20)
        tiles = {
            tile: store.read("cosine", LAST, *map(tiling.examples, tile))
            for tile in ((0, 1), (1, 2))
        }
        for tile, other in (((0, 1), (1, 2)), ((1, 2), (0, 1))):
            store.write_tile("cosine", LAST, tile, tiling, tiles[other])
            store.write_tile("cosine", LAST, tile[::-1], tiling, tiles[other].T)
        (copy / "undecided/c/1/0/1").unlink()
        (copy / "error_bound/c/1/0/1").unlink()
        unfinished(copy)

        # The sample of 60 examples holds every pair here: without its bound nothing is left but
        # the whole matrix. So the bound is what it was.
        with pytest.MonkeyPatch.context() as patch:
            sound = SampleBound(1e-6, 0, 0, 0.0, 0.0)
            patch.setattr("distributed_stiffness.engine.replica.bound_of", lambda *_, **__: sound)
            with pytest.raises(StudyFailed, match=r"whole-matrix check failed.*classes.*--repair"):
                run_study(tiny_study(), run_options(copy))

    def test_a_driver_that_died_before_its_attribute_checks_again(self, copy: Path) -> None:
        """
        The numbers of a check were written and the attribute was not: the next run writes it.
        """
        before = attribute(copy)
        unfinished(copy)
        assert attribute(copy) is None

        run_study(tiny_study(), run_options(copy))

        assert attribute(copy) == before


def unfinished(store: Path) -> None:
    """Take back that a store is finished, and its check."""
    file = store / "zarr.json"
    metadata = json.loads(file.read_text())
    for name in ("finished", WHOLE_MATRIX_CHECK):
        del metadata["attributes"][name]
    file.write_text(json.dumps(metadata))
