"""Rewards as a configuration names them, and what is said about wrong ones."""

import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.config.alignment import RewardConfig
from jaxllm.errors import InputError
from jaxllm.rewards import Completion, gym_rows, make_reward


def completion(response, reference=None, num_tokens=10, **row):
    row = {"_origin": "rows.jsonl:7", **row}
    return Completion("a prompt", response, reference, row, num_tokens, finished=True)


def reward(kind, response, reference=None, num_tokens=10, **options):
    return make_reward(RewardConfig(kind=kind, **options))([completion(response, reference, num_tokens)])[0]


def test_exact():
    assert reward("exact", " Paris\n", "Paris") == 1
    assert reward("exact", "paris", "Paris") == 0
    assert reward("exact", "Rome", ["Paris", "Rome"]) == 1
    pattern = r"<answer>(.*?)</answer>"
    assert reward("exact", "<answer>Rome</answer> no: <answer>Paris</answer>", "Paris", pattern=pattern) == 1
    assert reward("exact", "Paris", "Paris", pattern=pattern) == 0


def test_math():
    assert reward("math", "It is 1/2, so the answer is 0.5.", r"\frac{1}{2}") == 1
    assert reward("math", "#### 1,000", "He has 40 * 25 = 1000.\n#### 1000") == 1
    assert reward("math", "no idea", 3) == 0
    assert reward("math", "7", 7) == reward("math", "7.0", [6, 7]) == 1
    assert reward("math", "3 is wrong, A: 4", 4, pattern=r"A: (\d+)") == 1


def test_regex():
    form = r"(?s)^<think>.*</think>\s*<answer>.*</answer>$"
    assert reward("regex", "<think>\nx\n</think>\n<answer>1</answer>", pattern=form) == 1
    assert reward("regex", "well, <think>x</think><answer>1</answer>", pattern=form) == 0


def test_length():
    found = [reward("length", "", num_tokens=count, target=100) for count in (1, 100, 150, 200, 10_000)]
    assert found == [0, 0, -0.5, -1, -1]


def test_repetition():
    assert reward("repetition", "a b c d e f", ngram=2) == 0
    assert reward("repetition", "a b a b a b", ngram=2) == pytest.approx(2 / 5 - 1)
    assert reward("repetition", "是的是的是的", ngram=2) == reward("repetition", "a b a b a b", ngram=2)
    assert reward("repetition", "a b", ngram=4) == 0


@given(st.text(max_size=80), st.integers(1, 5))
def test_repetition_is_bounded(text, ngram):
    assert -1 < reward("repetition", text, ngram=ngram) <= 0
    assert reward("repetition", text + " x" * 50, ngram=ngram) < -0.3


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """A module of a user in the working directory."""
    (tmp_path / "my_rewards.py").write_text(
        "import numpy as np\n"
        "def by_length(completions):\n    return [len(c.response) / 10 for c in completions]\n"
        "def numpy_scores(completions):\n    return np.arange(len(completions), dtype=np.float32)\n"
        "def steps(completions):\n    return [[(1, 0.5), (len(c.response), 1)] for c in completions]\n"
        "def outside(completions):\n    return [[(len(c.response) + 1, 0.5)] for c in completions]\n"
        "def nan(completions):\n    return [float('nan') if 'b' in c.response else 0 for c in completions]\n"
        "def nothing(completions):\n    return [None for c in completions]\n"
        "def forgotten(completions):\n    pass\n"
        "def few(completions):\n    return [1.0]\n"
        "def raising(completions):\n    return [1 / (len(c.response) - 3) for c in completions]\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield lambda name: make_reward(RewardConfig(kind="function", path=f"my_rewards:{name}"))
    sys.modules.pop("my_rewards", None)


def test_user_functions(functions):
    two = [completion("abcde"), completion("ab")]
    assert functions("by_length")(two) == [0.5, 0.2]
    assert functions("numpy_scores")(two) == [0.0, 1.0]
    assert functions("steps")(two) == [[(1, 0.5), (5, 1.0)], [(1, 0.5), (2, 1.0)]]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("nan", ["returned nan", "finite number", "rows.jsonl:8", "'bbb"]),
        ("outside", ["(5, 0.5)", "0 < end <= 4", "rows.jsonl:7"]),
        ("nothing", ["returned None", "rows.jsonl:7"]),
        ("few", ["returned 1 rewards", "expected 2"]),
        ("forgotten", ["returned no rewards", "expected 2"]),
        ("raising", ["raised ZeroDivisionError", "division by zero", "rows.jsonl:8", "'bbb'"]),
        ("number", ["is of type int", "expected a function"]),
        ("missing", ["defines no 'missing'"]),
    ],
)
def test_wrong_user_functions_are_named_with_the_sample(functions, name, parts):
    with pytest.raises(InputError) as raised:
        functions(name)([completion("aaaa"), completion("bbb", _origin="rows.jsonl:8")])
    message = str(raised.value)
    assert "my_rewards:" in message and "\n" not in message
    assert all(part in message for part in parts), message


