"""Rows of etcdlite-ctl's table of commands: backups, mirrors, history, and the cluster version."""

from __future__ import annotations

from etcdlite.cli.flags import (
    CLUSTER_FLAG,
    CONNECTION_FLAGS,
    IDENTITY_FLAG,
    KEY_FILE_FLAG,
    Command,
    Flag,
)

_MIRROR_FLAGS = (
    Flag("prefix", "string", "", "only keys that start with this"),
    Flag("rev", "int", 0, "do not copy: follow from this revision of the source on"),
    Flag("dest-prefix", "string", "", "what replaces the prefix at the destination"),
    Flag("no-dest-prefix", "bool", False, "leave out the prefix at the destination"),
    Flag("max-txn-ops", "int", 128, "changes in one transaction of the destination"),
    Flag("checkpoint-key", "string", "",
         "keep the position in this key of the destination, and continue there"),
    Flag("once", "bool", False, "end at the revision that the source has at the start"),
    Flag("verify", "bool", False, "with --once: compare all keys and values at the end"),
    *(flag._replace(name=f"dest-{flag.name}", help=f"as --{flag.name}, for the destination")
      for flag in CONNECTION_FLAGS),
)  # fmt: skip

_AT_FLAG = Flag("at", "string", "", "as --rev, at a time (2026-11-24T10:00:00Z, or 90m ago)")

DATA_COMMANDS = (
    Command("snapshot save <filename>", "Save a backup of a member to a file", "snapshots.save",
            (Flag("format", "string", "etcdlite", "etcdlite, or etcd: a backup for etcdutl"),
             Flag("encrypt-to", "list", (), "encrypt to these public keys (age1...)"),
             Flag("rev", "int", 0, "the keys as of this revision, without history"),
             _AT_FLAG,
             Flag("prefix", "list", (), "only keys with these prefixes, without history")),
            description="The file is complete and synced when it appears under its name. With\n"
            "--encrypt-to it is a file of age (age-encryption.org), encrypted as it arrives.",
            examples=("snapshot save backup.db", "snapshot save --encrypt-to age1... backup.age",
                      "snapshot save --prefix /a/ --prefix /b/ some.xtr",
                      "snapshot save --rev 4711 then.xtr")),
    Command("snapshot status <filename>",
            "Check a backup and show what it holds", "snapshots.status", (IDENTITY_FLAG,),
            "snapshot_status",
            "In the simple format: hash, revision, total keys, total size."),
    Command("snapshot restore <filename> [options]",
            "Make a data directory from a backup, also one of etcd", "snapshots.restore",
            (Flag("data-dir", "string", "", "the new directory (default: name + .etcdlite)"),
             Flag("wal-dir", "string", "", "directory of the log (default: in --data-dir)"),
             Flag("name", "string", "default", "the member's name"),
             Flag("initial-cluster", "string", "",
                  "all members: name=peer URL,... (default: this one)"),
             Flag("initial-cluster-token", "string", "etcd-cluster", "name of the new cluster"),
             Flag("initial-advertise-peer-urls", "string", "http://localhost:2380",
                  "this member's peer URLs"),
             Flag("skip-hash-check", "bool", False, "restore even if the checksum is wrong"),
             Flag("initial-memory-map-size", "int", 0, "no effect; nothing is mapped"),
             Flag("bump-revision", "int", 0, "add this to the revision"),
             Flag("mark-compacted", "bool", False,
                  "compact all before; required with --bump-revision"),
             IDENTITY_FLAG, KEY_FILE_FLAG,
             Flag("rev", "int", 0, "the state as of this revision, as new keys"),
             _AT_FLAG,
             Flag("prefix", "list", (), "only keys with these prefixes, as new keys"),
             Flag("leases", "string", "refuse", "keep, drop or refuse the leases of new keys"),
             Flag("into-cluster", "bool", False, "change the keys of --endpoints instead"),
             Flag("dry-run", "bool", False, "with --into-cluster: only show the changes")),
            description="Works on local files; no server is needed. The directory must be empty\n"
            "or not exist. With --into-cluster, keys of a running cluster become those of the\n"
            "file, by transactions; others there are deleted, if they have the prefixes.",
            examples=("snapshot restore backup.db --data-dir new.etcdlite",
                      "snapshot restore backup.db --rev 4711 --data-dir then.etcdlite",
                      "snapshot restore backup.db --prefix /a/ --into-cluster --dry-run")),
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
    Command("hashkv [options] <filename>", "Show the hash of the history in a backup",
            "offline.hashkv",
            (Flag("rev", "int", 0, "up to this revision (0: all)"), IDENTITY_FLAG), "hashkv",
            "The same as endpoint hashkv shows of a member with that state. In the simple\n"
            "format: hash, hash revision, compact revision. It needs space for the data beside\n"
            "the file.", ("hashkv backup.db",)),
    Command("history [options] <key>", "Show the changes of a key", "differences.history", (),
            "difference", "The oldest first, as far as history is kept.", examples=("history a",)),
    Command("diff [options] [prefix]", "Show the keys that differ at two revisions",
            "differences.diff", (Flag("rev", "string", "", "two revisions; A.. ends now"),),
            "difference",
            "A line for each key: + it is new, - it is deleted, ~ it is changed.",
            examples=("diff --rev 100..200", "diff --rev 100.. /a/")),
    Command("downgrade validate <TARGET_VERSION>",
            "Check whether the cluster can go down to a version", "commands.downgrade_validate",
            prints="downgrade",
            description="The version is that of etcdlite before the cluster's: 0.1 for 0.2."),
    Command("downgrade enable <TARGET_VERSION>", "Let the cluster go down to a version",
            "commands.downgrade_enable", prints="downgrade",
            description="From then on only its formats are written. Start the older program on a\n"
            "member once 'downgrade status' shows its storage version.",
            examples=("downgrade enable 0.1",)),
    Command("downgrade cancel", "Let the cluster version rise again", "commands.downgrade_cancel",
            prints="downgrade"),
    Command("downgrade status [options]", "Show which etcdlite can open each member's data",
            "commands.downgrade_status", (CLUSTER_FLAG,), "downgrade_status",
            description="In the simple format: endpoint, storage version, downgrade target. The\n"
            "storage version is the oldest etcdlite that can open the data directory.",
            examples=("downgrade status --cluster",)),
)  # fmt: skip
