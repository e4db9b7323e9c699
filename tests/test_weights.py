"""Weights of other programs: what torch itself loads is taken, what is no checkpoint is said."""

from __future__ import annotations

import argparse
import datetime
import gzip
import io
import pickle
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

from distributed_stiffness import Run, cosine_matrix, measure_checkpoints, verify_store
from distributed_stiffness.checkpoints import Checkpoints, TrainingRun
from distributed_stiffness.errors import CheckpointError, StoreError
from distributed_stiffness.importing.content import read
from distributed_stiffness.importing.outline import outline
from distributed_stiffness.importing.weights import fitted

CODE = '''
import torch
from torch import nn


class Scaled(nn.Module):
    """Keeps a number that is no tensor."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 3), 1.0

    def forward(self, x):
        return torch.tanh(self.layer(x) * self.scale)

    def get_extra_state(self):
        return {"scale": self.scale}

    def set_extra_state(self, state):
        self.scale = state["scale"]


def compiled():
    return nn.Sequential(torch.compile(nn.Linear(4, 5), backend="eager"), nn.Linear(5, 3))


def data():
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    return x, torch.arange(12) % 3
'''


@pytest.fixture(autouse=True)
def _in_an_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture
def code(request: pytest.FixtureRequest) -> Any:
    """A module of the user's own."""
    import importlib

    name = f"code_{abs(hash(request.node.name))}"
    Path(f"{name}.py").write_text(CODE)
    return importlib.import_module(name)


def two() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def weight_normed() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5)), nn.Linear(5, 3))


def old_weight_normed() -> dict[str, Tensor]:
    """As torch before 2.0 writes it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 5)), nn.Linear(5, 3))
    return old.state_dict()


class Within(nn.Module):
    """A part with a name."""

    def __init__(self) -> None:
        super().__init__()
        self.net = two()


class CalledModule(nn.Module):
    """A part that is called as wrappers call theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(4, 3)


class Twins(nn.Module):
    """One that has the same names within and without."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(4, 3)
        self.weight = nn.Parameter(torch.ones(3, 4))
        self.bias = nn.Parameter(torch.ones(3))


class Numbered(nn.Module):
    """A buffer that it makes itself, and does not store."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("ids", torch.arange(4), persistent=False)


class Renamed(nn.Module):
    """Takes what an earlier version of it wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.new = nn.Linear(4, 3)

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        for name in ("weight", "bias"):
            if f"{prefix}old.{name}" in state:
                state[f"{prefix}new.{name}"] = state.pop(f"{prefix}old.{name}")
        super()._load_from_state_dict(state, prefix, *rest)


class Tied(nn.Module):
    """One tensor by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight


def taken(build: Callable[[], nn.Module], state: Any, **how: Any) -> tuple[dict[str, Any], str]:
    """Save, read and fit."""
    torch.save(state, "w.pt")
    key = how.pop("key", None)
    return fitted(read("w.pt", key), build(), "w.pt", **how)


def renamed(state: dict[str, Tensor], change: Callable[[str], str]) -> dict[str, Tensor]:
    return {change(name): value for name, value in state.items()}


