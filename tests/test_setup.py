"""`etcdlite-ctl setup`, its file of options, and names of members in place of IDs.

tests/test_docs.py founds and mends whole clusters with what `setup` writes.
"""

from __future__ import annotations

import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from rigs.ctl_runner import run_ctl
from rigs.ports import free_ports
from rigs.processes import ServerFactory

from etcdlite import config, secret_file

THREE = ("m1=10.0.0.1", "m2=10.0.0.2", "m3=db3.lab")


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path / "members")


def unpack(archive: str, root: Path) -> Path:
    with tarfile.open(archive) as tar:
        for entry in tar:
            content = tar.extractfile(entry)
            assert content is not None
            path = root / entry.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.read())
            path.chmod(entry.mode)
    return root


def configured(root: Path) -> config.Config:
    """The configuration in an unpacked archive, with the paths of where it was unpacked."""
    file = root / "etc/etcdlite.toml"
    file.write_text(file.read_text().replace('"/etc/', f'"{root}/etc/'))
    return config.load([], {}, str(file))


def test_setup_writes_the_configuration_of_each_member(folder: str, tmp_path: Path) -> None:
    done = run_ctl("setup", *THREE, f"--dir={folder}")
    assert done.status == 0, done
    told = done.stdout.decode()
    assert "tar -C / -xf m1.tar" in told and "promote" not in told
    assert "systemctl restart etcdlite" in told, "a service that runs has other settings"
    one, three = (configured(unpack(f"{folder}/{m}.tar", tmp_path / m)) for m in ("m1", "m3"))
    assert one.warnings == three.warnings == ()
    assert one.name == "m1"
    assert one.listen_client_urls == ("https://10.0.0.1:2379", "https://127.0.0.1:2379")
    assert one.client_cert_auth and one.peer_client_cert_auth
    assert three.listen_client_urls == ("https://0.0.0.0:2379",), "one cannot listen on a name"
    assert three.advertise_client_urls == ("https://db3.lab:2379",)
    assert one.initial_cluster == three.initial_cluster
    assert one.initial_cluster_token == three.initial_cluster_token != "etcd-cluster"


def test_private_files_can_be_read_by_the_service_alone(folder: str) -> None:
    for more in ((), ("--secret",)):
        place = f"{folder}{len(more)}"
        assert run_ctl("setup", "m1=10.0.0.1", f"--dir={place}", *more).status == 0
        assert stat.S_IMODE(Path(place).stat().st_mode) == 0o700
        assert stat.S_IMODE(Path(place, "m1.tar").stat().st_mode) == 0o600
        with tarfile.open(f"{place}/m1.tar") as tar:
            for entry in tar:
                is_private = entry.name.endswith((".key", ".secret"))
                assert (entry.mode, entry.uname) == (
                    (0o600, "etcdlite") if is_private else (0o644, "root")
                ), entry.name
                assert is_private == (b"PRIVATE KEY" in tar.extractfile(entry).read()
                                      or entry.name.endswith(".secret"))  # fmt: skip


def test_the_certificates_of_clients_and_of_members_have_different_cas(folder: str) -> None:
    assert run_ctl("setup", "m1=10.0.0.1", f"--dir={folder}").status == 0
    cas = [Path(folder, kind, "ca.crt").read_text() for kind in ("clients", "peers")]
    assert cas[0] != cas[1]
    done = run_ctl("cert", "client", "alice", f"--dir={folder}/clients")
    assert done.status == 0, "the CA can make certificates for more users"


def test_the_two_secrets_differ(folder: str) -> None:
    assert run_ctl("setup", "m1=10.0.0.1", "--secret", f"--dir={folder}").status == 0
    peer, client = (secret_file.read(f"{folder}/{kind}.secret") for kind in ("peer", "client"))
    secret_file.check_apart(peer, client)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), "setup needs 1 to 7 members, as NAME=HOST"),
        (("10.0.0.1",), "bad member '10.0.0.1': write NAME=HOST, as in m1=10.0.0.1"),
        (("../m=10.0.0.1",), "bad member '../m=10.0.0.1': write NAME=HOST, as in m1=10.0.0.1"),
        (("a=x", "a=y"), "a=y: each member has a name and a machine of its own"),
        (("a=x", "b=x"), "b=x: each member has a name and a machine of its own"),
        (("a=a b",), "bad host 'a b': write a host name or an IP address, without scheme and port"),
        (("a=x:1",), "bad host 'x:1': write a host name or an IP address, without scheme and port"),
    ],
)  # fmt: skip
def test_members_that_cannot_be(words: tuple[str, ...], text: str, folder: str) -> None:
    for more in ((), ("--secret",)):
        done = run_ctl("setup", *words, f"--dir={folder}", *more)
        assert (done.status, done.stderr) == (128, f"Error: {text}\n")
        assert not Path(folder).exists(), "nothing was written"


def test_a_second_setup_keeps_the_first(folder: str) -> None:
    assert run_ctl("setup", "m1=10.0.0.1", f"--dir={folder}").status == 0
    before = Path(folder, "m1.tar").read_bytes()
    done = run_ctl("setup", "m1=10.0.0.1", f"--dir={folder}")
    assert done.status == 1 and "has a cluster already" in done.stderr
    assert Path(folder, "m1.tar").read_bytes() == before
    done = run_ctl("setup", "--join", "m4=10.0.0.4", f"--dir={folder}-other")
    assert done.status == 1 and "has no CA and no secrets" in done.stderr


FULL_DISK = """
import errno, sys
from etcdlite import fixtures, secret_file
from etcdlite.cli import setup
from etcdlite.ctl import main
count = 0
def refusing(write):
    def call(*arguments, **named):
        global count
        count += 1
        if count > {allowed}:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments, **named)
    return call
fixtures.write = refusing(fixtures.write)
secret_file.create = refusing(secret_file.create)
setup._write_archive = refusing(setup._write_archive)
sys.exit(main())
"""


