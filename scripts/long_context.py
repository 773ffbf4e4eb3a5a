"""Show perplexity by context length under each rule for contexts longer than those of the training.

    python scripts/long_context.py [OVERRIDE ...]        train configs/pretrain/long_context_tiny.yaml, then measure
    python scripts/long_context.py --run RUN             measure an existing run

The first form is an ordinary run: stopped and started again it resumes, and overrides such as `train.steps=200` change
its config. All cells are measured on the same held-out text, cut into rows of each length.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jaxllm.arguments import POSITIVE
from jaxllm.checkpoint.opened import Opened
from jaxllm.config import RunConfig, load_config
from jaxllm.data.loader import boundary_ids, heldout_batches
from jaxllm.data.shards import ShardSet, prepare_source
from jaxllm.data.train_tokenizer import train_from_files
from jaxllm.environment import enable_compilation_cache
from jaxllm.errors import EXIT_BAD_INPUT, EXIT_OK, InputError
from jaxllm.generate.scoring import score_rows
from jaxllm.pretrained import open_model
from jaxllm.spec import ChunkedNTK, DynamicNTK, LinearScaling, LogN, ModelSpec, Rope, Yarn
from jaxllm.train.loop import train

CONFIG = Path(__file__).parents[1] / "configs" / "pretrain" / "long_context_tiny.yaml"
BYTES_ONLY = 264
"""Ids of a vocabulary without merges: the bytes and the special tokens."""

STEPS = ("plain", "+ dynamic NTK", "+ LogN", "+ windows")
"""Rows of Qwen's table (arXiv:2309.16609, table 3), each with all that the rows above have."""
EXPLODED = 2.0
"""Plain perplexity has exploded where it is this many times that at the training length."""
NOISE = 1e-4
"""Differences in nats that are those of float32 arithmetic."""
TOKENS_AT_ONCE = 8192


def techniques(spec: ModelSpec, train_length: int) -> dict[str, Callable[[int], ModelSpec]]:
    """Return for each row of the table the spec that rows of a given length are read with.

    The windows are our own, for Qwen's are unpublished: the training length in the lower half of the layers, twice
    that in the upper half.

    Raises:
      InputError: the model has no rotary positions.
    """
    if not isinstance(spec.position, Rope):
        raise InputError(f"the model has no rotary positions to scale, found {type(spec.position).__name__}")

    def changed(scaling: object, logn: LogN | None = None, window: tuple[int, ...] | None = None) -> ModelSpec:
        position = dataclasses.replace(spec.position, scaling=scaling)
        return dataclasses.replace(spec, position=position, logn=logn, window=window)

    ntk, logn = ChunkedNTK(train_length=train_length), LogN(train_length=train_length)
    lower = spec.num_layers // 2
    windows = (train_length,) * lower + (2 * train_length,) * (spec.num_layers - lower)
    dynamic = DynamicNTK(factor=1.0, original_max_position=train_length)
    qwen = (changed(None), changed(ntk), changed(ntk, logn), changed(ntk, logn, windows))
    fixed = dict(zip(STEPS, qwen, strict=True)) | {"dynamic NTK of InternLM": changed(dynamic)}
    return {name: lambda _, spec=spec: spec for name, spec in fixed.items()} | {
        "YaRN": lambda length: changed(Yarn(factor=length / train_length, original_max_position=train_length)),
        "linear": lambda length: changed(LinearScaling(factor=length / train_length)),
    }


def heldout_stretches(config: RunConfig, model: Opened, run: Path, length: int, count: int) -> np.ndarray:
    """Return stretches of held-out text, the first `count` of each source, int [stretches, length].

    Raises:
      InputError: no held-out data, or less than one stretch of it.
    """
    cache = Path(config.data.cache_dir or run / "data")
    start_id, eos_id = boundary_ids(model.tokenizer)

    def stretches(shards: ShardSet) -> list[np.ndarray]:
        rows = heldout_batches(
            [shards], seq_len=length, packing="concat", batch_size=1, start_id=start_id, eos_id=eos_id
        )
        return list(itertools.islice((row["tokens"] for row in rows if row["loss_weights"].all()), count))

    sources = [
        prepare_source(source, model.tokenizer, cache, max_bad_rows=config.data.max_bad_rows)
        for source in config.data.heldout
    ]
    found = [row for shards in sources for row in stretches(shards)]
    if not found:
        raise InputError(f"{run}: the held-out data has no {length} tokens")
    return np.concatenate(found)


