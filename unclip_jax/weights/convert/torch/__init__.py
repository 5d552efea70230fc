"""PyTorch's file formats, read without PyTorch and without unpickling."""
