#!/usr/bin/env bash
# Alignment from end to end on two CPU cores: a small model learns to sort numbers by SFT, then better by DPO, and by
# GRPO with a computed reward (three seeds); a reward model learns to tell right answers from wrong ones.
# Usage: bash scripts/align_demo.sh        Started again, it continues where it was stopped.
# JAXLLM_VENV and JAXLLM_PYTHON choose another environment or Python, see setup_venv.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup_venv.sh
bin="${JAXLLM_VENV:-.venv}/bin"
task=runs/demo-task
tokenizer=runs/demo-tokenizer

train() { # CONFIG OVERRIDES: a stage, or what is left of it
  printf '\n== %s\n' "$*"
  "$bin/jaxllm" train --config "$@"
}

printf '\n== The task and a tokenizer for it\n'
[ -f "$task/heldout_prompts.jsonl" ] || "$bin/python" scripts/align_task.py "$task"
[ -f "$tokenizer/tokenizer_config.json" ] ||
  "$bin/jaxllm" tokenizer train --input "$task/prompts.jsonl" --text-key prompt --vocab-size 290 --output "$tokenizer"
"$bin/jaxllm" data check --config configs/sft/demo_sft.yaml

train configs/sft/demo_sft.yaml
# One update at rate zero: the reward model as it starts.
train configs/reward/demo_rm.yaml run_dir=runs/demo_rm_start train.steps=1 schedule.total=2 schedule.warmup=1
train configs/reward/demo_rm.yaml
train configs/dpo/demo_dpo.yaml
for seed in 0 1 2; do
  train configs/grpo/demo_grpo.yaml "run_dir=runs/demo_grpo_$seed" "seed=$seed"
done

"$bin/python" scripts/align_report.py --prompts "$task/heldout_prompts.jsonl" --sft runs/demo_sft --dpo runs/demo_dpo \
  --reward runs/demo_rm --reward-start runs/demo_rm_start --grpo runs/demo_grpo_{0,1,2}
