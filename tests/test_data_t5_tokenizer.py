"""T5's tokenizer on a small unigram model that the test builds."""

import json
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from tests import t5_folder
from unclip_jax.data.t5_tokenizer import T5Tokenizer, text_mask
from unclip_jax.errors import UserError

IDS = {f"▁{word}": 3 + i for i, word in enumerate(t5_folder.WORDS)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    t5_folder.unigram().save(str(folder / "tokenizer.json"))
    return folder


def test_words_then_end_then_padding(folder):
    tokens = T5Tokenizer(folder, 6).encode(["a red square", "cat", ""])
    assert tokens.dtype == np.int32
    expected = [
        [IDS["▁a"], IDS["▁red"], IDS["▁square"], 1, 0, 0],
        [IDS["▁cat"], 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
    ]
    np.testing.assert_array_equal(tokens, expected)


def test_ids_and_mask_are_those_of_transformers(folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="</s>", pad_token="<pad>"
    )
    texts = ["a red square of cat", "", "  two   spaces ", "Übergröße 🍎", "a </s> cat", "a <pad>b"]
    expected = theirs(texts, padding="max_length", max_length=24, return_tensors="np")
    tokens = T5Tokenizer(folder, 24).encode(texts)
    np.testing.assert_array_equal(tokens, expected.input_ids)
    np.testing.assert_array_equal(text_mask(tokens), expected.attention_mask)
    np.testing.assert_array_equal(text_mask(jnp.asarray(tokens)), expected.attention_mask)


def test_a_long_caption_keeps_its_beginning_and_its_end_token(folder):
    tokenizer = T5Tokenizer(folder, 4)
    with pytest.warns(UserWarning, match="1 of 2 captions are longer than 4 tokens") as caught:
        tokens = tokenizer.encode(["a red square disc dog", "a red square"])
    assert '(6 tokens, kept to "...a red square")' in str(caught[0].message)
    np.testing.assert_array_equal(tokens[0], tokens[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer.encode(["a red square"])  # exactly full


def test_a_file_that_asks_for_cutting_and_padding_is_not_obeyed(folder, tmp_path):
    model = t5_folder.unigram()
    model.enable_truncation(2)
    model.enable_padding(length=9)
    model.save(str(tmp_path / "tokenizer.json"))
    texts = ["a red square disc", "dog"]
    expected = T5Tokenizer(folder, 7).encode(texts)
    np.testing.assert_array_equal(T5Tokenizer(tmp_path, 7).encode(texts), expected)


def without(name):
    """A tokenizer.json in which a special token goes by another name."""
    return t5_folder.unigram().to_str().replace(name, "<other>")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "tokenizer.json: missing; copy it"),
        ("", "cannot be read"),
        ("{}", "cannot be read"),
        (json.dumps({"model": 3}), "cannot be read"),
        (without("</s>"), "</s> has id None, expected 1; give the folder of a T5"),
        (without("<pad>"), "<pad> has id None, expected 0; give the folder of a T5"),
    ],
    ids=["none", "empty", "no model", "wrong model", "no end", "no padding"],
)
def test_a_folder_without_a_t5_tokenizer_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        T5Tokenizer(tmp_path, 8)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_sentencepiece_model_alone_says_how_to_convert_it(tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"\x0a")
    with pytest.raises(UserError, match=r"make it of spiece.model.*save_pretrained"):
        T5Tokenizer(tmp_path, 8)


def test_wrong_arguments_are_named(folder, tmp_path):
    with pytest.raises(UserError, match="context_length: got 1, expected an integer, 2 or more"):
        T5Tokenizer(folder, 1)
    with pytest.raises(UserError, match=r"nowhere.*no such folder"):
        T5Tokenizer(tmp_path / "nowhere", 8)
    with pytest.raises(UserError, match=r"expected a list of strings; give \[text\]"):
        T5Tokenizer(folder, 8).encode("a red square")
