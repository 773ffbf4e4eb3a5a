#!/usr/bin/env bash
# The whole job on a small real corpus: install, tokenizer, training, held-out loss, n-gram baselines, sampled text.
# Usage: bash scripts/quickstart.sh [OVERRIDES]        for example: bash scripts/quickstart.sh train.steps=200
# OVERRIDES change the config, as for `jaxllm train`. Started again, it continues where it was stopped.
# JAXLLM_VENV and JAXLLM_PYTHON choose another environment or Python, see setup_venv.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup_venv.sh
bin="${JAXLLM_VENV:-.venv}/bin"
config=configs/pretrain/quickstart.yaml

option() { # NAME: the value of an option at the top level of the resolved config
  sed -n "s/^$1: //p" <<<"$resolved"
}

resolved="$("$bin/jaxllm" train --config "$config" --print-config "$@")"
run="$(option run_dir)"
tokenizer="$(option tokenizer)"

printf '\n== 1. Tokenizer: byte-level BPE of 2,048 tokens\n'
if [ -f "$tokenizer/tokenizer_config.json" ]; then
  echo "$tokenizer is there already"
else
  "$bin/jaxllm" tokenizer train --input scripts/quickstart_corpus/train.*.jsonl.gz --vocab-size 2048 --output "$tokenizer"
fi

printf '\n== 2. Training: %s\n' "$config"
code=0
"$bin/jaxllm" train --config "$config" "$@" || code=$?
if [ "$code" -eq 75 ]; then
  echo "quickstart: stopped, and the state is saved; start the same command again to continue" >&2
fi
[ "$code" -eq 0 ] || exit "$code"

printf '\n== 3. Samples: temperature 0.8, top-p 0.9\n'
"$bin/jaxllm" generate "$run" --max-new-tokens 48 --temperature 0.8 --top-p 0.9 --seed 0 --prompt "To install a package" \
  --prompt "The administrator can" --prompt "要安装软件包" --prompt "系统管理员可以"

printf '\n== 4. Held-out loss: the model and n-gram baselines (interpolated Kneser-Ney) on the same tokens\n'
"$bin/python" scripts/ngram_baselines.py --run "$run"

printf '\n== 5. What lies where (in %s)\n' "$PWD"
cat <<END
run folder         $run
checkpoint         $run/checkpoints/$(ls "$run/checkpoints" | sort -n | tail -n 1)
loss curve         $run/training_loss.svg
records            $run/metrics.jsonl (every step), $run/log.txt, $run/tb (TensorBoard)
resolved config    $run/config.yaml
tokenizer          $tokenizer
More text:         $bin/jaxllm generate $run --prompt "..." --temperature 0.8
END
