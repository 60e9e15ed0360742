#!/usr/bin/env bash
# Flickr30k from Kaggle with ViT-B/16 and DistilBERT from the hub, for one GPU.
#
#     runs/flickr30k.sh DATA OUT
#
# DATA is the unpacked Kaggle data set hsankesara/flickr-image-dataset (results.csv and flickr30k_images/). A tenth of
# the images, chosen by a hash of their names, is dev. The second run caches some 9 GB of hidden states; set
# CLIPMATCH_CACHE to a disk that has room. Options after OUT go to the first run.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
DATA=$(realpath "${1:?the folder of the unpacked data set}")
OUT=$(realpath -m "${2:-$ROOT/out/flickr30k}")
shift $(($# < 2 ? $# : 2)) # what is left goes to the first run
make --silent -C "$ROOT" setup
export PATH="$ROOT/.venv/bin:$PATH"

clipmatch train --captions "$DATA" --out "$OUT/heads" --epochs 30 --batch-size 2000 --views 2 --text-pooling mean "$@"
clipmatch train --captions "$DATA" --out "$OUT/tuned" --model "$OUT/heads" --tune-text all --tune-image 4 \
    --epochs 8 --batch-size 256 --rate-heads 3e-4
clipmatch evaluate --model "$OUT/tuned" --captions "$DATA" --split "$OUT/tuned/splits/dev.txt" \
    --json "$OUT/evaluation.json" --html "$OUT/evaluation.html"
