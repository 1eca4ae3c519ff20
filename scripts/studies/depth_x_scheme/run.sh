#!/usr/bin/env bash
# Depth x scheme on SST-2 and MNLI (10,000 rows of it) from scratch: study.toml, and init.toml for another weight
# initialisation at one depth. What is finished is not run again, so any piece may be stopped and begun again.
#
#     bash scripts/studies/depth_x_scheme/run.sh DATA OUT I/N     # piece I of N, into OUT/piece-I, with one worker
#     taskset -c I bash ...                                       # where pieces share a machine: each its own core, since
#                                                                 # threads that wait for each other are ten times slower
#     bash scripts/studies/depth_x_scheme/run.sh DATA OUT         # the pieces merged into OUT/study, and the report
#
# DATA: a folder that holds sst2/ and mnli/.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
data=$1 out=$2 piece=${3:-}
resformer=${RESFORMER:-$here/../../../.venv/bin/resformer}
if [ -z "$piece" ]; then
  $resformer study merge "$out/study" "$out"/piece-*
  $resformer report "$out/study" --out "$here"
  # What the nets were before training against how it ended, which `resformer advise` prints and ranks by.
  exec $resformer study calibrate "$out/study" --data "$data" --output "$here/../../../resformer/advice/calibration.json"
fi
for study in study init; do
  $resformer compare "$here/$study.toml" --data "$data" --shard "$piece" --workers 1 --output "$out/piece-${piece%/*}"
done
