"""Memory and time of a step by arithmetic alone: what a search throws away candidates by, before it compiles any.

A step that is compiled is judged by its compiler; nothing here is reported of it. The formulas count what a decoder
layer keeps, gathers and sums; constants are named, and were fitted to compiled steps.
"""

from __future__ import annotations

import dataclasses
import math

from jaxllm.config import RunConfig
from jaxllm.nn.model import count_matmul_params
from jaxllm.plan.estimate import HBM_EFFICIENCY, LINK_EFFICIENCY, MATMUL_EFFICIENCY
from jaxllm.plan.network import torus_wraps
from jaxllm.plan.topology import Topology
from jaxllm.spec import MLA, ModelSpec
from jaxllm.train.flops import model_flops_per_token
from jaxllm.train.forward import default_chunk

_GPUS_IN_HOST = 8
_LAYERS_AT_ONCE = 3
"""Layers whose whole weights or gradients exist at once: in use, fetched ahead, and on their way out."""
_TABLE_BYTES = 8
"""For each value of embedding and head: gathered in bf16, and its gradient, as both seldom live at once."""
_LOGIT_BYTES = 10
"""For each logit of a chunk: itself and its gradient in float32, and once in bf16."""
_OPTIMIZER_BYTES = 28
"""Moved for each parameter by AdamW: parameter and two moments read and written, the gradient read."""
_SEEN = 0.1
"""Share of what goes on beside the limiting work that is felt all the same."""
_PASSES = 3
"""How often what a layer works on crosses the memory: written, and read forward and backward."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a candidate divides the work.

    Attributes:
      replica, fsdp, expert, tensor: ways. microbatches: of a step.
      params: parameters of the model on one device, which are gathered.
      trained: those that have an optimizer; None: all. frozen: bytes of what is held beside them.
    """

    replica: int
    fsdp: int
    expert: int
    tensor: int
    microbatches: int
    params: int
    trained: int | None = None
    frozen: int = 0

    @property
    def updated(self) -> int:
        """Parameters on one device that have an optimizer."""
        return self.params if self.trained is None else self.trained

    @property
    def ways(self) -> int:
        """Ways that rows are split."""
        return self.replica * self.fsdp * self.expert


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Bytes that one device needs, seconds of a step, and the limit that takes most of them."""

    memory_bytes: int
    step_s: float
    binding: str


def predict(config: RunConfig, spec: ModelSpec, topology: Topology, layout: Layout) -> Prediction:
    """Predict a training step."""
    rows = config.train.batch_size // layout.ways // layout.microbatches
    tokens = rows * config.data.seq_len
    seconds = _seconds(config, spec, topology, layout, tokens)
    # Sums along the tensor and expert axes are waited for; the rest goes on side by side, most of it.
    beside = [seconds["compute"], seconds["hbm"], seconds["ici"]]
    together = (1 - _SEEN) * max(beside) + _SEEN * sum(beside)
    step = together + seconds["tensor"] + seconds["expert"] + seconds["dcn"]
    return Prediction(_memory(config, spec, layout, tokens), step, max(seconds, key=lambda each: seconds[each]))


def _memory(config: RunConfig, spec: ModelSpec, layout: Layout, tokens: int) -> int:
    per_layer = kept_per_token(config, spec, layout.tensor)
    dense, experts = _layer_params(spec)
    layer = (dense + experts // layout.expert) // layout.tensor
    table = spec.vocab_size * spec.hidden_size // layout.tensor
    columns, rows = spec.vocab_size // layout.tensor, tokens // config.data.seq_len
    positions = default_chunk(rows, config.data.seq_len, columns)
    logits = rows * (config.train.loss_chunk or positions) * columns * _LOGIT_BYTES
    state = layout.updated * 4 * (4 + (layout.microbatches > 1)) + layout.frozen
    within = tokens * working_per_token(config, spec, layout.tensor) + _LAYERS_AT_ONCE * 2 * layer
    return state + tokens * per_layer * spec.num_layers + max(within, logits) + _TABLE_BYTES * table


def _layer_params(spec: ModelSpec) -> tuple[int, int]:
    """Return the parameters in matrices of the largest layer: (what every token uses, what its experts have)."""
    active = (count_matmul_params(spec) - spec.vocab_size * spec.hidden_size) // spec.num_layers
    if spec.moe is None:
        return active, 0
    expert = 3 * spec.hidden_size * spec.moe.moe_intermediate_size
    return max(0, active - expert * spec.moe.num_experts_per_tok), expert * spec.moe.num_experts


def _widths(config: RunConfig, spec: ModelSpec) -> dict[str, int]:
    """Return for one token the widths of a layer's projections, and of its scores where they are written down."""
    attention, moe = spec.attention, spec.moe
    if isinstance(attention, MLA):
        query = attention.num_heads * (attention.qk_nope_head_dim + attention.qk_rope_head_dim)
        value = attention.num_heads * attention.v_head_dim
        projections = 2 * query + value + attention.kv_lora_rank + (attention.q_lora_rank or 0)
    else:
        value = attention.num_heads * attention.head_dim
        projections = value + 2 * attention.num_kv_heads * attention.head_dim
    inner = spec.mlp.intermediate_size
    if moe is not None:
        inner = moe.moe_intermediate_size * (moe.num_experts_per_tok + moe.num_shared_experts)
    scores = attention.num_heads * config.data.seq_len if config.model.attention_impl == "reference" else 0
    return {"projections": projections, "value": value, "inner": inner, "scores": scores}


