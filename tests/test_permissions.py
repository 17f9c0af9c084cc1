"""What the log and doctor say of files that may not be used."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rigs.ctl_runner import run_ctl
from rigs.processes import ServerFactory

from etcdlite import config, datadir, permissions
from etcdlite.cli import machine as machine_module
from etcdlite.cli.findings import ERROR, Facts, examine
from etcdlite.errors import MayPass
from etcdlite.storage.disk import Disk

NOBODY = 65534


def as_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)


def test_the_owner_and_the_command_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, user = permissions.user_name(os.getuid()), permissions.user_name(NOBODY)
    failure = PermissionError(errno.EACCES, "Permission denied")
    told = permissions.remedy(failure, str(tmp_path))
    assert told.endswith(f"this process runs as {own}. As root: chmod -R u+rwX {tmp_path}")
    as_nobody(monkeypatch)
    told = permissions.remedy(failure, str(tmp_path))
    assert told == (
        f"{tmp_path} belongs to {own}, and this process runs as {user}. As root: "
        f"chown -R {user}: {tmp_path}"
    )
    # What others use is not given away.
    told = permissions.remedy(failure, f"{tmp_path}/a")
    assert told.endswith(f"As root: mkdir {tmp_path}/a; chown {user}: {tmp_path}/a")
    assert permissions.user_name(123456) == "123456"


def test_a_directory_that_is_closed_is_named_and_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_nobody(monkeypatch)
    real = os.stat

    def stat(path: Any, **named: Any) -> os.stat_result:
        if str(path).startswith(f"{tmp_path}/"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path, **named)

    failure = PermissionError(errno.EACCES, "Permission denied")
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", stat)
        told = permissions.remedy(failure, f"{tmp_path}/member/wal")
    user = permissions.user_name(NOBODY)
    assert told.startswith(f"{tmp_path} belongs to ")
    assert f"As root: chown -R {user}: {tmp_path} if " in told and "mkdir" not in told
    tmp_path.chmod(0)  # What systemd puts in place of /home and /root.
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", stat)
        told = permissions.remedy(failure, f"{tmp_path}/member/wal")
    assert "ProtectHome=" in told and "chown" not in told and "chmod" not in told


def test_a_mode_says_who_may_read(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    mine = (os.getuid(), os.getgid())
    for mode, may in ((0o600, (True, False, False)), (0o640, (True, True, False)),
                      (0o604, (True, False, True)), (0o044, (False, True, True))):  # fmt: skip
        file.chmod(mode)
        who = (mine, (NOBODY, mine[1]), (NOBODY, NOBODY))
        assert tuple(permissions.may_read(str(file), *one) for one in who) == may, oct(mode)
    for mode, may in ((0o700, (True, False, False)), (0o710, (True, True, False)),
                      (0o744, (True, False, False)), (0o701, (True, False, True))):  # fmt: skip
        tmp_path.chmod(mode)
        assert tuple(permissions.may_read(str(tmp_path), *one) for one in who) == may, oct(mode)


class RefusingDisk(Disk):
    def __init__(self, failure: OSError) -> None:
        super().__init__()
        self._failure = failure

    def lock(self, path: str) -> object:  # type: ignore[override]
        self._failure.filename = path
        raise self._failure


@pytest.mark.parametrize(
    "number, says", [(errno.EACCES, "As root: "), (errno.EROFS, "ReadWritePaths="), (5, "Correct ")]
)
def test_a_start_says_what_to_do_about_the_data_directory(
    number: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    as_nobody(monkeypatch)
    disk = RefusingDisk(OSError(number, os.strerror(number)))
    with pytest.raises(MayPass) as raised:
        datadir.lock(datadir.Home(disk, "data"))
    assert f"cannot use data directory {tmp_path}/data: " in str(raised.value)
    assert says in str(raised.value) and "data/lock" not in str(raised.value)


OF_ANOTHER = """
import os, sys
real = os.open
def refuse(path, *rest, **named):
    if str(path).endswith(".wal"):
        raise PermissionError(13, "Permission denied", path)
    return real(path, *rest, **named)
