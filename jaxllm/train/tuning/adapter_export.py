"""Adapters of runs, written as peft reads them."""

from __future__ import annotations

from pathlib import Path

from jaxllm.checkpoint.peft import save_adapter
from jaxllm.checkpoint.published import read_published
from jaxllm.errors import InputError
from jaxllm.families import family_of_config
from jaxllm.families.base import Family
from jaxllm.train.run_models import PublishedModel, SavedModel, find_model


def export_adapter(
    path: str | Path, output: str | Path, *, step: int | None = None, base_model: str | None = None
) -> None:
    """Write the adapter of a run, or of one of its checkpoints, as a folder in peft's format, all or nothing.

    Args:
      step: of a run, the checkpoint; default: the newest.
      base_model: what the files call the model that the adapter stands beside; None: where the run found it.

    Raises:
      InputError: no run with an adapter that peft has a format for, or `output` is not empty.
    """
    found = find_model(path, step)
    if not isinstance(found, SavedModel):
        raise InputError(f"{path}: found a published model; expected a run with an adapter")
    if found.has_score:
        raise InputError(
            f"{path}: found a reward model, whose scalar head has no place beside peft's adapters; export it whole"
        )
    options, adapter = found.adapter()
    base = found.meta["init_from"]
    save_adapter(
        Path(output), found.spec, adapter, options, family=_published_family(base), base_model=base_model or base
    )


def _published_family(path: str) -> Family | None:
    """Return the family in whose layout a model was published; None for one that was trained from scratch."""
    found = find_model(path)
    if isinstance(found, PublishedModel):
        return family_of_config(found.config)
    published = read_published(found.run.path) if isinstance(found, SavedModel) else None
    return None if published is None else family_of_config(published[0])
