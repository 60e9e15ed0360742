"""An index -> a folder that is searched in a browser, with no server and no network.

In: an index, which photographs of it, a folder. Out: the folder: the page, small pictures, vectors, and the model's
text side with what runs it. Knows nothing of how the page looks.

    index.html, style.css, page.js    the page, its modules made one script by `bundle`
    thumbs/12.jpg, full/12.jpg        the pictures, by their place in the lists
    data/photos.js, search.js         what is known of them; vectors, and what confidences need
    data/model.js, tokenizer.js       the text graph and the tokenizer, as they are
    data/runtime.js, wasm.js          ONNX Runtime and a tokenizer library, from npm
    licences/, README.txt             for people; and a file that tells that clipmatch has made the folder

A page that was opened as a file may not read other files, but it may run scripts that lie beside it. So all data are
scripts: each calls `gallery(name, value)`, with bytes as base64 text. That makes them a third larger; in return a
double click on index.html is all it takes, and the page may be forbidden every connection.

Pictures are drawn anew, so that nothing of their files' own data (place, camera, comments) is in them. Of paths only
what is below the indexed folder is told. Vectors are rows of int8, each with a scale of its own.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipmatch.atomic import atomic_folder
from clipmatch.bundle import as_value, bundle
from clipmatch.calibration import NEAREST, RIVALS, Calibration
from clipmatch.crawl import GALLERY
from clipmatch.duplicates import BITS, COSINE
from clipmatch.errors import ClipmatchError, Failure
from clipmatch.index import Index
from clipmatch.modelfolder import TEXT_GRAPH, TOKENIZER, read_config
from clipmatch.npm import Package, read_package
from clipmatch.photo import Photo
from clipmatch.pipeline import in_order
from clipmatch.preprocess import ImageError, load_image
from clipmatch.runtime import usable_cores
from clipmatch.store import Filter

WEB = Path(__file__).parent / "web"
FORMAT = 1
SMALL, LARGE = 640, 2048  # pixels of the longer side: as a tile on a sharp screen, and filling one
QUALITY = 82  # of JPEG

RUNTIME = Package(
    "onnxruntime-web",
    "1.30.0",
    "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
)
RUNTIME_SCRIPT, RUNTIME_BINARY = "dist/ort.wasm.bundle.min.mjs", "dist/ort-wasm-simd-threaded.wasm"
WORDS = Package(
    "@huggingface/tokenizers",
    "0.2.0",
    "LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg==",
)
WORDS_SCRIPT, WORDS_LICENCE = "dist/tokenizers.min.mjs", "LICENSE"

# Nothing may be fetched or sent; scripts, styles and pictures are the folder's own. WebAssembly is the model's runtime.
POLICY = "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; img-src 'self' blob: data:"
LICENCES = {  # of what the packages of Python and of npm share, and of the page; by name in the folder
    "clipmatch.txt": ("clipmatch", "licenses/LICENSE"),
    "onnxruntime-web.txt": ("onnxruntime", "onnxruntime/LICENSE"),
    "onnxruntime-web-notices.txt": ("onnxruntime", "onnxruntime/ThirdPartyNotices.txt"),
}
SCRIPT = re.compile(r"<script\b[^>]*\btype=\"module\"[^>]*\bsrc=\"[^\"]*\"[^>]*></script>")
POLICY_TAG = re.compile(r"\s*<meta\b[^>]*Content-Security-Policy[^>]*>")
README = """\
{count} photographs that are searched by what they show.

Open index.html in a browser: by a double click, or after you have put the folder on a web server. The search runs in
the browser itself; nothing that is typed or seen leaves it.

