"""Plots for docs/: latency against the number of clients, and latency over time.

Both have a logarithmic axis for the latency, one colour for each server, and are written as SVG.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Curve = Sequence[tuple[float, float]]
"""Points (x, y)."""

COLOURS = {"etcd": "tab:orange", "etcdlite": "tab:blue"}


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("bench: no matplotlib: pip install matplotlib") from None
    matplotlib.use("svg")
    # The same figures give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "etcdlite"
    from matplotlib import pyplot

    return pyplot


def _finish(pyplot: Any, figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def latency_by_clients(found: Mapping[str, Mapping[str, Mapping[str, Curve]]], path: Path) -> None:
    """`found`: operation -> server -> percentile -> (clients, ms)."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, len(found), figsize=(5 * len(found), 4), squeeze=False)
    for axis, (operation, servers) in zip(axes[0], found.items(), strict=True):
        for server, percentiles in servers.items():
            for style, (name, curve) in zip(("-", "--"), percentiles.items(), strict=False):
                axis.plot(
                    *zip(*curve, strict=True), style, marker=".", color=COLOURS.get(server),
                    label=f"{server}, {name}",
                )  # fmt: skip
        axis.set(title=operation, xlabel="clients", ylabel="ms", xscale="log", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend()
    _finish(pyplot, figure, path)


def latency_over_time(
    found: Mapping[str, tuple[Curve, Mapping[str, tuple[float, float]]]], path: Path
) -> None:
    """`found`: server -> ((s, ms) of each put, event -> when it began and ended)."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(len(found), 1, figsize=(10, 3 * len(found)), squeeze=False)
    highest = max(ms for curve, _ in found.values() for _, ms in curve)
    for axis, (server, (curve, spans)) in zip(axes[:, 0], found.items(), strict=True):
        axis.scatter(*zip(*curve, strict=True), s=2, color=COLOURS.get(server), rasterized=True)
        axis.set(title=server, xlabel="s", ylabel="put, ms", yscale="log")
        axis.set_ylim(0.03, highest * 2)
        for name, (began, ended) in spans.items():
            axis.axvspan(began, ended, color="tab:grey", alpha=0.2)
            axis.text(began, highest, name, fontsize=8, verticalalignment="top")
        axis.grid(alpha=0.3)
    _finish(pyplot, figure, path)