def measure(run: Path, config: RunConfig, lengths: Sequence[int], count: int) -> dict[str, np.ndarray]:
    """Return for each technique the mean loss in nats of each stretch of text, [lengths, stretches].

    Each stretch is read in rows of each length; a row's first token is not predicted.
    """
    model, losses = open_model(run), {}
    text = heldout_stretches(config, model, run, math.lcm(*lengths), count)
    for name, spec_at in techniques(model.spec, config.data.seq_len).items():
        losses[name] = np.stack([stretch_losses(spec_at(length), model, text, length) for length in lengths])
        print(table_row(name, np.exp(losses[name].mean(axis=1)), ".3f"), flush=True)
    return losses


def stretch_losses(spec: ModelSpec, model: Opened, text: np.ndarray, length: int) -> np.ndarray:
    """Return the mean loss of each stretch, read in rows of `length`, in nats."""
    rows = text.reshape(-1, length).tolist()
    scores = score_rows(spec, model.params, rows, num_start=1, batch_size=max(1, TOKENS_AT_ONCE // length))
    nats = [-score.sum_logprob / score.num_tokens for score in scores]
    return np.reshape(nats, (len(text), -1)).mean(axis=1)


def findings(lengths: Sequence[int], losses: dict[str, np.ndarray]) -> dict[str, bool]:
    """Return the statements that Qwen's table makes, and whether they hold here."""
    plain = losses["plain"].mean(axis=1)
    beyond = [loss for length, loss in zip(lengths, plain, strict=True) if length > 2 * lengths[0]]
    told = f"plain: at least {EXPLODED:g} times the perplexity at {lengths[0]} beyond twice that length"
    held = {told: bool(beyond) and all(loss > plain[0] + math.log(EXPLODED) for loss in beyond)}
    for before, name in itertools.pairwise(STEPS):
        change = (losses[name] - losses[before]).mean(axis=1)
        held[f"{name}: at most '{before}' at every length"] = bool((change <= NOISE).all())
    return held


def table_row(name: str, values: Sequence[object], style: str = "") -> str:
    """Lay out one row of a table."""
    return f"{name:24}" + "".join(f"{value:>20{style}}" for value in values)


def report(lengths: Sequence[int], losses: dict[str, np.ndarray]) -> None:
    """Print what each step of Qwen's table changes, with its spread over the text, and what holds."""
    stretches = losses["plain"].shape[1]
    print(f"\nchange of the loss by each step, in nats, +- its standard error over {stretches} stretches of text")
    print(table_row("", lengths))
    for before, name in itertools.pairwise(STEPS):
        change = losses[name] - losses[before]
        errors = change.std(axis=1, ddof=1) / math.sqrt(stretches) if stretches > 1 else np.full(len(lengths), np.nan)
        print(table_row(name, [f"{c:+.4f} +-{e:.4f}" for c, e in zip(change.mean(axis=1), errors, strict=True)]))
    print()
    for statement, holds in findings(lengths, losses).items():
        print(f"{'holds' if holds else 'DOES NOT HOLD'}: {statement}")


def train_tiny(overrides: Sequence[str]) -> tuple[int, Path]:
    """Train, or continue, the model of CONFIG; return the exit code and the run folder."""
    config = load_config([CONFIG], overrides)
    if not (Path(config.tokenizer) / "tokenizer_config.json").is_file():
        sources = [source.path for source in config.data.train]
        train_from_files(sources, vocab_size=BYTES_ONLY, output=config.tokenizer)
    return train(config), Path(config.run_dir)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, metavar="RUN", help="measure this run; its config names the data")
    parser.add_argument(
        "--factors", nargs="+", type=POSITIVE, default=[2, 4, 8], metavar="N", help="lengths, in training lengths"
    )
    parser.add_argument(
        "--stretches", type=POSITIVE, default=16, metavar="N", help="pieces of the longest length from each source"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the perplexities here, too")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="a.b=value, for the training")
    args = parser.parse_args(arguments)
    if args.run and args.overrides:
        parser.error("overrides change the training; expected none with --run")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: no such folder {args.json.parent}")
    enable_compilation_cache()
    try:
        code, run = (EXIT_OK, args.run) if args.run else train_tiny(args.overrides)
        if code != EXIT_OK:
            return code
        config = load_config([run / "config.yaml"])
        lengths = [factor * config.data.seq_len for factor in sorted({1, *args.factors})]
        print(f"\nperplexity by context length on held-out text; {run} was trained at {lengths[0]}")
        print(table_row("", lengths))
        losses = measure(run, config, lengths, args.stretches)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    report(lengths, losses)
    if args.json:
        table = {name: np.exp(values.mean(axis=1)).tolist() for name, values in losses.items()}
        args.json.write_text(json.dumps({"lengths": lengths, "perplexity": table}, indent=2) + "\n")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
