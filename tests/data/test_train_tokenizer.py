"""Training a tokenizer on files, as the command line does."""

import dataclasses
import gzip
import json
import multiprocessing
import os
import signal
import subprocess

import psutil
import pytest

from jaxllm.data.train_tokenizer import train_from_files
from jaxllm.errors import InputError
from jaxllm.tokenizers import load_tokenizer
from jaxllm.tokenizers.extend import read_base
from tests.test_cli import INTERRUPTIBLE

TEXTS = ["the cat sat on the mat, the cat sat", "猫坐在垫子上，猫坐在垫子上", "the dog sat on the log"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps({"body": text}) + "\n" for text in TEXTS).encode()))
    return path


def test_the_folder_holds_a_tokenizer_of_that_size_and_the_summary_describes_the_text(tmp_path, file):
    (tmp_path / "more.txt").write_text("the cat")
    summary = train_from_files([file, tmp_path / "more.txt"], vocab_size=280, output=tmp_path / "tok", text_key="body")
    tokenizer = load_tokenizer(tmp_path / "tok")
    assert tokenizer.vocab_size == 280
    texts = [*TEXTS, "the cat"]
    num_bytes = sum(len(text.encode()) for text in texts)
    assert (summary.num_documents, summary.num_bytes) == (4, num_bytes)
    assert summary.bytes_per_token == num_bytes / sum(len(tokenizer.encode(text)) for text in texts)
    assert summary.seconds > 0


def test_an_output_that_holds_something_is_refused_and_left_alone(tmp_path, file):
    used = tmp_path / "used"
    used.mkdir()
    (used / "notes").write_text("mine")
    for output, message in ((used, "not empty"), (used / "notes", "found a file")):
        with pytest.raises(InputError, match=message):
            train_from_files([file], vocab_size=280, output=output, text_key="body")
    assert (used / "notes").read_text() == "mine"


@pytest.mark.parametrize(
    ("vocab_size", "text_key", "message"),
    [(280, "text", "rows.jsonl.gz:1"), (100_000, "body", "vocab_size: found 100000, expected at most")],
)
def test_bad_input_writes_nothing(tmp_path, file, vocab_size, text_key, message):
    with pytest.raises(InputError, match=message):
        train_from_files([file], vocab_size=vocab_size, output=tmp_path / "tok", text_key=text_key)
    assert not (tmp_path / "tok").exists()


@pytest.fixture(scope="module")
def large_file(tmp_path_factory):
    """More text than one worker is sent at a time."""
    path = tmp_path_factory.mktemp("large") / "rows.jsonl"
    words = ["the", "cat", "sät", "猫坐在", "垫子上", "12", "e\u0301", "\n", "'s"]
    texts = (" ".join(words[(k * j) % len(words)] for j in range(1, 30_000)) for k in range(1, 42))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_several_workers_give_what_one_gives(tmp_path, large_file):
    progress = []
    summaries = [
        train_from_files(
            [large_file],
            vocab_size=290,
            output=tmp_path / str(num_workers),
            num_workers=num_workers,
            reading=lambda *counts: progress.append(counts),
        )
        for num_workers in (1, 2)
    ]
    one, two = (dataclasses.replace(summary, seconds=0) for summary in summaries)
    assert one == two and one.num_documents == 41
    assert load_tokenizer(tmp_path / "1").fingerprint == load_tokenizer(tmp_path / "2").fingerprint
    half = len(progress) // 2
    assert half >= 2 and progress[:half] == progress[half:] == sorted(progress[:half])
    assert progress[-1] == (41, one.num_bytes)


def test_a_bad_row_is_the_same_error_with_several_workers(tmp_path, large_file):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(large_file.read_text() + '{"text": 5}\n')
    messages = []
    for num_workers in (1, 2):
        with pytest.raises(InputError) as caught:
            train_from_files([bad], vocab_size=300, output=tmp_path / "tok", num_workers=num_workers)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "bad.jsonl:42: 'text' is a number, expected a string" in messages[0]
    assert not (tmp_path / "tok").exists()


def test_a_worker_that_is_killed_ends_the_training(tmp_path, large_file):
    killed = []

    def kill_a_worker(*counts):
        if not killed:
            killed.extend(multiprocessing.active_children())
            killed[0].kill()

    many = [large_file] * 4
    with pytest.raises(InputError, match="a worker process was killed"):
        train_from_files(many, vocab_size=300, output=tmp_path / "tok", num_workers=2, reading=kill_a_worker)
    assert killed and not (tmp_path / "tok").exists()


def test_an_interrupt_ends_the_workers_quietly(tmp_path, large_file):
    command = ["tokenizer", "train", "--input", *[str(large_file)] * 30, "--vocab-size", "300", "--output", "tok"]
    process = subprocess.Popen(
        [*INTERRUPTIBLE, *command, "--num-workers", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        start_new_session=True,
    )
    workers = []
    while len(workers) < 2:
        assert process.poll() is None
        workers = [p for p in psutil.Process(process.pid).children() if "spawn_main" in " ".join(p.cmdline())]
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate() == (b"", b"")
    assert process.returncode == 130
    assert psutil.wait_procs(workers, timeout=10)[1] == []
    assert not (tmp_path / "tok").exists()


def test_a_vocabulary_is_extended(tmp_path, file):
    train_from_files([file], vocab_size=280, output=tmp_path / "base", text_key="body")
    base = read_base(tmp_path / "base")
    summary = train_from_files([file], vocab_size=284, output=tmp_path / "more", text_key="body", base=base)
    assert load_tokenizer(tmp_path / "more").tokens[:272] == load_tokenizer(tmp_path / "base").tokens
    assert summary.num_unreachable == 0
    cut = dataclasses.replace(base, tokens=[token for token in base.tokens if token != b"at"])
    summary = train_from_files([file], vocab_size=279, output=tmp_path / "cut", text_key="body", base=cut)
    assert summary.num_unreachable > 0
