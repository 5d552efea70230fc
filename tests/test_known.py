"""What a model says that it knows, and of which captions it says that it doesn't."""

import dataclasses
import warnings

import pytest
from PIL import Image

from tests import tiny
from unclip_jax.data.datasets import DataConfig
from unclip_jax.errors import UserError
from unclip_jax.pipeline.tasks.inputs import warn_of_unfamiliar
from unclip_jax.pipeline.unclip import UnCLIP
from unclip_jax.weights.known import Known, Unfamiliar

CANONICAL = [
    "red apple, noto style", "red apple, fluent style", "green apple, fluent style",
    "dog face, noto style", "Tokyo tower, noto style", "maple leaf, noto style",
]  # fmt: skip
KNOWN = Known.of(CANONICAL, [*CANONICAL, "a red apple", "puppy, noto style"])


def test_names_are_told_from_styles():
    assert KNOWN.names == ("dog face", "green apple", "maple leaf", "red apple", "Tokyo tower")
    assert KNOWN.styles == ("fluent", "noto")
    assert KNOWN.drawn == ((1,), (0,), (1,), (0, 1), (1,))
    assert {KNOWN.styled(i, n) for i in range(5) for n in range(2)} == set(CANONICAL)
    assert Known.of(["a cup", "a cup"], ["a cup"]).sentence() == (
        "It was trained on 1 captions, such as a cup."
    )
    assert "noto" in KNOWN.sentence() and "5 names" in KNOWN.sentence()


@pytest.mark.parametrize(
    ("caption", "unknown"),
    [
        ("a red apple, noto style", []),
        ("the puppy and two dogs", ["two"]),
        ("APPLES over leaf", []),
        ("a quantum computer; quantum!", ["quantum", "computer"]),
        ("犬 🐶", ["犬"]),
        ("", []),
    ],
)
def test_unknown_words_are_those_of_no_caption(caption, unknown):
    assert KNOWN.unknown(caption) == unknown
    said = KNOWN.says(caption)
    assert bool(said) == bool(unknown) and all(word in said for word in unknown)
    assert "\n" not in said


@pytest.mark.parametrize(
    ("caption", "near"),
    [
        ("red aple", "red apple"),  # a misspelling, of two words alike the one beside "red"
        ("the eiffel tower", "Tokyo tower"),
        ("dogs, noto style", "dog face"),
        ("leafs", "maple leaf"),
    ],
)
def test_near_names_share_words_even_if_misspelt(caption, near):
    assert KNOWN.near(caption)[0] == near


def test_what_is_near_nothing_gets_examples():
    assert KNOWN.near("xyzzy of plugh") == []
    assert "it knows red apple" in KNOWN.says("xyzzy of plugh")


def test_every_nth_caption_is_spread_over_the_list():
    assert KNOWN.every(9) == [KNOWN.styled(i, i) for i in range(5)]
    assert [caption.partition(",")[0] for caption in KNOWN.every(2)] == ["dog face", "maple leaf"]


def test_a_data_set_is_read_without_its_pictures(tmp_path):
    for name, text in {"a": "a cup\na mug", "b": "a spoon"}.items():
        (tmp_path / f"{name}.png").write_bytes(b"no picture at all")
        (tmp_path / f"{name}.txt").write_text(text)
    found = Known.read(DataConfig(name=str(tmp_path), split="all"))
    assert found.names == ("a cup", "a spoon") and found.words == {"a", "cup", "mug", "spoon"}
    Image.new("RGB", (4, 4)).save(tmp_path / "c.png")
    assert Known.read(DataConfig(name=str(tmp_path), split="all", bare=True)).names == found.names


def test_a_model_carries_it(tmp_path):
    model = dataclasses.replace(tiny.model(), known=KNOWN)
    model.save(tmp_path / "one")
    loaded = UnCLIP.load(tmp_path / "one")
    assert loaded.known == KNOWN
    loaded.save(tmp_path / "two", "bfloat16")
    assert Known.find(tmp_path / "two") == KNOWN
    (tmp_path / "one" / "known.json").rename(tmp_path / "one" / "clip" / "known.json")
    assert Known.find(tmp_path / "one") == KNOWN, "training leaves it beside CLIP"
    for broken in ("{", "[]", '{"names": ["a"], "styles": [], "drawn": [[3]], "words": []}'):
        (tmp_path / "two" / "known.json").write_text(broken)
        with pytest.raises(UserError, match=r"known\.json: damaged"):
            Known.find(tmp_path / "two")


def test_a_task_warns_once_of_a_caption_unlike_all_others():
    model = dataclasses.replace(tiny.model(), known=KNOWN)
    with pytest.warns(Unfamiliar, match=r'has "blue".*near are') as told:
        warn_of_unfamiliar(model, ["a blue dog", "a blue dog", "a dog"])
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_unfamiliar(model, ["a dog"])
        warn_of_unfamiliar(tiny.model(), ["a blue dog"])


def test_the_box_knows_its_names():
    known = UnCLIP.load().known
    assert len(known.names) > 1000 and len(known.styles) >= 3
    assert known.unknown("a red apple, noto style") == []
    assert known.unknown("a quantum apple") == ["quantum"]
