"""`jaxllm data check`."""

from __future__ import annotations

import argparse
import dataclasses
import math
from typing import TYPE_CHECKING, Any

from jaxllm.arguments import NATURAL, POSITIVE
from jaxllm.cli.shared import show_progress
from jaxllm.errors import EXIT_BAD_INPUT, EXIT_OK, InputError

if TYPE_CHECKING:
    from jaxllm.config import RunConfig, SourceConfig
    from jaxllm.data.check import Report, Sample
    from jaxllm.data.examples import Encoder
    from jaxllm.tokenizers import Tokenizer

_STAGES = ("sft", "reward", "dpo", "ppo", "grpo")
_KINDS = ("auto", "text", "messages", "sharegpt", "alpaca", "prompt_response", "preference", "prompt")


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb to the parser."""
    parser = verbs.add_parser(
        "check",
        help="check conversations, pairs and prompts",
        description="Read files of conversations, pairs of answers or prompts as a run would, and report what they "
        "hold: kinds, bad rows, lengths, what is trained, repeats, and one example as the model sees it.",
    )
    parser.add_argument("input", nargs="*", metavar="FILE", help="files, globs, folders; default: those of --config")
    parser.add_argument("--config", action="append", metavar="FILE", help="YAML of a run; later files win")
    parser.add_argument("--stage", choices=_STAGES, help="what the rows are for; default: whatever they are")
    parser.add_argument("--rows", choices=_KINDS, default="auto", help="what a row is; default: told from its fields")
    parser.add_argument("--text-key", default="text", metavar="KEY", help="text field of rows that are texts")
    parser.add_argument("--tokenizer", metavar="DIR", help="without one only the structure is checked")
    parser.add_argument("--chat-format", metavar="NAME", help="default: ChatML if the vocabulary has it")
    parser.add_argument("--seq-len", type=POSITIVE, metavar="N", help="tokens in a row of the run")
    parser.add_argument("--max-bad-rows", type=NATURAL, metavar="N", help="bad rows that are no failure; default: 0")
    parser.set_defaults(run=_check)


def _check(arguments: argparse.Namespace) -> int:
    from jaxllm.config import load_config
    from jaxllm.data.check import check_examples
    from jaxllm.data.rows import STAGE_PURPOSES

    config = load_config(arguments.config) if arguments.config else None
    if config and arguments.stage:
        config = dataclasses.replace(config, stage=arguments.stage)
    stage = config.stage if config else arguments.stage
    if stage == "pretrain":
        raise InputError("stage: found 'pretrain', whose texts are checked by `jaxllm data tokenize`; expected another")
    data = config.data if config else None
    seq_len = arguments.seq_len or (_example_length(config) if config else None)
    budget = arguments.max_bad_rows if arguments.max_bad_rows is not None else (data.max_bad_rows if data else 0)
    encoder = _encoder(arguments, config)
    with show_progress("{:,} rows, {:,} bad ones") as progress:
        report = check_examples(
            _sources(arguments, config),
            STAGE_PURPOSES.get(stage),
            encoder,
            seq_len=seq_len,
            too_long="refuse" if data and data.too_long == "refuse" else "skip",
            max_bad_rows=budget,
            progress=progress,
        )
    _print_report(report, encoder, seq_len)
    if config and report.lengths:
        _print_epoch(report, config, seq_len)
    if report.sample:
        _print_sample(report.sample, encoder.tokenizer)
    return EXIT_BAD_INPUT if report.bad_rows.count > budget else EXIT_OK


def _sources(arguments: argparse.Namespace, config: RunConfig | None) -> list[SourceConfig]:
    from jaxllm.config import SourceConfig

    if arguments.input:
        return [SourceConfig(path=path, rows=arguments.rows, text_key=arguments.text_key) for path in arguments.input]
    sources = [*config.data.train, *config.data.heldout] if config else []
    if not sources:
        raise InputError("found no files to check; name some, or a --config with data.train")
    return sources


def _example_length(config: RunConfig) -> int:
    from jaxllm.train.setup import example_length

    return example_length(config)


def _encoder(arguments: argparse.Namespace, config: RunConfig | None) -> Encoder | None:
    """Return the run's encoder where there is a config, one without a model for a tokenizer alone, else None."""
    from jaxllm.checkpoint.opened import open_tokenizer
    from jaxllm.config.alignment import ChatConfig
    from jaxllm.data.encoders import default_chat_format, find_chat_format, make_encoder
    from jaxllm.data.examples import Encoder
    from jaxllm.train.computation import resolve_spec
    from jaxllm.train.from_weights import run_chat_format, run_tokenizer

    if config:
        config = dataclasses.replace(config, tokenizer=arguments.tokenizer or config.tokenizer)
        tokenizer = run_tokenizer(config)
        name = arguments.chat_format or run_chat_format(config, tokenizer)
        return make_encoder(config, resolve_spec(config), tokenizer, name)
    if arguments.tokenizer is None:
        if arguments.chat_format:
            raise InputError("--chat-format: a chat format needs the --tokenizer that its tokens are in")
        return None
    tokenizer = open_tokenizer(arguments.tokenizer)
    name = arguments.chat_format or default_chat_format(None, tokenizer)
    chat = None if name is None else find_chat_format(name, tokenizer)
    return Encoder(tokenizer=tokenizer, chat=chat, options=ChatConfig(), places=None)


