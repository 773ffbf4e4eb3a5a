"""`jaxllm import` and `jaxllm export` as a user runs them, with good input and bad."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxllm
from jaxllm.cli import main
from tests.checkpoint.torch_writer import name, text, write_pickle, write_torch
from tests.conftest import GOLDENS

LLAMA, QWEN = GOLDENS / "models/llama2-gqa", GOLDENS / "models/qwen1-short"


@pytest.fixture(autouse=True)
def _working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def fails(capsys, *arguments):
    """Run a command that must be refused; return its one line."""
    before = sorted(os.listdir())
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("jaxllm: error: ")
    assert captured.err.count("\n") == 1
    assert sorted(os.listdir()) == before
    return captured.err.removeprefix("jaxllm: error: ").rstrip("\n")


def test_there_and_back(capsys):
    run("import", LLAMA, "run")
    run("export", "run", "back")
    assert capsys.readouterr().out == f"run: 30 tensors from {LLAMA}\nback: written from run\n"
    found, expected = (load_file(folder / "model.safetensors") for folder in (Path("back"), LLAMA))
    assert {key: array.tobytes() for key, array in found.items()} == {k: a.tobytes() for k, a in expected.items()}
    assert json.loads(Path("back/config.json").read_text()) == json.loads((LLAMA / "config.json").read_text())


def test_what_is_left_out_is_printed(capsys):
    run("export", QWEN, "out", "--as", "qwen2", "--dtype", "bfloat16")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"out: written from {QWEN}"
    assert [line.split(" beyond ")[0] for line in lines[1:]] == [
        "left out: LogN scaling of queries",
        "left out: dynamic NTK scaling",
    ]
    config = json.loads(Path("out/config.json").read_text())
    assert (config["model_type"], config["torch_dtype"]) == ("qwen2", "bfloat16")


def test_shards_of_glm_130b(capsys):
    tensors = load_file(GOLDENS / "models_glm/glm-130b-gmask/model.safetensors")
    os.mkdir("shards")
    write_torch("shards/mp_rank_00_model_states.pt", {"module": tensors})
    command = ["import", "--family", "glm130b", "shards", "out"]
    assert "give it with --num-attention-heads" in fails(capsys, *command)
    run(*command, "--num-attention-heads", 5)
    assert set(load_file("out/model.safetensors")) == set(tensors)
    assert json.loads(Path("out/config.json").read_text())["model_type"] == "glm-130b"


def copy(source=LLAMA):
    shutil.copytree(source, "model")
    return "model"


def test_a_folder_without_config(capsys):
    folder = copy()
    os.remove("model/config.json")
    for command in (("import", folder, "out"), ("import", "--format", "hf", folder, "out")):
        assert fails(capsys, *command) == "model: no config.json; expected a published checkpoint folder"
    assert "no checkpoint" in fails(capsys, "export", folder, "out")


def test_nothing_there(capsys):
    assert fails(capsys, "import", "none", "out") == "none: no such folder or .gguf file"
    assert fails(capsys, "import", "none.gguf", "out") == "none.gguf: no such folder or .gguf file"
    assert "none" in fails(capsys, "export", "none", "out")


def change_config(**changes):
    folder = copy()
    config = json.loads((LLAMA / "config.json").read_text()) | changes
    Path("model/config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"architectures": ["FalconForCausalLM"]}, "FalconForCausalLM"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "contradict"),
        ({"sliding_window": 7}, "unknown keys ['sliding_window']"),
        ({"hidden_size": 0}, "hidden_size = 0, expected a positive integer"),
        ({"num_attention_heads": 7}, "7"),
    ],
)
def test_a_config_that_is_not_understood(capsys, changes, expected):
    message = fails(capsys, "import", change_config(**changes), "out")
    assert expected in message
    if "architectures" in changes:
        assert "LlamaForCausalLM" in message


def test_a_damaged_tensor_file(capsys):
    folder = copy()
    file = Path("model/model.safetensors")
    content = file.read_bytes()
    for damaged in (content[:-1], b"\xff" * 8 + content[8:], content[:8] + b"[" + content[9:]):
        file.write_bytes(damaged)
        message = fails(capsys, "import", folder, "out")
        assert message.startswith("model/model.safetensors: not a readable safetensors file")


def test_a_hostile_pickle(capsys):
    folder = copy()
    os.remove("model/model.safetensors")
    write_pickle("model/pytorch_model.bin", b"\x80\x02" + name("os", "system") + text("touch executed") + b"\x85R.")
    for command in (["import", folder, "out"], ["import", "--format", "hf", folder, "out"], ["export", folder, "out"]):
        assert "refused to execute os.system" in fails(capsys, *command)
    assert os.listdir() == ["model"]


def test_a_gguf_file_that_is_none(capsys):
    Path("x.gguf").write_bytes(b"GGUF\3\0\0\0" + b"\xff" * 16)
    assert "x.gguf: truncated" in fails(capsys, "import", "x.gguf", "out")


def test_an_output_folder_that_is_not_empty(capsys):
    os.mkdir("out")
    Path("out/mine").write_text("mine")
    for command in (["import", LLAMA, "out"], ["import", "--format", "hf", LLAMA, "out"], ["export", LLAMA, "out"]):
        assert fails(capsys, *command).startswith("out: exists and is not empty")
    assert os.listdir("out") == ["mine"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["export", LLAMA, "out", "--as", "gpt2"], "cannot write a model as 'gpt2', expected one of llama, qwen2"),
        (["export", LLAMA, "out", "--as", "qwen2"], "a qwen2 config cannot express this model's attention"),
        (["export", LLAMA, "out", "--dtype", "int8"], "dtype 'int8': expected float32, bfloat16 or float16"),
        (["export", LLAMA, "out", "--from-step", "3"], "has no steps to choose from"),
        (["import", LLAMA, "out", "--num-attention-heads", "3"], "it needs --family"),
        (["import", LLAMA, "out", "--family", "llama"], "shards are merged for glm130b and glm only"),
        (["import", LLAMA, "out", "--family", "glm130b"], "no shards; expected mp_rank_00_model_states.pt"),
        (["import", LLAMA, "out", "--family", "glm130b", "--format", "run"], "import that one as a run"),
    ],
)
def test_arguments_that_cannot_be_met(capsys, arguments, expected):
    assert expected in fails(capsys, *arguments)


def test_ids_of_a_golden_are_generated_from_the_import(capsys):
    """A run that was imported is one for the other commands, too."""
    run("import", LLAMA, "run")
    golden = np.load(LLAMA / "golden.npz")
    model = jaxllm.load("run")
    new = model.generate(golden["prompt_ids"], max_new_tokens=golden["greedy_ids"].size, eos_ids=())
    np.testing.assert_array_equal(new.ravel(), golden["greedy_ids"].ravel())
