"""What is wrong with a training run, in words: `unclip doctor --workdir DIR`.

`workdir` reads what train.py left, `theory` says what a network that has learned nothing would do,
and four modules look for faults: `settings`, `files` (on disk), `curves` (of the log), `weights`.
"""
