"""The rules of the house: imports point downwards, nothing uses another module's private names, and
files, classes and functions stay small enough to read."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from rigs.processes import ROOT

PACKAGE = ROOT / "etcdlite"

LAYERS = """
etcdlite
errors log units limits
schema
proto
frames methods json_mapping
request outbox
storage.steps storage.disk storage.intervals
storage.data
storage.index
storage.checkpoint
lease
storage.recovery storage.cleaning
mvcc
ranges
txn
watch
raft_log
raft
metrics
identity
wal
config
discovery
snap
replica
replica.entry
replica.membership
datadir
backup
replica.alarms
replica.state
replica.reads replica.writes replica.maintenance replica.leadership replica.questions
replica.corruption replica.forced replica.leases
peer
member
client client.errors
client.operations
client.connection
client.scripts
client.calls
client.blocking client.aio
bootstrap
wire
wire.hpack wire.session
wire.calls
wire.http2 wire.api
wire.locks
wire.streams
wire.gateway wire.reflection wire.peer_session wire.health wire.native
wire.http wire.grpc
wire.exposition
threads
listeners
server
__main__
cli
cli.output
cli.input
cli.session
cli.watch cli.check cli.commands cli.local_cluster
ctl
"""
"""From the lowest to the highest: a module imports only from lines above its own."""

RANK = {
    name: rank for rank, line in enumerate(LAYERS.strip().splitlines()) for name in line.split()
}

CARD = ("raft", "wal", "snap", "mvcc", "watch", "lease", "proto", "ctl")
MAX_CARD_LINES = 6500
MAX_PACKAGE_LINES = 26_000
MAX_CLASS_LINES = {"Raft": 1200}
MAX_FUNCTION_LINES = 70


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "etcdlite"


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(module of the package, imported name or "") of every import, also of those in functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "etcdlite":
            assert node.level == 0, "an import is relative"
            module = (node.module or "").removeprefix("etcdlite").lstrip(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}".lstrip(".")
                if inner in MODULES:
                    yield inner, ""
                else:
                    yield module or "etcdlite", alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "etcdlite":
                    yield alias.name.removeprefix("etcdlite").lstrip(".") or "etcdlite", ""


def test_every_module_has_a_layer() -> None:
    assert MODULES.keys() - RANK.keys() == set()


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downwards(name: str) -> None:
    wrong = {
        module
        for module, _ in imports(TREES[name])
        if module != name and RANK[module] >= RANK[name]
    }
    assert not wrong, f"{name} imports from its own layer or a higher one: {sorted(wrong)}"


@pytest.mark.parametrize("name", MODULES)
def test_types_are_imported_like_everything_else(name: str) -> None:
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            inner = ast.Module(node.body, [])
            assert not list(imports(inner)), f"{name} imports under TYPE_CHECKING"


@pytest.mark.parametrize("name", MODULES)
def test_private_names_stay_in_their_module(name: str) -> None:
    tree = TREES[name]
    imported = [f"{module}.{what}" for module, what in imports(tree) if what.startswith("_")]
    imported = [what for what in imported if not what.endswith("__")]
    assert not imported, f"{name} imports {imported}"
    own = set(re.findall(r"\b_[a-z]\w*", MODULES[name].read_text()))
    defined = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=attr, ctx=ast.Store()):
                defined.add(attr)
            case ast.AnnAssign(target=ast.Name(id=attr)) | ast.Assign(targets=[ast.Name(id=attr)]):
                defined.add(attr)
            case ast.Constant(value=str(attr)):
                defined.add(attr)  # __slots__
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr in own
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "super"))
    }
    # Of the standard library, where there is no other way.
    stated = {"_make", "_replace", "_asdict", "_fields", "_exit"}
    assert not used - defined - stated, f"{name} uses private attributes: {used - defined - stated}"


def lines(node: ast.AST) -> int:
    return int(node.end_lineno or 0) - int(node.lineno) + 1  # type: ignore[attr-defined]


def test_classes_and_functions_are_short() -> None:
    long = []
    for name, tree in TREES.items():
        source = MODULES[name].read_text().splitlines()
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                limit = MAX_CLASS_LINES.get(node.name, 600)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = "\n".join(source[node.lineno - 1 : node.end_lineno])
                if "# The hot path" in body or "# Hot path" in body:
                    continue
                limit = MAX_FUNCTION_LINES
            else:
                continue
            if lines(node) > limit:
                long.append(f"{name}.{node.name}: {lines(node)} lines")
    assert not long, "\n".join(long)


def test_the_package_stays_small() -> None:
    sizes = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert sizes["member"] < 700
    assert sum(sizes[name] for name in CARD) < MAX_CARD_LINES
    assert sum(sizes.values()) < MAX_PACKAGE_LINES
