"""Read training checkpoints: which there are, and their arrays, straight into any sharding.

Layout: FOLDER/STEP/{params/, opt_state/, data/state.json, meta.json, manifest.json}. A folder named by a step is
complete, because it got that name by one rename when all its files were on disk.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from jaxllm.checkpoint.manifest import MANIFEST_NAME, Manifest, find_damage, read_manifest
from jaxllm.errors import InputError
from jaxllm.sharding.processes import gather
from jaxllm.types import Params, TrainState

DATA_NAME = "data/state.json"
META_NAME = "meta.json"
_STEP_NAME = re.compile(r"0|[1-9][0-9]*")
_LISTED = 10


class CheckpointReader:
    """Read the checkpoints of a folder; never writes, so it may look at a run that is training."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).absolute()

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, lowest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(p.name) for p in self.folder.iterdir() if _STEP_NAME.fullmatch(p.name) and p.is_dir())

    def latest_step(self) -> int | None:
        """Return the newest step that has a checkpoint, or None."""
        return max(self.steps(), default=None)

    def restore(self, abstract_state: TrainState, step: int | None = None) -> tuple[TrainState, dict, dict]:
        """Read a whole checkpoint, every array straight into its sharding (on any mesh).

        Args:
          abstract_state: TrainState of jax.ShapeDtypeStruct, each with a sharding.
          step: which checkpoint; the newest by default.

        Returns:
          (state, data_state, meta).

        Raises:
          InputError: no such checkpoint, a damaged one, or one of another model or optimizer.
        """
        step = self.find_step(step)
        trees = state_trees(abstract_state)
        manifest = self._require_manifest(step)
        self._require_same_arrays(step, manifest, trees, same_dtype=True)
        self._require_undamaged(step, manifest, manifest.files)
        found = _read_arrays(self.folder / str(step), trees)
        extra = found["opt_state"]
        state = TrainState(
            step=extra["step"],
            params=found["params"],
            opt_state=extra["optimizer"],
            rng=extra["rng"],
            reference=found.get("reference"),
        )
        return state, self._read_json(step, DATA_NAME), self._read_json(step, META_NAME)

    def restore_params(self, abstract_params: Params, step: int | None = None, *, part: bool = False) -> Params:
        """Read the parameters alone, cast to the dtypes asked for; the optimizer state is not touched.

        Args:
          abstract_params: tree of jax.ShapeDtypeStruct, each with a sharding.
          step: which checkpoint; the newest by default.
          part: there may be others, which are not read.

        Raises:
          InputError: no such checkpoint, a damaged one, or one of another model.
        """
        step = self.find_step(step)
        trees = {"params": abstract_params}
        manifest = self._require_manifest(step)
        self._require_same_arrays(step, manifest, trees, same_dtype=False, part=part)
        needed = [name for name in manifest.files if not name.startswith(("opt_state/", "reference/", "data/"))]
        self._require_undamaged(step, manifest, needed)
        return _read_arrays(self.folder / str(step), trees)["params"]

    def stored_params(self, step: int | None = None) -> dict[str, str]:
        """Return the parameters of a checkpoint: names joined by "/" -> "dtype[d0,d1,...]"; needs no device.

        Raises:
          InputError: no such checkpoint, or a damaged one.
        """
        arrays = self._require_manifest(self.find_step(step)).arrays
        return {name.removeprefix("params/"): text for name, text in arrays.items() if name.startswith("params/")}

    def read_meta(self, step: int | None = None) -> dict:
        """Read what was saved as `meta`, of the newest checkpoint by default; needs no device.

        Raises:
          InputError: no such checkpoint, or a damaged one.
        """
        step = self.find_step(step)
        manifest = self._require_manifest(step)
        if problem := find_damage(self.folder / str(step), manifest, [META_NAME]):
            raise self._damaged(step, problem)
        return self._read_json(step, META_NAME)

    def find_step(self, step: int | None) -> int:
        """Return a step that has a checkpoint: the one asked for, or the newest; raises InputError for others."""
        steps = self.steps()
        if not steps:
            raise InputError(f"{self.folder}: no checkpoint; expected folders named by step, found {self._content()}")
        if step is not None and step not in steps:
            raise InputError(f"{self.folder}: no checkpoint of step {step}; there are {_enumerate(steps[::-1])}")
        return steps[-1] if step is None else step

    def _content(self) -> str:
        if not self.folder.is_dir():
            return "no such folder"
        return _enumerate(sorted(path.name for path in self.folder.iterdir())) or "an empty folder"

    def _require_manifest(self, step: int) -> Manifest:
        try:
            return read_manifest(self.folder / str(step))
        except FileNotFoundError:
            raise self._damaged(step, f"{MANIFEST_NAME} is missing (or jaxllm did not write this folder)") from None
        except (OSError, ValueError) as error:
            raise self._damaged(step, f"{MANIFEST_NAME} cannot be read: {error}") from error

    def _require_same_arrays(
        self, step: int, manifest: Manifest, trees: dict[str, Any], *, same_dtype: bool, part: bool = False
    ) -> None:
        expected = array_table(trees)
        found = {name: text for name, text in manifest.arrays.items() if name.split("/")[0] in trees}
        if part:
            found = {name: text for name, text in found.items() if name in expected}
        if problem := _first_difference(expected, found, same_dtype):
            raise InputError(f"{self.folder / str(step)}: checkpoint of another model or optimizer: {problem}")

    def _require_undamaged(self, step: int, manifest: Manifest, names: Iterable[str]) -> None:
        """Check the named files; each process takes its share, and all raise if one finds damage."""
        share = sorted(names)[jax.process_index() :: jax.process_count()]
        problem = find_damage(self.folder / str(step), manifest, share)
        if problem := next(filter(None, gather(problem)), None):
            raise self._damaged(step, problem)

    def _damaged(self, step: int, problem: str) -> InputError:
        others = [other for other in self.steps() if other != step]
        hint = f"to use another one, ask for it: --from-step {others[-1]}" if others else "there is no other one here"
        return InputError(f"{self.folder / str(step)}: damaged checkpoint: {problem}; {hint}")

    def _read_json(self, step: int, name: str) -> dict:
        return json.loads((self.folder / str(step) / name).read_text())


