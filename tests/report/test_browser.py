"""The report as people use it, in a real browser: pointed at, moved, copied, without a network."""

from __future__ import annotations

import base64
import csv
import io
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import xarray as xr
from report.browser import CHROMIUM, DRIVER, browser, complaints, requests
from studies import run_options, tiny_study

from distributed_stiffness.analysis import Summary, summary
from distributed_stiffness.engine import run_study
from distributed_stiffness.figures import VIEWS, save
from distributed_stiffness.figures.checkpoints import of_seed
from distributed_stiffness.report import write_report
from distributed_stiffness.study import Training

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="there is no Chromium with its chromedriver here"
)

SAID = re.compile(r"(.*) – (.*): (\S+) ± (\S+)(?: \(± (\S+)\))?, ([\d,]+) pairs?")
NAMES = {"sign": "pairs", "cosine": "cosine_pairs"}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of digits that was trained and computed: two rates, two seeds, three steps."""
    store = tmp_path_factory.mktemp("browser") / "tiny.zarr"
    training = Training(learning_rates=(1e-3, 1e-2), seeds=(0, 1), iterations=(0, 30, 60))
    run_study(tiny_study(training=training), run_options(store))
    return store


@pytest.fixture(scope="module")
def numbers(study: Path) -> Summary:
    return summary(xr.open_zarr(study))


@pytest.fixture(scope="module")
def report(study: Path, numbers: Summary) -> Path:
    view = VIEWS["stiffness_curves"]
    figures = {view.name: save(view.draw(numbers), study.parent / "curves.png")}
    return write_report(numbers, figures, study.parent / "report.html", store=str(study))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with browser(tmp_path_factory.mktemp("profile")) as driver:
        driver.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})
        # A network that is not there, for whoever would ask for it.
        driver.get("about:blank")  # in place of the browser's own page, which asks for its parts
        requests(driver)
        driver.execute_cdp_cmd("Network.enable", {})
        offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
        yield driver


@pytest.fixture
def page(chromium: Any, report: Path) -> Iterator[Any]:
    """The report, just opened; afterwards nothing was asked for but itself, and no error came."""
    chromium.get(report.as_uri())
    yield chromium
    assert {url.partition(",")[0] for url in requests(chromium)} <= {
        report.as_uri(),
        "data:image/png;base64",
    }
    assert complaints(chromium) == []


def text(page: Any, element: str) -> str:
    return str(page.find_element("id", element).text)


def number(said: str) -> float:
    return float(said.replace("−", "-"))


def point(page: Any, right: float, down: float) -> None:
    """Move the pointer to a place on the heat map, as shares of its width and height."""
    from selenium.webdriver.common.action_chains import ActionChains

    canvas = page.find_element("id", "heatmap")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    size = canvas.size
    x, y = (right - 0.5) * size["width"], (down - 0.5) * size["height"]
    ActionChains(page, duration=0).move_to_element_with_offset(canvas, round(x), round(y)).perform()


def press(page: Any, element: str, *keys: str) -> None:
    page.find_element("id", element).send_keys(*keys)


def assert_says_of_the_store(said: str, numbers: Summary, measure: str, **where: Any) -> None:
    """What is said of a pair of classes is what the store has, up to the digits that are said."""
    first, second, mean, error, over_seeds, pairs = SAID.fullmatch(said).groups()
    seed = where.pop("seed")
    at = of_seed(numbers.class_matrix, seed).sel(where | {"class_name": first})
    at = at.sel(other_class_name=second)
    last = 10.0 ** -len(mean.partition(".")[2])
    assert abs(number(mean) - float(at[measure])) < 0.52 * last
    assert abs(number(error) - float(at[f"{measure}_error"])) < 0.52 * last
    assert int(pairs.replace(",", "")) == int(at[NAMES[measure]])
    if seed is None:
        assert abs(number(over_seeds) - float(at[f"{measure}_seed_error"])) < 0.52 * last
    else:
        assert over_seeds is None


@pytest.fixture
def phone(page: Any) -> Iterator[Any]:
    """The page on a screen 400 pixels wide."""
    screen = {"width": 400, "height": 850, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    page.refresh()
    yield page
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


class TestPointer:
    def test_names_the_pair(self, page: Any, numbers: Summary):
        """Wherever the pointer is on the matrix, the pair is named, with the store's numbers."""
        last = {"learning_rate": 1e-3, "seed": None, "iteration": 60}
        said = set()
        for right, down in ((0.3, 0.2), (0.5, 0.2), (0.5, 0.5), (0.62, 0.7), (0.4, 0.6)):
            point(page, right, down)
            said.add(text(page, "pair"))
            assert_says_of_the_store(text(page, "pair"), numbers, "sign", **last)
        assert len(said) == 5

    def test_colour_under_the_pointer(self, phone: Any, numbers: Summary):
        """The colour under the pointer is that of the mean that is said, on a narrow screen too."""
        limit = max(1.0, float(np.abs(numbers.class_matrix["sign"]).max()))
        places = [(0.31, 0.21), (0.52, 0.33), (0.71, 0.43)]
        colours = phone.execute_script(
            """const canvas = document.getElementById("heatmap"), { width, height } = canvas;
            const pixels = canvas.getContext("2d").getImageData(0, 0, width, height).data;
            return arguments[0].map(([right, down]) => {
                const at = 4 * (Math.round(down * height) * width + Math.round(right * width));
                return [...pixels.slice(at, at + 3)];
            });""",
            places,
        )
        for (right, down), colour in zip(places, colours, strict=True):
            point(phone, right, down)
            mean = number(SAID.fullmatch(text(phone, "pair"))[3])
            place = (np.array([mean - 0.006, mean + 0.006]) + limit) / (2 * limit)
            near = matplotlib.colormaps["RdBu_r"](place, bytes=True)[:, :3].astype(int)
            low, high = near.min(0) - 2, near.max(0) + 2
            assert ((low <= colour) & (colour <= high)).all()

    def test_keyboard(self, page: Any):
        """With the focus on the matrix, arrow keys go from pair to pair, and stop at its edge."""
        from selenium.webdriver.common.keys import Keys

        page.execute_script("document.getElementById('heatmap').focus()")
        assert text(page, "pair").startswith("0 – 0: ")
        press(page, "heatmap", Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
        assert text(page, "pair").startswith("2 – 1: ")
        press(page, "heatmap", Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_UP)
        assert text(page, "pair").startswith("1 – 0: ")


class TestSliders:
    def test_numbers_follow(self, page: Any, numbers: Summary):
        """The pair's numbers are those of the rate, seed, step and measure that are chosen."""
        from selenium.webdriver.common.keys import Keys

        page.find_element("css selector", "input[value=cosine]").click()
        page.execute_script("document.getElementById('heatmap').focus()")
        press(page, "heatmap", Keys.ARROW_DOWN)
        at = {"learning_rate": 1e-3, "seed": None, "iteration": 60}
        said = []
        for slider, key, change in (
            ("choose-iteration", Keys.ARROW_LEFT, {"iteration": 30}),
            ("choose-learning_rate", Keys.ARROW_RIGHT, {"learning_rate": 1e-2}),
            ("choose-seed", Keys.ARROW_RIGHT, {"seed": 0}),
            ("choose-seed", Keys.ARROW_RIGHT, {"seed": 1}),
            ("choose-iteration", Keys.HOME, {"iteration": 0}),
        ):
            press(page, slider, key)
            at |= change
            assert_says_of_the_store(text(page, "pair"), numbers, "cosine", **at)
            said.append(text(page, "pair"))
            assert text(page, "chosen-iteration") == str(at["iteration"])
        assert len(set(said)) >= 4  # two may agree by chance
        page.find_element("css selector", "input[value=sign]").click()
        assert_says_of_the_store(text(page, "pair"), numbers, "sign", **at)
        assert text(page, "checkpoint").startswith("step 0, before training")

    def test_matrix_as_table(self, page: Any, numbers: Summary):
        """The table of the matrix follows too."""
        from selenium.webdriver.common.keys import Keys

        page.find_element("css selector", "#matrix-details summary").click()
        press(page, "choose-iteration", Keys.HOME)
        # In one look: a fold that opens tells the page a moment later, which makes the table again.
        cells = page.execute_script(
            """return [...document.querySelectorAll("#matrix tbody td")]
                .map((cell) => cell.textContent)"""
        )

        assert len(cells) == 100
        sign = of_seed(numbers.class_matrix, None)["sign"].values[0, 0]
        found = [number(cell.partition(" ")[0]) for cell in cells]
        np.testing.assert_allclose(found, sign.ravel(), atol=0.0052)


class TestCopy:
    @pytest.fixture
    def pasted(self, page: Any) -> Any:
        """Press a table's button and return the rows that are on the clipboard then."""
        page.execute_cdp_cmd(
            "Browser.grantPermissions",
            {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]},
        )

        def press_and_paste(name: str) -> list[dict[str, str]]:
            button = page.find_element("css selector", f"button[data-copies={name}]")
            page.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
            button.click()
            # In one look: the button says so for two seconds only.
            content, said = page.execute_async_script(
                """const [button, done] = arguments;
                navigator.clipboard.readText().then((text) => done([text, button.textContent]))""",
                button,
            )
            assert said == "Copied"
            return list(csv.DictReader(io.StringIO(content)))

        return press_and_paste

    def test_table(self, pasted: Any, numbers: Summary):
        """A copy of a table has every digit."""
        rows = pasted("stages")

        means = of_seed(numbers.within_between, None)
        for name, relation in (("within", 0), ("between", 1)):
            for end in ("", "_error", "_seed_error"):
                expected = means[f"cosine{end}"].isel(relation=relation).values.ravel()
                found = [float(row[f"cosine_{name}{end}"]) for row in rows]
                np.testing.assert_array_equal(found, expected)
        assert [row["iteration"] for row in rows] == ["0", "30", "60"] * 2

    @pytest.mark.parametrize("name", ["lengths", "training", "exactness"])
    def test_other_tables(self, pasted: Any, name: str):
        """Every table can be copied, a row a checkpoint."""
        rows = pasted(name)
        assert len(rows) == 12
        assert {row["learning_rate"] for row in rows} == {"0.001", "0.01"}

    def test_matrix(self, pasted: Any, page: Any, numbers: Summary):
        """A copy of the matrix is of the checkpoint that is chosen, a row for each pair."""
        from selenium.webdriver.common.keys import Keys

        press(page, "choose-iteration", Keys.ARROW_LEFT)
        press(page, "choose-seed", Keys.END)
        rows = pasted("matrix")

        assert {row["iteration"] for row in rows} == {"30"}
        assert {row["seed"] for row in rows} == {"1"}
        for row in rows[::7]:
            at = of_seed(numbers.class_matrix, 1).isel(learning_rate=0, iteration=1)
            at = at.sel(class_name=row["class_name"], other_class_name=row["other_class_name"])
            for name in ("sign", "cosine", "sign_error", "cosine_error"):
                assert abs(float(row[name]) - float(at[name])) < 0.51e-4
            assert int(row["sign_pairs"]) == int(at["pairs"])


