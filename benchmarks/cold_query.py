"""The wait for a first answer: `clipmatch find` as a whole process, from Enter to the end.

    python benchmarks/cold_query.py --data DIR [--rows 100000] [--rounds 7] [--rclip PATH] [--python PATH]

DIR holds photographs. The index has this many: embeddings of real photographs, and rows that are clustered like them.
Whole processes in turns:

    floor                  Python imports numpy, onnxruntime and tokenizers, opens the text graph, embeds the sentence
    clipmatch find         the sentence, asked of the index
    rclip -n               the sentence, asked of as many vectors of its own
    sentence-transformers  import and a model with random weights (MiniLM-L6's shape): no sentence, no search
    transformers           import and a model with random weights (CLIP ViT-B/32's shape): the same

--python names a Python that has the last two; otherwise it is the one that runs this script.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import CLIPMATCH, in_turns, machine, machine_line, ratio, run, table, write_json
from peers import fill_rclip, find_rclip, has_package, rclip_home
from warm_query import grow

from clipmatch.crawl import list_images
from clipmatch.embedder import embedded_folder, load_model
from clipmatch.index import Index, name_of
from clipmatch.photo import Metadata, Photo, Stamp
from clipmatch.store import Root

SENTENCE = "two dogs racing through snow"
PICTURES = 2000  # real photographs that the rows are made of
TRANSACTION = 5000  # rows

FLOOR = """
import sys
import numpy as np
import onnxruntime
from tokenizers import Tokenizer
folder, sentence = sys.argv[1:]
session = onnxruntime.InferenceSession(f"{folder}/text.onnx", providers=["CPUExecutionProvider"])
tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
tokenizer.no_padding()
ids = np.array([tokenizer.encode(sentence).ids], np.int64)
print(session.run(["embedding"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0].shape)
"""
SENTENCE_TRANSFORMERS = """
import sys
from pathlib import Path
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
from sentence_transformers import SentenceTransformer
from sentence_transformers import models
folder = sys.argv[1]
if not Path(folder).exists():
    shape = dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    BertModel(BertConfig(**shape)).save_pretrained(folder)
    tokenizer = Tokenizer.from_file(sys.argv[2])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(folder)
tower = models.Transformer(folder)
SentenceTransformer(modules=[tower, models.Pooling(384)], device="cpu")
"""
TRANSFORMERS = """
from transformers import CLIPConfig, CLIPModel
CLIPModel(CLIPConfig())
"""


def fill(path, rows, folder, model):
    """An index of unit rows [n, d] of photographs that are not there, written and derived as an update would."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{number // 1000:04d}" / f"IMG_{number:06d}.jpg" for number in range(len(rows))]
    with Index.open(path, model) as index:
        index.store.bind(name_of(model))
        index.store.add_root(Root(folder))
        for start in range(0, len(rows), TRANSACTION):
            photos = [
                Photo(
                    place,
                    f"{number:064x}",
                    Stamp(3_000_000 + number, 1_700_000_000_000_000_000 + number),
                    Metadata(4000, 3000, None, None, None, "Pixel 8", None),
                    int(rng.integers(1 << 63)),
                )
                for number, place in enumerate(paths[start : start + TRANSACTION], start)
            ]
            vectors = {photo.digest: row for photo, row in zip(photos, rows[start:], strict=False)}
            index.store.upsert(photos, model.fingerprint, vectors, {})
        index.derive()
    return paths


def processes(options, scratch):
    """What takes turns: name -> a call that runs one whole process."""
    model, home = load_model(), scratch / "rclip"
    real = model.embed_images(list_images(options.data)[: min(PICTURES, options.rows)], progress=False).rows
    rows = np.concatenate([real, grow(real, options.rows - len(real), np.random.default_rng(0))])
    paths = fill(scratch / "photos.sqlite", rows, scratch / "photographs", model)
    find = [CLIPMATCH, "find", SENTENCE, "--index", scratch / "photos.sqlite"]
    cases = {
        "floor": lambda: run([sys.executable, "-c", FLOOR, embedded_folder(), SENTENCE]),
        "clipmatch find": lambda: run(find),
    }
    if rclip := None if options.no_peers else find_rclip(options.rclip):
        (scratch / "photographs").mkdir()
        fill_rclip(rclip, rclip_home(home), paths)
        ask = [rclip, "-n", SENTENCE]
        cases["rclip -n"] = lambda: run(ask, {"RCLIP_DATADIR": str(home)}, scratch / "photographs")
    starts = {
        "sentence-transformers": [SENTENCE_TRANSFORMERS, scratch / "minilm", embedded_folder() / "tokenizer.json"],
        "transformers": [TRANSFORMERS],
    }
    for name, start in starts.items():
        if not options.no_peers and has_package(options.python, name.replace("-", "_")):
            cases[name] = lambda start=start: run([options.python, "-c", *start], {"HF_HUB_OFFLINE": "1"})
    return cases


def show(result):
    rows = []
    for name in ("floor", "clipmatch find", "rclip -n", "sentence-transformers", "transformers"):
        if name not in result["seconds"]:
            rows.append([name, "not installed", "", ""])
            continue
        to = result["ours_to"].get(name)
        seconds = statistics.median(result["seconds"][name])
        rows.append([name, f"{seconds:.3f}", f"{to:.2f}" if to else "", f"{result['peak_mb'][name]:.0f} MB"])
    print(machine_line(result["machine"]))
    print(f"{result['rows']} photographs, {result['rounds']} rounds")
    print(table(["process", "seconds", "clipmatch find / this", "peak memory"], rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rclip", type=Path, metavar="PATH", help="its executable; installed into the cache otherwise")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), metavar="PATH")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        cases = processes(options, Path(scratch))
        answers = {name: call() for name, call in cases.items()}  # files into the system's cache, code compiled
        if len(answers["clipmatch find"].stdout.splitlines()) < min(9, options.rows):
            raise RuntimeError(f"clipmatch find gave no answer: {answers['clipmatch find'].stdout}")
        found = in_turns(cases, options.rounds)
    seconds = {name: [process.seconds for process in runs] for name, runs in found.items()}
    ours = seconds["clipmatch find"]
    result = {
        "machine": machine("numpy", "onnxruntime", "tokenizers"),
        "rows": options.rows,
        "rounds": options.rounds,
        "seconds": seconds,
        "peak_mb": {name: max(process.peak_mb for process in runs) for name, runs in found.items()},
        "ours_to": {name: ratio(ours, values) for name, values in seconds.items() if values is not ours},
    }
    show(result)
    write_json(options.json, result)


if __name__ == "__main__":
    main()
