"""CLIP embeddings of a data set, computed once and stored."""
