#!/usr/bin/env bash
# Sets up a virtual environment with jaxllm and pinned dependencies; does nothing when it is up to date.
# Usage: bash scripts/setup_venv.sh [EXTRAS]        for example: bash scripts/setup_venv.sh dev,plot
# JAXLLM_VENV   where the environment lies, relative to the repository (default: .venv)
# JAXLLM_PYTHON the Python to make it with (default: the first of python3.11 ... python3.13, python3 that fits)
set -eu
cd "$(dirname "$0")/.."
extras="${1:-}"
venv="${JAXLLM_VENV:-.venv}"

fail() {
  echo "setup: $*" >&2
  exit 2
}

fits() { # PYTHON: runs and is a version we support
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1
}

find_python() {
  local found="" candidate candidates=(python3.11 python3.12 python3.13 python3)
  if [ -n "${JAXLLM_PYTHON:-}" ]; then
    candidates=("$JAXLLM_PYTHON")
  fi
  for candidate in "${candidates[@]}"; do
    fits "$candidate" || continue
    found="$candidate"
    if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  if [ -n "$found" ]; then
    local package
    package="$("$found" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
    fail "$found cannot make virtual environments: its modules venv and ensurepip are missing." \
      "On Debian and Ubuntu: sudo apt install $package"
  fi
  found="$("${JAXLLM_PYTHON:-python3}" --version 2>/dev/null || echo none)"
  fail "jaxllm needs Python 3.11, 3.12 or 3.13; found $found." \
    "Install one (Debian and Ubuntu: sudo apt install python3.11 python3.11-venv; macOS: brew install python@3.12)" \
    "or point JAXLLM_PYTHON at one."
}

make_venv() {
  if [ -e "$venv" ] && [ ! -f "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
    fail "$venv exists and is no virtual environment; move it away or set JAXLLM_VENV to another folder."
  fi
  local python
  python="$(find_python)"
  echo "setup: making $venv with $("$python" --version)"
  "$python" -m venv --clear "$venv"
}

pip() {
  "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@" \
    || fail "pip failed (see above). Check the network connection and run this again; it picks up where it stopped."
}

# A half-made environment has no working pip and is made again.
if ! fits "$venv/bin/python" || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  make_venv
fi

constraints="constraints/$("$venv/bin/python" -c 'import sys; print("py%d%d" % sys.version_info[:2])').txt"
stamp="$venv/jaxllm-setup-${extras:-none}"
# The editable install points at this folder, so the folder is part of what was installed.
wanted="$("$venv/bin/python" -c '
import hashlib, os, sys
files = b"".join(open(path, "rb").read() for path in sys.argv[1:])
print(hashlib.sha256(os.getcwd().encode() + files).hexdigest())' pyproject.toml "$constraints")"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
  exit 0
fi

echo "setup: installing jaxllm${extras:+[$extras]} with $constraints into $venv (a minute or two the first time)"
pip install -c "$constraints" setuptools
pip install -c "$constraints" --no-build-isolation --editable ".${extras:+[$extras]}"
echo "$wanted" > "$stamp"
