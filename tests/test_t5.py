"""A frozen T5 from a folder as transformers saves it, and batches that carry its states."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from tests import t5_folder
from tests.networks import relative_error
from unclip_jax.data import batches, datasets
from unclip_jax.data.datasets import DataConfig
from unclip_jax.errors import UserError
from unclip_jax.weights.t5 import T5

CAPTIONS = ["a red square", "", "cat face of a blue dog"]
LENGTH = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return t5_folder.write(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def t5(folder):
    return T5.load(folder, LENGTH)


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the folder that a test may break."""
    return shutil.copytree(folder, tmp_path / "copy")


# ---------------------------------------------------------------- folders that transformers saves


@pytest.fixture(scope="module")
def theirs():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = t5_folder.SETTINGS | {"feed_forward_proj": "relu", "num_decoder_layers": 1}
    del settings["model_type"]
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**settings)).eval()


@pytest.mark.parametrize("form", ["encoder", "whole", "shards", "torch", "old torch names"])
def test_states_are_those_of_transformers(theirs, form, tmp_path):
    torch, transformers = map(pytest.importorskip, ("torch", "transformers"))
    encoder = transformers.T5EncoderModel(theirs.config).eval()
    encoder.load_state_dict(theirs.state_dict(), strict=False)
    if form == "encoder":
        encoder.save_pretrained(tmp_path)
    elif form == "torch":
        theirs.config.save_pretrained(tmp_path)
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    elif form == "old torch names":
        theirs.config.save_pretrained(tmp_path)
        state = encoder.state_dict()
        del state["shared.weight"]
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        theirs.save_pretrained(tmp_path, max_shard_size="20KB" if form == "shards" else "1GB")
        assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (form == "shards")
    t5_folder.unigram().save(str(tmp_path / "tokenizer.json"))

    ours = T5.load(tmp_path, LENGTH)
    found = ours.encode(CAPTIONS)
    tokens = torch.tensor(ours.tokenizer.encode(CAPTIONS)).long()
    with torch.no_grad():
        expected = encoder(tokens, torch.tensor(np.array(found["text_mask"])))[0].numpy()
    assert relative_error(found["text_states"], expected) < 1e-5
    np.testing.assert_array_equal(found["text_mask"].sum(1), [4, 1, 7])


# ---------------------------------------------------------------- what it promises


def test_states_have_the_shapes_that_a_decoder_reads(t5):
    found = t5.encode(CAPTIONS)
    assert found["text_states"].shape == (3, LENGTH, t5.width)
    assert found["text_states"].dtype == jnp.float32
    assert found["text_mask"].dtype == bool


def test_a_caption_has_the_same_states_in_any_company(t5):
    together = t5.encode(CAPTIONS)["text_states"]
    alone = t5.encode(CAPTIONS[2:])["text_states"]
    np.testing.assert_allclose(together[2:], alone, atol=1e-6)


def test_the_fingerprint_is_of_the_stored_weights(folder, t5, copy):
    half = T5.load(folder, LENGTH, dtype="bfloat16")
    assert half.fingerprint == t5.fingerprint
    dtypes = {
        path[-1].key: leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(half.params)
    }
    assert dtypes == {
        "kernel": jnp.bfloat16,
        "embedding": jnp.bfloat16,
        "scale": jnp.float32,
        "relative_bias": jnp.float32,
    }
    exact, rounded = (x.encode(CAPTIONS)["text_states"] for x in (t5, half))
    assert 0 < relative_error(rounded, exact) < 0.05

    weights = load_file(copy / "model.safetensors")
    weights["encoder.final_layer_norm.weight"][0] += 1e-6
    save_file(weights, copy / "model.safetensors")
    assert T5.load(copy, LENGTH).fingerprint != t5.fingerprint


def test_batches_carry_the_states_of_their_captions_and_resume(t5, tmp_path):
    for i, caption in enumerate(["a red square", "a dog", "blue disc", "cat"]):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(caption)
    data = DataConfig(name=str(tmp_path), split="all", image_size=8)
    pairs = datasets.load(data)

    def stream():
        return batches.batches(pairs, data, seed=0, batch_size=3, encoder=t5)

    feed = stream()
    first, state = next(feed), feed.get_state()
    captions = [pairs[int(i)]["caption"] for i in first["index"]]
    expected = t5.encode(captions)
    np.testing.assert_array_equal(first["tokens"], t5.tokenizer.encode(captions))
    np.testing.assert_allclose(first["text_states"], expected["text_states"], atol=1e-6)
    np.testing.assert_array_equal(first["text_mask"], expected["text_mask"])
    second, again = next(feed), stream()
    again.set_state(json.loads(json.dumps([state])))
    resumed = next(again)
    for name in second:
        np.testing.assert_array_equal(resumed[name], second[name], err_msg=name)


# ---------------------------------------------------------------- folders that hold no T5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "model_type: got 'bert', expected t5 or mt5"),
        (
            {"feed_forward_proj": "gated-silu"},
            "_proj: got 'gated-silu', expected one of relu",
        ),
        ({"dense_act_fn": "relu"}, r"dense_act_fn: got \(True, 'relu'\), expected .* 'gelu_new'"),
        ({"is_gated_act": False}, r"is_gated_act and dense_act_fn: got \(False, 'gelu_new'\)"),
        ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon: got 1e-05, expected one of 1e-06"),
        ({"d_model": None}, "shared.weight is float32.128, 16., expected float32.128, 512."),
        ({"d_model": "16"}, "transformers refuses it .*Field 'd_model' expected int, got str"),
        ({"num_layers": 3}, "the tensors do not fit: 9 missing"),
        ({"d_ff": 25}, "of another shape"),
        ({"vocab_size": 20}, "tokenizer.json has 44 ids, but the embedding table 20 rows"),
    ],
)
def test_settings_of_another_network_are_named(copy, change, message):
    settings = {k: v for k, v in (t5_folder.SETTINGS | change).items() if v is not None}
    (copy / "config.json").write_text(json.dumps(settings))
    if "vocab_size" in change:
        weights = load_file(copy / "model.safetensors")
        weights["shared.weight"] = weights["shared.weight"][:20]
        save_file(weights, copy / "model.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        T5.load(copy, LENGTH)
    assert "\n" not in str(caught.value)


def test_an_embedding_under_both_names_is_one(copy):
    weights = load_file(copy / "model.safetensors")
    mark = T5.load(copy, LENGTH).fingerprint
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"].copy()
    save_file(weights, copy / "model.safetensors")
    assert T5.load(copy, LENGTH).fingerprint == mark
    weights["encoder.embed_tokens.weight"][3] += 1
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(UserError, match=r"shared.weight and .*embed_tokens.weight differ"):
        T5.load(copy, LENGTH)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "config.json: missing"),
        ("config.json", b"{", "config.json: cannot be read"),
        ("config.json", b"[1]", "config.json: holds a list"),
        ("config.json", b"\xff\xfe", "config.json: cannot be read"),
        ("model.safetensors", None, "no weights, found .*; expected model.safetensors"),
        ("model.safetensors", b"", "model.safetensors"),
        ("tokenizer.json", None, "tokenizer.json: missing"),
    ],
)
def test_a_damaged_folder_is_named(copy, name, content, message):
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        T5.load(copy, LENGTH)
    assert str(copy) in str(caught.value)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.*no such folder"):
        T5.load(tmp_path / "nowhere", LENGTH)
