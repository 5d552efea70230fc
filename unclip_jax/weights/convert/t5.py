"""T5's encoder from a folder as Hugging Face keeps it: `config.json` beside the weights.

The weights may be those of the whole T5, whose decoder is left out, or of the encoder alone; in
safetensors or PyTorch's format; in one file or in shards with an index.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.common import checks
from unclip_jax.errors import UserError
from unclip_jax.models.t5 import T5Config, T5Encoder
from unclip_jax.weights.convert.folders import weights_in
from unclip_jax.weights.convert.huggingface import CONFIG_FILE, read_config
from unclip_jax.weights.convert.tables import Params, Row, row, to_ours
from unclip_jax.weights.convert.tensor_files import Tensors, open_tensors

# By their field and by what transformers makes of all fields: whether it is gated, and by what.
_PERCEPTRONS = {"relu": "relu", "gated-gelu": "gated_gelu"}
_COMPUTED = {"relu": (False, "relu"), "gated-gelu": (True, "gelu_new")}


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


def t5_config(path: Path, dtype: str = "float32") -> T5Config:
    """Our config of a T5's `config.json`; `dtype` is the compute dtype.

    Raises:
        UserError: the settings are no T5's, or of one with other parts than ours.
    """
    found = read_config(path, ("t5", "mt5"))
    kind = checks.choice(f"{path}: feed_forward_proj", found.feed_forward_proj, _PERCEPTRONS)
    computed = found.is_gated_act, found.dense_act_fn
    checks.choice(f"{path}: is_gated_act and dense_act_fn", computed, (_COMPUTED[kind],))
    checks.choice(f"{path}: layer_norm_epsilon", found.layer_norm_epsilon, (1e-6,))
    return T5Config(
        vocab_size=found.vocab_size,
        width=found.d_model,
        layers=found.num_layers,
        heads=found.num_heads,
        head_dim=found.d_kv,
        mlp_width=found.d_ff,
        perceptron=_PERCEPTRONS[kind],
        buckets=found.relative_attention_num_buckets,
        max_distance=found.relative_attention_max_distance,
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
        expected = f"one with {CONFIG_FILE}, model.safetensors and tokenizer.json"
        such = "such as a copy of google/t5-v1_1-small"
        raise UserError(f"T5 {str(folder)!r}: no such folder; expected {expected}, {such}")
    config = t5_config(folder / CONFIG_FILE, dtype)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 1), bool)
    target = jax.eval_shape(T5Encoder(config).init, jax.random.key(0), tokens, mask)["params"]
    with open_tensors(weights_in(folder)) as whole:
        return config, to_ours(t5_table(config), encoder_tensors(whole), target)


def encoder_tensors(tensors: Tensors) -> Tensors:
    """Those of the encoder among a T5's tensors, each once.

    The decoder and the output layer are left out. The embedding goes by the name "shared.weight",
    by "encoder.embed_tokens.weight", or by both, as the two are one.

    Raises:
        UserError: they are not one.
    """
    has_shared = "shared.weight" in tensors.shapes
    names = [n for n in ("shared.weight", "encoder.embed_tokens.weight") if n in tensors.shapes]
    if len(names) == 2 and not np.array_equal(*(tensors.read(name) for name in names)):
        raise UserError(f"{tensors.origin}: {' and '.join(names)} differ, expected one embedding")

    def choose(name: str) -> str | None:
        if name == "encoder.embed_tokens.weight":
            return None if has_shared else "shared.weight"
        return None if name.startswith(("decoder.", "lm_head.")) else name

    return tensors.select(choose)
