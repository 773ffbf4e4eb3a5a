"""Programs in real child processes: what they score, and what they cannot do to the machine."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxllm.config.alignment import RewardConfig
from jaxllm.errors import InputError
from jaxllm.rewards import Completion, child, make_reward

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs run on Linux alone")

ADD = "def add(a, b):\n    return a + b"
BOTH = ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]
HUMAN_EVAL = {
    "prompt": 'def double(x):\n    """Return 2 x."""\n',
    "entry_point": "double",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n",
}


@pytest.fixture(scope="module")
def score():
    function = make_reward(RewardConfig(kind="code", timeout=2, memory_mb=256, allow_code=True))

    def call(response, tests=BOTH, **row):
        row = {"_origin": "rows.jsonl:3", **({} if tests is None else {"tests": tests}), **row}
        return function([Completion("a prompt", response, None, row, 10, True)])[0]

    return call


def test_share_of_tests(score):
    assert score(ADD) == 1
    assert score(f"Here it is:\n```python\nbroken(\n```\nno, this:\n```python\n{ADD}\n```\nDone.") == 1
    assert score("def add(a, b): return 3") == 0.5
    assert score("def add(a, b)") == score("") == score("add = None") == 0
    assert score(ADD, tests=None, test_list=["assert add(x, 2) == 5"], test_setup_code="x = 3") == 1


def test_human_eval_rows(score):
    assert score("    return 2 * x\n", tests=None, **HUMAN_EVAL) == 1
    assert score("```python\ndef double(x):\n    return x + x\n```", tests=None, **HUMAN_EVAL) == 1
    assert score("    return x\n", tests=None, **HUMAN_EVAL) == 0


def test_ordinary_programs_run(score):
    program = (
        "from __future__ import annotations\nimport collections, dataclasses, heapq, math, random, typing\n"
        "@dataclasses.dataclass\nclass Pair:\n    a: int\n    b: int\n"
        "def add(a, b):\n    pair = Pair(a, b)\n    print(pair)\n    return pair.a + pair.b\n"
        "if __name__ == '__main__':\n    print(add(int(input()), int(input())))\n"
    )
    assert score(program) == 1


@pytest.mark.parametrize("program", ["import os; os._exit(0)", "import sys; sys.exit(0)", "raise SystemExit"])
def test_leaving_early_is_not_passing(score, program):
    assert score(program) == 0
    assert score(f"def add(a, b):\n    {program}") == 0


def test_endless_programs_are_stopped_and_passed_tests_count(score):
    start = time.monotonic()
    assert score("def add(a, b):\n    while a == 0: pass\n    return a + b") == 0.5
    assert 1.9 < time.monotonic() - start < 10


def attempt(action, setup=""):
    """Return a program whose two tests say whether it got to an action, and whether the action was refused."""
    return (
        f"import os, signal, socket, threading, subprocess\n{setup}\nreached, refused = True, False\n"
        f"try:\n    {action}\nexcept (OSError, MemoryError, RuntimeError, ValueError):\n    refused = True\n"
    )


@pytest.mark.parametrize(
    "action",
    {
        "memory": "x = bytearray(10**9)",
        "fork": "os.fork()",
        "thread": "threading.Thread(target=print).start()",
        "program": "subprocess.run(['true'])",
        "shell": "raise OSError if os.system('true') else KeyError",
        "exec": "os.execv('/bin/true', ['true'])",
        "network": "socket.create_connection(('127.0.0.1', 80), 0.1)",
        "datagram": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
        "unix": "socket.socket(socket.AF_UNIX)",
        "parent": "os.kill(os.getppid(), signal.SIGTERM)",
        "limits": "import resource; resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
        "own limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))",
        "here": "open('note', 'w')",
        "user": "raise OSError if os.getuid() else os.setuid(1)",
    }.items(),
    ids=lambda item: item[0],
)
def test_what_is_refused(score, action):
    assert score(attempt(action[1]), ["assert reached", "assert refused"]) == 1


@pytest.mark.parametrize(
    "statement",
    [
        "open(path, 'w')",
        "open(path, 'a')",
        "open(path, 'r+')",
        "os.open(path, os.O_RDONLY | os.O_CREAT)",
        "os.truncate(path, 0)",
        "os.remove(path)",
        "os.rename(path, path + '2')",
        "os.link(path, path + '2')",
        "os.symlink(path, path + '2')",
        "os.chmod(path, 0)",
        "os.utime(path)",
        "os.mkdir(path + '2')",
        "os.rmdir(os.path.dirname(path))",
    ],
)
def test_files_cannot_be_changed(score, tmp_path, statement):
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    before = kept.stat()
    assert score(attempt(statement, f"path = {str(kept)!r}"), ["assert reached", "assert refused"]) == 1
    assert (kept.read_text(), kept.stat().st_mode, kept.stat().st_mtime) == (
        "as it was",
        before.st_mode,
        before.st_mtime,
    )
    assert list(tmp_path.iterdir()) == [kept]


def processes_running(marker):
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if marker in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def test_a_fork_bomb_leaves_no_children(score):
    assert score("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass") == 0
    assert [pid for pid in processes_running(b"rewards/child.py") if os.getppid() != pid] == []


def test_children_end_with_their_parent(tmp_path):
    """A trainer that is killed leaves no program running."""
    script = (
        "from jaxllm.config.alignment import RewardConfig\n"
        "from jaxllm.rewards import Completion, make_reward\n"
        "score = make_reward(RewardConfig(kind='code', timeout=60, allow_code=True))\n"
        "print('ready', flush=True)\n"
        "row = {'tests': ['pass'], '_origin': 'a:1'}\n"
        "score([Completion('', 'import time; time.sleep(60)', None, row, 1, True)])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=tmp_path)
    assert parent.stdout.readline() == b"ready\n"
    children = Path(f"/proc/{parent.pid}/task")

    def living():
        return [int(pid) for task in children.iterdir() for pid in (task / "children").read_text().split()]

    deadline = time.monotonic() + 20
    while not living() and time.monotonic() < deadline:
        time.sleep(0.01)
    (child,) = living()
    time.sleep(0.3)
    parent.kill()
    parent.communicate()
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{child}").exists()


def test_output_costs_nothing(score):
    assert score(f"for i in range(10**5): print('x' * 100)\n{ADD}") == 1


@pytest.mark.parametrize("tests", [None, [], "assert True", [1]])
def test_rows_without_tests_are_named(score, tests):
    with pytest.raises(InputError, match=r"rows.jsonl:3: \"test(s|_list)\" is .*; expected a list"):
        score(ADD, tests)


def verdict(machine, number, *arguments, architecture=None):
    """Follow the filter as the kernel does."""
    values = {child.NUMBER: number, child.ARCHITECTURE: architecture or child.ARCHITECTURES[machine]}
    values |= {child.ARGUMENTS + 8 * place: value for place, value in enumerate(arguments)}
    instructions, place, loaded = child.filter_instructions(machine), 0, 0
    while True:
        operation, if_true, if_false, operand = instructions[place]
        place += 1
        if operation == child.RETURN:
            return operand
        if operation == child.LOAD:
            loaded = values[operand]
            continue
        tests = {
            child.JUMP_EQUAL: loaded == operand,
            child.JUMP_AT_LEAST: loaded >= operand,
            child.JUMP_ANY_BIT: bool(loaded & operand),
        }
        place += if_true if tests[operation] else if_false


@pytest.mark.parametrize("machine", child.ARCHITECTURES)
def test_filter_of_each_architecture(machine):
    """aarch64 runs in no test here, so its filter is followed instruction by instruction."""
    column = list(child.ARCHITECTURES).index(machine)
    for numbers in child.REFUSED.values():
        assert numbers[column] is None or verdict(machine, numbers[column]) == child.REFUSE
    openat, write = child.OPENING["openat"][column], {"x86_64": 1, "aarch64": 64}[machine]
    assert verdict(machine, openat, 0, 0, os.O_RDONLY | os.O_CLOEXEC) == child.ALLOW
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_CREAT, os.O_RDONLY | os.O_TRUNC):
        assert verdict(machine, openat, 0, 0, flags) == child.REFUSE
    assert verdict(machine, write) == child.ALLOW
    assert verdict(machine, write, architecture=0x40000003) == child.KILL_PROCESS
    with pytest.raises(ValueError, match="riscv64"):
        child.filter_instructions("riscv64")
