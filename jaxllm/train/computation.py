"""What a run computes, from its configuration and a mesh alone: no data, no tokenizer, and no device but the mesh's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxllm.checkpoint.formats import read_json
from jaxllm.config import RunConfig
from jaxllm.errors import InputError
from jaxllm.families import family_of_config
from jaxllm.families import spec as published_spec
from jaxllm.generate.rollout import Sampler
from jaxllm.nn.param import Initializer, abstract_values, decayed
from jaxllm.sharding.rules import batch_ways, row_sharding
from jaxllm.sharding.staged import is_staged
from jaxllm.spec import LearnedBlock, ModelSpec, spec_from_json
from jaxllm.train.forward import Forward, default_chunk
from jaxllm.train.objectives import OBJECTIVES
from jaxllm.train.objectives.base import Objective
from jaxllm.train.optimizer import make_optimizer
from jaxllm.train.run_models import starting_model
from jaxllm.train.schedule import BatchSizes
from jaxllm.train.spec_changes import change_spec
from jaxllm.train.step import TrainStep, abstract_state, make_train_step
from jaxllm.train.tuning import make_tuning
from jaxllm.types import Batch, Params, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Computation:
    """The training step of a run, and what it is made of.

    Attributes:
      state: shapes, dtypes and shardings of the training state.
      frozen: those of what the step reads besides, or None.
    """

    config: RunConfig
    spec: ModelSpec
    mesh: Mesh
    batch_sizes: BatchSizes
    objective: Objective
    optimizer: optax.GradientTransformation
    initializer: Initializer
    state: TrainState
    frozen: Params | None

    def train_step(self) -> TrainStep:
        """Build the jitted step, see `step.make_train_step`; call it, or lower it, under `jax.set_mesh(self.mesh)`."""
        return make_train_step(self.objective, self.optimizer, self.state, self.mesh, grad_accum=self.microbatches)

    def microbatches(self, batch_size: int) -> int:
        """Return how many microbatches a batch is cut into: as few as have no more rows than those of the largest."""
        ways = batch_ways(self.mesh)
        rows, most = batch_size // ways, max(self.batch_sizes.sizes()) // (ways * self.config.train.grad_accum)
        return next(parts for parts in range(1, rows + 1) if rows % parts == 0 and rows // parts <= most)

    def sampler(self, eos_ids: Sequence[int], **options: Any) -> Sampler:
        """Build what samples the answers of a stage with rollouts; options as those of `generate.rollout.Sampler`.

        Raises:
          InputError: answers that do not fit rows, model or mesh.
        """
        config, rollout = self.config, self.config.rollout
        return Sampler(
            self.spec,
            mesh=self.mesh,
            eos_ids=eos_ids,
            seq_len=config.data.seq_len,
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            compute_dtype=self.objective.forward.compute_dtype,
            attention_impl=config.model.attention_impl,
            batch_size=rollout.batch_size,
            gathers=rollout.gather == "round",
            **options,
        )

    def abstract_batch(self, batch_size: int) -> Any:
        """Return shapes, dtypes and shardings of a global batch."""
        sharding = row_sharding(self.mesh)

        def array(shape: tuple[int, ...], dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        shape = (batch_size, self.config.data.seq_len)
        ids, weights, flags = (array(shape, dtype) for dtype in (jnp.int32, jnp.float32, jnp.bool_))
        rows = Batch(
            tokens=ids,
            targets=ids,
            loss_weights=weights,
            positions=ids,
            segment_ids=ids,
            block_positions=ids if self.spec.uses_block_positions else None,
            prefix_mask=flags if self.spec.mask == "prefix" else None,
        )
        return self.objective.abstract_batch(rows, array)


def make_computation(config: RunConfig, mesh: Mesh) -> Computation:
    """Check a configuration against a mesh, and build what it computes.

    Raises:
      InputError: unknown model, options that do not fit it, or a mesh that does not divide model or batch.
    """
    spec = resolve_spec(config)
    _check_rows(config, spec)
    batch_sizes = BatchSizes(config)
    sizes = batch_sizes.sizes()
    ways = batch_ways(mesh)
    microbatches = ways * config.train.grad_accum
    if max(sizes) % microbatches:
        raise InputError(
            f"train.batch_size: {max(sizes)} rows cannot be split over {ways} ways of data parallelism times "
            f"train.grad_accum {config.train.grad_accum}"
        )
    for size in sizes:
        if size % ways:
            raise InputError(
                f"train.batch_ramp: a batch of {size} rows cannot be split over {ways} ways of data parallelism"
            )
    if config.eval.batch_size is not None and config.eval.batch_size % ways:
        raise InputError(
            f"eval.batch_size: {config.eval.batch_size} rows cannot be split over {ways} ways of data parallelism"
        )
    forward = make_forward(config, spec, mesh, max(sizes) // microbatches)
    objective = OBJECTIVES[config.stage].from_config(config, forward)
    declared, frozen = objective.declarations(), objective.frozen_declarations()
    optimizer = make_optimizer(config.optimizer, decayed(declared), clip_entries=objective.clips_entries)
    state = abstract_state(declared, optimizer, mesh)
    return Computation(
        config=config,
        spec=spec,
        mesh=mesh,
        batch_sizes=batch_sizes,
        objective=objective,
        optimizer=optimizer,
        initializer=_initializer(config, spec),
        state=state.replace(reference=state.params) if objective.moves_reference else state,
        frozen=None if frozen is None else abstract_values(frozen, mesh, None),
    )


def resolve_spec(config: RunConfig) -> ModelSpec:
    """Return the spec of `model.name`, or of the weights, with what the options of `model` change.

    Raises:
      InputError: unknown name, unreadable file, or changes that do not fit the model.
    """
    name = config.model.name
    if name is None:
        return change_spec(starting_model(config).spec, config.model)
    path = Path(name)
    if path.suffix != ".json":
        spec = published_spec(name)
    elif not path.is_file():
        raise InputError(f"model.name: {name}: no such file")
    elif "architectures" in read_json(path):
        raw = read_json(path)
        spec = family_of_config(raw, name).spec_from_hf(raw)
    else:
        spec = spec_from_json(path.read_text(), name)
    return change_spec(spec, config.model)


def _check_rows(config: RunConfig, spec: ModelSpec) -> None:
    """Refuse rows that the model cannot read."""
    data = config.data
    if isinstance(spec.position, LearnedBlock) and data.seq_len > spec.position.num_positions:
        raise InputError(
            f"data.seq_len: found {data.seq_len}, but model {config.model.label} has learned positions for "
            f"{spec.position.num_positions} tokens"
        )
    if config.stage != "pretrain":
        return
    if data.packing != "blank_infilling" and spec.mask == "prefix":
        raise InputError(
            f"data.packing: found {data.packing!r}, but model {config.model.label} fills blanks from a context that "
            "all tokens see; expected 'blank_infilling'"
        )
    if data.packing == "blank_infilling" and spec.mask != "prefix":
        raise InputError(
            f"data.packing: 'blank_infilling' needs a model that reads a context in both directions; model "
            f"{config.model.label} does not"
        )


def make_forward(config: RunConfig, spec: ModelSpec, mesh: Mesh, rows: int) -> Forward:
    """Build the model as a run computes it; `rows` are those of a microbatch on one device."""
    chunk = config.train.loss_chunk or default_chunk(rows, config.data.seq_len, spec.vocab_size // mesh.shape["tensor"])
    return Forward(
        spec=with_balance(spec, config),
        tuning=make_tuning(spec, config.adapter),
        compute_dtype=jnp.dtype(config.model.compute_dtype),
        remat=config.model.remat,
        chunk=chunk,
        attention_impl=config.model.attention_impl,
        staged=is_staged(config.mesh.collectives, mesh),
        dropout=config.model.dropout,
        neftune_alpha=config.train.neftune_alpha,
    )


def with_balance(spec: ModelSpec, config: RunConfig) -> ModelSpec:
    """Return the spec with what `train.moe` gives its mixture of experts; it is no part of the model that is saved."""
    given, name = config.train.moe, config.model.label
    if given is None:
        return spec
    if spec.moe is None:
        raise InputError(f"train.moe: model {name} has no mixture of experts; expected null")
    for option in ("device_balance", "communication_balance", "capacity_factor"):
        if getattr(given, option) and spec.moe.num_groups == 1:
            raise InputError(f"train.moe.{option}: the experts of model {name} are not in groups; expected null")
    balance = _replaced(
        spec.moe.balance,
        expert=given.expert_balance,
        device=given.device_balance,
        communication=given.communication_balance,
        per_sequence=given.per_sequence,
    )
    return dataclasses.replace(spec, moe=_replaced(spec.moe, balance=balance, capacity_factor=given.capacity_factor))


def _replaced(part: Any, **options: Any) -> Any:
    """Return a dataclass with those options that are not None."""
    return dataclasses.replace(part, **{name: value for name, value in options.items() if value is not None})


def _initializer(config: RunConfig, spec: ModelSpec) -> Initializer:
    given = config.model.init
    return Initializer(
        scheme=given.scheme,
        std=given.std,
        embedding_std=given.embedding_std,
        output_scale=(2 * spec.num_layers) ** -0.5 if given.scale_outputs_by_depth else 1.0,
    )
