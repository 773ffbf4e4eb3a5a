"""Compare GRPO and DPO with TRL's, in turn on this machine: the same start, data, schedule and number of updates.

Both sides read the configs of scripts/align_demo.sh, after which this runs in the root of the repository:
    python scripts/bench_alignment.py runs/bench_alignment --start runs/demo_sft        (extra 'compat')
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from align_report import Score, measure

from jaxllm.config import RunConfig, load_config
from jaxllm.errors import missing_extra
from jaxllm.tokenizers import load_tokenizer
from jaxllm.tokenizers.chat import CHAT_FORMATS
from jaxllm.train.setup import make_loader, make_setup, open_sources

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIDES = ("jaxllm", "trl")
CONFIGS = {"grpo": "configs/grpo/demo_grpo.yaml", "dpo": "configs/dpo/demo_dpo.yaml"}
AS_TRL = {"grpo": ("grpo.std=sample", "grpo.eps=1e-4"), "dpo": ()}
"""What is fixed in TRL and an option here."""
WARMUP = 5
"""First updates that are left out of the speed, because compilers and allocators work then."""


def main(arguments: list[str] | None = None) -> int:
    """Run both sides in turn and print a table for each method."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path, metavar="DIR", help="a new folder")
    parser.add_argument("--start", type=Path, required=True, metavar="RUN", help="the fine-tuned run to begin with")
    parser.add_argument("--methods", nargs="+", choices=CONFIGS, default=list(CONFIGS), help="default: all")
    parser.add_argument("--steps", type=int, metavar="N", help=f"updates, more than {WARMUP}; default: as configured")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of each side; default: 3")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--examples", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.side is not None:
        run_side(chosen)
        return 0
    chosen.output.mkdir(parents=True)
    command("export", chosen.start, chosen.output / "start", "--as", "qwen2")
    prompts = rows_of(load_config([CONFIGS["grpo"]]).data.heldout[0].path)
    start = measure(chosen.output / "start", prompts)
    for method in chosen.methods:
        size = examples(settings(chosen, method, chosen.output / "counted", seed=0))
        rounds = [compare(chosen, method, seed, size, prompts) for seed in range(chosen.rounds)]
        print(table(method, start, *([results[side] for results in rounds] for side in SIDES)), flush=True)
    return 0


def compare(
    chosen: argparse.Namespace, method: str, seed: int, size: int, prompts: list[dict]
) -> dict[str, dict[str, float]]:
    """Run each side once in a process of its own, in the other order in every second round; return their figures.

    Args:
      size: answers, or pairs of them, in an update.
    """
    results = {}
    for side in SIDES[:: 1 if seed % 2 == 0 else -1]:
        folder = chosen.output / f"{method}_{side}_{seed}"
        options = ["--start", chosen.start, "--methods", method, "--side", side, "--seed", seed, "--examples", size]
        options += [] if chosen.steps is None else ["--steps", chosen.steps]
        program = [sys.executable, __file__, folder, *options]
        begin, load = time.perf_counter(), os.getloadavg()[0]
        with open(f"{folder}.log", "wb") as log:
            child = subprocess.Popen([*map(str, program)], stdout=log, stderr=log)
            _, status, usage = os.wait4(child.pid, 0)
        if status:
            raise SystemExit(f"{folder}.log: {side} ended with exit code {os.waitstatus_to_exitcode(status)}")
        figures = {"seconds": time.perf_counter() - begin, "cpu_seconds": usage.ru_utime + usage.ru_stime}
        figures |= {"memory_MB": usage.ru_maxrss / 1024, "load_before": load}
        figures |= json.loads((folder / "speed.json").read_text())
        figures |= measure(folder if side == "jaxllm" else folder / "model", prompts)._asdict()
        with open(chosen.output / "results.jsonl", "a") as file:
            file.write(json.dumps({"method": method, "side": side, "seed": seed} | figures) + "\n")
        results[side] = figures
    return results


