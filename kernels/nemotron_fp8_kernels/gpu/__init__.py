"""Triton kernels for Hopper. This package imports triton; the CPU path does not."""
