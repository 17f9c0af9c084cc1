"""Classes of settings behave as frozen dataclasses."""

from __future__ import annotations

import subprocess
import sys

import pytest

from etcdlite.records import field_names, record, replace


@record(frozen=True)
class Settings:
    name: str
    size_bytes: int = 3
    words: tuple[str, ...] = ()


def test_fields_have_defaults_and_may_be_given_by_place_or_name() -> None:
    assert field_names(Settings) == ("name", "size_bytes", "words")
    settings = Settings("a", words=("b",))
    assert (settings.name, settings.size_bytes, settings.words) == ("a", 3, ("b",))
    assert settings == Settings(name="a", size_bytes=3, words=("b",))
    assert hash(settings) == hash(Settings(name="a", size_bytes=3, words=("b",)))
    assert settings != Settings("a") and settings != "a"
    assert repr(settings) == "Settings(name='a', size_bytes=3, words=('b',))"


def test_a_copy_with_changes_leaves_the_original() -> None:
    settings = Settings("a")
    assert replace(settings, size_bytes=4) == Settings("a", 4)
    assert settings.size_bytes == 3


@pytest.mark.parametrize(
    ("values", "fields"),
    [
        ((), {}),
        ((), {"size_bytes": 1}),
        (("a",), {"size": 1}),
        (("a",), {"name": "b"}),
        (("a", 1, (), 4), {}),
    ],
)
def test_missing_unknown_and_repeated_fields_are_refused(
    values: tuple[object, ...], fields: dict[str, object]
) -> None:
    with pytest.raises((TypeError, AttributeError)):
        Settings(*values, **fields)  # type: ignore[arg-type]


def test_fields_cannot_be_changed() -> None:
    settings = Settings("a")
    with pytest.raises(AttributeError, match="cannot be changed"):
        settings.name = "b"  # type: ignore[misc]
    with pytest.raises(AttributeError):
        del settings.size_bytes
    assert settings == Settings("a")


def test_the_server_starts_without_what_takes_long_to_import() -> None:
    heavy = {"dataclasses", "inspect", "h11", "platform", "ast", "asyncio", "ssl", "ctypes"}
    program = f"import etcdlite.server, sys; print(*({heavy!r} & sys.modules.keys()))"
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert not found.stdout.split()
