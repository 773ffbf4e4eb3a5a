"""Compare DPO and GRPO with TRL's, in turn on this machine: the same start, data, schedule and number of updates.

Both sides read the configs of scripts/align_demo.sh, after which this runs from the root of the repository (extra
'compat'):  python scripts/bench_alignment.py runs/bench_alignment --start runs/demo_sft
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

from align_report import measure

from jaxllm.config import RunConfig, load_config
from jaxllm.errors import missing_extra
from jaxllm.tokenizers import load_tokenizer
from jaxllm.tokenizers.chat import CHAT_FORMATS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIDES = ("jaxllm", "trl")
CONFIGS = {"grpo": "configs/grpo/demo_grpo.yaml", "dpo": "configs/dpo/demo_dpo.yaml"}
AS_TRL = {"grpo": ("grpo.std=sample", "grpo.eps=1e-4"), "dpo": ("data.packing=padded",)}
"""What is fixed in TRL and an option here."""
WARMUP = 5
"""First updates that are left out of the speed, because compilers and allocators work then."""


def main(arguments: list[str] | None = None) -> int:
    """Run both sides in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--start", type=Path, required=True, metavar="RUN", help="the fine-tuned run to begin with")
    parser.add_argument("--methods", nargs="+", choices=CONFIGS, default=list(CONFIGS), help="default: all")
    parser.add_argument("--steps", type=int, metavar="N", help="updates; default: those of each config")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of each side; default: 3")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.side is not None:
        run_side(chosen)
        return 0
    chosen.output.mkdir(parents=True)
    command("export", chosen.start, chosen.output / "start", "--as", "qwen2")
    prompts = heldout_prompts()
    start = measure(chosen.output / "start", prompts)
    for method in chosen.methods:
        runs = [compare(chosen, method, seed, prompts) for seed in range(chosen.rounds)]
        print(table(method, start, {side: [run[side] for run in runs] for side in SIDES}), flush=True)
    return 0


def compare(chosen: argparse.Namespace, method: str, seed: int, prompts: list[dict]) -> dict[str, dict[str, float]]:
    """Run each side once, the other one first in every second round; each in a process of its own."""
    results = {}
    for side in SIDES[:: 1 if seed % 2 == 0 else -1]:
        folder = chosen.output / f"{method}_{side}_{seed}"
        options = ["--start", chosen.start, "--methods", method, "--side", side, "--seed", seed]
        options += [] if chosen.steps is None else ["--steps", chosen.steps]
        begin = time.perf_counter()
        with open(folder.with_suffix(".log"), "wb") as log:
            child = subprocess.Popen(
                [sys.executable, __file__, str(folder), *map(str, options)], stdout=log, stderr=log
            )
            _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - begin
        if status:
            raise SystemExit(f"{folder}.log: {side} ended with exit code {os.waitstatus_to_exitcode(status)}")
        results[side] = json.loads((folder / "speed.json").read_text()) | {
            "seconds": seconds,
            "MB": usage.ru_maxrss / 1024,
        }
        score = measure(folder if side == "jaxllm" else folder / "model", prompts)
        results[side] |= {"greedy": score.greedy, "sampled": score.sampled, "loadavg": os.getloadavg()[0]}
        with open(chosen.output / "results.jsonl", "a") as file:
            file.write(json.dumps({"method": method, "side": side, "seed": seed} | results[side]) + "\n")
    return results


def table(method: str, start: Any, results: dict[str, list[dict[str, float]]]) -> str:
    """Return medians over rounds with their range, and the ratio of the sides within a round."""
    ours, theirs = (results[side] for side in SIDES)
    ratios = [a["updates_per_s"] / b["updates_per_s"] for a, b in zip(ours, theirs, strict=True)]
    lines = [f"\n| {method} | jaxllm | TRL |", "|---|---|---|"]
    for name, text in (("updates_per_s", "updates/s"), ("tokens_per_s", "tokens of answers/s")):
        lines.append(f"| {text} | {spread(ours, name)} | {spread(theirs, name)} |")
    lines.append(f"| ratio of updates/s, in each round | {', '.join(f'{ratio:.2f}' for ratio in ratios)} | 1 |")
    lines.append(f"| whole command, s | {spread(ours, 'seconds')} | {spread(theirs, 'seconds')} |")
    lines.append(f"| peak memory, MB | {spread(ours, 'MB')} | {spread(theirs, 'MB')} |")
    for name, text in (("greedy", "right, most likely answer"), ("sampled", "right, mean of samples")):
        before = getattr(start, name)
        lines.append(f"| {text}: {before:.3f} before | {spread(ours, name)} | {spread(theirs, name)} |")
    return "\n".join(lines)


def spread(runs: list[dict[str, float]], name: str) -> str:
    """Return the median and range of a figure."""
    values = [run[name] for run in runs]
    least, middle, most = (f"{value:.3g}" for value in (min(values), statistics.median(values), max(values)))
    return middle if least == most else f"{middle} ({least} to {most})"


def heldout_prompts() -> list[dict]:
    """Return the prompts whose answers are counted, those of the config of GRPO."""
    return rows_of(load_config([CONFIGS["grpo"]]).data.heldout[0].path)


