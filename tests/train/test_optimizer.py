"""The optimizer against recorded torch and optax trajectories, and its dtypes."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config.schema import OptimizerConfig
from jaxllm.train.optimizer import make_optimizer, update_params

GOLDEN = dict(np.load(Path(__file__).parents[1] / "goldens" / "adamw_clip_trajectory.npz", allow_pickle=False))
NAMES = ("w", "b", "norm")
MASK = {"w": True, "b": False, "norm": False}
CONFIGS = {
    "b095_wd01_clip1_eps8": OptimizerConfig(b2=0.95, eps=1e-8, clip_norm=1.0),
    "llama2_eps5": OptimizerConfig(b2=0.95, eps=1e-5, clip_norm=1.0),
    "baichuan2_clip05": OptimizerConfig(b2=0.95, eps=1e-8, clip_norm=0.5),
}


def trajectory(config: OptimizerConfig, dtype):
    """Return ({name: parameters after each update}, gradient norm of each update)."""
    optimizer = make_optimizer(config, MASK)
    params = {name: jnp.asarray(GOLDEN[f"p0_{name}"], dtype) for name in NAMES}
    grads = {name: jnp.asarray(GOLDEN[f"grads_{name}"], dtype) for name in NAMES}

    def step(carry, inputs):
        learning_rate, grads = inputs
        params, opt_state, norm = update_params(optimizer, grads, carry[1], carry[0], learning_rate=learning_rate)
        return (params, opt_state), (params, norm)

    rates = jnp.asarray(GOLDEN["lr"], dtype)
    return jax.lax.scan(step, (params, optimizer.init(params)), (rates, grads))[1]


@pytest.mark.parametrize("decay", ["all", "matrices"])
@pytest.mark.parametrize("name", CONFIGS)
def test_trajectory_equals_torch_and_optax(name, decay):
    config = OptimizerConfig(**(vars(CONFIGS[name]) | {"decay": decay}))
    prefix = f"{name}_{'alldecay' if decay == 'all' else 'maskdecay'}"
    with jax.enable_x64(True):
        params, norms = jax.tree.map(np.asarray, jax.jit(lambda: trajectory(config, jnp.float64))())
    for leaf in NAMES:
        np.testing.assert_allclose(params[leaf], GOLDEN[f"{prefix}_optax_{leaf}"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(params[leaf], GOLDEN[f"{prefix}_torch_{leaf}"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(norms, GOLDEN[f"{prefix}_gradnorm_preclip"], rtol=1e-12)


def test_float32_trajectory_stays_within_rounding():
    params, _ = trajectory(CONFIGS["b095_wd01_clip1_eps8"], jnp.float32)
    golden = GOLDEN["b095_wd01_clip1_eps8_maskdecay_optax_w"]
    assert params["w"].dtype == jnp.float32
    np.testing.assert_allclose(params["w"], golden, rtol=0, atol=1e-6)


def test_moments_of_bfloat16_parameters_are_float32():
    params = {"w": jnp.ones((2, 3), jnp.bfloat16)}
    grads = {"w": jnp.full((2, 3), 1e-3, jnp.bfloat16)}
    optimizer = make_optimizer(OptimizerConfig(), {"w": True})
    new, state, norm = update_params(optimizer, grads, optimizer.init(params), params, learning_rate=1e-2)
    assert new["w"].dtype == jnp.bfloat16
    assert norm.dtype == jnp.float32
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"float32", "int32"}


def test_without_clipping_or_decay_the_first_update_is_the_sign_of_the_gradient():
    config = OptimizerConfig(clip_norm=None, weight_decay=0.0)
    params, grads = {"w": jnp.zeros(3)}, {"w": jnp.array([-200.0, 1.0, 30.0])}
    optimizer = make_optimizer(config, {"w": True})
    new, _, norm = update_params(optimizer, grads, optimizer.init(params), params, learning_rate=0.5)
    np.testing.assert_allclose(new["w"], [0.5, -0.5, -0.5], rtol=1e-5)
    np.testing.assert_allclose(norm, np.sqrt(200.0**2 + 1 + 900), rtol=1e-6)


def test_a_nan_gradient_reaches_the_reported_norm():
    params, grads = {"w": jnp.zeros(2)}, {"w": jnp.array([jnp.nan, 1.0])}
    optimizer = make_optimizer(OptimizerConfig(), {"w": True})
    _, _, norm = update_params(optimizer, grads, optimizer.init(params), params, learning_rate=0.5)
    assert np.isnan(norm)


def test_matrices_without_a_mask_is_refused():
    with pytest.raises(ValueError, match="decay_mask"):
        make_optimizer(OptimizerConfig(decay="matrices"), None)
