"""The commands of etcdlite-ctl and their flags, each written once: --help, the completion scripts
and the manual follow from this table."""

from __future__ import annotations

from etcdlite.cli.flags import CONNECTION_FLAGS, Command, Flag

PREFIX_FLAG = Flag("prefix", "bool", False, "all keys that start with <key>")
FROM_KEY_FLAG = Flag("from-key", "bool", False, "all keys from <key> on, in byte order")
INTERACTIVE_FLAG = Flag("interactive", "bool", False, "prompt for input", "i")
CLUSTER_FLAG = Flag("cluster", "bool", False, "ask all members of the cluster, not --endpoints")
CONSISTENCY_FLAG = Flag(
    "consistency", "string", "l", "l: linearizable; s: serializable, perhaps stale"
)
IDENTITY_FLAG = Flag("identity", "string", "", "file with the identity of an encrypted backup")
KEY_FILE_FLAG = Flag("encryption-key-file", "string", "", "keys that encrypt the data directory")
LONG_FLAG = Flag("command-timeout", "duration", 600.0, "how long to wait for an answer")
PEER_URLS_FLAG = Flag("peer-urls", "list", (), "where the other members reach it")

PUT_FLAGS = (
    Flag("lease", "string", "0", "ID (hexadecimal) of the lease to attach the key to"),
    Flag("prev-kv", "bool", False, "show the previous key and value"),
    Flag("ignore-value", "bool", False, "keep the key's value, change its lease"),
    Flag("ignore-lease", "bool", False, "keep the key's lease, change its value"),
)
GET_FLAGS = (
    PREFIX_FLAG,
    FROM_KEY_FLAG,
    Flag("limit", "int", 0, "at most this many keys (0: all)"),
    Flag("rev", "int", 0, "as of this revision (0: now)"),
    Flag("order", "string", "", "ASCEND or DESCEND (default ASCEND)"),
    Flag("sort-by", "string", "", "CREATE, KEY, MODIFY, VALUE or VERSION"),
    Flag("keys-only", "bool", False, "leave out the values"),
    Flag("count-only", "bool", False, "only count (with -w fields or in a transaction)"),
    Flag("print-value-only", "bool", False, "print only the values (with -w simple)"),
    CONSISTENCY_FLAG,
    Flag("max-create-rev", "int", 0, "only keys created at this revision or before (0: any)"),
    Flag("max-mod-rev", "int", 0, "only keys changed last at this revision or before (0: any)"),
    Flag("min-create-rev", "int", 0, "only keys created at this revision or later"),
    Flag("min-mod-rev", "int", 0, "only keys changed last at this revision or later"),
)
DEL_FLAGS = (
    PREFIX_FLAG,
    FROM_KEY_FLAG,
    Flag("range", "bool", False, "[key, range_end), the default when range_end is given"),
    Flag("prev-kv", "bool", False, "show the deleted keys and values"),
)
WATCH_FLAGS = (
    PREFIX_FLAG,
    Flag("prev-kv", "bool", False, "show the key and value before each event"),
    Flag("rev", "int", 0, "start at this revision (0: now)"),
    Flag("progress-notify", "bool", False, "print the current revision from time to time"),
)


def _check_flags(name: str) -> tuple[Flag, ...]:
    return (
        Flag("load", "string", "s", "s(mall), m(edium), l(arge) or xl"),
        Flag("prefix", "string", f"/etcdctl-check-{name}/", "prefix of the check's keys"),
        Flag("auto-compact", "bool", False, "compact the history afterwards"),
        Flag("auto-defrag", "bool", False, "defragment the endpoints afterwards"),
    )


_CERT_FLAGS = (
    Flag("dir", "string", "certs", "the directory of the CA and of all certificates"),
    Flag("days", "int", None, "how long it is valid (default: a CA 3650 days, others 365)"),
    Flag("force", "bool", False, "replace files that exist"),
)
_PERMISSION_FLAGS = (PREFIX_FLAG, FROM_KEY_FLAG)
_PASSWORD_FLAG = Flag("interactive", "bool", True, "false: read the password from standard input")
_HOST_FLAG = Flag("host", "list", (), "its host names and addresses (default: this machine's name)")
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

