"""Standard errors, against deleting each example and reducing anew."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import xarray as xr
from analysis import deletion
from analysis.synthetic import Synthetic
from hypothesis import given, settings

from distributed_stiffness.analysis import (
    class_matrix,
    critical_length,
    distance_profile,
    jackknife,
    superclass_contrast,
    superclass_matrix,
    within_between,
)
from distributed_stiffness.errors import DataError

# Deleting by subtraction leaves the rounding of the sums; errors are roots of small squares.
CLOSE = {"rtol": 1e-8, "atol": 1e-9}
EDGES = np.linspace(0.2, 1.6, 5)
SPLITS = ("train", "validation")
SAME = ("validation", "validation")

studies = st.builds(
    Synthetic,
    n_examples=st.integers(13, 17),  # classes of different sizes, some of two or three examples
    n_classes=st.integers(2, 4),
    n_superclasses=st.just(2),
    n_train=st.integers(3, 7),
    iterations=st.just((0,)),
    zero_gradients=st.lists(st.integers(0, 12), max_size=3),
    random_seed=st.integers(0, 2**16),
)
blocks = st.sampled_from([SPLITS, SAME])


def only(ds: xr.Dataset) -> xr.Dataset:
    return ds.isel(learning_rate=0, seed=0, iteration=0)


class TestClassMatrix:
    @settings(max_examples=6)
    @given(study=studies, splits=blocks)
    def test_definition(self, study: Synthetic, splits: tuple[str, str]):
        """The error of a cell is what deleting its examples, one at a time, makes it."""
        ds = study.build()
        got = only(class_matrix(ds, splits=splits).compute())
        found, who = deletion.block(only(ds), *splits)
        by_class = deletion.strata(who, by_class=True)

        for measure in ("cosine", "sign"):
            expected = deletion.errors(
                lambda some, m=measure: deletion.means(some, m, lambda p: p.classes),
                found,
                by_class,
            )
            for a in got["class_name"].values:
                for b in got["other_class_name"].values:
                    cell = got[f"{measure}_error"].sel(class_name=a, other_class_name=b)
                    np.testing.assert_allclose(cell, expected.get((a, b), math.nan), **CLOSE)

    def test_formulas(self):
        """With equal counts it is the delete-one formula within, the two-sample form between."""
        ds = Synthetic(n_examples=15, n_classes=3, iterations=(0,)).build()
        error = only(class_matrix(ds).compute())["cosine_error"].values
        s = only(ds)["cosine"].values.astype(float)
        np.fill_diagonal(s, 0)
        n, of = 5, [ds["label"].values == k for k in range(3)]

        for a in range(3):
            for b in range(3):
                m_a, m_b = s[of[a]][:, of[b]].sum(1), s[of[b]][:, of[a]].sum(1)
                if a == b:
                    spread = ((m_a / (n - 1) - (m_a / (n - 1)).mean()) ** 2).sum()
                    variance = 4 * (n - 1) / (n * (n - 2) ** 2) * spread
                else:
                    variance = sum(((m / n - (m / n).mean()) ** 2).sum() for m in (m_a, m_b))
                    variance /= n * (n - 1)
                np.testing.assert_allclose(error[a, b], np.sqrt(variance), **CLOSE)

    def test_few_examples(self):
        """Two examples within a class, and one against another class, have no error."""
        ds = Synthetic(n_examples=6, n_classes=2, iterations=(0,)).build()
        names = np.array(["a", "b", "b", "c", "c", "c"], dtype=object)
        ds = ds.assign_coords(class_name=("example", names), other_class_name=("other", names))
        got = only(class_matrix(ds).compute())

        expected = [[0, 0, 0], [0, 0, 1], [0, 1, 1]]
        np.testing.assert_array_equal(np.isfinite(got["sign_error"]), np.array(expected, bool))
        assert np.isfinite(got["sign"].values)[~np.eye(3, dtype=bool)].all()

    @settings(max_examples=3)
    @given(study=studies, splits=blocks, rows=st.integers(3, 18), columns=st.integers(3, 18))
    def test_chunks(self, study: Synthetic, splits: tuple[str, str], rows: int, columns: int):
        """Chunk sizes do not matter, for errors neither, whatever they are of."""
        ds = study.build()
        chunked = ds.chunk({"example": rows, "other": columns})

        for reduce in (class_matrix, within_between, superclass_contrast):
            xr.testing.assert_allclose(
                reduce(chunked, splits=splits).compute(),
                reduce(ds, splits=splits).compute(),
                rtol=1e-7,
                atol=1e-9,
            )

    def test_leading_dimensions(self):
        """Every checkpoint has the errors that it has alone, however they are chunked."""
        ds = Synthetic(n_examples=15, n_train=6, learning_rates=(1e-3, 1e-2), seeds=(0, 1)).build()

        for splits in (SPLITS, SAME):
            together = class_matrix(ds.chunk({"seed": 2, "example": 7}), splits=splits).compute()
            for seed in range(2):
                at = {"learning_rate": 1, "seed": seed, "iteration": 1}
                alone = class_matrix(ds.isel(at), splits=splits).compute()
                np.testing.assert_allclose(
                    together["sign_error"].isel(at), alone["sign_error"], **CLOSE
                )

    def test_order_of_examples(self, made: xr.Dataset):
        """Rows and columns in another order, apart, change no error."""
        random = np.random.default_rng(0)
        n = made.sizes["example"]
        shuffled = made.isel(example=random.permutation(n), other=random.permutation(n))

        for reduce in (class_matrix, within_between, superclass_matrix, distance_profile):
            xr.testing.assert_allclose(
                reduce(shuffled).compute(), reduce(made).compute(), rtol=1e-7, atol=1e-9
            )

    def test_some_rows(self):
        """A part of the rows against all columns: an example that is in both is deleted in both."""
        ds = Synthetic(n_examples=14, n_classes=2, iterations=(0,)).build()
        part = ds.isel(example=slice(0, 8))
        got = only(class_matrix(part).compute())
        found = deletion.pairs(only(part))
        rows = set(part["example"].values.tolist())
        who = {
            ("validation", k): ("both" if k in rows else "column", name)
            for k, name in enumerate(ds["class_name"].values)
        }

        expected = deletion.errors(
            lambda some: deletion.means(some, "sign", lambda p: p.classes),
            found,
            deletion.strata(who, by_class=True),
        )
        for (a, b), error in expected.items():
            cell = got["sign_error"].sel(class_name=a, other_class_name=b)
            np.testing.assert_allclose(cell, error, **CLOSE)

    def test_half_written(self):
        """Where (i, j) is there and (j, i) is not, errors are not made up."""
        ds = Synthetic(n_examples=12, n_classes=2, iterations=(0,)).build()
        first, second = (np.flatnonzero(ds["label"].values == k)[0] for k in (0, 1))
        ds["cosine"].values[..., first, second] = np.nan
        error = only(class_matrix(ds).compute())["sign_error"].values

        np.testing.assert_array_equal(np.isnan(error), ~np.eye(2, dtype=bool))

    def test_two_groups_of_one_example(self, made: xr.Dataset):
        """An example of one group as a row and another as a column is refused."""
        other = np.roll(made["class_name"].values, 1)
        ds = made.assign_coords(mine=made["class_name"], other_mine=("other", other))

        with pytest.raises(DataError, match="differs in 'mine' as a row and in 'other_mine'"):
            class_matrix(ds, "mine")


class TestSlabs:
    @pytest.mark.parametrize("splits", [SPLITS, SAME])
    def test_size(self, monkeypatch: pytest.MonkeyPatch, splits: tuple[str, str]):
        """How many examples are worked on at a time changes no error."""
        ds = Synthetic(
            n_examples=17, n_train=6, n_superclasses=2, iterations=(0,), zero_gradients=(3, 9)
        ).build()
        reductions = (
            class_matrix,
            within_between,
            superclass_matrix,
            superclass_contrast,
            distance_profile,
            critical_length,
        )
        whole = [reduce(ds, splits=splits).compute() for reduce in reductions]
        monkeypatch.setattr(jackknife, "SLAB", 4)

        for reduce, expected in zip(reductions, whole, strict=True):
            got = reduce(ds, splits=splits).compute()
            xr.testing.assert_allclose(got, expected, rtol=1e-7, atol=1e-9)


class TestSuperclasses:
    @settings(max_examples=6)
    @given(study=studies.filter(lambda study: study.n_classes > 2), splits=blocks)
    def test_matrix(self, study: Synthetic, splits: tuple[str, str]):
        """Examples of one super-class are one sample."""
        ds = study.build()
        got = only(superclass_matrix(ds, splits=splits).compute())
        found, who = deletion.block(only(ds), *splits)
        above = {p.row: p.above[0] for p in found} | {p.column: p.above[1] for p in found}
        strata = deletion.strata({k: (who[k][0], above[k]) for k in above}, by_class=True)

        expected = deletion.errors(
            lambda some: deletion.means(some, "sign", lambda p: p.above), found, strata
        )
        for (a, b), error in expected.items():
            cell = got["sign_error"].sel(superclass_name=a, other_superclass_name=b)
            np.testing.assert_allclose(cell, error, **CLOSE)

    @settings(max_examples=6)
    @given(study=studies.filter(lambda study: study.n_classes > 2), splits=blocks)
    def test_contrast(self, study: Synthetic, splits: tuple[str, str]):
        """Within a super-class but across classes, between super-classes, and the contrast."""
        ds = study.build()
        got = only(superclass_contrast(ds, splits=splits).compute())
        found, who = deletion.block(only(ds), *splits)
        above = dict(p for pair in found for p in zip(pair.classes, pair.above, strict=True))

        for measure in ("cosine", "sign"):
            cells = deletion.means(found, measure, lambda p: p.classes)
            different = [c for c, v in cells.items() if c[0] != c[1] and not math.isnan(v)]
            same = [c for c in different if above[c[0]] == above[c[1]]]
            other = [c for c in different if above[c[0]] != above[c[1]]]
            expected = deletion.errors(
                lambda some, m=measure, s=same, o=other: summarised(some, m, s, o),
                found,
                deletion.strata(who, by_class=True),
            )
            assert_summary(got, measure, "contrast", expected)

    def test_from_a_matrix(self, made: xr.Dataset):
        """A class matrix gives the same contrast and p-value, without errors."""
        full = superclass_contrast(made).compute()
        bare = superclass_contrast(class_matrix(made).compute())

        for name in ("sign", "cosine_contrast", "sign_p_value"):
            xr.testing.assert_allclose(
                bare[name].drop_vars("relation", errors="ignore"),
                full[name].drop_vars("relation", errors="ignore"),
            )
        assert not any(str(name).endswith("_error") for name in bare)

    def test_exact_p_value(self):
        """With few classes every assignment is looked at: three ways to pair four classes."""
        cells = np.array([[0, 9, 1, 2], [9, 0, 2, 1], [1, 2, 0, 5], [2, 1, 5, 0]]) / 10
        group = ["a", "a", "b", "b"]

        assert p_value(cells, group) == pytest.approx(1 / 3)
        assert p_value(cells, ["a", "b", "a", "b"]) == pytest.approx(1.0)

    def test_drawn_p_value(self):
        """With many classes assignments are drawn: a clear structure has the least p there is."""
        group = [f"group {k // 5}" for k in range(20)]
        same = np.array(group)[:, None] == np.array(group)
        random = np.random.default_rng(0)
        noise = random.normal(size=(20, 20))
        noise = (noise + noise.T) / 8

        assert p_value(same + noise, group, 200) == pytest.approx(1 / 201)
        assert p_value(same + noise, group, 200) == p_value(same + noise, group, 200)

    def test_uniform_p_values(self):
        """Without structure p-values are uniform: never too often small."""
        random = np.random.default_rng(1)
        group = [f"group {k // 2}" for k in range(6)]
        noise = random.normal(size=(400, 6, 6))
        found = p_value(noise + noise.swapaxes(1, 2), group)

        for level in (0.1, 0.3, 0.5):
            # Three of its own standard errors.
            assert (found <= level).mean() < level + 3 * np.sqrt(level * (1 - level) / 400)
        assert abs(found.mean() - 0.5) < 0.1

    def test_nothing_to_permute(self):
        """One super-class, and a pair of classes without a pair, have no p-value."""
        cells = np.arange(9.0).reshape(3, 3)
        holed = np.where(np.eye(3, k=1) > 0, np.nan, cells)

        assert np.isnan(p_value(cells, ["a", "a", "a"]))
        assert np.isnan(p_value(holed, ["a", "a", "b"]))


def p_value(cells: np.ndarray, group: list[str], permutations: int = 10_000) -> np.ndarray:
    names = [f"class {k}" for k in range(len(group))]
    above = np.array(group, dtype=object)
    dims = ("draw", "class_name", "other_class_name")[-cells.ndim :]
    matrix = xr.Dataset(
        {"sign": (dims, cells), "cosine": (dims, cells)},
        coords={
            "class_name": names,
            "other_class_name": names,
            "superclass_name": ("class_name", above),
            "other_superclass_name": ("other_class_name", above),
        },
    )
    return superclass_contrast(matrix, permutations=permutations)["sign_p_value"].values


def summarised(some: list, measure: str, first: list, second: list) -> dict:
    cells = deletion.means(some, measure, lambda p: p.classes)
    means = [deletion.mean_of_cells(cells, names) for names in (first, second)]
    return {0: means[0], 1: means[1], "difference": means[0] - means[1]}


def assert_summary(got: xr.Dataset, measure: str, difference: str, expected: dict) -> None:
    for k in range(2):
        error = got[f"{measure}_error"].isel(relation=k)
        np.testing.assert_allclose(error, expected[k], **CLOSE)
    error = got[f"{measure}_{difference}_error"]
    np.testing.assert_allclose(error, expected["difference"], **CLOSE)


class TestWithinBetween:
    @settings(max_examples=6)
    @given(study=studies, splits=blocks)
    def test_definition(self, study: Synthetic, splits: tuple[str, str]):
        """Within, between and the gap: cells that share a class move together."""
        ds = study.build()
        got = only(within_between(ds, splits=splits).compute())
        found, who = deletion.block(only(ds), *splits)

        for measure in ("cosine", "sign"):
            cells = deletion.means(found, measure, lambda p: p.classes)
            there = [c for c, value in cells.items() if not math.isnan(value)]
            same = [c for c in there if c[0] == c[1]]
            other = [c for c in there if c[0] != c[1]]
            expected = deletion.errors(
                lambda some, m=measure, s=same, o=other: summarised(some, m, s, o),
                found,
                deletion.strata(who, by_class=True),
            )
            assert_summary(got, measure, "gap", expected)
            gap = summarised(found, measure, same, other)["difference"]
            np.testing.assert_allclose(got[f"{measure}_gap"], gap, **CLOSE)

    @settings(max_examples=6)
    @given(study=studies, splits=blocks)
    def test_over_pairs(self, study: Synthetic, splits: tuple[str, str]):
        """Pooled means take all examples as one sample."""
        ds = study.build()
        got = only(within_between(ds, splits=splits).compute())
        found, who = deletion.block(only(ds), *splits)

        for measure in ("cosine", "sign"):
            expected = deletion.errors(
                lambda some, m=measure: deletion.means(
                    some, m, lambda p: p.classes[0] == p.classes[1]
                ),
                found,
                deletion.strata(who, by_class=False),
            )
            for relation, same in (("within", True), ("between", False)):
                error = got[f"{measure}_over_pairs_error"].sel(relation=relation)
                np.testing.assert_allclose(error, expected.get(same, math.nan), **CLOSE)


class TestDistanceProfile:
    @settings(max_examples=6)
    @given(study=studies, splits=blocks)
    def test_definition(self, study: Synthetic, splits: tuple[str, str]):
        """Bins are ratios of sums; those that hang on one example have no error."""
        ds = study.build()
        got = only(distance_profile(ds, edges=EDGES, splits=splits).compute())
        found, who = deletion.block(only(ds), *splits)
        keys = {
            "all": lambda p: deletion.bin_of(p.distance, EDGES),
            "within": lambda p: (
                deletion.bin_of(p.distance, EDGES) if p.classes[0] == p.classes[1] else None
            ),
        }

        for measure in ("cosine", "sign"):
            for relation, key in keys.items():
                expected = deletion.errors(
                    lambda some, m=measure, key=key: deletion.means(some, m, key),
                    found,
                    deletion.strata(who, by_class=False),
                )
                for k in range(len(EDGES) - 1):
                    in_bin = [p for p in found if key(p) == k]
                    if measure == "cosine":
                        in_bin = [p for p in in_bin if not p.zero]
                    most = max(sum(e in (p.row, p.column) for p in in_bin) for e in who)
                    error = expected.get(k, math.nan) if 2 * most <= len(in_bin) else math.nan
                    cell = got[f"{measure}_error"].sel(relation=relation).isel(distance_bin=k)
                    np.testing.assert_allclose(cell, error, **CLOSE)

    @settings(max_examples=3)
    @given(study=studies, splits=blocks, rows=st.integers(3, 18), columns=st.integers(3, 18))
    def test_chunks(self, study: Synthetic, splits: tuple[str, str], rows: int, columns: int):
        """Chunk sizes do not matter."""
        ds = study.build()
        chunked = ds.chunk({"example": rows, "other": columns})

        for reduce in (distance_profile, critical_length):
            xr.testing.assert_allclose(
                reduce(chunked, edges=EDGES, splits=splits).compute(),
                reduce(ds, edges=EDGES, splits=splits).compute(),
                rtol=1e-6,
                atol=1e-8,
            )


def straight(n: int, *, slope: float, noise: float, seed: int = 0) -> xr.Dataset:
    """A study whose within-class stiffness falls with distance, but for the noise of examples."""
    ds = Synthetic(n_examples=n, n_classes=2, iterations=(0,), random_seed=seed).build()
    random = np.random.default_rng(seed)
    h = noise * random.standard_normal(n)
    values = 0.3 + slope * (ds["distance"].values - 0.5) + h[:, None] + h
    ds["cosine"].values[:] = values
    return ds


class TestCriticalLength:
    @settings(max_examples=6)
    @given(
        splits=blocks,
        random_seed=st.integers(0, 99),
        zero=st.lists(st.integers(0, 15), max_size=2),
        relation=st.sampled_from(["within", "between", "all"]),
    )
    def test_definition(
        self, splits: tuple[str, str], random_seed: int, zero: list[int], relation: str
    ):
        """The line is fitted anew without each example."""
        ds = Synthetic(
            n_examples=16,
            n_classes=2,
            n_train=8,
            iterations=(0,),
            zero_gradients=zero,
            random_seed=random_seed,
        ).build()
        edges = np.linspace(0, 2, 6)
        got = only(critical_length(ds, edges=edges, relation=relation, splits=splits).compute())
        found, who = deletion.block(only(ds), *splits)
        if relation != "all":
            same = relation == "within"
            found = [p for p in found if (p.classes[0] == p.classes[1]) == same]

        for measure in ("cosine", "sign"):
            line = deletion.line(found, measure, edges)
            errors = deletion.errors(
                lambda some, m=measure: deletion.line(some, m, edges),
                found,
                deletion.strata(who, by_class=False),
            )
            for name in ("slope", "intercept"):
                np.testing.assert_allclose(got[f"{measure}_{name}"], line[name], atol=1e-9)
                np.testing.assert_allclose(
                    got[f"{measure}_{name}_error"], errors[name], rtol=1e-6, atol=1e-8
                )
            both = (errors["both"] ** 2 - errors["slope"] ** 2 - errors["intercept"] ** 2) / 2
            np.testing.assert_allclose(got[f"{measure}_covariance"], both, rtol=1e-5, atol=1e-8)
            known = line["slope"] < -2 * errors["slope"]
            length, error = (line["length"], errors["length"]) if known else (np.nan, np.nan)
            np.testing.assert_allclose(got[f"{measure}_length"], length, rtol=1e-6)
            np.testing.assert_allclose(got[f"{measure}_length_error"], error, rtol=1e-5, atol=1e-8)

    def test_interval(self):
        """Both ends are where the line is two of its errors from zero, around ξ."""
        got = only(critical_length(straight(40, slope=-1.0, noise=0.1)).compute())

        for measure in ("cosine", "sign"):
            low, length, high = (
                float(got[f"{measure}_{name}"]) for name in ("length_low", "length", "length_high")
            )
            assert low < length < high
            for x in (low, high):
                value = got[f"{measure}_intercept"] + got[f"{measure}_slope"] * x
                variance = (
                    got[f"{measure}_intercept_error"] ** 2
                    + 2 * x * got[f"{measure}_covariance"]
                    + (x * got[f"{measure}_slope_error"]) ** 2
                )
                np.testing.assert_allclose(abs(value), 2 * np.sqrt(variance), rtol=1e-6)

    def test_not_determined(self):
        """A slope within two errors of zero has no ξ, but still its α, β and covariance."""
        got = only(critical_length(straight(20, slope=0.0, noise=0.2)).compute())

        assert abs(got["cosine_slope"]) < 2 * got["cosine_slope_error"]
        for name in ("length", "length_error", "length_low", "length_high", "outside_share"):
            assert np.isnan(got[f"cosine_{name}"])
        for name in ("slope", "intercept", "covariance"):
            assert np.isfinite(got[f"cosine_{name}"])
        assert not bool(got["cosine_inside"])

    @pytest.mark.parametrize(("slope", "share"), [(-1.0, 0.0), (-0.3, 1.0)])
    def test_outside(self, slope: float, share: float):
        """How often ξ leaves the distances that occur is counted over the deletions."""
        got = only(critical_length(straight(40, slope=slope, noise=0.01)).compute())

        assert float(got["cosine_outside_share"]) == share
        assert bool(got["cosine_inside"]) == (share == 0)
        assert float(got["lowest_distance"]) < float(got["highest_distance"])

    def test_same_line_as_the_profile(self, made: xr.Dataset):
        """A profile gives the line that the store gives."""
        from_store = critical_length(made).compute()
        from_profile = critical_length(distance_profile(made).compute())

        for name in ("sign_slope", "cosine_intercept", "lowest_distance", "highest_distance"):
            np.testing.assert_allclose(from_profile[name], from_store[name], atol=1e-9)

    def test_unknown_relation(self, made: xr.Dataset):
        """A relation that does not exist is refused."""
        with pytest.raises(DataError, match="expected one of within, between, all"):
            critical_length(made, relation="near")


def test_described(made: xr.Dataset):
    """Every number says what it is, errors too."""
    for result in (
        class_matrix(made),
        within_between(made),
        superclass_contrast(made),
        distance_profile(made),
        critical_length(made),
    ):
        for name, variable in result.data_vars.items():
            assert variable.attrs["long_name"], name
            assert variable.attrs["units"] == "1", name
            assert variable.attrs["description"].endswith("."), name
