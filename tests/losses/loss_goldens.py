"""How the losses of the later stages are held to goldens: in float64 tightly, in float32 as far as it goes."""

import jax
import jax.numpy as jnp
import numpy as np


def check(name, found, expected, *, rtol, atol, dtype):
    assert found.dtype == dtype, f"{name}: computed in {found.dtype}"
    assert found.shape == np.shape(expected), f"{name}: shape {found.shape}"
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol, err_msg=name)


def check_values(function, arguments, expected, name):
    """Hold one array that a function gives to its golden."""
    for x64, rtol in ((True, 1e-9), (False, 2e-5)):
        with jax.enable_x64(x64):
            dtype = jnp.float64 if x64 else jnp.float32
            found = jax.jit(function)(*(cast(argument, dtype) for argument in arguments))
            check(name, found, expected, rtol=rtol, atol=1e-9 if x64 else 1e-6, dtype=dtype)


def check_gradients(function, arguments, loss, gradients, name):
    """Hold a scalar and its gradients with respect to the first arguments to their goldens."""
    for x64, rtol, gradient_rtol in ((True, 1e-9, 1e-9), (False, 2e-5, 1e-4)):
        with jax.enable_x64(x64):
            dtype = jnp.float64 if x64 else jnp.float32
            value_and_grad = jax.jit(jax.value_and_grad(function, tuple(range(len(gradients)))))
            value, found = value_and_grad(*(cast(argument, dtype) for argument in arguments))
            check(name, value, loss, rtol=rtol, atol=1e-9 if x64 else 1e-7, dtype=dtype)
            for one, expected in zip(found, gradients, strict=True):
                check(f"{name} gradient", one, expected, rtol=gradient_rtol, atol=1e-9 if x64 else 1e-6, dtype=dtype)


def cast(argument, dtype):
    """Real numbers take the precision that is tried; masks and integers stay as they are."""
    array = np.asarray(argument)
    return jnp.asarray(array, dtype) if array.dtype.kind == "f" else jnp.asarray(array)


class Reads:
    """A golden file that knows which of its arrays were read."""

    def __init__(self, path):
        with np.load(path, allow_pickle=False) as file:
            self.arrays = dict(file)
        self.read = set()

    def __getitem__(self, name):
        self.read.add(name)
        return self.arrays[name]

    def __iter__(self):
        return iter(self.arrays)

    def unread(self):
        return sorted(self.arrays.keys() - self.read)
