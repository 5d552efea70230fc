"""Screenshots of the web page, for docs/app.md: every tab, on a phone, and in the dark.

    python docs/make_app_screenshots.py --model runs/emoji --out docs/images

Needs the extra `app`, selenium, and Debian's chromium and chromium-driver. It draws in every tab,
which takes some minutes on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from unclip_jax.app.serve import serving
from unclip_jax.app.tasks import Served
from unclip_jax.data.emoji.catalogue import catalogue, rasterise
from unclip_jax.errors import UserError, run_command
from unclip_jax.pipeline.tasks.inputs import load

WIDE, NARROW = (1160, 900), (390, 900)
PATIENCE = 600  # seconds for one drawing, with its compilation


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", metavar="DIR", help="default: the box model")
    parser.add_argument("--dtype", default="")
    parser.add_argument("--t5")
    parser.add_argument("--prompt", default="red apple, noto style")
    parser.add_argument("--emoji", nargs=2, default=["red apple", "tangerine"], help="to upload")
    parser.add_argument("--texts", nargs=2, default=["a red thing", "a blue thing"])
    parser.add_argument("--shots", nargs="+", choices=SHOTS, help="default: all")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    return parser.parse_args(argv)


@contextlib.contextmanager
def chromium(size: tuple[int, int]) -> Iterator[webdriver.Chrome]:
    """A headless browser, `size` in pixels as the page sees them."""
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    driver = shutil.which("chromedriver")
    if driver is None:
        raise UserError("chromedriver: not found; apt-get install chromium chromium-driver")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        resize(browser, *size)
        yield browser
    finally:
        browser.quit()


def resize(browser: webdriver.Chrome, width: int, height: int) -> None:
    """The size of the page itself, which may be narrower than any window."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


class Tab:
    """One tab of the page in a browser."""

    def __init__(self, browser: webdriver.Chrome, address: str, name: str) -> None:
        """Load the page anew and choose the tab."""
        self.browser = browser
        browser.get(address)
        tabs = "[role=tab], .overflow-dropdown button"  # the latter on a phone
        tab = self.wait_until(lambda: self._named(tabs, name))
        if tab.get_attribute("aria-selected") != "true":
            tab.click()
        self.wait_until(lambda: self._shown(".draw"))

    def fill(self, label: str, text: str) -> None:
        """Write into a field, over what is there."""
        block = self.wait_until(lambda: self._block(label, "textarea, input"))
        field = block.find_element(By.CSS_SELECTOR, "textarea, input")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text)

    def upload(self, *files: Path) -> None:
        """Give the tab's fields for pictures one file each."""
        for i, file in enumerate(files):
            self._fields("upload")[i].find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(
                str(file)
            )
            self.wait_until(lambda i=i: self._fields("upload")[i].find_elements(By.TAG_NAME, "img"))

    def example(self, number: int) -> None:
        """Click one of the tab's examples, once they are there."""

        def click() -> bool:
            found = self.browser.find_elements(By.CSS_SELECTOR, "button.example")
            shown = [element for element in found if element.is_displayed()]
            if len(shown) <= number:
                return False
            shown[number].click()
            return True

        self.wait_until(click)

    def value(self, label: str) -> str:
        """What a field holds."""
        block = self.wait_until(lambda: self._block(label, "textarea, input"))
        return block.find_element(By.CSS_SELECTOR, "textarea, input").get_attribute("value")

    def upload_wrong(self, file: Path) -> None:
        """Give the first field for a picture something that it will not keep."""
        field = self._fields("upload")[0].find_element(By.CSS_SELECTOR, "input[type=file]")
        field.send_keys(str(file))

    def choose(self, label: str, option: str) -> None:
        """Choose one of a few."""
        block = self.wait_until(lambda: self._block(label, "input[type=radio]"))
        options = block.find_elements(By.TAG_NAME, "label")
        next(found for found in options if found.text.strip() == option).click()

    def press(self, button: str) -> None:
        """Press "draw" or "cancel", once it can be pressed."""

        def enabled() -> WebElement | None:
            found = self._shown(f"button.{button}")
            return found if found is not None and found.is_enabled() else None

        self.wait_until(enabled).click()

    def draw(self) -> None:
        """Press the button, and wait for the pictures."""
        self.press("draw")
        self.wait_until(lambda: not self._said("Done"))
        self.wait_for("Done")
        self.wait_until(self._pictures_are_loaded)

    def wait_for(self, words: str) -> None:
        """Wait until the status begins with some words."""
        self.wait_until(lambda: self._said(words))

    def text(self, selector: str) -> str:
        """What the first shown element of a kind says."""
        return self.wait_until(lambda: self._shown(selector)).text

    def sources(self, selector: str) -> list[str]:
        """Where the pictures shown come from."""
        found = self.browser.find_elements(By.CSS_SELECTOR, selector)
        return [image.get_attribute("src") for image in found if image.is_displayed()]

    def slide(self, fraction: float) -> None:
        """Move theta by a fraction of its range."""
        slider = self.wait_until(lambda: self._shown(".theta input[type=range]"))
        for _ in range(round(fraction / float(slider.get_attribute("step")))):
            slider.send_keys(Keys.ARROW_RIGHT)

    def save(self, path: Path) -> None:
        """The whole page as a PNG."""
        height = self.browser.execute_script("return document.body.scrollHeight")
        width = self.browser.execute_script("return window.innerWidth")
        resize(self.browser, width, max(height, 500))
        self.wait_until(self._pictures_are_loaded)
        self.browser.save_screenshot(str(path))
        print(path)

    def wait_until(self, condition: Callable[[], Any]) -> Any:
        """What the condition gives, once it gives something; the page may change meanwhile."""
        stale = (StaleElementReferenceException,)
        return WebDriverWait(self.browser, PATIENCE, 0.2, stale).until(lambda _: condition())

    def _shown(self, selector: str) -> WebElement | None:
        found = self.browser.find_elements(By.CSS_SELECTOR, selector)
        return next((element for element in found if element.is_displayed()), None)

    def _named(self, selector: str, name: str) -> WebElement | None:
        found = self.browser.find_elements(By.CSS_SELECTOR, selector)
        shown = (element for element in found if element.is_displayed())
        return next((element for element in shown if element.text.strip() == name), None)

    def _block(self, label: str, inputs: str) -> WebElement | None:
        """The part of a form that has a label, and inputs of a kind."""
        for name in self.browser.find_elements(By.CSS_SELECTOR, "[data-testid=block-info]"):
            if name.is_displayed() and name.text.strip().startswith(label):
                block = name.find_element(By.XPATH, "ancestor::*[contains(@class, 'block')][1]")
                if block.find_elements(By.CSS_SELECTOR, inputs):
                    return block
        return None

    def _fields(self, kind: str) -> list[WebElement]:
        found = self.browser.find_elements(By.CSS_SELECTOR, f".block.{kind}")
        return [field for field in found if field.is_displayed()]

    def _said(self, words: str) -> bool:
        status = self._shown(".status")
        return status is not None and status.text.startswith(words)

    def _pictures_are_loaded(self) -> bool:
        """Whether the browser shows every picture whole."""
        return self.browser.execute_script(
            "return [...document.images].every((image) => image.complete)"
        )


