"""Coverage: how often mean ± 1.96 errors holds a mean that is known, over simulated studies.

Every draw is a study of new examples; draws lie along `seed`, so that one call reduces them all.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import xarray as xr

from distributed_stiffness.analysis import (
    class_matrix,
    critical_length,
    distance_profile,
    within_between,
)

DRAWS = 400
LABELS = np.repeat(np.arange(3), (12, 14, 18))  # three classes, not of one size
N = len(LABELS)
EDGES = np.linspace(0, 2, 6)
MEANS = np.array([[0.5, 0.1, -0.2], [0.1, 0.3, 0.0], [-0.2, 0.0, 0.4]])  # of the classes' pairs
# The binomial error of a share of 0.95 over 400 draws is 0.011.
NOMINAL, CONSERVATIVE = (0.90, 1.0), (0.93, 1.0)


def study(cosine: np.ndarray, distance: np.ndarray | None = None) -> xr.Dataset:
    """A store's content with one draw for each seed, in one block."""
    names = np.array([f"class {k}" for k in LABELS], dtype=object)
    ds = xr.Dataset(
        {
            "cosine": (
                ("learning_rate", "seed", "iteration", "example", "other"),
                cosine[None, :, None],
            ),
            "distance": (("example", "other"), _distances() if distance is None else distance),
        },
        coords={
            "example": np.arange(N),
            "other": np.arange(N),
            "class_name": ("example", names),
            "other_class_name": ("other", names),
        },
    )
    return ds.chunk()


def _distances() -> np.ndarray:
    random = np.random.default_rng(7)
    points = random.normal(size=(N, 3))
    units = points / np.linalg.norm(points, axis=1, keepdims=True)
    return np.asarray(1 - units @ units.T)


def additive(means: np.ndarray, h: float, rest: float = 1.0) -> np.ndarray:
    """s_ij = mean + h_i + h_j + r_ij of DRAWS studies; `h` and `rest` are standard deviations."""
    random = np.random.default_rng(1)
    effect = h * random.normal(size=(DRAWS, N, 1))
    noise = rest * random.normal(size=(DRAWS, N, N))
    noise = np.tril(noise, -1) + np.swapaxes(np.tril(noise, -1), 1, 2)
    return np.asarray(means + effect + np.swapaxes(effect, 1, 2) + noise)


def bilinear(centres: np.ndarray) -> np.ndarray:
    """s_ij = x_i . x_j, x around the centre of its class: E s_ij is the product of the centres."""
    random = np.random.default_rng(2)
    x = centres[LABELS] + random.normal(size=(DRAWS, N, centres.shape[1]))
    return np.asarray(x @ np.swapaxes(x, 1, 2))


def mean_sign(mean: float, h: float, rest: float = 1.0) -> float:
    """E sign of a normal variable."""
    return math.erf(mean / math.sqrt(2 * h**2 + rest**2) / math.sqrt(2))


def covered(result: xr.Dataset, name: str, truth: np.ndarray | float) -> np.ndarray:
    """Share of draws whose mean ± 1.96 errors holds the truth."""
    off = np.abs(result[name] - truth)
    assert result[f"{name}_error"].notnull().all()
    return np.asarray((off <= 1.96 * result[f"{name}_error"]).mean("seed"))


def assert_between(share: np.ndarray, limits: tuple[float, float]) -> None:
    assert (share >= limits[0]).all(), share
    assert (share <= limits[1]).all(), share


def within_and_between(cells: np.ndarray) -> np.ndarray:
    off_diagonal = cells[~np.eye(len(cells), dtype=bool)]
    return np.array([np.diag(cells).mean(), off_diagonal.mean()])


