"""A run that is killed anywhere, and started again by the same command, is the run that nothing disturbed."""

import random
import time

import pytest

from tests.train.runs import assert_same_records, is_saving, num_records, wait_for


def kill_until_done(world, start, run, rounds, moments, **config):
    """Kill a run `rounds` times, in turn at any time and during a save, then let it end; return how many hit a save."""
    path = world.write_config(run, **config, checkpoint__every=2)
    hits = 0
    for number in range(rounds):
        known = num_records(run)
        command = start(f"{run}.out", "train", "--config", path)
        if number % 2:
            time.sleep(moments.uniform(0.1, 3))
        else:
            wait_for(lambda: num_records(run) > known + 2 or command.exited)  # noqa: B023
            wait_for(lambda: is_saving(run) or command.exited)  # noqa: B023
            time.sleep(moments.uniform(0, 0.02))
        command.kill()
        command.wait()
        hits += is_saving(run)
    command = start(f"{run}.out", "train", "--config", path)
    assert command.wait() == 0, command.text
    return hits


def test_killed_while_saving_and_at_another_time(world, start, undisturbed, tmp_path):
    kill_until_done(world, start, tmp_path / "run", 2, random.Random(0))
    assert_same_records(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_killed_many_times(world, start, tmp_path):
    steps = {"train__steps": 120}
    for seed in range(5):
        run = tmp_path / f"run{seed}"
        assert kill_until_done(world, start, run, 12 if seed else 0, random.Random(seed), **steps) > 0 or not seed
        assert_same_records(run, tmp_path / "run0")
