"""Stiffness during a training loop: what is measured, what is left alone, what it costs."""

from __future__ import annotations

import copy
import random
import threading
import warnings
from pathlib import Path

import mine
import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from distributed_stiffness import cosine_matrix
from distributed_stiffness.analysis import within_between
from distributed_stiffness.engine.status import status
from distributed_stiffness.errors import (
    DataError,
    GradientError,
    ModelError,
    StiffnessError,
    StoreError,
    StudyError,
)
from distributed_stiffness.progress import Progress
from distributed_stiffness.report import present
from distributed_stiffness.watching import watch
from distributed_stiffness.watching.clock import Clock
from distributed_stiffness.watching.watch import sign_stiffness

STEPS = 20


@pytest.fixture(autouse=True)
def _in_an_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def network() -> nn.Module:
    """With what a measurement could disturb: batch statistics and dropout."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(mine.FEATURES, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5),
        nn.Linear(8, mine.CLASSES),
    )  # fmt: skip


def global_numpy_state() -> list[int]:
    state: list[int] = np.random.get_state()[1].tolist()  # noqa: NPY002
    return state


class Killed(BaseException):
    """As if the process had been."""


def train(model: nn.Module, step=None, *, first: int = 1, last: int = STEPS, lr=0.1, kill=None):
    """Train with momentum and dropout, calling `step` after each step; batches by their step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    x, y = mine.validation(60)
    model.train()
    if step is not None and first == 1:
        step(0)
    for iteration in range(first, last + 1):
        torch.manual_seed(iteration)
        chosen = torch.randint(len(x), (8,))
        loss = nn.functional.cross_entropy(model(x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step is not None:
            step(iteration)
        if iteration == kill:
            raise Killed
    return model


def watched(model: nn.Module, sample=None, loss="cross_entropy", **choices):
    """A watch that says nothing and measures whatever is due."""
    given = {"store": "run.zarr", "every": 5, "budget": None, "quiet": True, "memory": 10**8}
    sample = mine.validation() if sample is None else sample
    return watch(model, loss, sample, **(given | choices))


def opened(store="run.zarr") -> xr.Dataset:
    return xr.open_zarr(store)


class TestTheTraining:
    def test_takes_the_same_steps(self):
        """
        Weights, running statistics and all random states are the same bits with and without it.
        """
        plain = train(network())
        drawn = torch.rand(3)
        model = network()
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002  # as training scripts do
        before = random.getstate(), global_numpy_state()
        with watched(model) as stiffness:
            train(model, stiffness.step)

        for name, value in plain.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), name
        assert torch.equal(torch.rand(3), drawn)
        assert (random.getstate(), global_numpy_state()) == before

    def test_keeps_its_gradients_its_modes_and_its_hooks(self):
        """
        .grad stays what it was, a module that is frozen in evaluation mode stays so, and hooks on
        parameters and modules hear of nothing.
        """
        model = train(network(), last=1)
        model[1].eval()
        heard = []
        model[0].weight.register_hook(heard.append)
        model[0].weight.register_post_accumulate_grad_hook(heard.append)
        modes = [module.training for module in model.modules()]
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}

        with watched(model) as stiffness:
            stiffness.step(0)

        assert [module.training for module in model.modules()] == modes
        for name, p in model.named_parameters():
            assert torch.equal(p.grad, gradients[name])
        assert not heard

    def test_may_be_within_autocast_or_without_gradients(self):
        """
        Whatever surrounds a step, the numbers are the same.
        """
        model = network()
        with watched(model) as stiffness:
            stiffness.step(0)
        for name, around in (
            ("no_grad", torch.no_grad()),
            ("autocast", torch.autocast("cpu", dtype=torch.bfloat16)),
        ):
            with watched(model, store=f"{name}.zarr") as stiffness, around:
                stiffness.step(0)
            np.testing.assert_array_equal(opened(f"{name}.zarr").cosine, opened().cosine)

    def test_a_compiled_network_is_looked_through(self):
        """
        torch.compile's wrapper, and that of data parallelism: the network inside is measured.
        """
        model = network()
        for k, wrapped in enumerate((torch.compile(model), nn.DataParallel(model))):
            with watched(wrapped, store=f"{k}.zarr") as stiffness:
                stiffness.step(0)
            expected = cosine_matrix(
                copy.deepcopy(model).eval(), "cross_entropy", mine.validation()
            )
            np.testing.assert_allclose(opened(f"{k}.zarr").cosine[0, 0, 0], expected, atol=1e-6)


