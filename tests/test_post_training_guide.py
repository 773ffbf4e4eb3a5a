"""What docs/post_training.md says of options, kinds of rewards, warnings and stages is what there is."""

import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from jaxllm.config import load_config, validate
from jaxllm.config.alignment import AdapterConfig, DPOConfig, RewardConfig
from jaxllm.config.schema import RunConfig
from jaxllm.data.rows import STAGE_PURPOSES
from jaxllm.rewards import Completion, make_reward
from jaxllm.train.computation import resolve_spec
from jaxllm.train.health import _CHECKS

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "post_training.md").read_text()
SNIPPETS = re.findall(r"^```yaml\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
BASE = """\
run_dir: runs/a
tokenizer: t
stage: grpo
model: {name: qwen-7b}
data: {train: [{path: rows.jsonl}]}
schedule: {warmup: 0}
train: {steps: 128, batch_size: 8}
"""
ROLLOUTS = """\
rollout: {prompts: 8, samples: 8, max_new_tokens: 256}
rewards: [{kind: math}]
"""


def table(header):
    """Return the cells of the table whose header line begins with a text, row by row."""
    lines = GUIDE[GUIDE.index(f"\n| {header} |") + 1 :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if line.startswith("|")]


def names(header):
    return [row[0].strip("`") for row in table(header)]


def choices(config, option):
    return list(get_args(get_type_hints(config)[option]))


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippets_are_sound_configs(snippet, tmp_path):
    answers = not re.search("^stage: (sft|reward|dpo)$", snippet, re.MULTILINE)
    (tmp_path / "base.yaml").write_text(BASE + (ROLLOUTS if answers else ""))
    (tmp_path / "snippet.yaml").write_text(snippet)
    config = load_config([tmp_path / "base.yaml", tmp_path / "snippet.yaml"])
    assert validate(config) == []
    assert resolve_spec(config).vocab_size > 0


def test_tables_have_all_there_is():
    assert names("`stage`") == [stage for stage in choices(RunConfig, "stage") if stage != "pretrain"]
    assert set(names("`stage`")) == set(STAGE_PURPOSES)
    assert names("`adapter.kind`") == choices(AdapterConfig, "kind")
    assert set(names("`kind`")) == set(choices(RewardConfig, "kind"))
    assert names("`dpo.variant`") == choices(DPOConfig, "variant")
    assert names("`dpo.reference`") == choices(DPOConfig, "reference")
    assert names("warning") == list(_CHECKS)


def test_the_reward_function_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"^```python\n(def .*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
    (tmp_path / "guide_rewards.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    reward = make_reward(RewardConfig(kind="function", path="guide_rewards:brevity"))
    assert reward([Completion("p", "r", None, {}, 4, True), Completion("p", "r", None, {}, 4, False)]) == [0.25, 0.0]


def test_configs_that_it_names_are_there():
    named = set(re.findall(r"configs/[\w./]+\.yaml", GUIDE))
    assert named and all((ROOT / name).is_file() for name in named)
