"""Data sets by name: what is read, what is refused, and what the refusal says.

The files here are small ones of the true layout, made for the test; nothing asks the network.
"""

import gzip
import hashlib
import io
import pickle
import struct
import subprocess
import sys
import tarfile
import types
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets

from distributed_stiffness.data import NAMES, LabelledData, Split, catalogue, cifar, load, mnist
from distributed_stiffness.errors import DataError

MNIST_FILES = tuple(mnist.MNIST_MD5)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Every test that would reach the network fails to, as on a machine without one."""

    def refuse(*_, **__):
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def ask_nobody(*_, **__):
    pytest.fail("asked the network")


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_idx(path: Path, array: np.ndarray) -> None:
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


def write_mnist(root: Path, dataset: str = "MNIST", n: int = 30) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    written = {}
    for prefix, size in (("train", n), ("t10k", 20)):
        images = rng.integers(0, 256, (size, 28, 28)).astype(np.uint8)
        labels = (np.arange(size) % 10).astype(np.uint8)
        write_idx(root / dataset / "raw" / f"{prefix}-images-idx3-ubyte", images)
        write_idx(root / dataset / "raw" / f"{prefix}-labels-idx1-ubyte", labels)
        written |= {f"{prefix} images": images, f"{prefix} labels": labels}
    return written


def write_pickle(path: Path, content: object, protocol: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=protocol))


def write_cifar10(root: Path, n: int = 10, **changes: object) -> dict[str, dict[str, object]]:
    """Write the seven files; `changes` replace entries of data_batch_3 and of batches.meta."""
    rng = np.random.default_rng(0)
    files: dict[str, dict[str, object]] = {
        name: {
            "batch_label": name,
            "labels": [int(k) for k in rng.permutation(n) % 10],
            "data": rng.integers(0, 256, (n, 3072)).astype(np.uint8),
            "filenames": [f"{k}.png" for k in range(n)],
        }
        for name in [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]
    }
    files["batches.meta"] = {"label_names": list(cifar.CIFAR10_CLASSES), "num_vis": 3072}
    for file in ("data_batch_3", "batches.meta"):
        files[file] |= {key: value for key, value in changes.items() if key in files[file]}
    for name, content in files.items():
        write_pickle(root / "cifar-10-batches-py" / name, content)
    return files


def write_cifar100(root: Path, **changes: object) -> dict[str, dict[str, object]]:
    """Write the three files; `changes` replace entries of train and of meta."""
    rng = np.random.default_rng(0)
    files: dict[str, dict[str, object]] = {}
    for name in ("train", "test"):
        fine = [int(k) for k in rng.permutation(200) % 100]
        files[name] = {
            "fine_labels": fine,
            "coarse_labels": [cifar.CIFAR100_SUPERCLASS_OF_CLASS[k] for k in fine],
            "data": rng.integers(0, 256, (200, 3072)).astype(np.uint8),
        }
    files["meta"] = {
        "fine_label_names": list(cifar.CIFAR100_CLASSES),
        "coarse_label_names": list(cifar.CIFAR100_SUPERCLASSES),
    }
    for file in ("train", "meta"):
        files[file] |= {key: value for key, value in changes.items() if key in files[file]}
    for name, content in files.items():
        write_pickle(root / "cifar-100-python" / name, content)
    return files


@pytest.fixture
def published_mnist(tmp_path, monkeypatch):
    """A folder whose small files count as the published ones."""
    written = write_mnist(tmp_path)
    sums = {file: md5(tmp_path / "MNIST" / "raw" / file) for file in MNIST_FILES}
    monkeypatch.setattr(mnist, "MNIST_MD5", sums)
    return tmp_path, written


@pytest.fixture
def published_cifar10(tmp_path, monkeypatch):
    """A folder whose small files count as the published ones."""
    written = write_cifar10(tmp_path)
    count_as_published(torchvision.datasets.CIFAR10, tmp_path, monkeypatch)
    return tmp_path, written


@pytest.fixture
def published_cifar100(tmp_path, monkeypatch):
    """A folder whose small files count as the published ones."""
    written = write_cifar100(tmp_path)
    count_as_published(torchvision.datasets.CIFAR100, tmp_path, monkeypatch)
    return tmp_path, written


def count_as_published(dataset, root, monkeypatch):
    folder = root / dataset.base_folder
    for files in ("train_list", "test_list"):
        sums = [[name, md5(folder / name)] for name, _ in getattr(dataset, files)]
        monkeypatch.setattr(dataset, files, sums)
    meta = {**dataset.meta, "md5": md5(folder / dataset.meta["filename"])}
    monkeypatch.setattr(dataset, "meta", meta)


# Names


def test_an_unknown_name_lists_the_choices():
    """The message has every name, and the form of one's own."""
    with pytest.raises(DataError) as refusal:
        load("mnits")

    for choice in ("'mnits'", *NAMES, "package.module:factory"):
        assert choice in str(refusal.value)