class TestLook:
    def test_narrow_screen(self, phone: Any):
        """On 400 pixels the page does not move sideways; wide tables move inside it."""
        widths = phone.execute_script(
            "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        )
        assert widths == [400, 400]

    def test_dark(self, page: Any):
        """Who has asked for dark pages gets one, with light letters."""
        page.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": "dark"}]},
        )
        look = page.execute_script(
            """const look = getComputedStyle(document.body);
            return [look.backgroundColor, look.color]"""
        )
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        paper, ink = ([int(part) for part in re.findall(r"\d+", colour)] for colour in look)
        assert max(paper) < 60
        assert min(ink) > 180

    def test_printed(self, page: Any):
        """It can be printed: tables and figures are whole, what can only be pressed is left out."""
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        overflow, buttons = page.execute_script(
            """const shown = (element) => element.getClientRects().length > 0;
            return [getComputedStyle(document.querySelector(".scroll")).overflow,
                    [...document.querySelectorAll("button, input")].filter(shown).length]"""
        )
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
        printed = page.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
        assert overflow == "visible"
        assert buttons == 0
        assert base64.b64decode(printed["data"]).startswith(b"%PDF")

    def test_everything_has_a_name(self, page: Any):
        """Pictures, controls and regions have names for who cannot see them; headings, order."""
        nameless = page.execute_script(
            """const named = (element) => element.ariaLabel || element.alt
                || element.getAttribute("aria-labelledby") || element.labels?.length;
            return [...document.querySelectorAll("img, input, canvas, [role=region]")]
                .filter((element) => !named(element)).map((element) => element.outerHTML)"""
        )
        levels = page.execute_script(
            """return [...document.querySelectorAll("h1, h2, h3, h4")]
                .map((heading) => Number(heading.tagName[1]))"""
        )
        assert nameless == []
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
