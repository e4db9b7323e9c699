"""Distances that are added to a store: their numbers, what is done twice, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from studies import run_options, tiny_study

from distributed_stiffness import add_distances
from distributed_stiffness.analysis import distance_profile
from distributed_stiffness.checkpoints import Checkpoints, TrainingRun
from distributed_stiffness.cli.app import app
from distributed_stiffness.data.selection import StudyData, select
from distributed_stiffness.engine import distances, run_study
from distributed_stiffness.errors import DataError, ModelError, StoreError, StudyError
from distributed_stiffness.training import build_model

LAYER = "2"  # of Flatten, Linear, ReLU, Linear, ReLU, Linear
FAR = 5  # of the 60 examples, those looked at


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("distances") / "tiny.zarr"
    run_study(tiny_study(), run_options(store))
    return store


@pytest.fixture(scope="module")
def data() -> StudyData:
    return select(tiny_study().data)


def copied(finished: Path, folder: Path) -> Path:
    for name in ("tiny.zarr", "tiny.checkpoints"):
        shutil.copytree(finished.parent / name, folder / name)
    return folder / "tiny.zarr"


@pytest.fixture(scope="module")
def added(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    """A copy of the store with three distances more."""
    store = copied(finished, tmp_path_factory.mktemp("added"))
    wanted = ["euclidean", f"latent:{LAYER}", f"latent:{LAYER}:euclidean"]
    add_distances(run_options(store), wanted)
    return xr.open_zarr(str(store))


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Path:
    """A copy of the store, for what changes it."""
    return copied(finished, tmp_path)


def hidden(store: Path, data: StudyData, rate: float, iteration: int) -> np.ndarray:
    """What the first hidden layer makes of the examples, from the weights on disk, in float64."""
    study = tiny_study().resolved(data.n_train)
    model = build_model(study, data, 0)
    folder = Checkpoints(str(store).replace(".zarr", ".checkpoints"))
    model.load_state_dict(dict(folder.load_weights(TrainingRun(rate, 0), iteration).tensors))
    first = model.double()[1]
    X = torch.from_numpy(data.features(slice(None))).double()
    return np.maximum((X @ first.weight.T + first.bias).detach().numpy(), 0)


def manhattan(X: np.ndarray, Y: np.ndarray) -> np.ndarray:
    return np.abs(X[:, None] - Y[None]).reshape(len(X), len(Y), -1).sum(-1)


def one_sided(X: np.ndarray, Y: np.ndarray) -> np.ndarray:
    return manhattan(X, Y) + X.reshape(len(X), -1)[:, :30].sum(1)[:, None]


def chunks(store: Path, name: str) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in (store / name / "c").rglob("*") if p.is_file()}


class TestNumbers:
    def test_euclidean(self, added: xr.Dataset, data: StudyData):
        """The Euclidean distance of the inputs is |x_i - x_j|, one pair at a time."""
        X = data.features(slice(None)).astype(float)
        got = added["distance_euclidean"].values

        for i in range(0, 60, FAR):
            for j in range(60):
                np.testing.assert_allclose(
                    got[i, j], np.sqrt(((X[i] - X[j]) ** 2).sum()), rtol=1e-6, atol=1e-7
                )

    def test_layer(self, finished: Path, added: xr.Dataset, data: StudyData):
        """Those of a layer are of what its weights make of the inputs, at each checkpoint."""
        for rate in added["learning_rate"].values:
            for iteration in added["iteration"].values:
                H = hidden(finished, data, float(rate), int(iteration))
                at = added.sel(learning_rate=rate, iteration=iteration).isel(seed=0)
                angles = at[f"distance_latent_{LAYER}"].values
                lengths = at[f"distance_latent_{LAYER}_euclidean"].values
                for i in range(0, 60, FAR):
                    for j in range(60):
                        a, b = H[i], H[j]
                        both = np.linalg.norm(a) * np.linalg.norm(b)
                        cosine = 1 - a @ b / both if i != j else 0
                        np.testing.assert_allclose(angles[i, j], cosine, atol=1e-6)
                        np.testing.assert_allclose(
                            lengths[i, j], np.linalg.norm(a - b), rtol=1e-5, atol=1e-6
                        )

    def test_symmetric(self, added: xr.Dataset):
        """Every matrix is symmetric to the bit, with 0 on its diagonal."""
        for name in ("distance_euclidean", f"distance_latent_{LAYER}"):
            matrix = added[name]
            np.testing.assert_array_equal(matrix, np.swapaxes(matrix.values, -1, -2))
            np.testing.assert_array_equal(np.diagonal(matrix.values, axis1=-2, axis2=-1), 0)

    def test_own(self, store: Path, data: StudyData):
        """A function of inputs gives its own numbers, under its own name."""
        names = add_distances(run_options(store), own={"manhattan": manhattan})
        X = data.inputs(slice(None))

        assert names == ["distance_manhattan"]
        got = xr.open_zarr(str(store))["distance_manhattan"]
        np.testing.assert_allclose(got, manhattan(X, X), rtol=1e-6)

    @pytest.mark.parametrize("memory", [1, 2**30])
    def test_memory(
        self, store: Path, added: xr.Dataset, monkeypatch: pytest.MonkeyPatch, memory: int
    ):
        """Vectors that are not held are made again, and are the same."""
        monkeypatch.setattr(distances, "MEMORY", memory)
        add_distances(run_options(store), [f"latent:{LAYER}"])

        again = xr.open_zarr(str(store))[f"distance_latent_{LAYER}"]
        np.testing.assert_allclose(again, added[f"distance_latent_{LAYER}"], atol=1e-6)

    def test_profile(self, added: xr.Dataset):
        """The analysis takes it by its name, and names its bins after it."""
        profile = distance_profile(added, 5, distance=f"distance_latent_{LAYER}").compute()

        assert profile["distance_bin"].attrs["long_name"] == f"cosine distance of layer {LAYER}"
        assert int(profile["pairs"].sel(relation="all").isel(iteration=0).sum()) == 2 * 60 * 59


class TestDoneTwice:
    def test_nothing(self, store: Path):
        """What is there is not written again."""
        add_distances(run_options(store), ["euclidean"])
        before = chunks(store, "distance_euclidean")
        add_distances(run_options(store), ["euclidean"])

        assert chunks(store, "distance_euclidean") == before
        assert len(before) == 9

    def test_what_is_missing(self, store: Path):
        """A tile that is missing is computed, to the same bit, and its mirror with it alone."""
        name = f"distance_latent_{LAYER}"
        add_distances(run_options(store), [f"latent:{LAYER}"])
        before, values = chunks(store, name), xr.open_zarr(str(store))[name].values
        (store / name / "c/1/0/1/2/0").unlink()
        add_distances(run_options(store), [f"latent:{LAYER}"])

        np.testing.assert_array_equal(xr.open_zarr(str(store))[name], values)
        after = chunks(store, name)
        changed = {Path(k).parts[-2:] for k in after if after[k] != before[k]}
        assert changed == {("0", "2"), ("2", "0")}

    def test_checkpoints_to_come(self, store: Path):
        """Checkpoints that are not there are left out, and added by a later call."""
        folder = Path(str(store).replace(".zarr", ".checkpoints"), "learning_rate=0.01")
        folder.rename(folder.with_name("away"))
        add_distances(run_options(store), [f"latent:{LAYER}"])
        name = f"distance_latent_{LAYER}"
        part = xr.open_zarr(str(store))[name].isel(learning_rate=1)
        assert part.isnull().all()

        folder.with_name("away").rename(folder)
        add_distances(run_options(store), [f"latent:{LAYER}"])
        assert xr.open_zarr(str(store))[name].notnull().all()

    def test_the_study_goes_on(self, store: Path):
        """A store with more distances is still that of its study."""
        add_distances(run_options(store), ["euclidean"])
        before = chunks(store, "cosine")
        run_study(tiny_study(), run_options(store))

        assert chunks(store, "cosine") == before


class TestRefused:
    @pytest.mark.parametrize("wanted", ["cosine", "latent", "latent:", "latent:2:manhattan"])
    def test_form(self, finished: Path, wanted: str):
        """Distances that do not exist are refused, with those that do."""
        with pytest.raises(StudyError, match="expected one of euclidean, latent:LAYER"):
            add_distances(run_options(finished), [wanted])

    def test_layer(self, finished: Path):
        """A layer that does not exist is refused, with those that do, before anything is made."""
        with pytest.raises(ModelError, match=r"no layer 'layer3': it has 0, 1, 2"):
            add_distances(run_options(finished), ["latent:layer3"])
        assert not (finished / "distance_latent_layer3").exists()

    def test_sums(self, tmp_path: Path):
        """A store of sums has its distances folded in."""
        run_study(tiny_study(keep="sums"), run_options(tmp_path / "sums.zarr"))

        with pytest.raises(StoreError, match="keeps sums by the cosine distance"):
            add_distances(run_options(tmp_path / "sums.zarr"), ["euclidean"])

    def test_not_symmetric(self, store: Path):
        """A function that tells (i, j) from (j, i) is no distance."""
        with pytest.raises(DataError, match="expected a symmetric distance"):
            add_distances(run_options(store), own={"mine": one_sided})

    def test_not_finite(self, store: Path):
        """Nor is one that gives no number."""
        with pytest.raises(DataError, match="distance_mine: a distance is not finite"):
            add_distances(run_options(store), own={"mine": lambda X, Y: manhattan(X, Y) * np.nan})

    def test_shape(self, store: Path):
        """Nor one that gives another number of them."""
        with pytest.raises(DataError, match=r"has shape \(20,\): expected \(20, 20\)"):
            add_distances(run_options(store), own={"mine": lambda X, Y: manhattan(X, Y)[0]})

    def test_name(self, finished: Path):
        """A name must be one that a variable can have."""
        with pytest.raises(StudyError, match="called 'my/distance'"):
            add_distances(run_options(finished), own={"my/distance": manhattan})

    def test_other_weights(self, store: Path):
        """Checkpoints that are not the store's are refused."""
        text = (store / "zarr.json").read_text()
        metadata = json.loads(text)
        attributes = metadata["attributes"]
        weights = json.loads(attributes["weights"])
        attributes["weights"] = json.dumps(dict.fromkeys(weights, "0" * 64))
        (store / "zarr.json").write_text(json.dumps(metadata))

        with pytest.raises(StoreError, match="belongs to other weights"):
            add_distances(run_options(store), [f"latent:{LAYER}"])


class TestCommand:
    def test_adds_and_lists(self, store: Path, capsys: pytest.CaptureFixture[str]):
        """`stiffness distances` adds what is asked for and lists what is there."""
        app(["distances", str(store), "euclidean", "--json"], standalone_mode=False)
        found = json.loads(capsys.readouterr().out)["distances"]

        assert found["distance_euclidean"] == "Euclidean distance of the inputs"
        app(["distances", str(store)], standalone_mode=False)
        assert "distance: cosine distance of the inputs" in capsys.readouterr().out
