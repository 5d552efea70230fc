"""From a folder of pictures to a model that draws, by one command: `unclip train-all`."""
