#!/usr/bin/env bash
# Smoke test with the newest jax on the newer Pythons that this machine has: an import and one golden.
# Usage: bash scripts/test_matrix.sh
set -eu
cd "$(dirname "$0")/.."
report=()
failed=0

find_python() { # VERSION
  local candidate
  for candidate in "python$1" "$HOME/.pyenv/versions/$1".*/bin/python; do
    if "$candidate" --version >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
}

smoke_test() { # PYTHON
  bash scripts/setup_venv.sh dev \
    && "$JAXLLM_VENV/bin/python" -c 'import jaxllm; print("families:", *jaxllm.families())' \
    && "$JAXLLM_VENV/bin/python" -m pytest tests/test_families.py -k llama2-gqa
}

versions() {
  "$JAXLLM_VENV/bin/python" -c 'import jax, flax; print("jax", jax.__version__, "flax", flax.__version__)'
}

for version in 3.12 3.13; do
  python="$(find_python "$version")"
  if [ -z "$python" ]; then
    report+=("skipped: Python $version: no python$version on the PATH and none in ~/.pyenv/versions")
    continue
  fi
  export JAXLLM_PYTHON="$python" JAXLLM_VENV=".venv-py${version/./}"
  result=passed
  smoke_test || { result=FAILED; failed=1; }
  report+=("$result: Python $version, $(versions || echo not installed)")
done

printf '%s\n' "${report[@]}"
exit "$failed"
