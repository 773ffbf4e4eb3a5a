"""The training state and the one jitted training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxllm.nn.param import Initializer, abstract_values, initial_values
from jaxllm.sharding.rules import constrain, replicated
from jaxllm.train.objectives.base import Objective, Sums, joined
from jaxllm.train.optimizer import update_params
from jaxllm.types import Params, TrainState

_TPU_OPTIONS = {"xla_enable_async_all_gather": True, "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True}
"""On v5p and v6e, unlike v5e, the compiler overlaps no gathering of weights with compute unless it is told to."""

TrainStep = Callable[..., tuple[TrainState, dict[str, jax.Array]]]
EvalStep = Callable[..., tuple[Sums, Sums, jax.Array | None]]


def abstract_state(declarations: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Return a TrainState of jax.ShapeDtypeStruct with shardings: moments lie where their parameters lie.

    Args:
      declarations: of what is trained, a tree of `nn.param.Declared`.
    """
    whole = replicated(mesh)
    params = abstract_values(declarations, mesh)
    shapes = jax.eval_shape(optimizer.init, params)
    opt_state = optax.tree_map_params(
        optimizer,
        lambda moment, param: jax.ShapeDtypeStruct(moment.shape, moment.dtype, sharding=param.sharding),
        shapes,
        params,
        transform_non_params=lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
    )
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        params=params,
        opt_state=opt_state,
        rng=jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=whole),
    )


def make_init(
    declarations: Any, optimizer: optax.GradientTransformation, mesh: Mesh, initializer: Initializer
) -> Callable[[jax.Array], TrainState]:
    """Build the jitted key -> fresh state, every array drawn straight into its sharding."""

    def draw(key: jax.Array) -> TrainState:
        init_key, run_key = jax.random.split(key)
        params = initial_values(declarations, init_key, initializer)
        return TrainState(
            step=jnp.int32(0), params=params, opt_state=optimizer.init(params), rng=jax.random.key_data(run_key)
        )

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(declarations, optimizer, mesh))
    # It runs once: on CPU, optimising the random bits takes far longer than the unoptimised code runs.
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 0} if on_cpu else None
    return jax.jit(draw, out_shardings=shardings, compiler_options=options)


def init_state(
    declarations: Any,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    seed: int,
    initializer: Initializer,
) -> TrainState:
    """Draw a fresh state, see `make_init`."""
    return make_init(declarations, optimizer, mesh, initializer)(jax.random.key(seed))


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    mesh: Mesh,
    *,
    grad_accum: int | Callable[[int], int] = 1,
) -> TrainStep:
    """Build the jitted step (state, batch, learning_rate, votes, frozen=None) -> (state, metrics).

    The old state is donated. Metrics are float32 scalars: those of the objective, train_loss (what is minimised, per
    unit of weight), grad_norm (before clipping), and votes where they were given: the largest entry of `votes`
    [devices], see `signals.Votes`.

    Args:
      state: a TrainState (abstract or not) whose shardings the step keeps.
      grad_accum: microbatches, or their number by the rows of a batch; each device's rows are dealt to them in turn.
    """

    def train_step(
        state: TrainState,
        batch: Any,
        learning_rate: jax.Array,
        votes: jax.Array | None,
        frozen: Params | None = None,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        totals = objective.totals(batch)
        row_keys = _row_keys(state, batch.num_rows) if objective.draws else None
        accumulated = grad_accum if isinstance(grad_accum, int) else grad_accum(batch.num_rows)
        (loss, parts), gradients = _summed_gradients(objective, state, frozen, (batch, row_keys), totals, accumulated)
        gradients = jax.tree.map(lambda gradient: gradient / totals["weight"], gradients)
        params, opt_state, grad_norm = update_params(
            optimizer,
            gradients,
            state.opt_state,
            state.params,
            learning_rate=objective.learning_rates(learning_rate, state.step),
        )
        metrics = objective.metrics(parts, totals)
        metrics |= {"train_loss": loss / totals["weight"], "grad_norm": grad_norm}
        if votes is not None:
            metrics["votes"] = jnp.max(votes)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(shardings, replicated(mesh)),
        compiler_options=_TPU_OPTIONS if mesh.devices.flat[0].platform == "tpu" else None,
    )


def _row_keys(state: TrainState, num_rows: int) -> jax.Array:
    """Draw the random keys of a batch's rows, uint32 [B, 2]; they follow from the run's key and the step."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    return constrain(jax.random.key_data(jax.random.split(key, num_rows)), "batch", None)


def _summed_gradients(
    objective: Objective, state: TrainState, frozen: Params | None, rows: tuple, totals: Sums, grad_accum: int
) -> tuple[tuple[jax.Array, Sums], Params]:
    def differentiate(rows: tuple) -> tuple[tuple[jax.Array, Sums], Params]:
        def loss_sums(params: Params) -> tuple[jax.Array, Sums]:
            batch, row_keys = rows
            return objective.loss_sums(params, frozen, batch, totals, train=True, step=state.step, row_keys=row_keys)

        return jax.value_and_grad(loss_sums, has_aux=True)(state.params)

    if grad_accum == 1:
        return differentiate(rows)

    def add(total: Any, microbatch: Any) -> tuple[Any, None]:
        ((loss, parts), gradients), ((more, others), further) = total, differentiate(microbatch)
        return ((loss + more, joined(parts, others)), jax.tree.map(jnp.add, gradients, further)), None

    def split(array: jax.Array) -> jax.Array:
        # Row i * grad_accum + a goes to microbatch a: no row leaves its device.
        return jnp.moveaxis(array.reshape(array.shape[0] // grad_accum, grad_accum, *array.shape[1:]), 1, 0)

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(differentiate, rows))
    return jax.lax.scan(add, zeros, jax.tree.map(split, rows))[0]


def make_eval_step(objective: Objective) -> EvalStep:
    """Build the jitted (params, batch, votes, frozen=None) -> (parts, totals, largest vote), see `Objective`."""

    @jax.jit
    def eval_step(
        params: Params, batch: Any, votes: jax.Array | None, frozen: Params | None = None
    ) -> tuple[Sums, Sums, jax.Array | None]:
        totals = objective.totals(batch)
        _, parts = objective.loss_sums(params, frozen, batch, totals, train=True)
        return parts, totals, None if votes is None else jnp.max(votes)

    return eval_step
