"""Rewards for programs: the share of a row's tests that the program in an answer passes, run in a child process.

This is no security sandbox: it keeps the mistakes of a model's programs from harming the machine, not the attacks of
an author who looks for holes, and a program may cheat its tests. See `child.py` for what a child may not do. Run it
in a container or on a machine that holds nothing else.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import platform
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxllm.errors import InputError
from jaxllm.rewards.base import Completion, RewardFunction

_CHILD = Path(__file__).with_name("child.py")
_FENCED = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
# Programs that do nothing but run: no variables of ours, and one thread, since more are not allowed.
_ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}

# Long enough for a first start from a cold disk.
_START_SECONDS = 30.0


def code(*, timeout: float, memory_mb: int) -> RewardFunction:
    """Return the share of tests passed, 0 to 1.

    The program is the last fenced block of the response, else all of it. The tests are of the row: "tests" or MBPP's
    "test_list", lists of Python statements (after "test_setup_code", if any), or HumanEval's "test" and
    "entry_point", where the row's "prompt" goes before a program that does not define that function itself. Tests run
    one after the other in one process; those that are not reached in time have failed.

    Args:
      timeout: seconds for one answer. memory_mb: of one answer.

    Raises:
      InputError: this machine cannot hold a program back; later, a row without tests.
    """
    limits = {"seconds": timeout, "memory": memory_mb * 2**20}
    if not _passed("", ["pass"], {**limits, "seconds": _START_SECONDS}):
        raise InputError(
            f"the reward code cannot hold programs back on this machine ({sys.platform}, {platform.machine()}); "
            "expected Linux on x86_64 or aarch64 with seccomp filters (jaxllm/rewards/child.py)"
        )

    def score(completion: Completion) -> float:
        program, tests = program_and_tests(completion)
        return len(_passed(program, tests, limits)) / len(tests)

    def scores(completions: Sequence[Completion]) -> list[float]:
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as workers:
            return list(workers.map(score, completions))

    return scores


def program_and_tests(completion: Completion) -> tuple[str, list[str]]:
    """Return an answer's program and the statements that test it.

    Raises:
      InputError: the row has no tests, or something else in their place.
    """
    row = completion.row
    blocks = _FENCED.findall(completion.response)
    program = blocks[-1] if blocks else completion.response
    if "entry_point" in row and "test" in row:
        name = _text(completion, "entry_point")
        if not re.search(rf"^(?:async\s+)?def\s+{re.escape(name)}\b", program, re.MULTILINE):
            program = f"{_text(completion, 'prompt')}{program}"
        return program, [f"{_text(completion, 'test')}\ncheck({name})"]
    field = "tests" if "tests" in row else "test_list"
    tests = row.get(field)
    if not (isinstance(tests, list) and tests and all(isinstance(test, str) for test in tests)):
        raise InputError(
            f'{completion.origin}: "{field}" is {tests!r}; expected a list of Python statements, or "test" and '
            f'"entry_point" (the reward code)'
        )
    setup = f"{row['test_setup_code']}\n" if row.get("test_setup_code") else ""
    return f"{setup}{program}", tests


def _text(completion: Completion, field: str) -> str:
    value: Any = completion.row.get(field)
    if not isinstance(value, str):
        raise InputError(f'{completion.origin}: "{field}" is {value!r}; expected text (the reward code)')
    return value


def _passed(program: str, tests: list[str], limits: dict[str, float]) -> set[int]:
    """Run a program and its tests in a child process and return the numbers of those that passed."""
    token = secrets.token_hex(16)
    job = {"program": program, "tests": tests, "token": token, **limits}
    with (
        tempfile.TemporaryDirectory(prefix="jaxllm-code-") as directory,
        tempfile.TemporaryFile() as work,
        tempfile.TemporaryFile() as results,
    ):
        work.write(json.dumps(job).encode())
        work.seek(0)
        child = subprocess.Popen(
            [sys.executable, "-I", str(_CHILD)],
            stdin=work,
            stdout=results,
            stderr=subprocess.DEVNULL,
            cwd=directory,
            env=_ENVIRONMENT,
            start_new_session=True,
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(limits["seconds"])
        finally:
            if child.returncode is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        results.seek(0)
        lines = results.read().decode(errors="replace").split("\n")
    return {number for number in range(len(tests)) if f"{token} {number}" in lines}
