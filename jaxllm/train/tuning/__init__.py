"""Which parameters are trained: all, some, or little beside frozen ones."""

from __future__ import annotations

from jaxllm.train.tuning.base import FullTuning, Tuning, make_tuning

__all__ = ["FullTuning", "Tuning", "make_tuning"]