def text_to_image(tab: Tab, args: argparse.Namespace, files: list[Path]) -> None:
    """Draw a caption."""
    tab.fill("Prompt", args.prompt)
    tab.draw()


def from_a_picture(tab: Tab, args: argparse.Namespace, files: list[Path]) -> None:
    """Draw a picture anew, towards a caption."""
    tab.upload(files[0])
    tab.fill("Prompt", args.prompt)
    tab.draw()


def mix(tab: Tab, args: argparse.Namespace, files: list[Path]) -> None:
    """Mix two pictures and a caption."""
    tab.upload(*files)
    tab.fill("Prompts", args.prompt)
    tab.draw()


def variations(tab: Tab, args: argparse.Namespace, files: list[Path]) -> None:
    """Vary one picture."""
    tab.upload(files[0])
    tab.draw()


def interpolation(tab: Tab, args: argparse.Namespace, files: list[Path]) -> None:
    """Go from one picture to another, and look half way."""
    tab.upload(*files)
    tab.draw()
    tab.slide(0.5)


def text_diff(tab: Tab, args: argparse.Namespace, files: list[Path]) -> None:
    """Turn a picture."""
    tab.upload(files[0])
    tab.fill("From", args.texts[0])
    tab.fill("To", args.texts[1])
    tab.draw()
    tab.slide(0.5)


def labels(tab: Tab, args: argparse.Namespace, files: list[Path]) -> None:
    """Judge a picture with a word on it."""
    tab.upload(files[0])
    tab.fill("A word to write on it", "dog")
    tab.draw()


def prior(tab: Tab, args: argparse.Namespace, files: list[Path]) -> None:
    """Draw with and without the prior."""
    tab.draw()


SHOTS = {
    "text_to_image": ("Text to image", text_to_image, WIDE, False),
    "from_a_picture": ("From a picture", from_a_picture, WIDE, False),
    "mix": ("Mix", mix, WIDE, False),
    "variations": ("Variations", variations, WIDE, False),
    "interpolation": ("Interpolation", interpolation, WIDE, False),
    "text_diff": ("Text diff", text_diff, WIDE, False),
    "labels": ("What CLIP sees", labels, WIDE, False),
    "prior": ("What the prior adds", prior, WIDE, False),
    "phone": ("Text to image", text_to_image, NARROW, False),
    "dark": ("Interpolation", interpolation, WIDE, True),
}


def main(argv: list[str]) -> None:
    """Serve, draw, look."""
    args = parse(argv)
    model = load(args)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        art = {emoji.captions[0]: emoji.art for emoji in catalogue()}
        files = [folder / f"{name}.png" for name in args.emoji]
        for name, file in zip(args.emoji, files, strict=True):
            file.write_bytes(rasterise(art[name].read_text(), 256))
        address = stack.enter_context(serving(Served(model, args.model, args.dtype, args.t5)))
        for name in args.shots or SHOTS:
            label, use, size, dark = SHOTS[name]
            with chromium(size) as browser:
                tab = Tab(browser, address + "?__theme=dark" * dark, label)
                use(tab, args, files)
                tab.save(args.out / f"app_{name}.png")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
