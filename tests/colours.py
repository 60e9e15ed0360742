"""A model that a reader can check by eye, for tests of the index and of the search over it."""

import numpy as np
from PIL import Image

from clipmatch.embedder import ImageEmbeddings
from clipmatch.errors import Failure
from clipmatch.preprocess import ImageError, load_image

COLOURS = {"red": 0, "green": 1, "blue": 2}


class ColourEmbedder:
    """An embedder whose vectors can be read: the share of red, green and blue. Keeps the files that it was given.

    words: further words, and the colours that they stand for.
    """

    dim = 3

    def __init__(self, fingerprint="colours"):
        self.fingerprint = fingerprint
        self.seen = []
        self.words = {}

    def embed_images(self, paths, progress=True, read=load_image):
        rows, good, failures = [], [], []
        for path in paths:
            self.seen.append(path)
            try:
                row = np.asarray(read(path, None), np.float32)[0, 0] + 1e-3
            except ImageError as error:
                failures.append(Failure(path, error.reason))
                continue
            rows.append(row / np.linalg.norm(row))
            good.append(path)
        return ImageEmbeddings(np.array(rows, np.float32).reshape(-1, 3), good, failures)

    def embed_texts(self, texts, progress=False):
        return np.array([np.eye(3)[COLOURS[self.words.get(text, text)]] for text in texts], np.float32)


def paint(path, colour):
    """A PNG file of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path, format="PNG")
    return path


# A program that brings an index up to date, slowly and with many commits, to be killed or looked at meanwhile. It takes
# the index and the folder.
SLOW = """
import sys, time
import clipmatch.ingest
from clipmatch.index import Index
from colours import ColourEmbedder

class Slow(ColourEmbedder):
    def embed_images(self, paths, progress=True, read=None):
        time.sleep(0.15)
        return super().embed_images(paths, progress, read)

clipmatch.ingest.BATCH = 2
Index.open(sys.argv[1], Slow()).update([sys.argv[2]], progress=False)
"""
