"""Other users of the machine get neither the files of a member nor its memory."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import stat
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from rigs.ctl_runner import run_ctl
from rigs.processes import ROOT, ServerProcess

from etcdlite import config, hardening, proto
from etcdlite.client.partial_file import PartialFile

PEER_TLS = ("--peer-cert-file=/c", "--peer-key-file=/k")
PEER_AUTH = ("--peer-client-cert-auth", "--peer-trusted-ca-file=/ca")

PROTECT = "from etcdlite import hardening; hardening.protect_process()"


def modes(*tops: Path) -> dict[str, int]:
    found = [path for top in tops for path in (top, *top.rglob("*"))]
    return {str(path): stat.S_IMODE(path.lstat().st_mode) for path in found}


def run(code: str, **options: object) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environ, **options)  # type: ignore[call-overload]


def test_a_member_closes_its_files_to_others(tmp_path: Path) -> None:
    data, wal, log = tmp_path / "data", tmp_path / "wal", tmp_path / "log"
    flags = (f"--wal-dir={wal}", f"--log-outputs=stderr,{log}")
    umask = os.umask(0)  # The server inherits it.
    try:
        server = ServerProcess(data, flags, [sys.executable, "-m", "etcdlite"])
        server.start()
        server.client().put("k", "v" * 1000)
        backup = tmp_path / "b.db"
        save = ("snapshot", "save", str(backup))
        assert run_ctl(f"--endpoints={server.endpoint}", *save).status == 0
        assert server.logged("modes are corrected") is None
        server.stop()
        for path, mode in modes(data, wal).items():
            assert mode == (0o700 if os.path.isdir(path) else 0o600), path
        assert not log.stat().st_mode & 0o077
        assert stat.S_IMODE(backup.stat().st_mode) == 0o600
        # As after a copy by someone careless.
        for path in modes(data, wal):
            os.chmod(path, 0o777 if os.path.isdir(path) else 0o666)
        (data / "member" / "link").symlink_to(backup)
        os.chmod(backup, 0o644)
        server.start()
        line = server.logged("modes are corrected")
        assert line is not None and str(data) in line
        server.stop()
        after = modes(data, wal)
        after.pop(str(data / "member" / "link"))
        assert not [path for path, mode in after.items() if mode & 0o077]
        assert stat.S_IMODE(backup.stat().st_mode) == 0o644, "not through a link"
    finally:
        os.umask(umask)
        server.close()


def test_a_shared_directory_keeps_its_mode(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "member").mkdir()
    os.chmod(tmp_path, 0o1777)
    os.chmod(tmp_path / "member", 0o755)
    hardening.close_files(str(tmp_path), "")
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o1777
    assert stat.S_IMODE((tmp_path / "member").stat().st_mode) == 0o700
    assert f"first={tmp_path}" in capfd.readouterr().err.splitlines()[-1]


def test_only_files_of_the_directory_are_closed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user who may write to the directory, before it is closed, puts links there."""
    data, foreign = tmp_path / "data", tmp_path / "foreign"
    peer = data / "fixtures" / "peer"
    for folder in (data / "member" / "wal", peer, data / "lost+found"):
        folder.mkdir(parents=True, mode=0o755)
    key, log, linked = peer / "key.pem", data / "member" / "wal" / "1.wal", data / "member" / "hard"
    for file in (foreign, key, log):
        file.write_text("x")
        file.chmod(0o644)
    os.link(foreign, linked)
    real = os.lstat

    def swapped(path: str, *, dir_fd: int | None = None) -> os.stat_result:
        """The file is replaced right after its mode was read."""
        result = real(path, dir_fd=dir_fd)
        if path == "1.wal" and not log.is_symlink():
            log.unlink()
            log.symlink_to(foreign)
        return result

    monkeypatch.setattr(os, "lstat", swapped)
    hardening.close_files(str(data), "")
    assert log.is_symlink()
    assert stat.S_IMODE(foreign.stat().st_mode) == 0o644
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(peer.stat().st_mode) == 0o700
    assert stat.S_IMODE((data / "lost+found").stat().st_mode) == 0o755, "not ours"
    *_, closed, remaining = capfd.readouterr().err.splitlines()
    assert f"first={data}" in closed
    assert f"first={linked}" in remaining and "files=2" in remaining


def test_no_file_gets_the_number_of_a_standard_stream_that_is_closed(tmp_path: Path) -> None:
    """The log would be written to it, and it would not be closed with the log."""
    found = tmp_path / "found"
    streams = "[os.readlink(f'/proc/self/fd/{n}') for n in range(3)]"
    show = f"open({str(found)!r}, 'w').write(str({streams}))"
    run(f"import os; os.closerange(0, 3); {PROTECT}; {show}")
    assert found.read_text() == str(["/dev/null"] * 3)


def test_the_process_is_not_dumped_and_new_files_are_its_users_alone(tmp_path: Path) -> None:
    done = run(
        f"{PROTECT}; import ctypes, os, resource; print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), "
        "resource.getrlimit(resource.RLIMIT_CORE)[0] <= 1, oct(os.umask(0)))"
    )
    assert done.stdout.split() == ["0", "True", "0o77"], done.stderr
    # Without ctypes the limit alone must do.
    hidden = "import sys; sys.modules['ctypes'] = None; "
    crash = "; import os, signal; os.kill(os.getpid(), signal.SIGABRT)"

    def dumps(code: str) -> bool:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: resource.setrlimit(
                resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2
            ),
        )
        _, status = os.waitpid(process.pid, 0)
        process.returncode = 0
        assert os.WTERMSIG(status) == signal.SIGABRT
        return os.WCOREDUMP(status)

    if not dumps("pass" + crash):
        pytest.skip("this system writes no core dumps")
    assert not dumps(PROTECT + crash)
    assert not dumps(hidden + PROTECT + crash)


