"""Triton kernels and the microbenchmarks; imported as eekd.kernels."""
