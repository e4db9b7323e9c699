"""An error bound above what is allowed ends a study, unless it is asked for all the same."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from distributed_stiffness import WholeLoss, cosine_matrix, watch
from distributed_stiffness.cli import main
from distributed_stiffness.errors import GradientError

N = 24
MODULE = """
import torch
from torch import nn

def build():
    return nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(4, 4), nn.Tanh())),
                         nn.Linear(4, 3))

def load():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(24, 4, generator=generator), torch.arange(24) % 3
"""


@pytest.fixture(autouse=True)
def _vanishing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A network whose gradients float32 cannot hold, and one that it can."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("vanishing_net.py").write_text(MODULE)
    import vanishing_net

    net = vanishing_net.build()
    torch.save(net.state_dict(), "step10.pt")
    with torch.no_grad():
        for p in net[:-1].parameters():
            p *= 1e-20
    torch.save(net.state_dict(), "step20.pt")
    yield
    sys.modules.pop("vanishing_net", None)


def own_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def gram(monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    """Return the exit code of the command."""
    command = [
        "stiffness",
        "gram",
        "--model",
        "vanishing_net:build",
        "--data",
        "vanishing_net:load",
    ]
    command += ["--checkpoints", "step*.pt", "--store", "x.zarr", "--engine", "serial"]
    monkeypatch.setattr(sys, "argv", [*command, "--parameters", "0.weight", *more])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_the_study_fails_and_the_rest_is_kept(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The message names the checkpoint, two examples and what to try; the sound checkpoint is there.
    """
    assert gram(monkeypatch) == 1

    said = " ".join(capsys.readouterr().err.split())
    assert "iteration 20: the error bound of a cosine is" in said
    for words in ("above the 0.01 that is allowed", "examples", "float64", "--allow-error"):
        assert words in said
    with xr.open_zarr("x.zarr") as ds:
        bound = ds["error_bound"].values.ravel()
    assert bound[0] < 1e-4
    assert np.isnan(bound[1])


def test_asked_for_it_is_given_and_marked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The store says that it was allowed, the report says it in red, the command warns; of no sign is
    said that it is certain.
    """
    assert gram(monkeypatch, "--allow-error") == 0

    captured = capsys.readouterr()
    said = captured.out + captured.err
    assert "WARNING" in said
    for words in ("sign is certain", "no sign is undecided"):
        assert words not in said
    with xr.open_zarr("x.zarr") as ds:
        assert ds.attrs["allow_error"]
        assert float(ds["error_bound"].max()) > 0.01
    assert "above" in Path("x/report.html").read_text()


def test_watching_goes_on_and_marks_the_measurement() -> None:
    """No training ends for it: a warning, and a measurement that says that it is not certain."""
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    with torch.no_grad():
        net[2].weight *= 200  # fitted far beyond float32's 1 − p
    x = torch.randn(N, 6)
    y = net(x).argmax(1)

    with (
        pytest.warns(UserWarning, match=r"step 3 is not certain.*above the 0\.01"),
        watch(
            net, WholeLoss(own_loss), (x, y), store="w.zarr", every=1, budget=None, quiet=True
        ) as w,
    ):
        found = w.step(np.int64(3))

    assert found is not None
    assert not found.is_certain
    assert found.error_bound > 0.01
    assert "NOT CERTAIN" in str(found)
    with xr.open_zarr("w.zarr") as ds:
        assert ds.attrs["allow_error"]


@pytest.mark.filterwarnings("ignore:a WholeLoss")
def test_a_call_refuses_and_gives_it_when_asked() -> None:
    """The numbers are the same either way."""
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        net[2].weight *= 200
    x = torch.randn(N, 6)
    examples = x, net(x).argmax(1)
    loss = WholeLoss(
        lambda model, batch: nn.functional.cross_entropy(
            model(batch[0]), batch[1], reduction="none"
        )
    )

    with pytest.raises(
        GradientError, match=r"above the 0\.01 that is allowed.*examples \d+ and \d+"
    ):
        cosine_matrix(net, loss, examples)
    found = cosine_matrix(net, loss, examples, allow_error=True)
    assert found.attrs["error_bound"] > 0.01
