"""Sampled answers against the training forward pass, on meshes and in batches of any make."""

import dataclasses
import functools
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.data.prefix_layout import PrefixIds
from jaxllm.errors import InputError
from jaxllm.generate import decoding
from jaxllm.generate.engine import Generator
from jaxllm.generate.rollout import Sampler
from jaxllm.generate.samples import rollout_rows
from jaxllm.generate.sampling import Sampling
from jaxllm.nn.adapter import LowRank, Prefix
from jaxllm.nn.model import abstract_params, apply
from jaxllm.sharding.mesh import make_mesh
from jaxllm.spec import DynamicNTK, Rope, tiny
from jaxllm.types import Batch
from tests.generate import two_samplers
from tests.tiny_models import LLAMA, WINDOWED_QWEN, random_params, structures

LENGTH, NEW = 24, 9
PREFIX = PrefixIds(mask=60, gmask=None, smask=None, sop=58, eop=57)
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [1, 2, 3], [40, 41, 42, 43, 44], [9]]
DYNAMIC = {
    f"dynamic, {keys}": dataclasses.replace(
        LLAMA, position=Rope(scaling=DynamicNTK(factor=2.0, original_max_position=6, cached_keys=keys))
    )
    for keys in ("rotated", "unrotated")
}
SPECS = structures() | {"windowed-qwen": WINDOWED_QWEN, "llama": LLAMA} | DYNAMIC
QUICK = ("windowed-qwen", "chatglm-6b")
STOP = 13


def keys_of(number, seed=0):
    return np.asarray(jax.random.key_data(jax.random.split(jax.random.key(seed), number)))


def prompts_for(spec):
    if spec.mask == "causal":
        return PROMPTS
    return [[*prompt, PREFIX.mask, PREFIX.sop] for prompt in PROMPTS]


def make_sampler(spec, mesh=None, **options):
    options = dict(seq_len=LENGTH, max_new_tokens=NEW, eos_ids=(STOP,)) | options
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    return Sampler(spec, mesh=mesh, prefix_ids=PREFIX if spec.mask == "prefix" else None, **options)


@functools.cache
def params_of(name):
    return random_params(SPECS[name], scale=0.15)


def place(spec, params, mesh):
    return jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), params, abstract_params(spec, mesh))


def training_logps(spec, params, samples, temperature, adapter=None):
    rows = rollout_rows(samples, spec, PREFIX if spec.mask == "prefix" else None)
    batch = Batch(**{name: jnp.asarray(array) for name, array in rows.items()})
    return np.asarray(_training_logps(spec, params, batch, temperature, adapter))


forward = jax.jit(apply, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _training_logps(spec, params, batch, temperature, adapter):
    logits = apply(spec, params, batch, train=True, adapter=adapter).logits / temperature
    found = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], axis=-1)[..., 0]
    return found * batch.loss_weights


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in SPECS]
)
def test_log_probabilities_are_those_of_the_training_forward_pass(name):
    spec, params = SPECS[name], params_of(name)
    sampler = make_sampler(spec, temperature=1.3)
    samples = sampler.sample(params, None, prompts_for(spec), keys_of(8))
    np.testing.assert_allclose(samples.logps, training_logps(spec, params, samples, 1.3), atol=1e-4)
    assert (samples.logps != 0).sum() == (samples.lengths - samples.prompt_lengths).sum()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "deepseek-v2"])
def test_kernels_sample_what_plain_operations_do(name):
    spec, params = SPECS[name], params_of(name)
    plain, kernels = (
        make_sampler(spec, attention_impl=impl).sample(params, None, PROMPTS, keys_of(4))
        for impl in ("reference", "pallas")
    )
    np.testing.assert_array_equal(kernels.tokens, plain.tokens)
    np.testing.assert_allclose(kernels.logps, plain.logps, atol=1e-4)


def test_adapters_are_part_of_the_model():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape) * 0.3, jnp.float32)

    layers, width, rank, heads = LLAMA.num_layers, LLAMA.hidden_size, 2, (2, 8)
    attention = {
        "v": {"kernel": LowRank(a=draw(layers, width, rank), b=draw(layers, rank, *heads))},
        "prefix": Prefix(k=draw(layers, 5, *heads), v=draw(layers, 5, *heads)),
    }
    adapter = {"layers": {"attention": attention}, "head": LowRank(a=draw(width, rank), b=draw(rank, LLAMA.vocab_size))}
    params = params_of("llama")
    samples = make_sampler(LLAMA).sample(params, adapter, PROMPTS, keys_of(4))
    np.testing.assert_allclose(samples.logps, training_logps(LLAMA, params, samples, 1.0, adapter), atol=1e-4)
    assert np.abs(samples.logps - training_logps(LLAMA, params, samples, 1.0)).max() > 0.1


@pytest.mark.slow
def test_activations_have_the_dtype_of_the_run():
    params = params_of("llama")
    samples = make_sampler(LLAMA, compute_dtype=jnp.dtype("bfloat16")).sample(params, None, PROMPTS, keys_of(4))
    error = np.abs(samples.logps - training_logps(LLAMA, params, samples, 1.0)).max()
    assert 1e-4 < error < 0.1


