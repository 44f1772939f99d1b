"""Draws plan.png and plan.svg: the folders, and which import which, read from the source.

python docs/plan.py    # writes them

A box is a folder or one of the few files at the top, a row higher than all that it imports. An
arrow is an import, for types alone included, that cannot be had by way of others.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

DOCS = Path(__file__).parent
SOURCE = DOCS.parent / "src" / "kfoc"
PICTURE = DOCS / "plan.png"

# Wing -> its boxes, and the columns that they stand in. "kfoc" is the package's own names.
WINGS: dict[str, dict[str, float]] = {
    "the mathematics": {
        "linalg": 1, "blocks": 2, "nearest": 1, "samples": 0, "plans": 0.5, "estimators": 1.5,
    },
    "the model": {"parameters": 4.18, "likelihoods": 3, "layers": 3.55, "model": 3.55},
    "a fit": {
        "files": 5.68, "running": 6.18, "distributed": 6.18, "fitting": 5.18, "fit": 6.18,
        "tracker": 5.18,
    },
    "the result": {"curvature": 7.68, "fisher": 7.18, "applications": 7.18, "interop": 8.18},
    "programs": {"kfoc": 7.18, "compare": 7.18, "reproduce": 7.18},
}  # fmt: skip
# All may import these: arrows to them would say nothing.
FOR_ALL = {"common", "errors"}
CAPTION = """An arrow is an import that cannot be had
by way of others. All point down.

All may import common and errors,
which are not drawn."""
COLOURS = {
    "the mathematics": "#1f5fae",
    "the model": "#0b7a63",
    "a fit": "#b4540a",
    "the result": "#94358a",
    "programs": "#565d66",
}
AT_RIGHT = {"the result"}  # wings whose name an arrow would cross at the left
INK = "#1c2024"


# In inches: a box; from column to column; between rows, room at both ends and from line to line.
WIDE, HIGH = 1.07, 0.47
COLUMN, ROOM, TRACK = 1.18, 0.17, 0.09
PORT = 0.13  # from one arrow to the next, where several begin or end at a box, or pass a row

Imports = dict[str, set[str]]


def files(source: Path) -> dict[str, list[Path]]:
    """The files of every box, and of what is open to all."""
    found = defaultdict(list)
    for path in sorted(source.rglob("*.py")):
        name = path.relative_to(source).with_suffix("").parts[0]
        if name != "__main__":  # the command, which is `reproduce`'s
            found["kfoc" if name == "__init__" else name].append(path)
    return dict(found)


def imports(source: Path) -> Imports:
    """Box -> the others that its files import: at their top, in functions, or for types alone."""
    boxes = files(source)
    public = {name.rpartition(".")[2] for name in _named(source / "__init__.py")}
    found: Imports = {box: set() for box in boxes.keys() - FOR_ALL}
    for box in found:
        for name in (name for path in boxes[box] for name in _named(path)):
            package, first, *rest = (*name.split("."), "")
            if package == "kfoc":
                inside = first in boxes and (rest[1:] or first not in public)
                found[box].add(first if inside else "kfoc")
        found[box] -= FOR_ALL | {box}
    return found


def _named(path: Path) -> list[str]:
    """All that a file imports, by its full name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


def below(imports: Imports, box: str) -> set[str]:
    """All that a box has by way of its imports."""
    return imports[box].union(*(below(imports, other) for other in imports[box]))


def direct(imports: Imports) -> Imports:
    """Imports without those that can be had by way of others."""
    return {
        box: others - set().union(*(below(imports, other) for other in others))
        for box, others in imports.items()
    }


def lines(paths: list[Path]) -> int:
    """Lines of code: no blank ones, comments and docstrings."""
    count = 0
    for path in paths:
        text = path.read_text()
        count += sum(bool(line.strip()) and line.strip()[0] != "#" for line in text.splitlines())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                docstring = ast.get_docstring(node, clean=False)
                count -= sum(bool(line.strip()) for line in (docstring or "").splitlines())
    return count


