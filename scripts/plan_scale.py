"""Plan every pretraining config, and some of post-training, on the slice that its header names; write docs/scale.md.

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
import functools
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from scale_rows import Row, list_rows
from scale_table import is_current, write_page

from jaxllm.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_OK, InputError
from jaxllm.plan.plan import make_plan
from jaxllm.plan.report import installed_versions, plan_as_dict, write_json
from jaxllm.plan.topology import parse_topology
from jaxllm.train.computation import resolve_spec

ROOT = Path(__file__).parents[1]
_SOURCES = ("spec*.py", "types.py", "nn", "losses", "sharding", "families", "train", "plan")
"""Of jaxllm, what the compiled step or what is read from it depends on; kernels_pallas does too."""
_PACKAGES = ("jaxllm", "jax", "jaxlib", "flax")
_MOST_REASON = 500


def request(row: Row) -> dict[str, Any]:
    """Return what decides a row beside its options: where both are equal, so is the plan."""
    return {
        "config": row.config.stem,
        "topology": row.topology,
        "overrides": list(row.overrides),
        "versions": {package: _version(package) for package in (*_PACKAGES, row.compiler)},
        "sources_sha256": sources_digest(),
    }


@functools.cache
def _version(package: str) -> str | None:
    return installed_versions().get(package)


@functools.cache
def sources_digest() -> str:
    """Return the SHA-256 of the sources that a plan depends on."""
    digest = hashlib.sha256()
    rooms = [path for pattern in _SOURCES for path in sorted((ROOT / "jaxllm").glob(pattern))]
    for room in [*rooms, ROOT / "kernels_pallas"]:
        for path in sorted(room.rglob("*.py")) if room.is_dir() else [room]:
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def is_done(row: Row, ignore_sources: bool = False) -> bool:
    """Tell whether a row need not be planned: it was, and nothing that decides it has changed since."""
    if not row.kept.exists():
        return False
    kept = json.loads(row.kept.read_text(encoding="utf-8"))
    ignored = ("sources_sha256",) if ignore_sources else ()
    return "failed" not in kept and is_current(kept, row.load(), request(row), ignored)


def plan_here(row: Row) -> None:
    """Plan a row in this process and keep it."""
    asked = request(row)
    plan = make_plan(row.load(), parse_topology(row.topology))
    write_json(plan_as_dict(plan) | {"request": asked}, row.kept)


def plan_apart(row: Row, limit: float) -> str:
    """Plan a row in a process of its own, which a compiler may bring down, and return a line about it.

    Kept is the plan, or the reason why there is none.

    Args:
      limit: seconds that it may take.
    """
    configs = row.config.parents[1] / "pretrain" if row.is_tuned else row.config.parent
    folders = ["--configs", str(configs), "--out", str(row.kept.parents[1])]
    command = [sys.executable, str(Path(__file__).resolve()), *folders, "--one", row.name]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}  # the chips are elsewhere
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=limit, env=environment)
        reason = "" if done.returncode == 0 else _reason(done.returncode, done.stderr)
    except subprocess.TimeoutExpired:
        reason = f"not done within {limit:,.0f} s"
    if reason:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        asked = {"config": dataclasses.asdict(row.load()), "request": request(row)}
        write_json({"date": now, "failed": reason} | asked, row.kept)
        return f"not compiled: {reason}"
    return _verdict(json.loads(row.kept.read_text(encoding="utf-8")))


def _reason(code: int, stderr: str) -> str:
    """Return the last line that a child wrote, or by what it was killed."""
    if code < 0:
        return f"the compiler was killed by signal {-code}"
    lines = [line for line in stderr.splitlines() if line.strip()]
    return lines[-1][:_MOST_REASON] if lines else f"exit code {code}"


def _verdict(plan: dict[str, Any]) -> str:
    memory, estimate = plan["memory"], plan["estimate"]
    if not plan["fits"]:
        return f"does not fit, {memory['exceeded']:,} bytes too many"
    share, compiling = memory["total"] / memory["limit"], plan["seconds"]["compile"]
    return f"{share:.0%} of the memory, {estimate['step_s']:.3g} s, MFU {estimate['mfu']:.1%}, {compiling:.0f} s"


def sweep(rows: Iterable[Row], limit: float, ignore_sources: bool) -> Iterator[str]:
    """Plan the rows that are not done; yield a line about each."""
    for row in rows:
        if is_done(row, ignore_sources):
            yield f"{row.name}: kept"
        elif row.kept.exists() and _version(row.compiler) is None:
            yield f"{row.name}: left as it is, for {row.compiler} is not installed"
        else:
            yield f"{row.name} on {row.topology}: {plan_apart(row, limit)}"


def write_table(rows: Sequence[Row], out: Path) -> None:
    """Write scale.md from what is kept."""
    configs = {row.name: row.load() for row in rows}
    specs = {config.model.name: resolve_spec(config) for config in configs.values()}
    write_page(out / "scale.md", rows, configs, {row.name: request(row) for row in rows}, specs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep."""
    arguments = _parser().parse_args(argv)
    rows = {row.name: row for row in list_rows(arguments.configs, arguments.out / "scale")}
    asked = [arguments.one] if arguments.one else arguments.rows or list(rows)
    unknown = [name for name in asked if name not in rows]
    if unknown:
        raise InputError(f"unknown row {unknown[0]!r}; known: {', '.join(rows)}")
    if arguments.one:
        plan_here(rows[arguments.one])
        return EXIT_OK
    (arguments.out / "scale").mkdir(parents=True, exist_ok=True)
    if not arguments.table:
        for line in sweep([rows[name] for name in asked], arguments.limit, arguments.ignore_sources):
            print(line, flush=True)
            write_table(list(rows.values()), arguments.out)
    write_table(list(rows.values()), arguments.out)
    return EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help="rows to plan, by name; default: all")
    parser.add_argument("--table", action="store_true", help="write the table from what is kept, plan nothing")
    parser.add_argument("--limit", type=float, default=3600.0, metavar="SECONDS", help="for each row; default: 3600")
    parser.add_argument(
        "--ignore-sources", action="store_true", help="keep rows that differ only by jaxllm's own sources"
    )
    parser.add_argument("--configs", type=Path, default=ROOT / "configs" / "pretrain", help="folder of configs")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of scale.md and scale/")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        print(f"plan_scale: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