def same(first, second, atol=1e-5):
    np.testing.assert_array_equal(first.tokens, second.tokens)
    np.testing.assert_array_equal(first.lengths, second.lengths)
    np.testing.assert_array_equal(first.finished, second.finished)
    np.testing.assert_allclose(first.logps, second.logps, atol=atol)


MESHES = {
    "fsdp 8": {"fsdp": 8},
    "replica 2 x fsdp 2 x tensor 2": {"replica": 2, "fsdp": 2, "tensor": 2},
    "fsdp 2 x expert 2 x tensor 2": {"fsdp": 2, "expert": 2, "tensor": 2},
}
ON_MESHES = {name: tiny(jaxllm.spec(name)) for name in ("llama2-70b", "deepseek-v2-lite", "chatglm-6b")}
QUICK_MESHES = {("llama2-70b", "replica 2 x fsdp 2 x tensor 2")}


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        pytest.param(*case, marks=() if case in QUICK_MESHES else pytest.mark.slow)
        for case in ((name, mesh) for name in ON_MESHES for mesh in MESHES)
    ],
)
def test_a_mesh_samples_what_one_device_does(name, mesh):
    spec, mesh = ON_MESHES[name], make_mesh(**MESHES[mesh])
    params, keys = random_params(spec, scale=0.1), keys_of(8)
    one = make_sampler(spec).sample(params, None, prompts_for(spec), keys)
    many = make_sampler(spec, mesh, batch_size=8).sample(place(spec, params, mesh), None, prompts_for(spec), keys)
    same(many, one)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp", "tensor"])
def test_processes_sample_together_what_one_does_alone(mesh, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    root = Path(__file__).parents[2]
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(root)}
    files = [tmp_path / f"{process}.npz" for process in range(2)]
    command = [sys.executable, two_samplers.__file__, port]
    workers = [
        subprocess.Popen([*command, str(process), mesh, file], env=environment) for process, file in enumerate(files)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    spec, keys = two_samplers.SPEC, two_samplers.row_keys()
    sampler = make_sampler(spec, **two_samplers.OPTIONS)
    alone = sampler.sample(random_params(spec, scale=0.15), None, two_samplers.PROMPTS, keys)
    for process, file in enumerate(files):
        rows, found = two_samplers.part_of(mesh, process), np.load(file)
        rows = slice(rows.start * two_samplers.SAMPLES, rows.stop * two_samplers.SAMPLES)
        np.testing.assert_array_equal(found["tokens"], alone.tokens[rows])
        np.testing.assert_array_equal(found["lengths"], alone.lengths[rows])
        np.testing.assert_allclose(found["logps"], alone.logps[rows], atol=1e-5)


@functools.cache
def reference_samples():
    return make_sampler(LLAMA).sample(params_of("llama"), None, PROMPTS, keys_of(12))


@pytest.mark.parametrize("batch_size", [2, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 5, 6))])
def test_an_answer_does_not_depend_on_the_rows_beside_it(batch_size):
    samples = make_sampler(LLAMA, batch_size=batch_size).sample(params_of("llama"), None, PROMPTS, keys_of(12))
    same(samples, reference_samples())


def test_answers_to_a_prompt_differ_and_are_those_to_repeated_prompts():
    samples = reference_samples()
    assert len({tuple(samples.answer(row)) for row in range(12)}) > 8
    repeated = [prompt for prompt in PROMPTS for _ in range(3)]
    same(make_sampler(LLAMA).sample(params_of("llama"), None, repeated, keys_of(12)), samples)
    order = np.random.default_rng(0).permutation(12)
    shuffled = make_sampler(LLAMA).sample(
        params_of("llama"), None, [repeated[row] for row in order], keys_of(12)[order]
    )
    np.testing.assert_array_equal(shuffled.tokens, samples.tokens[order])


def test_answers_end_with_a_stop_token_or_at_their_limit():
    samples = make_sampler(LLAMA, eos_ids=range(4)).sample(params_of("llama"), None, PROMPTS, keys_of(32))
    assert 0 < samples.finished.sum() < 32
    for row, prompt in enumerate(prompt for prompt in PROMPTS for _ in range(8)):
        answer = samples.answer(row)
        assert samples.tokens[row, : len(prompt)].tolist() == prompt
        assert not samples.tokens[row, samples.lengths[row] :].any()
        stops = [token < 4 for token in answer]
        assert stops == [False] * (len(answer) - 1) + [bool(samples.finished[row])]
        assert samples.finished[row] or len(answer) == NEW
    alone = make_sampler(LLAMA, eos_ids=range(61)).sample(params_of("llama"), None, PROMPTS, keys_of(4))
    assert (alone.lengths == alone.prompt_lengths + 1).all() and alone.finished.all()


