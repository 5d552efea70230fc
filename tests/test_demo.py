"""The demo: a page of pictures, and under each the command that makes it again."""

import html
import re
import shlex

import numpy as np
import pytest
from PIL import Image

import demo
from tests import tiny
from unclip_jax.errors import UserError
from unclip_jax.pipeline.tasks import command
from unclip_jax.pipeline.tasks.run import run
from unclip_jax.weights import box

# The tiny model reads 12 tokens of a caption.
pytestmark = pytest.mark.filterwarnings("ignore:.*are longer than 12 tokens")


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    tiny.model().save(folder / "model")
    demo.main(["--model", str(folder / "model"), "--out", str(folder / "out")])
    return folder / "out"


def test_every_picture_on_the_page_is_there(shown):
    page = (shown / demo.PAGE).read_text(encoding="utf-8")
    pictures = re.findall(r'<img src="([^"]+)"', page)
    assert pictures == [f"{show.name}.png" for show in demo.SHOWS]
    for name in pictures:
        with Image.open(shown / name) as picture:
            assert picture.width > 128 and len(picture.getcolors(2**24)) > 16
    assert "CC-BY 4.0" in page and "http" not in re.sub(r"<small>.*</small>", "", page)


def test_the_command_under_a_picture_makes_it_again(shown):
    page = (shown / demo.PAGE).read_text(encoding="utf-8")
    commands = re.findall(r"<pre>unclip sample (.*?)</pre>", page)
    words = shlex.split(html.unescape(commands[1]))
    again = shown / "again.png"
    run(command.parse([w for w in words if not w.startswith("--out=")] + [f"--out={again}"]))
    first, second = (np.asarray(Image.open(p)) for p in (shown / "variations.png", again))
    np.testing.assert_array_equal(first, second)


def test_a_package_without_weights_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(box, "__file__", str(tmp_path / "box" / "__init__.py"))
    with pytest.raises(UserError, match=r"the box model: no weights in .*; install the package"):
        box.folder()
