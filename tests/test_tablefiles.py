"""Pictures in the rows of Parquet files, and paths of object storage."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from colours import paint

from clipmatch import archive, remote, tablefiles
from clipmatch.errors import ClipmatchError
from clipmatch.index import Index
from clipmatch.preprocess import load_image
from clipmatch.remote import absolute


@pytest.fixture
def rows(tmp_path):
    """Three pictures in two groups of rows, as Hugging Face keeps them; the last row has none."""
    files = [paint(tmp_path / f"{colour}.png", colour).read_bytes() for colour in ("red", "lime", "blue")]
    values = [{"bytes": data, "path": None} for data in files] + [None]
    pq.write_table(pa.table({"text": list("abcd"), "image": values}), tmp_path / "train.parquet", row_group_size=2)
    return tmp_path / "train.parquet"


def test_pictures_are_read_where_they_lie(rows):
    names = tablefiles.row_names(rows)
    assert names == ["00000000", "00000001", "00000002", "00000003"]
    assert tablefiles.linked(rows) is None
    seen = [load_image(rows / name).getpixel((0, 0)) for name in names[:3]]
    assert seen == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert archive.is_file(rows / names[2])
    with pytest.raises(OSError, match="the row has no picture"):
        archive.read_bytes(rows / names[3])
    with pytest.raises(FileNotFoundError):
        archive.read_bytes(rows / "00000004")


def test_a_file_of_paths_and_files_that_are_none(tmp_path):
    pq.write_table(pa.table({"file_name": ["a.jpg", "s3://bucket/b.jpg"]}), tmp_path / "paths.parquet")
    assert tablefiles.linked(tmp_path / "paths.parquet") == ["a.jpg", "s3://bucket/b.jpg"]
    (tmp_path / "damaged.parquet").write_bytes(b"nothing")
    with pytest.raises(OSError, match="damaged Parquet file"):
        tablefiles.row_names(tmp_path / "damaged.parquet")
    pq.write_table(pa.table({"number": [1]}), tmp_path / "numbers.parquet")
    with pytest.raises(OSError, match="no column of pictures"):
        tablefiles.row_names(tmp_path / "numbers.parquet")


def test_addresses_are_paths_and_back(tmp_path):
    path = absolute("s3://bucket/photos/a.jpg")
    assert path == Path("s3:/bucket/photos/a.jpg")
    assert remote.address_of(path) == "s3://bucket/photos/a.jpg"
    assert not remote.is_remote(tmp_path)
    assert remote.address_of("/a/s3:/b") == "/a/s3:/b"
    with pytest.raises(ClipmatchError, match=r"^s3://bucket/photos is on object storage; index it with --engine ray"):
        Index.open(tmp_path / "photos.sqlite").update(["s3://bucket/photos"])


def test_files_of_another_file_system_are_listed_and_read(tmp_path):
    """One of fsspec, in memory; object storage itself is in test_lance_cluster.py."""
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    data = paint(tmp_path / "red.png", "red").read_bytes()
    for name in ("photos/red.png", "photos/sub/more.png", "photos/.hidden/no.png", "other.png"):
        memory.pipe_file(f"/shelf/{name}", data)
    folder = absolute("fsspec+memory://shelf/photos")
    found = dict(remote.list_files(folder))
    assert sorted(path.relative_to(folder).as_posix() for path in found) == ["red.png", "sub/more.png"]
    assert found[folder / "red.png"].size == len(data)
    assert load_image(folder / "red.png").getpixel((0, 0)) == (255, 0, 0)
    assert [path for path, _ in remote.list_files(folder / "red.png")] == [folder / "red.png"]
    with pytest.raises(FileNotFoundError):
        remote.status_of(folder / "gone.png")
    with pytest.raises(ClipmatchError, match="gone can't be read"):
        list(remote.list_files(folder / "gone"))
    with pytest.raises(ClipmatchError, match="nosuch://shelf can't be read"):
        remote.status_of(absolute("nosuch://shelf/a.png"))


def test_the_account_is_no_part_of_a_name_on_azure():
    path = absolute("abfs://box@account.dfs.core.windows.net/photos/a.jpg")
    assert remote.locate(path)[1] == "box/photos/a.jpg"
    assert remote.locate(path.parents[1])[1] == "box"
