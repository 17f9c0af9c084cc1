"""`grpc.reflection` v1 and v1alpha: tells tools such as grpcurl what this server speaks.

The descriptors are made from `schema.SCHEMA`: one file per package, proto3, with the names of
etcd's files. They are the wire form of google.protobuf's FileDescriptorProto. Its fields are named
where they are written below.

    ServerReflectionRequest   3 file_by_filename, 4 file_containing_symbol,
                              5 file_containing_extension, 6 all_extension_numbers_of_type,
                              7 list_services: one of them, 1 host is ignored
    ServerReflectionResponse  1 valid_host, 2 original_request,
                              4 file_descriptor_response (1 repeated bytes),
                              6 list_services_response (1 repeated: 1 name),
                              7 error_response (1 code, 2 message)
"""

from __future__ import annotations

from functools import cache

from etcdlite import methods, proto, schema
from etcdlite.errors import INVALID_ARGUMENT, NOT_FOUND, error
from etcdlite.proto import Field, varint
from etcdlite.wire import health
from etcdlite.wire.calls import Call
from etcdlite.wire.health import fields, sized

SERVICES = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")

FILES = {
    "mvccpb": "kv.proto",
    "authpb": "auth.proto",
    "etcdserverpb": "rpc.proto",
    "v3lockpb": "v3lock.proto",
    "v3electionpb": "v3election.proto",
    "grpc.health.v1": "grpc/health/v1/health.proto",
}
"""Package to file."""

_METHODS = (
    *methods.METHODS.values(),
    *(
        methods.Method(
            number=0,
            service=health.SERVICE,
            name=name,
            full=f"Health.{name}",
            grpc_path=f"/{health.SERVICE}/{name}",
            request=proto.HealthCheckRequest,
            response=proto.HealthCheckResponse,
            server_stream=name == "Watch",
        )
        for name in ("Check", "Watch")
    ),
)

_LABEL_OPTIONAL = 1
_LABEL_REPEATED = 3
_TYPES = {
    "int64": 3,
    "uint64": 4,
    "int32": 5,
    "bool": 8,
    "string": 9,
    "message": 11,
    "bytes": 12,
    "uint32": 13,
    "enum": 14,
}
"""FieldDescriptorProto.Type."""


def _text(number: int, text: str) -> bytes:
    return sized(number, text.encode())


def _number(number: int, value: int) -> bytes:
    return varint(number << 3) + varint(value)


def _packages() -> dict[str, list[str]]:
    """The messages and enums of each package, in the schema's order."""
    found: dict[str, list[str]] = {}
    package = ""
    for line in schema.SCHEMA.strip().splitlines():
        keyword, _, rest = line.partition(" ")
        if keyword == "package":
            package = rest
        elif keyword in ("message", "enum"):
            found.setdefault(package, []).append(rest.partition(":")[0])
    return found


_PACKAGE_OF = {name: package for package, names in _packages().items() for name in names}


def _field(field: Field, oneofs: list[str]) -> bytes:
    # FieldDescriptorProto: 1 name, 3 number, 4 label, 5 type, 6 type_name, 9 oneof_index,
    # 10 json_name.
    out = _text(1, field.name) + _number(3, field.number)
    out += _number(4, _LABEL_REPEATED if field.repeated else _LABEL_OPTIONAL)
    out += _number(5, _TYPES[field.kind])
    if field.kind in ("message", "enum"):
        out += _text(6, f".{_PACKAGE_OF[field.type_name]}.{field.type_name}")
    if field.oneof:
        out += _number(9, oneofs.index(field.oneof))
    return out + _text(10, field.json_name)


def _enum(name: str) -> bytes:
    # EnumDescriptorProto: 1 name, 2 value (1 name, 2 number).
    out = _text(1, name.rpartition(".")[2])
    for value, number in proto.ENUMS[name].items():
        out += sized(2, _text(1, value) + _number(2, number))
    return out


def _message(name: str) -> bytes:
    # DescriptorProto: 1 name, 2 field, 4 enum_type, 8 oneof_decl (1 name).
    message = proto.MESSAGES[name]
    oneofs = list(dict.fromkeys(field.oneof for field in message.FIELDS if field.oneof))
    out = _text(1, name)
    for field in message.FIELDS:
        out += sized(2, _field(field, oneofs))
    for enum in proto.ENUMS:
        if enum.startswith(name + "."):
            out += sized(4, _enum(enum))
    for oneof in oneofs:
        out += sized(8, _text(1, oneof))
    return out


