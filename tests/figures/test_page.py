"""The explorer page in a real headless Chromium: load, hover, click, filter, keyboard, phone, dark, no error.

Debian: apt-get install chromium chromium-driver. Skipped, and says so, where there is no browser.
Set PROTOSEG_SCREENSHOTS to a folder to keep the pictures.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import PlantedSet, planted_model

from protoseg.core.prototypes import PrototypeHead
from protoseg.data.tree import LabelTree, label_tree
from protoseg.figures.page import FigureEntry, explorer_page
from protoseg.figures.survey import Patch, Sample, Survey, read_samples, survey
from protoseg.models.segmenter import Segmenter

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="no Chromium here: apt-get install chromium chromium-driver"
)
PICTURE = b"\x89PNG\r\n\x1a\n"


def write_page(
    path: Path, model: Segmenter, score_name: str = "cosine", tree: LabelTree | None = None
) -> Path:
    """The explorer of a model on the planted set, with a second model that predicts class 0 everywhere."""
    data = PlantedSet()
    assert model.prototypes is not None
    deeds, _ = survey(model, data, range(len(data)), patches=4)
    assert deeds is not None
    samples = read_samples(model, data, [3, 4, 5])
    page = explorer_page(
        title="Planted </script><b>set",
        about="two classes",
        classes=data.classes,
        palette=data.palette,
        protos_CKD=model.prototypes.prototypes.numpy(),
        live_C=model.prototypes.initialized.numpy(),
        survey=deeds,
        samples=samples,
        names=("ours", "other"),
        second=[np.zeros_like(sample.prediction) for sample in samples],
        score_name=score_name,
        prior_C=np.array([-0.05, -0.1]) if score_name == "cosine" else None,
        tree=tree,
    )
    path.write_text(page)
    return path


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(tmp_path_factory.mktemp("page") / "index.html", planted_model())


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium, part of the dev extra")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(chromium: Any, page_file: Path) -> Iterator[Any]:
    """A freshly loaded page at desktop width; ends with the check that the console holds no error."""
    chromium.set_window_size(1280, 900)
    visit(chromium, page_file)
    yield chromium
    errors = [entry for entry in chromium.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert not errors, errors


def visit(chromium: Any, page_file: Path) -> None:
    """Load a page and wait until it is drawn."""
    chromium.get(page_file.as_uri())
    wait_until_drawn(chromium)


def wait_until_drawn(chromium: Any) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(chromium, 60).until(lambda d: d.execute_script("return document.body.dataset.ready"))


def css(page: Any, selector: str) -> list[Any]:
    return page.find_elements("css selector", selector)


def inspector(page: Any) -> str:
    return css(page, "#inspector")[0].text


def point_at(page: Any, number: int, cell: tuple[int, int]) -> Any:
    """Move the mouse to the middle of a cell (row, column) of 12 × 12 of a sample."""
    from selenium.webdriver import ActionChains

    canvas = css(page, "#samples canvas")[number]
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    size = canvas.size
    x = (cell[1] + 0.5) / 12 * size["width"] - size["width"] / 2
    y = (cell[0] + 0.5) / 12 * size["height"] - size["height"] / 2
    ActionChains(page).move_to_element_with_offset(canvas, round(x), round(y)).perform()
    return canvas


def square_cell(index: int) -> tuple[int, int]:
    """A cell inside the planted square of an image."""
    top, left = PlantedSet().corner(index)
    return top // 4 + 1, left // 4 + 1


def screenshot(page: Any, name: str, tmp_path: Path) -> None:
    folder = Path(os.environ.get("PROTOSEG_SCREENSHOTS", tmp_path))
    assert page.save_screenshot(str(folder / f"{name}.png"))
    assert (folder / f"{name}.png").stat().st_size > 10_000


@needs_browser
def test_loads_without_network(page: Any, page_file: Path, tmp_path: Path) -> None:
    assert css(page, "h1")[0].text == "Planted </script><b>set", "names are shown as text, never run"
    assert len(css(page, "#samples canvas")) == 3
    assert len(css(page, ".card")) == 6
    loaded = page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert all(name.startswith("data:") for name in loaded), loaded
    text = re.sub(r"base64,[^\"]*", "", page_file.read_text())
    assert not re.search(r"https?://|@import|<link[^>]+stylesheet|<script[^>]+src", text)
    screenshot(page, "desktop", tmp_path)


@needs_browser
def test_hover_tells_class_prototype_patches_and_runners_up(page: Any) -> None:
    seen = {}
    for number, index in enumerate((3, 4, 5)):
        point_at(page, number, square_cell(index))
        text = inspector(page)
        seen[index] = int(re.search(r"thing · prototype (\d)", text).group(1))  # type: ignore[union-attr]
        assert "labelled thing ✓" in text
        assert "other: ground" in text
        assert [cell.text for cell in css(page, ".runners td:first-child")] == ["thing", "ground"]
        first, second = (float(cell.text) for cell in css(page, ".runners td:nth-child(3)"))
        assert 0.95 < first <= 1.0
        assert second < 0.8
        assert [cell.text for cell in css(page, ".runners td:nth-child(4)")] == ["-0.100", "-0.050"]
        shown = [image.get_attribute("alt") for image in css(page, "#inspector .patches img")]
        assert len(shown) == 4
        assert all(alt.endswith(f"look{index % 3}") for alt in shown), "the patches of the pixel's own look"
    assert len(set(seen.values())) == 3, "each look has its own prototype"
    point_at(page, 0, (0, 11))
    assert "ground · prototype" in inspector(page)
    assert "after upsampling" not in inspector(page)


@needs_browser
def test_normalised_scores_are_the_models_own(page: Any, tmp_path: Path) -> None:
    """Where scores are normalised another class may have the larger cosine; it must not be called first."""
    model = planted_model()
    assert model.prototypes is not None
    head = PrototypeHead(4, 2, 3, score_norm="layer_norm", start="random")
    head.prototypes.copy_(model.prototypes.prototypes)
    with torch.no_grad():
        head.norm_bias[1] = 3.0
    model.classifier = head
    visit(page, write_page(tmp_path / "index.html", model, "normalised score"))
    point_at(page, 0, (0, 11))  # grey ground
    assert "thing · prototype" in inspector(page)
    assert "after upsampling" not in inspector(page)
    assert css(page, ".runners th")[0].text == "normalised score"
    assert [cell.text for cell in css(page, ".runners td:first-child")] == ["thing", "ground"]
    with torch.inference_mode():
        logits = model(PlantedSet().read(3)[0][None])[0, :, 0, 11]
    shown = [float(cell.text) for cell in css(page, ".runners td:nth-child(3)")]
    assert not css(page, ".runners td:nth-child(4)"), "the score holds the prior"
    assert shown == pytest.approx(sorted(logits.tolist(), reverse=True), abs=2e-3)


@needs_browser
def test_click_shows_where_a_prototype_fires(page: Any, tmp_path: Path) -> None:
    number = page.execute_script(
        "const s = samples[0]; return s.nearest[arguments[0] * s.columns + arguments[1]]", *square_cell(3)
    )
    card = css(page, f".card[data-number='{number}']")[0]
    card.click()
    assert card.get_attribute("aria-pressed") == "true"
    captions = [caption.text for caption in css(page, "#samples figcaption")]
    assert captions[0].endswith("11 % of the pixels"), "16 of 144 cells"
    assert [caption.endswith("none won") for caption in captions] == [False, True, True]
    assert "cosine" in css(page, "#hint")[0].text
    page.execute_script("scrollTo(0, 0)")
    screenshot(page, "fires", tmp_path)
    css(page, "#clear")[0].click()
    assert card.get_attribute("aria-pressed") == "false"
    assert captions[0] != css(page, "#samples figcaption")[0].text


@needs_browser
def test_a_click_on_a_pixel_asks_for_its_prototype(page: Any) -> None:
    from selenium.webdriver import ActionChains

    point_at(page, 1, square_cell(4))
    ActionChains(page).click().perform()
    pressed = css(page, ".card[aria-pressed=true]")
    assert len(pressed) == 1
    assert pressed[0].get_attribute("aria-label") in inspector(page)


@needs_browser
def test_filter_views_and_colours(page: Any) -> None:
    from selenium.webdriver.support.ui import Select

    def pixels() -> str:
        return page.execute_script("return samples[0].canvas.toDataURL()")

    pictures = {pixels()}
    Select(css(page, "#filter")[0]).select_by_visible_text("thing")
    assert [heading.text for heading in css(page, "#prototypes h3")] == ["thing\n3.0 of 3 in use"]
    assert len(css(page, ".card")) == 3
    pictures.add(pixels())
    Select(css(page, "#filter")[0]).select_by_visible_text("all")
    views = [option.get_attribute("value") for option in css(page, "#view option")]
    assert views == ["which", "prediction", "label", "errors", "image", "second", "differ"]
    for view in views[1:]:
        Select(css(page, "#view")[0]).select_by_value(view)
        pictures.add(pixels())
    Select(css(page, "#view")[0]).select_by_value("which")
    Select(css(page, "#palette")[0]).select_by_value("safe")
    pictures.add(pixels())
    assert len(pictures) == 9, "every view, filter and palette changes the picture"


@needs_browser
def test_a_label_tree_filters_by_subtree_and_colours_by_level(page: Any, tmp_path: Path) -> None:
    from selenium.webdriver.support.ui import Select

    tree = label_tree({"world": {"flat": ["ground"], "solid": ["thing"]}}, PlantedSet.classes)
    visit(page, write_page(tmp_path / "index.html", planted_model(), tree=tree))

    def legend() -> list[str]:
        return [entry.text for entry in css(page, "#legend span") if entry.text]

    def pixels() -> str:
        return page.execute_script("return samples[0].canvas.toDataURL()")

    names = [option.text.strip() for option in css(page, "#filter option")]
    assert names == ["all", "world", "flat", "ground", "solid", "thing"]
    by_class = pixels()
    headings = ["world › flat › ground", "world › solid › thing"]
    assert [each.text.split("\n")[0] for each in css(page, "#prototypes h3")] == headings
    assert legend() == ["ground", "thing"]
    Select(css(page, "#level")[0]).select_by_value("2")
    assert legend() == ["flat", "solid"]
    assert pixels() == by_class, "a node has the colour of its first class"
    Select(css(page, "#level")[0]).select_by_value("1")
    assert legend() == ["world"]
    assert pixels() != by_class
    Select(css(page, "#view")[0]).select_by_value("errors")
    wrong = page.execute_script(
        "return samples.map(s => [...s.label].filter((c, i) => c < 5 && !agree(c, s.prediction[i])).length)"
    )
    assert wrong == [0, 0, 0], "at the top all is of one node"
    Select(css(page, "#level")[0]).select_by_value("0")
    assert page.execute_script("return [agree(0, 1), agree(2, 1), agree(4, 1), agree(3, 1)]") == [
        False, True, True, False
    ]  # fmt: skip
    Select(css(page, "#filter")[0]).select_by_value("4")
    assert [each.text.split("\n")[0] for each in css(page, "#prototypes h3")] == headings[1:]
    point_at(page, 0, square_cell(3))
    assert "world › solid › thing" in inspector(page)


@needs_browser
def test_keyboard_alone(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    canvas = css(page, "#samples canvas")[2]
    page.execute_script("arguments[0].focus()", canvas)
    canvas.send_keys(Keys.ARROW_DOWN)
    assert page.execute_script("return [state.row, state.column]") == [6, 6]
    canvas.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_UP)
    assert page.execute_script("return [state.row, state.column]") == [5, 4]
    canvas.send_keys(*[Keys.ARROW_LEFT] * 9)
    assert page.execute_script("return [state.row, state.column]") == [5, 0], "stays on the image"
    canvas.send_keys(Keys.ENTER)
    assert len(css(page, ".card[aria-pressed=true]")) == 1
    canvas.send_keys(Keys.ESCAPE)
    assert not css(page, ".card[aria-pressed=true]")


@needs_browser
def test_phone_by_touch_in_light_and_dark(page: Any, tmp_path: Path) -> None:
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    page.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    try:
        assert page.execute_script("return document.documentElement.scrollWidth") <= 390, (
            "no sideways scrolling"
        )
        page.refresh()
        wait_until_drawn(page)
        assert not any(card.is_displayed() for card in css(page, ".card")), "folded away: they are long"
        page.execute_script("arguments[0].click()", css(page, "#prototypes summary")[1])
        assert css(page, ".card[data-number='3']")[0].is_displayed()
        canvas = css(page, "#samples canvas")[0]
        box = page.execute_script(
            "arguments[0].scrollIntoView({block: 'start'}); const b = arguments[0].getBoundingClientRect();"
            "return [b.left, b.top, b.width, b.height]",
            canvas,
        )
        row, column = square_cell(3)
        at = {"x": box[0] + (column + 0.5) / 12 * box[2], "y": box[1] + (row + 0.5) / 12 * box[3]}
        page.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [at]})
        page.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        assert "thing · prototype" in inspector(page)
        assert not css(page, ".card[aria-pressed=true]"), "a tap asks for the pixel only"
        css(page, "#fires")[0].click()
        assert len(css(page, ".card[aria-pressed=true]")) == 1
        screenshot(page, "phone", tmp_path)

        def background() -> str:
            return page.execute_script("return getComputedStyle(document.body).backgroundColor")

        before = background()
        page.execute_script("arguments[0].click()", css(page, "#theme")[0])
        assert background() != before
        screenshot(page, "phone_other_theme", tmp_path)
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})


def test_page_of_150_classes_stays_below_30_mb() -> None:
    rng = np.random.default_rng(0)
    num_classes, count, dim = 150, 10, 16
    crops = rng.integers(0, 256, (8, 170, 170, 3), dtype=np.uint8)  # noise: the worst case for JPEG
    matched = rng.random((170, 170)) < 0.01
    patches = [Patch(0.9, i, f"image_{i}", 0, crops[i % 8], matched) for i in range(4)]
    table = np.full((num_classes, count), 0.1)
    deeds = Survey(table, table, table, table.astype(np.int64), [patches] * (num_classes * count))
    names = [f"class {c}" for c in range(num_classes)]
    sample = Sample(
        "sample",
        rng.integers(0, 256, (512, 683, 3), dtype=np.uint8),
        rng.integers(0, num_classes, (64, 86)).repeat(8, 0).repeat(8, 1)[:512, :683],
        rng.integers(0, num_classes, (64, 86)).repeat(8, 0).repeat(8, 1)[:512, :683],
        rng.integers(0, num_classes * count, (128, 171)),
        rng.integers(0, num_classes, (128, 171, 5)),
        rng.random((128, 171, 5)).astype(np.float32),
        rng.normal(size=(128, 171, dim)).astype(np.float32),
    )
    page = explorer_page(
        title="large",
        about="",
        classes=names,
        palette=[(c, c, c) for c in range(num_classes)],
        protos_CKD=rng.normal(size=(num_classes, count, dim)).astype(np.float32),
        live_C=np.ones(num_classes, dtype=bool),
        survey=deeds,
        samples=[sample] * 8,
        names=("large", None),
        figures=[FigureEntry("f", "", PICTURE)],
    )
    assert 5e6 < len(page) < 30e6
