"""What etcdlite-ctl prints: the formats of etcdctl 3.5, byte for byte.

`PRINTERS` has a row for each kind of response and in it a function for each format that etcdctl
prints it in. A function gives the content; the format finishes it (`_FINISH`):

- simple: lines, for people and shell pipes; keys and values raw, or as `\\x66\\x6f` with `--hex`;
- fields: lines `"Name" : value`; bytes are quoted as Go's `%q` does;
- json: Go's encoding/json of etcd's structs (`json_mapping.GO`), or of etcdctl's own structs, which
  are dicts here;
- table: a header and rows, for endpoints, members and snapshots only;
- protobuf: the encoded response.

Printers do no input or output and keep no state between calls. Fields that etcd 3.5's messages do
not have (a 3.6 server sends some) are not shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

from etcdlite import json_mapping, proto
from etcdlite.cli.failures import one_line
from etcdlite.client.errors import part
from etcdlite.client.operations import prefix_end
from etcdlite.notation import format_duration, format_size, quote

MAX_CELL_CHARS = 30
"""A longer cell of a table is broken at spaces."""

SHOWN_BYTES = 200
"""A longer value of a difference is shown by its beginning and its size."""

_NOT_IN_ETCD_3_5 = {"storageVersion", "dbSizeQuota", "downgradeInfo", "hash_revision"}

_EVENT_NAMES = {number: name for name, number in proto.ENUMS["Event.EventType"].items()}
_PERMISSION_NAMES = {number: name for name, number in proto.ENUMS["Permission.Type"].items()}
_ALARM_NAMES = {number: name for name, number in proto.ENUMS["AlarmType"].items()}

_RESPONSE_KINDS = {
    "response_range": "get",
    "response_put": "put",
    "response_delete_range": "delete",
    "response_txn": "txn",
}

Lines = list[str | bytes]
Rows = list[tuple[str, ...]]
Content = Callable[..., Any]
"""A function of `PRINTERS`."""


class Health(NamedTuple):
    """What `endpoint health` found. `took_ns` is in nanoseconds; `error` is "" if healthy."""

    endpoint: str
    healthy: bool
    took_ns: int
    error: str


class EndpointResponse(NamedTuple):
    """A member's answer and the endpoint that gave it, as the user wrote it."""

    endpoint: str
    response: Any


class Printer(NamedTuple):
    """A format, with the flags that change it."""

    format: str
    hex_strings: bool = False
    """--hex: keys and values as `\\x66\\x6f`."""
    values_only: bool = False
    """--print-value-only (simple format only)."""

    def supports(self, kind: str) -> bool:
        return self.format in PRINTERS[kind]

    def show(self, kind: str, response: Any, *more: Any) -> bytes:
        """The bytes for standard output. The format must support the kind."""
        return _FINISH[self.format](PRINTERS[kind][self.format](self, response, *more))


# Finishing.


def join_lines(lines: Iterable[str | bytes]) -> bytes:
    """The lines, each ended by a newline. In text, surrogate escapes become the bytes they stand
    for, and what does not print is escaped; bytes stay as they are."""
    encoded = (
        one_line(line).encode("utf-8", "surrogateescape") if isinstance(line, str) else line
        for line in lines
    )
    return b"".join(line + b"\n" for line in encoded)


