"""Runs of the command line in a small world, and what they leave behind."""

import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import yaml

from jaxllm.train.records.metrics_file import read_metrics

HERE = Path(__file__).parent
WORDS = ("the", "a", "cat", "dog", "bird", "sees", "hears", "likes", "finds", "small", "big", "red", "old", "house")


def write_documents(path, count, seed, **columns):
    """Write short documents of random words as jsonl."""
    rng = random.Random(seed)
    rows = [{"text": " ".join(rng.choices(WORDS, k=rng.randint(3, 60))), **columns} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@dataclasses.dataclass(frozen=True)
class World:
    """Files that runs share, and how to describe a run.

    Attributes:
      folder: holds train.jsonl, heldout.jsonl, tokenizer/ and spec.json.
    """

    folder: Path

    def config(self, run_dir, **overrides):
        """Return a config as nested dicts; overrides are dotted names with "__" for the dots."""
        config = {
            "run_dir": str(run_dir),
            "tokenizer": str(self.folder / "tokenizer"),
            "model": {"name": str(self.folder / "spec.json"), "compute_dtype": "float32", "remat": "none"},
            "data": {
                "train": [{"path": str(self.folder / "train.jsonl")}],
                "heldout": [{"path": str(self.folder / "heldout.jsonl")}],
                "seq_len": 32,
                "cache_dir": str(self.folder / "cache"),
            },
            "optimizer": {"learning_rate": 1e-3},
            "schedule": {"warmup": 2, "total": 30},
            "train": {"steps": 24, "batch_size": 8},
            "checkpoint": {"every": 8},
            "eval": {"every": 8},
            "log": {"every": 5, "tensorboard": False},
        }
        for name, value in overrides.items():
            *path, key = name.split("__")
            section = config
            for part in path:
                section = section[part]
            section[key] = value
        return config

    def write_config(self, run_dir, **overrides):
        """Write a config beside its run folder, so that run_dir.yaml describes the run, and return its path."""
        path = Path(f"{run_dir}.yaml")
        path.write_text(yaml.safe_dump(self.config(run_dir, **overrides)))
        return path


class Starter:
    """Starts `jaxllm` commands as processes forked from one that has paid for the imports."""

    def __init__(self):
        environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(sys.path)}
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        self._server = subprocess.Popen(
            [sys.executable, HERE / "command_server.py"],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self, output, *arguments, devices=1, file_limit=None):
        """Start a command whose standard output and error go to the file `output`.

        Args:
          devices: forced host devices.
          file_limit: bytes beyond which the system refuses to let a file grow.
        """
        request = {
            "arguments": [str(argument) for argument in arguments],
            "output": str(output),
            "devices": devices,
            "file_limit": file_limit,
        }
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return Command(self._server.stdout.readline().strip(), Path(output))

    def close(self):
        self._server.stdin.close()
        assert self._server.wait() == 0


class Command:
    """A running command."""

    def __init__(self, pid, output):
        self.pid = int(pid)
        self.output = output
        self._status = Path(f"{output}.status")

    @property
    def text(self):
        return self.output.read_text()

    @property
    def exited(self):
        return self._status.exists()

    def kill(self, number=signal.SIGKILL):
        if not self.exited:
            os.kill(self.pid, number)

    def wait(self, timeout=120):
        """Return the exit code, negative for a signal."""
        limit = time.monotonic() + timeout
        while not self.exited:
            if time.monotonic() > limit:
                self.kill()
                raise TimeoutError(f"still running after {timeout} s:\n{self.text}")
            time.sleep(0.01)
        return int(self._status.read_text())


def losses(run_dir, kind="train"):
    """Return the recorded steps and their losses, in order."""
    return [(row["step"], row["loss"]) for row in read_metrics(Path(run_dir) / "metrics.jsonl") if row["kind"] == kind]


def assert_same_records(run, expected):
    """Compare the losses of every step and evaluation, bit by bit."""
    for kind in ("train", "eval"):
        assert losses(run, kind) == losses(expected, kind)


def num_records(run):
    """Count the lines of metrics.jsonl while a run may be writing it."""
    path = Path(run) / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def is_saving(run):
    """Tell whether a checkpoint is half-written."""
    return any((Path(run) / "checkpoints").glob("*.saving*"))


def wait_for(condition, timeout=60):
    limit = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < limit, "nothing happened"
        time.sleep(0.003)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
