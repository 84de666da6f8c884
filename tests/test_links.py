"""Relative links and anchors of README and docs lead somewhere; their tables have phrases for cells."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EVERYWHERE = [*PAGES, *(page for name in (".", "benchmarks", "experiments", "findings") for page in (ROOT / name).glob("*.md"))]
LONGEST_CELL = 160


def prose(page: Path) -> str:
    """Without what is code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Those that GitHub gives headings: lower case, without punctuation, blanks as hyphens, repeats numbered."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE):
        words = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).strip().lower()
        name = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.add(next(x for x in (name, *(f"{name}-{i}" for i in range(1, 99))) if x not in found))
    return found


def broken(page: Path) -> list[str]:
    """Links of a page to files or headings that are not there."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(page))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    text = "# One, *two*\n## One `two`\n[a](#one-two) [b](#one-two-1) [c](page.md#one-two) [d](https://x.org/#y)\n"
    page.write_text(f"{text}```\n# no heading\n[not](a-link)\n```\n[e](#no-heading) [f](other.md) [g](page.md#three)\n")
    assert broken(page) == ["#no-heading", "other.md", "page.md#three"]


@pytest.mark.parametrize("page", dict.fromkeys(EVERYWHERE), ids=lambda page: f"{page.parent.name}/{page.name}")
def test_cells_are_phrases(page: Path) -> None:
    rows = [line for line in prose(page).splitlines() if line.startswith("|")]
    assert [cell for row in rows for cell in row.split("|") if len(cell.strip()) > LONGEST_CELL] == []


def test_every_page_is_in_the_table_of_contents() -> None:
    readme = PAGES[0].read_text()
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in readme] == []
