"""What a run would cost on a TPU pod that is not there: `unclip plan`.

The TPU compiler needs no TPU: the real train step and sampler are compiled for a topology, and
their memory, bytes and collectives are read off the compiled programs.
"""
