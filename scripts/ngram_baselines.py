"""Measure n-gram baselines on token shards: the held-out loss that a trained model has to beat.

    python scripts/ngram_baselines.py --run RUN [--json FILE]
    python scripts/ngram_baselines.py --train SHARDS [SHARDS ...] --heldout SHARDS [SHARDS ...] [--json FILE]

The first form takes the data of a run and shows the run's newest evaluation beside the baselines.

The loss is taken over exactly the tokens that a model predicts: those of each document and the end-of-text token after
it. Before a document stands only the end-of-text token, so that no context reaches back into the document before.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxllm.config import SourceConfig, load_config
from jaxllm.data.shards import ShardSet, prepare_source
from jaxllm.errors import EXIT_BAD_INPUT, EXIT_OK, InputError
from jaxllm.tokenizers import load_tokenizer
from jaxllm.train.records.metrics_file import read_metrics

ORDERS = {"unigram": 1, "bigram": 2, "trigram": 3}


class Level(NamedTuple):
    """Counts of one order; an n-gram's code is its tokens as the digits of a number to the base vocab_size.

    Attributes:
      grams, counts: int64 [num_grams], the codes in rising order and how often each counts.
      contexts: int64 [num_contexts], the codes without the last token, in rising order.
      totals, num_types: int64 [num_contexts], sum and number of a context's grams.
      discount: what is taken off each count.
    """

    grams: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    num_types: np.ndarray
    discount: float


class KneserNey:
    """Interpolated Kneser-Ney n-gram model over ids 0 to vocab_size - 1 (Chen and Goodman, TR-10-98, section 2.7).

    The highest order counts occurrences; each lower one counts the distinct tokens seen before an n-gram. The lowest
    is interpolated with the uniform distribution, so every token has a probability after every context.
    """

    def __init__(self, events: np.ndarray, vocab_size: int):
        """Count `events`, int [num_events, order]: each row a context and the token that follows."""
        order = events.shape[1]
        if vocab_size**order > np.iinfo(np.int64).max:
            raise InputError(f"order {order} with {vocab_size:,} ids: n-grams do not fit 64 bits")
        self.vocab_size = vocab_size
        self.levels: list[Level] = []
        grams, counts = np.unique(self._codes(events), return_counts=True)
        for length in range(order, 0, -1):
            self.levels.insert(0, _level(grams, counts, vocab_size))
            grams, counts = np.unique(grams % vocab_size ** (length - 1), return_counts=True)

    def probabilities(self, events: np.ndarray) -> np.ndarray:
        """Return the probability of each row's last token after the tokens before it, float64 [num_events]."""
        codes = self._codes(events)
        probability = np.full(len(codes), 1.0 / self.vocab_size)
        for length, level in enumerate(self.levels, start=1):
            grams = codes % self.vocab_size**length
            counts = _look_up(level.grams, level.counts, grams)
            totals = _look_up(level.contexts, level.totals, grams // self.vocab_size)
            num_types = _look_up(level.contexts, level.num_types, grams // self.vocab_size)
            share = np.maximum(counts - level.discount, 0) + level.discount * num_types * probability
            probability = np.where(totals > 0, share / np.maximum(totals, 1), probability)
        return probability

    def _codes(self, events: np.ndarray) -> np.ndarray:
        order = events.shape[1]
        return events.astype(np.int64) @ (self.vocab_size ** np.arange(order - 1, -1, -1, dtype=np.int64))


def make_events(documents: Iterable[np.ndarray], *, order: int, eos_id: int) -> np.ndarray:
    """Return all predictions that documents ask for, int64 [num_tokens + num_documents, order].

    A row is the `order - 1` tokens before a token (eos_id where the document has not begun) and the token itself.
    """
    rows = []
    for document in documents:
        padded = np.concatenate([np.full(order - 1, eos_id), document, [eos_id]]).astype(np.int64)
        rows.append(np.lib.stride_tricks.sliding_window_view(padded, order))
    return np.concatenate(rows)


def measure(train: Sequence[ShardSet], heldout: Sequence[ShardSet]) -> dict[str, dict[str, float]]:
    """Return for each baseline its held-out loss in nats per token, and in bits per byte of text.

    Raises:
      InputError: the shards were made with different tokenizers.
    """
    shards = [*train, *heldout]
    for other in shards[1:]:
        if other.index.tokenizer != shards[0].index.tokenizer:
            raise InputError(f"{other.folder}: made with another tokenizer than {shards[0].folder}")
    vocab_size = shards[0].index.vocab_size
    eos_id = _unused_id(shards, vocab_size)
    num_bytes = sum(shard.num_bytes for shard in heldout)
    results = {}
    for name, order in ORDERS.items():
        model = KneserNey(make_events(_documents(train), order=order, eos_id=eos_id), vocab_size)
        nats = -np.log(model.probabilities(make_events(_documents(heldout), order=order, eos_id=eos_id)))
        results[name] = {"loss": float(nats.mean()), "bits_per_byte": float(nats.sum() / math.log(2) / num_bytes)}
    return results


def open_run_data(run: Path) -> tuple[list[ShardSet], list[ShardSet]]:
    """Open the training and held-out shards of a run; relative paths in its config start at the working directory.

    Raises:
      InputError: no run, no held-out data, or data that has changed so that it cannot be read any more.
    """
    config = load_config([run / "config.yaml"])
    if not config.data.heldout:
        raise InputError(f"{run}: the run has no held-out data to measure a loss on")
    tokenizer = load_tokenizer(run / "tokenizer")
    cache = Path(config.data.cache_dir) if config.data.cache_dir else run / "data"

    def open_all(sources: Sequence[SourceConfig]) -> list[ShardSet]:
        return [prepare_source(source, tokenizer, cache, max_bad_rows=config.data.max_bad_rows) for source in sources]

    return open_all(config.data.train), open_all(config.data.heldout)


def newest_evaluation(run: Path) -> dict[str, dict[str, float]]:
    """Return the run's newest held-out evaluation in the form of `measure`, under a name that tells its step.

    Raises:
      InputError: there is none yet.
    """
    evaluations = [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "eval"]
    if not evaluations:
        raise InputError(f"{run}: metrics.jsonl holds no evaluation yet")
    newest = evaluations[-1]
    return {f"the model, step {newest['step']}": {key: newest[key] for key in ("loss", "bits_per_byte")}}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and, where asked to, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, metavar="RUN", help="a run folder; its config names the data")
    parser.add_argument("--train", nargs="+", metavar="SHARDS", help="folders to count n-grams in")
    parser.add_argument("--heldout", nargs="+", metavar="SHARDS", help="folders to measure the loss on")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here, too")
    args = parser.parse_args(arguments)
    if bool(args.run) == bool(args.train and args.heldout) or bool(args.train) != bool(args.heldout):
        parser.error("expected either --run, or --train and --heldout")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: no such folder {args.json.parent}")
    try:
        if args.run:
            train, heldout = open_run_data(args.run)
        else:
            train = [ShardSet.open(folder) for folder in args.train]
            heldout = [ShardSet.open(folder) for folder in args.heldout]
        results = measure(train, heldout)
        if args.run:
            results |= newest_evaluation(args.run)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    for name, shards in (("train", train), ("held out", heldout)):
        num_predictions = sum(shard.num_tokens + len(shard) for shard in shards)
        print(f"{name:9} {num_predictions:11,} tokens with the ends of {sum(map(len, shards)):,} documents")
    width = max(map(len, results))
    print(f"{'':{width}}  nats/token  bits/byte")
    for name, result in results.items():
        print(f"{name:{width}} {result['loss']:11.4f} {result['bits_per_byte']:10.4f}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    return EXIT_OK


def _level(grams: np.ndarray, counts: np.ndarray, vocab_size: int) -> Level:
    contexts, first, num_types = np.unique(grams // vocab_size, return_index=True, return_counts=True)
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    # Chen and Goodman, TR-10-98, section 2.6; without any single count it would leave nothing for what was not seen.
    discount = once / (once + 2 * twice) if once else 0.5
    return Level(grams, counts, contexts, np.add.reduceat(counts, first), num_types, float(discount))


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the values of the wanted keys, 0 for those that are not there."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)


def _documents(shards: Iterable[ShardSet]) -> Iterable[np.ndarray]:
    return (shard.tokens(document) for shard in shards for document in range(len(shard)))


def _unused_id(shards: Sequence[ShardSet], vocab_size: int) -> int:
    """Return an id that no document holds, to stand for the end of text; which one does not change the loss."""
    used = np.zeros(vocab_size, dtype=bool)
    for document in _documents(shards):
        used[document] = True
    if used.all():
        raise InputError(f"{shards[0].folder}: all {vocab_size:,} ids occur in documents; expected a special token")
    return int(np.argmin(used))


if __name__ == "__main__":
    sys.exit(main())