def kept_per_token(config: RunConfig, spec: ModelSpec, tensor: int) -> int:
    """Return the bytes that one layer keeps of one token for the backward pass."""
    width, hidden = _widths(config, spec), 2 * spec.hidden_size
    if config.model.remat == "full":
        return hidden
    if config.model.remat == "none":
        return hidden + working_per_token(config, spec, tensor)
    products = 2 * (width["projections"] + 2 * width["inner"])
    if config.model.remat == "dots":
        products += 2 * width["value"] + 4 * width["scores"]
    return 2 * hidden + products // tensor


def working_per_token(config: RunConfig, spec: ModelSpec, tensor: int) -> int:
    """Return the bytes that one layer works on for one token."""
    width = _widths(config, spec)
    split = 2 * (width["projections"] + 2 * width["value"] + 6 * width["inner"]) + 10 * width["scores"]
    return 18 * spec.hidden_size + split // tensor


def _seconds(config: RunConfig, spec: ModelSpec, topology: Topology, layout: Layout, tokens: int) -> dict[str, float]:
    chip, times = topology.chip, layout.microbatches
    again = 4 / 3 if config.model.remat == "full" else 1.0
    flops = tokens * times * model_flops_per_token(spec, config.data.seq_len) / layout.tensor
    dense, experts = _layer_params(spec)
    whole = layout.params * layout.fsdp * layout.expert
    # As gathered, in bf16: of the experts, each device along that axis has its own.
    weights = 2 * whole * (dense + experts / layout.expert) / (dense + experts)
    moved = times * (tokens * working_per_token(config, spec, layout.tensor) * spec.num_layers * _PASSES + 3 * weights)
    hidden = 2 * tokens * spec.hidden_size
    sums = spec.num_layers * times * (6 if config.model.remat == "full" else 4)
    ici = chip.ici_bandwidth * LINK_EFFICIENCY * _links(topology)
    seconds = {
        "compute": flops * again / (chip.flops * MATMUL_EFFICIENCY),
        "hbm": (moved + _OPTIMIZER_BYTES * layout.updated) / (chip.hbm_bandwidth * HBM_EFFICIENCY),
        # Gathered for both passes, and the gradients scattered.
        "ici": 3 * times * weights * _share(layout.fsdp * layout.expert) / ici,
        "tensor": sums * 2 * hidden * _share(layout.tensor) / ici,
        "expert": sums * hidden * (layout.expert - 1) / ici if spec.moe else 0.0,
        "dcn": 0.0,
    }
    gradients = 2 * 4 * layout.updated * _share(layout.replica)
    islands = max(_hosts(topology), topology.num_slices)
    if islands == 1:
        return seconds | {"ici": seconds["ici"] + gradients / ici}
    inside = topology.num_devices // islands
    crossing = 3 * times * weights / inside if layout.fsdp * layout.expert > inside else 0.0
    return seconds | {"dcn": (gradients + crossing) / (chip.dcn_bandwidth * LINK_EFFICIENCY)}


def _share(ways: int) -> float:
    return (ways - 1) / ways


def _hosts(topology: Topology) -> int:
    """Return the hosts of GPUs; a TPU slice is one network whatever its hosts."""
    return math.ceil(topology.num_chips / _GPUS_IN_HOST) if topology.chip.platform == "cuda" else 1


def _links(topology: Topology) -> int:
    """Return the links that a collective along one dimension of the torus uses."""
    chip = topology.chip
    if chip.platform == "cuda":
        return 1
    dims = (*topology.dims, 1, 1)[:3]
    return 2 if any(torus_wraps(chip.name, dims)) else 1
