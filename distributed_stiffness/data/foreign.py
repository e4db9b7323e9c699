"""Data of the user's own: what a function of theirs returns, npz files, folders of images, and
Hugging Face data sets on disk. They are taken as they are, and need no training split.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from distributed_stiffness.data.arrays import as_array, as_inputs
from distributed_stiffness.data.examples import LabelledData, Split
from distributed_stiffness.data.names import in_label_order
from distributed_stiffness.errors import DataError

_EXPECTED = (
    "expected (inputs, labels) or (inputs, labels, class names), a data set of pairs with a length,"
    " or a mapping with 'validation' (and maybe 'train') as either, and maybe 'class_names',"
    " 'superclass_of_class' and 'superclass_names'"
)
_INPUTS, _LABELS = ("x", "inputs"), ("y", "labels", "targets")
_COLUMNS = ("input_ids", "pixel_values", "x", "inputs", "image", "img")
_MOST_CLASSES = 1_000_000  # that numbers alone name: beyond, they are identities
_TOKENS = ("input_ids", "attention_mask", "token_type_ids")


def labelled(made: Any, name: str) -> LabelledData:
    """Return what a user's function returned as a data set.

    Args:
        made: a LabelledData; a pair (inputs, labels), N first, of arrays or torch tensors, where
            the inputs may be a mapping of several by name; such a pair and the names of the
            classes; a data set of pairs with a length, such as a map-style torch Dataset; or a
            mapping with "validation" and maybe "train" as either of these, and maybe "class_names"
            (`names.in_label_order`), "superclass_of_class", "superclass_names".
        name: for messages and the store.

    Raises:
        DataError: it is anything else, or the parts do not fit together.
    """
    if isinstance(made, LabelledData):
        return replace(made, name=name, verified=False)
    parts = dict(made) if isinstance(made, Mapping) else {"validation": made}
    if "validation" not in parts:
        raise DataError(
            f"{name} returned no 'validation' but {sorted(map(str, parts))}: {_EXPECTED}"
        )
    parts = _named(parts.pop("validation"), name) | parts
    validation = _split(parts["validation"], f"{name}, validation split")
    train = None if parts.get("train") is None else _split(parts["train"], f"{name}, train split")
    names = parts.get("class_names")
    if names is None:
        names = _classes_of(parts["validation"]) or _numbered(validation, train)
    above, above_names = parts.get("superclass_of_class"), parts.get("superclass_names")
    return LabelledData(
        name=name,
        train=train,
        validation=validation,
        class_names=in_label_order(names, f"class_names of {name}"),
        superclass_of_class=None if above is None else _superclasses(above, name),
        superclass_names=None
        if above_names is None
        else in_label_order(above_names, f"superclass_names of {name}"),
        verified=False,
        source=parts.get("source", f"Made by {name}."),
    )


def _named(made: Any, name: str) -> dict[str, Any]:
    """Return a split, and the names of its classes if it has them: of three values the last.

    Raises:
        DataError: they may be those of the examples.
    """
    is_three = isinstance(made, tuple | list) and len(made) == 3
    if not is_three or not _are_names(made[2]):
        return {"validation": made}
    inputs, labels, names = made
    if not isinstance(names, Mapping) and len(names) == len(labels):
        raise DataError(
            f"{name} returned {len(names)} names for {len(labels)} labels, which may be those of"
            " the examples or of the classes: return {'validation': (inputs, labels),"
            " 'class_names': names} if they are of the classes, else (inputs, labels)"
        )
    return {"validation": (inputs, labels), "class_names": names}


def _are_names(given: Any) -> bool:
    if isinstance(given, Mapping):
        return True
    is_listed = isinstance(given, list | tuple) or getattr(given, "ndim", 0) == 1
    return is_listed and len(given) > 0 and all(isinstance(name, str) for name in given)


def _classes_of(made: Any) -> Any:
    """Return the names that a Dataset has, or the one that it is a part of; None: it has none."""
    while not hasattr(made, "classes") and hasattr(made, "dataset"):  # torch.utils.data.Subset
        made = made.dataset
    names = getattr(made, "classes", None)
    return names if isinstance(names, list | tuple | Mapping) and len(names) else None


def _superclasses(given: Any, name: str) -> tuple[int, ...]:
    """Return the number of each class's super-class."""
    try:
        numbers = given.values() if isinstance(given, Mapping) else given
        array = as_array(list(numbers), f"superclass_of_class of {name}")
    except TypeError as error:
        raise DataError(
            f"superclass_of_class of {name} is {given!r}: expected the number of a super-class for"
            " each class"
        ) from error
    is_in_order = not isinstance(given, Mapping) or list(given) == list(range(len(given)))
    if array.ndim != 1 or array.dtype.kind not in "iu" or not is_in_order:
        raise DataError(
            f"superclass_of_class of {name} is {given!r}: expected the number of a super-class for"
            " each class, in the order of the labels"
        )
    return tuple(int(k) for k in array)


