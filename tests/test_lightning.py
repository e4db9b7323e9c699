"""Lightning itself: a callback that measures while its trainer trains, and its checkpoint files."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path

import mine
import numpy as np
import pytest
import torch
import xarray as xr
from studies import run_options
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from distributed_stiffness import cosine_matrix, measure_checkpoints
from distributed_stiffness.errors import CheckpointError, StudyError
from distributed_stiffness.watching import lightning_callback


def _imported(name: str):
    """Import a package that is not a test dependency (150 MB); its own warnings are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason="an optional package, of the extra `lightning`")


pl = _imported("lightning.pytorch")

# What Lightning itself and the packages that it imports warn of.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _in_an_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Classifier(pl.LightningModule):
    """A network inside a module, as most people have it; its hyper-parameters are kept."""

    def __init__(self, lr: float = 0.1) -> None:  # noqa: ARG002  # Lightning keeps it
        super().__init__()
        self.save_hyperparameters()
        self.net = mine.build()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(self.drop(x))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


def fit(package=pl, callbacks=(), *, steps=10, module=Classifier, ckpt=None, **options):
    """Train for some steps; return the module and the trainer."""
    package.seed_everything(0, verbose=False)
    model = module()
    trainer = package.Trainer(
        max_steps=steps,
        callbacks=list(callbacks),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, "logger": False} | options,
    )
    data = DataLoader(TensorDataset(*mine.validation(60)), batch_size=6, shuffle=True)
    trainer.fit(model, data, ckpt_path=ckpt)
    return model, trainer


def callback(**choices):
    given = {"store": "run.zarr", "every": 5, "budget": None, "quiet": True, "memory": 10**8}
    return lightning_callback(mine.validation(), **(given | choices))


class TestCallback:
    def test_measures_and_leaves_the_training_as_it_is(self):
        """
        The same bits with and without it; the last matrix is that of the trained module.
        """
        plain, _ = fit()
        model, _ = fit(callbacks=[callback()])

        for name, value in plain.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), name
        ds = xr.open_zarr("run.zarr")
        assert ds.iteration.values.tolist() == [0, 5, 10]
        assert ds.attrs["finished"]
        expected = cosine_matrix(model.eval(), "cross_entropy", mine.validation())
        np.testing.assert_allclose(ds.cosine[0, 0, -1], expected, atol=1e-5)

    def test_of_a_part_of_the_module(self):
        """
        `network` says which part has the outputs that the loss takes.
        """
        model, _ = fit(callbacks=[callback(network=lambda module: module.net)])

        expected = cosine_matrix(model.net.eval(), "cross_entropy", mine.validation())
        np.testing.assert_allclose(xr.open_zarr("run.zarr").cosine[0, 0, -1], expected, atol=1e-5)
        assert xr.open_zarr("run.zarr").attrs["model"] == "Sequential"

    def test_counts_optimiser_steps(self):
        """
        With gradients accumulated over batches, an iteration is a step, not a batch.
        """
        fit(callbacks=[callback(every=1)], steps=3, accumulate_grad_batches=2)

        assert xr.open_zarr("run.zarr").iteration.values.tolist() == [0, 1, 2, 3]

    def test_logs_what_it_measures(self):
        """
        To the trainer's loggers, under the step.
        """
        from lightning.pytorch.loggers import CSVLogger

        fit(callbacks=[callback()], logger=CSVLogger("logs"))
        text = next(Path("logs").rglob("metrics.csv")).read_text()

        assert "stiffness/within" in text.splitlines()[0]

    def test_a_training_that_fails_and_goes_on_from_a_checkpoint(self):
        """
        What was measured before is kept, and the rest is added.
        """

        class PowerCut(pl.Callback):
            def on_train_batch_end(self, trainer, *_):
                if trainer.global_step == 7:
                    trainer.save_checkpoint("last.ckpt")
                    raise RuntimeError("power cut")

        with pytest.raises(RuntimeError, match="power cut"):
            fit(callbacks=[callback(), PowerCut()])
        assert "finished" not in xr.open_zarr("run.zarr").attrs
        fit(callbacks=[callback()], ckpt="last.ckpt")

        assert xr.open_zarr("run.zarr").iteration.values.tolist() == [0, 5, 10]
        assert xr.open_zarr("run.zarr").attrs["finished"]

    def test_of_either_package(self):
        """
        `pytorch_lightning` has callbacks of its own: that of the package which is imported.
        """
        other = _imported("pytorch_lightning")
        here = {"lightning.pytorch": pl, "pytorch_lightning": other}
        for name, package in here.items():
            absent = [n for n in here if n != name]
            with pytest.MonkeyPatch.context() as patch:
                for n in absent:
                    patch.delitem(sys.modules, n)
                assert isinstance(callback(), importlib.import_module(name).Callback)
            assert isinstance(package.Callback, type)

    def test_without_either(self, monkeypatch):
        """
        It is said how to get one.
        """
        for name in ("lightning.pytorch", "pytorch_lightning"):
            monkeypatch.setitem(sys.modules, name, None)

        with pytest.raises(StudyError, match=r"distributed_stiffness\[lightning\]"):
            callback()


class TestCheckpointFiles:
    def test_are_imported_by_gram(self):
        """
        The trainer's own .ckpt files, with optimiser, loops, callbacks and hyper-parameters: read
        with weights_only, under 'state_dict', the prefix taken off, the iteration from the name.
        """
        keep = pl.callbacks.ModelCheckpoint(
            dirpath="runs/lr0.1", every_n_train_steps=5, save_top_k=-1
        )
        model, _ = fit(callbacks=[keep], enable_checkpointing=True)
        files = sorted(path.name for path in Path("runs/lr0.1").iterdir())
        assert files == ["epoch=0-step=10.ckpt", "epoch=0-step=5.ckpt"]

        store = measure_checkpoints(
            "mine:build", "mine:validation", "runs/*/*.ckpt", run=run_options("out.zarr")
        )

        ds = xr.open_zarr(store)
        assert ds.iteration.values.tolist() == [5, 10]
        assert ds.learning_rate.values.tolist() == [0.1]
        expected = cosine_matrix(model.net.eval(), "cross_entropy", mine.validation())
        np.testing.assert_allclose(ds.cosine[0, 0, -1], expected, atol=1e-5)

    def test_with_objects_among_the_hyper_parameters_are_refused(self):
        """
        They would run code when they are read: the message has the line that saves the weights.
        """

        class WithAnObject(Classifier):
            def __init__(self) -> None:
                super().__init__()
                self.save_hyperparameters({"where": Path("data")})

        _, trainer = fit(module=WithAnObject, steps=1)
        trainer.save_checkpoint("step-1.ckpt")

        with pytest.raises(CheckpointError, match=r"could run code.*\['state_dict'\]"):
            measure_checkpoints(
                "mine:build", "mine:validation", "step-1.ckpt", run=run_options("out.zarr")
            )
