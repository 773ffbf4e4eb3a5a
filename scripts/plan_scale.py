"""Plan every pretraining config on the slice that its header names, and write docs/scale.md.

    python scripts/plan_scale.py                      # all rows that are not kept yet, minutes each; then the table
    python scripts/plan_scale.py qwen_7b glm_130b     # these rows
    python scripts/plan_scale.py --table              # the table alone, from what is kept

Each row is planned in a process of its own and kept as docs/scale/ROW.json: what `jaxllm plan --json` writes, and what
it was asked for. A sweep that was ended goes on where it stopped: a row whose config, slice, package versions and
sources are those of the kept file is not planned again. A row that fails or takes too long is kept with the reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # the chips are elsewhere

from scale_table import write_page

from jaxllm.config import load_config
from jaxllm.errors import InputError
from jaxllm.plan.plan import make_plan
from jaxllm.plan.report import _versions as installed_versions
from jaxllm.plan.report import plan_as_dict, write_json
from jaxllm.plan.topology import parse_topology

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs" / "scale"
PAGE = ROOT / "docs" / "scale.md"

NOT_PLANNED = ("quickstart", "long_context_tiny")
"""Configs for a CPU."""
COMPARED = ("qwen_7b", ("v5e:16x16", "v5p:4x4x4"))
"""The config and slices on which both ways of moving weights are planned."""
_SLICE = re.compile(r"^# Hardware: \d+ [^.(]* \((\w+:[\dx]+)\)", re.MULTILINE)
_SOURCES = ("spec*.py", "types.py", "nn", "losses", "sharding", "families", "train", "plan")
"""Of jaxllm, what the compiled step or what is read from it depends on; kernels_pallas does too."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A config to plan: its file, the slice, and options set on top."""

    name: str
    config: str
    topology: str
    overrides: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """Where the row is kept."""
        return KEPT / f"{self.name}.json"


def list_rows() -> list[Row]:
    """Return the row of each config, then those that compare the ways of moving weights."""
    paths = sorted((ROOT / "configs" / "pretrain").glob("*.yaml"))
    rows = [Row(path.stem, path.stem, slice_of(path)) for path in paths if path.stem not in NOT_PLANNED]
    config, topologies = COMPARED
    for topology in topologies:
        for way in ("staged", "xla"):
            name = f"{config}.{topology.replace(':', '_')}.{way}"
            rows.append(Row(name, config, topology, (f"mesh.collectives={way}",)))
    return rows


def slice_of(path: Path) -> str:
    """Return the slice that a config's header names.

    Raises:
      InputError: it names none.
    """
    found = _SLICE.search(path.read_text())
    if not found:
        raise InputError(f"{path}: the header has no line like '# Hardware: 256 TPU v5p chips (v5p:4x8x8). ...'")
    return found[1]


def request(row: Row) -> dict[str, Any]:
    """Return what decides a row: two requests that are equal give the same plan."""
    config = load_config([ROOT / "configs" / "pretrain" / f"{row.config}.yaml"], list(row.overrides))
    text = json.dumps(dataclasses.asdict(config), sort_keys=True)
    return {
        "config": row.config,
        "topology": row.topology,
        "overrides": list(row.overrides),
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "versions": installed_versions(),
        "sources_sha256": sources_digest(),
    }


def sources_digest() -> str:
    """Return the SHA-256 of the sources that a plan depends on."""
    digest = hashlib.sha256()
    rooms = [path for pattern in _SOURCES for path in (ROOT / "jaxllm").glob(pattern)]
    for room in [*rooms, ROOT / "kernels_pallas"]:
        for path in sorted(room.rglob("*.py")) if room.is_dir() else [room]:
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def is_kept(row: Row, ignore_sources: bool = False) -> bool:
    """Tell whether a row needs no planning: it was planned, and nothing that decides it has changed since."""
    if not row.path.exists():
        return False
    kept, asked = json.loads(row.path.read_text()), request(row)
    ignored = {"sources_sha256"} if ignore_sources else set()
    same = all(kept["request"].get(key) == value for key, value in asked.items() if key not in ignored)
    return "failed" not in kept and same


def plan_row(row: Row) -> None:
    """Plan a row in this process and keep it."""
    asked = request(row)
    config = load_config([ROOT / "configs" / "pretrain" / f"{row.config}.yaml"], list(row.overrides))
    plan = make_plan(config, parse_topology(row.topology))
    write_json(plan_as_dict(plan) | {"request": asked}, row.path)


def plan_apart(row: Row, limit: float) -> str:
    """Plan a row in a process of its own, keep the plan or why there is none, and return a line about it."""
    command = [sys.executable, str(Path(__file__)), "--one", row.name]
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=limit)
        reason = "" if done.returncode == 0 else _reason(done.returncode, done.stderr)
    except subprocess.TimeoutExpired:
        reason = f"not done within {limit:,.0f} s"
    if reason:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        write_json({"date": now, "failed": reason, "request": request(row)}, row.path)
        return f"not compiled: {reason}"
    kept = json.loads(row.path.read_text())
    if not kept["fits"]:
        return f"does not fit, {kept['memory']['exceeded']:,} bytes too many"
    share = kept["memory"]["total"] / kept["memory"]["limit"]
    estimate, seconds = kept["estimate"], kept["seconds"]["compile"]
    return f"{share:.0%} of the memory, {estimate['step_s']:.3g} s, MFU {estimate['mfu']:.1%}, compiled in {seconds:.0f} s"


def _reason(code: int, stderr: str) -> str:
    """Return the last line that a child wrote, or by what it was killed."""
    if code < 0:
        return f"the compiler was killed by signal {-code}"
    lines = [line for line in stderr.splitlines() if line.strip()]
    return lines[-1][:500] if lines else f"exit code {code}"


def main() -> int:
    """Run the sweep."""
    arguments = _parser().parse_args()
    rows = {row.name: row for row in list_rows()}
    if arguments.one:
        plan_row(rows[arguments.one])
        return 0
    unknown = [name for name in arguments.rows if name not in rows]
    if unknown:
        raise InputError(f"unknown row {unknown[0]!r}; known: {', '.join(rows)}")
    KEPT.mkdir(exist_ok=True)
    for name in () if arguments.table else arguments.rows or rows:
        if is_kept(rows[name], arguments.ignore_sources):
            print(f"{name}: kept", flush=True)
        else:
            print(f"{name} on {rows[name].topology}: {plan_apart(rows[name], arguments.limit)}", flush=True)
            write_page(PAGE, rows.values())
    write_page(PAGE, rows.values())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help="rows to plan, by name; default: all")
    parser.add_argument("--table", action="store_true", help="write docs/scale.md from what is kept, plan nothing")
    parser.add_argument("--limit", type=float, default=3600.0, metavar="SECONDS", help="for each row; default: 3600")
    parser.add_argument(
        "--ignore-sources", action="store_true", help="keep rows that differ only by jaxllm's own sources"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"plan_scale: {error}")