def open_checkpoint(path: str | Path) -> tuple[CheckpointReader, int | None]:
    """Find the checkpoints that a user means by a run folder, its checkpoints/ or one checkpoint folder.

    Returns:
      (reader, step), where step is None unless `path` is one checkpoint.

    Raises:
      InputError: there is no checkpoint at `path`.
    """
    path = Path(path).absolute()
    if (path / MANIFEST_NAME).is_file():
        if not _STEP_NAME.fullmatch(path.name):
            raise InputError(
                f"{path}: a checkpoint folder must be named by its step, for example {path.parent / '100'}"
            )
        return CheckpointReader(path.parent), int(path.name)
    reader = CheckpointReader(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    reader.find_step(None)
    return reader, None


def state_trees(state: TrainState) -> dict[str, Any]:
    """Split a TrainState into the items of a checkpoint: the weights, and what only training needs."""
    trees = {
        "params": state.params,
        "opt_state": {"optimizer": state.opt_state, "step": state.step, "rng": state.rng},
    }
    return trees if state.reference is None else trees | {"reference": state.reference}


def array_table(tree: Any) -> dict[str, str]:
    """Describe the leaves of a tree: name joined by "/" -> "dtype[d0,d1,...]"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        for path, leaf in leaves
    }


def new_array_handler() -> Any:
    """Build the orbax handler of the array items.

    Random float32 weights compress by 8 % only, so compression is not worth its CPU time.
    """
    import orbax.checkpoint as ocp

    names = ("params", "opt_state", "reference")
    return ocp.CompositeCheckpointHandler(
        **{name: ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False) for name in names}
    )


def _read_arrays(folder: Path, trees: dict[str, Any]) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    items = {
        name: ocp.args.PyTreeRestore(
            tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True
        )
        for name, tree in trees.items()
    }
    with ocp.Checkpointer(new_array_handler()) as checkpointer:
        return checkpointer.restore(folder, args=ocp.args.Composite(**items))


def _first_difference(expected: dict[str, str], found: dict[str, str], same_dtype: bool) -> str | None:
    def comparable(text: str) -> str:
        return text if same_dtype else text.partition("[")[2]

    # Weights first: a difference there explains those of the optimizer state.
    for name in sorted({*expected, *found}, key=lambda name: (not name.startswith("params/"), name)):
        if name not in found:
            return f"{name} is missing, expected {expected[name]}"
        if name not in expected:
            return f"{name} {found[name]} is not part of this model"
        if comparable(found[name]) != comparable(expected[name]):
            return f"{name} is {found[name]}, expected {expected[name]}"
    return None


def _enumerate(values: list) -> str:
    shown = ", ".join(str(value) for value in values[:_LISTED])
    return shown + (f" and {len(values) - _LISTED} more" if len(values) > _LISTED else "")
