"""What users of xarray, pandas and matplotlib do with a store and with what comes of it."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
import xarray as xr
import zarr
from studies import assert_same_bits, run_options, tiny_study
from torch import nn

from distributed_stiffness import analysis
from distributed_stiffness.attributes import decoded, encoded
from distributed_stiffness.engine import run_study
from distributed_stiffness.errors import StoreError
from distributed_stiffness.gradients import cosine_matrix, gram_matrix, layer_cosines
from distributed_stiffness.report import findings, write_report
from distributed_stiffness.store import Store
from distributed_stiffness.verify import verify_store

matplotlib.use("agg")
TEXT = ("class_name", "split", "other_class_name", "other_split")
ENGINES = [name for name in ("scipy", "netcdf4", "h5netcdf") if name in xr.backends.list_engines()]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store of two splits, in tiles of 20 that no split ends with."""
    path = tmp_path_factory.mktemp("users") / "tiny.zarr"
    data = tiny_study().data.model_copy(update={"validation_examples": 50, "train_examples": 30})
    run_study(tiny_study(data=data), run_options(path))
    return path


@pytest.fixture
def ds(store: Path) -> Iterator[xr.Dataset]:
    with xr.open_zarr(str(store)) as opened:
        yield opened


@pytest.fixture
def one(ds: xr.Dataset) -> xr.Dataset:
    """The last checkpoint of one run, its labels in memory, as docs/how-to/results.md says."""
    ds = ds.assign_coords({name: label.compute() for name, label in ds.coords.items()})
    return ds.isel(learning_rate=0, seed=0, iteration=-1)


REDUCTIONS: dict[str, Callable[[xr.Dataset], xr.Dataset]] = {
    "class_matrix": lambda ds: ds.stiffness.class_matrix(),
    "by label": lambda ds: ds.stiffness.class_matrix("label", splits=("train", "validation")),
    "within_between": lambda ds: ds.stiffness.within_between(),
    "row_sums": lambda ds: ds.stiffness.row_sums(),
    "distance_profile": lambda ds: ds.stiffness.distance_profile(),
    "distance_row_sums": lambda ds: analysis.distance_row_sums(ds),
    "critical_length": lambda ds: ds.stiffness.critical_length(),
    "split_blocks": lambda ds: ds.stiffness.split_blocks(),
    "paired_differences": lambda ds: ds.stiffness.paired_differences(ds),
    "paired_curves": lambda ds: analysis.paired_curves(ds, ds),
    "neighbours": lambda ds: ds.stiffness.neighbours(),
    "spectrum": lambda ds: ds.stiffness.spectrum(),
    "teaching": lambda ds: ds.stiffness.teaching(),
    "teaching_extremes": lambda ds: ds.stiffness.teaching_extremes(3, by_class=True),
    "curves": lambda ds: ds.stiffness.curves(),
    "reduced": lambda ds: analysis.reduced(ds).drop_encoding(),
    "sign": lambda ds: ds.stiffness.sign.to_dataset(name="sign"),
    "over_seeds": lambda ds: analysis.over_seeds(ds.stiffness.class_matrix()),
    "at_equal_losses": lambda ds: analysis.at_equal_losses(ds.stiffness.within_between()),
}


def reopened(path: Path, engine: str) -> xr.Dataset:
    with xr.open_dataset(path, engine=engine) as opened:
        return opened.load()


def zarr_warns_of_parts_of_its_format() -> pytest.MarkDecorator:
    """zarr 3.1 does, whenever anybody writes text or metadata in one file."""
    return pytest.mark.filterwarnings("ignore:(The data type|Consolidated metadata)")