class TestTheNumbers:
    def test_are_those_of_the_notebook_call_at_each_step(self):
        """
        Every matrix is `cosine_matrix` of the network as it was at that step, in evaluation mode.
        """
        model, expected = network(), {}

        def step(iteration: int) -> None:
            if stiffness.step(iteration) is not None:
                now = copy.deepcopy(model).eval()
                expected[iteration] = cosine_matrix(
                    now, "cross_entropy", mine.validation(), precision="float64"
                )

        with watched(model) as stiffness:
            train(model, step)

        ds = opened()
        assert ds.iteration.values.tolist() == list(expected) == [0, 5, 10, 15, 20]
        for iteration, matrix in expected.items():
            at = ds.sel(learning_rate=0, seed=0, iteration=iteration)
            np.testing.assert_allclose(at.cosine, matrix, atol=max(1e-6, float(at.error_bound)))

    def test_what_is_said_is_what_the_store_has(self):
        """
        Means within and between classes are those of the analysis; the share is of the time.
        """
        model = train(network())
        with watched(model) as stiffness:
            found = stiffness.step(20)

        sign = within_between(opened())["sign"].isel(learning_rate=0, seed=0, iteration=0)
        assert found.within == pytest.approx(float(sign.sel(relation="within")), abs=1e-6)
        assert found.between == pytest.approx(float(sign.sel(relation="between")), abs=1e-6)
        assert found.loss == pytest.approx(float(opened().loss.mean()))
        assert 0 < found.share <= 1
        assert "stiffness at step 20" in str(found)
        assert set(found.metrics()) >= {"stiffness/within", "stiffness/between"}

    def test_a_class_of_one_example_has_no_pairs(self):
        """
        It counts in no mean within a class; without any pair there is no mean.
        """
        cosines = np.array([[1, 0.5, -0.2], [0.5, 1, -0.1], [-0.2, -0.1, 1]], dtype=np.float32)

        assert sign_stiffness(cosines.copy(), np.array([0, 0, 1])) == (1.0, -1.0)
        assert np.isnan(sign_stiffness(cosines.copy(), np.array([0, 1, 2]))[0])

    def test_a_loss_of_ones_own_and_inputs_by_name(self):
        """
        Any callable, even one without a name, and networks with several inputs.
        """
        torch.manual_seed(0)
        model, loss = mine.TextClassifier(), lambda outputs, labels: mine.smoothed(outputs, labels)
        with watched(model, mine.padded_text(), loss) as stiffness:
            stiffness.step(0)

        expected = cosine_matrix(copy.deepcopy(model).eval(), mine.smoothed, mine.padded_text())
        np.testing.assert_allclose(opened().cosine[0, 0, 0], expected, atol=1e-5)
        assert "<lambda>" in opened().attrs["study"]

    def test_a_draw_has_the_classes_in_proportion(self):
        """
        `examples` of the sample, the same each time; their names and positions are in the store.
        """
        with watched(network(), examples=9, class_names=["red", "green", "blue"]) as stiffness:
            stiffness.step(0)

        ds = opened()
        assert sorted(ds.class_name.values) == ["blue"] * 3 + ["green"] * 3 + ["red"] * 3
        np.testing.assert_array_equal(mine.validation()[1][ds["index"].values], ds.label)