def go_json(value: Any) -> str:
    """`value` as Go's encoding/json writes it.

    Messages leave out zero values; dicts show all that they hold. Bytes become base64."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return json_mapping.string(value)
    if isinstance(value, bytes):
        return json_mapping.base64(value)
    if isinstance(value, proto.Message):
        return json_mapping.text(value, json_mapping.GO)
    if isinstance(value, dict):
        members = (f"{json_mapping.string(name)}:{go_json(item)}" for name, item in value.items())
        return "{" + ",".join(members) + "}"
    return "[" + ",".join(map(go_json, value)) + "]"


def table(content: tuple[Sequence[str], Iterable[Sequence[str]]]) -> bytes:
    """A framed table of (header, rows): names centred, cells right-aligned, long cells broken."""
    header, rows = content
    broken = [[_break(one_line(cell)) for cell in row] for row in rows]
    widths = [len(name) for name in header]
    for row in broken:
        for column, lines in enumerate(row):
            # A cell that was broken makes its column as wide as the limit.
            least = MAX_CELL_CHARS if len(lines) > 1 else 0
            widths[column] = max(widths[column], least, *map(len, lines))
    rule = "+" + "".join("-" * (width + 2) + "+" for width in widths)
    names = (f"{name:^{width}}" for name, width in zip(header, widths, strict=True))
    out = [rule, "| " + " | ".join(names) + " |", rule]
    for row in broken:
        for cells in zip_longest(*row, fillvalue=""):
            shown = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
            out.append("| " + " | ".join(shown) + " |")
    return join_lines([*out, rule])


def _break(cell: str) -> list[str]:
    if len(cell) <= MAX_CELL_CHARS:
        return [cell]
    lines: list[str] = []
    for word in cell.split(" "):
        if lines and len(lines[-1]) + 1 + len(word) <= MAX_CELL_CHARS:
            lines[-1] += " " + word
        else:
            lines.append(word)
    return lines


_FINISH: dict[str, Callable[[Any], bytes]] = {
    "simple": join_lines,
    "fields": join_lines,
    "json": lambda value: join_lines([go_json(value)]),
    "table": table,
    "protobuf": lambda response: response.encode(),
}


# Parts.


def _true_false(flag: bool) -> str:
    return "true" if flag else "false"


def hex_text(data: bytes) -> bytes:
    """`data` as `--hex` shows it: \\x66\\x6f."""
    return b"".join(b"\\x%02x" % byte for byte in data)


def _kv_lines(printer: Printer, kv: Any) -> Lines:
    if kv is None:
        return []
    key, value = map(hex_text, (kv.key, kv.value)) if printer.hex_strings else (kv.key, kv.value)
    return [value] if printer.values_only else [key, value]


def _kvs_lines(printer: Printer, kvs: Iterable[Any]) -> Lines:
    return [line for kv in kvs for line in _kv_lines(printer, kv)]


def _fields(**values: Any) -> Lines:
    return [f'"{name}" : {value}' for name, value in values.items()]


def _header_fields(response: Any) -> Lines:
    header = response.header or proto.ResponseHeader()
    return _fields(
        ClusterID=header.cluster_id,
        MemberID=header.member_id,
        Revision=header.revision,
        RaftTerm=header.raft_term,
    )


def _kv_fields(kv: Any, prefix: str = "") -> Lines:
    if kv is None:
        return []
    return [
        f'"{prefix}Key" : {quote(kv.key)}',
        f'"{prefix}CreateRevision" : {kv.create_revision}',
        f'"{prefix}ModRevision" : {kv.mod_revision}',
        f'"{prefix}Version" : {kv.version}',
        f'"{prefix}Value" : {quote(kv.value)}',
        f'"{prefix}Lease" : {kv.lease}',
    ]


def _flat_header(response: Any) -> dict[str, Any]:
    """The header's fields as etcdctl's lease structs embed them: beside the others, no zeros."""
    header = response.header or proto.ResponseHeader()
    return {field.name: value for field, value in header.present()}


def _unchanged(printer: Printer, response: Any, *_: Any) -> Any:
    """The content is the response itself, as JSON or protobuf."""
    return response


def _as_etcd_3_5(message: Any) -> Any:
    """A message without the fields that only newer servers send."""
    shown = {f.name: v for f, v in message.present() if f.name not in _NOT_IN_ETCD_3_5}
    return type(message)(**shown)


# Keys.


def _fields_get(_: Printer, response: Any) -> Lines:
    lines = _header_fields(response)
    for kv in response.kvs:
        lines += _kv_fields(kv)
    return lines + _fields(More=_true_false(response.more), Count=response.count)


def _fields_delete(_: Printer, response: Any) -> Lines:
    lines = _header_fields(response) + _fields(Deleted=response.deleted)
    for kv in response.prev_kvs:
        lines += _kv_fields(kv, "Prev")
    return lines


def _response_op_lines(printer: Printer, answer: Any) -> Lines:
    member = answer.which("response")
    content = PRINTERS[_RESPONSE_KINDS[member]][printer.format]
    lines: Lines = content(printer, getattr(answer, member))
    return lines


def _simple_txn(printer: Printer, response: Any) -> Lines:
    lines: Lines = ["SUCCESS" if response.succeeded else "FAILURE"]
    for answer in response.responses:
        lines += ["", *_response_op_lines(printer, answer)]
    return lines


def _fields_txn(printer: Printer, response: Any) -> Lines:
    lines = _header_fields(response) + _fields(Succeeded=_true_false(response.succeeded))
    for answer in response.responses:
        lines += _response_op_lines(printer, answer)
    return lines


def _simple_watch(printer: Printer, response: Any) -> Lines:
    lines: Lines = []
    for event in response.events:
        kind = str(_EVENT_NAMES.get(event.type, event.type))
        lines += [kind, *_kvs_lines(printer, (event.prev_kv, event.kv))]
    return lines


def _fields_watch(_: Printer, response: Any) -> Lines:
    lines = _header_fields(response)
    for event in response.events:
        lines += _fields(Type=_EVENT_NAMES.get(event.type, event.type))
        lines += _kv_fields(event.prev_kv, "Prev") + _kv_fields(event.kv)
    return lines


def _json_watch(_: Printer, response: Any) -> Any:
    return {
        "Header": response.header or proto.ResponseHeader(),
        "Events": response.events,
        "CompactRevision": response.compact_revision,
        "Canceled": response.canceled,
        "Created": response.created,
    }


# Leases.


def _fields_lease(_: Printer, response: Any) -> Lines:
    return _header_fields(response) + _fields(ID=response.ID, TTL=response.TTL)


def _simple_time_to_live(_: Printer, response: Any, with_keys: bool) -> Lines:
    if response.grantedTTL == 0 and response.TTL == -1:
        return [f"lease {response.ID:016x} already expired"]
    text = (
        f"lease {response.ID:016x} granted with TTL({response.grantedTTL}s), "
        f"remaining({response.TTL}s)"
    ).encode()
    if with_keys:
        text += b", attached keys([" + b" ".join(response.keys) + b"])"
    return [text]


def _fields_time_to_live(_: Printer, response: Any, with_keys: bool) -> Lines:
    lines = _fields_lease(_, response) + _fields(GrantedTTL=response.grantedTTL)
    return lines + [f'"Key" : {quote(key)}' for key in response.keys]


def _json_time_to_live(_: Printer, response: Any, with_keys: bool) -> Any:
    return _flat_header(response) | {
        "id": response.ID,
        "ttl": response.TTL,
        "granted-ttl": response.grantedTTL,
        "keys": response.keys or None,
    }


# Alarms and members.


def alarm_name(alarm: Any) -> str:
    return str(_ALARM_NAMES.get(alarm.alarm, alarm.alarm))


def _fields_alarm(_: Printer, response: Any) -> Lines:
    # `alarm disarm` gathers several answers under no header.
    lines = _header_fields(response) if response.header is not None else []
    for alarm in response.alarms:
        lines += [*_fields(MemberID=alarm.memberID, AlarmType=alarm_name(alarm)), ""]
    return lines


def _member_rows(response: Any) -> Rows:
    return [
        (
            f"{member.ID:x}",
            "started" if member.name else "unstarted",
            member.name,
            ",".join(member.peerURLs),
            ",".join(member.clientURLs),
            _true_false(member.isLearner),
        )
        for member in response.members
    ]


def _fields_member_list(_: Printer, response: Any) -> Lines:
    lines = _header_fields(response)
    for member in response.members:
        lines += _fields(ID=member.ID, Name=quote(member.name))
        lines += [f'"PeerURL" : {quote(url)}' for url in member.peerURLs]
        lines += [f'"ClientURL" : {quote(url)}' for url in member.clientURLs]
        lines += [*_fields(IsLearner=_true_false(member.isLearner)), ""]
    return lines


def _json_member_list(printer: Printer, response: Any) -> Any:
    if not printer.hex_strings:
        return response
    # etcdctl writes this variant by hand: no learner flag, and "clientURLS".
    header = response.header or proto.ResponseHeader()
    members = [
        {
            "ID": f"{member.ID:x}",
            "name": member.name,
            "peerURLs": member.peerURLs or None,
            "clientURLS": member.clientURLs or None,
        }
        for member in response.members
    ]
    ids = {"cluster_id": f"{header.cluster_id:x}", "member_id": f"{header.member_id:x}"}
    return {"header": ids | {"raft_term": header.raft_term}, "members": members}


# Users and roles.


def _range_text(permission: Any) -> bytes:
    """The keys of a permission, as etcdctl shows them."""
    key, end = permission.key, permission.range_end
    if not end:
        return bytes(key)
    text = b"[%s, %s" % (key, b"<open ended>" if end == b"\0" else end + b")")
    # Of an empty key etcdctl, too, says that this is its prefix.
    return text + (b" (prefix %s)" % key if end == prefix_end(key) else b"")


def _simple_role(_: Printer, response: Any, name: str) -> Lines:
    lines: Lines = [f"Role {name}"]
    for kind in ("Read", "Write"):
        lines.append(f"KV {kind}:")
        for permission in response.perm:
            if kind.upper() in _PERMISSION_NAMES.get(permission.permType, ""):
                lines.append(b"\t" + _range_text(permission))
    return lines


def _fields_role(_: Printer, response: Any, name: str) -> Lines:
    lines = _header_fields(response)
    for permission in response.perm:
        # Two spaces, as etcdctl has them.
        kind = permission.permType
        lines.append(f'"PermType" :  {_PERMISSION_NAMES.get(kind, kind)}')
        lines += [f'"Key" : {quote(permission.key)}', f'"RangeEnd" : {quote(permission.range_end)}']
    return lines


def _simple_revoked(_: Printer, response: Any, name: str, key: str, end: bytes) -> Lines:
    if not end:
        return [f"Permission of key {key} is revoked from role {name}"]
    shown = "<open ended>" if end == b"\0" else end.decode("utf-8", "surrogateescape") + ")"
    return [f"Permission of range [{key}, {shown} is revoked from role {name}"]


# Differences: the old and the new KeyValue, of which one may be None.


def _shown_value(value: bytes) -> str:
    if len(value) <= SHOWN_BYTES:
        return quote(value)
    return f"{quote(value[:SHOWN_BYTES])}... ({len(value)} bytes)"


def _simple_difference(_: Printer, difference: Any, more: dict[str, Any]) -> Lines:
    old, new = difference
    sign = "+" if old is None else "-" if new is None else "~"
    shown = " -> ".join(
        _shown_value(kv.value) + (f" (lease {kv.lease:x})" if kv.lease else "")
        for kv in (old, new)
        if kv is not None
    )
    said = "".join(f"  {name} {value}" for name, value in more.items() if value != "")
    return [f"{sign} {quote((old or new).key)} = {shown}{said}"]


def _json_difference(_: Printer, difference: Any, more: dict[str, Any]) -> Any:
    old, new = difference
    found: dict[str, Any] = {"key": (old or new).key, **more}
    for name, kv in (("old", old), ("new", new)):
        if kv is not None:
            found[name] = kv.value
            if kv.lease:
                found[f"{name}_lease"] = f"{kv.lease:x}"
    return found


# Endpoints.


def _health_rows(found: Sequence[Health]) -> Rows:
    return [
        (h.endpoint, _true_false(h.healthy), format_duration(h.took_ns), h.error) for h in found
    ]


def _simple_health(_: Printer, found: Sequence[Health]) -> Lines:
    """The healthy ones; the others are reported on standard error."""
    return [
        f"{health.endpoint} is healthy: successfully committed proposal: "
        f"took = {format_duration(health.took_ns)}"
        for health in found
        if health.healthy
    ]


def _fields_health(found: Health) -> Lines:
    ((endpoint, healthy, took, error),) = _health_rows([found])
    return _fields(Endpoint=quote(endpoint), Health=healthy, Took=took, Error=error)


def _json_health(_: Printer, found: Sequence[Health]) -> Any:
    return [
        {"endpoint": h.endpoint, "health": h.healthy, "took": format_duration(h.took_ns)}
        | ({"error": h.error} if h.error else {})
        for h in found
    ]


def _status_rows(answers: Sequence[EndpointResponse]) -> Rows:
    rows: Rows = []
    for endpoint, status in answers:
        member_id = status.header.member_id if status.header is not None else 0
        rows.append(
            (
                endpoint,
                f"{member_id:x}",
                status.version,
                format_size(status.dbSize),
                _true_false(status.leader == member_id),
                _true_false(status.isLearner),
                str(status.raftTerm),
                str(status.raftIndex),
                str(status.raftAppliedIndex),
                ", ".join(status.errors),
            )
        )
    return rows


def _downgrade_target(status: Any) -> str:
    return status.downgradeInfo.targetVersion if status.downgradeInfo is not None else ""


def _fields_status(answer: EndpointResponse) -> Lines:
    endpoint, status = answer
    return _header_fields(status) + _fields(
        Version=quote(status.version),
        DBSize=status.dbSize,
        Leader=status.leader,
        IsLearner=_true_false(status.isLearner),
        RaftIndex=status.raftIndex,
        RaftTerm=status.raftTerm,
        RaftAppliedIndex=status.raftAppliedIndex,
        Errors=f"[{' '.join(status.errors)}]",
        Endpoint=quote(endpoint),
    )


def _fields_hashkv(answer: EndpointResponse) -> Lines:
    endpoint, response = answer
    return _header_fields(response) + _fields(Endpoint=quote(endpoint), Hash=response.hash)


def _fields_of_each(fields: Callable[[Any], Lines]) -> Content:
    """The fields of each endpoint, and an empty line after them."""
    return lambda _, found: [line for one in found for line in (*fields(one), "")]


def _json_of_each(name: str) -> Callable[[Printer, Sequence[EndpointResponse]], Any]:
    return lambda _, answers: [
        {"Endpoint": endpoint, name: _as_etcd_3_5(response)} for endpoint, response in answers
    ]


# The table.


def _row(simple: Content, fields: Content | None, json: Content = _unchanged) -> dict[str, Content]:
    formats = {"simple": simple, "json": json, "protobuf": _unchanged}
    return formats | {"fields": fields} if fields else formats


def _rows(
    header: str, rows: Callable[[Any], Rows], fields: Content, json: Content
) -> dict[str, Content]:
    """Of a kind that is shown as rows, with commas or as a table. `header`: names, with commas."""
    return {
        "simple": lambda _, content: [", ".join(row) for row in rows(content)],
        "fields": fields,
        "json": json,
        "table": lambda _, content: (header.split(", "), rows(content)),
    }


PRINTERS: dict[str, dict[str, Content]] = {
    "put": _row(
        lambda p, r: ["OK", *_kv_lines(p, r.prev_kv)],
        lambda _, r: _header_fields(r) + _kv_fields(r.prev_kv, "Prev"),
    ),
    "get": _row(lambda p, r: _kvs_lines(p, r.kvs), _fields_get),
    "delete": _row(lambda p, r: [str(r.deleted), *_kvs_lines(p, r.prev_kvs)], _fields_delete),
    "txn": _row(_simple_txn, _fields_txn),
    "watch": _row(_simple_watch, _fields_watch, _json_watch),
    "lease_grant": _row(
        lambda _, r: [f"lease {r.ID:016x} granted with TTL({r.TTL}s)"],
        _fields_lease,
        lambda _, r: _flat_header(r) | {"ID": r.ID, "TTL": r.TTL, "Error": r.error},
    ),
    "lease_revoke": _row(
        lambda _, r, lease: [f"lease {lease:016x} revoked"], lambda _, r, lease: _header_fields(r)
    ),
    "lease_time_to_live": _row(_simple_time_to_live, _fields_time_to_live, _json_time_to_live),
    "lease_list": _row(
        lambda _, r: [f"found {len(r.leases)} leases", *(f"{lease.ID:016x}" for lease in r.leases)],
        lambda _, r: _header_fields(r) + [f'"ID" : {lease.ID}' for lease in r.leases],
        lambda _, r: _flat_header(r) | {"leases": [{"id": lease.ID} for lease in r.leases]},
    ),
    "lease_keep_alive": _row(
        lambda _, r: [f"lease {r.ID:016x} keepalived with TTL({r.TTL})"],
        _fields_lease,
        lambda _, r: _flat_header(r) | {"ID": r.ID, "TTL": r.TTL},
    ),
    "alarm": _row(
        # The text form of the message, as Go prints it: a space after each field.
        lambda _, r: [f"memberID:{a.memberID} alarm:{alarm_name(a)} " for a in r.alarms],
        _fields_alarm,
    ),
    "member_list": _rows(
        "ID, STATUS, NAME, PEER ADDRS, CLIENT ADDRS, IS LEARNER",
        _member_rows,
        _fields_member_list,
        _json_member_list,
    )
    | {"protobuf": _unchanged},
    "member_add": _row(
        lambda _, r: [
            f"Member {part(r, 'member').ID:16x} added to cluster {part(r).cluster_id:16x}"
        ],
        None,
    ),
    # `what`: "removed from", "updated in" or "promoted in".
    "member_changed": _row(
        lambda _, r, member, what: [f"Member {member:16x} {what} cluster {part(r).cluster_id:16x}"],
        None,
    ),
    "move_leader": _row(
        lambda _, r, old, new: [f"Leadership transferred from {old:x} to {new:x}"], None
    ),
    "downgrade": _row(
        lambda _, r, action: [f"Downgrade {action} success, cluster version {r.version}"], None
    ),
    # `text` is what the simple format says.
    "done": _row(lambda _, r, text: [text], lambda _, r, text: _header_fields(r)),
    "user_get": _row(
        lambda _, r, name: [f"User: {name}", "Roles:" + "".join(f" {role}" for role in r.roles)],
        None,
    ),
    "user_list": _row(lambda _, r: list(r.users), None),
    "role_get": _row(_simple_role, _fields_role),
    "role_list": _row(
        lambda _, r: list(r.roles),
        lambda _, r: [*_header_fields(r), '"Roles" :' + "".join(f" {quote(x)}" for x in r.roles)],
    ),
    "role_revoke_permission": _row(_simple_revoked, lambda _, r, name, key, end: _header_fields(r)),
    "auth_status": _row(
        lambda _, r: [
            f"Authentication Status: {_true_false(r.enabled)}",
            f"AuthRevision: {r.authRevision}",
        ],
        None,
    ),
    "endpoint_health": _rows(
        "ENDPOINT, HEALTH, TOOK, ERROR", _health_rows, _fields_of_each(_fields_health), _json_health
    )
    | {"simple": _simple_health},
    "endpoint_status": _rows(
        "ENDPOINT, ID, VERSION, DB SIZE, IS LEADER, IS LEARNER, RAFT TERM, RAFT INDEX, "
        "RAFT APPLIED INDEX, ERRORS",
        _status_rows,
        _fields_of_each(_fields_status),
        _json_of_each("Status"),
    ),
    "downgrade_status": _rows(
        "ENDPOINT, STORAGE VERSION, DOWNGRADE TARGET VERSION",
        lambda answers: [(e, r.storageVersion, _downgrade_target(r)) for e, r in answers],
        lambda _, answers: [
            line
            for endpoint, status in answers
            for line in _fields(
                StorageVersion=quote(status.storageVersion),
                DowngradeTargetVersion=quote(_downgrade_target(status)),
                Endpoint=quote(endpoint),
            )
        ],
        lambda _, answers: [
            {"Endpoint": endpoint, "Status": status} for endpoint, status in answers
        ],
    ),
    "endpoint_hashkv": _rows(
        "ENDPOINT, HASH",
        lambda answers: [(endpoint, str(response.hash)) for endpoint, response in answers],
        _fields_of_each(_fields_hashkv),
        _json_of_each("HashKV"),
    ),
    "difference": {"simple": _simple_difference, "json": _json_difference},
    "top": {"simple": lambda _, lines: lines},
    "doctor": {
        "simple": lambda _, found, unseen: [finding.line for finding in found],
        "json": lambda _, found, unseen: {
            "findings": [finding.members for finding in found],
            "unseen": unseen,
        },
    },
    # Of offline.Hash.
    "hashkv": _rows(
        "HASH, HASH REVISION, COMPACT REVISION",
        lambda h: [tuple(map(str, h))],
        lambda _, h: _fields(
            Hash=h.hash, HashRevision=h.revision, CompactRevision=h.compact_revision
        ),
        lambda _, h: {
            "hash": h.hash,
            "hashRevision": h.revision,
            "compactRevision": h.compact_revision,
        },
    ),
    # The status is a backup.Status.
    "snapshot_status": _rows(
        "HASH, REVISION, TOTAL KEYS, TOTAL SIZE",
        lambda s: [
            (f"{s.hash:x}", str(s.revision), str(s.total_keys), format_size(s.total_size_bytes))
        ],
        lambda _, s: _fields(
            Hash=s.hash, Revision=s.revision, Keys=s.total_keys, Size=s.total_size_bytes
        ),
        lambda _, s: {
            "hash": s.hash,
            "revision": s.revision,
            "totalKey": s.total_keys,
            "totalSize": s.total_size_bytes,
        },
    ),
}
"""Kind of response -> format -> function(printer, response, ...) that gives the content."""