Made with clipmatch. The folder "licences" has the terms of the programs in here{terms}.
"""


@dataclass(frozen=True)
class Exported:
    """What an export has made. failures: photographs that could not be read, which are not in it."""

    folder: Path
    count: int
    size: int
    failures: list[Failure]


@dataclass(frozen=True, eq=False)
class Rows:
    """Unit rows in an eighth of the bits: row = codes [n, d] * scales [n, 1]."""

    codes: NDArray[np.int8]
    scales: NDArray[np.float32]

    def to_json(self) -> dict[str, str]:
        """As the page reads them."""
        return {"codes": as_text(self.codes), "scales": as_text(self.scales)}


def export_gallery(
    index: Index,
    folder: str | Path,
    where: Filter | None = None,
    size: int = SMALL,
    full: bool = False,
    runtime: str | Path | None = None,
    progress: bool = True,
) -> Exported:
    """Write the folder, in one step; one that an earlier export has made is replaced.

    where: which photographs. size: pixels of the longer side of the small pictures. full: larger ones too. runtime: a
    folder with the archives of the JavaScript libraries; None: from the cache, or fetched.
    A photograph that can't be read is left out, and a failure says so. Raises ClipmatchError if the folder is something
    else, there is nothing to export, the model is of another kind, or the libraries can't be had.
    """
    target = Path(folder).expanduser().resolve()
    check_target(target)
    model = model_folder(index)
    scripts = runtime_scripts(runtime)  # before the work of an hour
    with index.store.snapshot():
        gallery = index.gallery()
        if where:
            gallery = gallery.part(gallery.places(index.store.numbers(where)))
        photos = index.store.photos_of(gallery.numbers.tolist())
        hashes, rows = index.store.hashes(gallery.numbers), gallery.rows[:]
        places = [root.path for root in index.store.roots()]
    if not photos:
        raise ClipmatchError("No photograph passes the filters." if where else "The index is empty; nothing to export.")
    with atomic_folder(target) as draft:
        drawn, failures = draw(photos, draft, size, full, progress)
        if not drawn:
            raise ClipmatchError(
                f"None of the {len(photos)} photographs can be read; the first, {failures[0].path}: "
                f"{failures[0].reason}."
            )
        good = np.array(drawn)
        names = [shown_path(photos[place].path, places) for place in drawn]
        config = read_config(model)
        about = config["about"]
        values = {
            "photos": photo_columns([photos[place] for place in drawn], names, drawn, full)
            | {"model": str(about.get("name") or ""), "calibrated": index.calibration is not None},
            "search": {
                "dim": rows.shape[1],
                **quantise(rows[good]).to_json(),
                "hashes": as_text(hashes[good]),
                "near": {"cosine": COSINE, "bits": BITS},
                "background": None if gallery.background is None else as_text(gallery.background[good]),
                "calibration": index.calibration and calibration_part(index.calibration),
                "longest": config["model"]["max_length"],
            },
            "model": as_text(np.fromfile(model / TEXT_GRAPH, np.uint8)),
            "tokenizer": json.loads((model / TOKENIZER).read_text(encoding="utf-8")),
        }
        for name, value in values.items():
            write_data(draft, name, literal(value))
        for name, script in scripts.items():
            write_data(draft, name, script)
        write_page(draft)
        write_papers(draft, len(drawn), runtime, about.get("licence"))
    size_of_all = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return Exported(target, len(drawn), size_of_all, failures)


# Where


def check_target(folder: Path) -> None:
    """Raise ClipmatchError for a place that is not free, except by an earlier export."""
    if folder.is_file():
        raise ClipmatchError(f"{folder} is a file; name a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / GALLERY).is_file():
        raise ClipmatchError(f"The folder {folder} has other things in it; name a new one, or an earlier gallery.")
    if not folder.name:
        raise ClipmatchError(f"{folder} can't be replaced; name a folder in it.")


# What


def model_folder(index: Index) -> Path:
    """The folder of the index's model. Raises ClipmatchError unless its text side is an ONNX graph."""
    folder = getattr(index.embedder, "folder", None)
    if folder is None or not (folder / TEXT_GRAPH).is_file():
        name = index.store.model.name if index.store.model else None
        raise ClipmatchError(
            f"A browser runs models for ONNX Runtime, and this index's is of another kind; make one of it: clipmatch "
            f"export {name or 'MODEL'} --out DIR, then clipmatch index --reembed --model DIR"
        )
    return Path(folder)


def runtime_scripts(folder: str | Path | None) -> dict[str, str]:
    """What the page's search runs on, as scripts' values by name. Raises ClipmatchError if it can't be had."""
    runtime = read_package(RUNTIME, (RUNTIME_SCRIPT, RUNTIME_BINARY), folder)
    words = read_package(WORDS, (WORDS_SCRIPT,), folder)
    parts = (as_value(script.decode("utf-8")) for script in (runtime[RUNTIME_SCRIPT], words[WORDS_SCRIPT]))
    return {
        "runtime": "Object.assign({}, " + ", ".join(parts) + ")",
        "wasm": literal(as_text(np.frombuffer(runtime[RUNTIME_BINARY], np.uint8))),
    }


def calibration_part(calibration: Calibration) -> dict[str, Any]:
    """What `Calibration.evidence` and `choose` need: weights, and the bank's pictures."""
    return {
        "weights": calibration.weights,
        "alike": calibration.alike,
        "rivals": RIVALS,
        "nearest": max(1, round(NEAREST * len(calibration.pictures))),
        "bank": quantise(calibration.pictures).to_json(),
    }


def quantise(rows: NDArray[np.float32]) -> Rows:
    """Rows [n, d] -> int8, each row with the scale that its largest number needs."""
    scales = np.maximum(np.abs(rows).max(axis=1), 1e-9) / 127  # [n]
    return Rows(np.rint(rows / scales[:, None]).astype(np.int8), scales.astype(np.float32))


def as_text(array: NDArray[Any]) -> str:
    """An array's bytes, little end first, in base64."""
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode("ascii")


def photo_columns(photos: Sequence[Photo], names: list[str], places: Sequence[int], full: bool) -> dict[str, Any]:
    """What the page tells of photographs, a list for each property: of what their files say no more than this."""
    known = [photo.metadata for photo in photos]
    return {
        "path": names,
        "picture": list(places),
        "full": full,
        "width": [metadata.width for metadata in known],
        "height": [metadata.height for metadata in known],
        "bytes": [photo.stamp.size for photo in photos],
        "taken": [metadata.taken and metadata.taken.isoformat() for metadata in known],
        "caption": [metadata.caption for metadata in known],
    }


