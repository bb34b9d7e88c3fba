"""Notebooks: the public functions, their results inline, and the notebook of the documentation."""

import ast
import base64
import io
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from mypy import api
from PIL import Image

import rebeca_ray as rr
from rebeca_ray import log, notebook
from rebeca_ray.catalog import images as catalog_images
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.errors import InputError
from rebeca_ray.inline import MAX_SHOWN, MAX_SIDE, Images, figures_html
from rebeca_ray.pixels import open_image
from tests.conftest import NO_GATE, REPO, USERS
from tests.training.in_process import loop_in_process as loop_in_process  # a fixture

PAGES = REPO / "infra" / "docs"


def images_in(html: str) -> list[bytes]:
    """Return the images that HTML holds as data."""
    return [base64.b64decode(data) for data in re.findall(r"data:image/\w+;base64,([\w+/=]+)", html)]


def encoded(side: int) -> bytes:
    """Return an image of noise as a PNG."""
    file = io.BytesIO()
    pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def images_of(*rows: dict[str, Any]) -> Images:
    """Return rows with images; bytes become an image."""
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    values = [row.get("image") and {"bytes": row["image"], "path": "a.png"} for row in rows]
    columns = {name: [row.get(name) for row in rows] for name in rows[0] if name != "image"}
    return Images(pa.table({**columns, "image": pa.array(values, struct)}))


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InteractiveShell]:
    """Start the shell of a notebook in this process."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # the shell puts its own there
    shell = InteractiveShell.instance()
    yield shell
    InteractiveShell.clear_instance()


@pytest.mark.usefixtures("loop_in_process")
def test_the_notebook_of_the_documentation_runs_top_to_bottom(shell: InteractiveShell) -> None:
    cells = json.loads((PAGES / "notebook.ipynb").read_text())["cells"]
    shown = []
    for cell in cells:
        if cell["cell_type"] == "code":
            result = shell.run_cell("".join(cell["source"]))
            result.raise_error()
            shown += [] if result.result is None else [shell.display_formatter.format(result.result)[0]]
    prior, embeddings, images, image, snapshot, items = shown
    assert "<td>3</td>" in prior["text/html"]  # epochs
    assert embeddings["text/html"].count("<tr") == 1 + 4
    drawn = images_in(images["text/html"])
    assert len(drawn) == len(set(drawn)) == 8
    assert {open_image(picture).size for picture in drawn} == {(64, 64)}
    assert "image/png" in image
    assert len(images_in(snapshot["text/html"])) == 8
    assert images_in(items["text/html"]) == images_in(snapshot["text/html"])[:4]
    assert shell.user_ns["snapshot"].manifest.counts.new == 8


def test_the_notebook_is_small_and_shows_images() -> None:
    text = (PAGES / "notebook.ipynb").read_text()
    assert len(text) < 300_000
    assert len(images_in(json.dumps(json.loads(text)["cells"]))) == 8 + 8 + 4
    assert "Traceback" not in text


def test_a_grid_escapes_its_texts_and_says_why_an_image_is_missing() -> None:
    images = images_of(
        {"user_id": "<b>ann</b>", "rank": 0, "like_probability": 0.876, "error": None, "image": encoded(8)},
        {"user_id": "", "rank": 1, "like_probability": None, "error": "bad <luck>", "image": None},
    )
    html = images._repr_html_()
    assert repr(images) == "images: 1, users: 2, rows without an image: 1"
    assert images_in(html) == [encoded(8)]
    assert "<figcaption>&lt;b&gt;ann&lt;/b&gt;<br>rank 0<br>like 0.88</figcaption>" in html
    assert "<figcaption>population pool<br>rank 1</figcaption>" in html
    assert "bad &lt;luck&gt;" in html
    assert "<b>" not in figures_html("<b>", {"<b>": 1})
    with pytest.raises(InputError, match="image 1: is missing"):
        images[1]


def test_a_grid_is_bounded_and_its_images_are_small() -> None:
    images = images_of(*({"name": "a", "image": encoded(8)} for _ in range(MAX_SHOWN + 3)))
    html = images._repr_html_()
    assert len(images_in(html)) == MAX_SHOWN
    assert f"images: {MAX_SHOWN + 3}; the first {MAX_SHOWN} are shown, [{MAX_SHOWN}:] holds the rest" in html
    assert len(images_in(images[MAX_SHOWN:]._repr_html_())) == len(images[MAX_SHOWN:]) == 3
    assert "<figcaption>row 2</figcaption>" in images[:3]._repr_html_()
    large = images_of({"image": encoded(400)})
    (shown,) = images_in(large._repr_html_())
    assert open_image(shown).size == (MAX_SIDE, MAX_SIDE)
    assert large[0].size == large[-1].size == (400, 400)
    with pytest.raises(IndexError):
        large[1]


def test_an_empty_grid_is_no_error() -> None:
    assert images_of({"image": None})[:0]._repr_html_() == "<p>images: 0</p><div></div>"


def test_generate_returns_a_snapshot_that_shows_itself(config: GenerateConfig) -> None:
    snapshot = rr.generate(config.model_copy(update={"gate": NO_GATE}), "num_images=2", in_process=True)
    html = snapshot._repr_html_()
    assert repr(snapshot) == f"Snapshot of run {snapshot.run_id} in {config.catalog}"
    assert "<tr><th>requested</th><td>12</td></tr>" in html
    items = snapshot.items()
    assert images_in(html) == snapshot.images(items)
    shown = rr.read_catalog(config.catalog).show([USERS[1], USERS[0]])
    assert shown.table["user_id"].to_pylist() == [USERS[0]] * 2 + [USERS[1]] * 4
    assert images_in(shown._repr_html_()) == snapshot.images(snapshot.items(None, USERS[:2]))
    assert len(snapshot.show(["nobody"])) == 0


def test_only_the_images_of_a_grid_are_read(config: GenerateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = rr.generate(config.model_copy(update={"gate": NO_GATE}), "num_images=2", in_process=True)
    monkeypatch.setattr(catalog_images, "MAX_SHOWN", 3)
    shown = snapshot.show(USERS[:2])
    assert images_in(shown._repr_html_()) == snapshot.images(snapshot.items(None, USERS[:2]))[:3]
    assert (len(shown), shown.left_out) == (3, 3)
    assert "<p>images: 3, users: 2; 3 more items are left out, name fewer users" in shown._repr_html_()


def test_overrides_replace_settings_of_a_config_and_of_a_file(config: GenerateConfig, tmp_path: Path) -> None:
    changed = notebook.resolve(GenerateConfig, config, ["decoder.batch_size=3", "run_date=2026-03-01"])
    assert changed.decoder.batch_size == 3
    assert changed.model_copy(update={"decoder": config.decoder, "run_date": None}) == config
    assert notebook.resolve(GenerateConfig, config, []) is config
    (tmp_path / "decode.yaml").write_text(config.model_dump_json())
    assert notebook.resolve(GenerateConfig, tmp_path / "decode.yaml", ["num_images=3"]) == config
    with pytest.raises(InputError, match="GenerateConfig: unknown key 'num_image'; did you mean"):
        notebook.resolve(GenerateConfig, config, ["num_image=3"])
    with pytest.raises(InputError, match="config: is a GenerateConfig, expected a TrainConfig; give one"):
        rr.fit_prior(config)  # type: ignore[arg-type]


def test_a_mistake_shows_as_one_line_in_a_notebook(shell: InteractiveShell, tmp_path: Path) -> None:
    with capture_output() as captured:
        result = shell.run_cell(f"import rebeca_ray as rr\nrr.fit_prior('{tmp_path}/absent.yaml')")
    assert not result.success
    text = re.sub(r"\x1b\[[\d;]*m", "", captured.stdout + captured.stderr)
    assert text.strip() == (
        f"InputError: config {tmp_path}/absent.yaml: cannot be read (No such file or directory); "
        "give an existing YAML file to --config"
    )


def test_a_function_logs_unless_the_program_set_up_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    package = logging.getLogger(log.PACKAGE)
    package.handlers = []
    with pytest.raises(rr.UserError):
        rr.embed("absent.yaml")
    assert package.handlers == []  # the test run's own handler
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with pytest.raises(rr.UserError):
        rr.embed("absent.yaml")
    assert [type(handler) for handler in package.handlers] == [log.StandardError]


def test_every_public_name_loads_has_a_docstring_and_is_known_to_type_checkers() -> None:
    tree = ast.parse((REPO / "rebeca_ray" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.asname: node.module
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == rr._PUBLIC
    for name in rr.__all__:
        assert getattr(rr, name).__doc__, name
        # A module of the same name would take its place once it is imported.
        assert not (REPO / "rebeca_ray" / name).exists(), name
        assert not (REPO / "rebeca_ray" / f"{name}.py").exists(), name
    for name in ("embed", "fit_prior", "sample", "decode", "generate"):
        assert f"rr.{name}(" in getattr(rr, name).__doc__  # an example


def test_type_checkers_see_the_types_of_public_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = true\n"
        "[mypy-torch.*,ray.*,numpy.*,pandas.*,polars.*,pyarrow.*,diffusers.*,transformers.*,PIL.*,fsspec.*,"
        "scipy.*,yaml.*]\nfollow_imports = skip\nignore_missing_imports = true\n"  # for speed
    )
    snippet = tmp_path / "snippet.py"
    snippet.write_text(
        "import rebeca_ray as rr\n"
        "reveal_type(rr.fit_prior('train.yaml', 'run_name=a').folder)\n"
        "reveal_type(rr.read_catalog('catalog').show(['ann'])[:3])\n"
        "rr.sample('sample.yaml', users=3)\n"
        "rr.absent\n"
    )
    monkeypatch.setenv("MYPYPATH", str(REPO))
    options = ["--config-file", str(tmp_path / "mypy.ini"), "--follow-imports", "silent"]
    out, _, code = api.run([*options, "--cache-dir", str(tmp_path / "cache"), str(snippet)])
    lines = [line.partition("snippet.py:")[2] for line in out.splitlines()]
    assert code == 1
    assert lines[:3] == [
        '2: note: Revealed type is "str"',
        '3: note: Revealed type is "rebeca_ray.inline.Images"',
        '4: error: Argument "users" to "sample" has incompatible type "int"; '
        'expected "Sequence[str] | None"  [arg-type]',
    ]
