"""The training state and the one jitted training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.nn.model import abstract_params, init
from jaxllm.nn.param import Initializer
from jaxllm.spec import ModelSpec
from jaxllm.train.objective import LanguageModeling, LossParts
from jaxllm.train.optimizer import update_params
from jaxllm.types import Batch, Params, TrainState

_TPU_OPTIONS = {"xla_enable_async_all_gather": True, "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True}
"""On v5p and v6e, unlike v5e, the compiler overlaps no gathering of weights with compute unless it is told to."""

TrainStep = Callable[[TrainState, Batch, jax.Array, jax.Array | None], tuple[TrainState, dict[str, jax.Array]]]
EvalStep = Callable[[Params, Batch, jax.Array | None], tuple[jax.Array, jax.Array, jax.Array | None]]


def abstract_state(spec: ModelSpec, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Return a TrainState of jax.ShapeDtypeStruct with shardings: moments lie where their parameters lie."""
    replicated = NamedSharding(mesh, PartitionSpec())
    params = abstract_params(spec, mesh)
    shapes = jax.eval_shape(optimizer.init, params)
    opt_state = optax.tree_map_params(
        optimizer,
        lambda moment, param: jax.ShapeDtypeStruct(moment.shape, moment.dtype, sharding=param.sharding),
        shapes,
        params,
        transform_non_params=lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
    )
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated),
        params=params,
        opt_state=opt_state,
        rng=jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=replicated),
    )


def make_init(
    spec: ModelSpec, optimizer: optax.GradientTransformation, mesh: Mesh, initializer: Initializer
) -> Callable[[jax.Array], TrainState]:
    """Build the jitted key -> fresh state, every array drawn straight into its sharding."""

    def draw(key: jax.Array) -> TrainState:
        init_key, run_key = jax.random.split(key)
        params = init(spec, init_key, initializer)
        return TrainState(
            step=jnp.int32(0), params=params, opt_state=optimizer.init(params), rng=jax.random.key_data(run_key)
        )

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(spec, optimizer, mesh))
    # It runs once: on CPU, optimising the random bits takes far longer than the unoptimised code runs.
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 0} if on_cpu else None
    return jax.jit(draw, out_shardings=shardings, compiler_options=options)


def init_state(
    spec: ModelSpec, optimizer: optax.GradientTransformation, mesh: Mesh, *, seed: int, initializer: Initializer
) -> TrainState:
    """Draw a fresh state, see `make_init`."""
    return make_init(spec, optimizer, mesh, initializer)(jax.random.key(seed))


def make_train_step(
    objective: LanguageModeling,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    mesh: Mesh,
    *,
    grad_accum: int | Callable[[int], int] = 1,
) -> TrainStep:
    """Build the jitted step (state, batch, learning_rate, votes) -> (state, metrics); the old state is donated.

    Metrics are float32 scalars: loss (cross-entropy, nats per token), grad_norm (before clipping), train_loss (with
    z-losses and balance losses), for mixtures of experts balance_loss and max_expert_load (of the busiest expert in any
    layer, over the mean), and votes where they were given: the largest entry of `votes` [devices], see `signals.Votes`.

    Args:
      state: a TrainState (abstract or not) whose shardings the step keeps.
      grad_accum: microbatches, or their number by the rows of a batch; each device's rows are dealt to them in turn.
    """

    def train_step(
        state: TrainState, batch: Batch, learning_rate: jax.Array, votes: jax.Array | None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        weight = jnp.sum(batch.loss_weights)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        never_dropped = objective.draw_never_dropped(key, batch.tokens.shape[0])
        accumulated = grad_accum if isinstance(grad_accum, int) else grad_accum(batch.tokens.shape[0])
        (loss, parts), gradients = _summed_gradients(objective, state, (batch, never_dropped), accumulated)
        gradients = jax.tree.map(lambda gradient: gradient / weight, gradients)
        params, opt_state, grad_norm = update_params(
            optimizer, gradients, state.opt_state, state.params, learning_rate=learning_rate
        )
        metrics = {"loss": parts.entropy / weight, "train_loss": loss / weight, "grad_norm": grad_norm}
        if parts.load is not None:
            metrics["balance_loss"] = parts.balance / weight
            metrics["max_expert_load"] = jnp.max(parts.load / jnp.mean(parts.load, axis=-1, keepdims=True))
        if votes is not None:
            metrics["votes"] = jnp.max(votes)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
        compiler_options=_TPU_OPTIONS if mesh.devices.flat[0].platform == "tpu" else None,
    )


def _summed_gradients(
    objective: LanguageModeling, state: TrainState, rows: tuple[Batch, jax.Array | None], grad_accum: int
) -> tuple[tuple[jax.Array, LossParts], Params]:
    def differentiate(rows: tuple[Batch, jax.Array | None]) -> tuple[tuple[jax.Array, LossParts], Params]:
        def loss_sums(params: Params) -> tuple[jax.Array, LossParts]:
            batch, never_dropped = rows
            return objective.loss_sums(params, batch, train=True, step=state.step, never_dropped=never_dropped)

        return jax.value_and_grad(loss_sums, has_aux=True)(state.params)

    if grad_accum == 1:
        return differentiate(rows)

    def add(total: Any, microbatch: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, differentiate(microbatch)), None

    def split(array: jax.Array) -> jax.Array:
        # Row i * grad_accum + a goes to microbatch a: no row leaves its device.
        return jnp.moveaxis(array.reshape(array.shape[0] // grad_accum, grad_accum, *array.shape[1:]), 1, 0)

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(differentiate, rows))
    return jax.lax.scan(add, zeros, jax.tree.map(split, rows))[0]


def make_eval_step(objective: LanguageModeling) -> EvalStep:
    """Build the jitted (params, batch, votes) -> (cross-entropy sum in nats, predicted tokens, largest vote)."""

    @jax.jit
    def eval_step(
        params: Params, batch: Batch, votes: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        _, parts = objective.loss_sums(params, batch, train=True)
        return parts.entropy, jnp.sum(batch.loss_weights), None if votes is None else jnp.max(votes)

    return eval_step
