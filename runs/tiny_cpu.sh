#!/usr/bin/env bash
# Own photographs on a laptop: the heads alone, on cached features, from any caption file.
#
#     runs/tiny_cpu.sh CAPTIONS IMAGES OUT [more options of clipmatch train]
#
# The default towers come from the hub once; --image-tower and --text-tower name local folders instead.
set -euo pipefail
CAPTIONS=${1:?caption file}
IMAGES=${2:?folder of the pictures}
OUT=${3:?folder for the run}
shift 3
clipmatch train --captions "$CAPTIONS" --images "$IMAGES" --out "$OUT" --text-pooling mean \
    --epochs 50 --batch-size 1000 --views 2 --evaluate-every 5 --patience 4 "$@"
clipmatch evaluate --model "$OUT" --captions "$CAPTIONS" --images "$IMAGES" --split "$OUT/splits/dev.txt" --json "$OUT/evaluation.json"
