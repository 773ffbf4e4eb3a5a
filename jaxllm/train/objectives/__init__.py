"""What the stages minimise: one objective each."""

from __future__ import annotations

from jaxllm.train.objectives.base import Objective
from jaxllm.train.objectives.language_modeling import LanguageModeling

OBJECTIVES: dict[str, type[Objective]] = {
    "pretrain": LanguageModeling,
    "sft": LanguageModeling,
}
"""Stage -> its objective."""