class Plan:
    """Where boxes and arrows are, in inches."""

    def __init__(self, imports: Imports) -> None:
        self.arrows = direct(imports)
        self.rows: dict[str, int] = {}
        for box in imports:
            self._row(box)
        self.columns = {box: x * COLUMN for wing in WINGS.values() for box, x in wing.items()}
        self.taken: dict[int, list[float]] = defaultdict(list)  # where arrows pass a row
        self.ways = self._ways()
        self.tracks, counts = self._tracks()
        self.counts = counts
        self.heights = [0.0]
        for row in range(max(self.rows.values())):
            self.heights.append(self.heights[-1] + HIGH + 2 * ROOM + counts[row] * TRACK)

    def _row(self, box: str) -> int:
        if box not in self.rows:
            self.rows[box] = 1 + max(map(self._row, self.arrows[box]), default=-1)
        return self.rows[box]

    def _ways(self) -> dict[tuple[str, str], list[float]]:
        """Arrow -> where it crosses each row, from its source's to its target's."""
        pairs = [(box, other) for box, others in self.arrows.items() for other in others]
        pairs.sort(key=lambda p: (self.rows[p[0]] - self.rows[p[1]], p))
        starts = {pair: self._port(pair, pairs, 0) for pair in pairs}
        ends = {pair: self._port(pair, pairs, 1) for pair in pairs}
        for pair in pairs:  # no steps of a port
            if abs(starts[pair] - ends[pair]) < PORT:
                alone = sum(other == pair[1] for _, other in pairs) == 1
                starts[pair] = ends[pair] = (starts if alone else ends)[pair]
        ways = {}
        for pair in pairs:
            way = [starts[pair]]
            for row in range(self.rows[pair[0]] - 1, self.rows[pair[1]], -1):
                way.append(self._passage(row, way[-1], ends[pair]))
                self.taken[row].append(way[-1])
            ways[pair] = [*way, ends[pair]]
        return ways

    def _port(self, pair: tuple[str, str], pairs: list[tuple[str, str]], end: int) -> float:
        """Where an arrow leaves its source (`end` 0) or meets its target (1): in order."""
        here = sorted(
            (p for p in pairs if p[end] == pair[end]),
            key=lambda p: (self.columns[p[1 - end]], self.rows[p[1 - end]]),
        )
        return self.columns[pair[end]] + PORT * (here.index(pair) - (len(here) - 1) / 2)

    def _passage(self, row: int, start: float, end: float) -> float:
        """The nearest free place of a row to where an arrow comes from, or better, goes to."""
        boxes = [self.columns[box] for box, at in self.rows.items() if at == row]

        def free(x: float) -> bool:
            clear = all(abs(x - box) > (WIDE + PORT) / 2 for box in boxes)
            return clear and all(abs(x - other) > PORT * 0.9 for other in self.taken[row])

        steps = [PORT * k * sign / 2 for k in range(200) for sign in (1, -1)]
        places = [x for x in (end + step for step in steps) if free(x)]
        if free(start):
            places.append(start)
        # Turning once rather than twice is worth a column.
        return min(places, key=lambda x: abs(x - end) + (COLUMN if x not in (start, end) else 0))

    def _tracks(self) -> tuple[dict[tuple[str, str, int], int], dict[int, int]]:
        """The line, counted from below, on which an arrow goes sideways above a row."""
        spans: dict[int, list[tuple[float, float, str, str]]] = defaultdict(list)
        for (box, other), way in self.ways.items():
            for step, (x, to) in enumerate(pairwise(way)):
                if abs(x - to) > 1e-6:
                    spans[self.rows[box] - 1 - step].append((x, to, box, other))
        found, counts = {}, defaultdict(int)
        for row, here in spans.items():
            lanes: list[list[tuple[float, float]]] = []
            for x, to, box, other in sorted(here, key=lambda s: abs(s[0] - s[1])):
                low, high = min(x, to) - PORT / 2, max(x, to) + PORT / 2
                lane = next(
                    (
                        k
                        for k, lane in enumerate(lanes)
                        if all(low > b or high < a for a, b in lane)
                    ),
                    len(lanes),
                )
                if lane == len(lanes):
                    lanes.append([])
                lanes[lane].append((low, high))
                found[box, other, row] = lane
            counts[row] = len(lanes)
        return found, counts

    def points(self, box: str, other: str) -> list[tuple[float, float]]:
        """The corners of an arrow."""
        way = self.ways[box, other]
        found = [(way[0], self.heights[self.rows[box]] - HIGH / 2)]
        for step, (x, to) in enumerate(pairwise(way)):
            row = self.rows[box] - 1 - step
            if (box, other, row) in self.tracks:
                track = self.tracks[box, other, row]
                y = self.heights[row] + HIGH / 2 + ROOM + track * TRACK
                found += [(x, y), (to, y)]
        return [*found, (way[-1], self.heights[self.rows[other]] + HIGH / 2)]