def rows_of(path: str) -> list[dict]:
    """Return the rows of a jsonl file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def command(*arguments: object) -> None:
    """Run one of our commands."""
    subprocess.run([sys.executable, "-m", "jaxllm.cli", *map(str, arguments)], check=True)


def run_side(chosen: argparse.Namespace) -> None:
    """Run one side, and write DIR/speed.json."""
    (method,) = chosen.methods
    steps = chosen.steps or load_config([CONFIGS[method]]).train.steps
    overrides = [f"run_dir={chosen.output}", f"model.weights={chosen.start}", f"seed={chosen.seed}", *AS_TRL[method]]
    overrides += [f"train.steps={steps}", f"checkpoint.every={steps}", f"eval.every={steps}", "log.every=1"]
    if chosen.side == "jaxllm":
        command("train", "--config", CONFIGS[method], *overrides)
        records = [json.loads(line) for line in (chosen.output / "metrics.jsonl").read_text().splitlines()]
        train = [record for record in records if record["kind"] == "train"]
        before = [0, *(record["tokens"] for record in train)]
        seconds = [(r["tokens"] - n) / r["tokens_per_second"] for r, n in zip(train[1:], before[1:], strict=False)]
        lengths = [record.get("answer_tokens", 0.0) for record in train[1:]]
    else:
        seconds, lengths = train_trl(load_config([CONFIGS[method]], overrides), chosen.output, chosen.seed)
    rows = load_config([CONFIGS[method]]).train.batch_size
    measured = slice(WARMUP - 1, None)  # the first time is that of the second update
    elapsed = sum(seconds[measured])
    speed = {"updates_per_s": len(seconds[measured]) / elapsed, "tokens_per_s": rows * sum(lengths[measured]) / elapsed}
    (chosen.output / "speed.json").write_text(json.dumps(speed))


def train_trl(config: RunConfig, output: Path, seed: int) -> tuple[list[float], list[float]]:
    """Train with TRL; return seconds and mean tokens of an answer for each update but the first."""
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

    start = output.parent / "start"
    tokenizer = AutoTokenizer.from_pretrained(start)
    tokenizer.eos_token = "<|im_end|>"  # ends a turn of ChatML
    rows = [as_text(row) for row in rows_of(config.data.train[0].path)]
    require_same_ids(tokenizer, config, rows_of(config.data.train[0].path)[:100])
    options = dict(
        model=AutoModelForCausalLM.from_pretrained(start, dtype="float32"),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    if config.stage == "grpo":
        trainer = GRPOTrainer(
            args=GRPOConfig(**shared(config, output, seed), **of_grpo(config)), reward_funcs=exact, **options
        )
    else:
        trainer = DPOTrainer(args=DPOConfig(**shared(config, output, seed), **of_dpo(config)), **options)
    trainer.train()
    trainer.save_model(output / "model")
    lengths = [log.get("completions/mean_length", 0.0) for log in trainer.state.log_history if "loss" in log]
    return [end - begin for begin, end in itertools.pairwise(times)], lengths[1:]


def as_text(row: dict[str, str]) -> dict[str, str]:
    """Return a row with its prompt as ChatML writes it."""
    return row | {"prompt": f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"}


def require_same_ids(tokenizer: PreTrainedTokenizerBase, config: RunConfig, rows: Sequence[dict[str, str]]) -> None:
    """Raise AssertionError unless both sides read the same ids in a prompt."""
    own, form = load_tokenizer(config.tokenizer), CHAT_FORMATS[config.chat.format]
    for row in rows:
        messages = [{"role": "user", "content": row["prompt"]}]
        expected = form.encode(own, messages, add_generation_prompt=True).ids
        if (found := tokenizer(as_text(row)["prompt"])["input_ids"]) != expected:
            raise AssertionError(f"{row['prompt']!r}: found ids {found}, expected {expected}")


def exact(completions: list[str], reference: list[str], **_: Any) -> list[float]:
    """Return 1 for each right answer."""
    return [float(answer.strip() == right) for answer, right in zip(completions, reference, strict=True)]


def shared(config: RunConfig, output: Path, seed: int) -> dict[str, Any]:
    """Return transformers' names for what all stages have."""
    schedule, optimizer = config.schedule, config.optimizer
    shape = {"constant": "constant_with_warmup", "cosine": "cosine_with_min_lr"}[schedule.kind]
    return dict(
        output_dir=str(output),
        seed=seed,
        max_steps=config.train.steps,
        per_device_train_batch_size=config.train.batch_size,
        learning_rate=optimizer.learning_rate,
        lr_scheduler_type=shape,
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
    """Return TRL's names for the options of GRPO; the loss is that of arXiv:2402.03300."""
    rollout, grpo = config.rollout, config.grpo
    return dict(
        num_generations=rollout.samples,
        max_completion_length=rollout.max_new_tokens,
        temperature=rollout.temperature,
        beta=grpo.kl_coef,
        epsilon=grpo.clip_low,
        loss_type="grpo",
        use_bias_correction_kl=False,
    )


def of_dpo(config: RunConfig) -> dict[str, Any]:
    """Return TRL's names for the options of DPO."""
    return dict(
        beta=config.dpo.beta,
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, config.dpo.sft_weight],
        max_length=config.data.seq_len,
    )


if __name__ == "__main__":
    raise SystemExit(main())