class TestWhatTorchTakes:
    @pytest.mark.parametrize(
        ("build", "state"),
        [
            (normed, {k: v for k, v in normed().state_dict().items() if "num_b" not in k}),
            (weight_normed, old_weight_normed()),
            (Renamed, {"old.weight": torch.ones(3, 4), "old.bias": torch.zeros(3)}),
            (lambda: nn.Sequential(nn.LazyLinear(5), nn.Linear(5, 3)), two().state_dict()),
            (Numbered, Numbered().state_dict()),
            (Tied, Tied().state_dict()),
            (weight_normed, weight_normed().state_dict()),
            (
                lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3))),
                nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3))).state_dict(),
            ),
        ],
    )
    def test_is_taken(self, build: Callable[[], nn.Module], state: dict[str, Tensor]) -> None:
        """
        The network's own load_state_dict decides: the same weights come out as of it.
        """
        by_torch = build()
        by_torch.load_state_dict(state)

        found, _ = taken(build, state)

        assert found.keys() == by_torch.state_dict().keys()
        for name, value in by_torch.state_dict().items():
            assert torch.equal(found[name], value), name

    def test_versions_are_kept(self) -> None:
        """
        A state dict that says it has num_batches_tracked, and has not, is refused as by torch.
        """
        state = normed().state_dict()
        del state["1.num_batches_tracked"]

        with pytest.raises(CheckpointError, match=r"lacks 1 of 9 .*1\.num_batches_tracked"):
            taken(normed, state)

    def test_what_one_checkpoint_lacks_is_not_left_from_another(self) -> None:
        """
        Every checkpoint is read into a network of its own.
        """
        counted = normed().state_dict() | {"1.num_batches_tracked": torch.tensor(9)}
        plain = {k: v for k, v in normed().state_dict().items() if "num_b" not in k}
        torch.save(counted, "step-1.pt")
        torch.save(plain, "step-2.pt")
        x = torch.randn(6, 4), torch.arange(6) % 3
        np.savez("d.npz", x=x[0].numpy(), y=x[1].numpy())
        Path("nets_of_batches.py").write_text(
            "from torch import nn\n"
            "def build(): return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))"
        )
        run = Run(store="s.zarr", engine="serial", quiet=True)
        measure_checkpoints("nets_of_batches:build", "npz:d.npz", "step-*.pt", run=run)

        folder = Checkpoints("s.checkpoints")
        for step, expected in ((1, 9), (2, 0)):
            weights = folder.load_weights(TrainingRun(0.0, 0), step)
            assert int(weights.tensors["1.num_batches_tracked"]) == expected

    def test_a_state_that_is_no_tensor(self, code: Any) -> None:
        """
        What a module keeps beside tensors comes to the replicas: the numbers are those of it.
        """
        model = code.Scaled()
        model.scale = 3.0
        torch.save(model.state_dict(), "step-1.pt")
        name = code.__name__
        run = Run(store="s.zarr", engine="serial", quiet=True)

        for _ in range(2):  # and it is the same file when it is looked at again
            measure_checkpoints(f"{name}:Scaled", f"{name}:data", "step-1.pt", run=run)
            Path("step-1.pt").touch()
        found = verify_store("s.zarr")

        assert found.is_well, found.lines()
        import xarray as xr

        at = xr.open_zarr("s.zarr").isel(learning_rate=0, seed=0, iteration=0)
        expected = cosine_matrix(model, "cross_entropy", code.data())
        np.testing.assert_allclose(at.cosine, expected, atol=1e-6)

    def test_a_state_that_would_run_code(self, code: Any) -> None:
        """
        Is not kept.
        """
        weights = code.Scaled().state_dict() | {"_extra_state": argparse.Namespace(a=1)}

        with pytest.raises(StoreError, match=r"keeps a Namespace as _extra_state: expected"):
            Checkpoints("c").put(TrainingRun(0.1, 0), 1, weights, "")

    def test_a_buffer_that_is_not_stored(self) -> None:
        """
        Older checkpoints have it: left out where the network has the same, else refused.
        """
        state = Numbered().state_dict()

        _, how = taken(Numbered, {**state, "ids": torch.arange(4)})
        assert "not stored by the network: ids" in how
        for other in (torch.arange(5), torch.arange(4) + 1):
            with pytest.raises(CheckpointError, match="it has 1 that the network has not: ids"):
                taken(Numbered, {**state, "ids": other})

    def test_tied_weights_that_differ(self) -> None:
        """
        Two tensors for one: which counts would be chance.
        """
        state = Tied().state_dict()

        with pytest.raises(CheckpointError, match=r"a\.weight and b\.weight are one tensor"):
            taken(Tied, {**state, "b.weight": state["b.weight"] + 1})

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda v: v.to(torch.complex64), "0.weight is complex64, in the network float32"),
            (
                lambda v: v[:, :2] if v.ndim == 2 else v,
                r"0\.weight is \(5, 2\), in the network \(5",
            ),
        ],
    )
    def test_numbers_of_another_kind(self, change: Callable[[Tensor], Tensor], said: str) -> None:
        """
        What would lose more than precision is refused.
        """
        with pytest.raises(CheckpointError, match=said):
            taken(two, {name: change(value) for name, value in two().state_dict().items()})


