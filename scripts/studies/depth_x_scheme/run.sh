#!/usr/bin/env bash
# Depth x scheme on SST-2 and MNLI (10,000 rows of it) from scratch: study.toml. Added after the first look, on SST-2:
# another weight initialisation (init), schemes across depth on pre-LN layers too (placement), greater learning rates
# (rates). What is finished is not run again, so any piece may be stopped and begun again.
#
#     bash scripts/studies/depth_x_scheme/run.sh DATA OUT I/N     # piece I of N, 0 to N - 1, with one worker
#     taskset -c I bash ...                                       # where pieces share a machine: each its own core, since
#                                                                 # threads that wait for each other are ten times slower
#     bash scripts/studies/depth_x_scheme/run.sh DATA OUT         # the pieces merged; results and reports are put here
#
# DATA: a folder that holds sst2/ and mnli/.
set -euo pipefail
here=$(realpath --relative-to=. "$(dirname "${BASH_SOURCE[0]}")")
if [ $# -lt 2 ]; then
  echo "usage: bash $0 DATA OUT [I/N]; DATA holds sst2/ and mnli/; without I/N the trained pieces are merged" >&2
  exit 2
fi
data=$1 out=$2 piece=${3:-}
resformer=${RESFORMER:-$here/../../../.venv/bin/resformer}
for study in . init placement rates; do
  runs=$out/$study
  if [ -n "$piece" ]; then
    $resformer compare "$here/$study/study.toml" --data "$data" --shard "$piece" --workers 1 --output "$runs/${piece%/*}"
  else
    [ -e "$runs/0" ] || { echo "$runs has no pieces yet: first bash $0 $data $out 0/2, and so on" >&2; exit 2; }
    $resformer study merge "$runs/all" "$runs"/[0-9]*
    (cd "$runs/all" && tar -c study.json runs/*/result.json) | tar -x -C "$here/$study"
    $resformer report "$here/$study"
  fi
done
if [ -z "$piece" ]; then
  # What the nets were before training against how it ended, which `resformer advise` prints and ranks by.
  $resformer study calibrate "$here" --data "$data" --output "$here/../../../resformer/advice/calibration.json"
fi