COMMANDS = (
    Command("put [options] <key> <value>  (without a value, it is read from standard input)",
            "Put a key", "commands.put", PUT_FLAGS, "put",
            "A value that begins with '-' must follow '--'.",
            ("put greeting hello", "put -- offset -5", "put config < config.json")),
    Command("get [options] <key> [range_end]",
            "Get a key or a range of keys", "commands.get", GET_FLAGS, "get",
            "With range_end: key <= k < range_end.",
            ("get greeting", "get /config/ --prefix --keys-only",
             "get '' --prefix --limit 10 -w json", "get greeting --rev 5",
             "get /config/ --prefix --count-only -w fields")),
    Command("del [options] <key> [range_end]", "Delete a key or a range of keys", "commands.delete",
            DEL_FLAGS, "delete", "Prints how many keys were deleted.",
            ("del greeting", "del /config/ --prefix --prev-kv")),
    Command("txn [options]", "Run a transaction", "commands.txn", (INTERACTIVE_FLAG,), "txn",
            "Reads three blocks of lines from standard input, each ended by an empty line:\n"
            "comparisons, requests if all hold, requests if not. A comparison is\n"
            'target("key") op "value". Targets: mod, create, version, value, lease.\n'
            "Operators: = != < >. A request is a put, get or del as on the command line;\n"
            "words in double quotes may contain Go's escapes. The blocks may have labels as\n"
            "tutorials show them, lines such as compares: and success requests (get, put, del):",
            ("txn <<'END'\nmod(\"greeting\") > \"0\"\n\nput greeting \"hello again\"\n\n"
             "put greeting hello\nget greeting\n\nEND",)),
    Command("watch [options] [key] [range_end] [-- command [argument ...]]",
            "Watch keys for changes", "watch.watch", (*WATCH_FLAGS, INTERACTIVE_FLAG), "watch",
            "The command is run for each event, with ETCD_WATCH_REVISION,\n"
            "ETCD_WATCH_EVENT_TYPE, ETCD_WATCH_KEY and ETCD_WATCH_VALUE in its environment.\n"
            "The key may come from ETCDLITE_CTL_WATCH_KEY (and _RANGE_END). After a broken\n"
            "connection the watch continues where it stopped. -i reads lines with watch and\n"
            "progress commands from standard input.",
            ("watch greeting", "watch /config/ --prefix --rev 1",
             "watch /config/ --prefix -- sh -c 'echo $ETCD_WATCH_KEY'")),
    Command("compaction [options] <revision>",
            "Remove the history before a revision", "commands.compaction",
            (Flag("physical", "bool", False, "wait until the history is gone from the disk"),
             LONG_FLAG),
            description="History before the revision can no longer be read or watched.",
            examples=("compaction 1234",)),
    Command("defrag [options]", "Defragment the storage of the endpoints", "commands.defrag",
            (CLUSTER_FLAG,
             Flag("data-dir", "string", "", "instead: the directory of a member that is stopped"),
             Flag("wal-dir", "string", "", "directory of its log (default: in --data-dir)"),
             KEY_FILE_FLAG, LONG_FLAG),
            description="Returns free space to the disk while the member continues to serve.",
            examples=("defrag", "defrag --cluster")),
    Command("lease grant <ttl in seconds>",
            "Create a lease", "commands.lease_grant", prints="lease_grant",
            examples=("lease grant 60", "put --lease 694d77aa9e38260f key value")),
    Command("lease revoke <leaseID>",
            "Revoke a lease", "commands.lease_revoke", prints="lease_revoke",
            description="The attached keys are deleted."),
    Command("lease timetolive <leaseID> [options]", "Show a lease", "commands.lease_time_to_live",
            (Flag("keys", "bool", False, "show the attached keys"),), "lease_time_to_live"),
    Command("lease list", "List all leases", "commands.lease_list", prints="lease_list"),
    Command("lease keep-alive [options] <leaseID>",
            "Keep a lease alive", "commands.lease_keep_alive",
            (Flag("once", "bool", False, "renew it once and end"),), "lease_keep_alive",
            "Renews the lease after each third of its TTL, until it is revoked or a signal ends\n"
            "the command."),
    Command("alarm list", "List the alarms", "commands.alarm_list", prints="alarm"),
    Command("alarm disarm", "Disarm all alarms", "commands.alarm_disarm", prints="alarm",
            description="NOSPACE comes back unless space is made: compaction, then defrag."),
    Command("endpoint health [options]", "Check whether the endpoints can serve",
            "commands.endpoint_health", (CLUSTER_FLAG,), "endpoint_health",
            "A healthy member serves a linearizable read and has no alarm.",
            ("endpoint health --cluster -w table",)),
    Command("endpoint status [options]", "Show the status of the endpoints",
            "commands.endpoint_status", (CLUSTER_FLAG,), "endpoint_status",
            "In the simple format: endpoint, ID, version, db size, is leader, is learner,\n"
            "raft term, raft index, raft applied index, errors.",
            ("endpoint status --cluster -w table",)),
    Command("endpoint hashkv [options]", "Show a hash of the history of each endpoint",
            "commands.endpoint_hashkv",
            (CLUSTER_FLAG, Flag("rev", "int", 0, "up to this revision (0: all)"), LONG_FLAG),
            "endpoint_hashkv"),
    Command("member list [options]", "List the members", "commands.member_list",
            (CONSISTENCY_FLAG,), "member_list",
            "In the simple format: ID, status, name, peer addresses,\n"
            "client addresses, is learner."),
    Command("member add <memberName> [options]", "Add a member", "commands.member_add",
            (PEER_URLS_FLAG,
             Flag("learner", "bool", False, "the new member does not vote until promoted")),
            "member_add",
            "Prints the environment to start the new member with. Start it before you add\n"
            "another one.", ("member add m4 --peer-urls=http://10.0.0.4:2380",)),
    Command("member remove <memberID or name>",
            "Remove a member", "commands.member_remove", prints="member_changed",
            description="The member stops, and its data directory becomes useless."),
    Command("member update <memberID or name> [options]",
            "Change a member's peer URLs", "commands.member_update", (PEER_URLS_FLAG,),
            "member_changed"),
    Command("member promote <memberID or name>",
            "Make a learner a voting member", "commands.member_promote", prints="member_changed",
            description="The learner must have caught up with the leader."),
    Command("move-leader <memberID or name>",
            "Transfer leadership to another member", "commands.move_leader",
            (CLUSTER_FLAG,), "move_leader",
            "Without --cluster, one of --endpoints must be the leader's."),
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
    Command("lock [options] <lockname> [command [argument ...]]",
            "Hold a lock, until a signal or while a command runs", "locks.lock",
            (Flag("ttl", "int", 10, "seconds until the lock is free if this process dies"),), "get",
            "Prints the key of the lock once it is held, and holds it until a signal; or runs\n"
            "the command, with ETCD_LOCK_KEY and ETCD_LOCK_REV in its environment, and ends as\n"
            "the command does. Flags of the command follow '--'.",
            ("lock nightly", "lock nightly -- rsync -a data/ backup:")),
    Command("elect [options] <election-name> [proposal]",
            "Take part in an election, or observe it", "locks.elect",
            (Flag("listen", "bool", False, "only show the leaders", "l"),), "get",
            examples=("elect scheduler $(hostname)", "elect -l scheduler")),
    Command("check perf [options]",
            "Check the performance of the cluster", "check.check_perf", _check_flags("perf"),
            description="Puts 1 KiB values for a minute and judges rate and latency. Loads:\n"
            "s 150/s, m 1000/s, l 8000/s, xl 15000/s. Deletes its keys afterwards."),
    Command("check datascale [options]",
            "Check how a server's memory grows with its data", "check.check_datascale",
            _check_flags("datascale"),
            description="Loads: s 10,000, m 100,000, l 1,000,000, xl 3,000,000 keys of 1 KiB.\n"
            "Needs the first endpoint's /metrics. Deletes its keys afterwards."),
    Command("doctor [options]", "Find what is wrong with the cluster and this machine",
            "doctor.doctor",
            (Flag("server-config", "string", "", "the configuration of the member on this machine "
                  "(default: that of the package)"),), "doctor",
            "Prints a line for each finding: what, why it matters, what to do. The status is 0\n"
            "without findings, 1 for warnings, 2 for errors. As root it sees the most.",
            ("doctor", "doctor --server-config /etc/etcdlite/m1.toml -w json")),
    Command("top [options]", "Show members, rates and the keys that change most, live", "top.top",
            (Flag("interval", "duration", 2.0, "time between two looks"),
             Flag("count", "int", 0, "print this many snapshots as text (0: one, or on a terminal "
                  "a live screen)"),
             Flag("depth", "int", 2, "parts of a key that make a prefix (0: whole keys)")), "top",
            "On a terminal, q ends it. The rates of puts, deletes and transactions are those of\n"
            "the whole cluster. What changes is seen by a watch of all keys, of a sample if there\n"
            "are many changes.",
            ("top", "top --count 1 --interval 5s --depth 3")),
    Command("user add [options] <user name or user:password>", "Add a user", "users.user_add",
            (_PASSWORD_FLAG,
             Flag("new-user-password", "string", "", "the password (seen by others)"),
             Flag("no-password", "bool", False, "a user who logs in by certificate only")),
            "done", "Without a password on the command line, it is asked for on the terminal.",
            ("user add root", "user add alice --interactive=false < password.txt")),
    Command("user delete <user name>", "Delete a user", "users.user_delete", prints="done"),
    Command("user get [options] <user name>", "Show a user", "users.user_get",
            (Flag("detail", "bool", False, "show the permissions of the roles"),), "user_get"),
    Command("user list", "List the users", "users.user_list", prints="user_list"),
    Command("user passwd [options] <user name>", "Change a user's password", "users.user_passwd",
            (_PASSWORD_FLAG,),
            "done"),
    Command("user grant-role <user name> <role name>", "Give a user a role",
            "users.user_grant_role", prints="done", examples=("user grant-role alice readers",)),
    Command("user revoke-role <user name> <role name>", "Take a role from a user",
            "users.user_revoke_role", prints="done"),
    Command("role add <role name>", "Add a role", "users.role_add", prints="done"),
    Command("role delete <role name>", "Delete a role", "users.role_delete", prints="done"),
    Command("role get <role name>", "Show a role", "users.role_get", prints="role_get"),
    Command("role list", "List the roles", "users.role_list", prints="role_list"),
    Command("role grant-permission [options] <role name> <permission type> <key> [endkey]",
            "Allow a role to read or write keys", "users.role_grant_permission",
            _PERMISSION_FLAGS, "done", "The permission type is read, write or readwrite.",
            ("role grant-permission readers read /config/ --prefix",)),
    Command("role revoke-permission [options] <role name> <key> [endkey]",
            "Take a permission from a role", "users.role_revoke_permission", _PERMISSION_FLAGS,
            "role_revoke_permission",
            "The range must be the one that was granted."),
    Command("auth enable", "Make users and roles count", "users.auth_enable",
            description="From then on each request needs a user, whose roles say what is allowed.\n"
            "There must be a user root, who gets the role root if he does not have it. With\n"
            "--user, checks that this user can log in.",
            examples=("user add root", "auth enable --user root")),
    Command("auth disable", "Let everybody do everything", "users.auth_disable"),
    Command("auth status", "Show whether users count", "users.auth_status", prints="auth_status"),
    Command("cert init [options] [name]", "Make a CA", "cert.init", _CERT_FLAGS,
            description="Makes ca.crt and ca.key, for certificates of members and clients in a\n"
            "lab.", examples=("cert init", "cert init --dir /root/certs 'Lab CA'")),
    Command("cert server [options] <name>", "Make a member's certificate for its clients",
            "cert.server", (*_CERT_FLAGS, _HOST_FLAG),
            description="It is also for localhost, 127.0.0.1 and ::1. Prints the settings of the\n"
            "server that use it.", examples=("cert server m1 --host m1.lab,10.0.0.1",)),
    Command("cert peer [options] <name>", "Make a member's certificate for the other members",
            "cert.peer", (*_CERT_FLAGS, _HOST_FLAG),
            description="It is also for localhost, 127.0.0.1 and ::1. Prints the settings of the\n"
            "server that use it.", examples=("cert peer m1 --host m1.lab,10.0.0.1",)),
    Command("cert client [options] <user>", "Make a client's certificate", "cert.client",
            (*_CERT_FLAGS, Flag("host", "list", (), "its host names and addresses (none needed)")),
            description="The name is the user, if auth is enabled. Prints the flags that use it.",
            examples=("cert client alice",)),
    Command("setup [options] <name>=<host> ...", "Make the files of the members of a cluster",
            "setup.setup",
            (Flag("dir", "string", "members", "where to write the archives and what they need"),
             Flag("secret", "bool", False, "secure it with shared secrets, not with certificates"),
             Flag("join", "bool", False, "a member that was added to the running cluster"),
             Flag("days", "int", 3650, "how long the certificates are valid")),
            description="Writes an archive for each member: its configuration, its certificates\n"
            "or secrets, and the options of etcdlite-ctl there. On the machine, as root:\n"
            "tar -C / -xf m1.tar",
            examples=("setup m1=10.0.0.1 m2=10.0.0.2 m3=10.0.0.3", "setup --join m4=10.0.0.4")),
    Command("secret new [file]", "Make a file with a new shared secret", "keys.new_secret",
            description="The file (default: etcdlite.secret) has mode 0600; one that exists is\n"
            "kept. Prints the settings of the server that use it.",
            examples=("secret new /etc/etcdlite/peer.secret",)),
    Command("key new [file]", "Make a file with a new key for data at rest", "keys.new",
            description="The file has mode 0600; one that exists is kept. Without a file, prints\n"
            "the key.", examples=("key new /etc/etcdlite/data.keys",)),
    Command("key add <file>", "Put a new key first in a file of keys", "keys.add",
            description="The first key writes, the others read what it has not replaced yet.",
            examples=("key add /etc/etcdlite/data.keys",)),
    Command("key identity [file]", "Make an identity for encrypted backups", "keys.identity",
            description="Prints the public key, for snapshot save --encrypt-to. The identity, in\n"
            "a file of mode 0600, is for snapshot restore --identity. Without a file, prints both.",
            examples=("key identity backup.identity",)),
    Command("rekey [options]", "Encrypt a member's data with the first key", "keys.rekey",
            (Flag("data-dir", "string", "default.etcdlite", "the directory of the member"),
             Flag("wal-dir", "string", "", "directory of the log (default: in --data-dir)"),
             KEY_FILE_FLAG,
             Flag("check", "bool", False, "only show which keys are needed; also for a running "
                  "member")),
            description="The member must be stopped. After it, the other keys can be removed from\n"
            "the file. With --check, the status is 1 if that is not so yet.",
            examples=("rekey --data-dir m1.etcdlite --encryption-key-file data.keys",)),
    Command("version", "Print the version", ""),
    Command("completion <bash|fish|zsh>", "Print the completion script for a shell", "",
            examples=("completion bash > /etc/bash_completion.d/etcdlite-ctl",)),
)  # fmt: skip

