"""Write the tables of docs/models.md from `dropfx.explain`:  python -m tests.zoo.table [--check]"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import sys
import warnings
from collections import defaultdict
from pathlib import Path

import dropfx
from tests.zoo.catalogue import OFF, ZOO, Entry

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
MARKS = ("<!-- zoo -->\n", "<!-- /zoo -->\n")


def short(reason: str) -> str:
    """A reason without what differs from layer to layer."""
    return re.sub(r"predicted speed-up [\d.]+", "predicted speed-up", reason.replace("|", "/"))


def general(name: str) -> str:
    """Path of a site with its numbers left out: "encoder.layer.*.dropout"."""
    return re.sub(r"#\d+$", "", re.sub(r"(?<=\.)\d+(?=[.:]|$)", "*", name))


def counted(names: list[str]) -> str:
    """`path` (count), by path without numbers."""
    counts: dict[str, int] = defaultdict(int)
    for name in names:
        counts[general(name)] += 1
    return ", ".join(f"`{name}`" + (f" ({count})" if count > 1 else "") for name, count in counts.items())


def row(entry: Entry) -> tuple[str, list[str]]:
    """The model's row, and a line for each reason of a refusal."""
    model, args, kwargs = entry.make(small=False)
    everything = dropfx.explain(model, *args, options={"min_speedup": 0, "recipe": "fast"}, kwargs=kwargs)
    default = dropfx.explain(model, *args, options={}, kwargs=kwargs)
    active = [site for site in everything.sites if OFF not in site.reason]
    gained = [site for site in default.sites if site.rewritten]
    cells = (entry.title, len(active), sum(site.rewritten for site in active), f"{everything.flop_ratio:.2f}x")
    text = f"| {' | '.join(map(str, (*cells, len(gained), f'{default.flop_ratio:.2f}x')))} |"
    reasons: dict[str, list[str]] = defaultdict(list)
    for site in active:
        if not site.rewritten:
            reasons[short(site.reason)].append(site.name)
    return text, [f"| {entry.title} | {counted(names)} | {reason} |" for reason, names in reasons.items()]


def tables() -> str:
    rows, refused = [], []
    for entry in ZOO.values():
        text, lines = row(entry)
        rows.append(text)
        refused += lines
    packages = sorted({entry.package for entry in ZOO.values()})
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return "\n".join(
        [
            f"With {versions}; CPU cost table, pattern `block`.",
            "",
            "| model | dropouts | rewritten | Linear FLOPs | by default | Linear FLOPs |",
            "| --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
            "| model | runs as written | why |",
            "| --- | --- | --- |",
            *refused,
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the page is not what would be written")
    check = parser.parse_args().check
    warnings.simplefilter("ignore")
    page = PAGE.read_text()
    before, rest = page.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    made = before + MARKS[0] + tables() + MARKS[1] + after
    if check:
        return int(made != page)
    PAGE.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
