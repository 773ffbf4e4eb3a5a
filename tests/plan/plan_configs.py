"""Configurations of tiny models to plan with."""

import dataclasses
import importlib.util

import pytest

import jaxllm
from jaxllm.config import load_config
from jaxllm.spec import spec_to_json, tiny

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")

CONFIG = """\
run_dir: runs/planned
tokenizer: nowhere
model: {name: tiny.json, attention_impl: reference}
data: {train: [{path: nowhere.txt}], seq_len: 64}
schedule: {warmup: 1}
train: {steps: 10, batch_size: 16}
"""


def write_config(folder, model="llama2-70b", **changes):
    """Write tiny.json and plan.yaml into a folder."""
    spec = dataclasses.replace(tiny(jaxllm.spec(model)), **changes)
    (folder / "tiny.json").write_text(spec_to_json(spec))
    (folder / "plan.yaml").write_text(CONFIG.replace("tiny.json", str(folder / "tiny.json")))
    return folder / "plan.yaml"


def tiny_config(folder, *overrides, **changes):
    """Return the configuration of a tiny model."""
    return load_config([str(write_config(folder, **changes))], list(overrides))
