"""Weights of a checkpoint that another program wrote, by the names of the network that takes them.

Nothing is unpickled but what torch.load(weights_only=True) lets through: tensors and containers.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import fsspec
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from distributed_stiffness.errors import CheckpointError

# Names under which training scripts keep the weights beside other things.
_NESTED = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights")
_IN_FOLDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_PICKLED = (".pt", ".pth", ".ckpt", ".bin", ".pth.tar")  # the last: no archive, only called so
_LISTED = 4  # keys that are named


@dataclass(frozen=True)
class Read:
    """The tensors of a checkpoint, as they are called there."""

    tensors: Mapping[str, Tensor]
    under: str | None = None  # the key that they were nested under


def read(path: str) -> Read:
    """Read the tensors of a checkpoint: a file, or a folder of Hugging Face.

    Raises:
        CheckpointError: it cannot be read, holds no state dict, or would run code.
    """
    filesystem, root = _opened(path)
    tensors: dict[str, Tensor] = {}
    under = None
    for file in _files(filesystem, root, path):
        part = _read_file(filesystem, file)
        tensors |= part.tensors
        under = part.under
    return Read(tensors, under)


def stamp(path: str) -> str:
    """Return a digest that another version of the file, or folder, does not have.

    Raises:
        CheckpointError: there is no such file.
    """
    filesystem, root = _opened(path)
    seen = []
    for file in _files(filesystem, root, path):
        info = filesystem.info(file)
        when = info.get("ETag") or info.get("mtime") or info.get("LastModified")
        seen.append([PurePosixPath(file).name, info["size"], str(when)])
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def fitted(
    read: Read, expected: Mapping[str, Tensor], path: str, prefix: str | None = None
) -> tuple[dict[str, Tensor], str]:
    """Return the weights by the network's names, and how they got them in words ("": as they were).

    Args:
        read: the checkpoint.
        expected: the network's state dict.
        path: of the checkpoint, for messages.
        prefix: of the names in the checkpoint; None: it is found.

    Raises:
        CheckpointError: names or shapes do not fit; lists the first few.
    """
    expected = {name: value for name, value in expected.items() if isinstance(value, Tensor)}
    prefix = _prefix(read.tensors, expected, path) if prefix is None else prefix
    inside = {
        name.removeprefix(prefix): tensor
        for name, tensor in read.tensors.items()
        if name.startswith(prefix)
    }
    outside = len(read.tensors) - len(inside)
    tied = _tied(inside, expected)
    inside |= tied
    _require_names(inside, expected, path, prefix)
    _require_shapes(inside, expected, path)
    notes = [
        f"found under {read.under!r}" if read.under else "",
        f"prefix {prefix!r} taken off" if prefix else "",
        f"{outside} tensors of other names left out" if outside else "",
        f"tied: {', '.join(list(tied)[:_LISTED])}" if tied else "",
        _cast(inside, expected),
    ]
    weights = {name: inside[name].to(value.dtype) for name, value in expected.items()}
    return weights, "; ".join(note for note in notes if note)


# Reading


def _opened(path: str) -> tuple[Any, str]:
    try:
        filesystem, root = fsspec.core.url_to_fs(path)
    except (ValueError, ImportError) as error:
        raise CheckpointError(f"{path} is no place for a checkpoint: {error}") from error
    return filesystem, root


def _files(filesystem: Any, root: str, path: str) -> Iterator[str]:
    """Yield the file, or those of a folder that hold weights."""
    try:
        if not filesystem.isdir(root):
            yield root
            return
        there = next((n for n in _IN_FOLDER if filesystem.exists(f"{root}/{n}")), None)
        if there is None:
            raise CheckpointError(
                f"the folder {path} holds none of {', '.join(_IN_FOLDER)}: expected a model folder"
                " of Hugging Face, or the path of a file"
            )
        if not there.endswith(".json"):
            yield f"{root}/{there}"
            return
        shards = json.loads(filesystem.cat_file(f"{root}/{there}"))["weight_map"].values()
        for shard in dict.fromkeys(shards):
            if (
                not isinstance(shard, str)
                or "/" in shard
                or not filesystem.exists(f"{root}/{shard}")
            ):
                raise CheckpointError(f"{path}/{there} names {shard!r}, which is not in the folder")
            yield f"{root}/{shard}"
    except (OSError, ValueError, KeyError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot read the checkpoint {path}: {error}") from error


def _read_file(filesystem: Any, path: str) -> Read:
    name = PurePosixPath(path).name.lower()
    try:
        if name.endswith(".safetensors"):
            if "file" in filesystem.protocol:
                return Read(safetensors.torch.load_file(path))
            return Read(safetensors.torch.load(filesystem.cat_file(path)))
        if name.endswith(_PICKLED):
            with filesystem.open(path, "rb") as file, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of old formats: what matters is raised
                return _nested(torch.load(file, map_location="cpu", weights_only=True), path)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(_would_run_code(path, error)) from error
    except Exception as error:  # a broken file makes torch and safetensors raise anything
        raise CheckpointError(
            f"cannot read the checkpoint {path}: {type(error).__name__}: {_first_line(error)}"
        ) from error
    raise CheckpointError(
        f"{path} is of a kind that is not known: expected .safetensors, {', '.join(_PICKLED)} with"
        " a state dict, or a model folder of Hugging Face; save model.state_dict() with"
        " safetensors.torch.save_file"
    )


def _nested(loaded: Any, path: str) -> Read:
    """Find the state dict in what was loaded."""
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(loaded).__name__}: expected a state dict, as"
            " torch.save(model.state_dict(), …) writes it"
        )
    if loaded and all(isinstance(value, Tensor) for value in loaded.values()):
        return Read(dict(loaded))
    for key in _NESTED:
        inside = loaded.get(key)
        if isinstance(inside, Mapping):
            tensors = {k: v for k, v in inside.items() if isinstance(v, Tensor)}
            if tensors:
                return Read(tensors, under=key)
    tensors = {k: v for k, v in loaded.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if tensors:
        return Read(tensors)
    raise CheckpointError(
        f"{path} holds no state dict, only {_names(map(str, loaded))}: expected one at the top or"
        f" under {', '.join(_NESTED)}"
    )


def _would_run_code(path: str, error: BaseException) -> str:
    said = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line]
    why = said[0].partition(" was not an allowed")[0] if said else _first_line(error)
    return (
        f"{path} holds more than tensors ({why}), so that reading it could run code: it is not"
        " read. In the program that wrote it, save the state dict alone, with"
        " torch.save(model.state_dict(), 'weights.pt') or"
        " safetensors.torch.save_file(model.state_dict(), 'weights.safetensors'); or, if you trust"
        " the file, once: torch.save(torch.load(path, weights_only=False)['state_dict'],"
        " 'weights.pt')"
    )


# Fitting


def _prefix(there: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: str) -> str:
    """Find what stands before the network's names: "", "module.", "model.", "net.", …"""
    if not expected:
        return ""
    counts: dict[str, int] = {"": 0}
    for name in there:
        parts = name.split(".")
        for k in range(len(parts)):
            if ".".join(parts[k:]) in expected:
                prefix = "".join(f"{part}." for part in parts[:k])
                counts[prefix] = counts.get(prefix, 0) + 1
    if counts[""] == len(expected):
        return ""
    most = max(counts.values())
    best = [prefix for prefix, count in counts.items() if count == most]
    if most and len(best) > 1:
        raise CheckpointError(
            f"{path} holds the network's names {len(best)} times, after"
            f" {' and '.join(map(repr, best))}: say which with --prefix {best[-1]}"
        )
    return best[0]