@pytest.mark.slow
def test_greedy_answers_are_the_most_likely_ones():
    sampler = make_sampler(LLAMA, temperature=0.7, eos_ids=())
    samples = sampler.sample(params_of("llama"), None, PROMPTS, keys_of(4), greedy=True)
    width = max(map(len, PROMPTS))
    ids, mask = (np.zeros((4, width), np.int32) for _ in range(2))
    for row, prompt in enumerate(PROMPTS):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    expected = Generator(LLAMA, params_of("llama"), ids, mask, max_new_tokens=NEW, sampling=Sampling()).decode(NEW)
    np.testing.assert_array_equal([samples.answer(row) for row in range(4)], expected)
    np.testing.assert_allclose(samples.logps, training_logps(LLAMA, params_of("llama"), samples, 0.7), atol=1e-4)


def test_filters_limit_what_is_sampled_and_not_its_log_probability():
    """Answers of one token: every one of them must be among the few most likely, and a softmax over all weighs it."""
    sampler = make_sampler(LLAMA, top_k=3, num_ids=50, max_new_tokens=1)
    samples = sampler.sample(params_of("llama"), None, PROMPTS[:1], keys_of(64))
    rows = Batch(**{name: jnp.asarray(array[:1]) for name, array in rollout_rows(samples, LLAMA).items()})
    logits = np.asarray(forward(LLAMA, params_of("llama"), rows).logits)[0, len(PROMPTS[0]) - 1]
    best = np.argsort(-logits[:50])[:3]
    found = samples.tokens[:, len(PROMPTS[0])]
    assert set(found) == set(best)
    whole = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    np.testing.assert_allclose(samples.logps[:, len(PROMPTS[0]) - 1], whole[found], atol=1e-4)


def test_rounds_share_their_programs():
    sampler = make_sampler(LLAMA, batch_size=4)
    sampler.sample(params_of("llama"), None, PROMPTS, keys_of(8))
    sizes = decoding.prefill._cache_size(), decoding.decode._cache_size()
    for seed in range(3):
        prompts = [[seed + 1] * length for length in (3, 15, 1, 2, 7)[: 4 + seed % 2]]
        sampler.sample(params_of("llama"), None, prompts, keys_of(2 * len(prompts), seed))
    make_sampler(LLAMA, batch_size=4, temperature=0.5).sample(params_of("llama"), None, PROMPTS, keys_of(8))
    assert (decoding.prefill._cache_size(), decoding.decode._cache_size()) == sizes


def test_stopping_leaves_no_samples():
    asked = []

    def stop():
        asked.append(True)
        return len(asked) == 2

    sampler = make_sampler(LLAMA, batch_size=4)
    assert sampler.sample(params_of("llama"), None, PROMPTS, keys_of(12), stop=stop) is None
    assert len(asked) == 2
    assert sampler.sample(params_of("llama"), None, PROMPTS, keys_of(12), stop=lambda: False) is not None


def test_wishes_to_stop_are_heard_during_long_answers():
    asked = []
    sampler = make_sampler(LLAMA, seq_len=64, max_new_tokens=40, eos_ids=())
    samples = sampler.sample(params_of("llama"), None, PROMPTS, keys_of(4), stop=lambda: asked.append(True))
    assert len(asked) == 3
    assert (samples.lengths == samples.prompt_lengths + 40).all()
    np.testing.assert_allclose(samples.logps, training_logps(LLAMA, params_of("llama"), samples, 1.0), atol=1e-4)


def test_rows_train_answers_alone():
    samples = reference_samples()
    rows = rollout_rows(samples, LLAMA)
    assert {array.shape for array in rows.values()} == {(12, LENGTH)}
    for row in range(12):
        prompt, length = samples.prompt_lengths[row], samples.lengths[row]
        trained = rows["loss_weights"][row] == 1
        assert rows["targets"][row, trained].tolist() == samples.answer(row)
        assert np.flatnonzero(trained).tolist() == list(range(prompt - 1, length - 1))
        assert rows["positions"][row, :length].tolist() == list(range(length))
        assert rows["segment_ids"][row].tolist() == [1] * length + [0] * (LENGTH - length)
    assert (rows["loss_weights"] != 0).tolist() == (samples.logps != 0).tolist()


@pytest.mark.parametrize(
    ("options", "prompts", "message"),
    [
        ({"max_new_tokens": LENGTH}, PROMPTS, "rollout.max_new_tokens: found 24; expected 1 to 23"),
        ({}, [[1], [2] * 16], "prompt 1 has 16 tokens; expected 1 to 15"),
        ({}, [[1], []], "prompt 1 has 0 tokens"),
        ({}, PROMPTS[:3], "found 4 keys for 3 prompts"),
        ({"batch_size": 4, "mesh": {"fsdp": 8}}, PROMPTS, "4 answers cannot be split over 8 ways"),
        ({"top_p": 1.5}, PROMPTS, "top_p must be in"),
    ],
)
def test_rounds_that_cannot_be_are_refused(options, prompts, message):
    mesh = make_mesh(**options.pop("mesh")) if "mesh" in options else None
    with pytest.raises(InputError, match=message):
        make_sampler(LLAMA, mesh, **options).sample(params_of("llama"), None, prompts, keys_of(4))