def test_a_backup_is_not_written_into_a_file_that_waits_for_it(tmp_path: Path) -> None:
    backup, trap = tmp_path / "b.db", tmp_path / "trap"
    (tmp_path / "b.db.part").symlink_to(trap)
    with PartialFile(str(backup)) as file:
        file.write(b"secret")
    assert not trap.exists() and backup.read_bytes() == b"secret"
    (tmp_path / "b.db.part").touch(0o666)
    with PartialFile(str(backup)) as file:
        file.write(b"secret")
    assert stat.S_IMODE(backup.stat().st_mode) == 0o600


@pytest.mark.parametrize("later_fails", [False, True])
def test_two_processes_that_write_one_backup_leave_a_whole_one(
    tmp_path: Path, later_fails: bool
) -> None:
    backup = tmp_path / "b.db"
    backup.write_bytes(b"the one before")
    with contextlib.suppress(KeyboardInterrupt), ExitStack() as later:
        with (
            pytest.raises(FileExistsError, match="another process"),
            PartialFile(str(backup)) as file,
        ):
            file.write(b"earlier")
            late = later.enter_context(PartialFile(str(backup)))
            late.write(b"lat")
            late.flush()
        assert backup.read_bytes() == b"the one before"
        if later_fails:
            raise KeyboardInterrupt
        late.write(b"er")
    assert backup.read_bytes() == (b"the one before" if later_fails else b"later")
    assert [path.name for path in tmp_path.iterdir()] == ["b.db"]


@pytest.mark.parametrize(
    "flags, text",
    [
        ((), ""),
        (("--listen-peer-urls=http://127.0.0.5:2380",), ""),
        (("--listen-peer-urls=http://[::1]:2380",), ""),
        (("--listen-peer-urls=http://10.0.0.1:2380",), "use the address of a member"),
        (("--listen-peer-urls=http://0.0.0.0:2380",), "use the address of a member"),
        (("--listen-peer-urls=http://[::]:2380",), "use the address of a member"),
        (("--listen-peer-urls=http://0.0.0.0:2380", "--peer-address-check=false"), "anyone who"),
        (("--listen-peer-urls=http://0.0.0.0:2380", "--peer-secret-file=/secret"), ""),
        (("--listen-peer-urls=https://10.0.0.1:2380", *PEER_TLS), "use the address of a member"),
        (("--listen-peer-urls=https://10.0.0.1:2380", *PEER_TLS, *PEER_AUTH), ""),
    ],
)
def test_a_port_for_members_that_is_open_to_strangers_is_told_of(
    flags: tuple[str, ...], text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    urls = [flag for flag in flags if "urls" in flag and ("0.0.0.0" in flag or "[::]" in flag)]
    own = ("--initial-advertise-peer-urls=http://10.0.0.1:2380",) if urls else ()
    cluster = ("--initial-cluster=default=http://10.0.0.1:2380",) if urls else ()
    hardening.warn_of_open_peer_port(config.load([*flags, *own, *cluster], {}))
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == bool(text) and (not text or text in lines[0]), lines


def test_the_log_says_that_clients_have_the_ca_of_members(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "same", "other"):
        (tmp_path / name).write_text("other" if name == "other" else "one")

    def warns(peer_ca: str, *flags: str) -> bool:
        files = (f"--peer-{kind}-file={tmp_path / 'one'}" for kind in ("cert", "key"))
        own = (f"--{kind}-file={tmp_path / 'one'}" for kind in ("cert", "key", "trusted-ca"))
        url = "https://127.0.0.1:2380"
        hardening.warn_of_shared_ca(
            config.load(
                [
                    f"--peer-trusted-ca-file={tmp_path / peer_ca}",
                    f"--listen-peer-urls={url}",
                    f"--initial-advertise-peer-urls={url}",
                    f"--initial-cluster=default={url}",
                    *files,
                    *own,
                    *flags,
                ],
                {},
            )
        )
        return "have the same CA" in capfd.readouterr().err

    assert warns("one") and warns("same")
    assert not warns("other")
    assert not warns("none"), "a missing file is for others to report"
    assert not warns("one", "--peer-cert-allowed-cn=a,b")


def test_messages_do_not_show_their_secrets() -> None:
    for message in (
        proto.AuthenticateRequest(name="alice", password="hunter2"),
        proto.AuthUserAddRequest(name="alice", hashedPassword="hunter2"),
        proto.AuthenticateResponse(token="hunter2"),
        proto.User(name=b"alice", password=b"hunter2"),
    ):
        assert "hunter2" not in repr(message) and "<redacted>" in repr(message)
    messages = proto.Message.__subclasses__()
    listed = [f.name for m in messages for f in m.FIELDS if _is_secret(f.name)]
    assert set(listed) == proto.SECRETS


def _is_secret(name: str) -> bool:
    return any(
        word in name.lower() for word in ("password", "token", "secret", "seed")
    ) and name not in ("no_password",)