class TestStore:
    @pytest.mark.parametrize("engine", ENGINES)
    def test_it_is_saved_as_netcdf(self, ds: xr.Dataset, engine: str, tmp_path: Path):
        """With every attribute, whole or a part, and reduced again from there."""
        part = ds.isel(iteration=-1, example=slice(5, None), other=slice(5, None))
        for name, some in (("whole", ds), ("part", part)):
            some.to_netcdf(tmp_path / f"{name}.nc", engine=engine)
            again = reopened(tmp_path / f"{name}.nc", engine)

            assert set(again.variables) == set(ds.variables)
            assert json.loads(again.attrs["versions"])["torch"]
            right = analysis.class_matrix(some).compute()
            xr.testing.assert_allclose(analysis.class_matrix(again).compute(), right)

    def test_attributes_are_texts_and_numbers(self, ds: xr.Dataset, store: Path):
        """For JSON, and for files that know nothing else; the store itself hands out mappings."""
        assert all(isinstance(value, str | int | float) for value in ds.attrs.values())
        assert not any(isinstance(value, bool) for value in ds.attrs.values())
        assert json.loads(json.dumps(ds.attrs)) == ds.attrs
        attributes = Store(store).attrs
        for name in ("fingerprint", "plan", "weights", "versions", "whole_matrix_check"):
            assert isinstance(attributes[name], dict), name
            assert json.loads(ds.attrs[name]) == attributes[name]

    def test_text_is_of_a_kind_that_everything_takes(self, ds: xr.Dataset):
        """Cast, compared, searched, and made upper case."""
        for name in TEXT:
            assert ds[name].dtype.kind == "U"
            assert ds[name].astype(str).dtype.kind == "U"
            first = str(ds[name].values[0])
            assert bool((ds[name] == first).any())
            assert ds[name].str.upper().dtype.kind == "U"
            assert bool(ds[name].isin([first]).any())

    @pytest.mark.filterwarnings("ignore:The specified chunks separate")
    @pytest.mark.parametrize(
        "chunks", [None, {}, "auto", 7, -1, {"example": 10}, {"example": 40, "other": 20}], ids=str
    )
    def test_chunks_of_every_kind(self, store: Path, chunks: object):
        """When it is opened or later, the numbers are the same."""
        right = xr.open_zarr(str(store)).stiffness.within_between().compute()

        opened = xr.open_zarr(str(store), chunks=chunks)  # type: ignore[arg-type]
        xr.testing.assert_allclose(opened.stiffness.within_between().compute(), right)
        if chunks is not None:
            cut = xr.open_zarr(str(store)).chunk(chunks)  # type: ignore[arg-type]
            xr.testing.assert_allclose(cut.stiffness.within_between().compute(), right)

    def test_it_is_copied_sent_and_shown(self, ds: xr.Dataset):
        """Pickled, deep copied, persisted, printed, also as HTML."""
        assert pickle.loads(pickle.dumps(ds)).equals(ds)
        assert copy.deepcopy(ds).equals(ds)
        assert ds.persist().equals(ds)
        for text in (str(ds), ds._repr_html_()):
            assert "class_name" in text
            assert "identity" not in text

    def test_tables(self, one: xr.Dataset):
        """pandas counts, groups and pivots."""
        table = one.cosine.to_dataframe()
        assert table.pivot_table("cosine", "class_name", "other_class_name").shape == (10, 10)
        assert one[["loss"]].to_dataframe().groupby("class_name").loss.mean().size == 10
        assert one.cosine.drop_vars(list(one.cosine.coords)).to_pandas().shape == (80, 80)
        assert one.loss.to_series().size == 80

    def test_selections(self, one: xr.Dataset):
        """By name, by query, by mask, with lists, stacked and back, joined with itself."""
        sevens = one.isel(example=(one.class_name == "7").values)
        assert set(one.query(example="class_name == '7'").label.values) == {7}
        assert one.set_xindex("class_name").sel(class_name="7").sizes == sevens.sizes
        assert one.where(one.class_name == "7", drop=True).sizes["example"] == len(sevens.example)
        stacked = one.cosine.stack(pair=("example", "other"))
        assert stacked.unstack("pair").shape == (80, 80)
        two = xr.concat([one, one], dim="study", data_vars="all", coords="minimal")
        assert two.sizes["study"] == 2
        assert xr.merge([one[["cosine"]], one[["loss"]]]).sizes == one.sizes
        assert one.cosine.groupby("class_name").mean("example").sizes["class_name"] == 10
        assert one.loss.groupby(["class_name", "split"]).mean().shape == (10, 2)
        assert one.loss.groupby_bins("label", [-1, 4, 9]).mean().size == 2

    def test_figures(self, one: xr.Dataset, ds: xr.Dataset):
        """A matrix, a curve, a histogram."""
        one.cosine.plot()
        one.cosine.plot.imshow(x="example")
        one.cosine.plot.hist()
        ds.train_loss.isel(seed=0).plot(hue="learning_rate", xscale="symlog")
        plt.close("all")

    @zarr_warns_of_parts_of_its_format()
    @pytest.mark.parametrize("zarr_format", [2, 3])
    def test_a_part_is_saved_in_other_chunks(
        self, one: xr.Dataset, tmp_path: Path, zarr_format: int
    ):
        """Without the encoding of the store, as docs/how-to/results.md says."""
        some = (one.class_name.isin(["3", "5"])).values
        part = one.isel(example=some, other=some)
        saved = part.drop_encoding().chunk(example=7, other=7)
        saved.to_zarr(tmp_path / "part.zarr", zarr_format=zarr_format)
        again = xr.open_zarr(tmp_path / "part.zarr")

        right = analysis.class_matrix(part).compute()
        xr.testing.assert_allclose(analysis.class_matrix(again).compute(), right)


