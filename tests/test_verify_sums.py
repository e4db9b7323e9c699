"""A look over a store that keeps sums finds whatever is wrong with it, and brings back the bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from damage import Damage, both, copy, cut, files, flip, look, put, remove, verdict
from studies import assert_same_bits, run_options, tiny_study

from distributed_stiffness.checkpoints import METRICS
from distributed_stiffness.engine import run_study
from distributed_stiffness.errors import StoreError
from distributed_stiffness.store import EXPONENTS, Store
from distributed_stiffness.study import Data, Gradients, Model, Study, Training
from distributed_stiffness.tiling import Tiling
from distributed_stiffness.verify.recompute import draw
from distributed_stiffness.verify.tile_sums import (
    Labels,
    Rows,
    Sums,
    asymmetry_of_squares,
    asymmetry_of_weighted,
    wrong_near_zero,
    wrong_rows,
    wrong_sums,
)

LAST = "0/0/1"  # learning rate 0.01, iteration 30
LAST_IN_WORDS = "learning rate 0.01, seed 0, iteration 30"
PLACE = (0, 0, 1)


def study(**changes: object) -> Study:
    """One rate; two splits, so that tiles of 20 hold both; few bins, so that they hold pairs."""
    data = Data(name="digits", validation_examples=41, train_examples=19)
    training = Training(learning_rates=(1e-2,), iterations=(0, 30))
    fields = {"data": data, "training": training, "keep": "sums", "distance_bins": 5}
    return tiny_study(**(fields | changes))


def by_class(i: int, j: int, of: str = LAST) -> str:
    """Key of the sums by class of tile (I, J)."""
    return f"class_sums/c/{of}/{j}/{i}/0/0/0"


def by_distance(i: int, j: int, of: str = LAST) -> str:
    """Key of the sums by distance."""
    return f"distance_sums/c/{of}/{j}/{i}/0/0/0/0"


def weighted(i: int, j: int, of: str = LAST) -> str:
    """Key of the sums weighted with norms."""
    return f"weighted_sums/c/{of}/{j}/{i}/0/0"


def squares(i: int, j: int, of: str = LAST) -> str:
    """Key of the sums of squares."""
    return f"square_sums/c/{of}/{j}/{i}/0/0"


def near_zero(i: int, j: int, of: str = LAST) -> str:
    """Key of the counts by power of two."""
    return f"near_zero/c/{of}/{i}/{j}/0"


KEYS = (by_class, by_distance, weighted, squares, near_zero)
CHECK = {f"{name}/c/{LAST}" for name in ("undecided", "error_bound")}


def of_tile(i: int, j: int) -> set[str]:
    """What is written with a tile: its mirror, and of a diagonal one what examples have."""
    keys = {key(*tile) for key in KEYS for tile in ((i, j), (j, i))}
    columns = ("gradient_norm", "loss", "correct") if i == j else ()
    return keys | {f"{name}/c/{LAST}/{i}" for name in columns}


def stale(i: int, j: int, *, keys: tuple = KEYS, mirror: bool = True) -> Damage:
    """Put a tile of the other checkpoint in the place of this one's."""
    tiles = {(i, j), (j, i)} if mirror else {(i, j)}
    return copy(*((key(*tile, "0/0/0"), key(*tile)) for key in keys for tile in tiles))


def swap(one: tuple[int, int], other: tuple[int, int]) -> Damage:
    """Put two tiles in each other's place, and their mirrors."""
    places = [(one, other), (one[::-1], other[::-1])]
    return copy(
        *((key(*a), key(*b)) for key in KEYS for p, q in places for a, b in ((p, q), (q, p)))
    )


def unsampled(chunk: int) -> int:
    """Return an example of a chunk of the last checkpoint that is not computed again."""
    drawn = draw(Tiling(n_examples=60, tile=20), 3, (0, *PLACE))
    return next(k for k in range(20 * chunk, 20 * chunk + 20) if k not in drawn)


