"""Reading the weights of a checkpoint that another program wrote: a file, or a folder.

What a file is, its first bytes say, not its name. Nothing is unpickled but what
torch.load(weights_only=True) lets through: tensors and containers.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import fsspec
import safetensors.torch
import torch
from torch import Tensor

from distributed_stiffness.errors import CheckpointError
from distributed_stiffness.importing.outline import (
    Keys,
    is_tensor,
    networks,
    outline,
    state_dicts,
)
from distributed_stiffness.paths import located

# Names under which training scripts keep the weights beside other things.
_NESTED = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights")
_IN_FOLDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
EXTRA_STATE = "_extra_state"  # under this name a module keeps what is no tensor
_HEAD = 512  # bytes that tell what a file is
_LISTED = 4  # names that are listed
# What is no checkpoint, by its first bytes.
_OTHERS: Mapping[bytes, str] = {
    b"version https://git-lfs": "it is a pointer of Git LFS, not the file: run `git lfs pull` where"
    " it was cloned",
    b"\x1f\x8b": "it is compressed with gzip: unpack it",
    b"BZh": "it is compressed with bzip2: unpack it",
    b"\xfd7zXZ": "it is compressed with xz: unpack it",
    b"\x28\xb5\x2f\xfd": "it is compressed with zstd: unpack it",
    b"7z\xbc\xaf": "it is a 7z archive: unpack it",
    b"\x89HDF": "it is an HDF5 file, as Keras writes: save the state dict of a torch network",
    b"\x93NUMPY": "it is a NumPy array: save the state dict of a torch network",
    b"GGUF": "it is a GGUF file: save the state dict of a torch network",
    b"%PDF": "it is a PDF",
    b"\x89PNG": "it is an image",
}
_SAVE = (
    "torch.save(model.state_dict(), 'weights.pt') or"
    " safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
)


@dataclass(frozen=True)
class Read:
    """The weights of a checkpoint, as they are called there."""

    weights: Mapping[str, Any]  # tensors; and what modules keep under EXTRA_STATE
    under: str | None = None  # the keys that they were nested under
    versions: Mapping[str, Any] | None = None  # of the modules, as torch notes them beside


def read(path: str, key: str | None = None) -> Read:
    """Read the weights of a checkpoint: a file, or a folder of Hugging Face.

    Args:
        path: or URL.
        key: under which they are, such as "ema" or "state.model"; None: it is found.

    Raises:
        CheckpointError: it cannot be read, holds no state dict, or would run code.
    """
    filesystem, root = _opened(path)
    parts = [_read_file(filesystem, file, key) for file in _files(filesystem, root, path)]
    if len(parts) == 1:
        return parts[0]
    return Read({name: value for part in parts for name, value in part.weights.items()})


def stamp(path: str) -> str:
    """Return a digest that another version of the file, or folder, does not have.

    Raises:
        CheckpointError: there is no such file.
    """
    filesystem, root = _opened(path)
    seen = []
    for file in _files(filesystem, root, path):
        try:
            info = filesystem.info(file)
        except OSError as error:
            raise CheckpointError(f"cannot read the checkpoint {path}: {error}") from error
        when = info.get("ETag") or info.get("mtime") or info.get("LastModified")
        seen.append([PurePosixPath(file).name, info["size"], str(when)])
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def _opened(path: str) -> tuple[Any, str]:
    try:
        filesystem, root = fsspec.core.url_to_fs(located(path, "a checkpoint", CheckpointError))
    except (ValueError, ImportError) as error:
        if isinstance(error, CheckpointError):
            raise
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
            raise CheckpointError(_no_model(filesystem, root, path))
        if not there.endswith(".json"):
            yield f"{root}/{there}"
            return
        index = filesystem.cat_file(f"{root}/{there}")
        if not index.lstrip().startswith(b"{"):
            _refuse_what_is_none(index, f"{root}/{there}")
        shards = json.loads(index)["weight_map"].values()
        for shard in dict.fromkeys(shards):
            if (
                not isinstance(shard, str)
                or "/" in shard
                or not filesystem.exists(f"{root}/{shard}")
            ):
                raise CheckpointError(f"{path}/{there} names {shard!r}, which is not in the folder")
            yield f"{root}/{shard}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot read the checkpoint {path}: {error}") from error


def _read_file(filesystem: Any, path: str, key: str | None) -> Read:
    try:
        head = filesystem.cat_file(path, start=0, end=_HEAD)
        if _is_safetensors(head):
            is_here = "file" in filesystem.protocol
            tensors = (
                safetensors.torch.load_file(path)
                if is_here
                else safetensors.torch.load(filesystem.cat_file(path))
            )
            return _state_dict(tensors, path, key)
        _refuse_what_is_none(head, path)
        with filesystem.open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old formats: what matters is raised
            if head.startswith(b"PK"):
                _refuse_other_archives(file, path)
            try:
                loaded = torch.load(file, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError as error:
                raise CheckpointError(_not_unpickled(path, error, outline(file))) from error
            return _state_dict(loaded, path, key)
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {path}") from error
    except (IndexError, EOFError) as error:  # what torch's reader of pickles says of cut ones
        raise CheckpointError(
            f"cannot read the checkpoint {path}: it ends too early: copy or save it again"
        ) from error
    except Exception as error:  # a broken file makes torch and safetensors raise anything
        said = (str(error).splitlines() or ["it is cut short"])[0]
        raise CheckpointError(
            f"cannot read the checkpoint {path}: {type(error).__name__}: {said.split('. ')[0]}"
        ) from error


# What a file is


def _is_safetensors(head: bytes) -> bool:
    """Whether the first bytes are a length and the beginning of a JSON object."""
    return head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= 10**8


def _refuse_what_is_none(head: bytes, path: str) -> None:
    """Say what a file is that is no checkpoint, as far as its first bytes tell."""
    what = next((said for magic, said in _OTHERS.items() if head.startswith(magic)), None)
    text = head.lstrip().lower()
    if not head.strip(b"\0 \t\r\n"):
        what = "it is empty: copy or save it again"
    elif text.startswith((b"<!doctype html", b"<html", b"<head")):
        what = "it is a web page (HTML), as a download gives that needs a login or another link"
    elif text.startswith(b"<"):
        what = "it is XML, as a server answers when it refuses a download"
    elif head[257:262] == b"ustar":
        what = "it is a tar archive: unpack it"
    elif what is None and not head.startswith((b"PK", b"\x80")) and _is_text(head):
        kind = "JSON" if text.startswith((b"{", b"[")) else "text"
        beginning = head[:40].decode("utf-8", "replace").splitlines()[0]
        what = f"it is {kind}, and begins with {beginning!r}"
    if what is not None:
        raise CheckpointError(
            f"cannot read the checkpoint {path}: {what}. Expected a state dict of torch or"
            " safetensors"
        )


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode("utf-8", "ignore" if len(head) == _HEAD else "strict")
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character.isspace() for character in text)


def _refuse_other_archives(file: Any, path: str) -> None:
    """Refuse what is a zip archive, but not torch.save's."""
    if not zipfile.is_zipfile(file):
        raise CheckpointError(
            f"cannot read the checkpoint {path}: it ends too early: copy or save it again"
        )
    with zipfile.ZipFile(file) as archive:
        names = [name.partition("/")[2] or name for name in archive.namelist()]
    file.seek(0)
    if "constants.pkl" in names:
        raise CheckpointError(
            f"{path} is a TorchScript archive: save its weights alone, once, with"
            f" torch.save(torch.jit.load({path!r}).state_dict(), 'weights.pt')"
        )
    if "data.pkl" not in names:
        raise CheckpointError(
            f"{path} is a zip archive that torch.save has not written, of {listed(names)}: expected"
            f" a state dict, as from {_SAVE}"
        )


