"""Runs of several real processes, joined over loopback by the flags of the command line."""

import shutil
import signal

import numpy as np
import pytest

from jaxllm.checkpoint.reader import CheckpointReader
from tests.train.runs import assert_same_records, free_port, losses, num_records, wait_for

MESHES = {"fsdp across": {}, "tensor across": {"tensor": 2}}


def launch(start, config, count, *arguments, verb="train", devices=1, limits=None):
    """Start the processes of one run with `devices` devices each; `limits` are largest file sizes by process."""
    address = f"127.0.0.1:{free_port()}"
    joined = ("--coordinator", address, "--num-processes", count, "--process-id")
    return [
        start(
            f"{config}.{process}.out", verb, "--config", config, *arguments, *joined, process,
            devices=devices, file_limit=(limits or {}).get(process),
        )
        for process in range(count)
    ]  # fmt: skip


def end_with(commands, *codes):
    """Wait for all processes, which must exit with these codes (or all with the one); return what each printed."""
    found = [command.wait(timeout=180) for command in commands]
    texts = [_without_gloo(command.text) for command in commands]
    assert found == list(codes) * (len(commands) // len(codes)), "\n---\n".join(texts)
    return texts


def _without_gloo(text):
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("[Gloo]"))


def assert_near(folder, expected):
    for kind in ("train", "eval"):
        found, wanted = np.array(losses(folder, kind)), np.array(losses(expected, kind))
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def assert_told_once(texts):
    """Check that process 0 told the reason, in one message, and the others were silent."""
    assert texts[0].count("jaxllm: error:") == 1 and "Traceback" not in texts[0], texts[0]
    assert texts[1:] == [""] * (len(texts) - 1)
    return texts[0]


def test_a_signal_to_one_process_stops_all_and_one_process_goes_on(world, start, undisturbed, tmp_path):
    folder = tmp_path / "run"
    config = world.write_config(folder)
    commands = launch(start, config, 2)
    wait_for(lambda: num_records(folder) >= 2)
    commands[1].kill(signal.SIGTERM)
    texts = end_with(commands, 75)
    last = losses(folder)[-1][0]
    assert 2 <= last < 24 and CheckpointReader(folder / "checkpoints").latest_step() == last
    assert f"stopped by a signal: step {last} of 24 is saved" in texts[0]
    assert texts[0].count("300 documents") == 1 and texts[1] == ""
    command = start(f"{folder}.out", "train", "--config", config)
    assert command.wait() == 0, command.text
    assert_near(folder, undisturbed)


def test_what_is_refused_is_told_once_and_ends_all(world, start, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "good"}\n{"txt": "bad"}\n')
    folder = tmp_path / "run"
    config = world.write_config(folder, data__train=[{"path": str(bad)}])
    assert f"{bad}:2" in assert_told_once(end_with(launch(start, config, 2), 2))
    assert not folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(("count", "devices"), [(2, 2), (4, 1)])
def test_processes_train_like_one(world, start, tmp_path, undisturbed, count, devices, mesh):
    folder = tmp_path / "run"
    config = world.write_config(folder, mesh=MESHES[mesh])
    end_with(launch(start, config, count, devices=devices), 0)
    assert_near(folder, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_two_save_and_four_resume(world, start, tmp_path, undisturbed, mesh):
    folder = tmp_path / "run"
    end_with(launch(start, world.write_config(folder, mesh=MESHES[mesh], train__steps=8), 2), 0)
    texts = end_with(launch(start, world.write_config(folder, mesh=MESHES[mesh]), 4), 0)
    assert texts[0].count("resuming at step 8") == 1 and texts[1:] == [""] * 3
    assert_near(folder, undisturbed)


@pytest.mark.slow
def test_two_processes_resume_bitwise(world, start, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    end_with(launch(start, world.write_config(whole), 2), 0)
    config = world.write_config(parts, checkpoint__every=2)
    for steps in (3, 11):
        commands = launch(start, config, 2)
        wait_for(lambda: num_records(parts) >= steps)  # noqa: B023
        for command in commands:
            command.kill()
            command.wait()
    end_with(launch(start, config, 2), 0)
    assert_same_records(parts, whole)


@pytest.mark.slow
def test_every_kind_of_refusal_is_told_once(world, start, tmp_path, undisturbed):
    run = shutil.copytree(undisturbed, tmp_path / "run")
    config = world.write_config(run)

    def refused(*arguments, path=config, **options):
        return assert_told_once(end_with(launch(start, path, 2, *arguments, **options), 2))

    assert "no checkpoint of step 5" in refused("--from-step", 5)
    assert "holds a run with another config" in refused("seed=1")
    assert "mesh: replica 1 x fsdp 3" in refused("mesh.fsdp=3")
    assert "lanes" in refused("data.num_lanes=1", path=world.write_config(tmp_path / "lanes"))
    assert "no checkpoint" in refused("--init-from", tmp_path, path=world.write_config(tmp_path / "weights"))
    newest = run / "checkpoints" / "24"
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    assert "--from-step 16" in refused()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "file").touch()
    assert "other files" in refused(path=world.write_config(tmp_path / "foreign"))


@pytest.mark.slow
def test_processes_with_different_configs_are_refused(world, start, tmp_path):
    config = world.write_config(tmp_path / "run")
    address = f"127.0.0.1:{free_port()}"
    joined = ("--coordinator", address, "--num-processes", 2, "--process-id")
    commands = [start(tmp_path / f"{i}.out", "train", "--config", config, f"seed={i}", *joined, i) for i in range(2)]
    assert "process 1: not started with the same config" in assert_told_once(end_with(commands, 2))


@pytest.mark.slow
@pytest.mark.parametrize("full", [(0, 1), (0,), (1,)], ids=str)
def test_a_disk_that_is_full_for_some_ends_all(world, start, tmp_path, undisturbed, full):
    folder = tmp_path / "run"
    config = world.write_config(folder)
    end_with(launch(start, config, 2, "train.steps=8"), 0)
    texts = end_with(launch(start, config, 2, limits=dict.fromkeys(full, 100_000)), 2)
    assert "step 16 could not be saved: File too large" in assert_told_once(texts)
    assert CheckpointReader(folder / "checkpoints").steps() == [8]
    end_with(launch(start, config, 2), 0)
    assert_near(folder, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_does_not_leave_the_other_waiting(world, start, tmp_path, victim):
    folder = tmp_path / "run"
    commands = launch(start, world.write_config(folder, train__steps=100_000), 2)
    wait_for(lambda: num_records(folder) >= 2)
    commands[victim].kill()
    assert commands[1 - victim].wait(timeout=150) not in (0, 75)


@pytest.mark.slow
def test_data_that_one_process_finds_damaged_ends_all(world, start, tmp_path):
    shards = tmp_path / "shards"
    command = start(
        tmp_path / "tokenize.out", "data", "tokenize", "--input", world.folder / "train.jsonl",
        "--tokenizer", world.folder / "tokenizer", "--output", shards,
    )  # fmt: skip
    assert command.wait() == 0, command.text
    tokens = np.load(next(shards.glob("*tokens*")), mmap_mode="r+")
    tokens[len(tokens) // 2 : len(tokens) // 2 + 3] = 60_000
    tokens.flush()
    folder = tmp_path / "run"
    config = world.write_config(folder, data__train=[{"path": str(shards)}], checkpoint__every=3, train__steps=200)
    text = assert_told_once(end_with(launch(start, config, 2), 2))
    assert "damaged: token id 60000" in text and "train.jsonl:" in text
