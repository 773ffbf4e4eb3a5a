"""Small training states whose every value follows from the step; used by tests and by the processes they start."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxllm.types import TrainState

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1e-3, 0.0, 100)))


def state_of(step, width=8):
    params = {
        "embed": {"kernel": np.arange(16 * width, dtype=np.float32).reshape(16, width) + np.float32(step)},
        "layers": {
            "bias": np.full((2, width), step / 7, np.float32),
            "kernel": np.full((2, width, 4), -step, jnp.bfloat16),
        },
    }
    moments = jax.eval_shape(OPTIMIZER.init, params)
    opt_state = jax.tree.map(lambda x: np.full(x.shape, step, x.dtype), moments)
    rng = np.array([step, 2**32 - 1], np.uint32)
    return jax.device_put(TrainState(step=np.int32(step), params=params, opt_state=opt_state, rng=rng))


def abstract(tree, sharding_of=None):
    """Shapes and dtypes of a tree, on the first device or where `sharding_of(array)` says."""
    single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    place = sharding_of or (lambda _: single)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), tree)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b)), jax.tree_util.keystr(path)
