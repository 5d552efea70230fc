"""Ours beside diffusers on PyTorch, in turn: `python -m benchmarks.peers`, or `make bench`.

`sizes` says what is compared, `ours` and `theirs` do the same work, each in a process of its own
(`worker`), and `__main__` asks them in turn and writes the table.
"""
