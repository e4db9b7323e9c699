"""Checkpoints on disk or in a bucket: safetensors, which cannot run code when they are read.

    FOLDER/learning_rate=0.001/seed=0/iteration=00000468.training.safetensors
    FOLDER/learning_rate=0.001/seed=0/iteration=00000468.model.safetensors
    FOLDER/learning_rate=0.001/seed=0/continue=00000937.…            the last, to continue from

The weights are written last and whole (temporary name, fsync, rename; one object in a bucket), so a
checkpoint exists exactly when its weights do.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import safetensors.torch
import torch
from torch import Tensor, nn

from distributed_stiffness.errors import StoreError
from distributed_stiffness.paths import Location, located
from distributed_stiffness.study import NOT_GIVEN, rate_in_words

METRICS = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy")


@dataclass(frozen=True)
class TrainingRun:
    """One training run of a study."""

    learning_rate: float
    seed: int

    def __str__(self) -> str:
        seed = f"seed {self.seed}"
        if self.learning_rate == NOT_GIVEN:
            return seed
        return f"learning rate {rate_in_words(self.learning_rate)}, {seed}"


@dataclass(frozen=True)
class Weights:
    """The weights of a checkpoint and what was measured when it was written."""

    tensors: Mapping[str, Any]  # and what modules keep beside tensors (`get_extra_state`)
    metrics: Mapping[str, float]
    sha256: str


_EXTRA_STATE = "_extra_state"  # under this name torch has what a module keeps beside tensors
_PREFIX = {False: "iteration=", True: "continue="}  # by whether it is a rolling one


class Checkpoints:
    """A folder of checkpoints, local or on any fsspec URL.

    Args:
        url: of the folder.
        identity: digest of what was trained (`study.training_identity`). It is written into each
            file, and a file with another one is refused; None reads whatever is there.
    """

    def __init__(self, url: Location, *, identity: str | None = None) -> None:
        self.url, self.identity = located(url, "checkpoints", StoreError), identity
        self._fs, self._root = fsspec.core.url_to_fs(self.url)

    def exists(self, run: TrainingRun, iteration: int) -> bool:
        """Whether the checkpoint is complete."""
        self._fs.invalidate_cache()
        return bool(self._fs.exists(self._path(run, iteration, "model")))

    def iterations(self, run: TrainingRun, *, rolling: bool = False) -> list[int]:
        """Return the complete checkpoints of a run, in order.

        `rolling` ones, in every method, are those kept only to continue from: they have names of
        their own and no metrics, and never pass for one that was asked for.
        """
        self._fs.invalidate_cache()
        folder, prefix = self._folder(run), _PREFIX[rolling]
        names = self._fs.ls(folder, detail=False) if self._fs.exists(folder) else []
        stems = [Path(name).name for name in names if name.endswith(".model.safetensors")]
        return sorted(
            int(stem.partition(".")[0].removeprefix(prefix))
            for stem in stems
            if stem.startswith(prefix)
        )

    def save(
        self,
        run: TrainingRun,
        iteration: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        metrics: Mapping[str, float],
        *,
        rolling: bool = False,
    ) -> None:
        """Write weights, optimiser state, random state and metrics."""
        weights, text = _copied(model.state_dict()), json.dumps(dict(metrics))
        state = _training_state(optimizer)
        self._write(self._path(run, iteration, "training", rolling), state, {})
        self._write(self._path(run, iteration, "model", rolling), weights, {"metrics": text})

    def put(
        self, run: TrainingRun, iteration: int, weights: Mapping[str, Any], source: str
    ) -> None:
        """Write a state dict that was trained elsewhere; `source` says from what, and is kept."""
        header = {"metrics": "{}", "source": source}
        self._write(self._path(run, iteration, "model"), _copied(weights), header)

    def source(self, run: TrainingRun, iteration: int) -> str | None:
        """Return what the weights of a checkpoint were put from; None: there are none.

        Raises:
            StoreError: the file is not one that was put, or of another study.
        """
        path = self._path(run, iteration, "model")
        try:
            metadata = self._metadata(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise StoreError(f"cannot read the checkpoint {path}: {error}") from error
        self._require_identity(path, metadata)
        if "source" not in metadata:
            raise StoreError(f"{path} was not imported: give another --store, or move it away")
        return str(metadata["source"])

    def said_hash(self, run: TrainingRun, iteration: int) -> str | None:
        """Return what a checkpoint says is the hash of its weights, which are not read.

        None: there is no checkpoint, or it cannot be read.
        """
        try:
            return self._metadata(self._path(run, iteration, "model")).get("sha256")
        except (OSError, ValueError):
            return None

    def load_weights(self, run: TrainingRun, iteration: int, *, rolling: bool = False) -> Weights:
        """Read the weights of a checkpoint.

        Raises:
            StoreError: the file is broken, not a checkpoint, or of another study.
        """
        path = self._path(run, iteration, "model", rolling)
        tensors, metadata = self._read(path)
        try:
            metrics = json.loads(metadata["metrics"])
        except (KeyError, ValueError) as error:
            raise StoreError(_damaged(path, "its header has no metrics")) from error
        weights = {name: _decoded(name, tensor) for name, tensor in tensors.items()}
        return Weights(weights, metrics, metadata["sha256"])

    def restore(
        self,
        run: TrainingRun,
        iteration: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        rolling: bool = False,
    ) -> None:
        """Put model, optimiser and random state back to where they were when it was saved."""
        weights = self.load_weights(run, iteration, rolling=rolling)
        model.load_state_dict(dict(weights.tensors))
        state, _ = self._read(self._path(run, iteration, "training", rolling))
        _restore_training_state(optimizer, state)

    def delete(self, run: TrainingRun, iteration: int, *, rolling: bool = False) -> None:
        """Remove a checkpoint."""
        for part in ("model", "training"):
            self._fs.rm_file(self._path(run, iteration, part, rolling))

    def path(self, run: TrainingRun, iteration: int) -> str:
        """Return where the weights of a checkpoint are, or would be."""
        return self._path(run, iteration, "model")

    def set_aside(self, run: TrainingRun, iteration: int) -> str:
        """Rename a checkpoint's weights, so that it is made again; return their new path.

        Raises:
            StoreError: they cannot be renamed.
        """
        path = self.path(run, iteration)
        try:
            self._fs.mv(path, f"{path}.aside")
        except OSError as error:
            raise StoreError(f"cannot rename the checkpoint {path}: {error}") from error
        return f"{path}.aside"

    def _folder(self, run: TrainingRun) -> str:
        return f"{self._root}/learning_rate={run.learning_rate!r}/seed={run.seed}"

    def _path(self, run: TrainingRun, iteration: int, part: str, rolling: bool = False) -> str:
        return f"{self._folder(run)}/{_PREFIX[rolling]}{iteration:08d}.{part}.safetensors"

    def _write(self, path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        header = {**metadata, "sha256": weights_hash(tensors), "identity": self.identity or ""}
        content = safetensors.torch.save(dict(tensors), header)
        try:
            write_whole(self._fs, path, content)
        except OSError as error:
            raise StoreError(f"cannot write the checkpoint {path}: {error}") from error

    def _metadata(self, path: str) -> dict[str, str]:
        """Read the part of a file's header that is ours."""
        length = int.from_bytes(self._fs.cat_file(path, start=0, end=8), "little")
        header = json.loads(self._fs.cat_file(path, start=8, end=8 + length))
        metadata: dict[str, str] = header.get("__metadata__", {})
        return metadata

    def _read(self, path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        try:
            content = self._fs.cat_file(path)
            length = int.from_bytes(content[:8], "little")
            header = json.loads(content[8 : 8 + length])
            tensors, metadata = safetensors.torch.load(content), header.get("__metadata__", {})
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise StoreError(f"cannot read the checkpoint {path}: {error}") from error
        if "sha256" not in metadata:
            raise StoreError(f"{path} is not a checkpoint of this program: its header has no hash")
        if weights_hash(tensors) != metadata["sha256"]:
            raise StoreError(_damaged(path, "its tensors do not have the hash in its header"))
        self._require_identity(path, metadata)
        return tensors, metadata

    def _require_identity(self, path: str, metadata: Mapping[str, str]) -> None:
        if self.identity is not None and metadata.get("identity") != self.identity:
            raise StoreError(
                f"{path} is of another study: its data, labels, preprocessing, network or optimiser"
                " were others. Give another --checkpoints (and --store), or delete the old ones"
            )


def _damaged(path: str, why: str) -> str:
    return f"{path} is damaged: {why}; delete it, and the same command makes it again"


def state_hash(state: Mapping[str, Any]) -> str:
    """Return the hash that a state dict has where it is kept."""
    return weights_hash({name: _encoded(name, value) for name, value in state.items()})


def _copied(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Copy to memory of their own, in row-major order, as the format asks."""
    return {
        name: _encoded(name, value).detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in weights.items()
    }


def _encoded(name: str, value: Any) -> Tensor:
    """Return a tensor as it is; what a module keeps beside tensors, as bytes that are safe to read.

    Raises:
        StoreError: they would not be.
    """
    if isinstance(value, Tensor) and not name.endswith(_EXTRA_STATE):
        return value
    content = io.BytesIO()
    torch.save(value, content)
    encoded = torch.frombuffer(bytearray(content.getvalue()), dtype=torch.uint8)
    try:
        _decoded(name, encoded)
    except pickle.UnpicklingError as error:
        raise StoreError(
            f"a module keeps a {type(value).__name__} as {name}: expected tensors, numbers, text,"
            " and lists and dicts of these, which can be read without running code"
        ) from error
    return encoded


def _decoded(name: str, tensor: Tensor) -> Any:
    if not name.endswith(_EXTRA_STATE):
        return tensor
    return torch.load(io.BytesIO(tensor.numpy().tobytes()), weights_only=True)


def write_whole(filesystem: Any, path: str, content: bytes) -> None:
    """Write a file so that a reader sees all of it or nothing, on disk or in a bucket."""
    if "file" in filesystem.protocol:
        write_durably(Path(path), content)
    else:
        filesystem.pipe_file(path, content)


def write_durably(path: Path, content: bytes | memoryview) -> None:
    """Write a whole file: temporary name, fsync, rename. A reader sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _training_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["random.cuda"] = torch.cuda.get_rng_state()
    for index, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            if value is not None:
                state[f"optimizer.{index}.{key}"] = torch.as_tensor(value)
    return _copied(state)


def _restore_training_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["random.cpu"])
    if torch.cuda.is_available() and "random.cuda" in state:
        torch.cuda.set_rng_state(state["random.cuda"])
    entries: dict[int, dict[str, Any]] = {}
    for name, tensor in state.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            entries.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict(
        {"state": entries, "param_groups": optimizer.state_dict()["param_groups"]}
    )
