"""The server, asked all that its own description allows, and much that it does not.

    python benchmarks/api_fuzz.py [--examples 300] [--json FILE] [--server URL]

Schemathesis makes requests of /openapi.json, right and wrong ones, and holds the answers against it: no server error,
no status, media type or form that is not described, nothing wrong that is taken for right. What makes a request of the
right form one that can be answered is put into it: numbers of photographs that there are, folders and concepts that
the index knows, a JPEG file, few steps of a painting. One value in eight stays as it was made. An endpoint that never
had an answer (a status from 200 to 299) fails the run, as does a painting that ends with an excuse.

By default a server is started over the sample photographs of scikit-image, with a guide and a VQGAN of random weights,
which paint noise by the same code (they take the extra `generate`; without it nothing is painted, and that is not held
against the server). --server asks another one, whose index will be changed: concepts come and go.
"""

import argparse
import contextlib
import io
import json
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin

import hypothesis
import requests
import schemathesis
from common import CLIPMATCH, machine, machine_line, table, write_json
from hypothesis import strategies
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from clipmatch.demo import sample_photographs

# Not among them: that all is answered which the description allows. An empty query has the right form.
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
PACE = 100  # requests a second, below what the server takes of one client
HEADERS = {"X-Clipmatch": "1"}
PAINT, SEARCH, BY_PICTURE = "POST /api/paint", "POST /api/search", "POST /api/search-image"
NAMES = ("taught", "@mieze", "Katze_1", "犬")  # for concepts


