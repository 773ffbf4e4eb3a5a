"""Which parameters are trained, which are frozen, and how they make a model."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from jaxllm.config.alignment import AdapterConfig
from jaxllm.errors import InputError
from jaxllm.nn.adapter import Adapter
from jaxllm.nn.model import declarations
from jaxllm.spec import ModelSpec
from jaxllm.train.tuning.lora import LoraTuning
from jaxllm.train.tuning.partial import PartialTuning
from jaxllm.train.tuning.prefix import PrefixTuning
from jaxllm.types import Params


class Tuning(Protocol):
    """A way to train a model: all of it, or little beside frozen weights."""

    spec: ModelSpec

    @property
    def draws(self) -> bool:
        """Whether the adapter itself is random in training (its dropout)."""

    def trained(self) -> Any:
        """Return the declarations of what is trained, a tree of `nn.param.Declared`."""

    def frozen(self) -> Any | None:
        """Return the declarations of what is frozen, as it is held; None: nothing is."""

    def join(self, trained: Params, frozen: Params | None) -> tuple[Params, Adapter | None]:
        """Return (parameters, adapter), the arguments of `nn.model.apply`."""

    def split(self, params: Params) -> tuple[Params | None, Params | None]:
        """Return (start values of what is trained, what is frozen) of a whole model's float32 parameters.

        A pure function to jit. Start values are None where they are drawn fresh, as `trained` declares them.
        """

    def merge(self, trained: Params, frozen: Params | None) -> Params:
        """Return a whole model's float32 parameters: what is held narrower widened, the adapter added.

        Raises:
          InputError: no parameters of the model can say what the adapter does.
        """


@dataclasses.dataclass(frozen=True)
class FullTuning:
    """All parameters are trained."""

    spec: ModelSpec
    draws: bool = dataclasses.field(default=False, init=False)

    def trained(self) -> Any:
        """Return the model's own declarations."""
        return declarations(self.spec)

    def frozen(self) -> None:
        """Return None: nothing is frozen."""
        return None

    def join(self, trained: Params, frozen: None = None) -> tuple[Params, None]:
        """Return the parameters as they are, without an adapter."""
        del frozen
        return trained, None

    def split(self, params: Params) -> tuple[Params, None]:
        """Return the parameters as start values."""
        return params, None

    def merge(self, trained: Params, frozen: None = None) -> Params:
        """Return the parameters as they are."""
        del frozen
        return trained


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
