"""Indexes from strangers: what they hold is data, and what makes no sense is told in a sentence."""

import json
import shutil
import sqlite3

import numpy as np
import pytest
from colours import ColourEmbedder, paint

from clipmatch.errors import ClipmatchError
from clipmatch.index import Index
from clipmatch.sanity import are_unit
from clipmatch.store import Filter

DIM = ColourEmbedder.dim


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A way to have an index of a kind, made once: two photographs, a file that is none, and a concept."""
    folder = tmp_path_factory.mktemp("made")
    paint(folder / "photos" / "red.png", (255, 0, 0))
    paint(folder / "photos" / "blue.png", (0, 0, 255))
    (folder / "photos" / "none.png").write_bytes(b"nothing")

    def make(kind):
        path = folder / f"sent.{kind}"
        if not path.exists():
            with Index.open(path, ColourEmbedder()) as index:
                index.update([folder / "photos"], progress=False)
                index.teach("rot", [folder / "photos" / "red.png"])
        return path

    return make


@pytest.fixture
def sent(made, tmp_path):
    """An index that somebody has made -> its file, and a way to do to it what only its maker can."""
    path = tmp_path / "sent.sqlite"
    shutil.copy(made("sqlite"), path)

    def alter(*statements):
        with sqlite3.connect(path) as database:
            for statement in statements:
                database.execute(*([statement] if isinstance(statement, str) else statement))
        database.close()

    return path, alter


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TRIGGER extra AFTER INSERT ON about BEGIN DELETE FROM photos; END",
        "CREATE VIEW extra AS SELECT 1",
        "CREATE VIRTUAL TABLE extra USING fts5(a)",
        "CREATE TABLE extra (a CHECK (abs(a)))",
        "CREATE INDEX extra ON photos (abs(size))",
    ],
)
def test_what_would_act_is_refused(sent, statement):
    path, alter = sent
    Index.open(path).close()
    alter(statement)
    with pytest.raises(ClipmatchError, match=r"holds a .* 'extra' that no index has"):
        Index.open(path)


@pytest.mark.parametrize("name", ["words_added", "words_data"])  # ours, and that of a table of SQLite's own
def test_a_trigger_of_ours_that_does_something_else(sent, name):
    path, alter = sent
    alter(
        f"DROP TRIGGER IF EXISTS {name}",
        f"CREATE TRIGGER {name} AFTER INSERT ON photos BEGIN DELETE FROM roots; END",
    )
    with pytest.raises(ClipmatchError, match=name):
        Index.open(path)


def test_a_view_in_the_place_of_a_table(sent):
    """It would never end."""
    path, alter = sent
    alter(
        "ALTER TABLE about RENAME TO kept",
        "CREATE VIEW about AS WITH RECURSIVE n(name, value) AS (SELECT 'a', 1 UNION ALL SELECT 'b', value + 1 FROM n)"
        " SELECT name, value FROM n",
    )
    with pytest.raises(ClipmatchError, match=r"holds a view 'about'|holds a table 'kept'"):
        Index.open(path)


def without(*names):
    """A change to a table: some columns are missing."""
    return lambda table: table.drop_columns(list(names))


def filled(name, value, form=None):
    """A change to a table: a column has one value everywhere, of a form of its own if one is given."""

    def change(table):
        import pyarrow as pa

        at = table.schema.names.index(name)
        field = table.schema.field(name)
        field = field.with_type(pa.type_for_alias(form)) if form else field
        return table.set_column(at, field, pa.array([value] * len(table), field.type))

    return change


def about(**changes):
    """A change to a table: what its metadata say of it; None takes something out."""

    def change(table):
        old = {key.decode(): value for key, value in (table.schema.metadata or {}).items()}
        new = old | {key.replace("clipmatch_", "clipmatch."): value for key, value in changes.items()}
        return table.replace_schema_metadata({key: value for key, value in new.items() if value is not None})

    return change


def rows_of(*numbers, of=DIM):
    """A change to a table: other vectors."""

    def change(table):
        import pyarrow as pa

        at, form = table.schema.names.index("vector"), pa.list_(pa.float32(), of)
        return table.set_column(at, pa.field("vector", form), pa.array([list(numbers)] * len(table), form))

    return change


@pytest.fixture
def tables(made, tmp_path):
    """As `sent`, of Lance tables: alter(name of a table, what changes it)."""
    pytest.importorskip("lancedb", reason="the extra `distributed` is not installed; make test-cluster has it")
    import lance

    path = tmp_path / "sent.lance"
    shutil.copytree(made("lance"), path)

    def alter(name, change):
        place = path / f"{name}.lance"  # by the library below LanceDB, which would refuse some of what is written
        lance.write_dataset(change(lance.dataset(place).to_table()), place, mode="overwrite")

    return path, alter


def use(path):
    """Everything that reads an index."""
    with Index.open(path, ColourEmbedder(), create=False) as index:
        store = index.store
        [root] = store.roots()
        index.find("red", top_k=4, hybrid=True)
        photos = list(index)
        index.duplicates()
        index.concepts()
        index.find("@rot")
        store.stamps(root.path)
        store.failures()
        store.tally()
        store.newest(Filter(), 10)
        store.rows_of(photo.path for photo in photos)
        store.embedded("another", [photo.digest for photo in photos])


def about_model(text=None, **changes):
    """What an index says of its model -> how it comes into one of either kind."""
    text = text or json.dumps({"fingerprint": "colours", "dim": DIM, "name": None} | changes)
    return f"UPDATE about SET value = '{text}' WHERE name = 'model'", about(clipmatch_model=text)


def blob(*numbers):
    return f"x'{np.array(numbers, '<f4').tobytes().hex()}'"


NAN, INF = float("nan"), float("inf")
PHOTOS = {  # what makes no sense -> how it comes into SQLite, and into a Lance table
    "a time that is text": ("mtime = 'yesterday'", filled("mtime", "yesterday", "string")),
    "a time that is no whole number": ("mtime = 1e300", filled("mtime", 1e300, "double")),
    "no time": ("mtime = NULL", filled("mtime", None)),
    "a width that is text": ("width = 'wide'", filled("width", "wide", "string")),
    "no height": ("height = NULL", filled("height", None)),
    "no pixels": ("width = 0", filled("width", 0)),
    "a content that is text": ("digest = 'none'", filled("digest", "none")),
    "a content that is short": ("digest = x'00ff'", filled("digest", "00ff")),
    "a content that is a path": ("digest = '../../none'", filled("digest", "../../none")),
    "a day that is none": ("taken = 'never'", filled("taken", 1 << 62)),
    "a path that is a number": ("path = 7 WHERE id = 1", filled("path", 7, "int64")),
    "no path": ("path = x'' WHERE id = 1", filled("path", None)),
    "a path that no file has": ("path = x'2f61002f62' WHERE id = 1", filled("path", "/a\0/b")),
    "a place beyond all": ("latitude = 9e999", filled("latitude", INF)),
    "no picture hash": ("picture_hash = NULL", filled("picture_hash", None)),
    "a size without end": ("size = 9e999", filled("size", INF, "double")),
    "a camera of bytes": ("camera = x'00'", filled("camera", b"\0", "binary")),
}
VECTORS = {
    "no number": ("x'00'", filled("vector", None)),
    "one number": (blob(1), rows_of(1, of=1)),
    "not finite": (blob(NAN, NAN, NAN), rows_of(NAN, NAN, NAN)),
    "with holes": (blob(0, INF, 0), rows_of(0, None, 1)),
    "beyond all": (blob(3e38, 3e38, 3e38), rows_of(3e38, 3e38, 3e38)),
    "before all others": (blob(1, 1, 1), rows_of(1, 1, 1)),
    "too short": (blob(0.5, 0.5, 0.5), rows_of(0.5, 0.5, 0.5)),
    "without a direction": (blob(0, 0, 0), rows_of(0, 0, 0)),
}
MODELS = {
    "a list": about_model("[]"),
    "cut off": about_model("{"),
    "nested deeply": about_model("[" * 100_000),
    "very long vectors": about_model(dim=10**12),
    "other vectors": about_model(dim=DIM + 1),
    "vectors of text": about_model(dim="3"),
    "a fingerprint that is none": about_model(fingerprint=7),
    "a name that is none": about_model(name=[]),
    "more": about_model(more=1),
}
ROOTS = {
    "patterns that are cut off": ("exclude = '{'", filled("exclude", None)),
    "patterns that are numbers": ("exclude = '[7]'", filled("exclude", [None])),
    "a folder that is a number": ("path = 7", filled("path", 7, "int64")),
    "a folder that none is": ("path = x'2f00'", filled("path", "/\0")),
}
FAILURES = {
    "a reason of bytes": ("reason = x'00'", filled("reason", None)),
    "no size": ("size = NULL", filled("size", None)),
}
CONCEPTS = {
    "no direction": ("row = x'00'", filled("row", None)),
    "not finite": (f"row = {blob(0, 0, NAN)}", filled("row", [0, None, 1])),
    "another length": (f"row = {blob(0, 1)}", filled("row", [0, 1])),
    "stronger than words": (f"row = {blob(1, 1, 1)}", filled("row", [1, 1, 1])),
    "a direction of no length": (f"row = {blob(0, 0, 0)}", filled("row", [0, 0, 0])),
    "examples that are numbers": ("examples = '[7]'", filled("examples", [None])),
    "precision that is text": ("precision = 'good'", filled("precision", "good", "string")),
    "a name of bytes": ("name = x'00'", filled("name", None)),
    "no model": ("model = x'00'", filled("model", None)),
}
SENSELESS = {
    f"{table}: {what}": (start + statement, "photos" if table in ("vectors", "model") else table, change)
    for table, start, cases in (
        ("photos", "UPDATE photos SET ", PHOTOS),
        ("vectors", "UPDATE vectors SET row = ", VECTORS),
        ("model", "", MODELS),
        ("roots", "UPDATE roots SET ", ROOTS),
        ("failures", "UPDATE failures SET ", FAILURES),
        ("concepts", "UPDATE concepts SET ", CONCEPTS),
    )
    for what, (statement, change) in cases.items()
}


def test_what_makes_sense_is_read(made, kind):
    use(made(kind))


def test_rows_of_fewer_bits_are_unit_rows():
    rows = np.random.default_rng(0).normal(size=(1000, 256)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    step = np.abs(rows).max(axis=1, keepdims=True) / 127
    assert are_unit(rows.astype(np.float16).astype(np.float32)).all()
    assert are_unit((rows.view(np.uint32) & 0xFFFF0000).view(np.float32)).all()  # bfloat16, cut off
    assert are_unit(np.rint(rows / step) * step).all()  # int8
    assert not are_unit(rows * 1.02).any()
    assert not are_unit(rows * 0.98).any()


@pytest.mark.parametrize("what", SENSELESS)
def test_values_that_make_no_sense(request, kind, what):
    statement, table, change = SENSELESS[what]
    if kind == "sqlite":
        path, alter = request.getfixturevalue("sent")
        alter(statement)
    else:
        path, alter = request.getfixturevalue("tables")
        alter(table, change)
    with pytest.raises(ClipmatchError, match="is damaged"):
        use(path)


@pytest.mark.parametrize(
    ("table", "change"),
    [
        ("photos", without("vector")),
        ("photos", without("path", "caption")),
        ("photos", about(clipmatch_token=None)),
        ("photos", about(clipmatch_model=None)),
        ("roots", without("exclude")),
        ("roots", about(clipmatch="seven")),
        ("failures", without("reason")),
        ("concepts", without("row")),
        ("concepts", lambda table: table.append_column("more", [[1] * len(table)])),
        ("photos", lambda table: table.append_column("more", [[1] * len(table)])),
    ],
)
def test_tables_of_another_form(tables, table, change):
    path, alter = tables
    alter(table, change)
    with pytest.raises(ClipmatchError, match="is damaged"):
        use(path)


@pytest.mark.parametrize("table", ["photos", "roots", "failures", "concepts"])
def test_a_table_that_would_have_a_library_compute_vectors(tables, table):
    """LanceDB makes the model that is named there when something is written, also one that brings its own code."""
    path, alter = tables
    told = [{"name": "sentence-transformers", "model": {"name": "a/b"}, "source_column": "path", "vector_column": "v"}]
    alter(table, about(embedding_functions=json.dumps(told)))
    with pytest.raises(ClipmatchError, match="holds 'embedding_functions', which no index has; don't use it"):
        use(path)


@pytest.mark.parametrize("value", [[1, 0], [1, None, 0]])
def test_rows_to_come_that_make_no_sense(tables, value):
    """While an index changes over to another model, its rows lie in a table of their own."""
    import lance
    import pyarrow as pa

    from clipmatch.lancerows import staged_schema

    path, _ = tables
    with Index.open(path, ColourEmbedder()) as index:
        digests = [photo.digest for photo in index]
    rows = pa.table([digests, [value] * len(digests)], schema=staged_schema("another", len(value)))
    lance.write_dataset(rows, path / "staged.lance")
    with Index.open(path, ColourEmbedder()) as index, pytest.raises(ClipmatchError, match="is damaged"):
        index.reembed(ColourEmbedder("another"), progress=False)


@pytest.mark.parametrize("value", ["'abc'", "NULL"])
def test_an_update_of_an_index_whose_stamps_are_no_numbers(sent, value):
    path, alter = sent
    alter(f"UPDATE photos SET sidecar = {value}")
    with Index.open(path, ColourEmbedder()) as index, pytest.raises(ClipmatchError, match="is damaged"):
        index.update(progress=False)
