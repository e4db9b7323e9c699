"""Which checkpoint is which: numbers in names, brackets in folders, tables of spreadsheets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributed_stiffness.errors import CheckpointError
from distributed_stiffness.importing.files import find
from distributed_stiffness.importing.numerals import real, whole
from distributed_stiffness.importing.places import Place, placed
from distributed_stiffness.importing.table import from_table


@pytest.fixture(autouse=True)
def _in_an_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def touch(*paths: str) -> None:
    """Make empty files."""
    for path in paths:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).touch()


class TestNames:
    @pytest.mark.parametrize(
        ("name", "rate", "iteration"),
        [
            ("lr=1.e-3_step=5.pt", 1e-3, 5),
            ("lr=1._step=5.pt", 1.0, 5),
            ("lr=.001/step5.pt", 1e-3, 5),
            ("lr=1E-03/step5.pt", 1e-3, 5),
            ("lr1e-3-step5.pt", 1e-3, 5),
            ("lr_1e-3./step5.", 1e-3, 5),
            ("lr5e-5.step5.pt", 5e-5, 5),
            ("lr0,001_step5.pt", 1e-3, 5),
            ("lr=0,5e-3/step5.pt", 5e-4, 5),
            ("lr=+0.1/step5.pt", 0.1, 5),
            ("lr==0.1/step__5.pt", 0.1, 5),
            ("lr(0.1)/step (5).pt", 0.1, 5),
            ("lr: 0.1, step: 5.pt", 0.1, 5),
            ("lr=0.1,seed=0,step=5.pt", 0.1, 5),
            ("lr-0.001/step-5.pt", 1e-3, 5),
            ("learning-rate=0.1/step5.pt", 0.1, 5),
            ("initial_lr=0.1/step5.pt", 0.1, 5),
            ("lr=0.0100_2021-01-01_00-00-00/checkpoint_000010", 0.01, 10),
            ("lr1e3/step1e5.pt", 1e3, 100_000),
            ("step_1,000.pt", 0.0, 1000),
            ("step_1,000,000.pt", 0.0, 1_000_000),
            ("step_1'000.pt", 0.0, 1000),
            ("step=5.0.pt", 0.0, 5),
            ("ckpt.5000.pt", 0.0, 5000),
            ("iter_0000500.pt", 0.0, 500),
            ("epoch=1-step=20-v1.ckpt", 0.0, 20),
            ("epoch_12_0.85.pth", 0.0, 12),
            ("step_10_of_20.pt", 0.0, 10),
            ("checkpoint_3f9ab2.pt", 0.0, 0),  # a hash
            ("checkpoint_2024-05-01.pt", 0.0, 0),  # a day
            ("timestep_100.pt", 0.0, 0),  # of something else
            ("lr=auto/step5.pt", 0.0, 5),
        ],
    )
    def test_numbers_as_people_write_them(self, name: str, rate: float, iteration: int) -> None:
        """
        With or without digits before and after the point, exponents, commas in thousands.
        """
        assert placed([name]) == {Place(rate, 0, iteration): name}

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("step_1_000.pt", "'1_000' for the iteration: may be 1 or 1000"),
            ("step_1_000_000.pt", "'1_000_000' for the iteration: may be 1 or 1000000"),
            ("step 1 000.pt", "'1 000' for the iteration: may be 1 or 1000"),
            ("epoch_5_256.pth", "'5_256' for the iteration: may be 5 or 5256"),
            ("seed_1_000/step5.pt", "'1_000' for the seed: may be 1 or 1000"),
            ("step=1.5.pt", r"'1\.5' for the iteration: expected a whole number"),
            ("step_1.000.pt", r"'1\.000' for the iteration"),
            ("step1e-3.pt", "'1e-3' for the iteration"),
            ("step100k.pt", "'100k' for the iteration"),
            ("step=-5.pt", "'-5' for the iteration"),
            ("ckpt-1.5B.pt", r"'1\.5B' for the iteration"),
            ("lr=1,000/step5.pt", "'1,000' for the learning rate: expected a number such as"),
            ("lr=1,5/step5.pt", "'1,5' for the learning rate"),
            ("lr=0.1.2/step5.pt", r"'0\.1\.2' for the learning rate"),
            ("lr=1e-3.5/step5.pt", r"'1e-3\.5' for the learning rate"),
            ("lr=[0.1,0.2]/step5.pt", r"'0\.1,0\.2' for the learning rate"),
            ("lr0p001/step5.pt", "'0p001' for the learning rate"),
            ("lr0.1seed3step5.pt", r"'0\.1seed3step5' for the learning rate"),
            ("lr%3D0.1/step5.pt", r"'3D0\.1' for the learning rate"),
            ("lr=-0.001/step5.pt", r"'-0\.001' for the learning rate"),
            ("lr_0_001/step5.pt", "'0_001' for the learning rate"),
            ("lr1-5/step5.pt", "'1-5' for the learning rate"),
            ("lr0/step5.pt", "says 0 for the learning rate, and 0 stands for 'not given'"),
            ("lr0=0.01/step5.pt", "says 0 for the learning rate"),
            ("baselr0.1/step5.pt", r"baselr0\.1, which may be another quantity"),
            ("min_lr=0.1/step5.pt", r"min_lr=0\.1, which may be another quantity"),
            ("warmup_steps=100.pt", "warmup_steps=100, which may be another quantity"),
            ("num_epochs=100.pt", "num_epochs=100, which may be another quantity"),
            ("lr_step=30.pt", "lr_step=30, which may be another quantity"),
            ("step_lr_5.pt", "step_lr_5, which may be another quantity"),
            ("epoch=2-val_step=12.ckpt", "val_step=12, which may be another quantity"),
            ("head_lr0.1/step5.pt", r"head_lr0\.1, which may be another quantity"),
            ("data_seed1/step5.pt", "data_seed1, which may be another quantity"),
            ("lr=10^-3_step5.pt", "'10' for the learning rate"),
            ("lr=5%_step5.pt", "'5' for the learning rate"),
            ("lr_−3_step5.pt", "'-3' for the learning rate"),
            ("lr-3/step5.pt", "'-3' for the learning rate"),
            ("lr_001/step5.pt", "'001' for the learning rate"),
            ("lr=1,e-3/step5.pt", "'1,e-3' for the learning rate"),
            ("lr0.1-0.01/step5.pt", r"'0\.1-0' for the learning rate"),
            ("lr1e-4_1e-3/step5.pt", "'1e-4_1' for the learning rate"),
            ("step--5.pt", "'-5' for the iteration"),
            ("step=5².pt", "'5' for the iteration"),
            ("step=5;6.pt", "'5' for the iteration"),
            ("step_12345_67890.pt", "'12345_67890' for the iteration"),
            ("seed1-3/step5.pt", "'1-3' for the seed"),
            ("checkpoint_20240105.pt", "'20240105' for the iteration"),
        ],
    )
    def test_a_number_that_could_be_another_is_refused_by_it(self, name: str, said: str) -> None:
        """
        Never another number, and never "not given" beside a number: the sentence names it.
        """
        with pytest.raises(CheckpointError, match=rf"{said}.*--pattern, or give a --table"):
            placed([name])

    @given(st.floats(1e-12, 1e6), st.sampled_from("eEfgG"), st.integers(0, 8))
    def test_every_rate_that_python_prints(self, rate: float, kind: str, digits: int) -> None:
        """
        Whatever format a script used, the number that stands there is read, or 0 is refused.
        """
        text = f"{rate:.{digits}{kind}}"

        if float(text) == 0:
            with pytest.raises(CheckpointError, match="0 stands for 'not given'"):
                placed([f"lr{text}/step5.pt"])
        else:
            assert placed([f"lr{text}/step5.pt"]) == {
                Place(float(text), 0, 5): f"lr{text}/step5.pt"
            }

    @given(st.integers(0, 2**63 - 1))
    def test_every_step_that_python_prints(self, step: int) -> None:
        """
        Plain, padded or with commas, to the last digit; with underscores as it is, or refused.
        """
        for text in (f"{step}", f"{step:012d}", f"{step:,}"):
            (place,) = placed([f"step-{text}.pt"])
            assert place.iteration == step
        try:
            (place,) = placed([f"step-{step:_}.pt"])
        except CheckpointError:
            assert step >= 1000
        else:
            assert place.iteration == step

    @pytest.mark.parametrize("name", ["lr=1e400/step5.pt", f"step{10**20}.pt"])
    def test_numbers_that_no_run_has(self, name: str) -> None:
        """
        They are refused, and do not overflow.
        """
        with pytest.raises(CheckpointError, match=r"expected a (whole )?number.*, 0 or more"):
            placed([name])

    def test_numbers_alone(self) -> None:
        """
        What is a learning rate, and what a whole number.
        """
        assert [real(t) for t in ("0.1", "1.e-3", "0,1", "1,1", "x", "")] == [
            0.1, 1e-3, 0.1, None, None, None,
        ]  # fmt: skip
        assert [whole(t) for t in ("007", "1,000", "10,00", "5.0", "1.000", "1e3", "-1")] == [
            7, 1000, None, 5, None, 1000, None,
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("pattern", "path", "place"),
        [
            ("*{step}", "step100.pt", (0.0, 0, 100)),
            ("*{lr}/step-{step}", "x-1e-3/step-5", (1e-3, 0, 5)),
            ("*{lr}/step-{step}", "x0.001/step-5", (1e-3, 0, 5)),
            ("*-{lr}", "run-1e-3", (1e-3, 0, 0)),
            ("step_{step}", "step_1_000.pt", (0.0, 0, 1000)),
            ("step_{step}_*", "step_1_000.pt", (0.0, 0, 1)),
            ("run{seed}_{step}", "run1_000.pt", (0.0, 1, 0)),
            ("lr{lr}", "lr1.e-3.pt", (1e-3, 0, 0)),
        ],
    )
    def test_a_pattern_takes_whole_numbers(
        self, pattern: str, path: str, place: tuple[float, int, int]
    ) -> None:
        """
        A * takes no digit of a number beside it, and braces take all.
        """
        assert placed([path], pattern) == {Place(*place): path}

    @pytest.mark.parametrize(
        ("pattern", "path"),
        [
            ("step-{step}", "step-1.5.pt"),
            ("step{step}*", "step1e5.pt"),
            ("lr{lr}", "lr1,5"),
            ("{seed}*{step}", "12.pt"),
            ("{seed}{step}", "12.pt"),
            ("*{lr}/{step}", "10^-3/5.pt"),
            ("*_{step}", "step_100_000.pt"),
        ],
    )
    def test_a_pattern_takes_no_part_of_a_number(self, pattern: str, path: str) -> None:
        """
        It does not fit, rather.
        """
        with pytest.raises(CheckpointError, match=r"does not end like|nothing between|or with"):
            placed([path], pattern)

    def test_a_pattern_that_fits_in_two_ways(self) -> None:
        """
        A number in groups and the next one: both readings are said.
        """
        with pytest.raises(CheckpointError, match="with 1_500 and 200, or with 1 and 500_200"):
            placed(["m_1_500_200.pt"], "m_{seed}_{step}")
        assert placed(["m_1_500.pt"], "m_{seed}_{step}") == {Place(0.0, 1, 500): "m_1_500.pt"}

    @pytest.mark.parametrize(
        "name",
        [
            *("run_step5.pt", "train_step5.pt", "step_5_20240105.pt", "epoch_5_0.93.pt"),
            *("step_5.ema.pt", "encoder_epoch_5.pth", "step5-2024-01-01_12-30.pt"),
            *("step=5-00001-of-00002.safetensors", "step_5_1700000000.pt"),
        ],
    )
    def test_what_stands_beside_a_number(self, name: str) -> None:
        """
        A name, a day and a score are no second step.
        """
        assert placed([name]) == {Place(iteration=5): name}


class TestFiles:
    @pytest.fixture(autouse=True)
    def _files(self) -> None:
        touch("run[1]/step1.pt", "run[1]/step2.pt", "only[2]/step1.pt", "only[2]/step2.pt")
        touch("run1/step1.pt", "a[b]c/d[e]/step1.pt", "lr=0.1,seed=[1,2]/step-3.pt", "a.pt")

    @pytest.mark.parametrize(
        ("pattern", "expected"),
        [
            ("run[1]/step1.pt", ["run[1]/step1.pt"]),
            (Path("run[1]/step1.pt"), ["run[1]/step1.pt"]),
            ("only[2]/*.pt", ["only[2]/step1.pt", "only[2]/step2.pt"]),
            ("only[2]/step[12].pt", ["only[2]/step1.pt", "only[2]/step2.pt"]),
            ("run[12]/step1.pt", ["run1/step1.pt"]),
            ("run[[]1]/*.pt", ["run[1]/step1.pt", "run[1]/step2.pt"]),
            ("a[b]c/d[e]/*", ["a[b]c/d[e]/step1.pt"]),
            ("lr=0.1,seed=[1,2]/*", ["lr=0.1,seed=[1,2]/step-3.pt"]),
            (["a.pt", Path("a.pt"), "run1/*"], ["a.pt", "run1/step1.pt"]),
            (np.array(["a.pt"]), ["a.pt"]),
            ((p for p in ["a.pt"]), ["a.pt"]),
        ],
    )
    def test_brackets(self, pattern: Any, expected: list[str]) -> None:
        """
        A path that is there is that file; else brackets are what matches.
        """
        assert find(pattern) == expected

    def test_two_readings(self) -> None:
        """
        Where both match, nothing is guessed.
        """
        with pytest.raises(CheckpointError, match=r"run1/step1\.pt and run\[1\]/step1\.pt"):
            find("run[1]/*.pt")

    def test_from_within(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """
        The folder that one works in may have brackets too.
        """
        here = Path.cwd()
        monkeypatch.chdir("run[1]")

        assert find("step*.pt") == ["step1.pt", "step2.pt"]
        assert find(f"{here}/only[2]/*2.pt") == [f"{here}/only[2]/step2.pt"]
        assert find(f"file://{here}/a.pt") == [f"{here}/a.pt"]

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ("none[1]/*.pt", r"no file matches 'none\[1\]/\*\.pt'"),
            ([], "list of checkpoints is empty"),
            ([None], "a checkpoint is None: expected a path"),
            (5, "checkpoints is a int: expected a path, a pattern"),
            ({"w": 1}, "is a dict: .*what lies in memory has to be saved first"),
        ],
    )
    def test_what_is_no_file(self, given: Any, said: str) -> None:
        """
        Is said.
        """
        with pytest.raises(CheckpointError, match=said):
            find(given)

    def test_in_a_bucket(self, bucket: str) -> None:
        """
        The same there: brackets of names, tables beside what they list.
        """
        import fsspec

        for name in ("run[1]/step1.pt", "run[1]/step2.pt", "plain/step1.pt"):
            with fsspec.open(f"{bucket}/{name}", "wb") as file:
                file.write(b"x")
        with fsspec.open(f"{bucket}/run[1]/t.csv", "wb") as file:
            file.write(b"path;lr\nstep1.pt;0,1\n")

        one = f"{bucket}/run[1]/step1.pt"
        assert find(one) == [one]
        assert find(f"{bucket}/plain/*.pt") == [f"{bucket}/plain/step1.pt"]
        assert from_table(f"{bucket}/run[1]/t.csv") == {Place(0.1): one}


class TestTables:
    @pytest.fixture(autouse=True)
    def _files(self) -> None:
        touch("a.pt", "b.pt", "run:1/a.pt", "run[1]/a.pt", "größe/a.pt")

    @pytest.mark.parametrize(
        "content",
        [
            b"path,learning_rate,seed,iteration\na.pt,0.1,0,5\nb.pt,0.01,0,1000\n",
            "\ufeffpath,lr,step\r\na.pt,0.1,5\r\nb.pt,0.01,1000\r\n".encode(),
            b"path;learning_rate;iteration\r\na.pt;0,1;5\r\nb.pt;0,01;1000\r\n;;\r\n\r\n",
            b"sep=;\r\npath;lr;step\r\na.pt;0,1;5\r\nb.pt;0,01;1000\r\n",
            b"path\tLearning Rate\tStep\na.pt\t1E-01\t5.0\nb.pt\t1.e-2\t1000.0\n",
            "path\tlr\tstep\r\na.pt\t0,1\t5\r\nb.pt\t0,01\t1,000\r\n".encode("utf-16"),
            b'\n\nPath , LR, Step\n a.pt , 0.1, 5\n\n b.pt, 0.01, "1,000"\n,,\n',
            b"path,lr,step\ra.pt,0.1,5\rb.pt,0.01,1000\r",
            b'path,lr,step,note\na.pt,"0,1",5,"x; y"\nb.pt,"0,01",1_000,\n',
        ],
    )
    def test_as_spreadsheets_write_them(self, content: bytes) -> None:
        """
        Byte order marks, semicolons with decimal commas, tabs, rows of nothing.
        """
        Path("t.csv").write_bytes(content)

        assert from_table("t.csv") == {Place(0.1, 0, 5): "a.pt", Place(0.01, 0, 1000): "b.pt"}

    @pytest.mark.parametrize(
        ("row", "path"),
        [
            (b"run:1/a.pt,0.1", "run:1/a.pt"),
            (b"run[1]/a.pt,0.1", "run[1]/a.pt"),
            ("größe/a.pt,0.1".encode(), "größe/a.pt"),
            ("größe/a.pt,0.1".encode("cp1252"), "größe/a.pt"),
        ],
    )
    def test_paths_in_tables(self, row: bytes, path: str) -> None:
        """
        Colons, brackets and letters of older encodings.
        """
        Path("t.csv").write_bytes(b"path,lr\n" + row + b"\n")

        assert from_table("t.csv") == {Place(0.1): path}

    def test_paths_lie_beside_the_table(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """
        Wherever the table is named from; homes and absolute paths are what they are.
        """
        here = Path.cwd()
        monkeypatch.setenv("HOME", str(here))
        touch("deep/x.pt")
        Path("deep/t.csv").write_text(f"path,lr\nx.pt,0.1\n~/a.pt,0.2\n{here}/b.pt,0.3\n")
        expected = {Place(0.2): f"{here}/a.pt", Place(0.3): f"{here}/b.pt"}

        assert from_table("deep/t.csv") == {Place(0.1): "deep/x.pt"} | expected
        assert from_table("~/deep/t.csv") == {Place(0.1): f"{here}/deep/x.pt"} | expected

    @pytest.mark.parametrize(
        "change",
        [
            lambda df: df,
            lambda df: df.astype({"learning_rate": "float32"}),
            lambda df: df.assign(seed=[0, np.nan]),
            lambda df: df.assign(seed=pd.array([0, None], dtype="Int64")),
            lambda df: df.assign(seed=["", None]),
            lambda df: df.assign(path=[Path("a.pt"), Path("b.pt")]),
            lambda df: df.set_index("path"),
            lambda df: df.set_index(["path", "iteration"]),
            lambda df: df.to_dict("list"),
            lambda df: df.to_dict("records"),
            lambda df: iter(df.to_dict("records")),
        ],
    )
    def test_tables_in_memory(self, change: Any) -> None:
        """
        A DataFrame with whole numbers, numbers with a point and gaps; rows, or columns by name.
        """
        table = pd.DataFrame(
            {"path": ["a.pt", "b.pt"], "learning_rate": [0.1, 0.01], "iteration": [5, 1000]}
        )

        assert from_table(change(table)) == {
            Place(0.1, 0, 5): "a.pt",
            Place(0.01, 0, 1000): "b.pt",
        }

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"", "has no rows: expected a CSV file"),
            (b"path,lr\n", "has no rows"),
            (b"a.pt,0.1\n", "has no column path, but a.pt, 0.1"),
            (b'[{"path": "a.pt"}]', "has no column path"),
            (b"path,lr,seed\na.pt,0,001,3\n", r"row 1 of t\.csv has 4 cells, its header 3.*comma"),
            (b"path,lr,seed\na.pt,0.1\n", r"row 1 of t\.csv has 2 cells.*it has no seed"),
            (b"path,lr,seed\na.pt,0,001\n", "a learning rate of 0, which stands for 'not given'"),
            (b"path,step\na.pt,5\na.pt,\n", "row 2 of t.csv has no iteration, and others have one"),
            (b"path,lr,lr\na.pt,1,2\n", "has the column lr twice"),
            (b"path,epoch,step\na.pt,1,2\n", "gives the iteration twice"),
            (b"path;step\na.pt;1.000\n", r"'1\.000' for the iteration"),
            (b"path;lr\na.pt;1,5\n", "'1,5' for the learning rate: expected a number such as"),
            (b"path,lr\na.pt,10%\n", "'10%' for the learning rate"),
            (b"path,lr\na.pt,nan\n", "'nan' for the learning rate"),
            (b"path,seed\na.pt,9999999999999999999999\n", "for the seed: expected a whole"),
            (b"PK\x03\x04", "is a workbook of a spreadsheet: save it there as CSV"),
            (b"path\n\0\n", "is no text"),
            (b"path,lr\nnone.pt,1\n", "row 1 of t.csv: there is no file none.pt"),
        ],
    )
    def test_tables_that_cannot_be_read(self, content: bytes, said: str) -> None:
        """
        The row and the cell are named.
        """
        Path("t.csv").write_bytes(content)

        with pytest.raises(CheckpointError, match=said):
            from_table("t.csv")

    @pytest.mark.parametrize(
        ("table", "said"),
        [
            (5, "the table is a int: expected a CSV file, or rows"),
            ([("a.pt", 1)], "row 1 of the table is a tuple: expected a mapping"),
            ({"path": ["a.pt", "b.pt"], "lr": [1]}, "columns of lengths"),
            ({"path": ["a.pt"], "lr": 1}, "a column that is no list"),
            ([{"path": 3}], "has 3 for the path: expected text"),
            (pd.DataFrame({"file": ["a.pt"]}), "has no column path, but file"),
            (pd.DataFrame({"path": ["a.pt"], "seed": [True]}), "'True' for the seed"),
            ("none.csv", r"cannot read the table none\.csv"),
            (Path(), r"cannot read the table \."),
        ],
    )
    def test_what_is_no_table(self, table: Any, said: str) -> None:
        """
        Is refused by what it is.
        """
        with pytest.raises(CheckpointError, match=said):
            from_table(table)


def test_large_seeds_keep_every_digit() -> None:
    """
    Whole numbers are not read by way of a float, which has 53 bits.
    """
    touch("a.pt")
    seed = 2**53 + 1

    assert placed([f"seed={seed}/step-1.pt"]) == {Place(0.0, seed, 1): f"seed={seed}/step-1.pt"}
    assert from_table([{"path": "a.pt", "seed": seed}]) == {Place(0.0, seed): "a.pt"}