def _no_model(filesystem: Any, root: str, path: str) -> str:
    if filesystem.exists(f"{root}/.metadata"):
        return (
            f"{path} is a folder of torch.distributed.checkpoint: write it as one file, with"
            f" `python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} weights.pt`"
        )
    return (
        f"the folder {path} holds none of {', '.join(_IN_FOLDER)}: for the files of a folder, give"
        f" a pattern such as '{path}/*.pt'"
    )


# Where the state dict is


def _state_dict(loaded: Any, path: str, key: str | None) -> Read:
    """Find the state dict in what was loaded."""
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(loaded).__name__}: expected a state dict, as"
            " torch.save(model.state_dict(), …) writes it"
        )
    found = state_dicts(loaded, _is_weight)
    if not found:
        raise CheckpointError(_nothing_in(loaded, path))
    if key is None:
        keys, *others = _best(found, _is_weight)
        if others:
            raise CheckpointError(
                f"{path} holds weights under {listed(map('.'.join, (keys, *others)))}: say which"
                f" with --key {'.'.join(keys)}"
            )
    else:
        keys = _named(found, path, key)
    held = found[keys]
    numbered = [name for name, v in held.items() if isinstance(v, Tensor) and type(name) is not str]
    if numbered:
        raise CheckpointError(_numbered(numbered, path))
    weights = {
        name: value
        for name, value in held.items()
        if isinstance(value, Tensor) or str(name).endswith(EXTRA_STATE)
    }
    versions = getattr(held, "_metadata", None)
    return Read(
        weights, ".".join(keys) or None, versions if isinstance(versions, Mapping) else None
    )


