#!/usr/bin/env bash
# A compact model for CPUs: EfficientNet-Lite2 and MiniLM, trained on Flickr8k and on what the classifier knows.
#
#     runs/embedded.sh DATA OUT
#
# DATA as for runs/flickr8k.sh; all pictures outside dev are trained on. OUT/model, once runs/model_card.sh has measured
# it, is what lies in src/clipmatch/embedded.
# Needs Debian's wordnet-base beside what `make setup` installs. Run it again after an interruption: what is finished is
# kept, what was going on is resumed. More than two hours on two CPU cores.
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
    --epochs 20 --batch-size 250 --evaluate-every 5

# 2. From there, the whole text tower and the last five blocks of the image tower.
train tuned "${DATA_OPTIONS[@]}" --model "$OUT/heads" --tune-text all --tune-image 5 --views 4 \
    --epochs 14 --batch-size 250 --rate-heads 1e-3 --rate-image 2e-4 --rate-text 1e-4 --weight-decay 0.05

# 3. A second opinion: the vision transformer of runs/flickr8k.sh is weaker, but errs on other pictures.
if [ ! -f "$OUT/flickr8k/evaluation.json" ]; then
    runs/flickr8k.sh "$DATA" "$OUT/flickr8k"
fi

# 4. The compact model learns what both together make of every pair.
train taught "${DATA_OPTIONS[@]}" --model "$OUT/tuned" --tune-text all --tune-image 5 --views 4 \
    --teacher "$OUT/tuned" --teacher "$OUT/flickr8k/tuned" --teacher-weight 0.7 \
    --epochs 10 --batch-size 250 --rate-heads 8e-4 --rate-image 2e-4 --rate-text 1e-4 --weight-decay 0.05

# 5. Half way back: that knows more of what Flickr8k does not show.
if [ ! -f "$OUT/mean/config.json" ]; then
    python runs/average.py "$OUT/tuned" "$OUT/taught" "$OUT/mean"
fi

# 6. Bytes instead of floats; training pictures tell the scale of what flows between the convolutions.
if [ ! -f "$OUT/model/config.json" ]; then
    rm -rf "$OUT/pictures"
    mkdir "$OUT/pictures"
    sed "s|^|$DATA/Images/|" "$OUT/train.txt" | xargs ln -s -t "$OUT/pictures"
    clipmatch export "$OUT/mean" --out "$OUT/model" --int8 --pictures "$OUT/pictures"
fi
