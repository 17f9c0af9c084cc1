"""The Debian package, the units, the generated files, the zipapp."""

from __future__ import annotations

import email.utils
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

import pytest
from rigs.ports import free_ports
from rigs.processes import ROOT, installed

from etcdlite import __version__, backup_status, config, ctl, flags

PACKAGING = ROOT / "packaging"
UNITS = sorted(path.name for path in (PACKAGING / "systemd").iterdir())
SERVICES = [name for name in UNITS if name.endswith(".service")]
PAGES = ("etcdlite.8", "etcdlite-ctl.1", "etcdlite.toml.5")
MAX_EXPOSURE = 1.5
RELEASES = ("bookworm", "trixie")
IMAGE = "systemd,systemd-sysv,dbus,openssl,python3-h11,python3-hpack,python3-nacl"
IMAGE += ",python3-sortedcontainers"
NSPAWN = ("systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--private-network")

sys.path.insert(0, str(PACKAGING))
import generate  # noqa: E402


def needs(*commands: str) -> None:
    """Skips the test if the machine lacks a command."""
    for command in commands:
        if shutil.which(command, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
            pytest.skip(f"the command {command} is not installed")


def run(*command: str | Path, **options) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-8000:]}\n{done.stderr[-8000:]}"
    return done


@pytest.fixture(scope="module")
def generated(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generated")
    environ = os.environ | {"PYTHONPATH": str(ROOT), "SOURCE_DATE_EPOCH": "1800000000"}
    run(sys.executable, PACKAGING / "generate.py", "all", folder, env=environ)
    return folder


# ------------------------------------------------------------------------- the generated files


def test_the_configuration_file_is_the_one_that_the_table_of_flags_makes():
    assert generate.EXAMPLE.read_text() == generate.toml(), (
        "outdated: run PYTHONPATH=. python3 packaging/generate.py toml"
    )
    assert set(generate.NOTES) <= set(flags.FLAGS)


def test_the_example_of_a_cluster_is_a_configuration(tmp_path):
    lines = generate.EXAMPLE.read_text().splitlines()
    text = "\n".join(line[3:] for line in lines if line.startswith("#  "))
    example = text[text.index('name = "m1"') :]
    file = tmp_path / "etcdlite.toml"
    file.write_text(example)
    loaded = config.load([], {}, str(file))
    assert set(loaded.sources) == {name for name, _ in generate.CLUSTER_SETTINGS}
    assert loaded.warnings == ()
    assert len(loaded.initial_cluster) == 3


@pytest.mark.parametrize("page", PAGES)
def test_a_man_page_renders_without_warnings_and_names_everything(page, generated):
    needs("man", "groff")
    environ = os.environ | {"MANWIDTH": "200", "LC_ALL": "C.UTF-8", "MAN_KEEP_FORMATTING": ""}
    done = run("man", "--warnings", "-E", "UTF-8", "-l", generated / page, env=environ)
    if "man(1)" in done.stdout and "minimized" in done.stdout:
        pytest.skip("this machine has no man pages (a minimized system)")
    assert done.stderr == ""
    text = re.sub(".\b", "", done.stdout)
    assert not re.search(r"(?m)^\s*\.|\\[-&(]", text), "a request of roff is shown as text"
    if page == "etcdlite-ctl.1":
        names = [command.usage.split("  ")[0] for command in ctl.COMMANDS]
    else:
        names = [flag.name for group in flags.GROUPS.values() for flag in group]
        names.remove("config-file")
    assert [name for name in names if name not in text] == []


def test_the_completions_parse(generated):
    checked = 0
    for shell, name in (("bash", "etcdlite-ctl"), ("fish", "etcdlite-ctl.fish"),
                        ("zsh", "_etcdlite-ctl")):  # fmt: skip
        if shutil.which(shell):
            assert run(shell, "-n", generated / name).stderr == ""
            checked += 1
    assert checked, "not even bash is installed"


def test_fish_completes_commands_and_options(generated):
    needs("fish")

    def completed(line: str) -> list[str]:
        script = f"source {generated / 'etcdlite-ctl.fish'}; complete -C '{line}'"
        shown = run("fish", "-c", script, cwd=generated).stdout.splitlines()
        return [text.split("\t")[0] for text in shown]

    assert completed("etcdlite-ctl member ") == ["add", "list", "promote", "remove", "update"]
    assert completed("etcdlite-ctl snapshot save --enc") == ["--encrypt-to"]
    assert "endpoint" in completed("etcdlite-ctl end")
    assert completed("etcdlite-ctl get -w ") == ["fields", "json", "protobuf", "simple", "table"]
    assert completed("etcdlite-ctl get --order ") == ["ASCEND", "DESCEND"]
    assert completed("etcdlite-ctl snapshot save --format ") == ["etcd", "etcdlite"]
    for words in ("snapshot restore", "snapshot status", "hashkv", "key add", "get --cacert"):
        assert completed(f"etcdlite-ctl {words} etcdlite.toml.") == ["etcdlite.toml.5"], words
    for words in ("get", "member list"):
        assert completed(f"etcdlite-ctl {words} etcdlite.toml.") == [], words


@pytest.mark.parametrize(
    "typed, completed",
    [
        ("mem", "member"),
        ("get --order A", "--order ASCEND"),
        ("get --order=D", "--order=DESCEND"),
        ("-w ta", "-w table"),
        ("snapshot restore back", "restore backup.db"),
        ("--cacert back", "--cacert backup.db"),
    ],
)
@pytest.mark.parametrize("is_sourced", [False, True], ids=["of $fpath", "sourced"])
def test_zsh_completes_from_the_first_tab_on(generated, tmp_path, is_sourced, typed, completed):
    needs("zsh")
    (tmp_path / "backup.db").touch()
    setup = ["autoload -U compinit", "compinit -D", "etcdlite-ctl() { : }", "PS1=READY"]
    if is_sourced:
        setup.append(f"source {generated / '_etcdlite-ctl'}")
    else:
        setup.insert(0, f"fpath=({generated} $fpath)")
    (tmp_path / ".zshrc").write_text("\n".join(setup))
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(tmp_path)
        os.execvpe("zsh", ["zsh", "-d", "-i"], {**os.environ, "ZDOTDIR": ".", "TERM": "dumb"})
    try:
        shown = b""

        def until(text: str) -> None:
            nonlocal shown
            while text.encode() not in shown:
                assert select.select([terminal], [], [], 20)[0], f"no {text!r} in {shown!r}"
                shown += os.read(terminal, 4096)
            shown = b""

        until("READY")
        for _ in range(2):  # The first Tab of a shell reads the file.
            os.write(terminal, f"etcdlite-ctl {typed}\t".encode())
            until(completed)
            os.write(terminal, b"\n")
            until("READY")
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(terminal)


# --------------------------------------------------------------------------------- the launcher


def stub(path: Path, says: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\necho "{says}"\n')
    path.chmod(0o755)


def launched(command: Path, path: Path) -> str:
    """What is run by the command; only the system's tools and `path` are in PATH."""
    return run(command, "a b", env={"PATH": f"{path}:/usr/bin:/bin"}, cwd=path).stdout


def test_the_launcher_finds_the_interpreter_it_was_installed_for(tmp_path):
    bin, elsewhere = tmp_path / "venv" / "bin", tmp_path / "else where"
    bin.mkdir(parents=True)
    elsewhere.mkdir()
    shutil.copy(PACKAGING / "launcher" / "etcdlite", bin)
    command = bin / "etcdlite"
    stub(elsewhere / "python3", "python3 of PATH: $1 $2")
    assert launched(command, elsewhere) == f"python3 of PATH: {command} a b\n"
    stub(bin / "python3", "python3 beside")
    assert launched(command, elsewhere) == "python3 beside\n"
    (tmp_path / "venv/lib/python3.10/site-packages/etcdlite-0.1.0.dist-info").mkdir(parents=True)
    (tmp_path / "venv/lib/python3.9/site-packages/other-1.dist-info").mkdir(parents=True)
    stub(elsewhere / "python3.10", "python3.10 of PATH")
    assert launched(command, elsewhere) == "python3.10 of PATH\n"
    stub(bin / "python3.10", "python3.10 beside")
    assert launched(command, elsewhere) == "python3.10 beside\n"
    (elsewhere / "etcdlite-ctl").symlink_to(command)
    assert launched(elsewhere / "etcdlite-ctl", elsewhere) == "python3.10 beside\n"


def test_the_launcher_does_without_an_env_that_cannot_block_signals(tmp_path):
    shutil.copy(PACKAGING / "launcher" / "etcdlite", tmp_path)
    stub(tmp_path / "python3", "started")
    (tmp_path / "env").write_text('#!/bin/sh\necho "env: unknown option" >&2\nexit 1\n')
    (tmp_path / "env").chmod(0o755)
    done = run(tmp_path / "etcdlite", env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    assert (done.stdout, done.stderr) == ("started\n", "")


@pytest.mark.parametrize("name", ["etcdlite", "etcdlite-ctl"])
def test_sigint_while_python_starts_ends_a_command_quietly(name, tmp_path):
    needs("env")
    if subprocess.run(["env", "--block-signal=INT"], capture_output=True).returncode:
        pytest.skip("this env cannot block signals")
    commands = installed(tmp_path / "bin")
    # The signal is there before the first instruction of Python.
    (commands / "python3").write_text(
        f"#!/bin/sh\nkill -INT $$\necho >{tmp_path}/survived\n" + (commands / "python3").read_text()
    )
    done = subprocess.run([commands / name, "version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
    assert (tmp_path / "survived").exists(), "sh got the signal, so it was not blocked"


@pytest.mark.parametrize(("name", "status"), [("etcdlite", 0), ("etcdlite-ctl", -signal.SIGHUP)])
def test_sighup_while_python_starts_does_not_end_a_server(name, status, tmp_path):
    commands = installed(tmp_path / "bin")
    python = commands / "python3"
    python.write_text(python.read_text().replace("#!/bin/sh\n", "#!/bin/sh\nkill -HUP $$\n"))
    # Under nohup it would be ignored in this process, too.
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        done = subprocess.run([commands / name, "--version"], stdout=subprocess.DEVNULL)
    finally:
        signal.signal(signal.SIGHUP, hangup)
    assert done.returncode == status


def test_a_program_started_by_the_launcher_gets_sigint(tmp_path):
    commands = installed(tmp_path / "bin")
    (commands / "python3").write_text(
        f"#!/bin/sh\nexport PYTHONPATH={ROOT}\nexec {sys.executable} -c '"
        "import etcdlite.interrupts, os, signal, time; os.kill(os.getpid(), signal.SIGINT); "
        "time.sleep(60)'\n"
    )
    assert subprocess.run([commands / "etcdlite"]).returncode == -signal.SIGINT


# ------------------------------------------------------------------------------------ the units


def test_systemd_finds_no_fault_in_the_units(tmp_path):
    needs("systemd-analyze")
    for name in UNITS:
        text = (PACKAGING / "systemd" / name).read_text()
        # The programs are not installed here, and neither are their man pages.
        (tmp_path / name).write_text(re.sub(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", text))
    done = run("systemd-analyze", "verify", "--man=no", *sorted(tmp_path.iterdir()))
    lines = [
        line for line in done.stderr.splitlines() if str(tmp_path) in line or "etcdlite" in line
    ]
    assert lines == []


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_confined(name):
    needs("systemd-analyze")
    if "--offline" not in run("systemd-analyze", "--help").stdout:
        pytest.skip("systemd-analyze is too old for security --offline")
    unit = PACKAGING / "systemd" / name
    done = run("systemd-analyze", "security", "--offline=yes", "--no-pager", unit)
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found, done.stdout
    assert float(found[1]) <= MAX_EXPOSURE, done.stdout


@pytest.mark.parametrize("name", ["etcdlite.service", "etcdlite@.service"])
def test_a_start_that_is_refused_until_somebody_acts_is_not_tried_again(name):
    text = (PACKAGING / "systemd" / name).read_text()
    assert re.search("(?m)^RestartPreventExitStatus=(.*)", text)[1].split() == ["2"]


def test_an_upgrade_does_not_ask_about_the_configuration():
    lines = (PACKAGING / "debian" / "etcdlite.install").read_text().splitlines()
    assert not any(line.split()[-1].startswith("etc") for line in lines), "it would be a conffile"


def test_the_first_installation_alone_makes_the_configuration_and_replaces_nothing(tmp_path):
    script = (PACKAGING / "debian" / "etcdlite.postinst").read_text().partition("#DEBHELPER#")[0]
    script = script.replace("/etc/", f"{tmp_path}/").replace("/usr/share/etcdlite", str(PACKAGING))
    file = tmp_path / "etcdlite.toml"
    run("sh", "-c", script, "postinst", "configure", "0.1.0")
    assert not file.exists(), "it was removed"
    file.symlink_to("on a disk that is not mounted yet")
    run("sh", "-c", script, "postinst", "configure", "")
    assert file.is_symlink()
    file.unlink()
    run("sh", "-c", script, "postinst", "configure", "")
    assert file.read_text() == generate.EXAMPLE.read_text()


@pytest.mark.parametrize("step", ["abort-remove", "configure"])
@pytest.mark.parametrize("is_full", [False, True])
def test_what_a_removal_stopped_is_started_again_and_a_full_disk_does_not_keep_the_package(
    tmp_path, step, is_full
):
    (tmp_path / "systemd").mkdir()
    (tmp_path / "systemctl").write_text("#!/bin/sh\necho etcdlite.service loaded active running\n")
    (tmp_path / "deb-systemd-invoke").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/invoked\n')
    for name in ("systemctl", "deb-systemd-invoke"):
        (tmp_path / name).chmod(0o755)
    running = tmp_path / "etcdlite.running"
    if is_full:
        running.symlink_to("/dev/full")
    environ = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for name, *arguments in (("prerm", "remove"), ("postinst", step, "0.1.0")):
        script = (PACKAGING / "debian" / f"etcdlite.{name}").read_text()
        script = script.replace("/run/systemd/system", f"{tmp_path}/systemd")
        script = script.replace("/var/lib/etcdlite.running", str(running))
        run("sh", "-c", script.replace("/etc/", f"{tmp_path}/"), name, *arguments, env=environ)
    invoked = (tmp_path / "invoked").read_text()
    assert invoked.startswith("stop ")
    assert ("start etcdlite.service\n" in invoked) is not is_full
    assert not running.is_symlink() and not running.exists()


def test_the_template_differs_from_the_service_only_in_the_name_of_the_member():
    one, template = (
        (PACKAGING / "systemd" / name).read_text().partition("[Unit]")[2].splitlines()
        for name in ("etcdlite.service", "etcdlite@.service")
    )
    assert len(one) == len(template)
    changed = [line for line, other in zip(one, template, strict=True) if line != other]
    assert [line.partition("=")[0] for line in changed] == [
        "Description", "ExecStart", "Environment",
    ]  # fmt: skip


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The directory of `backup`, with a client that only pretends; the boot test has a real one."""
    stub(tmp_path / "etcdlite-ctl", "")
    (tmp_path / "etcdlite-ctl").write_text(
        '#!/bin/sh\n[ "$2" = save ] && echo data > "$3"\ntest "$2" = save -o -z "$BAD"\n'
    )
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("BACKUP_DIR", str(tmp_path / "backups"))
    monkeypatch.setenv("BACKUP_KEEP", "3")
    (tmp_path / "backups").mkdir()
    return tmp_path / "backups"


def test_a_backup_that_fails_in_the_second_of_the_last_success_counts_as_the_last(kept):
    date = kept.parent / "date"
    date.write_text("#!/bin/sh\necho 1700000000\n")
    date.chmod(0o755)
    run(PACKAGING / "backup", env=os.environ | {"BAD": ""})
    subprocess.run([PACKAGING / "backup"], env=os.environ | {"BAD": "1"}, capture_output=True)
    told = backup_status.read(str(kept / "status.prom"))
    assert told[backup_status.LAST_FAILURE] > told[backup_status.LAST_SUCCESS] == 1_700_000_000


@pytest.mark.parametrize("year", [2020, 2099])
def test_the_backup_stays_whatever_the_clock_said_before(kept, year):
    others = [f"{year}-01-0{day}T000000Z.db" for day in range(1, 5)]
    for name in others:
        (kept / name).touch()
    run(PACKAGING / "backup")
    names = {path.name for path in kept.glob("*.db")}
    assert len(names - set(others)) == 1, "the new one"
    assert names & set(others) == set(others[2:]), "and the newest of the others"


def test_a_backup_that_fails_after_one_while_the_clock_was_ahead_counts_as_the_last(kept):
    status = kept / "status.prom"
    status.write_text(f"{backup_status.LAST_SUCCESS} 4000000000\n")
    subprocess.run([PACKAGING / "backup"], env=os.environ | {"BAD": "1"}, capture_output=True)
    told = backup_status.read(str(status))
    assert told[backup_status.LAST_FAILURE] > told[backup_status.LAST_SUCCESS]


def test_the_backup_checks_what_it_saved_and_keeps_the_newest(kept):
    for day in range(1, 5):
        (kept / f"2020-01-0{day}T000000Z.db").touch()
    (kept / "mine.db").touch()
    environ = os.environ | {"BAD": ""}
    bad = subprocess.run([PACKAGING / "backup"], env=environ | {"BAD": "1"}, capture_output=True)
    assert bad.returncode != 0
    assert len(list(kept.glob("*.db"))) == 5, "a bad backup stays, or costs an old one"
    told = backup_status.read(str(kept / "status.prom"))
    assert told.keys() == {backup_status.LAST_FAILURE}
    run(PACKAGING / "backup", env=environ)
    told = backup_status.read(str(kept / "status.prom"))
    assert told[backup_status.LAST_SUCCESS] >= told[backup_status.LAST_FAILURE] > 1_600_000_000
    assert told[backup_status.SIZE] == len("data\n")
    names = sorted(path.name for path in kept.iterdir())
    assert names[:2] == ["2020-01-03T000000Z.db", "2020-01-04T000000Z.db"]
    assert len(names) == 5 and names[-2:] == ["mine.db", "status.prom"]
    refused = subprocess.run([PACKAGING / "backup"], env=environ | {"BACKUP_KEEP": "0"})
    assert refused.returncode == 2


def test_the_versions_agree():
    changelog = (PACKAGING / "debian" / "changelog").read_text()
    found = re.match(r"etcdlite \(([^)]+)\) ", changelog)
    assert found and found[1] == __version__
    heading = re.search(
        r"^## (\S+) \((\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    assert heading and heading[1] == __version__
    signed = re.search(r"^ -- .*  (.*)$", changelog, re.M)
    assert signed is not None
    date = email.utils.parsedate_to_datetime(signed[1]).date()
    assert heading[2] == date.isoformat(), "the two changelogs have other dates"


def test_an_installation_waits_for_another_apt(tmp_path):
    """apt-get update fails three times and is repeated. apt-get install is told to wait itself."""
    (tmp_path / "sleep").write_text("#!/bin/sh\necho sleep $1 >> done\n")
    (tmp_path / "apt-get").write_text(
        "#!/bin/sh\necho apt-get $* >> done\n"
        '[ $1 = install ] || [ "$(grep -c update done)" -gt 3 ]\n'
    )
    for name in ("sleep", "apt-get"):
        (tmp_path / name).chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    install = PACKAGING / "apt-get-install"
    run(install, "--no-install-recommends", "a", "b", cwd=tmp_path, env=environ)
    *waited, installed = (tmp_path / "done").read_text().splitlines()
    update = "apt-get update -q"
    assert waited == [update, "sleep 5", update, "sleep 10", update, "sleep 15", update]
    waits = "-o DPkg::Lock::Timeout=600"
    assert installed == f"apt-get install -qy {waits} --no-install-recommends a b"
    for caller in ("Makefile", "packaging/build-deb"):
        lines = (ROOT / caller).read_text().splitlines()
        commands = [line for line in lines if "apt-get" in line and not re.search("echo |^#", line)]
        assert any("packaging/apt-get-install" in line for line in commands), caller
        assert not any("apt-get install" in line or "apt-get update" in line for line in commands)


def test_a_release_is_of_what_is_committed():
    """`make release` builds from a clean checkout only, and lists what it builds."""
    rule = (ROOT / "Makefile").read_text().partition("\nrelease:\n")[2].partition("\n\n")[0]
    assert "git status --porcelain" in rule
    assert "$(MAKE) deb wheel pyz" in rule
    assert "sha256sum * > SHA256SUMS" in rule


# ------------------------------------------------------------------------------ the whole package


@pytest.fixture(scope="module")
def deb(tmp_path_factory) -> Path:
    needs("apt-get", "git", "make")
    if os.getuid() != 0 and shutil.which("dpkg-buildpackage") is None:
        pytest.skip("not root, and dpkg-buildpackage is not installed")
    run("make", "deb", cwd=ROOT)
    return Path(shutil.copy(ROOT / "dist" / "etcdlite.deb", tmp_path_factory.mktemp("deb")))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_builds_are_identical_and_lintian_finds_nothing(deb):
    run("make", "deb", cwd=ROOT)
    assert (ROOT / "dist" / "etcdlite.deb").read_bytes() == deb.read_bytes()
    needs("lintian")
    done = run("lintian", "--pedantic", "--fail-on", "error,warning,info,pedantic", deb)
    assert done.stdout == ""


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_build_is_later_for_apt_than_the_builds_and_the_release_before_it(deb):
    """With one version for all, apt says of a later build that it is installed already."""
    version = run("dpkg-deb", "-f", deb, "Version").stdout.strip()
    commit = run("git", "rev-parse", "--short=12", "HEAD", cwd=ROOT).stdout.strip()
    assert version.endswith(commit)
    release, at, _ = version.partition("+git")
    assert release == __version__
    earlier = f"{release}{at}20261128.120000.ffffffffffff"
    for order in ((release, earlier), (earlier, version), (version, f"{release}.1")):
        run("dpkg", "--compare-versions", order[0], "lt", order[1])


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_package_has_no_file_below_a_directory_that_is_a_link(deb):
    listed = run("dpkg-deb", "-c", deb).stdout.splitlines()
    tops = {line.split()[5].split("/")[1] for line in listed}
    assert "usr/lib/systemd/system/etcdlite.service" in "\n".join(listed)
    assert tops <= {"", "usr"}


def serves_a_put_a_get_and_the_page(server: list[str | Path], ctl: list[str | Path], cwd: Path):
    """Starts the server, which must need nothing but what it brings."""
    client, peer = free_ports(2)
    urls = [f"--listen-client-urls=http://127.0.0.1:{client}"]
    urls += [f"--listen-peer-urls=http://127.0.0.1:{peer}"]
    environ = {"PATH": os.environ["PATH"], "HOME": str(cwd)}
    with subprocess.Popen([*server, *urls], cwd=cwd, env=environ) as process:
        try:
            endpoint = f"--endpoints=127.0.0.1:{client}"
            retry(lambda: run(*ctl, endpoint, "put", "a", "b", cwd=cwd, env=environ))
            got = run(*ctl, endpoint, "get", "a", cwd=cwd, env=environ)
            assert got.stdout == "a\nb\n"
            with urlopen(f"http://127.0.0.1:{client}/") as page:
                assert b"<title>" in page.read()
        finally:
            process.terminate()
    assert process.returncode == 0


def retry(call: Callable[[], object]) -> None:
    for attempt in range(50):
        try:
            call()
            return
        except AssertionError:
            if attempt == 49:
                raise
            time.sleep(0.2)


@pytest.fixture
def bare(tmp_path) -> Path:
    """The Python of an environment without packages."""
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    return tmp_path / "venv" / "bin" / "python"


@pytest.mark.long
def test_the_zipapp_serves_where_nothing_is_installed(bare, tmp_path):
    run(sys.executable, PACKAGING / "build_pyz.py")
    first = (ROOT / "dist" / "etcdlite.pyz").read_bytes()
    run(sys.executable, PACKAGING / "build_pyz.py")
    assert (ROOT / "dist" / "etcdlite.pyz").read_bytes() == first, "two builds differ"
    (tmp_path / "etcdlite.pyz").write_bytes(first)
    (tmp_path / "etcdlite-ctl").symlink_to("etcdlite.pyz")
    server = [bare, "etcdlite.pyz"]
    serves_a_put_a_get_and_the_page(server, [bare, "etcdlite-ctl"], tmp_path)
    assert run(*server, "ctl", "version", cwd=tmp_path).stdout.startswith("etcdlite-ctl version")
    run(*server, "ctl", "secret", "new", cwd=tmp_path)
    done = subprocess.run(
        [*server, "--peer-secret-file=etcdlite.secret", "--data-dir=other"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "'apt install python3-nacl'" in done.stderr


@pytest.mark.long
def test_the_wheel_installs_and_serves(bare, tmp_path):
    pip = ("-m", "pip", "--disable-pip-version-check")
    run(sys.executable, *pip, "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("etcdlite-*.whl")
    run(bare, *pip, "install", "-q", wheel)
    assert subprocess.run([bare, "-c", "import dns"], capture_output=True).returncode, "not needed"
    commands = ([bare.parent / "etcdlite"], [bare.parent / "etcdlite-ctl"])
    serves_a_put_a_get_and_the_page(*commands, tmp_path)
    done = subprocess.run(
        [*commands[1], "--discovery-srv=example.com", "get", "a"], capture_output=True, text=True
    )
    assert "'apt install python3-dnspython'" in done.stderr


def next_build(deb: Path, folder: Path) -> None:
    """The same package as a later version, with another text of the configuration."""
    run("dpkg-deb", "-R", deb, folder / "next")
    for file in (folder / "next").rglob("etcdlite.toml"):
        file.write_text(file.read_text() + "# A new key.\n")
    control = folder / "next" / "DEBIAN" / "control"
    control.write_text(re.sub("(?m)^Version: .*", r"\g<0>+next", control.read_text()))
    run("dpkg-deb", "--root-owner-group", "-b", folder / "next", folder / "next.deb")


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("release", RELEASES)
def test_a_booted_debian_installs_serves_upgrades_and_removes_it(release, deb, tmp_path):
    if os.getuid() != 0:
        pytest.skip("only root can boot a container")
    needs("mmdebstrap", "systemd-nspawn")
    root = tmp_path / "root"
    made = subprocess.run(
        ["mmdebstrap", "--variant=minbase", f"--include={IMAGE}", release, root],
        capture_output=True,
        text=True,
    )
    if made.returncode:
        pytest.skip(f"mmdebstrap cannot make {release}: {made.stderr.splitlines()[-1:]}")
    trial = subprocess.run(
        [*NSPAWN, "-D", root, "--boot", "systemd.unit=poweroff.target"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    if trial.returncode:
        pytest.skip(f"systemd-nspawn cannot boot here: {trial.stderr.splitlines()[-1:]}")
    next_build(deb, tmp_path)
    shutil.copy(deb, root / "root" / "etcdlite.deb")
    shutil.copy(tmp_path / "next.deb", root / "root" / "next.deb")
    shutil.copy(ROOT / "tests" / "packaging" / "boot.sh", root / "root" / "boot.sh")
    # A minimal system lacks what every installed one has.
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
    (root / "etc/systemd/system/boot.service").write_text(
        "[Unit]\nAfter=multi-user.target\nSuccessAction=poweroff\nFailureAction=poweroff\n"
        "[Service]\nType=oneshot\nEnvironment=HOME=/root\nExecStart=/bin/bash /root/boot.sh\n"
        "StandardOutput=file:/root/log\nStandardError=file:/root/log\n"
    )
    booted = subprocess.run(
        [*NSPAWN, "-D", root, "--boot", "systemd.wants=boot.service"],
        capture_output=True,
        text=True,
        timeout=900,
    )
    log = root / "root" / "log"
    assert log.exists(), booted.stdout[-4000:] + booted.stderr[-4000:]
    text = log.read_text()
    print(text)
    assert "\nPASSED\n" in text, text[-6000:]