def test_the_package_reads_data_without_ray_or_torch():
    """Importing it loads neither; torchvision comes with the data sets that need it."""
    code = (
        "import sys; from distributed_stiffness.data import load; load('digits');"
        "print([m for m in ('ray', 'torch', 'torchvision') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )

    assert run.stdout.strip() == "[]"


# Digits


def test_digits_need_no_files():
    """1,797 images of 8×8 pixels from 0 to 16, as shipped with scikit-learn."""
    digits = load("digits")

    assert digits.train.inputs.shape == (1297, 1, 8, 8)
    assert digits.validation.inputs.shape == (500, 1, 8, 8)
    assert digits.train.inputs.dtype == np.uint8
    assert digits.train.inputs.max() == 16
    assert digits.class_names == tuple("0123456789")
    assert digits.verified


def test_the_split_of_digits_is_always_the_same_and_balanced():
    """The content is pinned: results on digits stay comparable from version to version."""
    digits = load("digits")

    counts = np.bincount(digits.validation.labels)
    assert counts.tolist() == [50, 51, 49, 51, 50, 51, 50, 50, 48, 50]
    assert digits.content_hash().startswith("3eea3a5011f9")


# MNIST and Fashion-MNIST


def test_mnist_is_read_as_written(published_mnist):
    """Pixels and labels of both splits, in order, with one channel."""
    root, written = published_mnist
    data = load("mnist", directory=root)

    assert np.array_equal(data.train.inputs[:, 0], written["train images"])
    assert np.array_equal(data.train.labels, written["train labels"])
    assert np.array_equal(data.validation.inputs[:, 0], written["t10k images"])
    assert np.array_equal(data.validation.labels, written["t10k labels"])
    assert data.input_shape == (1, 28, 28)
    assert data.class_names == tuple("0123456789")
    assert data.verified
    assert "published checksums" in data.source


def test_the_processed_folder_of_old_versions_is_not_read(published_mnist):
    """The torchvision class would take it in place of the files whose checksums were checked."""
    root, written = published_mnist
    processed = root / "MNIST" / "processed"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):
        (processed / name).write_bytes(b"something else")

    assert np.array_equal(load("mnist", directory=root).train.inputs[:, 0], written["train images"])


def test_mnist_with_other_checksums_is_refused(tmp_path):
    """The message has file, checksum found, checksum expected, and the way out."""
    write_mnist(tmp_path)
    found = md5(tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte")
    with pytest.raises(DataError) as refusal:
        load("mnist", directory=tmp_path)

    for part in (
        "MNIST/raw/t10k-labels-idx1-ubyte",
        found,
        mnist.MNIST_MD5["t10k-labels-idx1-ubyte"],
        "--accept-unverified-data",
    ):
        assert part in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "folder", "first"),
    [("mnist", "MNIST", "0"), ("fashion_mnist", "FashionMNIST", "T-shirt/top")],
)
def test_unverified_idx_files_are_read_when_accepted(tmp_path, name, folder, first):
    """They are read, and the data say that they are unverified and which files differ."""
    written = write_mnist(tmp_path, folder)
    data = load(name, directory=tmp_path, accept_unverified=True)

    assert np.array_equal(data.train.inputs[:, 0], written["train images"])
    assert data.class_names[0] == first
    assert not data.verified
    assert f"{folder}/raw/train-images-idx3-ubyte" in data.source


def test_published_files_are_verified_whether_or_not_others_were_accepted(published_mnist):
    """Accepting unverified data does not make good data unverified."""
    root, _ = published_mnist

    assert load("mnist", directory=root, accept_unverified=True).verified


