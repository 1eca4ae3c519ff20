#!/usr/bin/env bash
# The picture of the README: a deep post-LN net before training, whose tokens become one vector.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
${RESFORMER:-.venv/bin/resformer} diagnose --depth 24 --width 64 --scheme post_ln --weight-init xavier \
  --measure gradient_flow signal_propagation --output scripts/studies/diagnosis
rm scripts/studies/diagnosis/*.json