COMMAND_BY_NAME = {command.name: command for command in COMMANDS}
GROUPS = {
    "lease": "Leases",
    "alarm": "Alarms",
    "endpoint": "Health, status and data of each endpoint",
    "member": "The members of the cluster",
    "snapshot": "Backups",
    "check": "Checks under load",
    "user": "Users and their roles",
    "role": "Roles and their permissions",
    "auth": "Whether users and roles count",
    "cert": "A CA and certificates for labs",
    "key": "Keys for data at rest and for backups",
    "secret": "Secrets that members, or clients and members, share",
    "downgrade": "Go back to the previous version of etcdlite",
}
"""What the commands with this first word are about."""


def in_group(group: str) -> list[Command]:
    """The commands with this first word."""
    return [command for command in COMMANDS if command.name.startswith(group + " ")]


REFUSED = {
    "backup": "it saves the data of etcd's API v2, which is not here; see snapshot save",
    "migrate": "a data directory has the format of the cluster version, which 'downgrade' lowers",
}
"""Commands of etcdctl and etcdutl that are not here, and why. They count for prefixes."""

INSTEAD = {
    **dict.fromkeys(("set", "mk", "update"), "put"),
    **dict.fromkeys(("ls", "keys"), "get --prefix --keys-only"),
    **{"rm": "del", "delete": "del", "members": "member list", "status": "endpoint status"},
    **dict.fromkeys(("ping", "health"), "endpoint health"),
    "cluster-health": "endpoint health --cluster",
}
"""The command here for one of other programs, such as etcdctl for API v2. They are never prefixes:
"set" is not short for setup."""