class TestReductions:
    @zarr_warns_of_parts_of_its_format()
    @pytest.mark.parametrize("name", REDUCTIONS)
    def test_it_is_saved(self, ds: xr.Dataset, name: str, tmp_path: Path):
        """As netCDF and as Zarr, lazy and computed, and equal when it is opened again."""
        lazy = REDUCTIONS[name](ds)
        done = analysis.compute(lazy)
        for engine in ENGINES:
            done.to_netcdf(tmp_path / "x.nc", engine=engine)
            assert set(reopened(tmp_path / "x.nc", engine).variables) == set(done.variables)
        lazy.to_zarr(tmp_path / "lazy.zarr")
        xr.testing.assert_allclose(xr.open_zarr(tmp_path / "lazy.zarr").load(), done)
        assert json.loads(json.dumps(done.attrs)) == done.attrs

    @pytest.mark.parametrize("name", REDUCTIONS)
    def test_it_is_drawn_and_tabled(self, ds: xr.Dataset, name: str):
        """Along any two dimensions that are left, whatever their names are."""
        done = analysis.compute(REDUCTIONS[name](ds))
        for variable in done.data_vars.values():
            while variable.ndim > 2:
                variable = variable[-1]
            if variable.ndim and variable.dtype.kind != "b" and variable.notnull().any():
                variable.plot()
                plt.close("all")
        table = done[[next(iter(done.data_vars))]].to_dataframe()
        assert len(table)
        assert not [name for name in done.coords if done[name].dtype.kind in "OT"]

    @pytest.mark.parametrize("name", REDUCTIONS)
    def test_it_is_cut_and_sent(self, ds: xr.Dataset, name: str):
        """Pickled while lazy, in chunks of any size."""
        lazy = REDUCTIONS[name](ds)
        done = analysis.compute(lazy)

        xr.testing.assert_identical(pickle.loads(pickle.dumps(lazy)).compute(), done)
        for chunks in ("auto", 3):
            xr.testing.assert_identical(lazy.chunk(chunks).compute(), done)  # type: ignore[arg-type]


class TestNotebookResults:
    def test_they_are_saved_and_drawn(self, tmp_path: Path):
        """Matrices of a notebook's own examples."""
        net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        examples = torch.randn(12, 4), torch.arange(12) % 3
        for function in (cosine_matrix, gram_matrix, layer_cosines):
            found = function(net, "cross_entropy", examples)
            for engine in ENGINES:
                found.to_netcdf(tmp_path / "x.nc", engine=engine)
            found.plot()
            plt.close("all")
            assert json.loads(json.dumps(found.attrs)) == found.attrs
            assert not [name for name in found.coords if found[name].dtype.kind in "OT"]


