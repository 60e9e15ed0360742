#!/usr/bin/env bash
# Flickr8k with towers that Python packages carry: no hub needed.
#
#     runs/flickr8k.sh DATA OUT
#
# DATA holds Images/, captions.txt and splits/train.txt, splits/dev.txt (default: ../shared/flickr8k). Trains on train,
# evaluates on dev (1,000 images x 5 captions) and writes OUT/evaluation.json and OUT/evaluation.html. Run it again
# after an interruption: what is finished is kept, what was going on is resumed.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
DATA=$(realpath "${1:-$ROOT/../shared/flickr8k}")
OUT=$(realpath -m "${2:-$ROOT/out/flickr8k}")
cd "$ROOT"
source runs/stages.sh

if [ ! -f "$OUT/towers/minilm/config.json" ]; then
    python runs/convert_towers.py "$OUT/towers"
fi

SPLITS=(--train-split "$DATA/splits/train.txt" --dev-split "$DATA/splits/dev.txt")

# 1. The heads, on features of both frozen towers that are computed once.
train heads "${SPLITS[@]}" --image-tower "$OUT/towers/vit-s14" --text-tower "$OUT/towers/minilm" \
    --image-pooling cls+mean --text-pooling mean --dropout 0.2 --feature-dropout 0.2 \
    --epochs 90 --batch-size 1000 --evaluate-every 10

# 2. From there, the whole text tower and the last two blocks of the image tower.
train tuned "${SPLITS[@]}" --model "$OUT/heads" --tune-text all --tune-image 2 \
    --epochs 10 --batch-size 250 --views 3 --rate-heads 3e-4 --rate-image 5e-5 --rate-text 5e-5

clipmatch evaluate --model "$OUT/tuned" --captions "$DATA/captions.txt" --images "$DATA/Images" \
    --split "$DATA/splits/dev.txt" --json "$OUT/evaluation.json" --html "$OUT/evaluation.html"
