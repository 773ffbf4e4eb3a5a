"""What `jaxllm env` finds out, the compilation cache, and how processes are described."""

import os
import platform
import subprocess
import sys

import pytest

from jaxllm.environment import Holder, describe_environment, find_holders, start_processes
from jaxllm.errors import InputError


def add_process(proc, pid, command, *files):
    folder = proc / str(pid) / "fd"
    folder.mkdir(parents=True)
    (folder.parent / "cmdline").write_bytes(command)
    for number, file in enumerate(files):
        (folder / str(number)).symlink_to(file)


def test_holders_are_the_other_processes_with_an_accelerator_open(tmp_path):
    add_process(tmp_path, 30, b"python\0train.py\0", "/dev/accel1", "/dev/accel0", "/dev/null")
    add_process(tmp_path, 4, b"cuda\0", "/dev/nvidia0", "/dev/vfio/2")
    add_process(tmp_path, 5, b"shell\0", "/dev/null")
    add_process(tmp_path, os.getpid(), b"ours\0", "/dev/accel0")
    (tmp_path / "self").symlink_to("30")
    (tmp_path / "7").mkdir()  # ended while we looked: its folder has no fd
    user = tmp_path.owner()
    assert find_holders(tmp_path) == (
        [
            Holder(4, user, "cuda", ("/dev/nvidia0", "/dev/vfio/2")),
            Holder(30, user, "python train.py", ("/dev/accel0", "/dev/accel1")),
        ],
        0,
    )


def test_the_environment_names_versions_settings_and_devices(monkeypatch):
    import jax

    monkeypatch.setenv("JAXLLM_ASSETS", "somewhere")
    lines = list(describe_environment())
    assert lines[0].split()[:2] == ["python", platform.python_version()]
    assert ["jax", jax.__version__] in [line.split() for line in lines]
    assert "JAXLLM_ASSETS=somewhere" in lines
    assert sum(line.startswith("device ") for line in lines) == jax.device_count()
    on_cpu = jax.default_backend() == "cpu"
    assert ("jax found no accelerator: it computes on the CPU" in lines) == on_cpu


CACHE_PROGRAM = """
import os, sys
import jax
from jaxllm.environment import enable_compilation_cache

for variables in sys.argv[1:]:
    os.environ.update(pair.split("=") for pair in variables.split())
    enable_compilation_cache()
    print(jax.config.jax_compilation_cache_dir)
"""


def test_compiled_programs_are_kept_in_the_users_cache_folder_unless_told_otherwise(tmp_path):
    (tmp_path / "file").touch()
    steps = [
        f"XDG_CACHE_HOME={tmp_path} JAXLLM_NO_COMPILE_CACHE=1",
        "JAXLLM_NO_COMPILE_CACHE= JAX_COMPILATION_CACHE_DIR=elsewhere",
        f"JAX_COMPILATION_CACHE_DIR= XDG_CACHE_HOME={tmp_path}/file",
        f"XDG_CACHE_HOME={tmp_path}",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-c", CACHE_PROGRAM, *steps]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    folder = tmp_path / "jaxllm" / "xla"
    assert run.stdout.split() == ["None", "None", "None", str(folder)]
    assert run.stderr == f"jaxllm: compiled programs are not kept: {tmp_path}/file/jaxllm/xla: Not a directory\n"
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("processes", "detect", "message"),
    [
        (("host:1", 2, None), False, "missing: --process-id"),
        (("host", 2, 1), False, "--coordinator: expected HOST:PORT, found 'host'"),
        (("host:x", 2, 1), False, "--coordinator: expected HOST:PORT, found 'host:x'"),
        (("host:1", 2, 2), False, "--process-id: expected less than --num-processes \\(2\\), found 2"),
        (("host:1", 2, 1), True, "--distributed finds the processes by itself"),
    ],
)
def test_a_contradictory_description_of_processes_is_refused(processes, detect, message):
    with pytest.raises(InputError, match=message):
        start_processes(*processes, detect=detect)