class TestAdditive:
    @pytest.mark.parametrize(("h", "limits"), [(0.5, NOMINAL), (0.0, CONSERVATIVE)])
    def test_means(self, h: float, limits: tuple[float, float]):
        """Within, between and the gap are covered; with no effect of examples more than so."""
        result = within_between(study(additive(MEANS[LABELS][:, LABELS], h))).compute()
        signs = np.array([[mean_sign(mean, h) for mean in row] for row in MEANS])

        for measure, cells in (("cosine", MEANS), ("sign", signs)):
            truth = within_and_between(cells)
            assert_between(covered(result, measure, truth), limits)
            assert_between(covered(result, f"{measure}_gap", truth[0] - truth[1]), limits)

    @pytest.mark.parametrize(("h", "limits"), [(0.5, NOMINAL), (0.0, CONSERVATIVE)])
    def test_cells(self, h: float, limits: tuple[float, float]):
        """So is every cell of the class matrix."""
        result = class_matrix(study(additive(MEANS[LABELS][:, LABELS], h))).compute()

        assert_between(covered(result, "cosine", MEANS), limits)

    @pytest.mark.parametrize(("h", "limits"), [(0.5, NOMINAL), (0.0, CONSERVATIVE)])
    def test_bins(self, h: float, limits: tuple[float, float]):
        """So is every bin of the profile, of all pairs and within a class."""
        bins = np.clip(np.searchsorted(EDGES, _distances(), side="right") - 1, 0, 4)
        truth = np.array([0.5, 0.3, 0.2, 0.0, -0.2])
        result = distance_profile(study(additive(truth[bins], h)), edges=EDGES).compute()
        signs = np.array([mean_sign(mean, h) for mean in truth])

        for relation in ("all", "within"):
            profile = result.sel(relation=relation)
            assert_between(covered(profile, "cosine", truth), limits)
            assert_between(covered(profile, "sign", signs), limits)

    def test_length(self):
        """The interval of two errors holds ξ, where every draw has one."""
        bins = np.clip(np.searchsorted(EDGES, _distances(), side="right") - 1, 0, 4)
        line = 0.8 - 0.8 * ((EDGES[:-1] + EDGES[1:]) / 2)
        length = critical_length(study(additive(line[bins], 0.2, 0.3)), edges=EDGES).compute()

        assert length["cosine_length"].notnull().all()
        inside = (length["cosine_length_low"] <= 1) & (length["cosine_length_high"] >= 1)
        assert_between(np.asarray(inside.mean("seed")), NOMINAL)
        assert_between(covered(length, "cosine_length", 1.0), NOMINAL)
        assert_between(covered(length, "cosine_slope", -0.8), NOMINAL)


class TestBilinear:
    def test_common_direction(self):
        """Products of vectors around class centres are covered."""
        centres = np.array([[1.0, 0.2, 0.0], [0.8, -0.5, 0.2], [0.9, 0.1, -0.6]])
        cells = centres @ centres.T
        ds = study(bilinear(centres))
        result, matrix = within_between(ds).compute(), class_matrix(ds).compute()

        truth = within_and_between(cells)
        assert_between(covered(result, "cosine", truth), NOMINAL)
        assert_between(covered(result, "cosine_gap", truth[0] - truth[1]), NOMINAL)
        assert_between(covered(matrix, "cosine", cells), (0.88, 1.0))  # 12 examples: t, not normal

    def test_no_direction(self):
        """Independent vectors of mean zero: errors are twice the variance, never too small."""
        ds = study(bilinear(np.zeros((3, 8))))
        result = within_between(ds).compute()

        assert_between(covered(result, "cosine", 0.0), CONSERVATIVE)
        assert_between(covered(result, "sign", 0.0), CONSERVATIVE)
        assert_between(covered(result, "cosine_gap", 0.0), CONSERVATIVE)
        ratio = (result["cosine_error"] ** 2).mean("seed") / result["cosine"].var("seed", ddof=1)
        assert ((ratio > 1.6) & (ratio < 2.5)).all()  # 2 in theory (Efron and Stein)

    def test_pairs_taken_as_independent(self):
        """Counting pairs instead of examples, the errors would be several times too small."""
        ds = study(bilinear(np.array([[1.0, 0.0], [1.0, 0.2], [1.0, -0.2]])))
        result = within_between(ds).compute().isel(learning_rate=0, iteration=0)
        spread = float(result["cosine"].sel(relation="between").std("seed"))
        between = LABELS[:, None] < LABELS
        naive = ds["cosine"].values[0, :, 0][:, between].std(1).mean() / np.sqrt(between.sum())

        assert naive < 0.4 * spread
        error = float(result["cosine_error"].sel(relation="between").mean())
        assert 0.85 * spread < error < 1.3 * spread
