"""Public weights: files of other libraries to our model folders and back, without PyTorch."""
