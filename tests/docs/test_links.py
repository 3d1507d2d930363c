"""Links of the pages: each relative one leads to a file of the repository, and its anchor to a heading there."""

import re
from urllib.parse import urlsplit

import pytest

from tests.markdown import FENCE, ROOT, pages

LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def anchors(text):
    """Return the names of the headings as GitHub makes them: lower case, no punctuation, hyphens for blanks."""
    titles = HEADING.findall(FENCE.sub("", text))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", pages())
def test_every_link_leads_somewhere(page):
    """A how-to links to pages of docs/ alone, so that the site has them."""
    for link in LINK.findall(FENCE.sub("", (ROOT / page).read_text())):
        target = urlsplit(link)
        if target.scheme:
            continue
        path = (ROOT / page).parent / target.path if target.path else ROOT / page
        assert path.exists(), f"{page}: {link}"
        if target.fragment:
            assert target.fragment in anchors(path.read_text()), f"{page}: {link}"
        if page.startswith("docs/how-to/"):
            assert path.resolve().is_relative_to(ROOT / "docs"), f"{page}: {link}"
