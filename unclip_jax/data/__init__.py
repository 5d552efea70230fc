"""Data sets, the tokenizer, batches, and stored embeddings."""
