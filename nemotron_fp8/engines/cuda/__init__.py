"""The CUDA engine: disk to pinned ring to device and back, everything at the same time.

``loads`` decides what is read when and where it lies (pure), ``device`` wraps copies, events and kernels,
``ring`` holds the buffers and the threads together, ``engine`` lets the bytes flow.
"""
