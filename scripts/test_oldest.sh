#!/usr/bin/env bash
# The tests with the oldest transformers that pyproject.toml allows, in an environment of its own, .venv-oldest.
# Arguments go on to pytest. TORCH_INDEX_URL and PYTHON as in setup.sh; what is no dependency of transformers stays as
# constraints.txt has it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
oldest=$(sed -n 's/^ *"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
venv=.venv-oldest
stamp=$({ cat pyproject.toml scripts/constraints.txt scripts/test_oldest.sh; "$python" --version; pwd; } | cksum)
if [ "$(cat "$venv/stamp" 2>/dev/null)" != "$stamp" ]; then
  echo "Setting up $venv (once; as large as .venv) for transformers $oldest"
  "$python" -m venv --clear "$venv"
  { grep -vE '^(transformers|huggingface_hub)==' scripts/constraints.txt; echo "transformers==$oldest.*"; } > "$venv/constraints.txt"
  pip=("$venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check --constraint "$venv/constraints.txt")
  "${pip[@]}" ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch
  "${pip[@]}" --editable ".[ode,peft]" pytest pytest-xdist
  echo "$stamp" > "$venv/stamp"
fi
exec "$venv/bin/python" -m pytest "$@"
