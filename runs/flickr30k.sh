#!/usr/bin/env bash
# Flickr30k from Kaggle with ViT-B/16 and DistilBERT from the hub, for one GPU.
#
#     runs/flickr30k.sh DATA OUT
#
# DATA is the unpacked Kaggle data set hsankesara/flickr-image-dataset (results.csv and flickr30k_images/). A tenth of
# the images, chosen by a hash of their names, is dev.
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${1:?the folder of the unpacked data set}
OUT=${2:-out/flickr30k}
make --silent setup
export PATH="$PWD/.venv/bin:$PATH"

clipmatch train --captions "$DATA" --out "$OUT/heads" --epochs 30 --batch-size 2000 --views 2 --text-pooling mean
clipmatch train --captions "$DATA" --out "$OUT/tuned" --model "$OUT/heads" --tune-text all --tune-image 4 \
    --epochs 8 --batch-size 256 --rate-heads 3e-4
