"""How certain a store's numbers are, and what more would cost, is measured and said."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import look
from rich.console import Console
from studies import arrays, run_options, tiny_study

from distributed_stiffness.checkpoints import Checkpoints, TrainingRun
from distributed_stiffness.data.selection import select
from distributed_stiffness.engine import run_study
from distributed_stiffness.engine.bounds import Bound, describe_bounds
from distributed_stiffness.engine.prediction import Speed, predict
from distributed_stiffness.engine.prepare import prepare
from distributed_stiffness.gradients.error_bound import FLOOR
from distributed_stiffness.progress import Progress
from distributed_stiffness.study import Gradients, Study, Training, training_identity
from distributed_stiffness.training import build_model, train

RUN = TrainingRun(1e-2, 0)


def spoken(study: Study, store: Path, **options: object) -> str:
    """What a run says, as a log."""
    said = io.StringIO()
    progress = Progress(console=Console(file=said, width=1000, highlight=False))
    run_study(study, run_options(store, quiet=False, **options), progress)
    return said.getvalue()


class TestBounds:
    @pytest.mark.parametrize("keep", ["pairs", "sums"])
    def test_every_checkpoint_has_a_bound_and_a_count(self, keep: str, tmp_path: Path) -> None:
        """
        Both are in the store, and the largest of each is said at the end of the run that made
        them, and of one that finds nothing to do.
        """
        study = tiny_study(keep=keep, distance_bins=5)

        said = spoken(study, tmp_path / "x.zarr"), spoken(study, tmp_path / "x.zarr")

        values = arrays(tmp_path / "x.zarr")
        assert values["error_bound"].shape == values["undecided"].shape == (2, 1, 2)
        assert (values["error_bound"] >= FLOOR).all()
        assert (values["error_bound"] < 1e-4).all()
        assert (values["undecided"] >= 0).all()
        largest = f"error bound of a cosine: at most {values['error_bound'].max():.2g} ("
        assert all(largest in lines for lines in said)

    def test_the_line_names_the_worst_checkpoints(self) -> None:
        """
        The widest bound and the most undecided signs may be of different ones.
        """
        bounds = [Bound("early", 3e-5, 2), Bound("late", 1e-6, 9)]

        assert describe_bounds(bounds, 20) == (
            "error bound of a cosine: at most 3e-05 (early); undecided signs: at most 9 of 190"
            " pairs, 0.047 of them (late)"
        )
        assert describe_bounds([Bound("a", 6e-8, 0)], 20).endswith("; no sign is undecided")


def over_fitted(study: Study, folder: Path, *, lowest: float) -> dict[str, torch.Tensor]:
    """Train a run, and sharpen its outputs until the least log-odds are `lowest`."""
    data = select(study.data)
    identity = training_identity(study, content=data.training_hash)
    trained = Checkpoints(folder / "trained", identity=identity)
    for _ in train(study, RUN, data, trained):
        pass
    model = build_model(study, data, 0)
    weights = trained.load_weights(RUN, study.iterations[-1])
    model.load_state_dict(dict(weights.tensors))
    *_, weight, bias = model.double().parameters()
    with torch.no_grad():
        for _ in range(5):  # the log-odds are not quite linear in the last layer
            times = lowest / float(log_odds(model, inputs_of(study)).min())
            weight *= times
            bias *= times
    model.float()
    checkpoints = Checkpoints(folder / "x.checkpoints", identity=identity)
    optimizer = torch.optim.Adam(model.parameters())
    checkpoints.save(RUN, study.iterations[-1], model, optimizer, weights.metrics)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def inputs_of(study: Study) -> tuple[torch.Tensor, torch.Tensor]:
    """The examples in float64, and their labels."""
    data = select(study.data)
    labels = torch.from_numpy(np.array(data.examples.labels))
    return torch.from_numpy(data.inputs(slice(None))).double(), labels


def log_odds(model: torch.nn.Module, examples: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """log((1 − p)/p) of the label, which does not underflow where 1 − p would."""
    x, y = examples
    z = model(x)
    own = z[torch.arange(len(y)), y]
    others = z.masked_fill(torch.nn.functional.one_hot(y, z.shape[1]).bool(), -torch.inf)
    return torch.logsumexp(others, 1) - own


class TestTrueScale:
    @pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-2), ("float64", 1e-9)])
    def test_norms_down_to_1e_300_are_in_the_store(
        self, precision: str, tolerance: float, tmp_path: Path
    ) -> None:
        """
        ‖∇loss‖ = (1 − p)·‖∇log-odds‖ of an over-fitted network, from single examples in float64:
        norms far below what float32 can hold, and none is 0.
        """
        study = tiny_study(
            training=Training(learning_rates=(1e-2,), iterations=(400,)),
            gradients=Gradients(tile=20, precision=precision),
        )
        model = build_model(study, select(study.data), 0)
        model.load_state_dict(over_fitted(study, tmp_path, lowest=-698.0))  # 1 − p = 7e-304
        run_study(study, run_options(tmp_path / "x.zarr"))
        found = arrays(tmp_path / "x.zarr")["gradient_norm"][0, 0, 0]

        x, y = inputs_of(study)
        expected = []
        for i in range(len(x)):
            odds = log_odds(model.double(), (x[i : i + 1], y[i : i + 1]))[0]
            parts = torch.autograd.grad(odds, list(model.parameters()))
            length = torch.cat([part.flatten() for part in parts]).norm()
            slope = torch.exp(torch.nn.functional.logsigmoid(odds.detach()))
            expected.append(float(slope * length))

        assert 0 < min(expected) < 1e-300
        np.testing.assert_allclose(found, expected, rtol=tolerance)

    @pytest.mark.parametrize("keep", ["pairs", "sums"])
    def test_cosines_are_right_beyond_what_float64_can_say(self, keep: str, tmp_path: Path) -> None:
        """
        With 1 − p of 1e-430 a norm is the least that float64 holds, and no longer true; cosines
        and signs are, and every check says so.
        """
        study = tiny_study(
            training=Training(learning_rates=(1e-2,), iterations=(400,)),
            keep=keep,
            distance_bins=5,
        )
        over_fitted(study, tmp_path, lowest=-990.0)

        run_study(study, run_options(tmp_path / "x.zarr"))

        assert (arrays(tmp_path / "x.zarr")["gradient_norm"] > 0).all()
        assert [str(fault) for fault in look(tmp_path / "x.zarr").faults] == []


class TestPrice:
    def test_a_plan_says_what_float64_would_cost(self, tmp_path: Path) -> None:
        """
        Both are measured before anything is chosen; a study that has chosen float64 is told its
        time alone.
        """
        for precision, is_told in (("float32", True), ("float64", False)):
            study = tiny_study(gradients=Gradients(tile=20, precision=precision))
            prepared = prepare(study, run_options(tmp_path / "x.zarr"), Progress(quiet=True))
            plan = prepared.plan(10**8, "cpu")

            found = predict(plan, replicas=1, speed=prepared.speed(plan))

            said = re.search(
                r"float64 gradients would take ([\d.]+) times as long", found.describe()
            )
            assert (said is not None) == is_told
            assert (found.exact_times is not None) == is_told
            assert found.seconds is not None

    def test_times_are_those_of_gradients_and_pairs(self, tmp_path: Path) -> None:
        """
        Gradients four times as long, products as long as before: between one and four times.
        """
        prepared = prepare(tiny_study(), run_options(tmp_path / "x.zarr"), Progress(quiet=True))
        plan = prepared.plan(10**8, "cpu")
        speed = Speed(1e-3, 1e-5, exact=Speed(4e-3, 1e-5))

        found = predict(plan, replicas=1, speed=speed)

        gradients, pairs = plan.n_examples * plan.gradients_per_example, plan.n_examples**2 / 2
        each = gradients * 1e-3 + pairs * 1e-5
        assert found.exact_times == pytest.approx((each + gradients * 3e-3) / each)
