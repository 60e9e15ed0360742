"""What a cluster does for an index in Lance tables, in this process; a real one is in test_lance_cluster.py."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from captionfiles import pack, picture
from colours import ColourEmbedder, paint

pytest.importorskip("lancedb", reason="the extra `distributed` is not installed; make test-cluster has it")
ray = pytest.importorskip("ray")

from clipmatch import distributed
from clipmatch.crawl import Found
from clipmatch.errors import Failure
from clipmatch.index import name_of
from clipmatch.lancestore import LanceStore
from clipmatch.listing import AWAY, GONE
from clipmatch.photo import Stamp
from clipmatch.sidecars import sidecar_stamp, told_stamp
from clipmatch.store import Root


class Here(distributed.Job):
    """One worker, of this process; `losses` times it is lost after its second share."""

    losses = 0

    def share_out(self, files, done):
        worker = distributed.Worker(**self.given)
        for number, table in enumerate(distributed.open_archives(distributed.as_table(files), done)):
            yield from worker(table).to_pylist()
            if number == 1 and self.losses:
                self.losses -= 1
                raise ray.exceptions.RayActorError


@pytest.fixture
def job(tmp_path, monkeypatch):
    embedder = ColourEmbedder()
    monkeypatch.setattr(distributed, "load_model", lambda *_: embedder)
    monkeypatch.setattr(distributed, "PAUSE", 0)
    with LanceStore.open(tmp_path / "photos.lance", create=True) as store:
        store.bind(name_of(embedder))
        yield Here(store, embedder, None, None, None, progress=False)


def captions(job):
    return {photo.path.name: photo.metadata.caption for _, photo in job.store.photos()}


def test_what_is_done_before_a_worker_is_lost_is_counted_once(job, tmp_path):
    """Also of archives, which are opened again for what is left of them."""
    folder = tmp_path / "photos"
    paint(folder / "white.png", "white")
    pack(folder / "0.tar", [("red.png", picture("red")), ("broken.png", b"no picture")])
    pack(folder / "1.tar", [("lime.png", picture("lime")), ("blue.png", picture("blue"))])
    job.losses = 1
    summary = job.run([Root(folder)])
    assert job.losses == 0
    assert str(summary) == "4 added, 0 moved, 0 changed, 0 unchanged, 0 removed, 1 failed"
    assert str(job.run([Root(folder)])) == "0 added, 0 moved, 0 changed, 4 unchanged, 0 removed, 1 failed"


def test_what_ray_says_is_no_answer(capsys, monkeypatch):
    """It prints of workers that died, and a pipe waits for the answer on stdout alone."""
    monkeypatch.setattr(ray, "init", lambda *_, **__: None)
    with distributed.connected(None):
        print("A worker died")
    assert capsys.readouterr() == ("", "A worker died\n")


def test_pictures_that_a_table_names_may_go_wherever_they_were(job, tmp_path):
    table = tmp_path / "tables" / "table.parquet"
    paths = [paint(tmp_path / "photos" / f"{colour}.png", colour) for colour in ("red", "lime", "blue")]
    table.parent.mkdir()
    pq.write_table(pa.table({"path": list(map(str, paths))}), table)
    assert job.run([Root(table.parent)]).added == 3
    paths[0].unlink()
    summary = job.run([Root(table.parent)])
    assert (summary.unchanged, summary.removed, summary.failures) == (2, 1, [Failure(paths[0], GONE)])
    paths[0].parent.rename(tmp_path / "unplugged")
    summary = job.run([Root(table.parent)])
    assert (summary.removed, summary.failures) == (0, [Failure(path, AWAY) for path in paths])
    assert captions(job).keys() == {"lime.png", "blue.png"}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_side_cars_go_before_the_words_of_a_table_in_a_share(job, tmp_path, order):
    """A picture on object storage that is listed, with a text file beside it, and that a table names too."""
    path = paint(tmp_path / "red.png", "red")
    path.with_suffix(".txt").write_text("Beside it .")
    size, modified = path.stat().st_size, path.stat().st_mtime_ns
    both = [
        Found(path, Stamp(size, modified, sidecar_stamp(path))),
        Found(path, Stamp(size, modified, told_stamp("In a table .", None)), "In a table ."),
    ]
    distributed.Worker(**job.given)(distributed.as_table([both[at] for at in order]))
    assert captions(job) == {"red.png": "Beside it ."}
