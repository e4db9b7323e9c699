"""Studies: what is refused when one is built, what goes into its fingerprint."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from distributed_stiffness.errors import StudyError
from distributed_stiffness.study import (
    Data,
    Gradients,
    Model,
    Study,
    Training,
    build_study,
    differences,
    digest,
    fingerprint,
    stages,
)


class TestBadInput:
    """A study is checked when it is built, and the message names the field, rule and value."""

    @pytest.mark.parametrize("rate", [0.0, -1e-3, math.nan, math.inf, -math.inf, "fast"])
    def test_learning_rates(self, rate):
        """A learning rate is positive and finite."""
        with pytest.raises(ValidationError, match=r"learning_rates\.1"):
            Training(learning_rates=(1e-3, rate))

    @pytest.mark.parametrize("field", ["learning_rates", "seeds", "iterations"])
    def test_nothing_to_do(self, field):
        """An empty list is refused, by name."""
        with pytest.raises(ValidationError, match=rf"(?s){field}.*empty"):
            Training(**{field: ()})

    @pytest.mark.parametrize(
        ("field", "values"), [("learning_rates", (0.1, 0.1)), ("seeds", (3, 3))]
    )
    def test_duplicates(self, field, values):
        """Each rate and seed is given once."""
        with pytest.raises(ValidationError, match=rf"(?s){field}.*twice"):
            Training(**{field: values})

    @pytest.mark.parametrize("iterations", [(5, 3), (0, 3, 3), (10, 0)])
    def test_iterations_out_of_order(self, iterations):
        """The message shows the values in order."""
        in_order = ",".join(map(str, sorted(set(iterations))))
        with pytest.raises(ValidationError, match=rf"not ascending.*{in_order}"):
            Training(iterations=iterations)

    @pytest.mark.parametrize("iterations", [(-1, 3), (0.5,), ("last",)])
    def test_iterations_that_are_no_steps(self, iterations):
        """Iterations are counted from 0."""
        with pytest.raises(ValidationError, match="iterations"):
            Training(iterations=iterations)

    @pytest.mark.parametrize(
        ("part", "fields"),
        [
            (Training, {"batch_size": 0}),
            (Training, {"epochs": 0}),
            (Training, {"epochs": math.nan}),
            (Training, {"optimizer": "lion"}),
            (Training, {"momentum": 1.0}),
            (Training, {"weight_decay": -1.0}),
            (Training, {"weight_decay": math.nan}),
            (Training, {"weight_decay": math.inf}),
            (Training, {"seeds": (-1,)}),
            (Data, {"permuted_labels": 1.5}),
            (Data, {"permuted_labels": math.nan}),
            (Data, {"validation_examples": -1}),
            (Data, {"train_examples": -1}),
            (Gradients, {"precision": "half"}),
            (Gradients, {"tile": 0}),
            (Study, {"loss": "hinge"}),
        ],
    )
    def test_values_out_of_range(self, part, fields):
        """The message names the field."""
        with pytest.raises(ValidationError, match=next(iter(fields))):
            part(**fields)

    @pytest.mark.parametrize("part", [Data, Model, Training, Gradients, Study])
    def test_unknown_fields(self, part):
        """A misspelt field is an error, never ignored."""
        with pytest.raises(ValidationError, match="iteratoins"):
            part(iteratoins=3)

    def test_no_examples(self):
        """There must be something to compute."""
        with pytest.raises(ValidationError, match="no examples"):
            Study(data={"validation_examples": 0})

    @pytest.mark.parametrize("section", ["data", "model", "training", "gradients"])
    def test_a_field_that_does_not_exist(self, section):
        """Whoever misspells one is told those that there are."""
        with pytest.raises(StudyError, match=rf"{section}\.nope: there is no such field; expected"):
            build_study(lambda: Study.model_validate({section: {"nope": 1}}))

    def test_a_study_cannot_be_changed(self):
        """What was checked stays as it was."""
        with pytest.raises(ValidationError, match="frozen"):
            Study().title = "other"


class TestStages:
    @given(total=st.integers(1, 10**6), steps=st.integers(1, 10**4), count=st.integers(2, 8))
    def test_from_before_the_first_step_to_the_last(self, total, steps, count):
        """Ascending, from 0 to the end, as many as were asked for or fewer in a short run."""
        found = stages(total, steps, count)

        assert found[0] == 0
        assert found[-1] == total
        assert list(found) == sorted(set(found))
        assert len(found) <= count
        assert all(type(step) is int for step in found)

    def test_the_papers_four(self):
        """Before training, a quarter of an epoch in, two later ones, spaced by equal factors."""
        before, early, middle, last = stages(10_000, 400)

        assert (before, early, last) == (0, 100, 10_000)
        assert middle == 1000

    def test_written_out_by_the_size_of_the_data(self):
        """Iterations follow from epochs and data, once; given ones are left alone."""
        study = Study(training={"epochs": 2, "batch_size": 10})
        with pytest.raises(StudyError, match="resolved"):
            _ = study.iterations

        assert study.training.steps_per_epoch(101) == 11
        assert study.resolved(101).iterations[-1] == 22
        assert study.resolved(101).resolved(5) == study.resolved(101)
        given_ones = Study(training={"iterations": (0, 7)})
        assert given_ones.resolved(101) == given_ones


def options() -> st.SearchStrategy:
    value = st.one_of(
        st.booleans(),
        st.integers(-(10**9), 10**9),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=5),
        st.lists(st.integers(0, 99), max_size=3),
    )
    return st.dictionaries(st.text(min_size=1, max_size=5), value, max_size=3)


@st.composite
def studies(draw) -> Study:
    some = st.integers(0, 2**31)
    positive = st.floats(1e-6, 1e3)
    return Study(
        title=draw(st.text(max_size=10)),
        data=Data(
            validation_examples=draw(st.none() | st.integers(1, 10**4)),
            train_examples=draw(st.integers(0, 10**4)),
            sample_seed=draw(some),
            permuted_labels=draw(st.floats(0, 1)),
            unit_norm=draw(st.booleans()),
        ),
        model=Model(options=draw(options())),
        training=Training(
            learning_rates=draw(st.lists(positive, min_size=1, max_size=3, unique=True)),
            seeds=draw(st.lists(some, min_size=1, max_size=3, unique=True)),
            iterations=draw(st.none() | st.sets(some, min_size=1, max_size=4).map(sorted)),
            optimizer=draw(st.sampled_from(["adam", "sgd"])),
        ),
        gradients=Gradients(
            parameters=draw(st.none() | st.lists(st.text(max_size=5), max_size=2)),
            precision=draw(st.sampled_from(["float32", "float64"])),
            tile=draw(st.none() | st.integers(1, 2000)),
        ),
    )


class TestJson:
    @given(studies())
    def test_round_trip(self, study):
        """A study file says all of a study, types of options included."""
        again = Study.model_validate_json(study.model_dump_json())

        assert again == study
        assert repr(again) == repr(study)

    @given(studies())
    def test_a_fingerprint_survives_the_store(self, study):
        """A store belongs to its own study, also after its attributes went through JSON."""
        mine = fingerprint(study, content="abc", tile=100)

        assert differences(json.loads(json.dumps(mine)), mine) == []


CHANGES = {
    "model.name": {"model": {"name": "cnn"}},
    "model.options": {"model": {"options": {"widths": [3]}}},
    "training.learning_rates": {"training": {"learning_rates": (1e-2,)}},
    "training.seeds": {"training": {"seeds": (0, 1)}},
    "training.iterations": {"training": {"iterations": (0, 2)}},
    "training.batch_size": {"training": {"batch_size": 64}},
    "training.optimizer": {"training": {"optimizer": "sgd"}},
    "training.momentum": {"training": {"momentum": 0.9}},
    "training.weight_decay": {"training": {"weight_decay": 0.1}},
    "labels.permuted": {"data": {"permuted_labels": 0.5}},
    "labels.seed": {"data": {"permutation_seed": 1}},
    "preprocessing.unit_norm": {"data": {"unit_norm": False}},
    "parameters": {"gradients": {"parameters": ("0.*",)}},
    "precision": {"gradients": {"precision": "float64"}},
}


class TestFingerprint:
    base = Study(training={"iterations": (0, 1)})

    def changed(self, change):
        data = self.base.model_dump()
        for part, fields in change.items():
            data[part] |= fields
        return Study(**data)

    @pytest.mark.parametrize("field", CHANGES)
    def test_everything_that_can_change_a_number(self, field):
        """A change of one field is one difference, with the field, what it was and what it is."""
        was = fingerprint(self.base, content="abc", tile=100)
        now = fingerprint(self.changed(CHANGES[field]), content="abc", tile=100)
        (line,) = differences(was, now)

        assert line.startswith(f"{field} was ") or line.startswith(f"{field}.")
        before, after = line.split(" was ")[1].split(", is ")
        assert before != after

    def test_the_data_and_the_tiles(self):
        """Other examples, or other tiles, are another store."""
        was = fingerprint(self.base, content="abc", tile=100)

        assert differences(was, fingerprint(self.base, content="abd", tile=100)) == [
            'data was "abc", is "abd"'
        ]
        assert differences(was, fingerprint(self.base, content="abc", tile=50)) == [
            "tile was 100, is 50"
        ]

    def test_the_title_and_the_epochs_change_no_number(self):
        """With iterations written out, epochs say nothing more."""
        other = self.base.model_copy(
            update={
                "title": "other",
                "training": self.base.training.model_copy(update={"epochs": 99.0}),
            }
        )

        assert fingerprint(other, content="a", tile=1) == fingerprint(
            self.base, content="a", tile=1
        )

    def test_the_version_of_the_gradient_engine(self):
        """Stores of an engine that could give other numbers are not continued."""
        assert "gradient_engine" in fingerprint(self.base, content="a", tile=1)

    def test_fields_that_only_one_has(self):
        """A field that a later version adds, or drops, is a difference too."""
        assert differences({"a": 1}, {"a": 1, "b": {"c": 2}}) == ['b was null, is {"c": 2}']
        assert differences({"a": 1, "b": 2}, {"a": 1}) == ["b was 2, is null"]

    def test_digest(self):
        """A short hash that does not depend on the order of keys."""
        assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
        assert digest({"a": 1}) != digest({"a": 2})
