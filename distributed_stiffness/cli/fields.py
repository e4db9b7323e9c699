"""Which field of a study, or of a run, each option is: the command line says what a file can say.

One table for all commands; `tests/test_cli.py` holds it against the fields themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from distributed_stiffness.cli.parsing import count, n_bytes, named_values, rows_range, split


def _as_it_is(value: Any) -> Any:
    return value


def _numbers(option: str, kind: Callable[[str], Any]) -> Callable[[str | None], Any]:
    return lambda text: None if text is None else split(option, text, kind)


@dataclass(frozen=True)
class Field:
    """A field by its path, and what makes its value of an option's."""

    path: str
    read: Callable[[Any], Any] = _as_it_is


OF_STUDY: Mapping[str, Field] = {
    "title": Field("title"),
    "data_name": Field("data.name"),
    "data_option": Field("data.options", partial(named_values, "--data-option")),
    "examples": Field("data.validation_examples", count),
    "train_examples": Field("data.train_examples"),
    "sample_seed": Field("data.sample_seed"),
    "permute_labels": Field("data.permuted_labels"),
    "permutation_seed": Field("data.permutation_seed"),
    "standardise": Field("data.standardise"),
    "unit_norm": Field("data.unit_norm"),
    "accept_unverified_data": Field("data.accept_unverified"),
    "model": Field("model.name"),
    "model_option": Field("model.options", partial(named_values, "--model-option")),
    "learning_rates": Field("training.learning_rates", _numbers("--learning-rates", float)),
    "seed": Field("training.seeds", _numbers("--seed", int)),
    "iterations": Field("training.iterations", _numbers("--iterations", int)),
    "epochs": Field("training.epochs"),
    "batch_size": Field("training.batch_size"),
    "optimizer": Field("training.optimizer"),
    "momentum": Field("training.momentum"),
    "weight_decay": Field("training.weight_decay"),
    "loss": Field("loss"),
    "parameters": Field("gradients.parameters"),
    "precision": Field("gradients.precision"),
    "tile": Field("gradients.tile"),
    "reduce_only": Field("keep", lambda only: "sums" if only else "pairs"),
    "distance_bins": Field("distance_bins"),
}

OF_RUN: Mapping[str, Field] = {
    "store": Field("store"),
    "checkpoints": Field("checkpoints"),
    "data_dir": Field("data_directory"),
    "download": Field("download"),
    "engine": Field("engine"),
    "address": Field("address"),
    "device": Field("device"),
    "max_replicas": Field("max_replicas"),
    "threads": Field("threads"),
    "memory": Field("memory", n_bytes),
    "rows": Field("rows", rows_range),
    "wait_for_nodes": Field("wait_for_nodes"),
    "allow_error": Field("allow_error"),
}


def study_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the options say of a study: its fields, nested as in a study file.

    Args:
        options: of a command, by the names of its parameters; others are left alone.

    Raises:
        StudyError: the text of one cannot be read.
    """
    fields: dict[str, Any] = {}
    for path, value in _values(OF_STUDY, options).items():
        section, _, name = path.rpartition(".")
        (fields.setdefault(section, {}) if section else fields)[name] = value
    return fields


def run_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the options say of a run; see `study_fields`."""
    return _values(OF_RUN, options)


def _values(table: Mapping[str, Field], options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        table[name].path: table[name].read(value)
        for name, value in options.items()
        if name in table
    }
