"""The tables of docs/configuration.md, made from the flags.

PYTHONPATH=.:tests python -m rigs.flag_tables      rewrites them
"""

from __future__ import annotations

import re
from pathlib import Path

from etcdlite import flags

PAGE = Path(__file__).parent.parent.parent / "docs" / "configuration.md"


def _table(header: str, rows: list[str]) -> str:
    rule = "|".join("---" for _ in header.strip("|").split("|"))
    return "\n".join([header, f"|{rule}|", *rows, ""])


def _default(flag: flags.Flag) -> str:
    return f"`{flag.default}`" if flag.default else ""


def tables() -> dict[str, str]:
    """The table under each heading."""
    found = {}
    for group, members in flags.GROUPS.items():
        rows = [f"| `{f.name}` | {f.kind.metavar} | {_default(f)} | {f.text} |" for f in members]
        found[f"### {group}"] = _table("| flag | value | default | what it does |", rows)
    for heading, status in (("## Without effect", flags.NO_EFFECT), ("## Refused", flags.REFUSED)):
        others = [flag for flag in flags.OTHERS if flag.status == status]
        rows = [f"| `{flag.name}` | {_default(flag)} | {flag.text} |" for flag in others]
        found[heading] = _table("| flag | default | why |", rows)
    return found


def with_tables(text: str) -> str:
    """The page with its tables regenerated. Raises AssertionError if it lacks a heading."""
    for heading, table in tables().items():
        pattern = re.compile(rf"(^{re.escape(heading)}\n(?:(?!#|\|).*\n)*)(?:\|.*\n)+", re.M)
        assert pattern.search(text), f"docs/configuration.md has no table under {heading!r}"
        text = pattern.sub(lambda match, table=table: match[1] + table, text)
    return text


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
