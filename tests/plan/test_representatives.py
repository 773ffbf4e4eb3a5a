"""Small training steps of each kind of model, through the real TPU compiler: they fit, by kernels, and gather bf16."""

import dataclasses
import re

import pytest

import jaxllm
from jaxllm.config import load_config
from jaxllm.plan.hlo import parse_hlo
from jaxllm.plan.plan import make_plan
from jaxllm.plan.topology import parse_topology
from jaxllm.spec import spec_to_json
from tests.plan.plan_configs import needs_libtpu

pytestmark = needs_libtpu

LENGTH = 1280

CONFIG = """\
run_dir: runs/planned
tokenizer: nowhere
model: {{name: {model}, remat: none}}
data: {{train: [{{path: nowhere.txt}}], seq_len: {length}}}
schedule: {{warmup: 1}}
train: {{steps: 10, batch_size: {rows}}}
"""

DENSE = "qwen-7b", "v5e:2x2", {"num_layers": 2, "hidden_size": 512, "vocab_size": 8192}
WINDOWS = "llama2-70b", "v5p:2x2x1", {"num_layers": 2, "hidden_size": 1024, "vocab_size": 32000, "window": (512, None)}
EXPERTS = "deepseek-v2-lite", "v5p:2x2x1", {"num_layers": 2, "hidden_size": 1024, "vocab_size": 32000}
PARTS = {
    "qwen-7b": {"attention": {"num_heads": 8, "num_kv_heads": 8}, "mlp": {"intermediate_size": 1408}},
    "llama2-70b": {"attention": {"num_heads": 8, "num_kv_heads": 2}, "mlp": {"intermediate_size": 2816}},
    "deepseek-v2-lite": {
        "attention": {"num_heads": 8},
        "mlp": {"intermediate_size": 2816},
        "moe": {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 512},
    },
}


@pytest.fixture(scope="module", params=[DENSE, WINDOWS, EXPERTS], ids=["dense", "windows", "experts"])
def plan(request, tmp_path_factory):
    """A published model with fewer and narrower layers, one row for each device."""
    name, slice_name, changes = request.param
    spec, topology = jaxllm.spec(name), parse_topology(slice_name)
    parts = {part: dataclasses.replace(getattr(spec, part), **sizes) for part, sizes in PARTS[name].items()}
    folder = tmp_path_factory.mktemp("plan")
    (folder / "spec.json").write_text(spec_to_json(dataclasses.replace(spec, **changes, **parts)))
    text = CONFIG.format(model=folder / "spec.json", length=LENGTH, rows=topology.num_devices)
    (folder / "plan.yaml").write_text(text)
    return make_plan(load_config([folder / "plan.yaml"]), topology)


def arrays(plan):
    """Yield the arrays of all instructions, those inside of fusions too, which are written nowhere."""
    for computation in parse_hlo(plan.step.hlo).computations.values():
        for instruction in computation.instructions.values():
            yield from instruction.arrays


def test_it_fits(plan):
    assert plan.fits and plan.memory.total < plan.memory.limit


def test_no_scores_are_written_down(plan):
    kernels = set(re.findall(r"jaxllm_flash_\w+", plan.step.hlo))
    assert kernels == {"jaxllm_flash_forward", "jaxllm_flash_backward"}
    assert not [array for array in arrays(plan) if array.dims.count(LENGTH) > 1]


def test_weights_are_gathered_in_bf16(plan):
    gathers = [each for each in plan.analysis.collectives if each.kind == "all-gather"]
    assert {each.dtype for each in gathers if each.bytes_per_device >= 2**20} == {"bf16"}


def test_it_computes_what_the_model_owes_and_nothing_twice(plan):
    analysis, spec = plan.analysis, plan.step.spec
    assert analysis.flops.unknown == frozenset()
    assert analysis.estimate.device_flops * plan.step.mesh.size == pytest.approx(analysis.flops.total, rel=0.02)
    # The backward kernel computes the scores again, which no name scope tells apart, and skips what windows hide.
    assert analysis.flops.once == pytest.approx(analysis.model_flops, rel=0.1 if spec.window else 0.05)


def test_nothing_is_replicated(plan):
    assert not [text for text in plan.analysis.warnings if "replicate" in text or "times the FLOPs" in text]
