"""The repository's Markdown and notebooks -> the pages of the site: hooks of MkDocs, which mkdocs.yml names."""

import importlib.util
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
CONTENT = (
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "mlflow/README.md", "recipes/README.md"),
    *(f"docs/**/*.{suffix}" for suffix in ("md", "ipynb", "png", "css")),
)
"""What of the repository is on the site, with the links between these files as they are."""
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")
MERMAID = "assets/mermaid.js"
DIAGRAM = re.compile(r'<pre class="mermaid">.*?</pre>', re.DOTALL)


class Notebook(File):
    """A notebook that becomes a page."""

    def is_documentation_page(self) -> bool:
        """Return True, although the file is not Markdown."""
        return True


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Replace each pattern in the navigation by the files that match it."""
    config.nav = expand(config.nav)
    return config


def expand(entry: Any) -> Any:  # noqa: ANN401  # the navigation is lists, dicts and strings within each other
    """Replace patterns in a part of the navigation; a list takes up the files of a pattern in it."""
    if isinstance(entry, dict):
        return {title: expand(part) for title, part in entry.items()}
    if isinstance(entry, list):
        parts = [expand(part) for part in entry]
        return [inner for part in parts for inner in (part if isinstance(part, list) else [part])]
    return matching(entry) if "*" in entry else entry


def matching(pattern: str) -> list[str]:
    """Paths in the repository, by name; Jupyter's own copies of notebooks are left out."""
    paths = [path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern)]
    return sorted(path for path in paths if "/." not in path)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take the content from the whole repository; addresses on the site are without docs/."""
    theirs = [file for file in files if file.src_dir != config.docs_dir]
    ours = [site_file(path, config) for pattern in CONTENT for path in matching(pattern)]
    return Files([*theirs, *ours, mermaid_script(config)])


def site_file(path: str, config: MkDocsConfig) -> File:
    """The file under its path in the repository, so that relative links hold on the site as they do there."""
    kind = Notebook if path.endswith(".ipynb") else File
    address = kind(path.removeprefix("docs/"), None, config.site_dir, use_directory_urls=False).dest_uri
    file = kind(path, str(ROOT), config.site_dir, use_directory_urls=False, dest_uri=address)
    if kind is Notebook:
        file.content_string = notebook_to_markdown(file.content_string)
    return file


def mermaid_script(config: MkDocsConfig) -> File:
    """Mermaid itself, from an installed package, because the theme would load it from another host."""
    spec = importlib.util.find_spec("mermaidx")
    assert spec is not None
    assert spec.origin is not None
    return File("assets/mermaid.js", str(Path(spec.origin).parent), config.site_dir, False, dest_uri=MERMAID)  # noqa: FBT003


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Make the page's links to what is not on the site lead to the first page below, or name the path in words."""
    if page.file.src_uri == "README.md":
        page.meta["hide"] = ["navigation"]  # one entry, which is the page itself
    return LINK.sub(lambda link: site_link(link, page.file.src_uri, files), markdown)


def site_link(link: re.Match[str], source: str, files: Files) -> str:
    """A link from the file `source` as it stands on the site; MkDocs refuses what is not in the repository."""
    words, target, anchor = link.groups()
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if files.get_file_from_path(path) or not (ROOT / path).exists():
        return link[0]
    below = next((file.src_uri for file in files.documentation_pages() if file.src_uri.startswith(f"{path}/")), None)
    if below:
        return f"[{words}]({posixpath.relpath(below, posixpath.dirname(source) or '.')}{anchor or ''})"
    return f"`{path}`" if words.strip("`") == path else f"{words} (`{path}`)"


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:  # noqa: ARG001
    """Load Mermaid on the pages that have a diagram, and let wide diagrams scroll."""
    wrapped, count = DIAGRAM.subn(r'<div class="diagram">\g<0></div>', output)
    if not count:
        return output
    address = posixpath.relpath(MERMAID, posixpath.dirname(page.file.dest_uri) or ".")
    return wrapped.replace("</head>", f'<script src="{address}"></script>\n</head>', 1)


def notebook_to_markdown(text: str) -> str:
    """Cells and their outputs in order; pictures become part of the page."""
    return "\n\n".join(part for cell in json.loads(text)["cells"] for part in cell_to_markdown(cell))


def cell_to_markdown(cell: dict[str, Any]) -> list[str]:
    """Text as it is; code and what it printed or drew as blocks."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [source]
    return [f"```python\n{source}\n```", *(output_to_markdown(output) for output in cell["outputs"])]


def output_to_markdown(output: dict[str, Any]) -> str:
    """A picture as an image with its data, everything else as text."""
    data = output.get("data", {})
    if "image/png" in data:
        return f'<img alt="output of the cell above" src="data:image/png;base64,{data["image/png"].strip()}">'
    return f"```text\n{''.join(output.get('text') or data['text/plain']).rstrip()}\n```"