class TestStoresOfBefore:
    """Mappings and booleans as attributes, text of any length: what earlier versions wrote."""

    @pytest.fixture
    def before(self, store: Path, tmp_path: Path) -> Path:
        path = tmp_path / "before.zarr"
        shutil.copytree(store, path)
        shutil.copytree(f"{store.with_suffix('')}.checkpoints", tmp_path / "before.checkpoints")
        metadata = json.loads((path / "zarr.json").read_text())
        attributes = decoded(metadata["attributes"])
        attributes |= {"laid_out": True, "dataset_verified": bool(attributes["dataset_verified"])}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            group = zarr.open_group(path, mode="r+", use_consolidated=False)
            for name in TEXT:
                old = group[name]
                text, settings = old[:], dict(old.attrs)
                dims = old.metadata.dimension_names
                del group[name]
                made = group.create_array(
                    name, shape=text.shape, dtype=str, dimension_names=dims, attributes=settings
                )
                made[:] = text.astype(object)
            zarr.consolidate_metadata(path)
        metadata = json.loads((path / "zarr.json").read_text())
        (path / "zarr.json").write_text(json.dumps(metadata | {"attributes": attributes}))
        return path

    def test_it_opens_reduces_and_reports(self, before: Path, store: Path, tmp_path: Path):
        """The numbers and the words of a store of today."""
        old, new = (xr.open_zarr(str(path)) for path in (before, store))
        assert isinstance(old.attrs["fingerprint"], dict)
        assert old["class_name"].dtype.kind == "T"

        for reduction in (analysis.class_matrix, analysis.teaching):
            xr.testing.assert_equal(reduction(old).compute(), reduction(new).compute())
        assert findings(analysis.summary(old)) == findings(analysis.summary(new))
        page = write_report(old, {}, tmp_path / "report.html").read_text()
        assert "over all stored pairs are within" in page

    def test_it_is_verified_and_mended(self, before: Path):
        """A chunk that is lost is found and computed again; what is written then is text."""
        (before / "cosine/c/0/0/1/0/1").unlink()
        checkpoints = f"{before.with_suffix('')}.checkpoints"

        assert len(verify_store(run_options(before, checkpoints=checkpoints)).faults) == 1
        mended = verify_store(run_options(before, checkpoints=checkpoints), repair=True)
        assert mended.complete
        attributes = json.loads((before / "zarr.json").read_text())["attributes"]
        assert isinstance(attributes["weights"], str)
        assert isinstance(attributes["fingerprint"], dict)

    def test_it_goes_on(self, before: Path, store: Path):
        """A run continues it to the same bits."""
        metadata = json.loads((before / "zarr.json").read_text())
        del metadata["attributes"]["finished"]
        (before / "zarr.json").write_text(json.dumps(metadata))
        shutil.rmtree(before / "cosine/c/1")
        study = Store(before).study()
        run_study(study, run_options(before))

        assert_same_bits(store, before)

    def test_a_damaged_attribute_is_said(self, before: Path):
        """JSON text that is cut short ends in a sentence."""
        metadata = json.loads((before / "zarr.json").read_text())
        metadata["attributes"]["plan"] = '{"tile": 2'
        (before / "zarr.json").write_text(json.dumps(metadata))

        with pytest.raises(StoreError, match=r"attribute `plan` of .* is damaged"):
            verify_store(run_options(before))
        assert xr.open_zarr(str(before)).stiffness.within_between().sign.notnull().all()

    def test_attributes_come_back_as_they_were(self):
        """Whatever their form in the file is."""
        given = {"plan": {"tile": 3}, "distances": ["a"], "title": '{"no": 1}', "laid_out": True}

        assert encoded(given) == {
            "plan": '{"tile": 3}',
            "distances": '["a"]',
            "title": '{"no": 1}',
            "laid_out": 1,
        }
        assert decoded(encoded(given)) == given | {"laid_out": 1}
        assert decoded(given) == given
        assert decoded({"plan": "broken {"}) == {"plan": "broken {"}
