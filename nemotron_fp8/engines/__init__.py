"""Engines: the CPU and CUDA implementations of amax, scale and cast."""
