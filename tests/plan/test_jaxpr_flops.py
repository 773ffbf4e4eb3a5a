"""Exact FLOPs of traced programs, the training step among them: 6ND + attention, to the last FLOP."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxllm
from jaxllm.config import OptimizerConfig
from jaxllm.nn.model import count_matmul_params, decay_mask, declarations
from jaxllm.plan.flops import Flops, count_flops
from jaxllm.sharding.mesh import make_mesh
from jaxllm.sharding.rules import RULES
from jaxllm.spec import tiny
from jaxllm.train.flops import model_flops_per_token
from jaxllm.train.optimizer import make_optimizer
from jaxllm.train.step import abstract_state, make_train_step
from jaxllm.types import Batch
from tests.train.training_steps import language_modeling

ROWS, LENGTH = 16, 64


def flops_of(function, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return count_flops(jax.jit(function).trace(*arrays).jaxpr)


@functools.cache
def step_flops(spec, *, remat="none", staged=False):
    mesh = make_mesh()
    optimizer = make_optimizer(OptimizerConfig(), decay_mask(spec))
    state = abstract_state(declarations(spec), optimizer, mesh)
    objective = language_modeling(spec, compute_dtype="bfloat16", remat=remat, chunk=32, staged=staged)
    sharding = NamedSharding(mesh, RULES.spec(("batch", "length")))
    ids = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32, sharding=sharding)
    weights = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.float32, sharding=sharding)
    batch = Batch(tokens=ids, targets=ids, loss_weights=weights, positions=ids, segment_ids=ids)
    with jax.set_mesh(mesh):
        step = make_train_step(objective, optimizer, state, mesh, grad_accum=2)
        return count_flops(step.trace(state, batch, jnp.float32(0), None).jaxpr)


def expected(spec):
    """Return 6ND + attention over all pairs: the reference implementation also multiplies what the mask hides."""
    attention = spec.attention
    widths = 2 * attention.head_dim
    tokens = ROWS * LENGTH
    pairs = 6 * spec.num_layers * attention.num_heads * widths * LENGTH
    return tokens * (6 * count_matmul_params(spec) + pairs)


@pytest.mark.parametrize("name", ["qwen-7b", "llama2-70b"])
def test_a_training_step_is_6nd_and_attention(name):
    spec = tiny(jaxllm.spec(name))
    flops = step_flops(spec)
    assert flops == Flops(total=expected(spec))
    causal = ROWS * LENGTH * model_flops_per_token(spec, LENGTH)
    assert flops.total - causal == causal - 6 * ROWS * LENGTH * count_matmul_params(spec)


def test_rematerialisation_is_told_apart():
    spec = tiny(jaxllm.spec("qwen-7b"))
    full = step_flops(spec, remat="full")
    assert full.once == expected(spec)
    head = 2 * ROWS * LENGTH * spec.hidden_size * spec.vocab_size
    # All of the forward pass again but the last product of each layer, whose result only the residual stream needs,
    # and the head, which is no part of the layers.
    last = 2 * ROWS * LENGTH * spec.num_layers * spec.mlp.intermediate_size * spec.hidden_size
    assert full.recomputed == expected(spec) // 3 - head - last


def test_a_step_mapped_over_devices_by_hand_costs_the_same():
    spec = tiny(jaxllm.spec("qwen-7b"))
    assert step_flops(spec, staged=True) == step_flops(spec)


def test_loops_and_branches():
    def scanned(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    product = 2 * 8 * 16 * 16
    assert flops_of(scanned, (8, 16), (5, 16, 16)).total == 5 * product
    assert flops_of(lambda x, w: jax.lax.fori_loop(0, 7, lambda i, x: x @ w, x), (8, 16), (16, 16)).total == 7 * product

    def counted(x, w):
        return jax.lax.while_loop(lambda c: c[0] < 10, lambda c: (c[0] + 3, c[1] @ w), (1, x))[1]

    assert flops_of(counted, (8, 16), (16, 16)) == Flops(3 * product)

    def branched(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    assert flops_of(branched, (8, 16), (16, 16)).total == 2 * product


def test_a_loop_that_depends_on_data_is_named():
    def search(x, w):
        return jax.lax.while_loop(lambda x: x[0, 0] < 10, lambda x: x @ w, x)

    flops = flops_of(search, (8, 16), (16, 16))
    assert flops.total == 2 * 8 * 16 * 16
    assert "trip count" in next(iter(flops.unknown))


def test_grouped_and_convolved_products():
    sizes = jnp.array([3, 5], jnp.int32)

    def loss(x, w):
        return jax.lax.ragged_dot(x, w, sizes).sum()

    forward_and_two_gradients = jax.value_and_grad(loss, argnums=(0, 1))
    assert flops_of(forward_and_two_gradients, (8, 4), (2, 4, 6)).total == 3 * 2 * 8 * 4 * 6
    convolve = lambda x, w: jax.lax.conv(x, w, (1,), "VALID")  # noqa: E731
    assert flops_of(convolve, (2, 3, 10), (5, 3, 4)).total == 2 * 2 * 5 * 7 * 3 * 4


def test_a_mapped_body_counts_on_each_device_and_automatic_axes_once():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    body = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(PartitionSpec("a"), PartitionSpec()), out_specs=PartitionSpec("a"),
        axis_names={"a"}, check_vma=False,
    )  # fmt: skip
    assert flops_of(body, (8, 16), (16, 4)).total == 2 * 8 * 16 * 4


@pytest.mark.parametrize("stated", [True, False])
def test_a_kernel_costs_what_it_states(stated):
    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...] @ x_ref[...]

    cost = pl.CostEstimate(flops=77, transcendentals=0, bytes_accessed=0) if stated else None
    shape = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    call = pl.pallas_call(kernel, out_shape=shape, cost_estimate=cost, name="square", interpret=True)
    flops = flops_of(call, (8, 8))
    assert flops == (Flops(77) if stated else Flops(unknown=frozenset({"kernel square has no cost estimate"})))
