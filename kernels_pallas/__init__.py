"""Attention and grouped matrix products as Pallas kernels for TPU and GPU; imports nothing but jax."""

from kernels_pallas.decode_attention import decode_attention
from kernels_pallas.flash_attention import flash_attention
from kernels_pallas.grouped_matmul import grouped_matmul
from kernels_pallas.options import BlockSizes

__all__ = ["BlockSizes", "decode_attention", "flash_attention", "grouped_matmul"]