def _numbered(*splits: Split | None) -> list[str]:
    there = [split.labels for split in splits if split is not None]
    most = max(int(labels.max()) for labels in there)
    if most >= _MOST_CLASSES:
        raise DataError(
            f"there is a label {most:,}: expected labels of classes, 0, 1, 2, …; number them with"
            " np.unique(labels, return_inverse=True), and give class_names"
        )
    return [str(k) for k in range(max(most + 1, 2))]


def _split(made: Any, where: str) -> Split:
    try:
        inputs, labels = _pair(made)
        return Split(inputs=as_inputs(inputs), labels=as_array(labels, "labels"))
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _pair(made: Any) -> tuple[Any, Any]:
    """Return inputs and labels, each N first."""
    if isinstance(made, tuple | list) and len(made) <= (3 if isinstance(made, tuple) else 2):
        if made and all(_is_split(part) for part in made):
            raise DataError(
                f"there are {len(made)} splits: return {{'train': …, 'validation': …}}, or the one"
                " that is to be measured"
            )
        if len(made) == 2:
            return _inputs_alone(made[0], made[1]), made[1]
    if not (hasattr(made, "__getitem__") and hasattr(made, "__len__")) or isinstance(made, str):
        raise DataError(f"it is a {type(made).__name__}: {_EXPECTED}")
    pairs = [made[i] for i in range(len(made))]
    if isinstance(made, tuple) and not all(isinstance(p, tuple | list) for p in made):
        raise DataError(f"there are {len(made)} values: {_EXPECTED}")
    if not pairs or not all(isinstance(p, tuple | list) and len(p) == 2 for p in pairs):
        kind = type(pairs[0]).__name__ if pairs else "nothing"
        raise DataError(f"the items are no pairs (input, label) but {kind}: {_EXPECTED}")
    inputs, labels = (list(parts) for parts in zip(*pairs, strict=True))
    if not isinstance(inputs[0], Mapping):
        return _inputs_alone(inputs, labels), labels
    if not all(isinstance(x, Mapping) and x.keys() == inputs[0].keys() for x in inputs):
        names = ", ".join(map(str, inputs[0])) or "none"
        raise DataError(
            f"the inputs cannot be stacked: the first has {names} by name, others have not just"
            " these"
        )
    return {name: [x[name] for x in inputs] for name in inputs[0]}, labels


def _is_split(made: Any) -> bool:
    """Whether this is a data set, or a pair of as many inputs as labels."""
    if isinstance(made, tuple | list):
        return len(made) == 2 and all(map(_is_many, made))
    is_array = hasattr(made, "__array__") or isinstance(made, Mapping | str)
    return not is_array and hasattr(made, "__getitem__") and hasattr(made, "__len__")


def _is_many(value: Any) -> bool:
    return isinstance(value, list | tuple | Mapping) or getattr(value, "ndim", 0) > 0


def _inputs_alone(inputs: Any, labels: Any) -> Any:
    """Return inputs, if they are not several without names.

    Raises:
        DataError: NumPy would stack them into one.
    """
    first = inputs[0] if isinstance(inputs, tuple | list) and len(inputs) else None
    is_plain = isinstance(first, list) and not any(hasattr(part, "__array__") for part in first)
    of_each = isinstance(first, tuple | list) and any(map(_is_many, first)) and not is_plain
    of_all = hasattr(first, "__array__") and _is_many(first) and len(inputs) != len(labels)
    if of_each or of_all:
        raise DataError(
            "there are several inputs without names: give a mapping of them, by what the network's"
            " forward calls them"
        )
    return inputs


