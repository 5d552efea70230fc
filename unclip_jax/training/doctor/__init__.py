"""What is wrong with a training run, in words: `unclip doctor --workdir DIR`.

`workdir` reads what train.py left there, `theory` says what loss a network that has learned nothing
would have, and four modules look for faults: `settings` (in what was asked for), `files` (lock,
checkpoints, disk, CLIP), `curves` (what was logged) and `weights` (what the networks do).
"""
