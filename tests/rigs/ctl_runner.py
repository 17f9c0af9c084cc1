"""Runs etcdlite-ctl in this process, as the shell would."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

from etcdlite import ctl


class Ended(NamedTuple):
    status: int
    stdout: bytes
    stderr: str


@contextlib.contextmanager
def _standard_files(stdin: bytes) -> Iterator[tuple[io.BytesIO, io.StringIO]]:
    stdout, stderr = io.BytesIO(), io.StringIO()
    with (
        mock.patch("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin))),
        mock.patch("sys.stdout", io.TextIOWrapper(stdout, write_through=True)),
        mock.patch("sys.stderr", stderr),
    ):
        yield stdout, stderr


def run_ctl(*words: str, stdin: bytes = b"", environ: dict[str, str] | None = None) -> Ended:
    """`etcdlite-ctl WORDS`, with none of this process's ETCD variables."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ETCD")}
    with (
        mock.patch.dict(os.environ, {**clean, **(environ or {})}, clear=True),
        _standard_files(stdin) as (stdout, stderr),
    ):
        status = ctl.main(list(words))
        return Ended(status, stdout.getvalue(), stderr.getvalue())