# What is done, the faults found, and the chunks that a repair writes besides metrics.
FAULTS: dict[str, tuple[Damage, set[tuple[str, str]], set[str]]] = {
    "a flipped bit": (flip(by_class(0, 2)), {("unreadable", by_class(0, 2))},
                      of_tile(0, 2) | CHECK),
    "a flipped bit of distances": (flip(by_distance(1, 1)), {("unreadable", by_distance(1, 1))},
                                   of_tile(1, 1) | CHECK),
    "a flipped bit of a count": (flip(near_zero(0, 1)), {("unreadable", near_zero(0, 1))},
                                 of_tile(0, 1) | CHECK),
    "a truncated chunk": (cut(by_class(2, 0), 200), {("unreadable", by_class(2, 0))},
                          of_tile(0, 2) | CHECK),
    "an empty file": (cut(by_distance(2, 0), 0), {("unreadable", by_distance(2, 0))},
                      of_tile(0, 2) | CHECK),
    "a missing chunk": (remove(by_class(0, 2)), {("missing", by_class(0, 2))},
                        of_tile(0, 2) | CHECK),
    "a missing chunk of distances": (remove(by_distance(2, 2)), {("missing", by_distance(2, 2))},
                                     of_tile(2, 2) | CHECK),
    "a missing count": (remove(near_zero(2, 1)), {("missing", near_zero(2, 1))},
                        of_tile(1, 2) | CHECK),
    "a flipped bit of weighted sums": (flip(weighted(1, 2)), {("unreadable", weighted(1, 2))},
                                       of_tile(1, 2) | CHECK),
    "a missing chunk of squares": (remove(squares(2, 0)), {("missing", squares(2, 0))},
                                   of_tile(0, 2) | CHECK),
    "a weighted sum that is no number": (put("weighted_sums", (*PLACE, 1, 3, 0, 4), np.inf),
                                         {("not finite", weighted(0, 1))}, of_tile(0, 1) | CHECK),
    "a square below 0": (put("square_sums", (*PLACE, 1, 3, 0, 1), -1e-9),
                         {("out of range", squares(0, 1))}, of_tile(0, 1) | CHECK),
    "squares beyond their pairs": (put("square_sums", (*PLACE, 1, 3, 0, 0), 20.5),
                                   {("out of range", squares(0, 1))}, of_tile(0, 1) | CHECK),
    "squares too small for the sums": (put("square_sums", (*PLACE, 1, 3, 0, 0), 1e-9),
                                       {("out of range", squares(0, 1))}, of_tile(0, 1) | CHECK),
    "weighted sums of other weights": (stale(0, 1, keys=(weighted,)),
                                       {("out of range", squares(1, 0))}, of_tile(0, 1) | CHECK),
    "weighted sums of other weights, in the part that is drawn": (
        stale(1, 1, keys=(weighted,)),
        {("differs", weighted(1, 1))},
        of_tile(1, 1) | CHECK,
    ),
    "squares of other weights": (stale(0, 1, keys=(squares,)), {("out of range", squares(1, 0))},
                                 of_tile(0, 1) | CHECK),
    "weighted sums that one side has alone": (
        put("weighted_sums", (*PLACE, 2, slice(0, 20)), 0.0),  # type: ignore[arg-type]
        {("inconsistent", weighted(0, 2))},
        # The norms may be what is wrong.
        of_tile(0, 2) | of_tile(0, 0) | of_tile(2, 2) | CHECK,
    ),
    "squares that one side has alone": (
        put("square_sums", (*PLACE, 2, slice(0, 20), 0, 1), 1e3),  # type: ignore[arg-type]
        {("inconsistent", squares(0, 2))},
        of_tile(0, 2) | of_tile(0, 0) | of_tile(2, 2) | CHECK,
    ),
    "a hole": (
        put("class_sums", (*PLACE, 1, slice(3, 20)), np.nan),  # type: ignore[arg-type]
        {("not finite", by_class(0, 1))},
        of_tile(0, 1) | CHECK,
    ),
    "a NaN": (put("distance_sums", (*PLACE, 1, 3, 0, 1, 2, 0), np.nan),
              {("not finite", by_distance(0, 1))}, of_tile(0, 1) | CHECK),
    "a count that was not written": (put("near_zero", (*PLACE, 0, 1, 4), -1),
                                     {("out of range", near_zero(0, 1))}, of_tile(0, 1) | CHECK),
    "too many pairs": (put("class_sums", (*PLACE, 1, 3, 0, 4, 3), 19),
                       {("inconsistent", by_class(0, 1))}, of_tile(0, 1) | CHECK),
    "more pairs with a cosine than pairs": (put("class_sums", (*PLACE, 1, 3, 0, 4, 2), 19),
                                            {("out of range", by_class(0, 1))},
                                            of_tile(0, 1) | CHECK),
    "a sum beyond its pairs": (put("class_sums", (*PLACE, 1, 3, 1, 4, 0), 20.5),
                               {("out of range", by_class(0, 1))}, of_tile(0, 1) | CHECK),
    "half a sign": (put("distance_sums", (*PLACE, 1, 3, 1, 1, 2, 1), 0.5),
                    {("out of range", by_distance(0, 1))}, of_tile(0, 1) | CHECK),
    "pairs below the diagonal counted": (put("near_zero", (*PLACE, 2, 1, 24), 4),
                                         {("inconsistent", near_zero(2, 1))},
                                         of_tile(1, 2) | CHECK),
    "pairs near zero that the sums do not have": (put("near_zero", (*PLACE, 0, 1, 24), 401),
                                                  {("inconsistent", near_zero(0, 1))},
                                                  of_tile(0, 1) | CHECK),
    "sums by class of other weights": (stale(0, 1, keys=(by_class,)),
                                       {("inconsistent", by_distance(0, 1)),
                                        ("inconsistent", by_distance(1, 0))},
                                       of_tile(0, 1) | CHECK),
    "sums by distance of other weights": (stale(1, 1, keys=(by_distance,)),
                                          {("inconsistent", by_distance(1, 1))},
                                          of_tile(1, 1) | CHECK),
    "one side of a tile of other weights": (
        stale(0, 1, keys=(by_class, by_distance), mirror=False),
        {("asymmetric", by_class(0, 1))},
        of_tile(0, 1) | CHECK,
    ),
    "a tile of other weights": (stale(0, 2), {("differs", by_class(0, 2)),
                                              ("differs", by_class(2, 0))},
                                of_tile(0, 2) | CHECK),
    "a diagonal tile of other weights": (stale(1, 1), {("differs", by_class(1, 1))},
                                         of_tile(1, 1) | CHECK),
    "two tiles swapped": (
        swap((0, 1), (0, 2)),
        # Of other columns the pairs of a class are others in number; of other rows, those within.
        {("inconsistent", key(*tile)) for key, tile in ((by_class, (0, 1)), (by_class, (0, 2)),
                                                        (by_distance, (1, 0)),
                                                        (by_distance, (2, 0)))},
        of_tile(0, 1) | of_tile(0, 2) | CHECK,
    ),
    "a norm that nobody computes again": (
        put("gradient_norm", (*PLACE, unsampled(1)), 7.5),
        {("differs", f"gradient_norm/c/{LAST}/1")},
        of_tile(1, 1),
    ),
    "norms of other weights": (
        copy(("gradient_norm/c/0/0/0/1", f"gradient_norm/c/{LAST}/1")),
        {("differs", f"gradient_norm/c/{LAST}/1")},
        of_tile(1, 1),
    ),
    "a damaged norm": (
        flip(f"gradient_norm/c/{LAST}/1"),
        {("unreadable", f"gradient_norm/c/{LAST}/1")},
        of_tile(1, 1),
    ),
    "a norm of 0": (
        put("gradient_norm", (*PLACE, 21), 0.0),
        {("zero gradient", by_class(i, j)) for i, j in ((0, 1), (1, 0), (1, 1), (1, 2), (2, 1))},
        {key for i in range(3) for key in of_tile(i, i)} | of_tile(0, 1) | of_tile(1, 2) | CHECK,
    ),
    "a wrong count of undecided pairs": (
        put("undecided", PLACE, 7),
        {("inconsistent", f"undecided/c/{LAST}")},
        CHECK,
    ),
    "a bound that pairs were not counted by": (
        put("error_bound", PLACE, 3e-6),
        {("out of range", f"error_bound/c/{LAST}")},
        CHECK,
    ),
    "a missing check": (remove(f"undecided/c/{LAST}"), {("missing", f"undecided/c/{LAST}")}, CHECK),
    "an edge of a bin": (put("lower_edge", (2,), 0.7), {("differs", "lower_edge/c/0")},
                         {"lower_edge/c/0"}),
    "several at once": (
        both(flip(by_class(0, 2)), remove(by_distance(1, 1)), flip(f"loss/c/{LAST}/0")),
        {
            ("unreadable", by_class(0, 2)),
            ("missing", by_distance(1, 1)),
            ("unreadable", f"loss/c/{LAST}/0"),
        },
        of_tile(0, 2) | of_tile(1, 1) | of_tile(0, 0) | CHECK,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that was computed without disturbance."""
    store = tmp_path_factory.mktemp("verify") / "sums.zarr"
    run_study(study(), run_options(store))
    return store


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, with its checkpoints."""
    shutil.copytree(finished.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / finished.name


class TestSoundStores:
    def test_nothing_is_wrong_with_a_store_as_it_was_computed(self, finished: Path) -> None:
        """
        Every chunk is read, every tile is sampled, no fault is found and nothing is written.
        """
        before = files(finished)

        found = look(finished, repair=True)

        assert [str(fault) for fault in found.faults] == []
        assert found.complete
        assert not found.notes
        assert found.checked["chunks"] == len(before)
        # Of two checkpoints: nine examples over three parts, two splits and ten classes.
        assert found.checked["sums computed again"] == 2 * 9 * 3 * 2 * 10
        assert files(finished) == before

    @pytest.mark.parametrize(
        "changes",
        [
            {"gradients": Gradients(tile=25, precision="bf16")},
            {"gradients": Gradients(tile=60, precision="float64")},
            {
                "training": Training(learning_rates=(3e-2,), iterations=(0, 1, 1500)),
                "model": Model(name="fully_connected", options={"widths": [64, 32]}),
            },
            {"gradients": Gradients(tile=20, parameters=("1.*", "3.*"))},
            {"model": Model(name="networks:few_units")},
        ],
        ids=["bf16", "float64", "over-fitted", "some parameters", "gradients of zero"],
    )
    def test_no_false_alarm(self, changes: dict[str, object], tmp_path: Path) -> None:
        """
        Coarse products, over-fitted networks, ragged tiles, zero gradients: no fault is found,
        whatever is drawn.
        """
        run_study(study(**changes), run_options(tmp_path / "x.zarr"))

        for seed in range(3):
            found = look(tmp_path / "x.zarr", sample=6, seed=seed)

            assert [str(fault) for fault in found.faults] == []
            assert found.complete


class TestFaults:
    @pytest.mark.parametrize("what", FAULTS)
    def test_it_is_named_and_repaired_and_nothing_else_is_written(
        self, what: str, finished: Path, store: Path
    ) -> None:
        """
        Each fault is found by kind and chunk; a repair brings the same bits back, and writes only
        what hangs together with the fault.
        """
        damage, expected, rewritten = FAULTS[what]
        before = files(store)
        damage(store)

        found = look(store, repair=True)

        assert verdict(found) == expected
        assert all(fault.checkpoint == LAST_IN_WORDS for fault in found.faults if fault.place)
        assert found.repaired
        assert found.complete
        assert_same_bits(finished, store)
        after = files(store)
        changed = {key for key in after if after[key] != before[key]}
        assert {key for key in changed if key.split("/")[0] not in METRICS} == rewritten

    def test_a_checkpoint_whose_signs_are_turned(self, store: Path) -> None:
        """
        Sums of signs that agree with one another, and count the right pairs, but are not those of
        the gradients: found in the part that is looked at pair by pair.
        """
        group = zarr.open_group(str(store), mode="r+", use_consolidated=False)
        for name in ("class_sums", "distance_sums"):
            values = group[name][PLACE]  # type: ignore[index]
            values[..., 1] *= -1  # type: ignore[operator,index,call-overload]
            group[name][PLACE] = values  # type: ignore[index]

        found = look(store)

        assert {fault.kind for fault in found.faults} == {"differs"}
        assert len({fault.chunk.split("/")[5] for fault in found.faults}) == 1  # one part
        assert all("signs" in fault.sentence for fault in found.faults)

    @pytest.mark.parametrize(
        ("name", "less", "words"),
        [("weighted_sums", 0.5, "norms"), ("square_sums", (0.2, 0), "a pair, of squares"),
         ("square_sums", (0, 0.2), "squared norms")],
    )  # fmt: skip
    def test_a_checkpoint_whose_sums_for_kernels_are_others(
        self, name: str, less: object, words: str, store: Path
    ) -> None:
        """
        They agree with one another, but are not those of the gradients: found in the part that is
        looked at pair by pair.
        """
        group = zarr.open_group(str(store), mode="r+", use_consolidated=False)
        values = group[name][PLACE]  # type: ignore[index]
        if name == "square_sums":  # nearer to the number of pairs, which they do not exceed
            most = group["class_sums"][PLACE][..., 2].sum(-1)[..., None]  # type: ignore[index,union-attr,call-overload]
            values = values + less * np.where([True, False], most - values, values)  # type: ignore[operator]
        else:
            values = values * less  # type: ignore[operator]
        group[name][PLACE] = values  # type: ignore[index]

        found = look(store)

        assert {(fault.kind, fault.array) for fault in found.faults} == {("differs", name)}
        assert len({fault.chunk.split("/")[5] for fault in found.faults}) == 1  # one part
        assert all(words in fault.sentence for fault in found.faults)

    def test_a_run_that_meets_a_damaged_chunk_names_it(self, store: Path) -> None:
        """
        The check reads all counts: one that cannot be read ends the run with its name, and what
        to do.
        """
        flip(near_zero(0, 1))(store)
        for name in ("undecided", "error_bound"):
            remove(f"{name}/c/{LAST}")(store)

        with pytest.raises(StoreError, match=rf"{near_zero(0, 1)}.*verify --repair"):
            run_study(study(), run_options(store))

    def test_leftovers_of_a_dead_writer(self, store: Path) -> None:
        """
        A half-written file in a finished store is named and removed.
        """
        leftover = store / f"class_sums/c/{LAST}/0/0/0/0/.0.0123.partial"
        leftover.write_bytes(b"half")

        found = look(store, repair=True)

        assert verdict(found) == {("leftover", str(leftover))}
        assert found.repaired
        assert not leftover.exists()

    def test_holes_of_a_store_that_is_not_finished(self, finished: Path, store: Path) -> None:
        """
        What no run has come to is no fault; sums by distance without those by class are none; the
        other way round nobody would fill the hole.
        """
        metadata = json.loads((store / "zarr.json").read_text())
        del metadata["attributes"]["finished"]
        (store / "zarr.json").write_text(json.dumps(metadata))
        for key in (by_class(0, 1), near_zero(0, 1), f"undecided/c/{LAST}"):
            remove(key)(store)

        between = look(store)

        assert between.is_well
        assert not between.complete
        counts = "1 of class_sums, 1 of near_zero, 1 of undecided"
        assert between.notes == (f"{LAST_IN_WORDS}: chunks not computed yet: {counts}",)

        remove(by_distance(1, 2))(store)
        found = look(store, repair=True)

        assert verdict(found) == {("missing", by_distance(1, 2))}
        assert found.repaired
        run_study(study(), run_options(store))
        assert_same_bits(finished, store)

    def test_without_data_all_else_is_done(
        self, store: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        Without data nothing is computed again, but counts are those of the store's own labels.
        """
        from distributed_stiffness.errors import DataError
        from distributed_stiffness.verify import run

        def nowhere(*_: object, **__: object) -> None:
            raise DataError("digits are not to be had")

        monkeypatch.setattr(run, "select", nowhere)
        assert not look(store).faults
        put("class_sums", (*PLACE, 1, 3, 0, 4, 3), 19)(store)

        assert verdict(look(store)) == {("inconsistent", by_class(0, 1))}
        put("weighted_sums", (*PLACE, 2, slice(20, 40)), 0.0)(store)  # type: ignore[arg-type]

        faults = {("inconsistent", by_class(0, 1)), ("inconsistent", weighted(1, 2))}
        assert verdict(look(store)) == faults


class TestWholeMatrixCheck:
    """Of stores of either kind: what the attribute says is looked at too."""

    @pytest.mark.parametrize(
        ("said", "kind", "sentence"),
        [
            (None, "missing", "is not there"),
            ({"classes": 10}, "inconsistent", "expected a checkpoint"),
            ({"iteration": 0}, "inconsistent", "expected the last checkpoint"),
            ({"classes": 11}, "inconsistent", "11 classes of 10"),
            ({"largest_difference": 0.01}, "inconsistent", "does not allow"),
        ],
    )
    def test_it_is_that_of_the_last_checkpoint_and_within_the_bound(
        self, said: dict[str, float] | None, kind: str, sentence: str, finished: Path, store: Path
    ) -> None:
        """
        Missing, of another checkpoint, or wider than the bound allows: a repair checks again.
        """
        metadata = json.loads((store / "zarr.json").read_text())
        right = json.loads(metadata["attributes"].pop("whole_matrix_check"))
        if said is not None:
            whole = right if (len(said) == 1 and "classes" not in said) or "11" in sentence else {}
            metadata["attributes"]["whole_matrix_check"] = whole | said
        (store / "zarr.json").write_text(json.dumps(metadata))

        found = look(store, repair=True)

        assert verdict(found) == {(kind, "zarr.json")}
        assert sentence in found.faults[0].sentence
        assert found.repaired
        assert Store(store).attrs["whole_matrix_check"] == right
        assert_same_bits(finished, store)


def of_pairs(labels: Labels, cosine: np.ndarray, norms: np.ndarray, columns: slice) -> Sums:
    """What kernels need of a tile (i, j), from its pairs and the norms of its columns."""
    weighted = np.zeros((len(cosine), labels.n_splits, labels.n_classes))
    squares = np.zeros((len(cosine), labels.n_splits, 2))
    for k, j in enumerate(range(columns.start, columns.stop)):
        products = cosine[:, k] * norms[k]
        weighted[:, labels.splits[j], labels.classes[j]] += products
        squares[:, labels.splits[j]] += np.stack([cosine[:, k] ** 2, products**2], axis=1)
    nothing = np.zeros(0)
    return Sums(nothing, nothing, weighted, squares, nothing)


class TestNumbers:
    """What no store of these tests holds."""

    def test_sums_that_float32_rounded(self) -> None:
        """
        Cosines of 1.0000001 are right, those of 1.1 are not.
        """
        one = np.array([[[[1 + 1e-7, 1, 1, 1]]]])

        assert wrong_sums(one, 0, tolerance=1e-5) is None
        assert wrong_sums(one * [1.1, 1, 1, 1], 0, tolerance=1e-5)

    def test_counts_that_no_sums_have(self) -> None:
        """
        Two pairs that help and one that harms: three pairs, not four, and not all below 1/8.
        """
        sums = np.zeros((1, 1, 1, 4))
        sums[0, 0, 0] = 1.1, 1, 3, 3
        counts = np.zeros(len(EXPONENTS), dtype=np.int64)
        counts[-2:] = 1, 3
        options = {"diagonal": False, "below": False, "tolerance": 1e-5}

        assert wrong_near_zero(counts, sums, **options) is None  # type: ignore[arg-type]
        assert wrong_near_zero(counts + (counts == 3), sums, **options)  # type: ignore[arg-type]
        assert wrong_near_zero(3 * (EXPONENTS >= -3), sums, **options)  # type: ignore[arg-type]

    @pytest.mark.parametrize("size", [1.0, 1e-140, 1e-300])
    def test_both_sides_of_a_tile_hold_the_same_products(self, size: float) -> None:
        """
        Whatever the size of gradients; norms that are a little off are let pass, others are not.
        """
        random = np.random.default_rng(0)
        labels = Labels(np.arange(12) % 3, np.arange(12) // 6, 3, 2)
        rows, columns, cosine = slice(0, 5), slice(5, 12), random.uniform(-1, 1, (5, 7))
        norms = size * np.exp(random.standard_normal(12))
        tile, mirror = (
            of_pairs(labels, c, norms[part], part)
            for c, part in ((cosine, columns), (cosine.T, rows))
        )
        nearly, others = norms * random.uniform(0.99, 1.01, 12), random.permutation(norms)

        for same in (norms, nearly):
            assert asymmetry_of_weighted(tile, mirror, rows, columns, labels, same) is None
            assert asymmetry_of_squares(tile, mirror, rows, columns, labels, same) is None
        assert asymmetry_of_weighted(tile, mirror, rows, columns, labels, others)
        # Squares of norms below 1e-150 are nothing that float64 can say.
        found = asymmetry_of_squares(tile, mirror, rows, columns, labels, others)
        assert (found is not None) == (size > 1e-150)

    @pytest.mark.parametrize(
        ("turned", "nearly", "is_wrong"),
        [(1, True, False), (1, False, True), (0, False, False)],
    )
    def test_signs_of_pairs_near_zero_may_be_turned(
        self, turned: int, nearly: bool, is_wrong: bool
    ) -> None:
        """
        A sign that float32 cannot tell may be either, one that it can may not.
        """
        labels = Labels(np.zeros(12, dtype=np.int64), np.zeros(12, dtype=np.int64), 1, 1)
        rows = Rows(labels, slice(4, 12), np.arange(3))
        cosines = np.full((3, 8), 0.5)
        cosines[:, 0] = 1e-7 if nearly else 0.5
        distances, edges = np.full((3, 8), 0.25), np.array([0.0, 0.5, 1.0])
        by_class = np.zeros((3, 1, 1, 4))
        by_class[:] = np.stack([cosines.sum(1), np.full(3, 8.0 - 2 * turned), *[np.full(3, 8)] * 2],
                               axis=1)[:, None, None]  # fmt: skip
        by_distance = np.zeros((3, 1, 2, 2, 4))
        by_distance[:, :, 0, 0] = by_class[:, :, 0]

        of_class, of_distance = wrong_rows(
            by_class, by_distance, rows, cosines=cosines, distances=distances, edges=edges,
            bound=1e-6,
        )  # fmt: skip

        assert (of_class is not None) == is_wrong
        assert of_distance is None