def test_long_responses_are_cut_in_messages(functions):
    with pytest.raises(InputError) as raised:
        functions("nan")([completion("b" * 5000)])
    assert "b" * 200 in str(raised.value) and len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"kind": "regex"}, "needs 'pattern'"),
        ({"kind": "regex", "pattern": "("}, "no regular expression"),
        ({"kind": "exact", "pattern": "a"}, "has no group"),
        ({"kind": "length"}, "needs 'target'"),
        ({"kind": "function"}, "needs 'path'"),
        ({"kind": "function", "path": "json"}, "expected package.module:function"),
        ({"kind": "function", "path": "no.such.module:f"}, "cannot import no.such.module"),
        ({"kind": "code"}, "allow_code: true"),
    ],
)
def test_wrong_configurations(options, part):
    with pytest.raises(InputError, match=part):
        make_reward(RewardConfig(**options))


@pytest.mark.parametrize("kind", ["exact", "math"])
@pytest.mark.parametrize(
    ("reference", "part"), [(None, '"reference" or "answer"'), ({"a": 1}, "no text and no number")]
)
def test_unusable_references_are_named(kind, reference, part):
    with pytest.raises(InputError, match=f"rows.jsonl:7: .*{part}"):
        reward(kind, "1", reference)


def test_a_pattern_that_backtracks_without_end_is_named(monkeypatch):
    monkeypatch.setattr("jaxllm.rewards.text.PATTERN_SECONDS", 0.05)
    with pytest.raises(InputError, match=r"took more than 0.05 seconds.*rows.jsonl:7"):
        reward("regex", "a" * 5000 + "c", pattern=r"^(a+a*)+b$|^(.*?,){11}P")


def test_models_are_not_made_here():
    with pytest.raises(ValueError, match="kind is 'model'"):
        make_reward(RewardConfig(kind="model", path="run"))


def test_gym_tasks():
    pytest.importorskip("reasoning_gym", reason="the extra [rl] is not installed")
    rows = [json.loads(json.dumps(row)) for row in gym_rows("chain_sum", size=3, seed=1)]
    assert rows == list(gym_rows("chain_sum", size=3, seed=1)) != list(gym_rows("chain_sum", size=3, seed=2))
    score = make_reward(RewardConfig(kind="reasoning_gym", pattern=r"<answer>(.*?)</answer>"))

    def answered(text, row):
        return Completion("a prompt", text, None, {"_origin": "rows.jsonl:7", **row}, 10, True)

    assert score([answered(f"<answer> {row['reference']} </answer>", row) for row in rows]) == [1, 1, 1]
    assert max(score([answered("x", rows[0]), answered("<answer>x</answer>", rows[1])])) < 0.1
    with pytest.raises(InputError, match=r"rows.jsonl:7.*expected"):
        score([answered("1", {"dataset": "chain_sum"})])
    with pytest.raises(InputError, match="no dataset 'chain_sums'"):
        list(gym_rows("chain_sums", size=1, seed=0))
    with pytest.raises(InputError, match=r"chain_sum: .*zzz"):
        list(gym_rows("chain_sum", size=1, seed=0, options={"zzz": 1}))


def test_gym_tasks_need_their_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(InputError, match=r"jaxllm\[rl\]"):
        make_reward(RewardConfig(kind="reasoning_gym"))