os.open = refuse
os.geteuid = lambda: 65534
from etcdlite.__main__ import main
sys.exit(main())
"""


def test_a_file_of_another_user_stops_a_start_with_the_remedy(server: ServerFactory) -> None:
    one = server()
    one.stop()
    one.program = [sys.executable, "-c", OF_ANOTHER]
    one.spawn()
    assert one.wait() == 1
    user = permissions.user_name(NOBODY)
    (wal,) = (one.data_dir / "member" / "wal").iterdir()
    assert f"cannot use {wal}: Permission denied. " in one.lines[-1]
    assert one.lines[-1].endswith(f"As root: chown -R {user}: {wal}")


def test_a_configuration_that_cannot_be_read_names_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    as_nobody(monkeypatch)
    monkeypatch.setattr(config, "open", refuse, raising=False)
    with pytest.raises(config.ConfigError) as raised:
        config.load(["--config", str(tmp_path / "c.toml")], {})
    assert f"Permission denied for user {permissions.user_name(NOBODY)}; " in str(raised.value)


def test_doctor_knows_the_user_of_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    monkeypatch.setattr(machine_module, "SERVICE_DIRECTORY", str(tmp_path / "service"))
    monkeypatch.setattr(machine_module, "SETTINGS", f"{tmp_path}/etc/")
    data = tmp_path / "service" / "m1.etcdlite"
    data.mkdir(parents=True, mode=0o700)
    os.chown(tmp_path / "service", NOBODY, NOBODY)
    file = tmp_path / "etc" / "etcdlite.toml"
    file.parent.mkdir()
    file.write_text('name = "m1"\nlisten-client-urls = ["http://127.0.0.1:0"]\n'
                    'listen-peer-urls = ["http://127.0.0.1:0"]\n')  # fmt: skip
    file.chmod(0o600)
    found = examine(Facts(0.0, machine=machine_module.look(str(file), is_named=True)))
    lines = [one.line for one in found]
    assert [one.severity for one in found] == [ERROR, ERROR], lines
    user = permissions.user_name(NOBODY)
    assert (
        f"the user {user} cannot read it; " in lines[0] and f"chgrp {user} {file} && " in lines[0]
    )
    assert f"chown -R --reference={tmp_path}/service {data}" in lines[1]
    file.chmod(0o644)
    os.chown(data, NOBODY, NOBODY)
    assert examine(Facts(0.0, machine=machine_module.look(str(file), is_named=True))) == []


def test_doctor_opens_every_file_of_the_settings_and_the_way_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As certbot lays them out: links in a closed directory to files in another one."""
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    settings = tmp_path / "etc"
    monkeypatch.setattr(machine_module, "SERVICE_DIRECTORY", str(tmp_path / "service"))
    monkeypatch.setattr(machine_module, "SETTINGS", f"{settings}/")
    (tmp_path / "service").mkdir()
    os.chown(tmp_path / "service", NOBODY, NOBODY)
    for name in ("live", "archive"):
        (settings / name / "m1").mkdir(parents=True)
        (settings / name).chmod(0o700)
    defaults = config.load(["--config", os.devnull], {})
    named = {
        flag: settings / "live" / "m1" / flag
        for flag in defaults._fields
        if flag.endswith("_file") and flag != "backup_status_file"
    }
    for flag, link in named.items():
        (settings / "archive" / "m1" / flag).touch(0o600)
        link.symlink_to(f"../../archive/m1/{flag}")
    closed = defaults._replace(**{flag: str(link) for flag, link in named.items()})
    machine = machine_module.Machine("")
    machine_module._look_at_access(machine, closed)
    user = permissions.user_name(NOBODY)
    told = {line.partition(": ")[0]: line.rpartition("; ")[2] for line in machine.problems}
    assert set(told) == set(map(str, named.values()))
    link = named["key_file"]
    places = f"{settings}/archive {settings}/live {link}"
    assert told[str(link)] == f"chgrp {user} {places} && chmod g+rX {places}"
    for place in (settings / "archive", settings / "live", *named.values()):
        os.chown(place, 0, NOBODY)
        place.chmod(0o750 if place.is_dir() else 0o640)
    machine.problems.clear()
    machine_module._look_at_access(machine, closed)
    assert machine.problems == []


def test_a_member_that_was_renamed_is_warned_about(server: ServerFactory, tmp_path: Path) -> None:
    one = server(data_dir=tmp_path / "old.etcdlite")
    assert not one.logged("data of other names")
    one.stop()
    one.start(data_dir=tmp_path / "new.etcdlite")
    line = one.wait_for_log("there is data of other names beside it")
    assert f"data-dir={tmp_path}/new.etcdlite" in line and "beside=old.etcdlite" in line
    one.stop()
    count = len(one.lines)
    one.start()
    assert not any("data of other names" in line for line in one.lines[count:])


def test_the_closed_directory_of_another_user_is_not_called_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can be seen in it, so nothing is known of what it holds."""
    as_nobody(monkeypatch)
    monkeypatch.setattr(os, "access", lambda *_: False)
    ended = run_ctl("defrag", "--data-dir", str(tmp_path))
    assert ended.status == 1
    owner = permissions.user_name(os.getuid())
    assert f"{tmp_path} belongs to user {owner}; run this as that user" in ended.stderr


def test_a_log_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "etcdlite", f"--log-outputs={tmp_path}"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr == (
        f"etcdlite: log-outputs: {tmp_path}: Is a directory; name a writable file\n"
    )
