"""Builds dist/etcdlite.pyz: etcdlite in one file, for any Python 3.10 or later.

    python3 packaging/build_pyz.py          (pip is needed)
    ./etcdlite.pyz --help                   the server
    ./etcdlite.pyz ctl put greeting hello   etcdlite-ctl; so does a link of that name to the file

The file holds what is pure Python. Shared secrets, users' passwords and encryption need PyNaCl,
which is not: where it is installed for the same Python, it is used. Two builds are identical to the
byte, given the same versions of the dependencies.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEPENDENCIES = ("sortedcontainers>=2.4", "hpack>=4.0", "h11>=0.14", "tomli>=2.0")
DATE = (2026, 1, 1, 0, 0, 0)
LAUNCHER = b"""\
#!/bin/sh
# As the installed commands do (packaging/launcher/etcdlite).
if [ "$1" != ctl ]; then trap '' HUP; fi
if env --block-signal=INT >/dev/null 2>&1; then exec env --block-signal=INT python3 "$0" "$@"; fi
exec python3 "$0" "$@"
"""
MAIN = """\
import sys

from etcdlite import start

if sys.argv[1:2] == ["ctl"]:
    sys.argv[:2] = ["etcdlite-ctl"]
sys.exit(start.run())
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        # Wheels of no platform: without the option, tomli brings compiled modules.
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        pip += ["--no-compile", "--only-binary=:all:", "--platform=any", "--python-version=3.10"]
        subprocess.run([*pip, "--target", folder, *DEPENDENCIES], check=True)
        contents = {"__main__.py": MAIN.encode()}
        for top, pattern in ((Path(folder), "*"), (ROOT, "etcdlite/**/*")):
            for path in top.rglob(pattern) if top != ROOT else top.glob(pattern):
                name = path.relative_to(top).as_posix()
                is_wanted = path.is_file() and "__pycache__" not in name
                if is_wanted and not name.startswith("bin/"):
                    contents[name] = path.read_bytes()
    target = ROOT / "dist" / "etcdlite.pyz"
    target.parent.mkdir(exist_ok=True)
    with target.open("wb") as file:
        file.write(LAUNCHER)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in sorted(contents):
                archive.writestr(zipfile.ZipInfo(name, DATE), contents[name], zipfile.ZIP_DEFLATED)
    target.chmod(0o755)
    print(f"{target.relative_to(ROOT)}: {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
