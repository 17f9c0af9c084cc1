"""The proto3 JSON mapping, written plainly: the fast writer of json_mapping.py must agree."""

from __future__ import annotations

import base64
from typing import Any

from etcdlite import proto


def plain_json(message: proto.Message) -> dict[str, Any]:
    """A message as etcd's gateway shows it, ready for `json.dumps`."""
    return {
        field.name: [_plain(field, item) for item in value]
        if field.repeated
        else _plain(field, value)
        for field, value in message.present()
    }


def _plain(field: proto.Field, value: Any) -> Any:
    if field.kind == "message":
        return plain_json(value)
    if field.kind == "bytes":
        return base64.b64encode(value).decode()
    if field.kind in ("int64", "uint64"):
        return str(value)
    if field.kind == "enum":
        names = {number: name for name, number in proto.ENUMS[field.type_name].items()}
        return names.get(value, value)
    return value
