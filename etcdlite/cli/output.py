"""What etcdlite-ctl prints: the formats of etcdctl 3.5, byte for byte.

A printer has one method per kind of response and turns it into the bytes for standard output:

- `Simple`: for people and shell pipes; keys and values raw, or as `\\x66\\x6f` with `--hex`;
- `Fields`: `"Name" : value` lines; bytes are quoted as Go's `%q` does;
- `Json`: what Go's encoding/json makes of etcd's structs, which is not protobuf's JSON mapping:
  numbers are numbers, bytes are base64, zero values are left out, names are the protobuf field
  names, except in the structs of etcdctl's own (lease, endpoint and watch output);
- `Table`: for endpoints, members and snapshots only;
- `Protobuf`: the encoded response.

Invariants: printers do no input or output and keep no state between calls. Fields that etcd 3.5's
messages do not have (a 3.6 server sends some) are not shown. A kind that a format does not have
raises UnsupportedFormat, and `supports` tells beforehand.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from etcdlite import json_mapping, proto

DEFAULT_FORMAT = "simple"

MAX_CELL_CHARS = 30
"""A table's cell with more is broken at spaces, as etcdctl's tables are."""

_NOT_IN_ETCD_3_5 = {"storageVersion", "dbSizeQuota", "downgradeInfo", "hash_revision"}

_EVENT_NAMES = {number: name for name, number in proto.ENUMS["Event.EventType"].items()}
_ALARM_NAMES = {number: name for name, number in proto.ENUMS["AlarmType"].items()}

_RESPONSE_KINDS = ("response_range", "response_put", "response_delete_range", "response_txn")


class UnsupportedFormat(Exception):
    """The format exists but cannot show this kind of response."""


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


# How Go writes things.

_GO_ESCAPES = {
    "\a": "\\a",
    "\b": "\\b",
    "\f": "\\f",
    "\n": "\\n",
    "\r": "\\r",
    "\t": "\\t",
    "\v": "\\v",
    '"': '\\"',
    "\\": "\\\\",
}


def go_quote(data: bytes | str) -> str:
    """`data` as Go's `%q` (strconv.Quote) writes it."""
    raw = data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data
    parts = []
    for char in raw.decode("utf-8", "surrogateescape"):
        code = ord(char)
        if char in _GO_ESCAPES:
            parts.append(_GO_ESCAPES[char])
        elif char.isprintable() and not 0xDC80 <= code <= 0xDCFF:
            parts.append(char)
        elif 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8
            parts.append(f"\\x{code - 0xDC00:02x}")
        elif code < 0x20:
            parts.append(f"\\x{code:02x}")
        elif code < 0x10000:
            parts.append(f"\\u{code:04x}")
        else:
            parts.append(f"\\U{code:08x}")
    return '"' + "".join(parts) + '"'


def go_json(value: Any) -> str:
    """`value` as Go's encoding/json writes it.

    Messages leave out what is zero or not there; dicts show all they hold. Bytes become base64.
    """
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


def _as_etcd_3_5(message: Any) -> Any:
    """A message without the fields that only newer servers send."""
    shown = {f.name: v for f, v in message.present() if f.name not in _NOT_IN_ETCD_3_5}
    return type(message)(**shown)


def go_duration(duration_ns: int) -> str:
    """Nanoseconds as Go's time.Duration prints them: "1.5ms", "1m0.25s", "0s"."""
    if duration_ns == 0:
        return "0s"
    sign, rest = ("-", -duration_ns) if duration_ns < 0 else ("", duration_ns)
    for unit, size in (("ns", 1), ("µs", 1_000), ("ms", 1_000_000)):
        if rest < size * 1000:
            return sign + _decimal(rest, size) + unit
    minutes, rest = divmod(rest, 60_000_000_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours}h{minutes}m" if hours else f"{minutes}m" if minutes else ""
    return sign + text + _decimal(rest, 1_000_000_000) + "s"


def _decimal(number: int, unit: int) -> str:
    whole, rest = divmod(number, unit)
    digits = str(rest).zfill(len(str(unit)) - 1).rstrip("0") if rest else ""
    return f"{whole}.{digits}" if digits else str(whole)