@pytest.mark.parametrize(
    ("file", "array", "message"),
    [
        ("train-images-idx3-ubyte", np.zeros((30, 28, 27), np.uint8), "28, 27"),
        ("train-images-idx3-ubyte", np.ones((30, 28, 28), np.uint8), "between 1 and 1"),
        ("t10k-images-idx3-ubyte", np.eye(28, dtype=np.uint8)[None].repeat(20, 0), "0 and 1"),
        ("train-images-idx3-ubyte", np.zeros((3, 28, 28), np.uint8), "3 inputs and 30 labels"),
        ("train-labels-idx1-ubyte", np.full(30, 10, np.uint8), "label 10 is outside 0 to 9"),
        ("t10k-labels-idx1-ubyte", np.zeros(20, np.uint8), "no example of class '1'"),
        ("t10k-labels-idx1-ubyte", np.zeros((20, 2), np.uint8), "not a whole idx file"),
    ],
)
def test_accepted_idx_files_are_checked_all_the_same(tmp_path, file, array, message):
    """Shapes, ranges, labels and classes: what the right checksums would have told."""
    write_mnist(tmp_path)
    write_idx(tmp_path / "MNIST" / "raw" / file, array)

    with pytest.raises(DataError, match=message):
        load("mnist", directory=tmp_path, accept_unverified=True)


@pytest.mark.parametrize("content", [b"", b"\0\0\x08", b"nonsense", "cut"])
def test_a_broken_idx_file_is_named(tmp_path, content):
    """Empty, cut or foreign bytes: the message has the path."""
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1] if content == "cut" else content)

    with pytest.raises(DataError, match=r"train-images-idx3-ubyte is not a whole idx file"):
        load("mnist", directory=tmp_path, accept_unverified=True)


# CIFAR


def test_cifar10_is_read_as_written(published_cifar10):
    """Five batches in order, channels first."""
    root, written = published_cifar10
    data = load("cifar10", directory=root)
    batches = [written[f"data_batch_{k}"] for k in range(1, 6)]

    assert np.array_equal(
        data.train.inputs.reshape(-1, 3072), np.concatenate([batch["data"] for batch in batches])
    )
    assert data.train.labels.tolist() == [k for batch in batches for k in batch["labels"]]
    assert np.array_equal(data.validation.inputs.reshape(-1, 3072), written["test_batch"]["data"])
    assert data.input_shape == (3, 32, 32)
    assert data.train.inputs.flags.c_contiguous
    assert data.class_names == cifar.CIFAR10_CLASSES
    assert data.verified


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_both_readers_read_the_same(request, name):
    """The torchvision class on published files, the restricted one on others: one result."""
    root, _ = request.getfixturevalue(f"published_{name}")
    verified = load(name, directory=root)
    (meta,) = root.glob("*/*meta")
    meta.write_bytes(pickle.dumps({**cifar.read_pickle(meta), "more": "bytes"}))
    unverified = load(name, directory=root, accept_unverified=True)

    assert verified.verified
    assert not unverified.verified
    assert verified.content_hash() == unverified.content_hash()


def test_cifar100_has_fine_labels_and_super_classes(published_cifar100):
    """Labels are the hundred classes; each is in one of the twenty super-classes."""
    root, written = published_cifar100
    data = load("cifar100", directory=root)

    assert data.train.labels.tolist() == written["train"]["fine_labels"]
    assert data.n_classes == 100
    assert len(data.superclass_names) == 20
    assert [data.superclass_of_class[k] for k in data.validation.labels] == (
        written["test"]["coarse_labels"]
    )


def test_the_tree_of_cifar100_is_the_known_one():
    """Twenty super-classes of five classes, in the alphabetical order of the meta file."""
    above = np.bincount(cifar.CIFAR100_SUPERCLASS_OF_CLASS)
    whale = cifar.CIFAR100_CLASSES.index("whale")

    assert above.tolist() == [5] * 20
    assert list(cifar.CIFAR100_SUPERCLASSES) == sorted(cifar.CIFAR100_SUPERCLASSES)
    assert cifar.CIFAR100_SUPERCLASS_OF_CLASS[whale] == 0


