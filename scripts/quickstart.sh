#!/usr/bin/env bash
# From nothing to a report: set up, train a real comparison of residual schemes over depth, say where the report is.
# Arguments go on to `resformer compare`; the folder is out/quickstart, or the value of OUTPUT.
set -euo pipefail
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$top/scripts/setup.sh"

output=${OUTPUT:-out/quickstart}
[ -n "${OUTPUT:-}" ] || cd "$top"
schemes=(plain post_ln pre_ln deepnorm rezero exclusive_gate:bias=0)
# A narrow BERT, Xavier initialisation, learning rate 1e-3 held and then lowered, no warm-up: what fails here
# fails under these conditions. See the report's own words.
settings=(--width 32 --heads 2 --ffn-ratio 2 --steps 400 --warmup 0 --schedule hold --learning-rates 1e-3 --no-controls
  --tasks sentiment)
compare() { "$top/.venv/bin/resformer" compare --schemes "${schemes[@]}" "${settings[@]}" --output "$output" "$@"; }
compare --depths 32 --seeds 1 "$@"
compare --depths 2 8 16 --seeds 2 "$@"
