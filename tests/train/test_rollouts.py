"""Rounds of answers as batches: each answer as often as asked, again after a restore, and none that was stopped."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import jaxllm
from jaxllm.config import load_config
from jaxllm.data.rows import Prompt
from jaxllm.errors import InputError
from jaxllm.rewards.base import checked
from jaxllm.tokenizers.chat import CHAT_FORMATS
from jaxllm.train.rollouts.reward_model import ModelReward, Said
from jaxllm.train.rollouts.setup import make_rollouts
from jaxllm.train.setup import make_setup, open_sources
from jaxllm.train.step import init_state
from jaxllm.train.tuning.headless import without_head
from jaxllm.train.weights import RunWeights
from tests.saved_runs import save_run
from tests.test_reward_models import SPEC, by_hand, internlm2_folder
from tests.tiny_models import random_params
from tests.train.policy_runs import ROLLOUT, policy_config


def nan(completions):
    """Reward the second answer with nothing that is a number."""
    return [0.0, float("nan"), *[0.0] * (len(completions) - 2)]


def test_reward_models_as_published_read_texts_up_to_their_own_token(run, tmp_path):
    setup, _, _ = run
    params = {"model": without_head(random_params(SPEC, scale=0.1)), "score": {"kernel": np.ones(SPEC.hidden_size)}}
    internlm2_folder(tmp_path / "rm", params)
    said = [("red cat", "a house", True), ("the", "dog", True), ("the", "dog", False), ("big", "a big", False)] * 2
    conversations = [Said(Prompt([{"role": "user", "content": user}], None, {}), *rest) for user, *rest in said]
    with jax.set_mesh(setup.mesh):
        model = ModelReward(setup, RunWeights(setup, None, setup.tokenizer), str(tmp_path / "rm"), None)
        found = model(None, np.zeros(8, int), conversations)
    published = jaxllm.load_reward_model(tmp_path / "rm")
    whole = [[*each.prompt.messages, {"role": "assistant", "content": each.answer}] for each in conversations]
    np.testing.assert_allclose(found[:2], published.score(whole[:2]), atol=1e-5)
    # Nothing follows an answer that was cut off.
    chat = "<s><|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\ndog"
    ids = [*published.encoder.tokenizer.encode(chat, allow_special=True), 300]
    assert found[2] == pytest.approx(by_hand(SPEC, params, ids), abs=1e-5) and abs(found[2] - found[1]) > 1e-3
    np.testing.assert_allclose(found[:4], found[4:], atol=1e-6)
    config = tmp_path / "rm" / "config.json"
    config.write_text(config.read_text().replace('"reward_token_id": 300', '"reward_token_id": 320'))
    with pytest.raises(InputError, match=r"config\.json: reward_token_id: found 320, expected 0 to 319"):
        ModelReward(setup, RunWeights(setup, None, setup.tokenizer), str(tmp_path / "rm"), None)


def test_a_system_message_that_the_format_cannot_write_is_refused_before_anything_is_sampled(run, tmp_path):
    setup, _, _ = run
    params = {"model": without_head(random_params(setup.spec)), "score": {"kernel": np.ones(setup.spec.hidden_size)}}
    path = save_run(tmp_path / "rm", setup.spec, params, stage="reward", tokenizer=setup.tokenizer)
    setup = dataclasses.replace(setup, encoder=dataclasses.replace(setup.encoder, chat=CHAT_FORMATS["chatglm"]))
    with jax.set_mesh(setup.mesh), pytest.raises(InputError, match=r"rewards: .*rm: chat format chatglm: .* a system"):
        ModelReward(setup, RunWeights(setup, None, setup.tokenizer), path, "Judge how safe it is.")


class Votes:
    """Tells to stop after some questions."""

    def __init__(self, patience):
        self.patience = patience

    def ask(self):
        self.patience -= 1
        return self.patience < 0


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """A setup, its sources, and the state that a run would begin with."""
    folder = tmp_path_factory.mktemp("rollouts")
    path = policy_config(
        world, folder / "run", "grpo", None, model__weights=None, grpo={"kl_coef": 0.0},
        rollout=ROLLOUT | {"epochs": 2}, mesh={"fsdp": 4, "tensor": 2},
    )  # fmt: skip
    setup = make_setup(load_config([path]))
    objective = setup.objective
    with jax.set_mesh(setup.mesh):
        opened = open_sources(setup, folder / "cache", note=print)
        state = init_state(objective.declarations(), setup.optimizer, setup.mesh, seed=0, initializer=setup.initializer)
        yield setup, opened, state


def source_of(run):
    setup, opened, _ = run
    return make_rollouts(setup, opened, RunWeights(setup, None, setup.tokenizer))


def fed(source, state, steps, patience=10**6):
    with source.running(0, Votes(patience)):
        return [source.next(state, None, step) for step in steps]


def test_a_round_gives_each_answer_in_each_epoch_and_a_stopped_one_leaves_no_trace(run):
    _, _, state = run
    source = source_of(run)
    position = json.loads(json.dumps(source.position()))
    assert fed(source, state, [0], patience=0) == [None]
    assert source.position() == position
    assert [source.may_stop(step) for step in range(5)] == [True, False, False, False, True]
    batches = fed(source, state, range(4))
    assert "reward" in batches[0].metrics and not batches[1].metrics
    tokens = [np.asarray(each.batch.rows.tokens) for each in batches]
    epochs = [np.sort(np.concatenate(tokens[first : first + 2]), axis=0) for first in (0, 2)]
    np.testing.assert_array_equal(*epochs)
    assert not np.array_equal(tokens[0], tokens[2])
    after = json.loads(json.dumps(source.position()))
    assert after != position
    again = source_of(run)
    again.restore(after)
    (expected,), (found,) = fed(source, state, [4]), fed(again, state, [4])
    np.testing.assert_array_equal(found.batch.rows.tokens, expected.batch.rows.tokens)
    np.testing.assert_array_equal(found.batch.advantages, expected.batch.advantages)
    assert again.describe(found.document_ids) == source.describe(expected.document_ids)


def test_a_reward_that_is_no_number_is_told_with_the_prompt(run):
    source = source_of(run)
    functions = {"vowels": checked("tests.nan", nan)}
    source.respondent = dataclasses.replace(source.respondent, functions=functions)
    with pytest.raises(InputError, match=r"tests\.nan returned nan; .*prompts\.jsonl:\d+ was "):
        fed(source, run[2], [0])