@pytest.mark.parametrize(
    ("name", "write", "file"),
    [
        ("cifar10", write_cifar10, "cifar-10-batches-py/data_batch_4"),
        ("cifar100", write_cifar100, "cifar-100-python/test"),
    ],
)
def test_cifar_with_other_checksums_is_refused_unless_accepted(tmp_path, name, write, file):
    """First a refusal that names file and flag; with the flag, unverified data."""
    write(tmp_path)
    with pytest.raises(DataError, match=f"{file}: MD5 {md5(tmp_path / file)}, expected") as refusal:
        load(name, directory=tmp_path)

    assert "--accept-unverified-data" in str(refusal.value)
    assert not load(name, directory=tmp_path, accept_unverified=True).verified


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": np.zeros((10, 3000), np.uint8)}, r"shape \(10, 3000\)"),
        ({"data": np.zeros((10, 3072))}, "float64"),
        ({"data": np.array([[{}] * 3072] * 10)}, "object"),
        ({"data": b"bytes"}, "a (str|bytes)"),
        ({"data": None}, "absent"),
        ({"labels": [0] * 9}, "9 'labels' for 10 images"),
        ({"labels": [0.5] * 10}, "list of integers"),
        ({"labels": None}, "absent"),
        ({"labels": [10] * 10}, "label 10 is outside"),
        ({"labels": [-1] * 10}, "label -1 is outside"),
        ({"label_names": [*cifar.CIFAR10_CLASSES[:9], "lorry"]}, "calls class 9 'lorry'"),
        ({"label_names": cifar.CIFAR10_CLASSES[:9]}, "expected 10 names"),
        ({"label_names": list(reversed(cifar.CIFAR10_CLASSES))}, "expected 'airplane'"),
    ],
)
def test_accepted_cifar10_is_checked_all_the_same(tmp_path, changes, message):
    """Shapes, dtypes, labels and class names; the message has what was found."""
    write_cifar10(tmp_path, **changes)

    with pytest.raises(DataError, match=message):
        load("cifar10", directory=tmp_path, accept_unverified=True)


def test_accepted_cifar10_needs_every_class_in_both_splits(tmp_path):
    """Nine images cannot show ten classes."""
    write_cifar10(tmp_path, n=9)

    with pytest.raises(DataError, match="no example of class 'truck' in the training split"):
        load("cifar10", directory=tmp_path, accept_unverified=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coarse_labels": [0] * 200}, "has super-class 0: expected"),
        ({"coarse_labels": [0] * 199}, "lists of one length"),
        ({"fine_labels": [100] * 200}, "fine label 100 is outside"),
        ({"fine_label_names": sorted(cifar.CIFAR100_CLASSES, key=len)}, "calls class 0 'be"),
        ({"coarse_label_names": list("abcdefghijklmnopqrst")}, "expected 'aquatic_mammals'"),
    ],
)
def test_accepted_cifar100_is_checked_all_the_same(tmp_path, changes, message):
    """A class lies in one super-class, the published one, under the published names."""
    write_cifar100(tmp_path, **changes)

    with pytest.raises(DataError, match=message):
        load("cifar100", directory=tmp_path, accept_unverified=True)


# Pickles


