"""The CUDA engine: overlapping reads, copies, kernels and writes.

``schedule`` decides which bytes are read when and where they lie (pure), ``memory_plan`` sizes the buffers, ``device``
wraps copies, events and kernels, ``ring`` holds slots and threads, ``pipeline`` runs one pass, ``engine`` runs shards.
"""