class TestTheStore:
    def test_is_one_like_any_other(self):
        """
        Status, report and the schema's coordinates: complete after each step, finished at the end.
        """
        model = network()
        with watched(model, learning_rate=0.1, seed=3) as stiffness:
            train(model, stiffness.step, last=5)
            assert "computed by process" in next(status("run.zarr").lines())
            train(model, stiffness.step, first=6)

        found = status("run.zarr")
        assert found.finished
        assert all(checkpoint.complete for checkpoint in found.checkpoints)
        assert opened().seed.values.tolist() == [3]
        assert opened().learning_rate.values.tolist() == [0.1]
        present("run.zarr", Path("figures"), Progress(quiet=True))
        assert "<img" in Path("figures/report.html").read_text()

    def test_is_whole_at_every_moment_for_a_reader(self, monkeypatch):
        """
        Whoever opens it while a step is measured finds the steps before, and nothing half done.
        """
        from distributed_stiffness.store import Store

        publish, seen = Store.publish_iterations, []

        def looked_at_before(self, *args):
            ds = opened()
            seen.append((ds.iteration.values.tolist(), bool(np.isfinite(ds.cosine).all())))
            publish(self, *args)

        monkeypatch.setattr(Store, "publish_iterations", looked_at_before)
        model = network()
        with watched(model) as stiffness:
            train(model, stiffness.step, last=15)

        assert seen[1:] == [([0], True), ([0, 5], True), ([0, 5, 10], True)]

    @pytest.mark.parametrize("kill", [3, 5, 12])
    def test_a_killed_training_goes_on_to_the_same_bits(self, kill):
        """
        Begun again from its start, the training finds what is there and measures the rest.
        """
        model = network()
        with pytest.raises(Killed), watched(model) as stiffness:
            train(model, stiffness.step, kill=kill)
        assert "finished" not in opened().attrs
        model = network()
        with watched(model) as stiffness:
            train(model, stiffness.step)
        whole = network()
        with watched(whole, store="whole.zarr") as stiffness:
            train(whole, stiffness.step)

        for name, variable in opened("whole.zarr").variables.items():
            np.testing.assert_array_equal(opened()[name].values, variable.values, err_msg=name)
        assert opened().attrs["weights"] == opened("whole.zarr").attrs["weights"]
        assert opened().attrs["finished"]

    @pytest.mark.parametrize("at", ["resize_iterations", "write_values", "set_attrs"])
    def test_killed_in_the_middle_of_a_measurement(self, monkeypatch, at):
        """
        What was half done is measured anew, wherever it stopped.
        """
        from distributed_stiffness.store import Store

        was, calls = getattr(Store, at), []

        def dies(self, *args, **options):
            calls.append(at)
            if len(calls) == 4:
                raise Killed
            return was(self, *args, **options)

        monkeypatch.setattr(Store, at, dies)
        model = network()
        with pytest.raises(Killed), watched(model) as stiffness:
            train(model, stiffness.step)
        monkeypatch.setattr(Store, at, was)
        model = network()
        with watched(model) as stiffness:
            train(model, stiffness.step)

        assert opened().iteration.values.tolist() == [0, 5, 10, 15, 20]
        assert np.isfinite(opened().cosine).all()
        assert all(checkpoint.complete for checkpoint in status("run.zarr").checkpoints)

    def test_a_training_that_goes_back_and_takes_another_way(self):
        """
        From a checkpoint of step 7 it goes on with other steps: those after it are measured anew.
        """
        model = network()
        with pytest.raises(Killed), watched(model) as stiffness:
            train(model, stiffness.step, kill=16)
        first = opened().cosine.values
        model = train(network(), last=7)
        with watched(model) as stiffness:
            train(model, stiffness.step, first=8, lr=0.01)

        assert opened().iteration.values.tolist() == [0, 5, 10, 15, 20]
        np.testing.assert_array_equal(opened().cosine[0, 0, :2], first[0, 0, :2])
        assert not np.array_equal(opened().cosine[0, 0, 2], first[0, 0, 2])

    def test_is_refused_to_another_training(self):
        """
        Other weights at its first step, another sample, or another way in one that is finished.
        """
        model = network()
        with watched(model) as stiffness:
            train(model, stiffness.step)
        torch.manual_seed(1)
        other = mine.build()

        said = "is of another training: it had other weights at"
        with watched(train(network(), last=2)) as begun, pytest.raises(StoreError, match=said):
            begun.step(0)
        with pytest.raises(StoreError, match="belongs to another study: data was"):
            watched(network(), mine.validation(12)).__enter__()
        with pytest.raises(StoreError, match="another study"):
            watched(other, loss=mine.smoothed).__enter__()
        with watched(model) as begun, pytest.raises(StoreError, match=said):
            begun.step(10)
        assert opened().iteration.values.tolist() == [0, 5, 10, 15, 20]

    def test_a_finished_training_may_be_made_longer(self):
        """
        Steps after its last are added.
        """
        model = network()
        with watched(model) as stiffness:
            train(model, stiffness.step, last=10)
        with watched(model) as stiffness:
            train(model, stiffness.step, first=11)

        assert opened().iteration.values.tolist() == [0, 5, 10, 15, 20]
        assert opened().attrs["finished"]

    def test_a_bucket(self, bucket):
        """
        The store may be a URL.
        """
        model = network()
        with watched(model, store=f"{bucket}/run.zarr") as stiffness:
            train(model, stiffness.step, last=5)

        assert opened(f"{bucket}/run.zarr").iteration.values.tolist() == [0, 5]


