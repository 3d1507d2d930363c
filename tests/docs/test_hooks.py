"""What the hooks of MkDocs make of the repository's files."""

import re
from pathlib import Path

import nbformat
import pytest
from mkdocs.config.base import load_config
from mkdocs.structure.files import Files

from docs.hooks import LINK, ROOT, matching, notebook_to_markdown, on_config, on_files, site_link
from docs.run_notebooks import NOTEBOOKS


@pytest.fixture(scope="module")
def config():
    """The configuration of the site, with patterns in its navigation."""
    return load_config(str(ROOT / "mkdocs.yml"))


@pytest.fixture(scope="module")
def site_files(config):
    """Every file of the site but the theme's."""
    return on_files(Files([]), config)


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("[guide](../metrics.md#fid)", "[guide](../metrics.md#fid)"),
        ("[start](../../README.md)", "[start](../../README.md)"),
        ("[notebook](../notebooks/prune-from-python.ipynb)", "[notebook](../notebooks/prune-from-python.ipynb)"),
        ("[the criteria](../../stages/importance/criteria.py)", "the criteria (`stages/importance/criteria.py`)"),
        ("[`dvc.yaml`](../../dvc.yaml)", "`dvc.yaml`"),
        ("[presets](../../recipes/presets)", "presets (`recipes/presets`)"),
        ("[decisions](../adr)", "[decisions](../adr/0001-one-name-per-stage.md)"),
        ("[gone](../gone.md)", "[gone](../gone.md)"),
        ("[elsewhere](https://example.org/x)", None),
        ("![picture](../../stages/picture.png)", None),
    ],
)
def test_a_link_leads_to_a_page_or_names_the_file(site_files, link, expected):
    """Pages stay linked, folders lead to their first page, code is named; MkDocs refuses what is not there."""
    found = LINK.fullmatch(link)

    assert (found and site_link(found, "docs/how-to/extend.md", site_files)) == expected


def test_the_site_holds_every_page_under_its_path(site_files):
    """The README is the home, docs/ is no part of an address, and two files never share one."""
    addresses = {file.src_uri: file.dest_uri for file in site_files}

    assert addresses["README.md"] == "index.html"
    assert addresses["docs/adr/0001-one-name-per-stage.md"] == "adr/0001-one-name-per-stage.html"
    assert addresses["docs/notebooks/prune-from-python.ipynb"] == "notebooks/prune-from-python.html"
    assert len(set(addresses.values())) == len(addresses)
    assert {path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md")} <= set(addresses)


def test_patterns_in_the_navigation_are_replaced(config):
    """Each by the files that match it, in the order of their names."""
    entries = str(on_config(config).nav)

    assert "*" not in entries
    decisions = matching("docs/adr/*.md")
    assert len(decisions) > 20
    assert re.findall(r"docs/adr/[^']+", entries) == decisions


def test_the_overview_of_the_api_leads_to_each_of_its_pages():
    """And the menu too, by a pattern."""
    pages = {Path(path).name for path in matching("docs/api/*.md")} - {"README.md"}

    assert (
        set(re.findall(r"^\| \[[^]]+\]\(([^)]+)\)", (ROOT / "docs/api/README.md").read_text(), re.MULTILINE)) == pages
    )


def test_a_notebook_becomes_text_code_and_outputs():
    """In order; a picture is part of the page, so that nothing has to be loaded."""
    cells = [nbformat.v4.new_markdown_cell("# Title"), nbformat.v4.new_code_cell("print(1)")]
    cells[1].outputs = [
        nbformat.v4.new_output("stream", name="stdout", text="1\n"),
        nbformat.v4.new_output("display_data", {"image/png": "AAAA\n", "text/plain": "<Image>"}),
        nbformat.v4.new_output("execute_result", {"text/plain": "'x'"}),
    ]
    text = notebook_to_markdown(nbformat.writes(nbformat.v4.new_notebook(cells=cells)))

    assert text.split("\n\n") == [
        "# Title",
        "```python\nprint(1)\n```",
        "```text\n1\n```",
        '<img alt="output of the cell above" src="data:image/png;base64,AAAA">',
        "```text\n'x'\n```",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_with_what_it_showed(path: Path):
    """Its cells have run without an error, and no path of a machine, time or id is in it."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]

    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert {output.output_type for cell in code for output in cell.outputs} == {"stream", "execute_result"}
    assert all(output.get("name", "stdout") == "stdout" for cell in code for output in cell.outputs)
    assert not re.search(r"/(home|root|work|tmp|Users)/", path.read_text())
