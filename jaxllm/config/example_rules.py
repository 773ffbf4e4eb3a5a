"""Rules between the options of the stages that learn from examples: conversations and pairs of answers."""

from __future__ import annotations

from typing import Any

from jaxllm.config.declare import Rule
from jaxllm.config.stages import PAIR_STAGES


def _packing(packing: str, stage: str) -> str | None:
    if stage in ("sft", *PAIR_STAGES) and packing not in ("packed", "padded"):
        return f"stage {stage!r} keeps examples apart; expected 'packed' or 'padded', found {packing!r}"
    if stage == "pretrain" and packing == "padded":
        return "only stages after pretraining have rows of one example; found 'padded'"


def _margins(margins: str, loss: str) -> str | None:
    if margins != "none" and loss != "ranking":
        return f"only ranking.loss 'ranking' has margins; expected 'none' with {loss!r}, found {margins!r}"


def _label_smoothing(smoothing: float, variant: str) -> str | None:
    if smoothing and variant in ("hinge", "ipo"):
        return f"dpo.variant {variant!r} has none; expected 0, found {smoothing}"


def _reference_weights(weights: str | None, reference: str) -> str | None:
    if weights is not None and reference == "none":
        return f"expected null with dpo.reference 'none', found {weights!r}"


def _adapter_weights(weights: str | None, kind: str) -> str | None:
    if weights is not None and kind == "partial":
        return f"kind 'partial' goes on from model.weights, which are whole; expected null, found {weights!r}"


def _no_mixture(_: Any, stage: str) -> str | None:
    if stage not in ("pretrain", "sft"):
        return f"stage {stage!r} does not train the balance of experts; expected train.moe null"


RULES: tuple[Rule, ...] = (
    (("data.packing", "stage"), _packing),
    (("adapter.weights", "adapter.kind"), _adapter_weights),
    (("ranking.margins", "ranking.loss"), _margins),
    (("dpo.label_smoothing", "dpo.variant"), _label_smoothing),
    (("dpo.reference_weights", "dpo.reference"), _reference_weights),
    (("train.moe.never_dropped", "stage"), _no_mixture),
)
