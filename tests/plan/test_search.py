"""Candidates, what arithmetic says of them, and the search on a tiny model."""

import dataclasses
import itertools

import pytest
import yaml

import jaxllm
from jaxllm.config import load_config
from jaxllm.errors import InputError
from jaxllm.plan.compile import plan_computation
from jaxllm.plan.predict import Layout, kept_per_token, predict
from jaxllm.plan.search import config_lines, describe, enumerate_candidates, search
from jaxllm.plan.topology import parse_topology
from tests.plan.plan_configs import needs_libtpu, tiny_config, write_config

SLICE = parse_topology("v5e:2x2")
POD = parse_topology("v5p:8x8x8")


def big(tmp_path, *overrides):
    config = tiny_config(tmp_path, "data.seq_len=4096", "train.batch_size=512", *overrides)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, attention_impl=None))


def layout(**changes):
    sizes = {"replica": 1, "fsdp": 512, "expert": 1, "tensor": 1, "microbatches": 1} | changes
    ways = sizes["fsdp"] * sizes["expert"] * sizes["tensor"]
    return Layout(**sizes, params=7_721_324_544 // ways)


def test_less_is_kept_the_more_is_recomputed(tmp_path):
    spec = jaxllm.spec("qwen-7b")
    policies = ("none", "dots", "dots_with_no_batch_dims", "full")
    kept = [kept_per_token(big(tmp_path, f"model.remat={policy}"), spec, 1) for policy in policies]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 4
    assert kept[-1] == 2 * spec.hidden_size


def test_kept_products_are_those_that_a_compiled_step_keeps(tmp_path):
    """Of two Qwen-1.8B layers at 4 rows of 1024 on v5e:2x2, 876.0 MiB were compiled under "dots"."""
    spec = jaxllm.spec("qwen-1.8b")
    config = tiny_config(tmp_path, "data.seq_len=1024", "model.remat=dots")
    assert kept_per_token(config, spec, 1) * 2 * 4 * 1024 == pytest.approx(876.0 * 2**20, rel=0.001)


def test_prediction_falls_with_more_ways_and_more_microbatches(tmp_path):
    spec, config = jaxllm.spec("qwen-7b"), big(tmp_path, "train.batch_size=2048")
    one = predict(config, spec, POD, layout())
    assert predict(config, spec, POD, layout(microbatches=4)).memory_bytes < one.memory_bytes
    assert predict(config, spec, POD, layout(microbatches=4)).step_s > one.step_s
    assert predict(config, spec, POD, layout(replica=8, fsdp=64)).memory_bytes > one.memory_bytes
    assert predict(config, spec, POD, layout(fsdp=64, tensor=8)).step_s > one.step_s
    slower = predict(
        dataclasses.replace(config, model=dataclasses.replace(config.model, remat="none")), spec, POD, layout()
    )
    assert slower.memory_bytes > one.memory_bytes and slower.step_s < one.step_s


@needs_libtpu
def test_candidates_divide_the_devices_the_batch_and_the_model(tmp_path):
    config = tiny_config(tmp_path, "train.batch_size=12")
    candidates = enumerate_candidates(config, SLICE)
    assert len({describe(each.config) for each in candidates}) == len(candidates)
    meshes = {tuple(each.config.mesh.sizes().values()) for each in candidates}
    # The model has two key-value heads: tensor 4 is out.
    assert meshes == {(1, 4, 1, 1), (2, 2, 1, 1), (4, 1, 1, 1), (1, 2, 1, 2), (2, 1, 1, 2)}
    for candidate in candidates:
        plan_computation(candidate.config, SLICE)
    times = [each.prediction.step_s for each in candidates]
    assert all(before <= after for before, after in itertools.pairwise(times))


@needs_libtpu
def test_replicas_lie_across_slices_and_experts_only_where_there_are_some(tmp_path):
    two = dataclasses.replace(SLICE, num_slices=2)
    assert {each.config.mesh.replica % 2 for each in enumerate_candidates(tiny_config(tmp_path), two)} == {0}
    mixture = tiny_config(tmp_path, model="deepseek-v2-lite")
    assert {each.config.mesh.expert for each in enumerate_candidates(mixture, SLICE)} == {1, 2, 4}


@needs_libtpu
def test_microbatches_divide_every_batch_of_a_ramp(tmp_path):
    ramp = "train.batch_ramp={start: 8, increment: 8, samples: 100}"
    parts = {each.config.train.grad_accum for each in enumerate_candidates(tiny_config(tmp_path, ramp), SLICE)}
    assert parts == {1, 2, 4}


@needs_libtpu
def test_a_batch_that_nothing_divides_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"search: no mesh of 4 devices divides model .* a batch of 3 rows"):
        enumerate_candidates(tiny_config(tmp_path, "train.batch_size=3"), parse_topology("v5e:2x2"))


@needs_libtpu
def test_search_compiles_the_best_and_prints_lines_that_load(tmp_path):
    notes = []
    plan, *others = search(tiny_config(tmp_path, "mesh.tensor=2"), SLICE, top=1, note=notes.append)
    assert others == [] and plan.fits
    assert "candidates" in notes[0] and "MFU" in notes[-1]
    lines = config_lines(plan.step.config)
    assert set(yaml.safe_load(lines)) == {"mesh", "train", "model"}
    (tmp_path / "found.yaml").write_text(lines)
    # It wins over another mesh in the config that it is added to.
    loaded = load_config([str(write_config(tmp_path)), str(tmp_path / "found.yaml")], [])
    assert loaded == plan.step.config


@needs_libtpu
def test_search_that_finds_nothing_says_what_it_tried(tmp_path):
    notes = []
    config = tiny_config(tmp_path, "data.seq_len=1048576", "train.batch_size=4")
    assert search(config, SLICE, top=1, note=notes.append) == []
    assert notes[0] == "28 candidates, 0 of them may fit by arithmetic"
    assert notes[1].startswith("the smallest: fsdp 2 x tensor 2, 2 microbatches, remat full, about ")
