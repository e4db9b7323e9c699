"""The store is a contract with people who do not have this package."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import xarray as xr
from studies import assert_same_bits, run_options, tiny_study

from distributed_stiffness.engine import run_study
from distributed_stiffness.errors import StoreError
from distributed_stiffness.store import Store


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store."""
    store = tmp_path_factory.mktemp("store") / "tiny.zarr"
    run_study(tiny_study(), run_options(store))
    return store


class TestSchema:
    def test_a_process_without_the_package_opens_it_with_every_label(self, finished: Path) -> None:
        """
        xarray.open_zarr(path) alone, with warnings as errors, gives dims, class names and what was
        run.
        """
        program = textwrap.dedent(
            f"""
            import json, sys, xarray
            ds = xarray.open_zarr({str(finished)!r})
            assert ds.cosine.dims == ("learning_rate", "seed", "iteration", "example", "other")
            assert set(ds.class_name.values) == set("0123456789"), ds.class_name
            assert (ds.other_class_name.values == ds.class_name.values).all()
            assert list(ds.iteration.values) == [0, 30]
            assert set(ds.split.values) == {{"validation"}}
            seven = ds.cosine.sel(learning_rate=1e-3, seed=0, iteration=30)
            sevens, twos = (ds.class_name == "7").compute(), (ds.other_class_name == "2").compute()
            assert seven.isel(example=sevens, other=twos).shape == (6, 6)
            assert json.loads(ds.attrs["study"])["title"] == "tiny"
            assert json.loads(ds.attrs["class_names"]) == list("0123456789")
            assert ds.attrs["finished"] and json.loads(ds.attrs["versions"])["torch"]
            assert all(v.attrs["long_name"] and v.attrs["units"] and v.attrs["description"]
                       for v in ds.data_vars.values())
            assert not any(m.startswith("distributed_stiffness") for m in sys.modules)
            """
        )

        subprocess.run(
            [sys.executable, "-W", "error", "-c", program], check=True, cwd=finished.parent
        )

    def test_a_tile_is_one_chunk(self, finished: Path) -> None:
        """
        The chunk of a matrix is (1, 1, 1, tile, tile), compressed and checked by crc32c.
        """
        cosine = Store(finished).group["cosine"]

        assert cosine.chunks == (1, 1, 1, 20, 20)
        assert [type(c).__name__ for c in cosine.compressors] == ["BloscCodec", "Crc32cCodec"]

    def test_a_flipped_byte_is_found_by_any_reader(self, tmp_path: Path) -> None:
        """
        xarray raises on a chunk whose bytes changed.
        """
        store = tmp_path / "tiny.zarr"
        run_study(tiny_study(), run_options(store))
        chunk = store / "cosine/c/0/0/1/0/1"
        content = bytearray(chunk.read_bytes())
        content[len(content) // 2] ^= 1
        chunk.write_bytes(content)

        with pytest.raises(ValueError, match=r"(?i)checksum|crc"):
            xr.open_zarr(str(store)).cosine.load()

    def test_train_and_validation_examples_in_one_array(self, tmp_path: Path) -> None:
        """
        Training examples come first; `split` and `index` say which is which.
        """
        data = tiny_study().data.model_copy(update={"train_examples": 40})
        run_study(tiny_study(data=data), run_options(tmp_path / "both.zarr"))

        dataset = xr.open_zarr(str(tmp_path / "both.zarr"))

        assert list(dataset.split.values) == ["train"] * 40 + ["validation"] * 60
        block = dataset.cosine.sel(learning_rate=1e-3, seed=0, iteration=30).isel(
            example=(dataset.split == "train").compute(),
            other=(dataset.other_split == "validation").compute(),
        )
        assert block.shape == (40, 60)
        assert np.isfinite(block.values).all()


class TestBucket:
    def test_a_study_in_a_bucket_equals_one_on_disk(self, finished: Path, bucket: str) -> None:
        """
        Store and checkpoints on s3:// hold the same bits; a second run writes nothing.
        """
        url = f"{bucket}/runs/tiny.zarr"
        run_study(tiny_study(), run_options(url))

        assert_same_bits(finished, url)
        before = modified(url)
        run_study(tiny_study(), run_options(url))
        assert modified(url) == before


class TestDisk:
    def test_a_full_disk_loses_nothing_and_goes_on(self, finished: Path, tmp_path: Path) -> None:
        """
        On a disk that fills up, the run stops with a message, what is there stays readable, and
        after making room the same run completes it.
        """
        disk = tmp_path / "disk"
        disk.mkdir()
        with small_disk(disk, "2m"):
            store, checkpoints = disk / "tiny.zarr", tmp_path / "checkpoints"
            options = run_options(store, checkpoints=str(checkpoints))
            ballast = disk / "ballast"
            run_until_full(store, options, ballast)
            ballast.unlink()

            run_study(tiny_study(), options)

            assert_same_bits(finished, store)

    def test_a_disk_that_is_too_small_is_refused_at_once(self, tmp_path: Path) -> None:
        """
        A store that cannot fit is refused with what it needs and what there is.
        """
        disk = tmp_path / "disk"
        disk.mkdir()
        with small_disk(disk, "40k"), pytest.raises(StoreError, match=r"needs about .* free"):
            run_study(tiny_study(), run_options(disk / "tiny.zarr"))

    def test_leftovers_of_dead_writers_are_swept(self, finished: Path) -> None:
        """
        A half-written temporary file is removed when a run starts, and never counts as a tile.
        """
        leftover = finished / "cosine/c/0/0/0/0/.1.0123.partial"
        leftover.write_bytes(b"half")

        run_study(tiny_study(), run_options(finished))

        assert not leftover.exists()


def modified(url: str) -> dict[str, object]:
    """When each object of a store in a bucket was written."""
    filesystem, root = fsspec.core.url_to_fs(url)
    filesystem.invalidate_cache()
    return {
        name: entry["LastModified"] for name, entry in filesystem.find(root, detail=True).items()
    }


def run_until_full(store: Path, options: object, ballast: Path) -> None:
    """Fill the disk up to little room, so that the run passes its first check and then fails."""
    free = os.statvfs(ballast.parent)
    ballast.write_bytes(b"x" * (free.f_bavail * free.f_bsize - 400_000))
    with pytest.raises(StoreError, match="No space left"):
        run_study(tiny_study(), options)  # type: ignore[arg-type]
    assert (store / "zarr.json").exists()
    xr.open_zarr(str(store)).load()


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """Mount a disk of that size."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)