def _print_report(report: Report, encoder: Encoder | None, seq_len: int | None) -> None:
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in report.kinds.items())
    print(f"rows: {kinds or 'none that is good'}")
    print(report.bad_rows.summary() if report.bad_rows.count else "bad rows: 0")
    print(f"rows that repeat an earlier one: {report.repeats:,}")
    for repeat in report.first_repeats:
        print(f"  {repeat}")
    if encoder is None:
        print("no --tokenizer: neither lengths nor what is trained were checked, nor whether a chat format fits")
        return
    print(f"chat format: {encoder.chat.name if encoder.chat else 'none; prompts and answers are plain text'}")
    if not report.lengths:
        return
    print(f"tokens: {_quantiles(report.lengths)}")
    if seq_len is not None:
        print(f"longer than {seq_len:,} tokens: {report.too_long:,}")
    if report.num_trained:
        total = sum(report.lengths)
        print(f"trained: {report.num_trained:,} of {total:,} tokens ({report.num_trained / total:.1%})")
        print(f"without a stop token in what is trained: {report.without_stop:,}")


def _quantiles(lengths: list[int]) -> str:
    import numpy as np

    names = ("min", "median", "p90", "p99", "max")
    values = np.percentile(lengths, (0, 50, 90, 99, 100), method="higher")
    return f"{sum(lengths):,}, in a row " + ", ".join(f"{n} {v:,}" for n, v in zip(names, values, strict=True))


def _print_epoch(report: Report, config: RunConfig, seq_len: int) -> None:
    """Print how many steps see every row once, about: lanes pack rows of their own."""
    from jaxllm.config.stages import PAIR_STAGES, POLICY_STAGES
    from jaxllm.data.check import rows_of_epoch

    packed = config.data.packing == "packed" and config.stage not in POLICY_STAGES
    most = (config.data.pairs_per_row if config.stage in PAIR_STAGES else None) if packed else 1
    rows = rows_of_epoch(report.lengths, seq_len, most)
    if config.stage in POLICY_STAGES:
        prompts = config.rollout.prompts if config.rollout else config.train.batch_size
        print(f"one epoch: {math.ceil(rows / prompts):,} rounds of {prompts:,} prompts")
        return
    used = sum(length for length in report.lengths if length <= seq_len) / max(rows * seq_len, 1)
    steps, batch = math.ceil(rows / config.train.batch_size), config.train.batch_size
    print(f"one epoch: {rows:,} {config.data.packing} rows ({used:.0%} full), {steps:,} steps of {batch:,} rows")


def _print_sample(sample: Sample, tokenizer: Tokenizer) -> None:
    """Print the first example with what is trained in green, or between marks where the output has no colours."""
    import rich.console
    import rich.text

    from jaxllm.data.check import marked_runs

    console = rich.console.Console(soft_wrap=True, highlight=False)
    for number, tokens in enumerate(sample.tokens):
        side = ("", ", chosen", ", rejected")[number + 1 if len(sample.tokens) == 2 else 0]
        how = "green" if console.is_terminal else "between marks"
        console.print(f"{sample.origin}{side}; what is trained is {how}:", markup=False)
        text = rich.text.Text()
        for run, is_trained in marked_runs(tokenizer, tokens):
            text.append(_marked(run, console) if is_trained else run, "green" if is_trained else "")
        console.print(text)


def _marked(text: str, console: Any) -> str:
    return text if console.is_terminal else f"[trained]{text}[/trained]"