class TestVerify:
    def test_looks_over_what_is_there(self):
        """
        Without the network's name nothing can be computed again, and that is said; flipped bytes
        are found.
        """
        from studies import run_options

        from distributed_stiffness.verify import verify_store

        model = network()
        with watched(model) as stiffness:
            train(model, stiffness.step, last=5)
        well = verify_store(run_options("run.zarr"))
        chunk = Path("run.zarr/cosine/c/0/0/1/0/0")
        chunk.write_bytes(chunk.read_bytes()[:-1] + b"x")

        assert well.is_well, well.lines()
        assert any("a sample in memory" in note for note in well.notes)
        assert not verify_store(run_options("run.zarr")).is_well

    def test_computes_again_where_network_and_sample_have_names(self):
        """
        The weights are then kept beside the store.
        """
        from studies import run_options

        from distributed_stiffness.verify import verify_store

        torch.manual_seed(0)
        model = mine.build()
        with watched(model, "mine:validation", model_name="mine:build") as stiffness:
            train(model, stiffness.step, last=5)
        found = verify_store(run_options("run.zarr"))

        assert found.is_well, found.lines()
        assert found.checked["examples computed again"]


class TestTheBudget:
    def test_keeps_the_share(self):
        """
        However long steps and measurements take, from the second measurement on the share of all
        that were made stays within the budget.
        """
        for step_seconds, cost, budget in ((1.0, 5.0, 0.05), (0.1, 0.001, 0.5), (2.0, 1.0, 0.2)):
            at = [0.0]
            clock = Clock(budget, now=lambda at=at: at[0])
            clock.began, measured = 0.0, 0
            for _ in range(2000):
                at[0] += step_seconds
                if clock.allows():
                    at[0] += cost
                    clock.add(cost)
                    measured += 1
                    if measured > 1:
                        assert clock.share <= budget + 1e-9
            most = min(2000, budget * at[0] / cost)
            assert most - 2 <= measured <= most + 1

    def test_what_is_left_out_is_counted(self):
        """
        A first measurement that takes long leaves later ones out, and the next one says how many.
        """
        model = network()
        with watched(model, budget=0.05, every=1) as stiffness:
            assert stiffness.step(0) is not None
            assert stiffness.step(1) is None
            stiffness._clock.began -= 1000
            assert stiffness.step(2).left_out == 1

    def test_what_is_left_out_at_the_end_is_said(self, capsys):
        """
        Nobody has to guess why a store holds fewer steps than were asked for.
        """
        with watched(network(), budget=0.05, every=1, quiet=False) as stiffness:
            for step in range(4):
                stiffness.step(step)

        said = " ".join(capsys.readouterr().err.split())
        assert "3 more measurements were due, and left out to keep within 0.05" in said
        assert "budget=None" in said

    def test_steps_that_are_named(self):
        """
        `every` may be the steps themselves.
        """
        model = network()
        with watched(model, every=[1, 4, 16]) as stiffness:
            train(model, stiffness.step)

        assert opened().iteration.values.tolist() == [1, 4, 16]

    @pytest.mark.parametrize("every", [5.0, np.int64(5), torch.tensor(5)])
    def test_numbers_of_any_kind(self, every):
        """
        A rate as well, which is labelled as it is written.
        """
        model = network()
        with watched(model, every=every, learning_rate=np.float32(1e-3)) as stiffness:
            train(model, stiffness.step)

        assert (opened().iteration.values % 5 == 0).all()
        assert opened().learning_rate.item() == 1e-3

    @pytest.mark.parametrize("steps", [(0, 1, 2), (1, 2, 3)])
    def test_steps_that_begin_again_with_every_epoch(self, steps):
        """
        What was measured is kept, and nothing of another epoch is put beside it.
        """
        model = network()
        with watched(model, every=1) as stiffness:
            for step in (0, *steps)[steps[0] == 0 :]:
                stiffness.step(step)
                with torch.no_grad():
                    next(model.parameters()).mul_(1.1)
            before = opened().cosine.values
            for step in (*steps, steps[-1] + 1):
                with pytest.warns(UserWarning, match="count them over all epochs"):
                    assert stiffness.step(step) is None

        assert opened().iteration.values.tolist() == list(range(steps[-1] + 1))
        assert (opened().cosine.values == before).all()


