"""The command line: exit codes, messages, overrides, and that its start stays light."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from jaxllm.arguments import split_overrides
from jaxllm.cli import main
from jaxllm.config import load_config
from jaxllm.errors import InputError

CONFIG = """\
run_dir: runs/a
tokenizer: tok
model: {name: tiny}
data: {train: [{path: corpus.txt}]}
schedule: {warmup: 1}
train: {steps: 100, batch_size: 8}
"""


@pytest.fixture(autouse=True)
def _working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG)


INTERRUPTIBLE = (
    sys.executable,
    "-c",
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from jaxllm.cli import main; sys.exit(main())",
)
"""The command line, even where this process ignores SIGINT and its children would too: in a shell's background."""


def start(*arguments, command=(sys.executable, "-m", "jaxllm.cli"), **options):
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*command, *arguments], **pipes, **options)


def fails(capsys, *arguments):
    """Run a command that must be refused; return its message."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.removeprefix("jaxllm: error: ").removesuffix("\n")


def test_help_imports_nothing_heavy():
    program = (
        "import sys\nfrom jaxllm.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as end: code = end.code\n"
        "print([name for name in ('jax', 'numpy', 'flax', 'grain', 'optax', 'yaml') if name in sys.modules], code)"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "[] 0"
    assert all(verb in output for verb in ("train", "plan", "generate", "tokenizer", "data", "env"))


def test_bad_input_exits_with_2_and_no_traceback():
    process = start("train", "--config", "run.yaml", "train.stepz=1", "--log.evry", "2")
    assert process.communicate() == (
        "",
        "jaxllm: error:\n"
        "command line: unknown key 'log.evry'; did you mean 'every'?\n"
        "command line: unknown key 'train.stepz'; did you mean 'steps'?\n",
    )
    assert process.returncode == 2


def test_an_interrupt_exits_with_130(tmp_path):
    os.mkfifo(tmp_path / "prompt")
    process = start("generate", "model", "--prompt-file", "prompt", command=INTERRUPTIBLE)
    with open(tmp_path / "prompt", "w"):  # opens when the command has begun to read
        while process.poll() is None:
            # Again after a while: a signal that comes just before the read blocks is only seen when that returns.
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
    assert process.communicate() == ("", "")
    assert process.returncode == 130


def test_a_closed_output_pipe_is_no_traceback():
    process = start("train", "--help-config")
    process.stdout.close()
    assert process.stderr.read() == "jaxllm: error: the reader of the output has gone\n"
    assert process.wait() == 1


def test_print_config_prints_a_config_that_loads_equal(capsys, tmp_path):
    assert main(["train", "--config", "run.yaml", "--print-config", "--train.steps", "7", "seed=3"]) == 0
    (tmp_path / "resolved.yaml").write_text(capsys.readouterr().out)
    assert load_config(["resolved.yaml"]) == load_config(["run.yaml"], ["train.steps=7", "seed=3"])


def test_config_files_may_be_given_together_or_one_by_one(capsys, tmp_path):
    (tmp_path / "more.yaml").write_text("seed: 5\n")
    outputs = []
    for arguments in (["--config", "run.yaml", "more.yaml"], ["--config", "run.yaml", "--config=more.yaml"]):
        assert main(["train", *arguments, "--print-config"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert "\nseed: 5\n" in outputs[0]


def test_help_config_lists_the_options(capsys):
    assert main(["train", "--help-config"]) == 0
    assert "optimizer.learning_rate" in capsys.readouterr().out


def test_overrides_are_told_from_the_commands_own_arguments():
    own = ["train", "--config", "runs/lr=1/a.yaml", "--dry-run", "--init-from", "x/y=z"]
    options = ["--optimizer.lr", "-1", "a.b=c", "--seed", "4", "--log.every=5"]
    rest, overrides = split_overrides([*own[:4], *options, *own[4:]])
    assert rest == own
    assert overrides == ["--optimizer.lr=-1", "a.b=c", "--seed=4", "--log.every=5"]


@pytest.mark.parametrize("tail", [["--seed"], ["--log.every", "--dry-run"]])
def test_an_override_needs_a_value(tail):
    with pytest.raises(InputError, match=f"expected a value after {tail[0]}"):
        split_overrides(["train", *tail])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'? (see jaxllm --help)"),
        (
            ["xyz"],
            "unknown command 'xyz'; expected one of train, plan, sample, generate, import, export, chat, tokenizer, "
            "data, env (see jaxllm --help)",
        ),
        (["tokenizer", "shw"], "unknown command 'shw'; did you mean 'show'? (see jaxllm tokenizer --help)"),
        ([], "the following arguments are required: COMMAND (see jaxllm --help)"),
        (["env", "--model"], "unknown argument '--model'; did you mean '--models'? (see jaxllm env --help)"),
        (["train", "--dryrun"], "unknown argument '--dryrun'; did you mean '--dry-run'? (see jaxllm train --help)"),
        (
            ["generate", "x", "--top-p", "1.5"],
            "argument --top-p: expected a number above 0 and at most 1, found '1.5' (see jaxllm generate --help)",
        ),
        (
            ["generate", "x", "--temperature", "nan"],
            "argument --temperature: expected a number of at least 0, found 'nan' (see jaxllm generate --help)",
        ),
        (
            ["generate", "x", "--prompt", "a", "--prompt-file", "b"],
            "argument --prompt-file: not allowed with argument --prompt (see jaxllm generate --help)",
        ),
        (
            ["generate", "x", "--prompt", "\udcff"],
            "argument --prompt: expected UTF-8 text, found '\\udcff' (see jaxllm generate --help)",
        ),
        (["generate", "x", "--prompt-file", "absent"], "absent: cannot read the prompt: No such file or directory"),
        (["generate", "x", "--prompt-file", "bad"], "bad: not UTF-8 text: byte 2 is wrong"),
        (["train", "--config", "absent.yaml"], "absent.yaml: cannot read the config: No such file or directory"),
        (
            ["train", "--config", "run.yaml", "--num-processes", "2", "--process-id", "0"],
            "a run with several processes needs all of --coordinator, --num-processes, --process-id; "
            "missing: --coordinator",
        ),
    ],
)
def test_wrong_usage_gives_one_message(capsys, tmp_path, arguments, message):
    (tmp_path / "bad").write_bytes(b"ab\xff")
    assert fails(capsys, *arguments) == message


def test_process_flags_come_from_the_environment_too(capsys, monkeypatch):
    monkeypatch.setenv("JAXLLM_NUM_PROCESSES", "two")
    assert fails(capsys, "train", "--config", "run.yaml").startswith("argument --num-processes: expected an integer")
    monkeypatch.setenv("JAXLLM_NUM_PROCESSES", "2")
    assert fails(capsys, "train", "--config", "run.yaml").endswith("missing: --coordinator, --process-id")


def test_text_becomes_a_tokenizer_and_shards(capsys, tmp_path):
    (tmp_path / "corpus.txt").write_text("the cat sat on the mat\n" * 100)
    train = ["tokenizer", "train", "--input", "corpus.txt", "--vocab-size", "270", "--output", "tok"]
    assert main(train) == 0
    assert capsys.readouterr().out.startswith("tok: 270 tokens from 1 documents, 2,300 bytes; ")
    assert fails(capsys, *train) == "tok: exists and is not empty; expected a new or empty folder"

    assert main(["tokenizer", "show", "tok", "zé"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "vocabulary: 270 tokens"
    assert any("<|endoftext|>" in line for line in lines)
    assert [line.split()[-1] for line in lines[-4:-1]] == ["'z'", "b'\\xc3'", "b'\\xa9'"]
    assert lines[-1] == "3 tokens, 3 bytes"

    assert main(["data", "tokenize", "--tokenizer", "tok", "--input", "corpus.txt", "--output", "shards"]) == 0
    told = capsys.readouterr().out
    assert "1 documents" in told and "2,300 bytes of text" in told and "bad rows skipped: 0" in told
    assert main(["data", "show", "shards"]) == 0
    assert capsys.readouterr().out == told


def test_generate_prints_what_the_model_streams(capsys, monkeypatch, tmp_path):
    import jax
    import numpy as np

    import jaxllm
    from jaxllm.language_model import LanguageModel
    from jaxllm.nn.model import abstract_params
    from jaxllm.pretrained import load
    from jaxllm.spec import tiny
    from jaxllm.tokenizers.train import train_bpe

    spec = tiny(jaxllm.spec("llama-7b"), vocab_size=270)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(0, 0.1, leaf.shape).astype(np.float32), abstract_params(spec))
    tokenizer = train_bpe(["the cat sat on the mat"] * 9, vocab_size=270)
    LanguageModel(spec, params, tokenizer=tokenizer).save_pretrained(tmp_path / "model")

    sampling = {
        "max_new_tokens": 6,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 0.9,
        "repetition_penalty": 1.1,
        "seed": 3,
    }
    flags = [part for name, value in sampling.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    model = load(tmp_path / "model")
    the, cat = ("".join(model.stream(prompt, **sampling)) for prompt in ("the", "cat"))
    capsys.readouterr()
    assert main(["generate", "model", "--prompt", "the", "--prompt", "cat", *flags]) == 0
    assert capsys.readouterr().out == f">>> the\n{the}\n>>> cat\n{cat}\n"
    (tmp_path / "prompt.txt").write_text("cat\n")
    assert main(["generate", "model", "--prompt-file", "prompt.txt", "--no-stream", *flags]) == 0
    assert capsys.readouterr().out == f"{cat}\n"
    monkeypatch.setattr("sys.stdin", open(tmp_path / "prompt.txt"))  # noqa: SIM115
    assert main(["generate", "model", *flags]) == 0
    assert capsys.readouterr().out == f"{cat}\n"


def test_env_lists_every_model_with_its_parameters(capsys):
    assert main(["env", "--models"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["llama"] in lines and ["qwen"] in lines
    assert ["qwen-7b", "7,721,324,544", "parameters"] in lines
