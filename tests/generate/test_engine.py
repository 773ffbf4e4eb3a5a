"""Generation against full forward passes: caches, padding, stops, buckets and what is compiled."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.generate import decoding
from jaxllm.generate.engine import Generator, bucket
from jaxllm.generate.sampling import Sampling
from jaxllm.nn.model import apply
from jaxllm.spec import DynamicNTK, Rope
from tests.tiny_models import LLAMA, WINDOWED_QWEN, make_batch, random_params

SPECS = {
    "llama": LLAMA,
    "windowed-qwen": WINDOWED_QWEN,
    "dynamic-llama": dataclasses.replace(LLAMA, position=Rope(scaling=DynamicNTK(factor=2.0, original_max_position=6))),
}
PARAMS = {name: random_params(spec) for name, spec in SPECS.items()}
NEW = 9
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [1, 2, 3], [40, 41, 42, 43, 44]]
ROWS, WIDTH = len(PROMPTS), 7


def padded(prompts, side="left", width=WIDTH):
    ids, mask = np.zeros((len(prompts), width), np.int32), np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt), None) if side == "left" else slice(len(prompt))
        ids[row, place], mask[row, place] = prompt, 1
    return ids, mask


def generator(name, prompts, **options):
    options = dict(max_new_tokens=NEW, sampling=Sampling(), return_logits=True) | options
    return Generator(SPECS[name], PARAMS[name], *padded(prompts, width=max(map(len, prompts))), **options)


def generate(name, prompts, **options):
    return generator(name, prompts, **options).decode(1000)


def full_logits(name, tokens, mask, rope_length):
    """Return the logits of whole rows, computed at once; shapes are padded to the bucket so that one program serves."""
    slots = bucket(tokens.shape[1])
    ids, segments = np.zeros((len(tokens), slots), np.int32), np.zeros((len(tokens), slots), np.int32)
    ids[:, : tokens.shape[1]], segments[:, : mask.shape[1]] = tokens, mask
    batch = make_batch(ids, segments, rope_length=jnp.asarray(rope_length, jnp.int32))
    return np.asarray(forward(SPECS[name], PARAMS[name], batch))


forward = jax.jit(lambda spec, params, batch: apply(spec, params, batch).logits, static_argnums=0)


def rows_with(new_tokens, prompts=PROMPTS):
    ids, mask = padded(prompts)
    return np.hstack([ids, new_tokens]), np.hstack([mask, np.ones_like(new_tokens)]), mask.sum(axis=1)


@pytest.mark.parametrize("name", ["llama", "windowed-qwen"])
def test_cached_decoding_equals_the_full_forward_pass(name):
    """With windows, LogN and Qwen's scaling as well: there the base stays that of the prompt."""
    run = generator(name, PROMPTS)
    new = run.decode(1000)
    tokens, mask, prompt_lengths = rows_with(new)
    whole = full_logits(name, tokens, mask, prompt_lengths if name == "windowed-qwen" else [WIDTH] * ROWS)
    np.testing.assert_allclose(run.step_logits(), whole[:, WIDTH - 1 : WIDTH - 1 + NEW], atol=2e-4)
    np.testing.assert_array_equal(new, run.step_logits().argmax(axis=-1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["windowed-qwen", "dynamic-llama"])
def test_generation_without_cache_recomputes_at_each_length(name):
    run = generator(name, PROMPTS, use_cache=False)
    new = run.decode(1000)
    for step in (0, 1, 4, NEW - 1):
        tokens, mask, prompt_lengths = rows_with(new[:, :step])
        lengths = prompt_lengths + step if name == "windowed-qwen" else [WIDTH + step] * ROWS
        whole = full_logits(name, tokens, mask, lengths)[:, WIDTH + step - 1]
        np.testing.assert_allclose(run.step_logits()[:, step], whole, atol=2e-4)
    cached = generator(name, PROMPTS)
    cached.decode(1000)
    np.testing.assert_allclose(cached.step_logits()[:, 0], run.step_logits()[:, 0], atol=2e-4)
    assert np.abs(cached.step_logits() - run.step_logits()).max() > 1e-3, "lengths pass the limit: the rules differ"


@pytest.mark.slow
def test_dynamic_scaling_agrees_with_and_without_cache_up_to_its_limit():
    prompts = [[5], [9], [11]]
    runs = [generator("dynamic-llama", prompts, use_cache=cache) for cache in (True, False)]
    tokens = [run.decode(1000) for run in runs]
    limit = 6  # tokens in the row, the prompt's one included
    np.testing.assert_array_equal(tokens[0][:, :limit], tokens[1][:, :limit])
    first, second = (run.step_logits()[:, :limit] for run in runs)
    np.testing.assert_allclose(first, second, atol=2e-4)


def test_each_row_continues_as_it_would_alone():
    together = generate("llama", PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        np.testing.assert_array_equal(generate("llama", [prompt] * ROWS)[0], together[row])


@pytest.mark.slow
def test_rows_alone_and_together_agree_for_windowed_qwen_below_its_length_rules():
    spec = dataclasses.replace(WINDOWED_QWEN, position=Rope(), logn=None)
    run = lambda prompts: Generator(  # noqa: E731
        spec,
        PARAMS["windowed-qwen"],
        *padded(prompts, width=max(map(len, prompts))),
        max_new_tokens=NEW,
        sampling=Sampling(),
    ).decode(1000)
    together = run(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        np.testing.assert_array_equal(run([prompt] * ROWS)[0], together[row])


def test_tokens_come_in_any_portions():
    whole = generate("llama", PROMPTS)
    run = generator("llama", PROMPTS)
    portions = []
    while not run.done:
        portions.append(run.decode(2 if len(portions) % 2 else 1))
    np.testing.assert_array_equal(np.hstack(portions), whole)
    assert [portion.shape[1] for portion in portions] == [1, 2, 1, 2, 1, 2]
    assert run.decode(5).shape == (ROWS, 0)


@pytest.mark.slow
def test_keeping_no_logits_changes_no_token():
    np.testing.assert_array_equal(generate("llama", PROMPTS, return_logits=False), generate("llama", PROMPTS))


def test_one_new_token():
    np.testing.assert_array_equal(generate("llama", PROMPTS, max_new_tokens=1), generate("llama", PROMPTS)[:, :1])


def test_rows_that_stop_are_filled_and_all_stopped_ends_early():
    free = generate("llama", PROMPTS)
    stop = int(free[1, 3])
    first = [list(row).index(stop) if stop in row else NEW - 1 for row in free]
    stopped = generate("llama", PROMPTS, eos_ids=(stop,), pad_id=57)
    assert stopped.shape == (ROWS, max(first) + 1)
    for row, at in enumerate(first):
        np.testing.assert_array_equal(stopped[row, : at + 1], free[row, : at + 1])
        assert (stopped[row, at + 1 :] == 57).all()
    alone = generator("llama", [PROMPTS[1]] * ROWS, eos_ids=(stop,), pad_id=57)
    assert alone.decode(1000).shape == (ROWS, first[1] + 1)
    assert alone.done


def test_stopped_rows_do_not_disturb_the_others():
    free = generate("llama", PROMPTS)
    stop = int(free[1, 0])
    assert stop not in free[[0, 2]], "choose another seed: the random model says the same in two rows"
    stopped = generate("llama", PROMPTS, eos_ids=(stop,))
    np.testing.assert_array_equal(stopped[[0, 2]], free[[0, 2]])


def test_seeds_reproduce_and_differ():
    warm = Sampling(temperature=3.0)
    runs = [generate("llama", PROMPTS, sampling=warm, seed=seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (runs[0] != runs[2]).any()
    same_prompts = generate("llama", [PROMPTS[0]] * ROWS, sampling=warm)
    assert (same_prompts[0] != same_prompts[1]).any(), "rows must not share their noise"


def test_repetition_penalty_sees_prompt_and_new_tokens_but_no_padding():
    heavy = Sampling(repetition_penalty=1e6)
    run = generator("llama", PROMPTS, sampling=heavy)
    tokens, logits = run.decode(1000), run.step_logits()
    for row, prompt in enumerate(PROMPTS):
        seen = list(prompt)
        for step in range(NEW):
            adjusted = logits[row, step].astype(np.float64)
            adjusted[seen] = np.where(adjusted[seen] > 0, adjusted[seen] / 1e6, adjusted[seen] * 1e6)
            assert tokens[row, step] == adjusted.argmax()
            seen.append(int(tokens[row, step]))
        assert len(set(seen)) == len(seen)
    ids, mask = padded(PROMPTS)
    ids[1, mask[1] == 0] = tokens[1, 0]
    again = Generator(LLAMA, PARAMS["llama"], ids, mask, max_new_tokens=NEW, sampling=heavy, return_logits=True)
    np.testing.assert_array_equal(again.decode(1000), tokens)


def test_ids_that_mean_no_token_are_never_generated():
    assert generate("llama", PROMPTS, num_ids=4).max() < 4


def test_nothing_is_compiled_again_within_a_bucket(caplog):
    for sampling in (Sampling(), Sampling(temperature=0.5)):
        generate("llama", PROMPTS, sampling=sampling)
    sizes = decoding.prefill._cache_size(), decoding.decode._cache_size()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for length in (1, 2, 11, 20):
            prompts = [list(range(1, 1 + length))] * ROWS
            run = generator("llama", prompts, max_new_tokens=31 - length, sampling=Sampling(), eos_ids=(length,))
            while not run.done:
                run.decode(3)
        for temperature in (0.3, 0.9, 2.0):
            generate("llama", PROMPTS, sampling=Sampling(temperature=temperature), seed=3)
    assert (decoding.prefill._cache_size(), decoding.decode._cache_size()) == sizes
    assert [record.message for record in caplog.records if "Compiling" in record.message] == []


def test_buckets():
    assert [bucket(size) for size in (1, 32, 33, 64, 65, 1000, 1024, 1025)] == [32, 32, 64, 64, 128, 1024, 1024, 2048]


def test_the_state_is_updated_in_place():
    run = generator("llama", PROMPTS)
    before = run.state
    run.decode(1)
    assert before.cache.k.is_deleted()
    assert run.state.cache.k.shape == (LLAMA.num_layers, ROWS, bucket(WIDTH + NEW), 2, 8)
