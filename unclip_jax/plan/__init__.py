"""What a run would cost on a TPU pod that is not there: `unclip plan`.

The TPU compiler needs no TPU. The real train step and the real sampler are compiled for a named
topology, and the compiled programs are read: memory, bytes, collectives. FLOPs are counted before
compilation, since a compiler counts a loop's body once.
"""