def size_text(size_bytes: int) -> str:
    """A size in powers of 1000, two digits: "512 B", "20 kB", "1.5 MB"."""
    if size_bytes < 10:
        return f"{size_bytes} B"
    exponent = (len(str(size_bytes)) - 1) // 3
    unit = ("B", "kB", "MB", "GB", "TB", "PB", "EB")[exponent]
    value = int(size_bytes / 1000**exponent * 10 + 0.5) / 10
    return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"


def hex_text(data: bytes) -> bytes:
    """`data` as `--hex` shows it: \\x66\\x6f."""
    return b"".join(b"\\x%02x" % byte for byte in data)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> bytes:
    """A table with a frame: names centred, cells right-aligned and broken at spaces if long."""
    broken = [[_break(cell) for cell in row] for row in rows]
    widths = [len(name) for name in header]
    for row in broken:
        for column, lines in enumerate(row):
            # A cell that was broken makes its column as wide as the limit.
            least = MAX_CELL_CHARS if len(lines) > 1 else 0
            widths[column] = max(widths[column], least, *map(len, lines))
    rule = "+" + "".join("-" * (width + 2) + "+" for width in widths)
    names = []
    for name, width in zip(header, widths, strict=True):
        left = (width - len(name)) // 2
        names.append(" " * left + name + " " * (width - len(name) - left))
    lines_out = [rule, "| " + " | ".join(names) + " |", rule]
    for row in broken:
        for number in range(max(map(len, row))):
            cells = (lines[number] if number < len(lines) else "" for lines in row)
            shown = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
            lines_out.append("| " + " | ".join(shown) + " |")
    lines_out.append(rule)
    return "".join(line + "\n" for line in lines_out).encode()


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


# The printers.


class Printer:
    """The base: a format that supports nothing. Every method returns what to print."""

    name = ""

    def __init__(self, *, hex_strings: bool = False, values_only: bool = False) -> None:
        """`hex_strings`: `--hex`; `values_only`: `--print-value-only` (simple format only)."""
        self.hex_strings = hex_strings
        self.values_only = values_only

    def supports(self, kind: str) -> bool:
        """Whether this format can print `kind`, the name of a method."""
        return getattr(type(self), kind) is not getattr(Printer, kind)

    def _unsupported(self) -> bytes:
        raise UnsupportedFormat(f"{self.name} not supported as output format")

    def put(self, response: Any) -> bytes:
        return self._unsupported()

    def get(self, response: Any) -> bytes:
        return self._unsupported()

    def delete(self, response: Any) -> bytes:
        return self._unsupported()

    def txn(self, response: Any) -> bytes:
        return self._unsupported()

    def watch(self, response: Any) -> bytes:
        return self._unsupported()

    def lease_grant(self, response: Any) -> bytes:
        return self._unsupported()

    def lease_revoke(self, response: Any, lease: int) -> bytes:
        return self._unsupported()

    def lease_time_to_live(self, response: Any, keys: bool) -> bytes:
        """`keys`: whether the keys were asked for."""
        return self._unsupported()

    def lease_list(self, response: Any) -> bytes:
        return self._unsupported()

    def lease_keep_alive(self, response: Any) -> bytes:
        return self._unsupported()

    def alarm(self, response: Any) -> bytes:
        """The header may be missing: `alarm disarm` gathers several answers."""
        return self._unsupported()

    def member_list(self, response: Any) -> bytes:
        return self._unsupported()

    def member_add(self, response: Any) -> bytes:
        return self._unsupported()

    def member_changed(self, response: Any, member_id: int, what: str) -> bytes:
        """`what`: "removed from", "updated in" or "promoted in"."""
        return self._unsupported()

    def move_leader(self, response: Any, old: int, new: int) -> bytes:
        return self._unsupported()

    def endpoint_health(self, found: Sequence[Health]) -> bytes:
        return self._unsupported()

    def endpoint_status(self, answers: Sequence[EndpointResponse]) -> bytes:
        return self._unsupported()

    def endpoint_hashkv(self, answers: Sequence[EndpointResponse]) -> bytes:
        return self._unsupported()

    def snapshot_status(self, status: Any) -> bytes:
        """`status` is backup.Status."""
        return self._unsupported()


def _lines(*lines: str) -> bytes:
    return "".join(line + "\n" for line in lines).encode()


