"""What a pickled file holds, seen without running any of its code.

Every class and function that a pickle names becomes an empty stand-in, so that its shape can be
seen: which keys it has, where tensors are. No number is read, and nothing of it is imported.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

_LARGEST = 2**28  # bytes of a pickle that is looked at; tensors lie beside it
_DEEPEST = 3  # keys on the way to a state dict
_OF_TENSORS = ("_rebuild_tensor", "_rebuild_parameter", "_rebuild_from_type", "_rebuild_qtensor")
_NO_WEIGHTS = ("optim", "sched", "scaler", "rng", "random", "_extra_state")

Keys = tuple[str, ...]


def state_dicts(loaded: Any, is_weight: Callable[[Any], bool]) -> dict[Keys, Mapping[Any, Any]]:
    """Return the mappings that hold weights by name, by the keys that lead to them.

    Args:
        loaded: what was in a file.
        is_weight: whether a value is one.
    """
    found: dict[Keys, Mapping[Any, Any]] = {}

    def look(value: Any, keys: Keys) -> None:
        if not isinstance(value, Mapping):
            return
        if any(isinstance(name, str) and is_weight(v) for name, v in value.items()):
            found[keys] = value
        if len(keys) < _DEEPEST:
            for name, inner in value.items():
                # An optimiser's tensors have names too, and those that a module keeps as it likes.
                if isinstance(name, str) and not any(w in name.lower() for w in _NO_WEIGHTS):
                    look(inner, (*keys, name))

    look(loaded, ())
    return found


def outline(file: BinaryIO) -> Any:
    """Return what was pickled, with stand-ins for all that is not a plain container or value.

    None: it cannot be seen.
    """
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                (name,) = (n for n in archive.namelist() if n.rpartition("/")[2] == "data.pkl")
                if archive.getinfo(name).file_size > _LARGEST:
                    return None
                with archive.open(name) as inner:
                    return _Outlines(inner).load()
        file.seek(0)
        first = _Outlines(file).load()
        if not isinstance(first, int):
            return first
        for _ in range(2):  # torch's older format: a magic number, its version, the machine
            _Outlines(file).load()
        return _Outlines(file).load()
    except Exception:  # a damaged pickle raises anything
        return None


def is_tensor(value: Any) -> bool:
    """Whether a stand-in is that of a tensor."""
    return isinstance(value, _Standin) and value.origin.startswith(_OF_TENSORS)


def is_network(value: Any) -> bool:
    """Whether a stand-in is that of a torch.nn.Module."""
    state = value.state if isinstance(value, _Standin) else None
    return isinstance(state, Mapping) and {"_parameters", "_modules"} <= state.keys()


def networks(loaded: Any) -> list[Keys]:
    """Return the keys that lead to whole networks; () where it is one itself."""
    if is_network(loaded):
        return [()]
    if not isinstance(loaded, Mapping):
        return []
    return [(key,) for key, v in loaded.items() if isinstance(key, str) and is_network(v)]


class _Standin:
    """In the place of an object that the pickle would make."""

    origin = ""  # the name of its class or function
    state: Any = None

    def __new__(cls, *_: Any, **__: Any) -> _Standin:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> _Standin:
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def _taken(self, *_: Any) -> None:
        """Take what belongs into a container."""

    append = extend = add = __setitem__ = _taken


class _Outlines(pickle.Unpickler):
    """Unpickles containers and plain values; finds no class and no function."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        return type(name, (_Standin,), {"origin": name})

    def persistent_load(self, pid: Any) -> Any:
        # torch's older format keeps a module's class so, and storages as ever.
        return pid[1] if isinstance(pid, tuple) and pid[:1] == ("module",) else _Standin()