def shown_path(path: Path, roots: Sequence[Path]) -> str:
    """A path below the indexed folder or the home folder it is in, whose own names are nobody's business."""
    above = [root for root in (*roots, Path.home()) if path != root and path.is_relative_to(root)]
    inside = path.relative_to(max(above, key=lambda root: len(root.parts))) if above else Path(path.name)
    return os.fsencode(PurePosixPath(*inside.parts)).decode("utf-8", "replace")


# Pictures


def draw(
    photos: Sequence[Photo], folder: Path, size: int, full: bool, progress: bool
) -> tuple[list[int], list[Failure]]:
    """Write the pictures -> the places of those that are there, and photographs that can't be read."""
    from tqdm import tqdm

    sizes = {"thumbs": size} | ({"full": LARGE} if full else {})
    for name in sizes:
        (folder / name).mkdir()

    def work(place: int) -> Failure | None:
        try:
            draw_one(photos[place].path, {folder / name / f"{place}.jpg": side for name, side in sizes.items()})
        except ImageError as error:
            return Failure(photos[place].path, error.reason)
        return None

    drawn, failures = [], []
    with ThreadPoolExecutor(usable_cores()) as pool:
        found = in_order(work, range(len(photos)), pool, 2 * usable_cores())
        for place, failure in enumerate(tqdm(found, "pictures", len(photos), unit="img", disable=not progress)):
            if failure:
                failures.append(failure)
            else:
                drawn.append(place)
    return drawn, failures


def draw_one(path: Path, targets: dict[Path, int]) -> None:
    """A photograph -> JPEG files of its pixels alone, upright, with the longer sides given. Raises ImageError."""
    image = load_image(path, min_size=max(targets.values()))
    for target, side in sorted(targets.items(), key=lambda item: -item[1]):
        image.thumbnail((side, side))
        image.info = {}  # Pillow would write some of it into the new file
        image.save(target, "JPEG", quality=QUALITY, optimize=True, progressive=True)


# The page


def literal(value: Any) -> str:
    """A value as JavaScript; objects by way of JSON, which browsers read faster than programs."""
    text = json.dumps(value)
    return f"JSON.parse({json.dumps(text)})" if isinstance(value, dict) else text


def write_data(folder: Path, name: str, value: str) -> None:
    """A script that hands a JavaScript value to the page."""
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / f"{name}.js").write_text(f"gallery({json.dumps(name)}, {value});\n", encoding="utf-8")


def write_page(folder: Path) -> None:
    """The page: its modules in one script, all else as it is."""
    html = (WEB / "index.html").read_text(encoding="utf-8")
    for path in WEB.iterdir():
        if path.suffix not in (".js", ".html") or f'<script src="{path.name}"' in html:  # modules are in page.js
            shutil.copyfile(path, folder / path.name)
    (folder / "index.html").write_text(static_page(html), encoding="utf-8")
    names = {"backend.js": "offline.js"}
    script = bundle("app.js", lambda name: (WEB / names.get(name, name)).read_text(encoding="utf-8"))
    (folder / "page.js").write_text(script, encoding="utf-8")


def static_page(html: str) -> str:
    """The page as a server hands it out -> as it works from a disk: one classic script, relative addresses."""
    html, found = SCRIPT.subn('<script src="page.js" defer></script>', html)
    assert found == 1, "index.html has one module"
    html = re.sub(r'((?:href|src)=")/(?!/)', r"\1", POLICY_TAG.sub("", html))
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    return re.sub(r"(<head[^>]*>)", rf"\1\n{policy}", html, count=1)


def write_papers(folder: Path, count: int, runtime: str | Path | None, model_licence: str | None) -> None:
    """What people read: what this is, and the licences of what is in it; and the marker."""
    licences = folder / "licences"
    licences.mkdir()
    for name, (package, path) in LICENCES.items():
        if text := distribution_file(package, path):
            (licences / name).write_text(text, encoding="utf-8")
    words = read_package(WORDS, (WORDS_LICENCE,), runtime)
    (licences / "tokenizers.txt").write_bytes(words[WORDS_LICENCE])
    terms = f"; the model's are {model_licence}" if model_licence else ""
    (folder / "README.txt").write_text(README.format(count=f"{count:,}", terms=terms), encoding="utf-8")
    made = {"format": "clipmatch gallery", "version": FORMAT, "photographs": count}
    (folder / GALLERY).write_text(json.dumps(made) + "\n", encoding="utf-8")


def distribution_file(package: str, path: str) -> str | None:
    """A text that came with an installed package; None if it is not there."""
    try:
        found = distribution(package)
        for place in (path, f"{found.metadata['Name']}-{found.version}.dist-info/{path}"):
            file = Path(str(found.locate_file(place)))
            if file.is_file():
                return file.read_text(encoding="utf-8")
    except PackageNotFoundError:
        pass
    return None