@dataclass(frozen=True)
class Pixels:
    """How images become arrays; the fields are those options of `read_images`."""

    resize: int | None = None
    crop: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    grey: bool = False

    def of(self, images: Iterable[tuple[str, Any]]) -> np.ndarray:
        """Return images of PIL, each with its name for messages, as (n, C, H, W) float32.

        Raises:
            DataError: they are not of one size.
        """
        arrays: list[np.ndarray] = []
        first = ""
        for name, image in images:
            arrays.append(self._one(image))
            first = first or name
            if arrays[-1].shape != arrays[0].shape:
                raise DataError(
                    f"{name} is {arrays[-1].shape[1:]} pixels, {first} is {arrays[0].shape[1:]}:"
                    " expected one size for all; give --data-option resize=256 and crop=224, or"
                    " others"
                )
        x = np.stack(arrays)
        if self.mean is None and self.std is None:
            return x
        return _normalised(x, self.mean or [0.0], self.std or [1.0])

    def _one(self, image: Any) -> np.ndarray:
        from torchvision.transforms import functional as T

        if self.resize is not None:
            image = T.resize(image, self.resize)
        if self.crop is not None:
            image = T.center_crop(image, [self.crop, self.crop])
        if self.grey:
            image = T.rgb_to_grayscale(image)
        array: np.ndarray = T.to_tensor(image).numpy()
        return array


# Readers of files: each takes a path, and options by name


def read_npz(path: Path, inputs: str = "", labels: str = "") -> Mapping[str, Any]:
    """Read arrays `x` (or `inputs`) and `y` (or `labels`), and `class_names` if it is there.

    Raises:
        DataError: there is no such file, or it lacks them.
    """
    if path.is_file() and not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            beginning = file.read(24)
        raise DataError(
            f"cannot read {path}: it begins with {beginning!r} and is no .npz; expected what"
            " numpy.savez writes, whole"
        )
    try:
        with np.load(path, allow_pickle=False) as arrays:
            x = _array_named(arrays, (inputs,) if inputs else _INPUTS, path)
            y = _array_named(arrays, (labels,) if labels else _LABELS, path)
            names = arrays["class_names"].tolist() if "class_names" in arrays else None
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot read {path}: {error}; expected an .npz of numbers") from error
    return {"validation": (x, y), "class_names": names, "source": f"Read from {path}."}


def _array_named(arrays: Mapping[str, np.ndarray], names: Sequence[str], path: Path) -> np.ndarray:
    for name in names:
        if name in arrays:
            return arrays[name]
    raise DataError(
        f"{path} has no array {' or '.join(map(repr, names))}, only {', '.join(arrays)}: name it"
        " so, or give --data-option inputs=NAME and labels=NAME"
    )


def read_images(
    path: Path,
    resize: int | None = None,
    crop: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    grey: bool = False,
    per_class: int | None = None,
) -> Mapping[str, Any]:
    """Read a folder with a folder of images for each class, as torchvision's ImageFolder does.

    Images are (3, H, W), or (1, H, W) with `grey`, of float32 in [0, 1].

    Args:
        path: of the folder.
        resize: length of the shorter side.
        crop: side of the square cut out of the middle, after that.
        mean: subtracted, one for each channel.
        std: divided by, one for each channel.
        grey: one channel.
        per_class: images of each class, the first by name; None: all.

    Raises:
        DataError: there is no such folder, or the images are not of one size.
    """
    from torchvision.datasets import ImageFolder

    if not path.is_dir():
        raise DataError(f"there is no folder {path}: expected one with a folder for each class")
    try:
        folder = ImageFolder(str(path))
    except FileNotFoundError as error:
        raise DataError(f"{path} holds no images by class: {error}") from error
    chosen = [
        sample
        for k in range(len(folder.classes))
        for sample in islice((s for s in folder.samples if s[1] == k), per_class)
    ]
    images = ((file, folder.loader(file)) for file, _ in chosen)
    x = Pixels(resize, crop, mean, std, grey).of(images)
    labels = np.array([label for _, label in chosen])
    source = f"Images of {path}."
    return {"validation": (x, labels), "class_names": folder.classes, "source": source}


