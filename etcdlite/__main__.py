"""The command `etcdlite`: parse the arguments, start the server, say how it ended."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Mapping, Sequence

import etcdlite
from etcdlite import config, log
from etcdlite.datadir import StartError
from etcdlite.server import Server
from etcdlite.storage.data import DataDamaged
from etcdlite.threads import DiskFailed
from etcdlite.wal import WALError


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    """The command `etcdlite`. The exit status: 0 stopped as asked, 1 failed, 2 wrong use."""
    try:
        settings = config.load(sys.argv[1:] if argv is None else argv, environ or os.environ)
    except config.ConfigError as failure:
        for line in (*failure.warnings, *failure.problems):
            print(f"etcdlite: {line}", file=sys.stderr)
        return 2
    if settings.action == "help":
        print(config.help_text())
        return 0
    if settings.action == "version":
        print(f"etcdlite Version: {etcdlite.__version__}\netcd API: {etcdlite.ETCD_API_VERSION}")
        return 0
    if settings.action == "check-config":
        for line in settings.warnings:
            print(f"etcdlite: {line}", file=sys.stderr)
        print("etcdlite: the configuration is good")
        return 0
    try:
        log.configure(settings.log_level, settings.log_format, settings.log_outputs)
    except OSError as failure:
        print(f"etcdlite: cannot open log output: {failure}", file=sys.stderr)
        return 1
    for line in settings.warnings:
        log.warn(line)
    log.info(
        "starting etcdlite server",
        **{
            "etcdlite-version": etcdlite.__version__,
            "python-version": sys.version.split()[0],
            "name": settings.name,
            "data-dir": settings.data_dir,
        },
    )
    server = Server(settings)
    try:
        server.start()
        return server.run()
    except (StartError, DataDamaged, WALError) as failure:
        log.fatal(str(failure))
        return 1
    except DiskFailed as failure:
        log.fatal(
            "the disk failed; stopping, because nobody knows what it holds now",
            error=str(failure),
        )
        return 1
    except OSError as failure:
        if failure.errno == errno.ENOSPC:
            why = "the disk is full; nothing acknowledged is lost. Free some space and start again"
        else:
            why = "the operating system refused what the server cannot do without"
        log.fatal(why, error=str(failure))
        return 1


if __name__ == "__main__":
    sys.exit(main())
