"""Rejection sampling (Llama 2, arXiv:2307.09288 section 3.2.3): of several answers to each prompt the best is kept.

The random numbers of a prompt's answers follow from the seed, the round and the prompt alone: where sampling was
interrupted does not matter.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml

from jaxllm.config import RunConfig, dump_config
from jaxllm.config.stages import POLICY_STAGES
from jaxllm.errors import InputError
from jaxllm.files import require_new_file
from jaxllm.sharding.processes import gather, leaving_together, on_main, require_same_start, together
from jaxllm.sharding.rules import replicated
from jaxllm.tokenizers.base import decode_after
from jaxllm.train.found_model import FoundModel
from jaxllm.train.pace import Pace
from jaxllm.train.rollouts.answers import Answered, Asked, Prompts, Respondent
from jaxllm.train.rollouts.sampled_rows import Journal, Row, best_of, read_rows, write_rows
from jaxllm.train.rollouts.setup import make_respondent
from jaxllm.train.rollouts.source import require_whole_groups
from jaxllm.train.setup import Setup, make_setup, open_in_turn
from jaxllm.train.signals import StopSignal, Votes
from jaxllm.train.weights import RunWeights
from jaxllm.types import Params


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

    When there are several processes, every one of them calls this with the same arguments; the first one writes.

    Args:
      config: of stage ppo or grpo: its weights, prompts, rollout and rewards are used.
      output: a new .jsonl file of rows {"messages", "tools"?, "score", "scores", "parts", "round", "origin"}.
      earlier: outputs of earlier rounds: of each prompt the answer with the highest score of all rounds is written.
      note: takes sentences for the log.
      progress: called with prompts done and all prompts; without it a note tells them now and then.

    Raises:
      InputError: bad configuration, data or weights; an output that exists, or was begun with another configuration.
    """
    with leaving_together(), StopSignal() as signals:
        require_same_start([dump_config(config), round_number])
        together(lambda: _check(config))
        on_main(lambda: require_new_file(output))
        kept = together(lambda: list(itertools.chain.from_iterable(map(read_rows, earlier))))
        setup = together(lambda: make_setup(config))
        opened = open_in_turn(setup, _cache(config), signals, note)
        if opened is None:
            return Outcome(stopped=True)
        weights = RunWeights(setup, config.model.weights, setup.tokenizer)
        prompts = Prompts(opened.training)
        identity = together(lambda: _identity(config, weights.find(weights.start), round_number))
        journal = Journal(output, identity)
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


def _check(config: RunConfig) -> None:
    if config.stage not in POLICY_STAGES:
        raise InputError(f"stage: answers are sampled as in stage ppo or grpo, found {config.stage!r}")
    if config.adapter is not None:
        raise InputError("adapter: expected null: answers are sampled with a whole model, adapters of runs are merged")
    if config.model.weights is None:
        raise InputError("model.weights: found none; expected the model that is to answer")


class _Sampling:
    """The model, the rewards, and what is asked of them."""

    def __init__(self, setup: Setup, weights: RunWeights, journal: Journal, round_number: int, votes: Votes):
        self._setup, self._journal, self._votes = setup, journal, votes
        require_whole_groups(setup)
        self._respondent: Respondent = together(lambda: make_respondent(setup, weights))
        self._params: Params = together(weights.model)
        self._round = round_number
        self._whole = jax.jit(lambda tokens: tokens, out_shardings=replicated(setup.mesh))

    def run(self, prompts: Prompts, progress: Callable[[int, int], None] | None, note: Callable[[str], None]) -> bool:
        """Answer the prompts that are left; return whether a signal came."""
        pace = Pace()
        done = gather(len(self._journal.rows()))[0]
        if done:
            note(f"{done:,} of {len(prompts):,} prompts were answered before; going on")
        for asked, count in prompts.batches(self._setup.config.rollout.prompts, done):
            answered = self._respondent.answer(self._params, None, asked, self._keys(asked), stop=self._votes.ask)
            if answered is None:
                return True
            rows = list(self._rows(asked[:count], answered))
            together(functools.partial(self._journal.add, rows))
            done += count
            if progress is not None:
                progress(done, len(prompts))
            elif pace.is_due():
                note(f"{done:,} of {len(prompts):,} prompts are answered")
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
        samples, parts, scores = self._setup.config.rollout.samples, answered.worth.parts, answered.scores
        tokens = np.asarray(self._whole(answered.rows.tokens))
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
        return decode_after(self._setup.tokenizer, asked.ids, tokens[start:end].tolist())


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
