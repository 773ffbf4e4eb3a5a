"""Which parameters are trained, which are frozen, and how they make a model."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

from jaxllm.config.alignment import AdapterConfig
from jaxllm.nn.adapter import Adapter
from jaxllm.nn.model import declarations
from jaxllm.spec import ModelSpec
from jaxllm.train.tuning.frozen import held_declarations, hold
from jaxllm.types import Params


class Tuning(abc.ABC):
    """A way to train a model: all of it, or little beside frozen weights."""

    spec: ModelSpec

    @property
    def draws(self) -> bool:
        """Whether the adapter itself is random in training (its dropout)."""
        return False

    @abc.abstractmethod
    def trained(self) -> Any:
        """Return the declarations of what is trained, a tree of `nn.param.Declared`."""

    @abc.abstractmethod
    def frozen(self) -> Any | None:
        """Return the declarations of what is frozen, as it is held; None: nothing is."""

    @abc.abstractmethod
    def join(self, trained: Params, frozen: Params | None) -> tuple[Params, Adapter | None]:
        """Return (parameters, adapter), the arguments of `nn.model.apply`."""

    @abc.abstractmethod
    def split(self, params: Params) -> tuple[Params | None, Params | None]:
        """Return (start values of what is trained, what is frozen) of a whole model's float32 parameters.

        A pure function to jit. Start values are None where they are drawn fresh, as `trained` declares them.
        """

    @abc.abstractmethod
    def merge(self, trained: Params, frozen: Params | None) -> Params:
        """Return a whole model's float32 parameters: what is held narrower widened, the adapter added.

        Raises:
          InputError: no parameters of the model can say what the adapter does.
        """


@dataclasses.dataclass(frozen=True)
class FullTuning(Tuning):
    """All parameters are trained."""

    spec: ModelSpec

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


@dataclasses.dataclass(frozen=True, eq=False)
class AdapterTuning(Tuning):
    """An adapter is trained; all parameters are frozen."""

    spec: ModelSpec
    config: AdapterConfig

    def frozen(self) -> Any:
        """Return the declarations of the parameters as they are held."""
        return held_declarations(declarations(self.spec), self.config.base)

    def split(self, params: Params) -> tuple[None, Params]:
        """Return the parameters as they are held; the adapter is drawn fresh."""
        return None, hold(params, declarations(self.spec), self.config.base)

    @abc.abstractmethod
    def start(self, adapter: Adapter) -> Params:
        """Return what makes a given adapter of float32 numpy arrays.

        Raises:
          InputError: this tuning makes none of that form.
        """