class Dangerous:
    """Runs a command when it is unpickled by the ordinary reader."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, protocol):
    """Reading the file with the ordinary reader would make a folder; ours names what it asks."""
    made = tmp_path / "made"
    batch = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    write_cifar10(tmp_path)
    write_pickle(batch, {"data": Dangerous(Path.mkdir, made), "labels": []}, protocol)

    with pytest.raises(DataError, match=r"data_batch_2 cannot be read \(it asks for"):
        load("cifar10", directory=tmp_path, accept_unverified=True)
    assert not made.exists()
    pickle.loads(batch.read_bytes())  # the file is what it is said to be
    assert made.exists()


@pytest.mark.parametrize(
    "content",
    [
        Dangerous(eval, "1"),
        Dangerous(getattr, "text", "format"),
        Dangerous(__import__, "os"),
        Dangerous(np.fromfile, "anything"),
        np.datetime64("2020"),
        Path("x"),
        {1, 2}.union,
    ],
    ids=["eval", "getattr", "import", "numpy function", "numpy scalar", "class", "method"],
)
def test_only_arrays_and_plain_containers_are_read(tmp_path, content):
    """Anything else is refused by name, though it may be harmless."""
    write_pickle(tmp_path / "file", {"data": content})

    with pytest.raises(DataError, match="it asks for"):
        cifar.read_pickle(tmp_path / "file")


def test_bytes_pass_and_other_codecs_do_not(tmp_path):
    """Old protocols write bytes as text and a codec; only the one for bytes is there."""
    import codecs

    write_pickle(tmp_path / "bytes", {"data": b"\x00\xff"}, protocol=2)
    write_pickle(tmp_path / "codec", {"data": Dangerous(codecs.encode, "text", "rot13")})

    assert cifar.read_pickle(tmp_path / "bytes") == {"data": b"\x00\xff"}
    with pytest.raises(DataError, match="rot13"):
        cifar.read_pickle(tmp_path / "codec")


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_pass_in_every_protocol(tmp_path, protocol):
    """Files rewritten by a newer Python or numpy are read like the old ones."""
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    write_pickle(tmp_path / "file", {"data": array, "names": ["a"], "n": 3}, protocol)
    content = cifar.read_pickle(tmp_path / "file")

    assert np.array_equal(content["data"], array)
    assert (content["names"], content["n"]) == (["a"], 3)


@pytest.mark.parametrize("content", [b"", b"\x80\x02}q", b"not a pickle", pickle.dumps([1])])
def test_a_broken_pickle_is_named(tmp_path, content):
    """Cut, foreign, or something else than a dictionary: the message has the path."""
    (tmp_path / "file").write_bytes(content)

    with pytest.raises(DataError, match=f"{tmp_path}/file "):
        cifar.read_pickle(tmp_path / "file")


# Missing files, and fetching them


def test_without_network_and_files_one_message_says_all(tmp_path):
    """The folder, the files expected there, every mirror tried, and the options that help."""
    with pytest.raises(DataError) as refusal:
        load("mnist", directory=tmp_path)

    for part in (
        str(tmp_path),
        *(f"MNIST/raw/{file}" for file in MNIST_FILES),
        *torchvision.datasets.MNIST.mirrors,
        "no network here",
        "--data-dir",
        "--accept-unverified-data",
        "--no-download",
    ):
        assert part in str(refusal.value)


def test_no_download_asks_nobody(tmp_path, monkeypatch):
    """With downloads off the network is not tried, and nothing is written."""
    monkeypatch.setattr(
        urllib.request, "urlopen", lambda *_, **__: pytest.fail("asked the network")
    )
    with pytest.raises(DataError, match=r"(?s)cifar-100-python/train.*downloads are off"):
        load("cifar100", directory=tmp_path / "absent", download=False)

    assert not (tmp_path / "absent").exists()


def test_only_missing_files_are_named(published_mnist):
    """Files that are there are not asked for again."""
    root, _ = published_mnist
    (root / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError) as refusal:
        load("mnist", directory=root)

    assert "t10k-labels-idx1-ubyte" in str(refusal.value)
    assert "train-images-idx3-ubyte" not in str(refusal.value)


def test_published_files_are_not_put_beside_altered_ones(tmp_path, monkeypatch):
    """Half original, half altered would be a data set that nobody has."""
    write_cifar100(tmp_path)
    (tmp_path / "cifar-100-python" / "test").unlink()
    monkeypatch.setattr(
        urllib.request, "urlopen", lambda *_, **__: pytest.fail("asked the network")
    )

    with pytest.raises(DataError, match="differ from the published"):
        load("cifar100", directory=tmp_path, accept_unverified=True)


def test_missing_mnist_is_fetched_and_unpacked(published_mnist, tmp_path_factory, monkeypatch):
    """The first mirror has nothing; the second has the files. Nothing else stays in the folder."""
    published, written = published_mnist
    mirror, root = tmp_path_factory.mktemp("mirror"), tmp_path_factory.mktemp("root")
    resources = [serve_gzip(published / "MNIST" / "raw" / file, mirror) for file in MNIST_FILES]
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
    monkeypatch.setattr(
        torchvision.datasets.MNIST, "mirrors", ["file:///absent/", f"{mirror.as_uri()}/"]
    )
    monkeypatch.setattr(urllib.request, "urlopen", open_files_only)

    data = load("mnist", directory=root)
    assert data.verified
    assert np.array_equal(data.train.inputs[:, 0], written["train images"])
    assert {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()} == {
        f"MNIST/raw/{file}" for file in MNIST_FILES
    }


def serve_gzip(file: Path, mirror: Path) -> tuple[str, str]:
    packed = mirror / f"{file.name}.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    return packed.name, md5(packed)


def open_files_only(request, **_):
    assert request.full_url.startswith("file://")
    return urllib.request.build_opener(urllib.request.FileHandler).open(request)


def test_missing_cifar_is_taken_from_an_archive_in_the_folder(published_cifar10, monkeypatch):
    """An archive that someone put there is unpacked without a network, and only what we need."""
    root, written = published_cifar10
    archive = root / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(root / "cifar-10-batches-py", "cifar-10-batches-py")
        extra = tarfile.TarInfo("../outside")
        extra.size = 4
        tar.addfile(extra, io.BytesIO(b"evil"))
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", md5(archive))
    for file in (root / "cifar-10-batches-py").iterdir():
        file.unlink()

    data = load("cifar10", directory=root, download=False)
    assert data.verified
    assert data.validation.labels.tolist() == written["test_batch"]["labels"]
    assert not (root.parent / "outside").exists()


def test_an_archive_with_another_checksum_is_not_unpacked(tmp_path):
    """It is one of the reasons in the message, with what was found and expected."""
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(b"something")

    with pytest.raises(DataError, match=f"MD5 {md5(archive)}, expected"):
        load("cifar10", directory=tmp_path)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    """A file in its place, no rights, a full disk: the system's reason, and what to do."""
    (tmp_path / "file").write_text("not a folder")

    with pytest.raises(DataError, match=r"file cannot be read or written: .*--data-dir"):
        load("mnist", directory=tmp_path / "file")


