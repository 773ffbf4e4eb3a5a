"""`jaxllm plan`: exit codes, messages, and nothing but them on the terminal."""

import json
import signal
import subprocess
import sys

import pytest

from jaxllm.cli import main
from tests.plan.plan_configs import needs_libtpu, write_config

FEW = ("--topology", "v5e:2x2")


@pytest.fixture
def config(tmp_path):
    return str(write_config(tmp_path))


def test_bad_input_exits_with_2_and_one_message(capfd, config, tmp_path):
    for arguments, message in (
        (("--topology", "v9:1x1"), "topology: unknown chip 'v9'"),
        ((*FEW, "--top", "2"), "--top needs --search"),
        ((*FEW, "train.batchsize=3"), "unknown key 'train.batchsize'"),
        ((*FEW, "--json", str(tmp_path / "no" / "where.json")), "its folder does not exist"),
    ):
        assert main(["plan", "--config", config, *arguments]) == 2
        output = capfd.readouterr()
        assert output.out == "" and message in output.err and output.err.startswith("jaxllm: error:")


@needs_libtpu
def test_a_mesh_that_does_not_fit_the_devices_exits_with_2(capfd, config):
    assert main(["plan", "--config", config, *FEW, "mesh.fsdp=3"]) == 2
    assert capfd.readouterr().err.endswith("3 devices, but there are 4\n")


@needs_libtpu
def test_what_does_not_fit_has_its_own_exit_code(capfd, config, tmp_path):
    arguments = ["data.seq_len=16384", "--model.remat", "none", "--json", str(tmp_path / "plan.json")]
    assert main(["plan", "--config", config, *FEW, *arguments]) == 3
    output = capfd.readouterr()
    content = json.loads((tmp_path / "plan.json").read_text())
    assert not content["fits"] and f"{content['memory']['exceeded']:,} too many" in output.err
    assert "does not fit" in output.out
    lines = [line for line in output.err.splitlines() if not line.startswith(("tracing", "compiling", "jaxllm:", "  "))]
    assert lines == []


@needs_libtpu
def test_a_search_in_vain_exits_with_3(capfd, config):
    arguments = ["--search", "data.seq_len=1048576", "train.batch_size=4"]
    assert main(["plan", "--config", config, *FEW, *arguments]) == 3
    output = capfd.readouterr()
    assert output.out == "" and "no mesh of v5e:2x2 was found that fits" in output.err


@needs_libtpu
def test_an_interrupt_ends_a_compilation(config):
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from jaxllm.cli import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", program, "plan", "--config", config, *FEW]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        lines = iter(process.stderr.readline, "")
        assert any(line.startswith("compiling for v5e:2x2") for line in lines)
        process.send_signal(signal.SIGINT)
        assert process.communicate() == ("", "")
    assert process.returncode == 130