class Simple(Printer):
    name = "simple"

    def _key_value(self, kv: Any) -> bytes:
        key, value = (
            (hex_text(kv.key), hex_text(kv.value))
            if self.hex_strings
            else (
                kv.key,
                kv.value,
            )
        )
        return value + b"\n" if self.values_only else key + b"\n" + value + b"\n"

    def _key_values(self, kvs: Iterable[Any]) -> bytes:
        return b"".join(map(self._key_value, kvs))

    def put(self, response: Any) -> bytes:
        return b"OK\n" + (self._key_value(response.prev_kv) if response.prev_kv else b"")

    def get(self, response: Any) -> bytes:
        return self._key_values(response.kvs)

    def delete(self, response: Any) -> bytes:
        return b"%d\n" % response.deleted + self._key_values(response.prev_kvs)

    def txn(self, response: Any) -> bytes:
        parts = [b"SUCCESS\n" if response.succeeded else b"FAILURE\n"]
        for answer in response.responses:
            parts.append(b"\n" + _print_response_op(self, answer))
        return b"".join(parts)

    def watch(self, response: Any) -> bytes:
        parts = []
        for event in response.events:
            parts.append(_EVENT_NAMES[event.type].encode() + b"\n")
            if event.prev_kv is not None:
                parts.append(self._key_value(event.prev_kv))
            parts.append(self._key_value(event.kv))
        return b"".join(parts)

    def lease_grant(self, response: Any) -> bytes:
        return _lines(f"lease {response.ID:016x} granted with TTL({response.TTL}s)")

    def lease_revoke(self, response: Any, lease: int) -> bytes:
        return _lines(f"lease {lease:016x} revoked")

    def lease_time_to_live(self, response: Any, keys: bool) -> bytes:
        if response.grantedTTL == 0 and response.TTL == -1:
            return _lines(f"lease {response.ID:016x} already expired")
        text = (
            f"lease {response.ID:016x} granted with TTL({response.grantedTTL}s), "
            f"remaining({response.TTL}s)"
        ).encode()
        if keys:
            text += b", attached keys([" + b" ".join(response.keys) + b"])"
        return text + b"\n"

    def lease_list(self, response: Any) -> bytes:
        return _lines(
            f"found {len(response.leases)} leases",
            *(f"{lease.ID:016x}" for lease in response.leases),
        )

    def lease_keep_alive(self, response: Any) -> bytes:
        return _lines(f"lease {response.ID:016x} keepalived with TTL({response.TTL})")

    def alarm(self, response: Any) -> bytes:
        # The text form of the message, as Go prints it: a space behind each field.
        return _lines(
            *(
                f"memberID:{alarm.memberID} alarm:{_ALARM_NAMES.get(alarm.alarm, alarm.alarm)} "
                for alarm in response.alarms
            )
        )

    def member_list(self, response: Any) -> bytes:
        return _lines(*(", ".join(row) for row in _member_rows(response)))

    def member_add(self, response: Any) -> bytes:
        cluster_id = response.header.cluster_id
        return _lines(f"Member {response.member.ID:16x} added to cluster {cluster_id:16x}")

    def member_changed(self, response: Any, member_id: int, what: str) -> bytes:
        return _lines(f"Member {member_id:16x} {what} cluster {response.header.cluster_id:16x}")

    def move_leader(self, response: Any, old: int, new: int) -> bytes:
        return _lines(f"Leadership transferred from {old:x} to {new:x}")

    def endpoint_health(self, found: Sequence[Health]) -> bytes:
        """The healthy ones. `unhealthy_lines` has the others, for standard error."""
        return _lines(
            *(
                f"{health.endpoint} is healthy: successfully committed proposal: "
                f"took = {go_duration(health.took_ns)}"
                for health in found
                if health.healthy
            )
        )

    def endpoint_status(self, answers: Sequence[EndpointResponse]) -> bytes:
        return _lines(*(", ".join(row) for row in _status_rows(answers)))

    def endpoint_hashkv(self, answers: Sequence[EndpointResponse]) -> bytes:
        return _lines(*(f"{endpoint}, {response.hash}" for endpoint, response in answers))

    def snapshot_status(self, status: Any) -> bytes:
        return _lines(", ".join(_snapshot_row(status)))


