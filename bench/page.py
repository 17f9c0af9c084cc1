"""The page of figures: each table on it stands between two comments, and the command that made it
writes it again."""

from __future__ import annotations

from pathlib import Path


def write_sections(page: Path, sections: dict[str, str]) -> None:
    """Replace what stands between `<!-- bench:NAME -->` and `<!-- end -->` by each section."""
    text = page.read_text()
    for name, body in sections.items():
        before, begin, rest = text.partition(f"<!-- bench:{name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not end:
            raise SystemExit(f"bench: {page} has no section {name}")
        text = before + begin + body + "\n" + end + after
    page.write_text(text)
