#!/usr/bin/env bash
# Sets up what the tests need and runs them. Usage: bash scripts/test.sh [--all] [pytest arguments]
# --all also runs the slow tests.
set -eu
cd "$(dirname "$0")/.."
bash scripts/setup_venv.sh dev
exec "${JAXLLM_VENV:-.venv}/bin/python" -m pytest --numprocesses 2 "$@"
