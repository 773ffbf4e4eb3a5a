"""Which rows docs/scale.md has: the configs, and the slices that they are planned on."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxllm.config import RunConfig, load_config
from jaxllm.errors import InputError
from jaxllm.plan.topology import parse_topology

NOT_PLANNED = ("quickstart", "long_context_tiny")
"""Configs for a CPU."""
TUNED = {
    "sft/qwen_7b_chat": None,
    "sft/qwen_7b_qlora": "v5e:1x1",
    "sft/baichuan2_7b_lora": "v5e:2x2",
    "sft/chatglm2_6b_ptuning": "v5e:1x1",
    "reward/qwen_7b_rm": None,
    "dpo/deepseek_7b_dpo": None,
    "grpo/deepseekmath_7b": None,
    "ppo/llama2_7b_ppo": None,
}
"""Configs of post-training beside the folder of those for pretraining, and slices in place of their headers'."""
COMPARED = ("qwen_7b", ("v5e:16x16", "v5p:4x4x4"), ("train.grad_accum=4", "model.remat=full"))
"""The config, slices and options with which both ways of moving weights are planned: what fits both slices."""
_SLICE = re.compile(r"^# Hardware: \d+ [^.(]* \((\w+:[\dx]+)\)", re.MULTILINE)
_COMPILERS = {"tpu": "libtpu", "cuda": "jax-cuda13-plugin"}


@dataclasses.dataclass(frozen=True)
class Row:
    """A config to plan.

    Attributes:
      config: its file. topology: the slice. kept: the file of its plan.
      overrides: options set on top of the config. is_tuned: it is one of post-training.
    """

    name: str
    config: Path
    topology: str
    kept: Path
    overrides: tuple[str, ...] = ()
    is_tuned: bool = False

    def load(self) -> RunConfig:
        """Return the configuration to plan."""
        return load_config([self.config], list(self.overrides))

    @property
    def compiler(self) -> str:
        """The package that compiles for the row's chip."""
        return _COMPILERS[parse_topology(self.topology).chip.platform]


def list_rows(configs: Path, kept: Path) -> Iterator[Row]:
    """Yield the row of each config, those of post-training, then those that compare the ways of moving weights.

    Args:
      configs: folder of configs. kept: folder of plans.

    Raises:
      InputError: the header of a config names no slice.
    """
    paths = [path for path in sorted(configs.glob("*.yaml")) if path.stem not in NOT_PLANNED]
    for path in paths:
        yield Row(path.stem, path, slice_of(path), kept / f"{path.stem}.json")
    for config, topology in TUNED.items():
        if (path := configs.parent / f"{config}.yaml").is_file():
            name = config.replace("/", ".")
            yield Row(name, path, topology or slice_of(path), kept / f"{name}.json", is_tuned=True)
    config, topologies, options = COMPARED
    for path in (path for path in paths if path.stem == config):
        for topology in topologies:
            for way in ("staged", "xla"):
                name = f"{config}.{topology.replace(':', '_')}.{way}"
                yield Row(name, path, topology, kept / f"{name}.json", (*options, f"mesh.collectives={way}"))


def slice_of(config: Path) -> str:
    """Return the slice that a config's header names.

    Raises:
      InputError: it names none.
    """
    found = _SLICE.search(config.read_text(encoding="utf-8"))
    if not found:
        raise InputError(f"{config}: no line like '# Hardware: 256 TPU v5p chips (v5p:4x8x8). ...' names a slice")
    return found[1]


def same_options(kept: Any, now: Any) -> bool:
    """Tell whether options kept as JSON are those of a config; options that are newer must have their defaults."""
    if isinstance(now, list | tuple):
        return isinstance(kept, list) and len(kept) == len(now) and all(map(same_options, kept, now))
    if not dataclasses.is_dataclass(now):
        return kept == now
    if not isinstance(kept, dict):
        return False
    fields = {field.name: field for field in dataclasses.fields(now)}
    return kept.keys() <= fields.keys() and all(
        same_options(kept[name], getattr(now, name)) if name in kept else getattr(now, name) == _default(field)
        for name, field in fields.items()
    )


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
