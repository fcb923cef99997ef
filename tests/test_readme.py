"""The documents: what they link to is there."""

import re

import pytest
from conftest import ROOT

DOCUMENTS = (
    "README.md",
    *sorted(f"results/{path.name}" for path in (ROOT / "results").glob("*.md") if path.name != "tables.md"),
)


def anchors(path):
    """The places of a document that a link can name: GitHub's, of its headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_leads_somewhere(name):
    document = ROOT / name
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()) if not link.startswith("http")]
    lost = []
    for link in links:
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert links and not lost