class TestWrappers:
    @pytest.mark.parametrize(
        "within",
        [
            "net._orig_mod.0",
            "net.0._checkpoint_wrapped_module",
            "_fsdp_wrapped_module.net._fsdp_wrapped_module.0",
            "module.net.module._orig_mod.0",
            "model._orig_mod.net.module.0",
            "_forward_module.net.0",
        ],
    )
    def test_wherever_they_stand(self, within: str) -> None:
        """
        A part that was compiled, sharded or checkpointed has the wrapper's name within its own.
        """
        state = Within().state_dict()
        first = within.rpartition("0")[0]  # of the other layer too, but for wrappers of one
        outer = first.replace("net.0.", "net.").replace("_checkpoint_wrapped_module", "")

        found, how = taken(
            Within,
            renamed(state, lambda n: n.replace("net.0", within).replace("net.1", f"{outer}1")),
        )

        for name, value in state.items():
            assert torch.equal(found[name], value)
        assert "taken off" in how

    def test_old_names_within_wrappers(self) -> None:
        """
        Both at once: the wrapper is taken off, and the network renames what is left.
        """
        old = old_weight_normed()
        for change in (
            lambda n: n.replace("0.", "0._orig_mod."),
            lambda n: f"module.{n}",
            lambda n: f"model.{n}",
        ):
            found, _ = taken(weight_normed, renamed(old, change))
            assert torch.equal(found["0.parametrizations.weight.original1"], old["0.weight_v"])

    def test_a_prefix_where_no_name_is_the_networks(self) -> None:
        """
        It is found by the modules.
        """
        build = lambda: nn.Sequential(  # noqa: E731
            parametrizations.weight_norm(nn.Linear(4, 3, bias=False))
        )
        state = {"model.0.weight_g": torch.ones(3, 1), "model.0.weight_v": torch.ones(3, 4)}

        found, how = taken(build, state)

        assert torch.equal(found["0.parametrizations.weight.original1"], torch.ones(3, 4))
        assert "prefix 'model.' taken off" in how

    def test_a_network_with_a_compiled_part(self, code: Any) -> None:
        """
        Into it from plain names, from its own, and measured and verified.
        """
        plain = two().state_dict()
        wrapped = renamed(plain, lambda n: n.replace("0.", "0._orig_mod.", 1))
        for state in (plain, wrapped):
            found, _ = taken(code.compiled, state)
            assert torch.equal(found["0._orig_mod.weight"], plain["0.weight"])
        name = code.__name__
        run = Run(store="s.zarr", engine="serial", quiet=True)
        measure_checkpoints(f"{name}:compiled", f"{name}:data", "w.pt", run=run)

        assert verify_store("s.zarr").is_well

    @pytest.mark.parametrize("build", [CalledModule, Twins])
    def test_a_part_that_is_called_so(self, build: Callable[[], nn.Module]) -> None:
        """
        Names of the network's own stay, with and without a wrapper around them.
        """
        state = build().state_dict()

        for change in (lambda n: n, lambda n: f"module.{n}", lambda n: f"model.{n}"):
            found, _ = taken(build, renamed(state, change))
            for name, value in state.items():
                assert torch.equal(found[name], value)

    def test_what_lies_beside_the_wrapped(self) -> None:
        """
        A count of averages is no weight; two copies of the network are not one.
        """
        _, how = taken(two, AveragedModel(two()).state_dict())
        assert "1 tensors of other names left out" in how
        state = two().state_dict()
        both = {**state, **renamed(state, lambda n: f"module.{n}")}
        with pytest.raises(
            CheckpointError, match=r"has 0\.weight and module\.0\.weight, which are"
        ):
            taken(two, both)
        _, how = taken(two, both, prefix="module.")
        assert "4 tensors of other names left out" in how


SD = two().state_dict()