def _normalised(x: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, x.shape[1]):
            raise DataError(
                f"{name} is {list(values)}: expected {x.shape[1]} numbers, one a channel, or one"
            )
    if min(std) <= 0:
        raise DataError(f"std is {list(std)}: expected numbers above 0")
    centred = x - np.asarray(mean, dtype=np.float32)[:, None, None]
    return centred / np.asarray(std, dtype=np.float32)[:, None, None]


def read_hugging_face(
    path: Path,
    split: str = "validation",
    inputs: str = "",
    labels: str = "",
    limit: int = 0,
    resize: int | None = None,
    crop: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    grey: bool = False,
) -> Mapping[str, Any]:
    """Read a data set that `datasets` has saved with save_to_disk.

    Args:
        path: of its folder.
        split: of a folder with several.
        inputs: column of the inputs; "": input_ids (with attention_mask and token_type_ids where
            there are such columns, all padded to one length), or pixel_values, x, inputs, image,
            img.
        labels: column of the labels; "": label, labels or y.
        limit: examples, the first; 0: all.
        resize: of a column of images, as of `read_images`; so are the others.
        crop: see there.
        mean: see there.
        std: see there.
        grey: see there.

    Raises:
        DataError: `datasets` is not installed, or there are no such columns.
    """
    found = _saved(path, split)
    columns, label = found.column_names, labels or _first(found, ("label", "labels", "y"), path)
    column = inputs or _first(found, _COLUMNS, path)
    chosen = [c for c in _TOKENS if c in columns] if column == "input_ids" else [column]
    for name in (*chosen, label):
        if name not in columns:
            raise DataError(f"{path} has no column {name!r}, only {', '.join(columns)}")
    pictures = Pixels(resize, crop, mean, std, grey)
    rows = found.select(range(min(limit or len(found), len(found))))
    if type(found.features[column]).__name__ == "Image":
        named = ((f"row {k} of {path}", row[column]) for k, row in enumerate(rows))
        arrays = {column: pictures.of((name, image.convert("RGB")) for name, image in named)}
    elif pictures != Pixels():
        raise DataError(
            f"column {column!r} of {path} holds numbers, which are taken as they are: leave resize,"
            " crop, mean, std and grey out"
        )
    else:
        numbers = rows.with_format("numpy")
        arrays = {name: _even(numbers[name][:], name, path) for name in chosen}
    classes = getattr(found.features[label], "names", None)
    return {
        "validation": (arrays if len(arrays) > 1 else arrays[column], np.asarray(rows[label][:])),
        "class_names": classes,
        "source": f"Hugging Face data set {path}.",
    }


def _saved(path: Path, split: str) -> Any:
    """Load what save_to_disk wrote, of several splits one."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"hf:{path} needs the package datasets: pip install 'distributed_stiffness[hf]'"
        ) from error
    if not path.is_dir():
        raise DataError(f"there is no folder {path}: expected one that save_to_disk wrote")
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path} as a data set: {error}") from error
    if not isinstance(found, datasets.DatasetDict):
        return found
    if split not in found:
        raise DataError(
            f"{path} has the splits {', '.join(found)}, no {split!r}: give --data-option split=NAME"
        )
    return found[split]


def _first(found: Any, names: Sequence[str], path: Path) -> str:
    for name in names:
        if name in found.column_names:
            return name
    raise DataError(
        f"{path} has the columns {', '.join(found.column_names)}, none of {', '.join(names)}: give"
        " --data-option inputs=NAME and labels=NAME"
    )


def _even(column: Any, name: str, path: Path) -> np.ndarray:
    array = np.asarray(column)
    if array.dtype == object:
        lengths = sorted({len(row) for row in array})
        if not lengths or lengths[0] != lengths[-1]:
            raise DataError(
                f"the rows of column {name!r} in {path} have lengths from {lengths[0]} to"
                f" {lengths[-1]}: expected one; tokenise with padding='max_length'"
            )
        array = np.stack(list(array))
    return array


READERS: Mapping[str, Callable[..., Mapping[str, Any]]] = {
    "npz": read_npz,
    "images": read_images,
    "hf": read_hugging_face,
}