def test_the_folder_is_the_one_given_then_the_variable_then_the_cache(tmp_path, monkeypatch):
    """An argument wins over STIFFNESS_DATA_DIR, which wins over the cache folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("STIFFNESS_DATA_DIR", raising=False)
    assert catalogue.data_directory() == tmp_path / ".cache/distributed_stiffness/data"

    monkeypatch.setenv("STIFFNESS_DATA_DIR", str(tmp_path / "variable"))
    assert catalogue.data_directory() == tmp_path / "variable"
    assert catalogue.data_directory("~/given") == tmp_path / "given"


# One's own data


@pytest.fixture
def own_module(monkeypatch):
    """A module that a user wrote."""
    module = types.ModuleType("own_data")
    monkeypatch.setitem(sys.modules, "own_data", module)
    return module


def own_parts() -> dict[str, object]:
    inputs = np.random.default_rng(0).normal(size=(6, 5))
    return {
        "train": (inputs, [0, 1, 2, 0, 1, 2]),
        "validation": (inputs[:3], [2, 1, 0]),
        "class_names": ["cat", "dog", "fish"],
    }


def test_a_factory_may_return_a_mapping(own_module):
    """Inputs, labels and names are enough; the data are unverified."""
    own_module.pets = lambda: (
        own_parts()
        | {
            "superclass_of_class": [0, 0, 1],
            "superclass_names": ["furry", "scaly"],
        }
    )
    data = load("own_data:pets")

    assert data.name == "own_data:pets"
    assert data.validation.labels.tolist() == [2, 1, 0]
    assert data.superclass_of_class == (0, 0, 1)
    assert not data.verified


def test_a_factory_may_return_labelled_data(own_module):
    """They are taken as they are, under the name that was asked for, and unverified."""
    inputs = np.zeros((2, 3))
    made = LabelledData(
        name="anything",
        train=Split(inputs=inputs, labels=np.array([0, 1])),
        validation=Split(inputs=inputs, labels=np.array([0, 1])),
        class_names=("a", "b"),
        verified=True,
        source="Zeros.",
    )
    own_module.zeros = lambda: made
    data = load("own_data:zeros")

    assert (data.name, data.verified, data.source) == ("own_data:zeros", False, "Zeros.")
    assert data.train is made.train


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (7, "validation split: it is a int"),
        ({}, "returned no 'validation'"),
        ({"train": (np.zeros((2, 3)), [0, 1])}, "returned no 'validation'"),
        ({"validation": 3}, "validation split: it is a int"),
        ({"validation": (1, 2, 3)}, "validation split: there are 3 values"),
        ({"validation": (np.zeros((2, 3)), [0])}, "2 inputs and 1 labels"),
    ],
)
def test_a_factory_that_returns_something_else_is_told(own_module, made, message):
    """The message names the factory's fault and what was expected."""
    own_module.broken = lambda: made

    with pytest.raises(DataError, match=message):
        load("own_data:broken")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent_module:factory", "No module named 'absent_module'"),
        ("own_data:absent", "has no attribute 'absent'"),
        ("own_data:number", "is a int: expected a function"),
        (":factory", "cannot be imported"),
        ("own_data:", "cannot be imported"),
    ],
)
def test_a_factory_that_cannot_be_found_is_told(own_module, name, message):
    """Module or function: the message says which."""
    own_module.number = 7

    with pytest.raises(DataError, match=message):
        load(name)
