#!/usr/bin/env bash
# Sets up what the tests need and runs them. Usage: bash scripts/test.sh [--all] [pytest arguments]
# --all also runs the slow tests.
set -eu
cd "$(dirname "$0")/.."
selection=(-m "not slow")
if [ "${1:-}" = --all ]; then
  selection=()
  shift
fi

bash scripts/setup_venv.sh dev
# Compiling takes most of the time; compiled programs are kept outside the repository for the next run.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/jaxllm/compiled}"
exec "${JAXLLM_VENV:-.venv}/bin/python" -m pytest --numprocesses 2 "${selection[@]+"${selection[@]}"}" "$@"
