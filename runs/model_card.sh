#!/usr/bin/env bash
# Measure the model that runs/embedded.sh has made, as shipped; find out how sure its matches are; write its card.
#
#     runs/model_card.sh DATA OUT
#
# The same DATA and OUT. Fetches the packages that carry the everyday photographs (benchmarks/everyday.json).
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
DATA=$(realpath "${1:-$ROOT/../shared/flickr8k}")
OUT=$(realpath "${2:-$ROOT/out/embedded}")
cd "$ROOT"
source runs/stages.sh

PICTURES=(--captions "$DATA/captions.txt" --images "$DATA/Images")
clipmatch evaluate --model "$OUT/mean" "${PICTURES[@]}" --split "$DATA/splits/dev.txt" --json "$OUT/evaluation_float.json"
clipmatch evaluate --model "$OUT/model" "${PICTURES[@]}" --split "$DATA/splits/dev.txt" --json "$OUT/evaluation.json"
for split in dev test; do
    python benchmarks/everyday.py --model "$OUT/model" --split $split --json "$OUT/everyday_$split.json"
done
python benchmarks/confidence.py --model "$OUT/model" "${PICTURES[@]}" --dev-split "$DATA/splits/dev.txt" \
    --train-split "$OUT/train.txt" --json "$OUT/confidence.json" --save "$OUT/model"
python runs/model_card.py "$OUT"
