"""Collectives of small programs with known ones, fresh from the TPU compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.plan.chips import CHIPS
from jaxllm.plan.collectives import read_collectives
from jaxllm.plan.estimate import total_work
from jaxllm.plan.hlo import parse_hlo
from jaxllm.plan.network import network_of
from jaxllm.plan.runs import list_runs, unknown_loops
from jaxllm.plan.topology import find_devices, parse_topology
from tests.plan.plan_configs import needs_libtpu

pytestmark = needs_libtpu

TRIPS, ROWS, SIDE = 3, 768, 1024
CHIP = CHIPS["v5e"]


@pytest.fixture(scope="module", autouse=True)
def not_kept():
    """Keep programs for absent devices out of the persistent cache: it cannot read them back, and warns."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float("inf"))
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


@pytest.fixture(scope="module")
def mesh():
    devices = np.array(find_devices(parse_topology("v5e:2x2")))
    return Mesh(devices.reshape(2, 2), ("y", "x"), axis_types=(AxisType.Auto,) * 2)


def compile_mapped(mesh, function, in_specs, out_specs, *shapes):
    mapped = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, in_specs, strict=True)
    ]
    with jax.default_device(mesh.devices.flat[0]):
        return jax.jit(mapped).trace(*arrays).lower(lowering_platforms=("tpu",)).compile().as_text()


def read(text, mesh):
    module = parse_hlo(text)
    runs = list_runs(module)
    assert unknown_loops(runs) == []
    return read_collectives(module, runs, network_of(mesh, CHIP)), total_work(module, runs, CHIP)


def test_a_loop_of_products_each_gathered_and_scattered(mesh):
    def products(x, w):
        def one(x, w):
            y = x @ jax.lax.all_gather(w, "y", axis=0, tiled=True)
            return jnp.tanh(jax.lax.all_gather(jax.lax.psum_scatter(y, "x", tiled=True), "x", tiled=True)), None

        return jax.lax.scan(one, x, w)[0]

    text = compile_mapped(mesh, products, (P(), P(None, "y")), P(), (ROWS, SIDE), (TRIPS, SIDE, SIDE))
    collectives, work = read(text, mesh)
    found = {
        (each.kind, each.axes, each.bytes_per_device): each.count
        for each in collectives
        if each.kind != "collective-permute"  # small shifts by which the compiler aligns a scatter
    }
    assert found == {
        ("all-gather", ("y",), 2 * SIDE * SIDE): TRIPS,
        ("reduce-scatter", ("x",), 2 * ROWS * SIDE): TRIPS,
        ("all-gather", ("x",), 2 * ROWS * SIDE): TRIPS,
    }
    assert {each.dtype for each in collectives} == {"bf16"}
    assert work.flops == TRIPS * 2 * ROWS * SIDE * SIDE


def test_a_scatter_over_the_whole_plane_at_once_is_a_whole_sum(mesh):
    def scatter(x):
        return jax.lax.psum_scatter(x, ("y", "x"), tiled=True)

    collectives, _ = read(compile_mapped(mesh, scatter, (P(),), P(("y", "x")), (4 * SIDE, SIDE)), mesh)
    large = [each for each in collectives if each.bytes_per_device == 2 * 4 * SIDE * SIDE]
    assert [(each.axes, each.count) for each in large] == [(("y", "x"), 1)]
    assert (
        large[0].ici_bytes == {"all-reduce": 2, "reduce-scatter": 1}[large[0].kind] * large[0].bytes_per_device * 3 / 8
    )


def test_neighbours_exchange_over_one_link(mesh):
    def swap(x):
        return jax.lax.ppermute(x, "x", [(0, 1), (1, 0)])

    (found,), _ = read(compile_mapped(mesh, swap, (P("x"),), P("x"), (2 * SIDE, SIDE)), mesh)
    assert (found.kind, found.axes, found.asynchronous) == ("collective-permute", ("x",), True)
    assert (found.bytes_per_device, found.ici_bytes) == (2 * SIDE * SIDE, 2 * SIDE * SIDE)