def _service(full: str) -> bytes:
    # ServiceDescriptorProto: 1 name, 2 method (1 name, 2 input_type, 3 output_type,
    # 5 client_streaming, 6 server_streaming).
    out = _text(1, full.rpartition(".")[2])
    for method in _METHODS:
        if method.service == full:
            one = _text(1, method.name)
            for number, message in ((2, method.request), (3, method.response)):
                one += _text(number, f".{_PACKAGE_OF[message.NAME]}.{message.NAME}")
            if method.client_stream:
                one += _number(5, 1)
            if method.server_stream:
                one += _number(6, 1)
            out += sized(2, one)
    return out


def _file(package: str) -> bytes:
    # FileDescriptorProto: 1 name, 2 package, 3 dependency, 4 message_type, 5 enum_type, 6 service,
    # 12 syntax.
    names = [name for name, home in _PACKAGE_OF.items() if home == package]
    kinds = [f for n in names if n in proto.MESSAGES for f in proto.MESSAGES[n].FIELDS]
    needed = {_PACKAGE_OF[f.type_name] for f in kinds if f.kind in ("message", "enum")}
    out = _text(1, FILES[package]) + _text(2, package)
    for other in FILES:
        if other in needed and other != package:
            out += _text(3, FILES[other])
    for name in names:
        if name in proto.MESSAGES:
            out += sized(4, _message(name))
        elif "." not in name:
            out += sized(5, _enum(name))
    for service in dict.fromkeys(method.service for method in _METHODS):
        if service.rpartition(".")[0] == package:
            out += sized(6, _service(service))
    return out + _text(12, "proto3")


@cache
def files() -> dict[str, bytes]:
    """Every file by its name."""
    return {FILES[package]: _file(package) for package in FILES}


@cache
def symbols() -> dict[str, str]:
    """Full name of each service, method, message and enum, to the name of its file."""
    found = {
        f"{package}.{name}": FILES[package]
        for name, package in _PACKAGE_OF.items()
        if package in FILES
    }
    for method in _METHODS:
        if name := FILES.get(method.service.rpartition(".")[0]):
            found[method.service] = found[f"{method.service}.{method.name}"] = name
    return found


@cache
def _dependencies(name: str) -> list[str]:
    """The file and all that it needs, each behind what it needs itself."""
    found = []
    for number, value in fields(files()[name]):
        if number == 3:
            assert isinstance(value, bytes)
            found += _dependencies(value.decode())
    return list(dict.fromkeys([*found, name]))


def services() -> list[str]:
    """The names of all services of this server."""
    return sorted({method.service for method in _METHODS} | set(SERVICES))


def _describe(name: str | None) -> bytes:
    if name is None or name not in files():
        return _error(NOT_FOUND, "symbol or file not found")
    # Tools want the file that was asked for first.
    return sized(4, b"".join([sized(1, files()[part]) for part in reversed(_dependencies(name))]))


def _error(code: int, text: str) -> bytes:
    return sized(7, _number(1, code) + _text(2, text))


def answer(body: bytes) -> bytes:
    """The response to one request of the stream. Raises DecodeError."""
    host = b""
    detail = _error(INVALID_ARGUMENT, "the request asks for nothing")
    for number, value in fields(body):
        text = value.decode("utf-8", "replace") if isinstance(value, bytes) else ""
        if number == 1:
            host = value if isinstance(value, bytes) else b""
        elif number == 3:
            detail = _describe(text)
        elif number == 4:
            detail = _describe(symbols().get(text))
        elif number in (5, 6):
            detail = _error(NOT_FOUND, "there are no extensions")
        elif number == 7:
            detail = sized(6, b"".join(sized(1, _text(1, name)) for name in services()))
    return sized(1, host) + sized(2, body) + detail


class Reflect(Call):
    """The bidirectional stream ServerReflectionInfo."""

    def message(self, body: bytes) -> None:
        # An answer is much larger than its question.
        if self.blocked:
            raise error("RequestTooManyRequests")
        self.send(answer(body))

    def finish(self) -> None:
        self.end()
