"""Runs of the stage grpo: they learn, and neither kills nor meshes nor processes change what they compute."""

import numpy as np
import pytest

from jaxllm.train.records.metrics_file import read_metrics
from tests.train.policy_runs import policy_config
from tests.train.runs import assert_same_records, num_records, wait_for
from tests.train.test_multiprocess import assert_near, end_with, launch


def run_to_end(start, config, **options):
    command = start(f"{config}.out", "train", "--config", config, **options)
    assert command.wait() == 0, command.text


def metrics(run, name, kind="train"):
    return [row[name] for row in read_metrics(run / "metrics.jsonl") if row["kind"] == kind and name in row]


@pytest.fixture(scope="session")
def finished(world, start, undisturbed, tmp_path_factory):
    """The folder of a finished run of 20 updates in 10 rounds."""
    run = tmp_path_factory.mktemp("grpo") / "run"
    run_to_end(start, policy_config(world, run, "grpo", undisturbed))
    return run


def test_a_run_learns_what_is_rewarded_and_records_its_rounds(finished):
    rewards = metrics(finished, "reward")
    assert len(rewards) == 10 and np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.05
    held_out = metrics(finished, "reward", "eval")
    assert held_out[-1] > 0 and metrics(finished, "loss", "eval") == [-reward for reward in held_out]
    # What was sampled is what is trained on.
    assert max(metrics(finished, "logp_gap")) < 1e-4
    kl = metrics(finished, "kl")
    assert kl[0] == 0 and min(kl[2:]) > 0
    assert metrics(finished, "approx_kl")[0] < 1e-9 < metrics(finished, "approx_kl")[1]
    assert len(metrics(finished, "policy_loss")) == 20


def test_killed_at_any_time_it_goes_on_exactly(world, start, undisturbed, finished, tmp_path):
    config = policy_config(world, tmp_path / "run", "grpo", undisturbed, checkpoint__every=2)
    command = start(f"{config}.out", "train", "--config", config)
    wait_for(lambda: num_records(tmp_path / "run") > 9 or command.exited)
    command.kill()
    command.wait()
    run_to_end(start, config)
    assert_same_records(tmp_path / "run", finished)
    for name in ("reward", "kl", "entropy", "answer_tokens"):
        assert metrics(tmp_path / "run", name) == metrics(finished, name)


@pytest.mark.slow
def test_a_moving_reference_and_rewards_of_steps_go_on_exactly_too(world, start, undisturbed, tmp_path):
    options = {
        "grpo": {"reference_every": 3, "supervision": "process", "drop_equal_groups": True},
        "rewards": [{"kind": "function", "path": "tests.train.policy_runs:vowel_steps"}],
        "checkpoint__every": 2,
    }
    configs = [policy_config(world, tmp_path / name, "grpo", undisturbed, **options) for name in ("whole", "killed")]
    run_to_end(start, configs[0])
    command = start(f"{configs[1]}.out", "train", "--config", configs[1])
    wait_for(lambda: num_records(tmp_path / "killed") > 8 or command.exited)
    command.kill()
    command.wait()
    run_to_end(start, configs[1])
    assert_same_records(tmp_path / "killed", tmp_path / "whole")
    kl = metrics(tmp_path / "whole", "kl")
    assert metrics(tmp_path / "killed", "kl") == kl
    assert [number for number, each in enumerate(kl) if each == 0] == [0, 3, 6, 9]


@pytest.mark.slow
def test_a_mesh_computes_what_one_device_does(world, start, undisturbed, finished, tmp_path):
    config = policy_config(world, tmp_path / "run", "grpo", undisturbed, mesh={"fsdp": 2, "tensor": 2})
    run_to_end(start, config, devices=4)
    assert_near(tmp_path / "run", finished)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{}, {"tensor": 2}])
def test_processes_compute_what_one_does(world, start, undisturbed, finished, tmp_path, mesh):
    config = policy_config(world, tmp_path / "run", "grpo", undisturbed, mesh=mesh)
    end_with(launch(start, config, 2), 0)
    assert_near(tmp_path / "run", finished)