def table(method: str, start: Score, ours: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]]) -> str:
    """Return medians over rounds with their range, and the ratio of the sides within each round."""
    names = {
        "updates_per_s": "updates/s",
        "tokens_per_s": "sampled tokens/s, all of an update counted",
        "seconds": "whole command, s",
        "cpu_seconds": "processor time of all cores, s",
        "memory_MB": "peak memory, MB",
        "greedy": f"right, most likely answer ({start.greedy:.3f} before)",
        "sampled": f"right, mean of samples ({start.sampled:.3f} before)",
    }
    ratios = [a["updates_per_s"] / b["updates_per_s"] for a, b in zip(ours, theirs, strict=True)]
    lines = [f"\n| {method} | jaxllm | TRL |", "|---|---|---|"]
    lines += [
        f"| {text} | {spread(ours, name)} | {spread(theirs, name)} |" for name, text in names.items() if ours[0][name]
    ]
    return "\n".join([*lines, f"| times as fast, in each round | {', '.join(f'{r:.2f}' for r in ratios)} | |"])


def spread(runs: Sequence[dict[str, float]], name: str) -> str:
    """Return the median and range of a figure."""
    values = [run[name] for run in runs]
    least, middle, most = (f"{value:.3g}" for value in (min(values), statistics.median(values), max(values)))
    return middle if least == most else f"{middle} ({least} to {most})"


def rows_of(path: str) -> list[dict]:
    """Return the rows of a jsonl file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def command(*arguments: object) -> None:
    """Run one of our commands."""
    subprocess.run([sys.executable, "-m", "jaxllm.cli", *map(str, arguments)], check=True)


def run_side(chosen: argparse.Namespace) -> None:
    """Run one side, and write DIR/speed.json."""
    (method,) = chosen.methods
    config = settings(chosen, method, chosen.output, chosen.seed)
    if chosen.side == "trl":
        times, lengths = train_trl(config, chosen.output, chosen.output.parent / "start", chosen.examples)
    else:
        command("train", "--config", CONFIGS[method], *overrides(chosen, method, chosen.output, chosen.seed))
        times, lengths = recorded(chosen.output)
    (chosen.output / "speed.json").write_text(json.dumps(speed(times, lengths, chosen.examples)))


def settings(chosen: argparse.Namespace, method: str, run: Path, seed: int) -> RunConfig:
    """Return the configuration of a run of ours, of which TRL is told."""
    return load_config([CONFIGS[method]], overrides(chosen, method, run, seed))


def overrides(chosen: argparse.Namespace, method: str, run: Path, seed: int) -> list[str]:
    """Return what is said on top of a demo's config."""
    steps = chosen.steps or load_config([CONFIGS[method]]).train.steps
    given = [f"run_dir={run}", f"model.weights={chosen.start}", f"seed={seed}", *AS_TRL[method]]
    return [*given, f"train.steps={steps}", f"checkpoint.every={steps}", f"eval.every={steps}", "log.every=1"]


def speed(times: Sequence[float], lengths: Sequence[float], rows: int) -> dict[str, float]:
    """Return the rates after the first updates, from when updates ended and how long their answers were."""
    seconds = times[-1] - times[WARMUP - 1]
    tokens = rows * sum(lengths[WARMUP:])
    return {"updates_per_s": (len(times) - WARMUP) / seconds, "tokens_per_s": tokens / seconds}


