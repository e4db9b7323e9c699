"""CIFAR-10 and CIFAR-100: pickles, and a pickle can run code when it is read.

Files with the published checksums are read by torchvision. Others are read here, by an unpickler
that knows arrays and plain containers and nothing else.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from distributed_stiffness.data.download import Archive
from distributed_stiffness.data.examples import Split
from distributed_stiffness.data.published import Contents, Published
from distributed_stiffness.errors import DataError

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip

# Both the super-classes and the classes are numbered in alphabetical order.
CIFAR100_TREE = {
    "aquatic_mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
    "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
    "food_containers": ("bottle", "bowl", "can", "cup", "plate"),
    "fruit_and_vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    "household_electrical_devices": ("clock", "keyboard", "lamp", "telephone", "television"),
    "household_furniture": ("bed", "chair", "couch", "table", "wardrobe"),
    "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    "large_carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
    "large_man-made_outdoor_things": ("bridge", "castle", "house", "road", "skyscraper"),
    "large_natural_outdoor_scenes": ("cloud", "forest", "mountain", "plain", "sea"),
    "large_omnivores_and_herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    "medium_mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
    "non-insect_invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
    "people": ("baby", "boy", "girl", "man", "woman"),
    "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    "small_mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    "vehicles_1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    "vehicles_2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
}
CIFAR100_CLASSES = tuple(sorted(name for names in CIFAR100_TREE.values() for name in names))
CIFAR100_SUPERCLASSES = tuple(CIFAR100_TREE)
CIFAR100_SUPERCLASS_OF_CLASS = tuple(
    next(k for k, names in enumerate(CIFAR100_TREE.values()) if name in names)
    for name in CIFAR100_CLASSES
)


def cifar10() -> Published:
    """Colour images of ten classes."""
    from torchvision.datasets import CIFAR10

    return _published("CIFAR-10", CIFAR10, _read_cifar10)


def cifar100() -> Published:
    """Colour images of a hundred classes in twenty super-classes."""
    from torchvision.datasets import CIFAR100

    return _published("CIFAR-100", CIFAR100, _read_cifar100)


def read_pickle(path: Path) -> dict[str, Any]:
    """Read a pickled dictionary of arrays, numbers, text and plain containers of them.

    Raises:
        DataError: the file asks for anything else, is broken, or is no dictionary.
    """
    with path.open("rb") as file, _old_dtypes():
        try:
            content = _ArraysOnly(file, encoding="latin1").load()  # written by Python 2
        except Exception as error:  # a broken pickle can raise almost anything
            raise DataError(
                f"{path} cannot be read ({error}): expected a pickle of arrays, numbers and text"
                " alone; remove the file, or get it again from where it came"
            ) from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}: expected a dictionary")
    return content


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that imports nothing: every name a file may ask for is in this table."""

    def __init__(self, file: IO[bytes], *, encoding: str) -> None:
        super().__init__(file, encoding=encoding)
        from_bytes = np.zeros(1).__reduce_ex__(5)[0]
        from_shape = np.zeros(1).__reduce__()[0]
        self._allowed: dict[tuple[str, str], object] = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): _latin1_bytes,  # bytes, in pickles of protocols 0 to 2
        } | {
            (f"numpy.{core}.{module}", name): function  # the package was renamed in numpy 2
            for core in ("core", "_core")
            for module, name, function in (
                ("multiarray", "_reconstruct", from_shape),
                ("numeric", "_frombuffer", from_bytes),
            )
        }

    def find_class(self, module_name: str, global_name: str, /) -> object:
        try:
            return self._allowed[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}") from None


def _latin1_bytes(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r}")
    return text.encode("latin1")


