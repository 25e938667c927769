"""The direction of imports: what each folder knows of, and no circle between files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).parents[1]

BASE = ("errors", "patterns", "options")
FLOW = ("frontend", "passes", "planning", "draws", "ops", "kernels")
"""From what a user calls to what runs on the device; none knows of those before it."""

IMPORTS: dict[str, tuple[str, ...]] = {
    "errors": (),
    "patterns": ("errors",),
    "options": ("errors", "patterns"),
    "kernels": (),
    "ops": ("errors", "kernels"),
    "graph": (*BASE, "ops"),
    "draws": ("patterns", "graph", "ops", "kernels"),
    "planning": ("graph", "draws", "ops", "kernels"),
    "passes": ("patterns", "graph", "planning", "ops"),
    "frontend": (*BASE, "graph", "passes", "draws"),
    "explain": ("errors", "options", "graph", "draws", "frontend"),
    "testing": ("errors", "graph", "draws", "ops", "frontend", "explain"),
    "pattern_statistics": ("errors", "patterns", "draws"),
    "pickles": (),
    "bench": ("errors", "patterns", "graph", "planning", "ops", "frontend", "dropfx"),
    "cli": ("errors", "explain", "testing", "pattern_statistics", "bench"),
    "__main__": ("cli",),
    "dropfx": ("errors", "patterns", "pickles", "draws", "frontend", "explain", "testing", "pattern_statistics"),
}
"""Folder or loose file -> those that it imports; "dropfx" is the package's public face."""


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = ("dropfx", *parts) if parts[0] == "passes" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_name(file): file
    for folder in ("dropfx", "passes")
    for file in sorted((ROOT / folder).rglob("*.py"))
    if not file.is_relative_to(ROOT / "dropfx" / "passes")  # the link
}


def imported(file: Path, everywhere: bool) -> Iterator[str]:
    """Modules of dropfx that a file imports; within functions too where `everywhere`."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom) and node.module in FILES:
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (part if part in FILES else node.module for part in parts)


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def test_the_table_names_every_room() -> None:
    assert {room(module) for module in FILES} == set(IMPORTS)


@pytest.mark.parametrize("name", IMPORTS)
def test_imports_go_one_way(name: str) -> None:
    found = {
        room(target)
        for module, file in FILES.items()
        if room(module) == name
        for target in imported(file, everywhere=True)
    }
    assert found - {name} == set(IMPORTS[name])


def test_the_table_has_no_circle() -> None:
    rooms = networkx.DiGraph((a, b) for a, targets in IMPORTS.items() for b in targets)
    assert networkx.is_directed_acyclic_graph(rooms)
    assert [name for name in networkx.topological_sort(rooms) if name in FLOW] == list(FLOW)


def test_no_circle_between_files() -> None:
    """At the top of files; one that is closed within a function is a question of what is loaded when."""
    files = networkx.DiGraph()
    for module, file in FILES.items():
        packages = {".".join(module.split(".")[:depth]) for depth in range(1, module.count(".") + 1)}
        files.add_edges_from((module, target) for target in imported(file, everywhere=False) if target not in packages)
    assert list(networkx.simple_cycles(files)) == []
