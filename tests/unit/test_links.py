"""Links in what people read: each leads somewhere. ``make docs`` checks the site's own, but not the README's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
#: Made from the code by ``make docs``, which looks at them itself.
_MADE = {"commands.md", "configuration.md", "json.md"}
_PAGES = [_ROOT / "README.md", _ROOT / "CHANGELOG.md"]
_PAGES += [page for page in sorted((_ROOT / "docs").rglob("*.md")) if page.name not in _MADE]


def _prose(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def _anchors(page: Path) -> set[str]:
    """Return the names of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", _prose(page), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def _dead(page: Path) -> list[str]:
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if re.match(r"\w+:", link) or target.name in _MADE:
            continue
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in _anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: str(page.relative_to(_ROOT)))
def test_every_link_leads_somewhere(page):
    """To a file that is there, and to a heading that it has."""
    assert _dead(page) == []


def test_a_link_that_leads_nowhere_is_seen(tmp_path):
    """Be it to no file, or to no heading of one."""
    page = tmp_path / "page.md"
    page.write_text("# One `two`\n[a](#one-two) [b](#three) [c](none.md) [d](https://example.com)\n```\n[e](x)\n```\n")
    assert _dead(page) == ["#three", "none.md"]
