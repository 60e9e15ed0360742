"""A small collection that tests of the server and of its page share, and the server itself in a thread."""

import contextlib
import shutil
import socket
import threading
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image

from clipmatch.demo import sample_photographs
from clipmatch.index import Index
from clipmatch.server import make_app, server_of

CHOSEN = ("astronaut", "brick", "chelsea", "coffee", "coins", "grass", "motorcycle_left", "rocket")
HOSTILE = "<img src=x onerror=alert(1)> & 'moon'.png"
HOSTILE_CAPTION = "<script>document.title = 'taken over'</script><b onclick=alert(1)>Breakfast at Zermatt"


@dataclass(frozen=True)
class Album:
    """folder: the photographs. index: the index file."""

    folder: Path
    index: Path

    def copy(self, place: Path) -> "Album":
        """An index file of its own over the same photographs, for a test that changes it."""
        return Album(self.folder, Path(shutil.copy(self.index, place / "own.sqlite")))


def make_album(place: Path, embedder) -> Album:
    """Ten photographs: a near-duplicate, a TIFF file, one on its side with all kinds of EXIF data and a caption, and
    names and captions that would do harm as HTML.
    """
    folder = place / "Pictures"
    folder.mkdir()
    samples = {path.stem: path for path in sample_photographs()}
    for name in CHOSEN:
        if name not in ("coffee", "coins"):
            shutil.copy(samples[name], folder)
    shutil.copy(samples["moon"], folder / HOSTILE)
    with Image.open(samples["chelsea"]) as cat:
        cat.convert("RGB").resize((300, 200)).save(folder / "chelsea_small.jpg", quality=80)
    with Image.open(samples["coins"]) as coins:
        coins.save(folder / "coins.tiff")
    with Image.open(samples["coffee"]) as coffee:
        exif = Image.Exif()
        exif[ExifTags.Base.Make], exif[ExifTags.Base.Model] = "Pentax", "K-5"
        exif[ExifTags.Base.Orientation] = 8  # turn it to the left
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = "2023:06:15 12:30:00"
        gps = exif.get_ifd(ExifTags.IFD.GPSInfo)
        gps[ExifTags.GPS.GPSLatitudeRef], gps[ExifTags.GPS.GPSLatitude] = "N", (46.0, 1.0, 12.0)
        gps[ExifTags.GPS.GPSLongitudeRef], gps[ExifTags.GPS.GPSLongitude] = "E", (7.0, 44.0, 57.0)
        (folder / "trip").mkdir()
        turned = coffee.convert("RGB").transpose(Image.Transpose.ROTATE_270)
        turned.save(folder / "trip" / "IMG_1.jpg", exif=exif)
    (folder / "trip" / "IMG_1.txt").write_text(HOSTILE_CAPTION)
    with Index.open(place / "photos.sqlite", embedder) as index:
        summary = index.update([folder], progress=False)
        assert (summary.added, summary.failures) == (10, [])
    return Album(folder, place / "photos.sqlite")


@contextlib.contextmanager
def serving(*arguments, **options):
    """The server over a real socket, in a thread -> its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = server_of(make_app(*arguments, **options))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()
