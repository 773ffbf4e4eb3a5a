"""How the losses of the later stages are held to goldens: in float64 tightly, in float32 as far as it goes."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Case(NamedTuple):
    """What a function of some arrays must give; a scalar also by its gradients with respect to the first of them."""

    function: Callable
    arguments: Sequence[np.ndarray]
    expected: np.ndarray
    gradients: Sequence[np.ndarray] = ()


def check(cases: dict[str, Case]):
    """Hold all cases to their goldens; they are one program, which compiles faster than one for each."""
    for x64 in (True, False):
        with jax.enable_x64(x64):
            dtype = jnp.float64 if x64 else jnp.float32
            arguments = {name: [cast(array, dtype) for array in case.arguments] for name, case in cases.items()}
            found = jax.jit(lambda arguments: {name: run(cases[name], arguments[name]) for name in cases})(arguments)
        for name, case in cases.items():
            value, gradients = found[name]
            compare(name, value, case.expected, rtol=1e-9 if x64 else 2e-5, atol=1e-9 if x64 else 1e-6, dtype=dtype)
            for gradient, expected in zip(gradients, case.gradients, strict=True):
                rtol, atol = (1e-9, 1e-9) if x64 else (1e-4, 1e-6)
                compare(f"gradient of {name}", gradient, expected, rtol=rtol, atol=atol, dtype=dtype)


def run(case, arguments):
    if not case.gradients:
        return case.function(*arguments), ()
    return jax.value_and_grad(case.function, tuple(range(len(case.gradients))))(*arguments)


def compare(name, found, expected, *, rtol, atol, dtype):
    assert found.dtype == dtype, f"{name}: computed in {found.dtype}"
    assert found.shape == np.shape(expected), f"{name}: shape {found.shape}"
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol, err_msg=name)


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
