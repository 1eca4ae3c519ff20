#!/usr/bin/env bash
# A real pretrained encoder, unpatched and with three schemes that keep what it computes, fine-tuned on SST-2 (the first
# 5,000 rows, one epoch) and RTE (three epochs), with paired seeds. What is finished is not run again.
#
#     bash scripts/studies/pretrained_encoder/run.sh MODEL DATA OUT [SEED ...]
#
# MODEL: a folder or hub id, such as sentence-transformers/all-MiniLM-L6-v2. DATA: a folder that holds sst2/ and rte/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
model=$1 data=$2 out=$3
shift 3
resformer=${RESFORMER:-.venv/bin/resformer}
[ $# -gt 0 ] || set -- 0 1 2
for seed in "$@"; do
  for scheme in none highway layer_scale hyper_connections; do
    patch=(--scheme "$scheme")
    [ "$scheme" != none ] || patch=()
    common=(--model "$model" --precision bf16 --batch-size 32 --learning-rate 5e-5 --seed "$seed" --no-save-model "${patch[@]}")
    sst2="$out/sst2-$scheme-$seed" rte="$out/rte-$scheme-$seed"
    [ -e "$sst2/result.json" ] ||
      $resformer finetune --task sst2 --data "$data/sst2" --limit 5000 --epochs 1 --output "$sst2" "${common[@]}"
    [ -e "$rte/result.json" ] ||
      $resformer finetune --task rte --data "$data/rte" --epochs 3 --output "$rte" "${common[@]}"
  done
done
