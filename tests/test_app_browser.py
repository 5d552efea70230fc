"""The web page in a real browser: typed into, clicked, looked at."""

import dataclasses
import importlib.util
import json
import shutil
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.test_app import model
from unclip_jax.weights.known import Known

SCRIPT = Path(__file__).parent.parent / "docs" / "make_app_screenshots.py"
LACKING = [name for name in ("gradio", "selenium") if importlib.util.find_spec(name) is None]
LACKING += [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
pytestmark = pytest.mark.skipif(bool(LACKING), reason=f"not installed: {', '.join(LACKING)}")

KNOWN = Known.of(["cat face, noto style", "red apple, twemoji style"], ["a red apple", "cat face"])


@pytest.fixture(scope="module")
def screenshots():
    """What drives the browser for the pictures in the docs drives it here."""
    spec = importlib.util.spec_from_file_location("make_app_screenshots", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def address():
    """A page whose pictures take long enough to be cancelled."""
    from unclip_jax.app.serve import serving
    from unclip_jax.app.tasks import Served

    slow = model()
    sampling = dataclasses.replace(slow.decoder.stage.sampling, spacing="250")
    stage = dataclasses.replace(slow.decoder.stage, sampling=sampling)
    slow = dataclasses.replace(slow, decoder=slow.decoder._replace(stage=stage), known=KNOWN)
    with serving(Served(slow, batch_size=1)) as found:
        yield found


@pytest.fixture(scope="module")
def browser(screenshots):
    with screenshots.chromium(screenshots.WIDE) as opened:
        yield opened


def pictures(tab):
    """The bytes of the pictures shown."""
    found = tab.browser.find_elements("css selector", ".pictures img")
    sources = [image.get_attribute("src") for image in found if image.is_displayed()]
    return [urllib.request.urlopen(source).read() for source in sources]


def test_a_prompt_is_drawn_and_drawn_again_and_cancelled(screenshots, browser, address):
    tab = screenshots.Tab(browser, address, "Text to image")
    tab.choose("Pictures", "1")
    tab.press("draw")
    tab.wait_for("Prompt: is empty")
    assert pictures(tab) == []

    tab.fill("Prompt", "a red apple <b>${1 + 1}</b>")
    tab.draw()
    first = pictures(tab)
    assert len(first) == 1
    assert "a red apple <b>${1 + 1}</b>" in tab.text(".details")

    tab.fill("Seed", "1")
    tab.draw()
    second = pictures(tab)
    assert len(second) == 1 and second != first
    tab.fill("Seed", "0")
    tab.draw()
    assert pictures(tab) == first

    tab.choose("Pictures", "8")
    tab.press("draw")
    tab.wait_for("prior")
    tab.press("cancel")
    tab.wait_for("Cancelled")
    assert pictures(tab) == first, "what was there stays"
    tab.choose("Pictures", "1")
    tab.draw()
    assert pictures(tab) == first

    tab.fill("Seed", "-5")
    tab.press("draw")
    tab.wait_for("Seed: got -5, expected a")


def test_examples_fill_and_enter_draws_and_the_picture_is_seen_on_the_way(
    screenshots, browser, address
):
    tab = screenshots.Tab(browser, address, "Text to image")
    tab.choose("Pictures", "1")
    tab.example(1)
    assert tab.value("Prompt") == "cat face, noto style"
    tab.fill("Prompt", "a quantum aple" + screenshots.Keys.ENTER)
    draft = tab.wait_until(lambda: browser.find_elements("css selector", ".draft"))[0]
    assert draft.get_attribute("src").startswith("data:image/jpeg;base64,")
    tab.wait_for("Done")
    assert "no caption with “quantum”, “aple”" in tab.text(".status")
    [image] = browser.find_elements("css selector", ".pictures img")
    assert image.get_attribute("alt") == "a quantum aple"
    browser.find_element("css selector", ".status button.example").click()
    assert tab.value("Prompt") == "red apple"
    browser.execute_script(
        "window.copied = null;"
        "navigator.clipboard.writeText = async (text) => { window.copied = text; }"
    )
    browser.find_element("css selector", "button.copy").click()
    copied = tab.wait_until(lambda: browser.execute_script("return window.copied"))
    assert copied.startswith("unclip sample text2im") and "'a quantum aple'" in copied


TABS = {
    "From a picture": 1, "Mix": 2, "Variations": 1, "Interpolation": 2, "Text diff": 1,
    "What CLIP sees": 1,
}  # fmt: skip


def test_every_tab_has_a_screenshot(screenshots, browser, address):
    screenshots.Tab(browser, address, "Text to image")
    tabs = {tab.text.strip() for tab in browser.find_elements("css selector", "[role=tab]")}
    assert tabs - {""} == {name for name, *_ in screenshots.SHOTS.values()} >= {*TABS}


@pytest.mark.parametrize("width", [1280, 390])
def test_every_tab_is_there_and_fits_and_has_pictures_to_try(screenshots, browser, address, width):
    screenshots.resize(browser, width, 900)
    for name, fields in TABS.items():
        tab = screenshots.Tab(browser, address, name)
        for number in (0, 1):  # the second takes the place of the first
            tab.example(number)
            chosen = browser.execute_script(
                "return [...[...document.querySelectorAll('button.example')]"
                ".filter((button) => button.offsetParent)[arguments[0]].querySelectorAll('img')]"
                ".map((image) => [image.dataset.name, image.alt])",
                number,
            )
            expected = [name for name, _ in chosen]
            assert len(expected) == fields

            def uploaded(tab=tab, expected=expected):
                return [s.split("/")[-1] for s in tab.sources(".upload img")] == expected

            tab.wait_until(uploaded)
        assert all(alt for _, alt in chosen)
        across = browser.execute_script("return document.documentElement.scrollWidth")
        assert across <= width
    assert tab.value("A word to write on it") == ""
    screenshots.resize(browser, *screenshots.WIDE)


def test_uploads_that_are_no_pictures_are_answered_in_words(
    screenshots, browser, address, tmp_path
):
    tab = screenshots.Tab(browser, address, "Variations")
    (tmp_path / "text.png").write_text("this is no picture")
    tab.upload_wrong(tmp_path / "text.png")
    tab.wait_for("Picture: is no picture, or a broken one; give PNG")
    tab.press("draw")
    tab.wait_for("Picture: there is none; upload one")


@pytest.mark.slow
def test_theta_slides_along_the_strip(screenshots, browser, address, tmp_path):
    rng = np.random.default_rng(0)
    files = [tmp_path / "one.png", tmp_path / "two.png"]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(file)
    tab = screenshots.Tab(browser, address, "Interpolation")
    tab.upload(*files)
    tab.choose("Frames", "5")
    tab.draw()
    strip = tab.sources(".strip img")
    assert len(set(strip)) == 5
    for i in range(5):
        tab.wait_until(lambda i=i: strip[i] in tab.sources(".walked img"))
        tab.slide(0.25)


def test_the_page_needs_no_other_server_and_tells_of_no_error(screenshots, address):
    """In a browser of its own: a page left behind tells of the calls that leaving it broke."""
    with screenshots.chromium(screenshots.WIDE) as browser:
        screenshots.Tab(browser, address, "Text to image")
        events = [
            json.loads(entry["message"])["message"] for entry in browser.get_log("performance")
        ]
        told = browser.get_log("browser")
    asked = {
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    }
    assert asked
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert not [entry for entry in told if entry["level"] == "SEVERE"]
