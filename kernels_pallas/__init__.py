"""Attention and grouped matrix products as Pallas kernels for TPU and GPU; imports nothing but jax."""
