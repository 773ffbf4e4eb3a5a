import os
import signal
import subprocess
import sys

import pytest

from jaxllm.checkpoint.run_folder import RunFolder, open_run
from jaxllm.errors import InputError

CONFIG = "seed: 1\nsteps: 10\n"


def differences(old):
    """Stand for the config room: every line but `steps` must be equal."""
    return [line for line in old.splitlines() if line not in CONFIG and "steps" not in line]


def start(path, config=CONFIG):
    return open_run(path, config_text=config, differences=differences)


def refusal(path, config=CONFIG):
    with pytest.raises(InputError) as caught:
        start(path, config)
    return str(caught.value)


def test_new_folder_is_created_with_its_config(tmp_path):
    run = start(tmp_path / "a" / "run")
    assert run.config.read_text() == CONFIG
    assert run.notes == []
    run.close()


def test_empty_folder_and_what_a_killed_start_left_are_used(tmp_path):
    (tmp_path / "config.yaml.123.tmp").write_text("seed:")
    (tmp_path / ".lock").touch()
    run = start(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".lock", "config.yaml"]
    run.close()


def test_same_config_resumes_and_keeps_the_files(tmp_path):
    start(tmp_path, "seed: 1\nsteps: 5\n").close()
    RunFolder(tmp_path).metrics.write_text("{}\n")
    run = start(tmp_path)
    assert run.config.read_text() == CONFIG
    assert run.metrics.read_text() == "{}\n"
    run.close()


def test_other_config_is_refused_with_the_keys_that_differ(tmp_path):
    start(tmp_path, "seed: 2\nsteps: 10\n").close()
    message = refusal(tmp_path)
    assert str(tmp_path) in message and "seed: 2" in message
    assert (tmp_path / "config.yaml").read_text() == "seed: 2\nsteps: 10\n"


def test_foreign_folder_is_refused_and_left_alone(tmp_path):
    for name in ("thesis.tex", "figures"):
        (tmp_path / name).touch()
    message = refusal(tmp_path)
    assert "output folder holds other files (figures, thesis.tex)" in message
    assert sorted(os.listdir(tmp_path)) == ["figures", "thesis.tex"]


def test_a_file_and_an_unreadable_config_are_refused(tmp_path):
    (tmp_path / "file").touch()
    assert "cannot be used as run folder" in refusal(tmp_path / "file")
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe")
    assert "cannot be used as run folder" in refusal(tmp_path)


HOLD = """
import sys, time
from jaxllm.checkpoint.run_folder import open_run
run = open_run(sys.argv[1], config_text=sys.argv[2], differences=lambda old: [])
print("open", flush=True)
time.sleep(60)
"""


def test_second_writer_is_refused_until_the_first_is_killed(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run", CONFIG], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "open\n"
    message = refusal(tmp_path / "run")
    assert f"{tmp_path / 'run'}: this run is being written by process {holder.pid} on" in message
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    run = start(tmp_path / "run")
    assert f"written by process {os.getpid()} on" in refusal(tmp_path / "run")
    run.close()


def test_a_refused_start_gives_up_the_lock(tmp_path):
    start(tmp_path, "seed: 2\n").close()
    refusal(tmp_path)
    RunFolder(tmp_path).lock()


def test_starting_does_not_import_jax():
    code = "import jaxllm.checkpoint.run_folder, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