@pytest.mark.parametrize("first", [(), ("--secret",)])
@pytest.mark.parametrize("second", [(), ("--secret",)])
@pytest.mark.parametrize("allowed", range(4))
def test_a_setup_that_was_interrupted_is_begun_again(
    first: tuple[str, ...], second: tuple[str, ...], allowed: int, folder: str
) -> None:
    words = ("setup", "m1=10.0.0.1", "m2=10.0.0.2", f"--dir={folder}")
    program = [sys.executable, "-c", FULL_DISK.format(allowed=allowed)]
    done = subprocess.run([*program, *words, *first], capture_output=True, text=True)
    assert done.returncode == 1 and "no space left" in done.stderr.lower(), done
    again = run_ctl(*words, *second)
    assert again.status == 0, again
    scheme = "http" if second else "https"
    for name in ("m1", "m2"):
        with tarfile.open(Path(folder, f"{name}.tar")) as archive:
            file = archive.extractfile("etc/etcdlite.toml")
            assert file is not None and f"m1={scheme}://10.0.0.1:2380" in file.read().decode()
    assert Path(folder, "peer.secret").exists() == bool(second)
    done = run_ctl(*words, *second)
    assert done.status == 1 and "has a cluster already" in done.stderr


def test_a_member_that_was_not_added_cannot_join(folder: str, server: ServerFactory) -> None:
    assert run_ctl("setup", "m1=10.0.0.1", "--secret", f"--dir={folder}").status == 0
    words = ("setup", "--join", "m2=10.0.0.2", f"--dir={folder}")
    done = run_ctl(*words, "--endpoints", server().endpoint)
    assert done.status == 1
    assert "member add m2 --peer-urls=http://10.0.0.2:2380 --learner" in done.stderr


def test_a_join_says_how_a_learner_gets_its_vote(folder: str, server: ServerFactory) -> None:
    assert run_ctl("setup", "m1=10.0.0.1", "--secret", f"--dir={folder}").status == 0
    endpoint = server().endpoint
    add = ("member", "add", "m2", "--peer-urls=http://10.0.0.2:2380", "--learner")
    assert run_ctl(*add, "--endpoints", endpoint).status == 0
    words = ("setup", "--join", "m2=10.0.0.2", f"--dir={folder}")
    done = run_ctl(*words, "--endpoints", endpoint)
    assert done.status == 0, done
    assert "run: etcdlite-ctl member promote m2\n" in done.stdout.decode()


def test_a_join_that_reaches_no_member_says_what_it_asks_for(folder: str) -> None:
    assert run_ctl("setup", "m1=10.0.0.1", "--secret", f"--dir={folder}").status == 0
    done = run_ctl("setup", "--join", "m2=10.0.0.2", f"--dir={folder}", "--endpoints=127.0.0.1:1")
    assert done.status == 1
    assert "cannot ask the cluster for its members" in done.stderr
    assert "127.0.0.1:1" in done.stderr and "--endpoints" in done.stderr


def test_options_come_from_a_file(tmp_path: Path, server: ServerFactory) -> None:
    file = tmp_path / "ctl.toml"
    file.write_text(f'endpoints = ["{server().endpoint}"]\nhex = true\ncommand-timeout = "30s"\n')
    given = f"--config-file={file}"
    assert run_ctl("put", "a", "b", given).status == 0
    assert run_ctl("get", "a", given).stdout == b"\\x61\n\\x62\n"
    assert run_ctl("get", "a", given, "--hex=false").stdout == b"a\nb\n"
    file.write_text("endpionts = []\n")
    done = run_ctl("get", "a", given)
    assert done.status == 128
    assert "unknown option 'endpionts' (did you mean endpoints?)" in done.stderr
    file.write_text('write-out = "json\n')
    assert run_ctl("get", "a", given).status == 128
    for line, why in (
        ("endpoints = 5", "endpoints: wrong type; write a list of strings without commas"),
        ("endpoints = [5]", "endpoints: wrong type; write a list of strings without commas"),
        ('hex = "perhaps"', "hex: "),
        ("user = 1", "user: wrong type; write a string"),
        ("command-timeout = 5", "command-timeout: wrong type; write a string"),
        ('cacert = "a\\u0000b"', "cacert: a NUL"),
        ('endpoints = ["a\\u0000b"]', "endpoints: a NUL"),
    ):
        file.write_text(line)
        done = run_ctl("get", "a", given)
        assert done.status == 128 and f"{file} cannot be used: {why}" in done.stderr
    done = run_ctl("get", "a", f"{given}.missing")
    why = f"cannot read --config-file {file}.missing: No such file or directory"
    assert (done.status, done.stderr) == (128, f"Error: {why}\n")


def test_a_member_is_named_by_its_id_or_its_name(server: ServerFactory) -> None:
    endpoint = server().endpoint

    def ask(*words: str) -> tuple[int, str]:
        done = run_ctl("member", *words, "--endpoints", endpoint)
        return done.status, done.stderr or done.stdout.decode()

    (port,) = free_ports(1)
    status, text = ask("list")
    member_id, name = text.split(", ")[0], text.split(", ")[2]
    url = f"--peer-urls=http://127.0.0.1:{port}"
    assert ask("update", name, url) == ask("update", member_id, url)
    assert ask("update", name, url)[0] == 0
    status, text = ask("remove", "zz")
    assert status == 128
    assert 'bad member ID arg (strconv.ParseUint: parsing "zz": invalid syntax' in text
    assert "no member has that name; one that never started has only an ID" in text
    assert "member not found" in ask("remove", "abc")[1], "etcd's error for an ID"
