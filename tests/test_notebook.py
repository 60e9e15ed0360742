"""The notebook is clean, says what it promises, and runs from top to bottom twice, as somebody at a screen would do."""

import ast
import base64
import contextlib
import copy
import io
import itertools
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from clipmatch.crawl import list_images
from clipmatch.generation import looptools

NOTEBOOK = Path(__file__).parents[1] / "build_model.ipynb"
QUERIES = ("dog", "plane", "Gloomy weather", "someone dunks on the basket")
TINY = 'model_path = "run"\npictures = None\nscenes = 60\nscene_epochs = 2\nvqgan_steps = 3\npaint_steps = 2\n'


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def syntax(notebook):
    """Each code cell as a syntax tree; a line of IPython's own (%matplotlib, %pip) becomes `pass`."""
    return [ast.parse(without_magics(cell.source)) for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def twice(notebook, tmp_path_factory):
    """The code cells of two passes through the notebook in one kernel, executed on tiny data in an empty folder."""
    folder = tmp_path_factory.mktemp("notebook")
    work = copy.deepcopy(notebook)
    parameters = [cell for cell in work.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(parameters) == 1
    parameters[0].source = TINY
    again = copy.deepcopy(work.cells)
    for cell in again:
        cell.id += "-again"
    work.cells += again
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CLIPMATCH_NOTEBOOK_DATA", raising=False)
        patch.setenv("CLIPMATCH_CACHE", str(folder / "cache"))
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))  # nobody's startup files
        patch.setenv("HF_HUB_OFFLINE", "1")
        NotebookClient(work, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    cells = [cell for cell in work.cells if cell.cell_type == "code"]
    return folder, cells[: len(cells) // 2], cells[len(cells) // 2 :]


def test_the_vqgan_goes_on_after_an_interrupt_or_a_kernel_that_died(notebook, photos, tmp_path, monkeypatch):
    imports = next(cell.source for cell in notebook.cells if "import train_vqgan" in cell.source)
    source = next(cell.source for cell in notebook.cells if "train_vqgan(" in cell.source)
    code = without_magics(imports) + "\n" + source.partition("painter = load_painter")[0]
    splits = SimpleNamespace(train=[SimpleNamespace(path=path) for path in list_images(photos)])
    names = {"model_path": str(tmp_path / "run"), "splits": splits, "vqgan_steps": 2}
    left = iter([False])
    with monkeypatch.context() as patch:
        patch.setattr(looptools, "stop_on_interrupt", lambda: contextlib.nullcontext(lambda: next(left, True)))
        with pytest.raises(KeyboardInterrupt, match="run this cell again"):
            exec(code, dict(names))
    (tmp_path / "run-vqgan" / "config.json").unlink()  # as if the kernel had died
    exec(code, dict(names))
    assert looptools.is_finished(tmp_path / "run-vqgan", 2)


def without_magics(source):
    lines = []
    for line in source.splitlines():
        code = line.lstrip()
        lines.append(line if code[:1] not in ("%", "!") else line[: len(line) - len(code)] + "pass")
    return "\n".join(lines)


def only(cells, part):
    """The one cell whose source holds a text."""
    found = [cell for cell in cells if part in cell.source]
    assert len(found) == 1, part
    return found[0]


def pictures(cell):
    """The PNG outputs of a cell, decoded."""
    shown = [output.data for output in cell.outputs if output.output_type in ("display_data", "execute_result")]
    return [Image.open(io.BytesIO(base64.b64decode(data["image/png"]))) for data in shown if "image/png" in data]


def colours(image):
    """How many different colours a picture has: one for an empty figure."""
    return len(image.convert("RGB").getcolors(1 << 24))


def printed(cell, stream="stdout"):
    return "".join(output.text for output in cell.outputs if output.get("name") == stream)


def test_it_is_a_valid_notebook_without_outputs(notebook):
    nbformat.validate(notebook)
    dirty = [
        cell.id
        for cell in notebook.cells
        if cell.cell_type == "code" and (cell.outputs or cell.execution_count is not None)
    ]
    assert not dirty, "clear them: jupyter nbconvert --clear-output --inplace build_model.ipynb"


def test_prose_stands_before_each_code_cell(notebook):
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds[0] == "markdown"
    assert all(before == "markdown" for before, kind in itertools.pairwise(kinds) if kind == "code")


def test_it_starts_with_model_path(syntax):
    first = syntax[0].body[0]
    assert isinstance(first, ast.Assign)
    assert [target.id for target in first.targets] == ["model_path"]
    assert isinstance(first.value.value, str)


def test_it_defines_no_class_and_no_function(syntax):
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    assert not [node for tree in syntax for node in ast.walk(tree) if isinstance(node, kinds)]


def test_the_four_queries_are_asked(syntax):
    calls = [node for tree in syntax for node in ast.walk(tree) if isinstance(node, ast.Call)]
    searches = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "find_matches"]
    asked = [call.args[0].value for call in searches if isinstance(call.args[0], ast.Constant)]
    assert asked == list(QUERIES)
    assert all(len(call.args) == 3 for call in searches)  # query, model, images


def test_away_from_colab_it_trains_on_scenes(twice):
    folder, first, _ = twice
    assert "60 pictures to learn from, 6 held out" in printed(only(first, "load_captions(folder)"))
    assert (folder / "run" / "best" / "model.safetensors").is_file()
    assert (folder / "run" / "evaluation.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    "part", ["plt.subplots", "training_curves(result", "similarity_plot(evaluation", "load_painter("]
)
def test_figures_show(twice, part):
    for cells in twice[1:]:
        (image,) = pictures(only(cells, part))
        assert min(image.size) > 200
        assert colours(image) > 50


@pytest.mark.parametrize("query", QUERIES)
def test_matches_show_as_a_grid(twice, query):
    for cells in twice[1:]:
        (image,) = pictures(only(cells, f'find_matches("{query}"'))
        assert min(image.size) > 200
        assert colours(image) > 50


def test_queries_about_scenes_show_too(twice):
    assert len(pictures(only(twice[1], "a red circle above a blue star"))) == 3


def test_recall_stands_in_a_table(twice):
    cell = only(twice[1], "evaluate(model")
    (table,) = [output.data["text/markdown"] for output in cell.outputs if output.output_type == "execute_result"]
    header, _, to_image, to_text, *rest = table.splitlines()
    assert header.count("|") == to_image.count("|") == to_text.count("|") == 6
    assert "text → image" in to_image
    assert "chance 16.7%" in to_image  # the first of six pictures
    assert rest[-1] == "6 pictures, 30 captions"


def test_a_second_pass_goes_on_with_the_run(twice):
    _, first, second = twice
    assert "resumed" not in printed(only(first, "train(data"), "stderr")
    assert "resumed at step" in printed(only(second, "train(data"), "stderr")
    same = "evaluate(model"
    assert only(first, same).outputs[-1].data == only(second, same).outputs[-1].data