def draw(source: Path, picture: Path) -> None:
    """Write the picture, and as SVG too, with the arrows as text inside."""
    plan, boxes = Plan(imports(source)), files(source)
    left, right = min(plan.columns.values()) - COLUMN * 0.6, max(plan.columns.values())
    right += COLUMN * 0.6
    low, high = -HIGH / 2 - 0.15, plan.heights[-1] + HIGH / 2 + 0.4
    figure = Figure(figsize=(right - left, high - low))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(left, right), ylim=(low, high))
    axes.axis("off")
    axes.text(left + 0.25, high - 0.2, CAPTION, color=INK, size=12, va="top", linespacing=1.4)
    for wing, inside in WINGS.items():
        ground(axes, wing, [(plan.columns[box], plan.heights[plan.rows[box]]) for box in inside])
        for box in inside:
            x, y = plan.columns[box], plan.heights[plan.rows[box]]
            room(axes, box, lines(boxes[box]), x, y, COLOURS[wing])
            for other in plan.arrows[box]:
                arrow(axes, plan.points(box, other), COLOURS[wing])
    about = {"Description": text(plan.arrows)}
    figure.savefig(picture, dpi=150, metadata=about | {"Software": None})
    with rc_context({"svg.hashsalt": "kfoc"}):  # the same picture is the same file
        figure.savefig(picture.with_suffix(".svg"), metadata=about | {"Date": None})


def text(arrows: Imports) -> str:
    """The arrows, a line a box."""
    return "\n".join(f"{box}: {' '.join(sorted(arrows[box]))}" for box in sorted(arrows))


def ground(axes: Axes, wing: str, places: list[tuple[float, float]]) -> None:
    """The ground of a wing, and its name above."""
    xs, ys = zip(*places, strict=True)
    left, low = min(xs) - COLUMN * 0.49, min(ys) - HIGH / 2 - 0.08
    right, high = max(xs) + COLUMN * 0.49, max(ys) + HIGH / 2 + 0.3
    corner, style = (left, low), "round,pad=0,rounding_size=0.1"
    colour = COLOURS[wing]
    axes.add_patch(
        FancyBboxPatch(corner, right - left, high - low, style, color=colour, alpha=0.09, lw=0)
    )
    x, side = (right - 0.08, "right") if wing in AT_RIGHT else (left + 0.08, "left")
    axes.text(x, high - 0.06, wing, color=colour, size=11, style="italic", va="top", ha=side)


def room(axes: Axes, box: str, count: int, x: float, y: float, colour: str) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (x - WIDE / 2, y - HIGH / 2), WIDE, HIGH, "round,pad=0,rounding_size=0.06",
            facecolor="white", edgecolor=colour, lw=1.3, zorder=3,
        )
    )  # fmt: skip
    name = "import kfoc" if box == "kfoc" else box
    axes.text(x, y + 0.01, name, color=INK, size=11.5, ha="center", va="bottom", zorder=4)
    about = f"{float(f'{count:.2g}'):,.0f} lines"  # all the digits would change with every commit
    axes.text(x, y - 0.03, about, color="#565d66", size=9.5, ha="center", va="top", zorder=4)


def arrow(axes: Axes, points: list[tuple[float, float]], colour: str) -> None:
    xs, ys = zip(*points, strict=True)
    axes.plot(xs, ys, color=colour, lw=1.1, zorder=2, solid_joinstyle="round")
    head = {"arrowstyle": "-|>", "color": colour, "lw": 1.1, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", points[-1], (xs[-1], ys[-1] + 0.12), arrowprops=head, zorder=2)


if __name__ == "__main__":
    draw(SOURCE, PICTURE)
