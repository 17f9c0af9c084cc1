"""The command `etcdlite`: parse the arguments, start the server, report how it ended.

A failure is one FATAL line in the log. At the log level debug its traceback precedes that line.

The rest of the program is imported in `main`, after it has begun to handle signals: a signal during
the start ends the process without a traceback.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    """Run the command. The exit status: 0 stopped as asked, 1 failed, 2 no start helps."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _end)  # Until the server handles them.
    # Held back until the server handles it: it would end the process.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGHUP,))
    # Imports make many objects and no garbage. `Server.run` enables the collector.
    gc.disable()
    import etcdlite
    from etcdlite import config, flags, log

    def load() -> config.Config:
        return _load(sys.argv[1:] if argv is None else argv, environ or os.environ)

    try:
        settings = load()
    except config.ConfigError as failure:
        for line in (*failure.warnings, *failure.problems):
            print(f"etcdlite: {line}", file=sys.stderr)
        return 2
    if settings.action == "help":
        return _print(flags.help_text())
    if settings.action == "version":
        api = etcdlite.ETCD_API_VERSION
        return _print(f"etcdlite Version: {etcdlite.__version__}\netcd API: {api}")
    if settings.action == "check-config":
        problems = config.check_files(settings) or _check_contents(settings)
        for line in (*settings.warnings, *problems):
            print(f"etcdlite: {line}", file=sys.stderr)
        if problems:
            return 2
        return _print("etcdlite: the configuration is good")
    from etcdlite import hardening

    hardening.protect_process()
    try:
        log.configure(settings.log_level, settings.log_format, settings.log_outputs)
    except OSError as failure:
        why = f"log-outputs: {failure.filename}: {failure.strerror}; name a writable file"
        print(f"etcdlite: {why}", file=sys.stderr)
        return 1
    for line in settings.warnings:
        log.warn(line)
    log.info(
        "starting etcdlite server",
        etcdlite_version=etcdlite.__version__,
        python_version=sys.version.split()[0],
        name=settings.name,
        data_dir=settings.data_dir,
    )
    try:
        from etcdlite.server import Server

        server = Server(settings, load)
        server.start()
        return server.run()
    except Exception as failure:
        return _report(failure)


def _print(text: str) -> int:
    """Print on standard output. The exit status: 1 if that failed."""
    try:
        print(text, flush=True)
    except OSError as failure:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would complain about it at exit.
        if not isinstance(failure, BrokenPipeError):
            print(f"etcdlite: cannot write to standard output: {failure}", file=sys.stderr)
        return 1
    return 0


def _load(argv: Sequence[str], environ: Mapping[str, str]) -> Any:
    """The settings. Raises ConfigError."""
    from etcdlite import config

    settings = config.load(
        argv, environ, has_member=lambda data_dir: os.path.isdir(f"{data_dir}/member")
    )
    # The log names these paths, and its readers do not know the working directory.
    data_dir = os.path.abspath(settings.data_dir)
    wal_dir = settings.wal_dir and os.path.abspath(settings.wal_dir)
    if wal_dir:
        from etcdlite import datadir

        wal_dir = datadir.separate_wal_dir(data_dir, wal_dir)
    return settings._replace(data_dir=data_dir, wal_dir=wal_dir)


def _end(signum: int, frame: object) -> None:
    """End the process at once, by the signal itself."""
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)
    os._exit(128 + signum)  # The first process of a container does not get unhandled signals.


def _report(failure: Exception) -> int:
    """Log why the process ends. Returns its exit status."""
    import errno
    import traceback

    from etcdlite import log
    from etcdlite.errors import Explained, MayPass
    from etcdlite.permissions import NOT_ALLOWED, remedy
    from etcdlite.storage.disk import FILE_SIZE_REMEDY, NO_SPACE
    from etcdlite.threads import DiskFailed

    for line in "".join(traceback.format_exception(failure)).splitlines():
        log.debug(line)
    cause = failure.__cause__ if isinstance(failure, DiskFailed) else failure
    status = 1
    if isinstance(cause, Explained):
        log.fatal(str(cause))
        return 1 if isinstance(cause, MayPass) or cause is not failure else 2
    number = cause.errno if isinstance(cause, OSError) else None
    if number == errno.EFBIG:
        why = (
            f"a file may not grow; nothing acknowledged is lost. To start again, {FILE_SIZE_REMEDY}"
        )
    elif number in NO_SPACE:
        why = "the disk is full; nothing acknowledged is lost. Free some space and start again"
    elif number in (errno.EMFILE, errno.ENFILE):
        why = (
            "too many open files; nothing acknowledged is lost. Raise the limit (LimitNOFILE= of "
            "systemd, ulimit -n) and start again"
        )
    elif (
        isinstance(cause, MemoryError) or number == errno.ENOMEM or "start new thread" in str(cause)
    ):
        why = (
            "out of memory, or of threads; nothing acknowledged is lost. Raise the limit "
            "(MemoryMax= or TasksMax= of systemd, ulimit), or add memory, and start again"
        )
    elif isinstance(cause, OSError) and cause.filename and number in NOT_ALLOWED:
        path = str(cause.filename)
        log.fatal(f"cannot use {os.path.abspath(path)}: {cause.strerror}. {remedy(cause, path)}")
        return 1
    elif isinstance(cause, OSError) and cause.filename and number in (errno.ENOENT, errno.ESTALE):
        why = (
            "a file or directory of this member is gone: removed, or its file system unmounted; "
            "stopping, because what is written now would be lost. Bring it back and start again, "
            "or replace this member; a member alone needs a backup"
        )
    elif isinstance(cause, OSError) and (isinstance(failure, DiskFailed) or number == errno.EIO):
        why = (
            "the disk failed; stopping, because it is not known what it holds now. See dmesg; "
            "start again when the disk works, or replace this member"
        )
    elif isinstance(cause, OverflowError) and "timestamp" in str(cause):
        why = "the clock of this machine is beyond the year 2262. Set it and start again"
    elif isinstance(cause, OSError):
        why = "the operating system refused what the server cannot do without"
    elif isinstance(cause, ModuleNotFoundError) and not str(cause.name).startswith("etcdlite"):
        name = str(cause.name).partition(".")[0]
        status = 2 if cause is failure else 1
        why = (
            f"a setting needs the Python module {name}, which is not installed. Install it, on "
            f"Debian with 'apt install python3-{name}'"
        )
    else:
        why = "a fault in etcdlite; stopping. Please report it with this line"
    frame = traceback.extract_tb(cause.__traceback__)[-1:] if cause is not None else []
    where = "".join(f"{os.path.basename(at.filename)}:{at.lineno}" for at in frame)
    text = str(cause) if isinstance(cause, OSError) else f"{type(cause).__name__}: {cause}"
    log.fatal(why, error=text, where=where)
    return status


def _check_contents(settings: Any) -> list[str]:
    """What a start would refuse in the directories, the TLS files and the key files."""
    from etcdlite import channels, datadir, keys
    from etcdlite.errors import Explained
    from etcdlite.server import load_tokens
    from etcdlite.storage.disk import Disk

    home = datadir.Home(Disk(), settings.data_dir, settings.wal_dir)
    problems = channels.check(settings)
    try:
        datadir.check_contents(home, settings.own_files)
        keys.check_start(home._replace(keys=keys.read(settings.encryption_key_file)))
        load_tokens(settings)
    except (Explained, OSError) as failure:
        problems.append(str(failure))
    return problems


if __name__ == "__main__":
    sys.exit(main())
