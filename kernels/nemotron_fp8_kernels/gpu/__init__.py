"""Triton kernels for Hopper. Importing this package imports triton; the CPU path never does."""