@contextmanager
def _old_dtypes() -> Iterator[None]:
    """Silence what numpy 2.4.0 to 2.4.4 say of every array that Python 2 pickled."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"dtype\(\): align should be passed")
        yield


def _published(title: str, dataset: Any, read: Callable[[Any, Path, bool], Contents]) -> Published:
    """Lay the files out as the torchvision class does, from its address."""
    meta = [dataset.meta["filename"], dataset.meta["md5"]]
    checksums = {
        f"{dataset.base_folder}/{file}": md5
        for file, md5 in [*dataset.train_list, *dataset.test_list, meta]
    }
    archive = Archive(
        path=dataset.filename, urls=(dataset.url,), md5=dataset.tgz_md5, files=tuple(checksums)
    )
    return Published(
        title=title, checksums=checksums, archives=(archive,), read=partial(read, dataset)
    )


def _read_cifar10(dataset: Any, root: Path, verified: bool) -> Contents:
    _check_names(root / dataset.base_folder / "batches.meta", "label_names", CIFAR10_CLASSES)
    return Contents(
        train=_split(dataset, root, train=True, verified=verified, key="labels"),
        validation=_split(dataset, root, train=False, verified=verified, key="labels"),
        class_names=CIFAR10_CLASSES,
        superclass_of_class=None,
        superclass_names=None,
    )


def _read_cifar100(dataset: Any, root: Path, verified: bool) -> Contents:
    folder = root / dataset.base_folder
    _check_names(folder / "meta", "fine_label_names", CIFAR100_CLASSES)
    _check_names(folder / "meta", "coarse_label_names", CIFAR100_SUPERCLASSES)
    for file in ("train", "test"):
        _check_superclasses(folder / file)
    return Contents(
        train=_split(dataset, root, train=True, verified=verified, key="fine_labels"),
        validation=_split(dataset, root, train=False, verified=verified, key="fine_labels"),
        class_names=CIFAR100_CLASSES,
        superclass_of_class=CIFAR100_SUPERCLASS_OF_CLASS,
        superclass_names=CIFAR100_SUPERCLASSES,
    )


def _split(dataset: Any, root: Path, *, train: bool, verified: bool, key: str) -> Split:
    if verified:
        with _old_dtypes():
            published = dataset(root, train=train, download=False)
        # torchvision puts channels last, for PIL.
        images = np.ascontiguousarray(published.data.transpose(0, 3, 1, 2))
        return Split(inputs=images, labels=np.array(published.targets))
    files = dataset.train_list if train else dataset.test_list
    batches = [_read_batch(root / dataset.base_folder / file, key) for file, _ in files]
    return Split(
        inputs=np.concatenate([images for images, _ in batches]),
        labels=np.concatenate([labels for _, labels in batches]),
    )


def _read_batch(path: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images (n, 3, 32, 32) uint8 and labels (n,) of one file."""
    batch = read_pickle(path)
    images = batch.get("data")
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 2:
        raise DataError(f"{path}: 'data' is {_kind(images)}: expected uint8 of shape (n, 3072)")
    if images.shape[1] != 3 * 32 * 32:
        raise DataError(f"{path}: 'data' has shape {images.shape}: expected (n, 3072)")
    return images.reshape(-1, 3, 32, 32), _labels(path, batch, key, len(images))


def _labels(path: Path, batch: dict[str, Any], key: str, n: int) -> np.ndarray:
    labels = batch.get(key)
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise DataError(f"{path}: {key!r} is {_kind(labels)}: expected a list of integers")
    if len(labels) != n:
        raise DataError(f"{path}: {len(labels):,} {key!r} for {n:,} images: expected as many")
    return np.array(labels, dtype=np.int64)


def _check_names(path: Path, key: str, expected: Sequence[str]) -> None:
    names = read_pickle(path).get(key)
    if names == list(expected):
        return
    if not isinstance(names, list) or len(names) != len(expected):
        raise DataError(f"{path}: {key!r} is {_kind(names)}: expected {len(expected)} names")
    k = next(k for k, name in enumerate(names) if name != expected[k])
    raise DataError(f"{path}: {key!r} calls class {k} {names[k]!r}: expected {expected[k]!r}")


def _check_superclasses(path: Path) -> None:
    """Check that all images of a class have its super-class, and the published one."""
    batch = read_pickle(path)
    fine = batch.get("fine_labels")
    coarse = batch.get("coarse_labels")
    if not isinstance(fine, list) or not isinstance(coarse, list) or len(fine) != len(coarse):
        raise DataError(
            f"{path}: 'fine_labels' is {_kind(fine)}, 'coarse_labels' is {_kind(coarse)}: expected"
            " lists of one length"
        )
    for k, above in set(zip(fine, coarse, strict=True)):
        if not 0 <= k < len(CIFAR100_CLASSES):
            raise DataError(f"{path}: fine label {k} is outside 0 to 99")
        if above != CIFAR100_SUPERCLASS_OF_CLASS[k]:
            raise DataError(
                f"{path}: an image of {CIFAR100_CLASSES[k]!r} has super-class {above}: expected"
                f" {CIFAR100_SUPERCLASS_OF_CLASS[k]}, for every image of this class"
            )


def _kind(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} of shape {value.shape}"
    if isinstance(value, list):
        return f"a list of {len(value):,}"
    return "absent" if value is None else f"a {type(value).__name__}"
