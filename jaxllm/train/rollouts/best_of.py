"""Rejection sampling (Llama 2, arXiv:2307.09288 section 3.2.3): of several answers to each prompt the best is kept.

The random numbers of a prompt's answers follow from the seed, the round and the prompt alone: where sampling was
interrupted does not matter.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.config import RunConfig, dump_config
from jaxllm.data.example_set import ExampleSet
from jaxllm.errors import InputError
from jaxllm.sharding.processes import gather, on_main, together
from jaxllm.tokenizers.base import StreamDecoder
from jaxllm.train.found_model import FoundModel
from jaxllm.train.rollouts.answers import Answered, Asked, Respondent
from jaxllm.train.rollouts.reward_sum import combine
from jaxllm.train.rollouts.sampled_rows import Journal, Row, best_of, read_rows, write_rows
from jaxllm.train.rollouts.setup import make_respondent
from jaxllm.train.setup import ROLLOUT_STAGES, Setup, make_setup, open_sources
from jaxllm.train.signals import StopSignal, Votes
from jaxllm.train.weights import RunWeights
from jaxllm.types import Params

_SECONDS_BETWEEN_NOTES = 30.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of the prompts.

    Attributes:
      written: rows of the output. unanswered: prompts without an answer that ended; stopped: a signal came.
      mean_score, mean_best: of all answers that ended, and of the best ones of this round.
    """

    written: int = 0
    unanswered: int = 0
    mean_score: float = 0.0
    mean_best: float = 0.0
    stopped: bool = False