class TestMistakes:
    @pytest.mark.parametrize(
        ("choices", "kind", "said"),
        [
            ({"every": 0}, StudyError, "every is 0: expected 1 step"),
            ({"every": "often"}, StudyError, "the step is 'often': expected a whole number"),
            ({"examples": 0.5}, StudyError, "validation_examples"),
            ({"learning_rate": "slow"}, StudyError, "the learning rate is 'slow'"),
            ({"budget": 2}, StudyError, r"budget is 2: expected a share"),
            ({"precision": "float8"}, StudyError, "precision"),
            ({"parameters": ["nope.*"]}, ModelError, "no trainable parameter matches 'nope"),
            ({"examples": 999}, DataError, "asked for 999 examples"),
            ({"examples": 1}, StudyError, "1 example has no pairs"),
            ({"class_names": ["a", "b"]}, DataError, "label 2 is outside 0 to 1"),
            ({"sample": "nowhere:data"}, DataError, "'nowhere:data' cannot be imported"),
            ({"sample": (torch.rand(5, 6), torch.rand(5))}, ModelError, "targets are no labels"),
            ({"sample": ((torch.rand(5, 3),) * 2, torch.arange(5))}, ModelError, "by the names"),
            ({"sample": (torch.rand(5, 7), torch.arange(5) % 3)}, ModelError, "does not take"),
            ({"loss": nn.CrossEntropyLoss()}, ModelError, "one number an example|shape"),
        ],
    )
    def test_are_said_before_the_first_step(self, choices, kind, said):
        """
        And nothing is written.
        """
        with pytest.raises(kind, match=said):
            watched(network(), **choices).__enter__()
        assert not Path("run.zarr").exists()
        assert not Path("run.run.json").exists()

    def test_a_measurement_that_fails_later_is_a_warning(self):
        """
        A network whose outputs are not finite is not measured, and its training goes on.
        """
        model = network()
        with watched(model) as stiffness:
            stiffness.step(0)
            with torch.no_grad():
                model[4].weight.fill_(torch.nan)
            with pytest.warns(UserWarning, match="no stiffness at step 5: .*not finite"):
                assert stiffness.step(5) is None
            model.load_state_dict(network().state_dict())
            assert stiffness.step(10) is not None

        assert opened().iteration.values.tolist() == [0, 10]

    def test_the_first_one_raises(self):
        """
        For then something is wrong with how it is used.
        """
        model = network()
        with watched(model) as stiffness:
            with torch.no_grad():
                model[4].weight.fill_(torch.nan)
            with pytest.raises(GradientError, match="not finite"):
                stiffness.step(0)

    def test_two_at_once(self):
        """
        A store that another process watches is refused.
        """
        with watched(network()), pytest.raises(StoreError, match="is computing"):
            watched(network()).__enter__()

    def test_a_network_that_cannot_be_copied(self):
        """
        It is said, and why it is copied at all.
        """
        model = network()
        model.lock = threading.Lock()

        with warnings.catch_warnings(), pytest.raises(StiffnessError, match="cannot be copied"):
            watched(model).__enter__()