def unhealthy_lines(found: Sequence[Health]) -> list[str]:
    """What `endpoint health` says about the others on standard error, in the simple format."""
    return [
        f"{health.endpoint} is unhealthy: failed to commit proposal: {health.error}"
        for health in found
        if not health.healthy
    ]


def _print_response_op(printer: Printer, answer: Any) -> bytes:
    kind = answer.which("response")
    response = getattr(answer, kind)
    return (printer.get, printer.put, printer.delete, printer.txn)[_RESPONSE_KINDS.index(kind)](
        response
    )


def _true_false(flag: bool) -> str:
    return "true" if flag else "false"


def _member_rows(response: Any) -> list[tuple[str, ...]]:
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


def _status_rows(answers: Sequence[EndpointResponse]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for endpoint, status in answers:
        member_id = status.header.member_id if status.header is not None else 0
        rows.append(
            (
                endpoint,
                f"{member_id:x}",
                status.version,
                size_text(status.dbSize),
                _true_false(status.leader == member_id),
                _true_false(status.isLearner),
                str(status.raftTerm),
                str(status.raftIndex),
                str(status.raftAppliedIndex),
                ", ".join(status.errors),
            )
        )
    return rows


def _snapshot_row(status: Any) -> tuple[str, ...]:
    return (
        f"{status.hash:x}",
        str(status.revision),
        str(status.total_keys),
        size_text(status.total_size_bytes),
    )


class Fields(Printer):
    name = "fields"

    def _header(self, response: Any) -> list[str]:
        header = response.header or proto.ResponseHeader()
        return [
            f'"ClusterID" : {header.cluster_id}',
            f'"MemberID" : {header.member_id}',
            f'"Revision" : {header.revision}',
            f'"RaftTerm" : {header.raft_term}',
        ]

    def _key_value(self, kv: Any, prefix: str = "") -> list[str]:
        return [
            f'"{prefix}Key" : {go_quote(kv.key)}',
            f'"{prefix}CreateRevision" : {kv.create_revision}',
            f'"{prefix}ModRevision" : {kv.mod_revision}',
            f'"{prefix}Version" : {kv.version}',
            f'"{prefix}Value" : {go_quote(kv.value)}',
            f'"{prefix}Lease" : {kv.lease}',
        ]

    def put(self, response: Any) -> bytes:
        lines = self._header(response)
        if response.prev_kv is not None:
            lines += self._key_value(response.prev_kv, "Prev")
        return _lines(*lines)

    def get(self, response: Any) -> bytes:
        lines = self._header(response)
        for kv in response.kvs:
            lines += self._key_value(kv)
        lines += [f'"More" : {_true_false(response.more)}', f'"Count" : {response.count}']
        return _lines(*lines)

    def delete(self, response: Any) -> bytes:
        lines = [*self._header(response), f'"Deleted" : {response.deleted}']
        for kv in response.prev_kvs:
            lines += self._key_value(kv, "Prev")
        return _lines(*lines)

    def txn(self, response: Any) -> bytes:
        succeeded = f'"Succeeded" : {_true_false(response.succeeded)}'
        return _lines(*self._header(response), succeeded) + b"".join(
            _print_response_op(self, answer) for answer in response.responses
        )

    def watch(self, response: Any) -> bytes:
        lines = self._header(response)
        for event in response.events:
            lines.append(f'"Type" : {_EVENT_NAMES[event.type]}')
            if event.prev_kv is not None:
                lines += self._key_value(event.prev_kv, "Prev")
            lines += self._key_value(event.kv)
        return _lines(*lines)

    def lease_grant(self, response: Any) -> bytes:
        return _lines(*self._header(response), f'"ID" : {response.ID}', f'"TTL" : {response.TTL}')

    def lease_revoke(self, response: Any, lease: int) -> bytes:
        return _lines(*self._header(response))

    def lease_time_to_live(self, response: Any, keys: bool) -> bytes:
        return _lines(
            *self._header(response),
            f'"ID" : {response.ID}',
            f'"TTL" : {response.TTL}',
            f'"GrantedTTL" : {response.grantedTTL}',
            *(f'"Key" : {go_quote(key)}' for key in response.keys),
        )

    def lease_list(self, response: Any) -> bytes:
        return _lines(*self._header(response), *(f'"ID" : {lease.ID}' for lease in response.leases))

    def lease_keep_alive(self, response: Any) -> bytes:
        return self.lease_grant(response)

    def alarm(self, response: Any) -> bytes:
        lines = self._header(response) if response.header is not None else []
        for alarm in response.alarms:
            name = _ALARM_NAMES.get(alarm.alarm, alarm.alarm)
            lines += [f'"MemberID" : {alarm.memberID}', f'"AlarmType" : {name}', ""]
        return _lines(*lines)

    def member_list(self, response: Any) -> bytes:
        lines = self._header(response)
        for member in response.members:
            lines += [f'"ID" : {member.ID}', f'"Name" : {go_quote(member.name)}']
            lines += [f'"PeerURL" : {go_quote(url)}' for url in member.peerURLs]
            lines += [f'"ClientURL" : {go_quote(url)}' for url in member.clientURLs]
            lines += [f'"IsLearner" : {_true_false(member.isLearner)}', ""]
        return _lines(*lines)

    def endpoint_health(self, found: Sequence[Health]) -> bytes:
        lines = []
        for health in found:
            lines += [
                f'"Endpoint" : {go_quote(health.endpoint)}',
                f'"Health" : {_true_false(health.healthy)}',
                f'"Took" : {go_duration(health.took_ns)}',
                f'"Error" : {health.error}',
                "",
            ]
        return _lines(*lines)

    def endpoint_status(self, answers: Sequence[EndpointResponse]) -> bytes:
        lines = []
        for endpoint, status in answers:
            lines += [
                *self._header(status),
                f'"Version" : {go_quote(status.version)}',
                f'"DBSize" : {status.dbSize}',
                f'"Leader" : {status.leader}',
                f'"IsLearner" : {_true_false(status.isLearner)}',
                f'"RaftIndex" : {status.raftIndex}',
                f'"RaftTerm" : {status.raftTerm}',
                f'"RaftAppliedIndex" : {status.raftAppliedIndex}',
                f'"Errors" : [{" ".join(status.errors)}]',
                f'"Endpoint" : {go_quote(endpoint)}',
                "",
            ]
        return _lines(*lines)

    def endpoint_hashkv(self, answers: Sequence[EndpointResponse]) -> bytes:
        lines = []
        for endpoint, response in answers:
            lines += [
                *self._header(response),
                f'"Endpoint" : {go_quote(endpoint)}',
                f'"Hash" : {response.hash}',
                "",
            ]
        return _lines(*lines)

    def snapshot_status(self, status: Any) -> bytes:
        return _lines(
            f'"Hash" : {status.hash}',
            f'"Revision" : {status.revision}',
            f'"Keys" : {status.total_keys}',
            f'"Size" : {status.total_size_bytes}',
        )


def _flat_header(response: Any) -> dict[str, Any]:
    """The header's fields as etcdctl's lease structs embed them: beside the others, no zeros."""
    header = response.header or proto.ResponseHeader()
    return {field.name: value for field, value in header.present()}


class Json(Printer):
    name = "json"

    def _json(self, response: Any) -> bytes:
        return go_json(response).encode("utf-8", "surrogateescape") + b"\n"

    put = get = delete = txn = alarm = _json

    def watch(self, response: Any) -> bytes:
        return self._json(
            {
                "Header": response.header or proto.ResponseHeader(),
                "Events": response.events,
                "CompactRevision": response.compact_revision,
                "Canceled": response.canceled,
                "Created": response.created,
            }
        )

    def lease_grant(self, response: Any) -> bytes:
        return self._json(
            {
                **_flat_header(response),
                "ID": response.ID,
                "TTL": response.TTL,
                "Error": response.error,
            }
        )

    def lease_revoke(self, response: Any, lease: int) -> bytes:
        return self._json(response)

    def lease_time_to_live(self, response: Any, keys: bool) -> bytes:
        return self._json(
            {
                **_flat_header(response),
                "id": response.ID,
                "ttl": response.TTL,
                "granted-ttl": response.grantedTTL,
                "keys": response.keys or None,
            }
        )

    def lease_list(self, response: Any) -> bytes:
        leases = [{"id": lease.ID} for lease in response.leases]
        return self._json({**_flat_header(response), "leases": leases})

    def lease_keep_alive(self, response: Any) -> bytes:
        return self._json({**_flat_header(response), "ID": response.ID, "TTL": response.TTL})

    def member_list(self, response: Any) -> bytes:
        if not self.hex_strings:
            return self._json(response)
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
        return self._json(
            {
                "header": {
                    "cluster_id": f"{header.cluster_id:x}",
                    "member_id": f"{header.member_id:x}",
                    "raft_term": header.raft_term,
                },
                "members": members,
            }
        )

    def endpoint_health(self, found: Sequence[Health]) -> bytes:
        shown = []
        for health in found:
            entry: dict[str, Any] = {
                "endpoint": health.endpoint,
                "health": health.healthy,
                "took": go_duration(health.took_ns),
            }
            if health.error:
                entry["error"] = health.error
            shown.append(entry)
        return self._json(shown)

    def _endpoints(self, name: str, answers: Sequence[EndpointResponse]) -> bytes:
        return self._json(
            [{"Endpoint": endpoint, name: _as_etcd_3_5(response)} for endpoint, response in answers]
        )

    def member_add(self, response: Any) -> bytes:
        return self._json(response)

    def member_changed(self, response: Any, member_id: int, what: str) -> bytes:
        return self._json(response)

    def move_leader(self, response: Any, old: int, new: int) -> bytes:
        return self._json(response)

    def endpoint_status(self, answers: Sequence[EndpointResponse]) -> bytes:
        return self._endpoints("Status", answers)

    def endpoint_hashkv(self, answers: Sequence[EndpointResponse]) -> bytes:
        return self._endpoints("HashKV", answers)

    def snapshot_status(self, status: Any) -> bytes:
        return self._json(
            {
                "hash": status.hash,
                "revision": status.revision,
                "totalKey": status.total_keys,
                "totalSize": status.total_size_bytes,
            }
        )


class Table(Printer):
    name = "table"

    def member_list(self, response: Any) -> bytes:
        header = ("ID", "STATUS", "NAME", "PEER ADDRS", "CLIENT ADDRS", "IS LEARNER")
        return table(header, _member_rows(response))

    def endpoint_health(self, found: Sequence[Health]) -> bytes:
        return table(
            ("ENDPOINT", "HEALTH", "TOOK", "ERROR"),
            [
                (
                    health.endpoint,
                    _true_false(health.healthy),
                    go_duration(health.took_ns),
                    health.error,
                )
                for health in found
            ],
        )

    def endpoint_status(self, answers: Sequence[EndpointResponse]) -> bytes:
        header = (
            "ENDPOINT",
            "ID",
            "VERSION",
            "DB SIZE",
            "IS LEADER",
            "IS LEARNER",
            "RAFT TERM",
            "RAFT INDEX",
            "RAFT APPLIED INDEX",
            "ERRORS",
        )
        return table(header, _status_rows(answers))

    def endpoint_hashkv(self, answers: Sequence[EndpointResponse]) -> bytes:
        rows = [(endpoint, str(response.hash)) for endpoint, response in answers]
        return table(("ENDPOINT", "HASH"), rows)

    def snapshot_status(self, status: Any) -> bytes:
        header = ("HASH", "REVISION", "TOTAL KEYS", "TOTAL SIZE")
        return table(header, [_snapshot_row(status)])


class Protobuf(Printer):
    name = "protobuf"

    def _encode(self, response: Any) -> bytes:
        encoded: bytes = response.encode()
        return encoded

    put = get = delete = txn = watch = alarm = member_list = member_add = _encode
    lease_grant = lease_list = lease_keep_alive = _encode

    def lease_revoke(self, response: Any, lease: int) -> bytes:
        return self._encode(response)

    def lease_time_to_live(self, response: Any, keys: bool) -> bytes:
        return self._encode(response)

    def member_changed(self, response: Any, member_id: int, what: str) -> bytes:
        return self._encode(response)

    def move_leader(self, response: Any, old: int, new: int) -> bytes:
        return self._encode(response)


PRINTERS: dict[str, type[Printer]] = {
    printer.name: printer for printer in (Fields, Json, Protobuf, Simple, Table)
}
"""The formats by their names, in the order that help shows them."""