@contextlib.contextmanager
def own_server():
    """A server over the sample photographs -> its address."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, index = Path(scratch) / "Pictures", Path(scratch) / "photos.sqlite"
        folder.mkdir()
        for path in sample_photographs():
            shutil.copy(path, folder)
        subprocess.run([CLIPMATCH, "index", folder, "--index", index], check=True, stdout=sys.stderr)
        command = [CLIPMATCH, "serve", "--index", index, "--port", "0", *painter(Path(scratch))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                yield process.stdout.readline().split()[-1]
            finally:
                process.terminate()


def painter(scratch):
    """The options for a server that paints: models with random weights, made in a moment; none without the extra."""
    try:
        from diffusers import VQModel

        from clipmatch.checkpoint import Checkpoint, save_checkpoint
        from clipmatch.config import ModelConfig, PreprocessConfig
        from clipmatch.model import CLIPModel
        from clipmatch.modelfolder import EMBEDDED, TOKENIZER
        from clipmatch.preprocess import Transform
        from clipmatch.tokenizer import Tokenizer
    except ModuleNotFoundError as error:
        print(f"nothing is painted: {error.name} is not installed", file=sys.stderr)
        return []
    tokenizer = Tokenizer.from_file(EMBEDDED / TOKENIZER)
    vit = {"model_type": "vit", "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2}
    bert = {"model_type": "distilbert", "vocab_size": tokenizer.vocab_size, "max_position_embeddings": 64, "dim": 32}
    config = ModelConfig(
        image_tower={**vit, "num_attention_heads": 2, "intermediate_size": 64},
        text_tower={**bert, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
        embed_dim=16,
        max_length=40,
    )
    guide = Checkpoint(CLIPModel(config), tokenizer, Transform(PreprocessConfig(size=32)))
    save_checkpoint(guide, scratch / "guide")
    ends = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    sizes = {"block_out_channels": [8, 16], "latent_channels": 4, "num_vq_embeddings": 32, "sample_size": 16}
    VQModel(**ends, **sizes, norm_num_groups=4).save_pretrained(scratch / "vqgan")
    return ["--guide", scratch / "guide", "--generator", scratch / "vqgan"]


# What there is, and requests about it -------------------------------------------------------------------------------


def some(value, *choices):
    """One of some choices in the place of a generated value, always the same for the same; one in eight stays."""
    drawn = zlib.crc32(repr(value).encode("utf-8", "replace"))
    return value if drawn % 8 == 7 else choices[drawn // 8 % len(choices)]


@dataclass(frozen=True)
class Known:
    """What there is on a server. numbers: of its photographs, in two halves, so that none is both ticked and crossed.

    folders: by name. paints: whether it does. photograph: a JPEG file.
    """

    address: str
    numbers: tuple[list[int], list[int]]
    folders: list[str]
    paints: bool
    photograph: bytes

    @classmethod
    def of(cls, address):
        """Ask a server."""
        status = requests.get(urljoin(address, "api/status"), timeout=60).json()
        listed = requests.post(urljoin(address, "api/browse"), json={"size": 12}, headers=HEADERS, timeout=60).json()
        numbers = sorted(row["id"] for row in listed["matches"])
        file = io.BytesIO()
        with Image.open(sample_photographs()[0]) as image:
            image.convert("RGB").resize((96, 64)).save(file, "jpeg")
        return cls(address, (numbers[::2], numbers[1::2]), status["folders"], status["paints"], file.getvalue())

    def concept(self):
        """The name of a concept; one is taught if there is none."""
        place = urljoin(self.address, "api/concepts")
        names = [row["name"] for row in requests.get(place, timeout=60).json()]
        if not names:
            lesson = {"name": NAMES[0], "liked": self.numbers[0][:2]}
            names = [requests.post(place, json=lesson, headers=HEADERS, timeout=60).json()["name"]]
        return names[0]

    def value(self, name, value):
        """What a field of a question becomes, by its name."""
        if name in ("number", "id", "like") and value is not None:
            return some(value, *self.numbers[0], *self.numbers[1])
        if name in ("liked", "disliked"):
            return [some(number, *self.numbers[name == "disliked"]) for number in value[:3]]
        if name == "where":
            folder = {"folder": some(value["folder"], *self.folders)} if value.get("folder") else {}
            return value | folder
        if name == "name":
            return some(value, *NAMES)
        return value

    def about(self, label, case, question):
        """A request of the right form -> the same about what there is. question: one for a search, likewise."""
        path = {name: self.value(name, value) for name, value in case.path_parameters.items()}
        if "name" in path:
            path["name"] = some(case.path_parameters["name"], self.concept())
        body = case.body
        if isinstance(body, dict):
            body = {name: self.value(name, value) for name, value in body.items()}
        if label == SEARCH and not body.get("query", "").strip() and some(body, True) is True:
            body["query"] = "a cat"
        if label == PAINT:  # none that takes hours
            body |= {"steps": 1 + int(body.get("steps") or 1) % 2, "n": 1 + int(body.get("n", 1)) % 2}
        if label == BY_PICTURE:
            asked = {name: self.value(name, value) for name, value in question.items()}
            body = {
                "image": some(body["image"], self.photograph),
                "question": some(body["question"], json.dumps(asked)),
            }
        return case.operation.Case(path_parameters=path, query=case.query, body=body, media_type=case.media_type)


def requests_of(operation):
    """Right requests and wrong ones -> each with whether it is right."""
    right, wrong = (operation.as_strategy(generation_mode=mode) for mode in GenerationMode)
    return right.map(lambda case: (case, True)) | wrong.map(lambda case: (case, False))


def ask(operation, questions, known, examples):
    """Ask one endpoint -> how often it gave which status, and what was wrong, if anything was."""
    codes, began = Counter(), time.monotonic()

    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(made=requests_of(operation), data=strategies.data())
    def run(made, data):
        case, right = made
        if right:
            question = data.draw(questions).body if operation.label == BY_PICTURE else None
            case = known.about(operation.label, case, question)
        time.sleep(max(0.0, began + sum(codes.values()) / PACE - time.monotonic()))
        response = case.call(headers=HEADERS)
        codes[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)
        if operation.label == PAINT and response.status_code == 200:
            last = json.loads(response.text.splitlines()[-1])
            assert "nearest" in last, f"a painting that ends with {last}"

    try:
        run()
    except Exception as error:  # of whatever kind: the run goes on with the next
        return codes, f"{type(error).__name__}: {error}"
    return codes, None


def answered(codes):
    """How often a request was answered."""
    return sum(count for code, count in codes.items() if 200 <= code < 300)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=300, help="for each endpoint")
    parser.add_argument("--server", metavar="URL", help="a server that runs already")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found, wrong = {}, {}
    with contextlib.nullcontext(options.server) if options.server else own_server() as address:
        known = Known.of(address)
        schema = schemathesis.openapi.from_url(urljoin(address, "openapi.json"))
        questions = schema["/api/search"]["POST"].as_strategy(generation_mode=GenerationMode.POSITIVE)
        for result in schema.get_all_operations():
            operation = result.ok()
            label = operation.label
            found[label], problem = ask(operation, questions, known, options.examples)
            if problem is None and not answered(found[label]) and (label != PAINT or known.paints):
                problem = "No request was answered."
            if problem:
                wrong[label] = problem
            print(f"  {label}: {sum(found[label].values())} requests", file=sys.stderr)
    total = Counter()
    for codes in found.values():
        total.update(codes)
    values = {"machine": machine("fastapi", "uvicorn", "schemathesis"), "examples": options.examples}
    values |= {"requests": sum(total.values()), "answered": answered(total), "paints": known.paints}
    values |= {"statuses": dict(sorted(total.items()))}
    values["endpoints"] = {label: {"answered": answered(c), **dict(sorted(c.items()))} for label, c in found.items()}
    print(machine_line(values["machine"]))
    codes = sorted(total)
    rows = [[label, answered(seen), *(seen.get(code, "") for code in codes)] for label, seen in found.items()]
    rows.append(["all", answered(total), *(total[code] for code in codes)])
    print(table(["endpoint", "answered", *map(str, codes)], rows))
    write_json(options.json, values | {"wrong": wrong})
    for label, problem in wrong.items():
        print(f"\n{label}\n{problem}", file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
