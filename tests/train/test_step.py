"""One training step against a plain mean over whole logits: accumulation, z-losses, clipping, decay, bfloat16."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import OptimizerConfig
from jaxllm.losses.lm import cross_entropy, max_z_loss, z_loss
from jaxllm.nn.model import apply, decay_mask, declarations
from jaxllm.nn.param import is_declared
from jaxllm.train.optimizer import make_optimizer, update_params
from jaxllm.train.step import make_eval_step
from tests.tiny_models import random_params
from tests.train.training_steps import SPECS, Trainer, batch

SPEC = dataclasses.replace(SPECS["qwen"], num_layers=1)
Z_LOSSES = {"z_loss": 1e-2, "max_z_loss": 2e-3}
# The first moments are then the clipped gradients.
PLAIN = OptimizerConfig(b1=0.0, clip_norm=0.5, weight_decay=0.0)
BATCH = batch(0, SPEC)


@pytest.fixture(scope="module")
def expected():
    """Loss, cross-entropy and gradients of the mean over trained positions, from whole logits."""

    def losses(params):
        logits = apply(SPEC, params, BATCH, train=True).logits
        weights, total = BATCH.loss_weights, BATCH.loss_weights.sum()
        entropy = jnp.sum(cross_entropy(logits, BATCH.targets, weights)) / total
        extra = Z_LOSSES["z_loss"] * z_loss(logits) + Z_LOSSES["max_z_loss"] * max_z_loss(logits)
        return entropy + jnp.sum(weights * extra) / total, entropy

    params = random_params(SPEC, scale=0.1)
    (loss, entropy), gradients = jax.jit(jax.value_and_grad(losses, has_aux=True))(params)
    return float(loss), float(entropy), gradients


def first_step(**options):
    trainer = Trainer(SPEC, optimizer=PLAIN, **options)
    with jax.set_mesh(trainer.mesh):
        state, metrics = trainer.step(trainer.fresh(), trainer.place(BATCH), np.float32(1e-3), None)
    return state, {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"grad_accum": 4, "chunk": 5},
        pytest.param({"grad_accum": 8, "chunk": 1}, marks=pytest.mark.slow),
        pytest.param({"grad_accum": 2, "fsdp": 4}, marks=pytest.mark.slow),
        pytest.param({"remat": "full"}, marks=pytest.mark.slow),
        pytest.param({"remat": "dots"}, marks=pytest.mark.slow),
        pytest.param({"remat": "dots_with_no_batch_dims", "chunk": 7}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_step_follows_the_mean_over_trained_positions(expected, options):
    loss, entropy, gradients = expected
    state, metrics = first_step(**Z_LOSSES, **options)
    norm = np.sqrt(sum(float(jnp.sum(jnp.square(leaf))) for leaf in jax.tree.leaves(gradients)))
    assert loss > entropy + 0.1 and norm > 2 * PLAIN.clip_norm
    np.testing.assert_allclose(
        [metrics["train_loss"], metrics["loss"], metrics["grad_norm"]], [loss, entropy, norm], rtol=1e-6
    )
    moments = state.opt_state[1].mu
    for found, gradient in zip(jax.tree.leaves(moments), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(found, gradient * PLAIN.clip_norm / norm, rtol=0, atol=1e-6)
    assert int(state.step) == 1


def test_bfloat16_compute_stays_near(expected):
    state, metrics = first_step(compute_dtype="bfloat16", **Z_LOSSES)
    assert abs(metrics["train_loss"] - expected[0]) < 0.02
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


def test_weight_decay_shrinks_matrices_and_embeddings_alone():
    params = random_params(SPEC)
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.5), decay_mask(SPEC))

    @jax.jit
    def update(params):
        nothing = jax.tree.map(jnp.zeros_like, params)
        return update_params(optimizer, nothing, optimizer.init(params), params, learning_rate=0.1)[0]

    after = update(params)
    leaves = jax.tree.leaves(declarations(SPEC), is_leaf=is_declared)
    for leaf, old, new in zip(leaves, jax.tree.leaves(params), jax.tree.leaves(after), strict=True):
        factor = 1.0 if leaf.kind in ("ones", "zeros") else 0.95
        np.testing.assert_allclose(new, old * factor, rtol=1e-6)
    assert {leaf.kind for leaf in leaves} >= {"ones", "zeros", "matrix", "embedding"}


def test_evaluation_sums_the_cross_entropy_alone(expected):
    trainer = Trainer(SPEC, **Z_LOSSES)
    with jax.set_mesh(trainer.mesh):
        evaluate = make_eval_step(trainer.objective)
        parts, totals, votes = evaluate(trainer.fresh().params, trainer.place(BATCH), None)
    nats, tokens = parts["entropy"], totals["weight"]
    assert (int(tokens), votes) == (int(BATCH.loss_weights.sum()), None)
    np.testing.assert_allclose(nats / tokens, expected[1], rtol=1e-6)
