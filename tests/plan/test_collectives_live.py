"""The compiled training step gathers each layer's weights once in each pass, in bf16, and scatters their gradients."""

import collections
import dataclasses
import math

import jax
import pytest

import jaxllm
from jaxllm.config import load_config
from jaxllm.plan.plan import make_plan
from jaxllm.plan.topology import parse_topology
from jaxllm.spec import GQA, spec_to_json
from jaxllm.types import TrainState
from tests.plan.plan_configs import needs_libtpu

pytestmark = needs_libtpu

LAYERS = 2

# Widths: no smaller part than 8 rows on a device, as in real models; below, the compiler sums small scatters whole.
# Attention without kernels compiles in a third of the time, and its collectives are the same.
CONFIG = """\
run_dir: runs/planned
tokenizer: nowhere
model: {{name: {model}, remat: full, attention_impl: reference}}
data: {{train: [{{path: nowhere.txt}}], seq_len: 256}}
schedule: {{warmup: 1}}
train: {{steps: 10, batch_size: {rows}}}
"""


@pytest.fixture(scope="module", params=["v5e:16x16", "v5p:4x4x4"])
def plan(request, tmp_path_factory):
    """Two layers as Qwen's, one row for each device."""
    folder, topology = tmp_path_factory.mktemp("plan"), parse_topology(request.param)
    spec = jaxllm.spec("qwen-7b")
    spec = dataclasses.replace(
        spec,
        num_layers=LAYERS,
        hidden_size=2048,
        vocab_size=2048,
        attention=dataclasses.replace(spec.attention, num_heads=8, num_kv_heads=8),
        mlp=dataclasses.replace(spec.mlp, intermediate_size=512),
    )
    assert isinstance(spec.attention, GQA)
    (folder / "spec.json").write_text(spec_to_json(spec))
    (folder / "plan.yaml").write_text(CONFIG.format(model=folder / "spec.json", rows=topology.num_devices))
    return make_plan(load_config([folder / "plan.yaml"]), topology)


def matrices(state: TrainState) -> dict[str, int]:
    """Return the elements of one layer of each matrix, by its path of modules, as name scopes write it."""
    leaves = jax.tree_util.tree_leaves_with_path(state.params["layers"])
    return {
        "/".join(["layers", *(key.key for key in path[:-1])]): math.prod(leaf.shape[1:])
        for path, leaf in leaves
        if leaf.ndim > 2 and path[-1].key == "kernel"
    }


def stages(plan, elements):
    """Return what a gather along one axis after the other moves: {(axis,): bytes} in bf16."""
    sizes = {axis: size for axis, size in plan.step.mesh.shape.items() if size > 1}
    whole, found = 2 * elements, {}
    for axis, size in sizes.items():
        found[(axis,)] = whole
        whole //= size
    return found


def moved(plan, kind, where, *, backward):
    """Return {(axes): {bytes: runs}} of the collectives of one weight in one pass."""
    found = collections.defaultdict(collections.Counter)
    for each in plan.analysis.collectives:
        if each.kind == kind and f"{where}/" in each.where and ("transpose(" in each.where) == backward:
            assert each.dtype == "bf16"
            found[each.axes][each.bytes_per_device] += each.count
    return dict(found)


def test_each_layer_is_gathered_once_in_each_pass(plan):
    for where, elements in matrices(plan.step.state).items():
        expected = {axes: {size: LAYERS} for axes, size in stages(plan, elements).items()}
        assert moved(plan, "all-gather", where, backward=False) == expected, where
        assert moved(plan, "all-gather", where, backward=True) == expected, where


def test_each_gradient_is_scattered_once(plan):
    for where, elements in matrices(plan.step.state).items():
        expected = {axes: {size: LAYERS} for axes, size in stages(plan, elements).items()}
        assert moved(plan, "reduce-scatter", where, backward=True) == expected, where
        assert moved(plan, "reduce-scatter", where, backward=False) == {}, where


def test_nothing_larger_than_the_largest_matrix_is_gathered(plan):
    params = plan.step.state.params
    largest = max([*matrices(plan.step.state).values(), math.prod(params["embedding"].shape)])
    gathers = [each for each in plan.analysis.collectives if each.kind == "all-gather"]
    assert max(each.bytes_per_device for each in gathers) == 2 * largest


def test_only_vectors_and_scalars_are_summed_whole(plan):
    leaves = jax.tree_util.tree_leaves_with_path(plan.step.state.params)
    matrix_names = {"kernel", "embedding", "head"}
    vectors = sum(math.prod(leaf.shape) for path, leaf in leaves if path[-1].key not in matrix_names)
    scalars = len(leaves) + 8
    sums = [each for each in plan.analysis.collectives if each.kind == "all-reduce"]
    assert sum(each.bytes_per_device * each.count for each in sums) <= 4 * (vectors + scalars)


def test_nothing_else_but_the_alignment_of_scatters_crosses_the_links(plan):
    others = {"all-gather", "reduce-scatter", "all-reduce", "collective-permute"}
    assert {each.kind for each in plan.analysis.collectives} <= others
    link = plan.analysis.estimate.link_bytes
    shifts = [each for each in plan.analysis.collectives if each.kind == "collective-permute"]
    assert sum(each.ici_bytes * each.count for each in shifts) < 0.1 * sum(link.values())


def test_devices_compute_nothing_twice(plan):
    assert plan.analysis.estimate.device_flops * plan.step.mesh.size == plan.analysis.flops.total
    assert not [warning for warning in plan.analysis.warnings if "waits for collectives" not in warning]
