"""Data sets, the tokenizer, batches, and stored embeddings."""

from unclip_jax.data.datasets import DataConfig, load

__all__ = ["DataConfig", "load"]
