"""The real TPU compiler, on a CPU: kernels compiled for v5e, v5p and v6e by tests."""

import contextlib
import importlib.util
import os

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

CHIPS = {"v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1"}

# Read when libtpu is first loaded; without them it looks for a machine with TPUs, and locks out other processes.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler, libtpu (pip install 'jaxllm[plan]')"
)


@contextlib.contextmanager
def _environment():
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def device(chip):
    """Return the compile-only device of one chip, a key of CHIPS."""
    with _environment():
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=CHIPS[chip], chips_per_host_bounds=(1, 1, 1)
        )
    return topology.devices[0]


def compile_for(chip, function, *shapes):
    """Compile function(*arrays) for one chip; shapes: trees of ShapeDtypeStruct."""
    target = device(chip)
    sharding = SingleDeviceSharding(target)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
    # Kernels ask the default device which chip they are compiled for.
    with jax.default_device(target):
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("tpu",)).compile()
