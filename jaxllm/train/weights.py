"""The weights that a run starts from, and those of other models it needs: published, and of runs of any stage."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import jax

from jaxllm.checkpoint.manifest import MANIFEST_NAME
from jaxllm.checkpoint.peft import load_adapter
from jaxllm.config.alignment import AdapterConfig
from jaxllm.errors import InputError, located
from jaxllm.nn.adapter import Adapter
from jaxllm.nn.param import abstract_values
from jaxllm.spec import ModelSpec
from jaxllm.tokenizers import Tokenizer
from jaxllm.train.computation import Computation
from jaxllm.train.found_model import FoundModel, Pin
from jaxllm.train.run_models import SavedModel, find_again
from jaxllm.train.spec_changes import change_spec
from jaxllm.train.tuning import Tuning
from jaxllm.types import Params


@dataclasses.dataclass(frozen=True)
class RunWeights:
    """What a run's objective asks for, see `objectives.base.Weights`.

    Attributes:
      start: where the run's own weights come from; None: they are drawn.
      tokenizer: of the run, which other models must share; None: it is not known.
      start_adapter: where its adapter comes from, a run or a folder in peft's format; None: it is drawn.
      pins: which weights lay at a path when they were first read; the same ones are read every time.
    """

    computation: Computation
    start: str | None
    tokenizer: Tokenizer | None = None
    start_adapter: str | None = None
    pins: dict[str, Pin] = dataclasses.field(default_factory=dict)

    def find(self, path: str) -> FoundModel:
        """Find the model at a path, the one that this run found there before.

        Raises:
          InputError: there is none, or it is not there any more.
        """
        found = find_again(path, self.pins.get(path))
        self.pins.setdefault(path, found.pin)
        return found

    def model(self, path: str | None = None) -> Params | None:
        """Return a whole model's parameters in float32 on the mesh.

        Raises:
          InputError: there is none at `path`, one of another model, or one with another tokenizer.
        """
        if (path := path or self.start) is None:
            return None
        found = self.find(path)
        self._require_spec(path, found)
        if path != self.start:
            self.require_tokenizer(path, found)
        return found.model(self.computation.mesh)

    def reward_model(self, path: str | None = None) -> Params:
        """Return {"model", "score": {"kernel": [D]}} in float32 on the mesh; by default what the run starts from.

        The model may be of another size than the run's, see `reward_spec`. It has an output matrix only if that was
        trained too.

        Raises:
          InputError: there is no reward model at `path`, or one with another tokenizer.
        """
        path = path or self.start
        found = self.find(path)
        if path == self.start:
            self._require_spec(path, found)
        else:
            self.require_tokenizer(path, found)
        return found.reward_model(self.computation.mesh)

    def reward_spec(self, path: str) -> ModelSpec:
        """Return the architecture of a reward model.

        Raises:
          InputError: there is no reward model at `path`.
        """
        found = self.find(path)
        found.require_score()
        return found.spec

    def any_model(self) -> Params | None:
        """Return what the run starts from as {"model"}, with "score" where it is a reward model; None: it is drawn."""
        if self.start is not None and self.find(self.start).has_score:
            return self.reward_model()
        params = self.model()
        return None if params is None else {"model": params}

    def adapter(self, tuning: Tuning) -> Params | None:
        """Return what `start_adapter` gives a tuning to train on, float32 on the mesh; None: it is drawn.

        Raises:
          InputError: there is none, one of another model, or one of other ranks or matrices than the run's.
        """
        if self.start_adapter is None:
            return None
        path = Path(self.start_adapter)
        with located("adapter.weights"):
            options, arrays = self._read_adapter(path)
            wanted = self.computation.config.adapter.kind
            if options.kind != wanted:
                raise InputError(f"{path}: found one of kind {options.kind!r}, expected {wanted!r} by adapter.kind")
        with located(f"adapter.weights: {path}"):
            started = tuning.start(arrays)
        abstract = abstract_values(tuning.trained(), self.computation.mesh)
        return jax.tree.map(
            lambda array, leaf: jax.make_array_from_callback(leaf.shape, leaf.sharding, array.__getitem__),
            started,
            abstract,
        )

    def _read_adapter(self, path: Path) -> tuple[AdapterConfig, Adapter]:
        """Return options and numpy arrays, out of a run, one of its checkpoints, or a folder in peft's format."""
        if not ((path / "checkpoints").is_dir() or path.name == "checkpoints" or (path / MANIFEST_NAME).is_file()):
            return load_adapter(path, self.computation.spec)
        found = self.find(str(path))
        self._require_spec(str(path), found)
        self._require_base(found)
        return found.adapter()

    def _require_base(self, found: SavedModel) -> None:
        """Raise InputError where an adapter was trained beside other weights, as far as they are known."""
        base = found.base
        if base is None or self.start is None or base[1]["identity"] == self.find(self.start).identity():
            return
        raise InputError(
            f"{found.path}: this adapter was trained beside other weights, those of {base[0]}, than this run begins "
            f"with, {self.start}; expected the same. If they mean the same, export it (jaxllm export --adapter), which "
            "forgets them, and start from that folder"
        )

    def require_tokenizer(self, path: str, found: FoundModel) -> None:
        """Raise InputError unless a model has the run's tokenizer, as far as both are known."""
        theirs = None if self.tokenizer is None else found.tokenizer()
        if theirs is not None and theirs.fingerprint != self.tokenizer.fingerprint:
            raise InputError(
                f"{path}: this model has another tokenizer ({theirs.vocab_size:,} ids, fingerprint "
                f"{theirs.fingerprint[:12]}) than the run ({self.tokenizer.vocab_size:,} ids, fingerprint "
                f"{self.tokenizer.fingerprint[:12]}); expected the same, because both read the same ids"
            )

    def tokenizer_note(self) -> str:
        """Return words about the tokenizer of what the run starts from, where it is another than the run's."""
        theirs = self.find(self.start).tokenizer()
        if theirs is None or self.tokenizer is None or theirs.fingerprint == self.tokenizer.fingerprint:
            return ""
        return (
            f", which had another tokenizer ({theirs.vocab_size:,} ids) than this run has "
            f"({self.tokenizer.vocab_size:,} ids): its embeddings may mean other tokens"
        )

    def _require_spec(self, path: str, found: FoundModel) -> None:
        # What the run changes has no weights. Nor have windows, which published configs cannot state. Only a model of
        # another structure cannot take the changes, and its differences are told as they are.
        spec, theirs = self.computation.spec, found.spec
        with contextlib.suppress(InputError):
            theirs = dataclasses.replace(change_spec(theirs, self.computation.config.model), window=spec.window)
        if lines := spec_differences(theirs, spec):
            raise InputError(f"{path}: weights of another model:{lines}")


def spec_differences(found: ModelSpec, expected: ModelSpec) -> str:
    """Return a line for each field in which two specs differ."""
    pairs = {
        field.name: (getattr(found, field.name), getattr(expected, field.name))
        for field in dataclasses.fields(ModelSpec)
    }
    return "".join(f"\n  {name}: found {a}, expected {b}" for name, (a, b) in pairs.items() if a != b)