def _best(found: Mapping[Keys, Mapping[Any, Any]], is_weight: Callable[[Any], bool]) -> list[Keys]:
    """Return the keys under which the weights are; several where it cannot be told.

    The names that training scripts use count first. What is chosen has to fit the network
    afterwards, name by name.
    """
    sizes = {keys: sum(map(is_weight, held.values())) for keys, held in found.items()}
    inner = [keys for keys in found if keys]
    if () in found and all(sizes[()] > sizes[keys] for keys in inner):
        return [()]

    def rank(keys: Keys) -> tuple[int, int]:
        return (0, len(keys)) if keys[-1] in _NESTED else (1, 0)

    return [keys for keys in inner if rank(keys) == min(map(rank, inner))]


def _is_weight(value: Any) -> bool:
    return isinstance(value, Tensor)


def _named(found: Mapping[Keys, Mapping[Any, Any]], path: str, key: str) -> Keys:
    by_name = {".".join(keys): keys for keys in found}
    if key not in by_name:
        where = listed(name or "(no key: at the top)" for name in by_name)
        raise CheckpointError(
            f"{path} has no weights under the key {key!r}: it has some under {where}. For names of"
            f" weights that begin with {key!r}, give --prefix {key}."
        )
    return by_name[key]


def _nothing_in(loaded: Mapping[Any, Any], path: str) -> str:
    numbered = [name for name, v in loaded.items() if isinstance(v, Tensor)]
    if numbered:
        return _numbered(numbered, path)
    return (
        f"{path} holds no state dict, only {listed(map(str, loaded)) or 'an empty mapping'}:"
        f" expected one at the top or under a key, as from {_SAVE}"
    )


def _numbered(names: list[Any], path: str) -> str:
    return (
        f"{path} holds tensors by {listed(map(repr, names))}: expected the names of weights, such"
        f" as '0.weight', as from {_SAVE}"
    )


def _not_unpickled(path: str, error: BaseException, seen: Any) -> str:
    """Say why a pickle is not read, and how its weights are had."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    if named is None:
        return (
            f"cannot read the checkpoint {path}: it is no file that torch.save has written whole."
            f" Expected one of {_SAVE}"
        )
    loads, within = "torch.load(path, weights_only=False)", state_dicts(seen, is_tensor)
    lines = [f"{loads}{_indexed(keys)}.state_dict()" for keys in networks(seen)]
    lines += [f"{loads}{_indexed(keys)}" for keys in _best(within, is_tensor)] if within else []
    line = f"torch.save({lines[0] if lines else loads + '[KEY]'}, 'weights.pt')"
    others = f" (or {listed(lines[1:])})" if len(lines) > 1 else ""
    unknown = "" if lines else ", where KEY is that of its state dict"
    return (
        f"{path} holds more than tensors ({named[1]}), so that reading it could run code: it is not"
        f" read. In the program that wrote it, save the state dict alone, with {_SAVE}; or, if you"
        f" trust the file, once: {line}{others}{unknown}"
    )


def _indexed(keys: Keys) -> str:
    return "".join(f"[{key!r}]" for key in keys)


def listed(names: Iterable[str], between: str = ", ") -> str:
    """Return the first few names, and how many more there are."""
    found = list(names)
    more = f"{between}and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return between.join(found[:_LISTED]) + more
