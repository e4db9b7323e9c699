"""MNIST and Fashion-MNIST: idx files, read by torchvision."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from distributed_stiffness.data.download import Archive
from distributed_stiffness.data.examples import Split
from distributed_stiffness.data.published import Contents, Published
from distributed_stiffness.errors import DataError

DIGITS = tuple("0123456789")
CLOTHES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)  # fmt: skip

# torchvision publishes the checksums of the .gz files alone. These are of what comes out of .gz
# files that have them.
MNIST_MD5 = MappingProxyType(
    {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    }
)
FASHION_MNIST_MD5 = MappingProxyType(
    {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    }
)


def mnist() -> Published:
    """Handwritten digits."""
    from torchvision.datasets import MNIST

    return _published("MNIST", MNIST, MNIST_MD5, DIGITS)


def fashion_mnist() -> Published:
    """Pieces of clothing."""
    from torchvision.datasets import FashionMNIST

    return _published("Fashion-MNIST", FashionMNIST, FASHION_MNIST_MD5, CLOTHES)


def _published(
    title: str, dataset: Any, checksums: Mapping[str, str], class_names: tuple[str, ...]
) -> Published:
    """Lay the files out as the torchvision class does, from its mirrors."""
    folder = f"{dataset.__name__}/raw"
    return Published(
        title=title,
        checksums={f"{folder}/{file}": md5 for file, md5 in checksums.items()},
        archives=tuple(
            Archive(
                path=f"{folder}/{packed}",
                urls=tuple(mirror + packed for mirror in dataset.mirrors),
                md5=md5,
                files=(f"{folder}/{packed.removesuffix('.gz')}",),
            )
            for packed, md5 in dataset.resources
        ),
        read=partial(_read, folder, class_names),
    )


def _read(folder: str, class_names: tuple[str, ...], root: Path, verified: bool) -> Contents:
    """Read both splits; idx files run no code, so verified or not they are read the same way."""
    del verified
    return Contents(
        train=_split(root / folder, "train"),
        validation=_split(root / folder, "t10k"),
        class_names=class_names,
        superclass_of_class=None,
        superclass_names=None,
    )


def _split(folder: Path, prefix: str) -> Split:
    # The readers, not the class: the class would take a `processed` folder of old versions, when
    # there is one, in place of the files that were checked.
    from torchvision.datasets.mnist import read_image_file, read_label_file

    images = _idx(read_image_file, folder / f"{prefix}-images-idx3-ubyte")
    labels = _idx(read_label_file, folder / f"{prefix}-labels-idx1-ubyte")
    if images.shape[1:] != (28, 28):
        raise DataError(
            f"{folder / prefix}-images-idx3-ubyte holds images of {images.shape[1:]} pixels:"
            " expected (28, 28)"
        )
    return Split(inputs=images[:, None], labels=labels)


def _idx(reader: Any, path: Path) -> np.ndarray:
    try:
        array: np.ndarray = reader(str(path)).numpy()
    except Exception as error:  # asserts, key, type and value errors, by what is wrong in the file
        raise DataError(
            f"{path} is not a whole idx file of bytes ({type(error).__name__}: {error}); remove it"
            " to have it fetched"
        ) from error
    return array
