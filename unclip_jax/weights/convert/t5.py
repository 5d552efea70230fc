"""T5's encoder from a folder as Hugging Face keeps it: `config.json` beside the weights.

The weights may be those of the whole T5, whose decoder is left out, or of the encoder alone; in
safetensors or PyTorch's format; in one file or in shards with an index.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from unclip_jax.errors import UserError
from unclip_jax.models.t5 import T5Config, T5Encoder
from unclip_jax.weights.convert.folders import read_json, weights_in
from unclip_jax.weights.convert.tables import Params, Row, Tensors, row, to_ours
from unclip_jax.weights.convert.tensor_files import open_tensors

CONFIG_FILE = "config.json"

# Their name of each field of ours that is a size.
_SIZES = {
    "vocab_size": "vocab_size",
    "width": "d_model",
    "layers": "num_layers",
    "heads": "num_heads",
    "head_dim": "d_kv",
    "mlp_width": "d_ff",
}
# Fields that the first T5's config.json lacks, and what the code then took.
_LATER = {
    "feed_forward_proj": "relu",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
}
_PERCEPTRONS = {"relu": "relu", "gated-gelu": "gated_gelu"}


def t5_table(config: T5Config) -> list[Row]:
    """transformers' T5EncoderModel, its embedding under the name "shared" only."""
    blocks, theirs = "blocks", "encoder.block.{i}.layer"
    attention, perceptron = f"{theirs}.0.SelfAttention", f"{theirs}.1.DenseReluDense"
    into = ("wi_0", "wi_1") if config.perceptron == "gated_gelu" else ("wi",)
    first = "encoder.block.0.layer.0.SelfAttention"  # the one that has the bias of all
    return [
        row("embedding", "tokens", "shared"),
        row("array", "relative_bias", f"{first}.relative_attention_bias.weight"),
        row("rms_norm", f"{blocks}/norm_1", f"{theirs}.0.layer_norm"),
        row("projection", f"{blocks}/qkv", *(f"{attention}.{x}" for x in "qkv")),
        row("projection_output", f"{blocks}/out", f"{attention}.o"),
        row("rms_norm", f"{blocks}/norm_2", f"{theirs}.1.layer_norm"),
        row("projection", f"{blocks}/up", *(f"{perceptron}.{x}" for x in into)),
        row("projection", f"{blocks}/down", f"{perceptron}.wo"),
        row("rms_norm", "norm_out", "encoder.final_layer_norm"),
    ]


def t5_config(settings: Mapping[str, Any], origin: str, dtype: str = "float32") -> T5Config:
    """Our config from the settings in a T5's `config.json`.

    Args:
      settings: what the file holds.
      origin: the file's name, for messages.
      dtype: compute dtype, which the file does not say.

    Raises:
      UserError: the settings are no T5's, or of one with other parts than ours.
    """
    missing = [name for name in ("model_type", *_SIZES.values()) if name not in settings]
    if missing:
        raise UserError(f"{origin}: without {', '.join(missing)}; expected the config.json of a T5")
    settings = _LATER | dict(settings)
    allowed = {
        "model_type": ("t5", "mt5"),
        "feed_forward_proj": tuple(_PERCEPTRONS),
        "layer_norm_epsilon": (1e-6,),
    }
    for name, values in allowed.items():
        if settings[name] not in values:
            raise UserError(
                f"{origin}: {name} is {settings[name]!r}, expected"
                f" {' or '.join(map(str, values))}; give the folder of a T5 or T5 v1.1"
            )
    return T5Config(
        **{ours: settings[theirs] for ours, theirs in _SIZES.items()},
        perceptron=_PERCEPTRONS[settings["feed_forward_proj"]],
        buckets=settings["relative_attention_num_buckets"],
        max_distance=settings["relative_attention_max_distance"],
        dtype=dtype,
    )


def load_t5(folder: str | Path, dtype: str = "float32") -> tuple[T5Config, Params]:
    """Read a T5's encoder.

    Args:
      folder: holds `config.json` and the weights, see `folders.weights_in`.
      dtype: compute dtype of the config returned; the weights keep the dtype of their file.

    Returns:
      the config, and params as nested dicts of NumPy arrays.

    Raises:
      UserError: no such folder or file, a damaged one, or not a T5's.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"T5 {str(folder)!r}: no such folder; expected one with {CONFIG_FILE},"
            f" model.safetensors and tokenizer.json, such as a copy of google/t5-v1_1-small"
        )
    config = t5_config(read_json(folder / CONFIG_FILE), str(folder / CONFIG_FILE), dtype)
    weights = weights_in(folder)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 1), bool)
    target = jax.eval_shape(T5Encoder(config).init, jax.random.key(0), tokens, mask)["params"]
    with open_tensors(weights) as source:
        whole = Tensors(source.shapes, source.read, str(weights))
        return config, to_ours(t5_table(config), encoder_tensors(whole), target)


def encoder_tensors(tensors: Tensors) -> Tensors:
    """Those of the encoder among a T5's tensors, each once.

    The decoder and the output layer are left out. The embedding goes by the name "shared.weight",
    by "encoder.embed_tokens.weight", or by both, as the two are one.
    """
    has_shared = "shared.weight" in tensors.shapes

    def choose(name: str) -> str | None:
        if name == "encoder.embed_tokens.weight":
            return None if has_shared else "shared.weight"
        return None if name.startswith(("decoder.", "lm_head.")) else name

    return tensors.select(choose)
