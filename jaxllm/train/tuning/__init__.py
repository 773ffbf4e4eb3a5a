"""Which parameters are trained: all, some, or little beside frozen ones."""

from __future__ import annotations

from jaxllm.config.alignment import AdapterConfig
from jaxllm.errors import InputError
from jaxllm.spec import ModelSpec
from jaxllm.train.tuning.base import FullTuning, Tuning
from jaxllm.train.tuning.lora import LoraTuning
from jaxllm.train.tuning.partial import PartialTuning
from jaxllm.train.tuning.prefix import PrefixTuning

__all__ = ["FullTuning", "Tuning", "make_tuning"]

_KINDS = {"lora": LoraTuning, "prefix": PrefixTuning, "partial": PartialTuning}


def make_tuning(spec: ModelSpec, config: AdapterConfig | None) -> Tuning:
    """Return what a run's `adapter` says; None: all parameters are trained.

    Raises:
      InputError: it does not fit the model; names the option.
    """
    if config is None:
        return FullTuning(spec)
    if config.layers is not None and config.layers > spec.num_layers:
        raise InputError(f"adapter.layers: the model has {spec.num_layers} layers, found {config.layers}")
    return _KINDS[config.kind](spec, config)