def recorded(run: Path) -> tuple[list[float], list[float]]:
    """Return when updates of a run ended, in seconds after the first, and mean tokens of their answers."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [record for record in records if record["kind"] == "train"]
    laps = [(new["tokens"] - old["tokens"]) / new["tokens_per_second"] for old, new in itertools.pairwise(train)]
    return [0.0, *itertools.accumulate(laps)], [record.get("answer_tokens", 0.0) for record in train]


def train_trl(config: RunConfig, output: Path, start: Path, size: int) -> tuple[list[float], list[float]]:
    """Train with TRL, `size` answers or pairs in an update; return what `recorded` does."""
    try:
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
        from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer
    except ImportError as error:
        raise missing_extra("trl", "compat", "the comparison with TRL") from error

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            times.append(time.perf_counter())

    tokenizer = AutoTokenizer.from_pretrained(start)
    tokenizer.eos_token = "<|im_end|>"  # ends a turn of ChatML
    rows = rows_of(config.data.train[0].path)
    require_same_ids(tokenizer, config, rows[:100])
    options = dict(
        model=AutoModelForCausalLM.from_pretrained(start, dtype="float32"),
        train_dataset=Dataset.from_list([row | {"prompt": as_text(row)} for row in rows]),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    arguments = shared(config, output, size)
    if config.stage == "grpo":
        trainer = GRPOTrainer(args=GRPOConfig(**arguments, **of_grpo(config)), reward_funcs=exact, **options)
    else:
        trainer = DPOTrainer(args=DPOConfig(**arguments, **of_dpo(config)), **options)
    trainer.train()
    trainer.save_model(output / "model")
    return times, [log.get("completions/mean_length", 0.0) for log in trainer.state.log_history if "loss" in log]


def as_text(row: dict[str, str]) -> str:
    """Return the prompt of a row as ChatML writes it."""
    return f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"


def require_same_ids(tokenizer: PreTrainedTokenizerBase, config: RunConfig, rows: Sequence[dict[str, str]]) -> None:
    """Raise AssertionError unless both sides read the same ids in each prompt."""
    own, form = load_tokenizer(config.tokenizer), CHAT_FORMATS[config.chat.format]
    for row in rows:
        messages = [{"role": "user", "content": row["prompt"]}]
        expected = form.encode(own, messages, add_generation_prompt=True).ids
        if (found := tokenizer(as_text(row))["input_ids"]) != expected:
            raise AssertionError(f"{row['prompt']!r}: found ids {found}, expected {expected}")


def exact(completions: list[str], reference: list[str], **_: Any) -> list[float]:
    """Return 1 for each right answer, as our reward of kind 'exact'."""
    return [float(answer.strip() == right) for answer, right in zip(completions, reference, strict=True)]


def examples(config: RunConfig) -> int:
    """Return answers, or pairs of them, in each update of a run; raises SystemExit where updates differ.

    How many pairs are packed into a row depends on their lengths, so they are counted in the batches themselves.
    """
    if config.stage != "dpo":
        return config.train.batch_size
    setup = make_setup(config)
    loader = make_loader(setup, open_sources(setup, Path(config.run_dir), note=print).training)
    batches = (loader.next_batch(config.train.batch_size) for _ in range(config.train.steps))
    sizes = {int(np.count_nonzero(batch["pair_weights"])) for batch in batches}
    if len(sizes) > 1:
        raise SystemExit(f"data.pairs_per_row: updates have {min(sizes)} to {max(sizes)} pairs; expected one number")
    return sizes.pop()


def shared(config: RunConfig, output: Path, size: int) -> dict[str, Any]:
    """Return what all trainers of transformers are given; `size` answers or pairs are in an update."""
    schedule, optimizer = config.schedule, config.optimizer
    return dict(
        output_dir=str(output),
        seed=config.seed,
        max_steps=config.train.steps,
        per_device_train_batch_size=size,
        learning_rate=optimizer.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup", "cosine": "cosine_with_min_lr"}[schedule.kind],
        lr_scheduler_kwargs={"min_lr_rate": schedule.floor} if schedule.kind == "cosine" else {},
        warmup_steps=schedule.warmup,
        adam_beta1=optimizer.b1,
        adam_beta2=optimizer.b2,
        adam_epsilon=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.clip_norm,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
    )


def of_grpo(config: RunConfig) -> dict[str, Any]:
    """Return what TRL's GRPO is given; its loss is then that of arXiv:2402.03300."""
    rollout, grpo = config.rollout, config.grpo
    sampling = dict(num_generations=rollout.samples, max_completion_length=rollout.max_new_tokens)
    loss = dict(loss_type="grpo", beta=grpo.kl_coef, epsilon=grpo.clip_low, use_bias_correction_kl=False)
    return sampling | loss | {"temperature": rollout.temperature}


def of_dpo(config: RunConfig) -> dict[str, Any]:
    """Return what TRL's DPO is given."""
    losses = {"sigmoid": 1.0, "sft": config.dpo.sft_weight}
    return dict(beta=config.dpo.beta, loss_type=list(losses), loss_weights=list(losses.values()))


if __name__ == "__main__":
    raise SystemExit(main())
