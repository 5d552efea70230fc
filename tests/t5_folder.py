"""A T5 small enough to make in a test, in a folder as users have it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import save_file

from tests.networks import random_params
from unclip_jax.models.t5 import T5Config, T5Encoder
from unclip_jax.weights.convert.t5 import t5_table
from unclip_jax.weights.convert.tables import to_theirs

WORDS = ["a", "red", "green", "blue", "black", "square", "disc", "dog", "cat", "face", "of"]
SPECIAL = ["<pad>", "</s>", "<unk>"]
CONFIG = T5Config(
    vocab_size=128, width=16, layers=2, heads=2, head_dim=4, mlp_width=24, buckets=8, max_distance=9
)
SETTINGS = {
    "model_type": "t5",
    "vocab_size": CONFIG.vocab_size,
    "d_model": CONFIG.width,
    "d_kv": CONFIG.head_dim,
    "d_ff": CONFIG.mlp_width,
    "num_layers": CONFIG.layers,
    "num_heads": CONFIG.heads,
    "relative_attention_num_buckets": CONFIG.buckets,
    "relative_attention_max_distance": CONFIG.max_distance,
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-6,
}


def unigram() -> tokenizers.Tokenizer:
    """A unigram model of the words, and of the letters that spell all others, as T5's file is."""
    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    pieces = [(name, 0.0) for name in SPECIAL] + [(f"▁{word}", -2.0) for word in WORDS]
    pieces += [("▁", -3.0), *((letter, -6.0) for letter in letters + list("</>"))]
    model = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2, byte_fallback=False))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    model.decoder = tokenizers.decoders.Metaspace()
    model.add_special_tokens(SPECIAL)
    end = [("</s>", 1)]
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single=["$0", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=end
    )
    return model


def tensors() -> dict[str, np.ndarray]:
    """Random weights under their names."""
    tokens = np.zeros((1, 2), np.int32)
    params = random_params(T5Encoder(CONFIG), tokens, tokens == 0)
    theirs = to_theirs(t5_table(CONFIG), params)
    return {name: theirs.read(name) for name in theirs.shapes}


def write(folder: Path) -> Path:
    """The folder: config.json, model.safetensors and tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SETTINGS))
    save_file(tensors(), folder / "model.safetensors")
    unigram().save(str(folder / "tokenizer.json"))
    return folder
