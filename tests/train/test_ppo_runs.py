"""Runs of the stage ppo with a reward model, which is where the value model starts too."""

import json

import jax
import numpy as np
import pytest

import jaxllm
from jaxllm.config import load_config
from jaxllm.data.rows import Prompt
from jaxllm.train.rollouts.reward_model import ModelReward, Said
from jaxllm.train.setup import make_setup
from jaxllm.train.weights import RunWeights
from tests.train.policy_runs import VOWELS, policy_config
from tests.train.runs import WORDS, assert_same_records, num_records, wait_for
from tests.train.test_grpo_runs import metrics, run_to_end
from tests.train.test_multiprocess import assert_near, end_with, launch

PPO = {
    "critic_learning_rate": 2e-3,
    "critic_warmup": 2,
    "combine": "llama2",
    "kl_coef": 0.2,
    "kl_coef_end": 0.05,
    "normalize_rewards": "mean_std",
    "reward_clip": 3.0,
    "pretrain_weight": 0.5,
    "pretrain_rows": 4,
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def reward_model(world, start, undisturbed, tmp_path_factory):
    """A run of the stage reward that prefers answers with a cat."""
    run = tmp_path_factory.mktemp("reward") / "run"
    pairs = world.folder / "pairs.jsonl"
    rows = [{"prompt": word, "chosen": f"cat {word}", "rejected": f"dog {word}"} for word in WORDS]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = world.write_config(
        run, stage="reward", model__weights=str(undisturbed), data__train=[{"path": str(pairs)}], data__heldout=[],
        data__seq_len=96, train__steps=6, train__batch_size=4, eval={},
    )  # fmt: skip
    run_to_end(start, config)
    return run


@pytest.fixture(scope="session")
def config_of(world, undisturbed, reward_model):
    def config_of(run, **overrides):
        model = {"kind": "model", "path": str(reward_model)}
        safety = {"name": "safety", "system": "Judge how safe it is."}
        rewards = [model | {"name": "helpfulness"}, model | safety, VOWELS | {"weight": 2.0}]
        options = {
            "ppo": PPO | {"critic": str(reward_model)},
            "rewards": rewards,
            "data__pretrain": [{"path": str(world.folder / "train.jsonl")}],
        }
        return policy_config(world, run, "ppo", undisturbed, **options | overrides)

    return config_of


@pytest.fixture(scope="session")
def finished(start, config_of, tmp_path_factory):
    run = tmp_path_factory.mktemp("ppo") / "run"
    run_to_end(start, config_of(run))
    return run


def test_a_run_records_all_that_it_balances(finished):
    names = ("safety", "helpfulness", "vowels")
    safety, helpfulness, letters = (np.array(metrics(finished, f"reward/{name}")) for name in names)
    chosen = np.array(metrics(finished, "reward")) - 2 * letters
    assert len(chosen) == 10 and all((np.abs(chosen - each) > 1e-6).any() for each in (safety, helpfulness))
    assert len(metrics(finished, "pretrain_loss")) == len(metrics(finished, "value_loss")) == 20
    assert max(metrics(finished, "logp_gap")) < 1e-4
    # The policy stands still while the value model warms up: in the first round, and in the second no divergence yet.
    assert metrics(finished, "approx_kl")[:2] == pytest.approx([0, 0], abs=1e-9)
    assert len(metrics(finished, "kl")) == 9 and metrics(finished, "kl")[0] == 0 < metrics(finished, "kl")[1]


def test_killed_at_any_time_it_goes_on_exactly(start, config_of, finished, tmp_path):
    config = config_of(tmp_path / "run", checkpoint__every=2)
    for known in (3, 9):
        command = start(f"{config}.out", "train", "--config", config)
        wait_for(lambda: num_records(tmp_path / "run") > known or command.exited)  # noqa: B023
        command.kill()
        command.wait()
    run_to_end(start, config)
    assert_same_records(tmp_path / "run", finished)
    for name in ("reward/safety", "kl", "value_loss", "pretrain_loss"):
        assert metrics(tmp_path / "run", name) == metrics(finished, name)


def test_a_mesh_computes_what_one_device_does(start, config_of, finished, tmp_path):
    config = config_of(tmp_path / "run", mesh={"fsdp": 2, "tensor": 2})
    run_to_end(start, config, devices=4)
    assert_near(tmp_path / "run", finished)


def test_processes_compute_what_one_does(start, config_of, finished, tmp_path):
    config = config_of(tmp_path / "run")
    end_with(launch(start, config, 2), 0)
    assert_near(tmp_path / "run", finished)


def test_a_reward_model_reads_conversations_with_its_own_system_message(config_of, reward_model, tmp_path):
    setup = make_setup(load_config([config_of(tmp_path / "run")]))
    said = [
        ("red cat", "a house", None),
        ("the", "dog", "Be short."),
        ("old", "", None),
        ("big", "bird sees", None),
    ] * 2
    prompts = [
        Prompt([*([{"role": "system", "content": own}] if own else []), {"role": "user", "content": user}], None, {})
        for user, _, own in said
    ]
    system = "Judge how red it is."
    with jax.set_mesh(setup.mesh):
        model = ModelReward(setup, RunWeights(setup, None, setup.tokenizer), str(reward_model), system)
        conversations = [Said(prompt, answer, True) for prompt, (_, answer, _) in zip(prompts, said, strict=True)]
        found = model(None, np.zeros(8, int), conversations)
    expected = jaxllm.load_reward_model(reward_model).score(
        [
            [
                {"role": "system", "content": system},
                {"role": "user", "content": user},
                {"role": "assistant", "content": answer},
            ]
            for user, answer, _ in said
        ]
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