class TestKeys:
    @pytest.mark.parametrize(
        ("saved", "under"),
        [
            ({"ema": SD, "epoch": 3}, "ema"),
            ({"params": SD}, "params"),
            ({"model": SD, "ema": SD}, "model"),
            ({"state_dict": SD, "state_dict_ema": SD}, "state_dict"),
            ({"checkpoint": {"model": SD, "epoch": 3}}, "checkpoint.model"),
            ({"state": {"net_g": SD}, "rng_state": torch.get_rng_state()}, "state.net_g"),
            ({"weights_ema": SD, "optimizer": {"state": {"x": torch.ones(2)}}}, "weights_ema"),
            ({"mean": torch.ones(3), "generator": SD}, "generator"),
        ],
    )
    def test_where_there_is_one_choice(self, saved: Any, under: str) -> None:
        """
        Any key, one level deeper too; among several the usual names; and it is said which.
        """
        _, how = taken(two, saved)

        assert f"found under {under!r}" in how

    @pytest.mark.parametrize(
        ("saved", "said"),
        [
            ({"generator": SD, "critic": SD}, "under generator, critic: say which with --key gen"),
            ({"student": {"model": SD}, "teacher": {"model": SD}}, r"student\.model, teacher\.mod"),
        ],
    )
    def test_where_there_are_several(self, saved: Any, said: str) -> None:
        """
        It is asked.
        """
        with pytest.raises(CheckpointError, match=said):
            taken(two, saved)

    def test_a_key(self) -> None:
        """
        Names one of several, with points between one and the next.
        """
        other = {name: value + 1 for name, value in SD.items()}
        saved = {"model": SD, "ema": other, "teacher": {"model": other}}
        for key in ("ema", "teacher.model"):
            found, how = taken(two, saved, key=key)
            assert torch.equal(found["0.weight"], other["0.weight"])
            assert f"found under {key!r}" in how
        with pytest.raises(CheckpointError, match=r"no weights under the key 'no': .* model, ema"):
            taken(two, saved, key="no")

    @pytest.mark.parametrize(
        ("saved", "said"),
        [
            ({0: torch.ones(2)}, "holds tensors by 0: expected the names of weights"),
            ({0: torch.ones(2), **SD}, "holds tensors by 0"),
            ({b"w": torch.ones(2)}, "holds tensors by b'w'"),
            ({"model": {0: torch.ones(2)}}, "holds no state dict, only model"),
            ({}, "only an empty mapping"),
            ([torch.ones(2)], "holds a list: expected a state dict"),
            (torch.ones(2), "holds a Tensor"),
        ],
    )
    def test_names_that_are_none(self, saved: Any, said: str) -> None:
        """
        Numbers name no weights.
        """
        with pytest.raises(CheckpointError, match=said):
            taken(two, saved)


class TestPickles:
    @pytest.mark.parametrize("is_old", [False, True])
    @pytest.mark.parametrize(
        ("saved", "line"),
        [
            ({"model": SD, "args": argparse.Namespace(lr=1)}, "['model'], 'weights.pt')"),
            ({"ema": SD, "when": datetime.date(2026, 1, 1)}, "['ema'], 'weights.pt')"),
            ({"params": SD, "loss": np.float64(3)}, "['params'], 'weights.pt')"),
            ({"a": {"b": SD}, "at": Path("x")}, "['a']['b'], 'weights.pt')"),
            ({"state_dict": SD, "n": np.ones(3)}, "['state_dict'], 'weights.pt')"),
            ({"G": SD, "D": SD, "args": argparse.Namespace()}, "['G'], 'weights.pt') (or torch."),
            ({"model": two(), "epoch": 3}, "['model'].state_dict(), 'weights.pt')"),
            (two(), "(path, weights_only=False).state_dict(), 'weights.pt')"),
            ({"args": argparse.Namespace(lr=1)}, "[KEY], 'weights.pt'), where KEY is"),
        ],
    )
    def test_the_line_that_saves_the_weights_alone(
        self, saved: Any, line: str, is_old: bool
    ) -> None:
        """
        It names the key where they are, if that can be seen; the file is not unpickled for it.
        """
        torch.save(saved, "p.pt", _use_new_zipfile_serialization=not is_old)

        with pytest.raises(CheckpointError) as refused:
            read("p.pt")

        assert "could run code: it is not read" in str(refused.value)
        assert line in str(refused.value)

    def test_looking_runs_nothing(self) -> None:
        """
        What a pickle would call is not called, whatever it is.
        """

        class Bomb:
            def __reduce__(self) -> Any:
                return exec, ("from pathlib import Path; Path('executed').touch()",)

        for is_old in (False, True):
            torch.save({"w": SD, "b": Bomb()}, "b.pt", _use_new_zipfile_serialization=not is_old)
            with Path("b.pt").open("rb") as file:
                seen = outline(file)
            assert list(seen) == ["w", "b"]
        assert not Path("executed").exists()


