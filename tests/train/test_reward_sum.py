"""What parts of a reward tell of answers, their sum, and the scale that a run keeps."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.config.alignment import PPOConfig, RewardConfig
from jaxllm.errors import InputError
from jaxllm.tokenizers.train import train_bpe
from jaxllm.train.rollouts.answers import _by_row, _Text
from jaxllm.train.rollouts.reward_sum import RewardScale, accuracy, combine, require_steps, step_arrays, weigh_steps

MATH, STEPS = RewardConfig(kind="math"), RewardConfig(kind="function", path="m:f", name="steps", weight=2.0)
NO_SAFETY = np.zeros(2, bool)


def test_parts_that_tell_of_steps_and_of_answers_meet_at_the_last_token():
    told = [{"math": 1.0, "steps": {1: 0.5, 4: 0.25}}, {"math": 0.0, "steps": {2: 1.0}}]
    worth = weigh_steps([MATH, STEPS], told, [5, 3])
    assert worth.parts["math"].tolist() == [1, 0] and worth.parts["steps"].tolist() == [0.75, 1]
    assert worth.steps == [{1: 1.0, 4: 1.5}, {2: 2.0}]
    assert combine([MATH, STEPS], worth.parts, NO_SAFETY).tolist() == [2.5, 2]
    scores, ends = step_arrays(worth.steps, np.array([3, 4]))
    assert scores.tolist() == [[1, 1.5], [2, 0]] and ends.tolist() == [[3, 6], [5, -1]]
    assert accuracy([MATH, STEPS], worth.parts).tolist() == [True, False] and accuracy([STEPS], worth.parts) is None


def test_rewards_of_steps_are_taken_where_they_are_wanted_and_nowhere_else():
    answers, steps = weigh_steps([MATH], [{"math": 1.0}], [5]), weigh_steps([STEPS], [{"steps": {1: 1.0}}], [5])
    require_steps(answers, False)
    require_steps(steps, True)
    with pytest.raises(InputError, match="no part gives rewards of steps"):
        require_steps(answers, True)
    with pytest.raises(InputError, match=r"only grpo\.supervision 'process'"):
        require_steps(steps, False)


def test_llama2_takes_the_score_of_safety_where_it_matters():
    rewards = [RewardConfig(kind="model", path="x", name=name) for name in ("safety", "helpfulness")]
    rewards.append(RewardConfig(kind="length", target=1, weight=0.5))
    parts = {"safety": np.array([3.0, -2.0, 3.0]), "helpfulness": np.array([1.0, 1.0, 1.0]), "length": np.ones(3)}
    found = combine(rewards, parts, np.array([True, False, False]), "llama2")
    np.testing.assert_allclose(found, [3.5, -1.5, 1.5])


@given(rounds=st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=6), min_size=1, max_size=5))
def test_a_scale_that_is_saved_and_restored_goes_on_as_one_that_was_not(rounds):
    config = PPOConfig(normalize_rewards="mean_std", reward_clip=2.0)
    whole, restored = RewardScale(config), RewardScale(config)
    for scores in rounds:
        fresh = RewardScale(config)
        fresh.restore(restored.state())
        restored = fresh
        found = whole(np.array(scores))
        np.testing.assert_array_equal(found, restored(np.array(scores)))
        assert np.abs(found).max() <= 2
    seen = np.concatenate(rounds)
    np.testing.assert_allclose(whole.moments.mean, seen.mean(), atol=1e-9)


def test_whitening_is_that_of_one_round():
    scale = RewardScale(PPOConfig(normalize_rewards="whiten"))
    for scores in (np.array([1.0, 2.0, 3.0]), np.array([10.0, 30.0, 50.0])):
        np.testing.assert_allclose(scale(scores), [-1, 0, 1])
    assert scale.state()["count"] == 0


def test_a_step_ends_with_the_token_that_completes_its_characters():
    tokenizer = train_bpe(["ab cd äé " * 3], vocab_size=268)
    text = "ab ä é"
    ids = tokenizer.encode(text)
    found = _Text.of(tokenizer, tokenizer.encode("x"), [*ids, 0], finished=True)
    assert found.text == text and found.num_tokens == len(ids) + 1
    for end in range(1, len(text) + 1):
        token = found.token_at(end)
        assert len(tokenizer.decode(ids[: token + 1]).rstrip("\ufffd")) >= end
        assert token == 0 or len(tokenizer.decode(ids[:token]).rstrip("\ufffd")) < end


def test_a_step_of_an_empty_answer_ends_with_its_stop_token():
    tokenizer = train_bpe(["ab cd äé " * 3], vocab_size=268)
    empty = _Text.of(tokenizer, tokenizer.encode("x"), [0], finished=True)
    assert (empty.text, empty.num_tokens, empty.token_at(0)) == ("", 1, 0)


def test_of_processes_that_hold_the_same_row_the_first_is_heard():
    assert _by_row([[(0, {"a": 1}), (1, {"a": 2})], [(1, {"a": 3}), (2, {"a": 4})]]) == [{"a": 1}, {"a": 2}, {"a": 4}]
