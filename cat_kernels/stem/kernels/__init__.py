"""Triton kernels of the stem, each in a module of its own with the functions that launch it."""