def sample_best(
    config: RunConfig,
    output: Path,
    *,
    round_number: int = 1,
    earlier: Sequence[Path] = (),
    note: Callable[[str], None] = print,
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Answer all prompts of data.train `rollout.samples` times and write the best answers as rows for sft.

    Args:
      config: of stage ppo or grpo: its weights, prompts, rollout and rewards are used.
      output: a new .jsonl file of rows {"messages", "tools"?, "score", "scores", "parts", "round", "origin"}.
      earlier: outputs of earlier rounds: of each prompt the answer with the highest score of all rounds is written.
      note: takes sentences for the log.
      progress: called with prompts done and all prompts; without it a note tells them now and then.

    Raises:
      InputError: bad configuration, data or weights; an output that exists, or was begun with another configuration.
    """
    if config.stage not in ROLLOUT_STAGES:
        raise InputError(f"stage: answers are sampled as in stage ppo or grpo, found {config.stage!r}")
    if config.adapter is not None:
        raise InputError("adapter: expected null: answers are sampled with a whole model, adapters of runs are merged")
    if output.exists():
        raise InputError(f"{output}: exists already; expected a new file")
    if config.model.weights is None:
        raise InputError("model.weights: found none; expected the model that is to answer")
    kept = list(itertools.chain.from_iterable(map(read_rows, earlier)))
    with StopSignal() as signals:
        setup = together(lambda: make_setup(config))
        opened = together(lambda: open_sources(setup, _cache(config), note=note))
        weights = RunWeights(setup, config.model.weights, setup.tokenizer)
        prompts = _Prompts(opened.training)
        journal = Journal(output, _identity(config, weights.find(weights.start), round_number))
        on_main(journal.open)
        with jax.set_mesh(setup.mesh):
            sampling = _Sampling(setup, weights, journal, round_number, Votes(setup.mesh, signals))
            stopped = sampling.run(prompts, progress, note)
        journal.close()
        if stopped:
            return Outcome(stopped=True)
        answered = journal.rows()
        best = best_of([*kept, *(row for row in answered if row["messages"])])
        on_main(lambda: write_rows(output, best))
        on_main(journal.remove)
    return _outcome(answered, best)


class _Prompts:
    """All prompts of some sources, in order."""

    def __init__(self, sets: Sequence[ExampleSet]):
        self._places = [(examples, number) for examples in sets for number in range(len(examples))]

    def __len__(self) -> int:
        return len(self._places)

    def asked(self, number: int) -> Asked:
        examples, place = self._places[number]
        return Asked(number, examples.tokens(place)[0].ids.tolist(), examples.prompt(place))


class _Sampling:
    """The model, the rewards, and what is asked of them."""

    def __init__(self, setup: Setup, weights: RunWeights, journal: Journal, round_number: int, votes: Votes):
        self._setup, self._journal, self._votes = setup, journal, votes
        self._respondent: Respondent = together(lambda: make_respondent(setup, weights))
        self._params: Params = together(weights.model)
        self._round = round_number
        self._whole = jax.jit(lambda tokens: tokens, out_shardings=NamedSharding(setup.mesh, PartitionSpec()))

    def run(self, prompts: _Prompts, progress: Callable[[int, int], None] | None, note: Callable[[str], None]) -> bool:
        """Answer the prompts that are left; return whether a signal came."""
        next_note = time.monotonic() + _SECONDS_BETWEEN_NOTES
        rollout = self._setup.config.rollout
        done = gather(len(self._journal.rows()))[0]
        while done < len(prompts):
            asked = [prompts.asked(number) for number in range(done, min(done + rollout.prompts, len(prompts)))]
            full = asked + asked[:1] * (rollout.prompts - len(asked))
            answered = self._respondent.answer(self._params, None, full, self._keys(full), stop=self._votes.ask)
            if answered is None:
                return True
            self._journal.add(list(self._rows(asked, answered)))
            done += len(asked)
            if progress is not None:
                progress(done, len(prompts))
            elif time.monotonic() > next_note:
                note(f"{done:,} of {len(prompts):,} prompts are answered")
                next_note = time.monotonic() + _SECONDS_BETWEEN_NOTES
        return False

    def _keys(self, asked: Sequence[Asked]) -> np.ndarray:
        """Draw the keys of answers: they depend on the prompt's number, not on what is asked with it."""
        key = jax.random.fold_in(jax.random.key(self._setup.config.seed), self._round)
        samples = self._setup.config.rollout.samples
        numbers = np.array([each.document for each in asked], np.uint32)
        drawn = jax.vmap(lambda number: jax.random.split(jax.random.fold_in(key, number), samples))(numbers)
        return np.asarray(jax.random.key_data(drawn)).reshape(-1, 2)

    def _rows(self, asked: Sequence[Asked], answered: Answered) -> Iterator[Row]:
        """Yield what is kept of each prompt; without messages where no answer ended."""
        config, samples = self._setup.config, self._setup.config.rollout.samples
        tokens = np.asarray(self._whole(answered.rows.tokens))
        parts = answered.worth.parts
        is_safety = np.zeros(len(tokens), bool)
        is_safety[: len(asked) * samples] = np.repeat(
            [bool(each.prompt.row.get("is_safety")) for each in asked], samples
        )
        scores = combine(config.rewards, parts, is_safety, config.ppo.combine)
        for place, each in enumerate(asked):
            mine = range(place * samples, (place + 1) * samples)
            texts = {row: self._text(each, tokens[row], answered, row) for row in mine}
            ended = [row for row in mine if answered.finished[row] and texts[row].strip()]
            row = {
                "origin": each.prompt.row["_origin"],
                "round": self._round,
                "scores": [float(scores[k]) for k in ended],
            }
            if not ended:
                yield {"messages": []} | row
                continue
            best = max(ended, key=lambda row: scores[row])
            reply = {"role": "assistant", "content": texts[best]}
            tools = {} if each.prompt.tools is None else {"tools": list(each.prompt.tools)}
            told = {"score": float(scores[best]), "parts": {name: float(part[best]) for name, part in parts.items()}}
            yield {"messages": [*each.prompt.messages, reply]} | tools | told | row

    def _text(self, asked: Asked, tokens: np.ndarray, answered: Answered, row: int) -> str:
        """Return the text of an answer, without its stop token."""
        start = int(answered.prompt_lengths[row])
        end = start + int(answered.num_tokens[row]) - bool(answered.finished[row])
        decoder = StreamDecoder(self._setup.tokenizer, after=asked.ids)
        return "".join([*map(decoder.push, tokens[start:end].tolist()), decoder.finish()])


def _outcome(answered: Sequence[Row], best: Sequence[Row]) -> Outcome:
    scores = [score for row in answered for score in row["scores"]]
    highest = [row["score"] for row in answered if row["messages"]]
    return Outcome(
        written=len(best),
        unanswered=len(answered) - len(highest),
        mean_score=float(np.mean(scores)) if scores else 0.0,
        mean_best=float(np.mean(highest)) if highest else 0.0,
    )


def _identity(config: RunConfig, model: FoundModel, round_number: int) -> str:
    """Return what an unfinished file must share with those who go on with it."""
    options: Mapping[str, Any] = yaml.safe_load(dump_config(config))
    free = ("run_dir", "mesh", "log", "checkpoint", "train")
    decides = {name: value for name, value in options.items() if name not in free}
    text = json.dumps([decides, model.identity(), round_number])
    return hashlib.sha256(text.encode()).hexdigest()


def _cache(config: RunConfig) -> Path:
    return Path(config.data.cache_dir or Path(config.run_dir) / "data")
