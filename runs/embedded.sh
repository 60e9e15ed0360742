#!/usr/bin/env bash
# A compact model for CPUs: EfficientNet-Lite2 and MiniLM, trained on Flickr8k and on what the classifier knows.
#
#     runs/embedded.sh DATA OUT
#
# DATA as for runs/flickr8k.sh; all pictures outside dev are trained on. Needs Debian's wordnet-base beside what `make setup`
# installs. Run it again after an interruption: what is finished is kept, what was going on is resumed.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
DATA=$(realpath "${1:-$ROOT/../shared/flickr8k}")
OUT=$(realpath -m "${2:-$ROOT/out/embedded}")
cd "$ROOT"
source runs/stages.sh
mkdir -p "$OUT"

if [ ! -f "$OUT/towers/lite2/config.json" ]; then
    python runs/convert_towers.py "$OUT/towers"
fi
if [ ! -f "$OUT/concepts.safetensors" ]; then
    pip install --quiet --no-deps timm==1.0.31
    python runs/concepts.py "$OUT/towers" "$DATA/Images" "$OUT/concepts.safetensors"
fi
grep -vxFf "$DATA/splits/dev.txt" <(ls "$DATA/Images") >"$OUT/train.txt"

DATA_OPTIONS=(--train-split "$OUT/train.txt" --dev-split "$DATA/splits/dev.txt" \
    --concepts "$OUT/concepts.safetensors")

# 1. The heads, on features of both frozen towers.
train heads "${DATA_OPTIONS[@]}" --image-tower "$OUT/towers/lite2" --text-tower "$OUT/towers/minilm" \
    --image-pooling mean+max --text-pooling mean --feature-dropout 0.2 \
    --epochs 20 --batch-size 500 --evaluate-every 10

# 2. From there, the whole text tower and the last five blocks of the image tower; the average of the weights is kept.
train tuned "${DATA_OPTIONS[@]}" --model "$OUT/heads" --tune-text all --tune-image 5 --views 4 --average 0.99 \
    --epochs 14 --batch-size 250 --rate-heads 1e-3 --rate-image 2e-4 --rate-text 1e-4 --weight-decay 0.05
