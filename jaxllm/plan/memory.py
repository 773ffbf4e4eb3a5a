"""What one device's main memory is filled with."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxllm.plan.compile import local_bytes
from jaxllm.plan.hlo import Module, parse_hlo
from jaxllm.plan.types import CompiledStep
from jaxllm.spec import ModelSpec


@dataclasses.dataclass(frozen=True)
class MemorySplit:
    """Bytes of one device during a training step; together they are what the compiler says the step needs.

    Attributes:
      params, optimizer: as their shardings say. frozen: so too, what is read and not trained: the weights beside which
        an adapter stands, a reference.
      gradients: as the shardings of the parameters say; twice that where microbatches are summed.
      activations: what the forward pass keeps of each layer for the backward pass, read from the loop over layers.
      temporaries: the rest: gathered weights, logits, the work within a layer.
      other: batch, metrics and the program.
      limit: bytes that a program may use.
    """

    params: int
    optimizer: int
    frozen: int
    gradients: int
    activations: int
    temporaries: int
    other: int
    limit: int

    @property
    def total(self) -> int:
        """Bytes that the step needs."""
        return sum(getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "limit")

    @property
    def exceeded(self) -> int:
        """Bytes that are too many; 0 where it fits."""
        return max(0, self.total - self.limit)

    @property
    def fits(self) -> bool:
        """Whether the step fits the device."""
        return self.exceeded == 0


def split_memory(step: CompiledStep) -> MemorySplit:
    """Divide what the compiler says a step needs.

    Of a step that does not fit there is no compiled module: all that lives within the step is in `temporaries` then.
    """
    params, optimizer = local_bytes(step.state.params), local_bytes(step.state.opt_state)
    frozen = local_bytes((step.frozen, step.state.reference))
    weights = (step.state.params, step.frozen)
    activations = kept_activations(parse_hlo(step.hlo), step.spec, weights) if step.hlo else 0
    sums = 2 if step.config.train.grad_accum > 1 else 1
    gradients = min(params * sums, step.memory.temporaries) if step.hlo else 0
    # What a policy and a value model keep does not live at once, where one goes back before the other starts.
    activations = min(activations, step.memory.temporaries - gradients)
    left = step.memory.temporaries - activations
    return MemorySplit(
        params=params,
        optimizer=optimizer,
        frozen=frozen,
        gradients=gradients,
        activations=activations,
        temporaries=left - gradients,
        other=step.memory.total - step.memory.temporaries - params - optimizer - frozen,
        limit=step.topology.chip.hbm_bytes,
    )


def kept_activations(module: Module, spec: ModelSpec, params: Any) -> int:
    """Return the bytes that the backward pass's loops over layers are given, one piece for each layer.

    Arrays of the shape of a parameter are weights or gradients; those in on-chip memory do not count.

    Args:
      params: shapes and shardings.
    """
    shapes = {leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(params)}
    groups = {group.stop - group.start for group in spec.layer_groups} - {1}
    loops = (
        each
        for computation in module.computations.values()
        for each in computation.instructions.values()
        if each.opcode == "while" and "transpose(" in each.op_name and "Decoder" in each.op_name
    )
    return sum(
        array.nbytes
        for loop in loops
        for array in loop.arrays
        if array.dims and array.dims[0] in groups and array.dims not in shapes and array.space == 0
    )
