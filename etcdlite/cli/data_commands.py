"""Rows of etcdlite-ctl's table of commands: those about data as a whole, moves and history."""

from __future__ import annotations

from etcdlite.cli.command import Command
from etcdlite.cli.flags import Flag

_MIRROR_FLAGS = (
    Flag("prefix", "string", "", "only keys that start with this"),
    Flag("rev", "int", 0, "do not copy: follow from this revision of the source on"),
    Flag("dest-prefix", "string", "", "what replaces the prefix at the destination"),
    Flag("no-dest-prefix", "bool", False, "leave out the prefix at the destination"),
    Flag("max-txn-ops", "int", 128, "changes in one transaction of the destination"),
    Flag(
        "checkpoint-key",
        "string",
        "",
        "keep the position in this key of the destination, and continue there",
    ),
    Flag("once", "bool", False, "end at the revision that the source has at the start"),
    Flag("verify", "bool", False, "with --once: compare all keys and values at the end"),
    Flag("dest-cacert", "string", "", "as --cacert, for the destination"),
    Flag("dest-cert", "string", "", "as --cert, for the destination"),
    Flag("dest-key", "string", "", "as --key, for the destination"),
    Flag("dest-insecure-transport", "bool", True, "as --insecure-transport, for the destination"),
    Flag(
        "dest-insecure-skip-tls-verify",
        "bool",
        False,
        "as --insecure-skip-tls-verify, for the destination",
    ),
    Flag("dest-secret-file", "string", "", "as --secret-file, for the destination"),
    Flag("dest-user", "string", "", "as --user, for the destination"),
    Flag("dest-password", "string", "", "as --password, for the destination"),
)

DATA_COMMANDS = (
    Command("make-mirror [options] <destination>", "Copy keys to another cluster, and follow",
            "mirror.make_mirror", _MIRROR_FLAGS,
            description="Source (--endpoints) and destination are etcdlite or etcd. Copies all\n"
            "keys, then follows their changes until a signal ends it. With --checkpoint-key it\n"
            "goes on where it stopped when it is started again. Every 30 seconds it prints how\n"
            "many changes it has made. Leases are not copied. docs/moving.md has the procedure\n"
            "of a move.",
            examples=("make-mirror --checkpoint-key mirror/position 10.0.0.1:2379",
                      "make-mirror --prefix /a/ --dest-prefix /b/ 10.0.0.1:2379",
                      "make-mirror --checkpoint-key mirror/position --once --verify "
                      "10.0.0.1:2379")),
)  # fmt: skip
