#!/usr/bin/env bash
# A 24 x 128 encoder (ModernBERT, which has no table of positions to learn), pre-trained by masked language modelling, then
# fine-tuned on SST-2 and CoLA against the same encoder from scratch, with paired seeds. What is finished is not run again,
# and what was interrupted goes on.
#
#     bash scripts/studies/pretraining/run.sh CORPUS VALIDATION DATA OUT [SEED ...]
#
# CORPUS, VALIDATION: files of text for `resformer pretrain`. DATA: a folder that holds sst2/ and cola/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
corpus=$1 validation=$2 data=$3 out=$4
shift 4
[ $# -gt 0 ] || set -- 0 1 2
resformer=${RESFORMER:-.venv/bin/resformer}
[ -e "$out/tokenizer" ] || $resformer tokenizer --corpus "$corpus" --output "$out/tokenizer" --vocab-size 8192
model=(--family modernbert --depth 24 --width 128 --scheme pre_ln --weight-init width_scaled --tokenizer "$out/tokenizer")
[ -e "$out/pretrained/result.json" ] ||
  $resformer pretrain --corpus "$corpus" --validation "$validation" "${model[@]}" --steps 6000 --batch-size 16 \
    --learning-rate 1e-3 --schedule cosine --warmup 0.05 --precision bf16 --save-every 100 --evaluate-every 1000 \
    --output "$out/pretrained"
for seed in "$@"; do
  for task in sst2 cola; do
    common=(--task "$task" --data "$data/$task" --limit 5000 --epochs 3 --precision bf16 --seed "$seed" --no-save-model)
    [ -e "$out/runs/$task-pretrained-$seed/result.json" ] ||
      $resformer finetune --model "$out/pretrained/model" --learning-rate 3e-4 "${common[@]}" --output "$out/runs/$task-pretrained-$seed"
    [ -e "$out/runs/$task-scratch-$seed/result.json" ] ||
      $resformer finetune "${model[@]}" --learning-rate 3e-4 "${common[@]}" --output "$out/runs/$task-scratch-$seed"
  done
done
