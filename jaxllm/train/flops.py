"""What a trained token costs and what a device can do: the two halves of model FLOPs utilisation (MFU).

The rule, after PaLM (arXiv:2204.02311 appendix B) except that causal attention is counted half:
- a multiply-add is 2 FLOPs, and the backward pass costs twice the forward pass: 6 FLOPs for each trained token and
  each parameter of a matrix product, the output head included, the embedding lookup not, and of a mixture of experts
  those that a token selects, dropped or not;
- scores and weighted values cost 6 * heads * (query-key width + value width) FLOPs for each query and visible key;
  a causal query sees half of the row on average, or less with a window;
- what rematerialisation computes again is not counted, and a packed row counts as one document.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxllm.nn.model import count_matmul_params
from jaxllm.spec import MLA, ModelSpec

_PEAK_TFLOPS = {
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 920.0,
    "TPU v6e": 920.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H200": 989.0,
    "NVIDIA B200": 2250.0,
}
"""Dense bf16 TFLOP/s of one device, as the vendors state them, by jax's `Device.device_kind`."""


def peak_flops(device_kind: str) -> float | None:
    """Return the peak bf16 FLOP/s of a device, or None for a kind we do not know."""
    tflops = _PEAK_TFLOPS.get(device_kind)
    return None if tflops is None else tflops * 1e12


def model_flops_per_token(spec: ModelSpec, seq_len: int) -> float:
    """Return the FLOPs of one trained token of a model in rows of `seq_len` tokens."""
    attention = spec.attention
    if isinstance(attention, MLA):
        widths = attention.qk_nope_head_dim + attention.qk_rope_head_dim, attention.v_head_dim
    else:
        widths = attention.head_dim, attention.head_dim
    return train_flops_per_token(
        count_matmul_params(spec), spec.num_layers, attention.num_heads, *widths, seq_len, spec.window
    )


def train_flops_per_token(
    num_matmul_params: int,
    num_layers: int,
    num_heads: int,
    head_dim_qk: int,
    head_dim_v: int,
    seq_len: int,
    windows: Sequence[int | None] | None = None,
) -> float:
    """Return the FLOPs of one trained token, forward and backward.

    Args:
      num_matmul_params: parameters used in matrix products (a tied head counts once, as the head).
      windows: tokens that each layer's attention sees, lowest layer first; None sees the whole row.
    """
    windows = windows if windows is not None else [None] * num_layers
    if len(windows) != num_layers:
        raise ValueError(f"windows: expected one for each of {num_layers} layers, got {len(windows)}")
    visible = sum(_mean_visible_keys(seq_len, window) for window in windows)
    return 6.0 * num_matmul_params + 6.0 * num_heads * (head_dim_qk + head_dim_v) * visible


def _mean_visible_keys(seq_len: int, window: int | None) -> float:
    """Mean over a row's queries of the keys they see: seq_len / 2 under the causal mask alone."""
    window = seq_len if window is None else min(window, seq_len)
    return window - window**2 / (2 * seq_len)
