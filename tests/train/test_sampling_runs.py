"""Rejection sampling as a command: with several processes, and stopped in the middle of an answer."""

import signal

import pytest

from tests.train.policy_runs import policy_config
from tests.train.runs import wait_for
from tests.train.test_multiprocess import assert_told_once, end_with, launch

pytestmark = pytest.mark.slow

ROLLOUT = {"prompts": 4, "samples": 8, "max_new_tokens": 160}


@pytest.fixture(scope="module")
def config(world, undisturbed, tmp_path_factory):
    run = tmp_path_factory.mktemp("sampling") / "run"
    return policy_config(world, run, "grpo", undisturbed, data__seq_len=192, rollout=ROLLOUT)


@pytest.fixture(scope="module")
def best(start, config, tmp_path_factory):
    """The output of one process that nothing disturbs."""
    output = tmp_path_factory.mktemp("best") / "best.jsonl"
    command = start(f"{output}.out", "sample", "--config", config, "--output", output)
    assert command.wait() == 0, command.text
    return output.read_text()


def num_answered(output):
    """Count the prompts that are answered; the first line says what they belong to."""
    journal = output.with_name(f"{output.name}.partial")
    return journal.read_bytes().count(b"\n") - 1 if journal.exists() else 0


def test_stopped_or_killed_it_goes_on_exactly(start, config, best, tmp_path):
    output = tmp_path / "best.jsonl"
    before = 0
    for number, code in ((signal.SIGTERM, 75), (signal.SIGKILL, -9), (signal.SIGINT, 75)):
        command = start(tmp_path / "out", "sample", "--config", config, "--output", output)
        wait_for(lambda: num_answered(output) > before or command.exited)  # noqa: B023
        command.kill(number)
        assert command.wait() == code, command.text
        assert (f"{before} of 24 prompts were answered before; going on" in command.text) == (before > 0)
        before = num_answered(output)
        assert [path.name for path in tmp_path.glob("*best*")] == ["best.jsonl.partial"] and before % 4 == 0
    command = start(tmp_path / "out", "sample", "--config", config, "--output", output)
    assert command.wait() == 0, command.text
    assert output.read_text() == best and [path.name for path in tmp_path.glob("*best*")] == ["best.jsonl"]


def test_processes_answer_as_one_does(start, config, best, tmp_path):
    output = tmp_path / "best.jsonl"
    commands = launch(start, config, 2, "--output", output, verb="sample")
    wait_for(lambda: num_answered(output) > 0)
    commands[1].kill(signal.SIGTERM)
    texts = end_with(commands, 75)
    assert "stopped by a signal" in texts[0] and texts[1] == ""
    texts = end_with(launch(start, config, 2, "--output", output, verb="sample"), 0)
    assert "prompts were answered before" in texts[0] and texts[1] == ""
    assert output.read_text() == best
    text = assert_told_once(end_with(launch(start, config, 2, "--output", output, verb="sample"), 2))
    assert "exists already" in text
    text = assert_told_once(
        end_with(
            launch(start, config, 2, "--output", tmp_path / "b", "rewards=[{kind: model, path: x}]", verb="sample"), 2
        )
    )
    assert "x: " in text