def _tied(inside: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what was left out because the network has it by another name too."""
    by_memory: dict[tuple[int, Any], str] = {}
    for name in expected:
        if name in inside:
            by_memory[_memory(expected[name])] = name
    return {
        name: inside[by_memory[_memory(value)]]
        for name, value in expected.items()
        if name not in inside and value.numel() and _memory(value) in by_memory
    }


def _memory(tensor: Tensor) -> tuple[int, Any]:
    return tensor.data_ptr(), tuple(tensor.shape)


def _require_names(
    inside: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: str, prefix: str
) -> None:
    missing = [f"{n} {tuple(expected[n].shape)}" for n in expected if n not in inside]
    surplus = [f"{n} {tuple(inside[n].shape)}" for n in inside if n not in expected]
    if not (missing or surplus):
        return
    parts = [
        f"it lacks {len(missing)} of {len(expected)} that the network has: {_names(missing)}"
        if missing
        else "",
        f"it has {len(surplus)} that the network has not: {_names(surplus)}" if surplus else "",
    ]
    raise CheckpointError(
        f"{path} does not fit the network"
        + (f" (names after {prefix!r})" if prefix else "")
        + f": {'; '.join(part for part in parts if part)}. Give the --model (and --model-option)"
        " that it was trained as, or --prefix if its names have another beginning"
    )


def _require_shapes(
    inside: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: str
) -> None:
    wrong = [
        f"{name} is {tuple(inside[name].shape)}, in the network {tuple(value.shape)}"
        for name, value in expected.items()
        if inside[name].shape != value.shape
    ]
    if wrong:
        raise CheckpointError(
            f"{path} does not fit the network: {_names(wrong, '; ')}. Give the --model (and"
            " --model-option) that it was trained as"
        )


def _cast(inside: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    kinds = {
        f"{_kind(inside[name])} read as {_kind(value)}"
        for name, value in expected.items()
        if inside[name].dtype != value.dtype
    }
    return ", ".join(sorted(kinds))


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _names(names: Any, between: str = ", ") -> str:
    found = list(names)
    more = f"{between}and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return between.join(found[:_LISTED]) + more


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or ["the file is empty, or cut short"])[0]
