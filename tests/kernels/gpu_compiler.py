"""XLA's compiler for H100, on a CPU: helpers for tests that compile kernels and read what its assembler reports."""

import contextlib
import importlib.util
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

# stream_executor.GpuTargetConfigProto of an H100 SXM 80 GB; the limits of compute capability 9.0 are from the
# CUDA C++ programming guide, the sizes and clock from NVIDIA's H100 white paper.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000 device_memory_size: 84978434048 l2_cache_size: 52428800
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: 233472 shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

needs_gpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="needs the compiler for H100, jax-cuda13-plugin (pip install 'jaxllm[plan-gpu]')",
)


class Kernel(NamedTuple):
    """A compiled kernel; sizes in bytes, registers and spills of a thread.

    ptx is None where jax does not write it down (0.12), registers and spilled also without ptxas on the PATH.
    """

    name: str
    threads: int
    shared_memory: int
    registers: int | None = None
    spilled: int | None = None
    ptx: str | None = None


def device():
    """Return the compile-only device."""
    return topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1").devices[0]


def compile_for_h100(function, *shapes):
    """Compile function(*arrays) for one H100; shapes: trees of ShapeDtypeStruct. Return its kernels by name."""
    target = device()
    sharding = SingleDeviceSharding(target)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
    # Newer jax asks the default device which chip a kernel is compiled for.
    with jax.default_device(target), _no_cache(), tempfile.TemporaryDirectory() as folder:
        lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))
        # The tests' XLA_FLAGS turn optimisation off, for CPU.
        lowered.compile({"xla_dump_to": folder, "xla_backend_optimization_level": 3})
        return _kernels(Path(folder))


@contextlib.contextmanager
def _no_cache():
    # A program for a device that is not there can be written to jax's cache, but not read from it.
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def _kernels(folder):
    (sequence,) = folder.rglob("*.thunk_sequence_after_thunk_passes.txt")
    launches = r"kCustomKernel \[.*\] (jaxllm\w+) grid: .* threads: \[(\d+), .* shared_memory: (\d+) bytes"
    kernels = [
        Kernel(name, int(threads), int(size)) for name, threads, size in re.findall(launches, sequence.read_text())
    ]
    sources = [path.read_text() for path in folder.rglob("*.ptx")]
    return {
        kernel.name: next((_assembled(kernel, ptx) for ptx in sources if f".entry {kernel.name}(" in ptx), kernel)
        for kernel in kernels
    }


def _assembled(kernel, ptx):
    """Add what the assembler reports."""
    if shutil.which("ptxas") is None:
        return kernel._replace(ptx=ptx)
    command = ["ptxas", "-v", "-arch=sm_90a", "-o", "/dev/null", "/dev/stdin"]
    report = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr
    return kernel._replace(
        ptx=ptx,
        registers=int(re.search(r"Used (\d+) registers", report)[1]),
        spilled=int(re.search(r"(\d+) bytes spill stores", report)[1]),
    )