def saved(value: Any, **how: Any) -> bytes:
    content = io.BytesIO()
    torch.save(value, content, **how)
    return content.getvalue()


def archived(kind: str) -> bytes:
    content = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(content, "w") as archive:
            archive.writestr("w.pt", saved(SD))
    elif kind == "tar":
        with tarfile.open(fileobj=content, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("w.pt"), io.BytesIO())
    else:
        np.savez(content, x=np.ones(3))
    return content.getvalue()


class TestContent:
    @pytest.mark.parametrize("name", ["w.pt", "w.safetensors", "w.pkl", "w.pt.best", "epoch5"])
    @pytest.mark.parametrize("kind", ["torch", "old torch", "safetensors"])
    def test_a_file_is_what_it_begins_with(self, name: str, kind: str) -> None:
        """
        Not what its name says.
        """
        content = {
            "torch": saved(SD),
            "old torch": saved(SD, _use_new_zipfile_serialization=False),
            "safetensors": safetensors.torch.save(dict(SD)),
        }[kind]
        Path(name).write_bytes(content)

        assert read(name).weights.keys() == SD.keys()

    @pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (
                b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
                "pointer of Git LFS.*pull",
            ),
            (b"\n<!DOCTYPE html><html>", r"a web page \(HTML\)"),
            (b"<?xml version='1.0'?><Error>", "is XML, as a server answers"),
            (b'{"error": "not found"}', r"is JSON, and begins with '\{.error"),
            (b"Not Found\n", "is text, and begins with 'Not Found'"),
            (("ä" * 600).encode(), "is text, and begins with 'ä"),
            (b"", "it is empty"),
            (b"\0" * 1000, "it is empty"),
            (gzip.compress(saved(SD)), "compressed with gzip: unpack"),
            (archived("tar"), "a tar archive: unpack"),
            (archived("zip"), r"a zip archive that torch\.save has not written, of w\.pt"),
            (archived("npz"), r"a zip archive that torch\.save has not written, of x\.npy"),
            (saved(SD)[:700], "ends too early"),
            (saved(SD, _use_new_zipfile_serialization=False)[:300], "ends too early"),
            (safetensors.torch.save(dict(SD))[:-9], "cannot read the checkpoint"),
            (b"\x89HDF\r\n\x1a\n" + b"\0" * 600, "an HDF5 file, as Keras writes"),
            (pickle.dumps({"w": np.ones(3)}), r"no file that torch\.save has written whole"),
        ],
    )
    def test_what_is_no_checkpoint(self, name: str, content: bytes, said: str) -> None:
        """
        Is said as what it is, and nobody is told to load it all the same.
        """
        Path(name).write_bytes(content)

        with pytest.raises(CheckpointError, match=said) as refused:
            read(name)
        assert "weights_only" not in str(refused.value)
        assert "likely succeed" not in str(refused.value)

    def test_torchscript(self) -> None:
        """
        It has a state dict, which its own reader can save.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(torch.jit.trace(two().eval(), torch.ones(1, 4)), "w.pt")

        with pytest.raises(CheckpointError, match=r"TorchScript.*torch\.jit\.load\(.*state_dict"):
            read("w.pt")

    def test_folders(self) -> None:
        """
        Of files that a pattern would name, of shards, of pointers.
        """
        for folder in ("files", "shards", "pointers", "list"):
            Path(folder).mkdir()
        Path("shards/.metadata").touch()
        pointer = b"version https://git-lfs.github.com/spec/v1\n"
        Path("pointers/model.safetensors.index.json").write_bytes(pointer)
        Path("list/model.safetensors.index.json").write_bytes(b"[]")

        for folder, said in (
            ("files", r"give a pattern such as 'files/\*\.pt'"),
            ("shards", r"torch\.distributed\.checkpoint: write it as one file"),
            ("pointers", r"index\.json: it is a pointer of Git LFS"),
            ("list", "it is JSON"),
            ("none", "there is no checkpoint"),
        ):
            with pytest.raises(CheckpointError, match=said):
                read(folder)
