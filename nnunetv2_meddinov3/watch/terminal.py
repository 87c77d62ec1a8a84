"""A run as a terminal shows it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nnunetv2_meddinov3.progress import in_words
from nnunetv2_meddinov3.watch.view import Part, View

_BLOCKS = "▁▂▃▄▅▆▇█"
_PLAIN = "_.-=*#"  # where the terminal's encoding lacks blocks
_WIDTH = 32  # of a curve, in characters
_SHOWN = 10  # curves, unless all are asked for


def draw(view: View, *, everything: bool = False, blocks: bool = True) -> RenderableType:
    """Return what rich prints of a run.

    Args:
        view: The run.
        everything: Whether all curves are shown, not the most telling ones.
        blocks: Whether the terminal's encoding has block characters.
    """
    part = view.parts[view.current]
    return Group(
        Text(f"{view.title}  ({view.folder})", style="bold", overflow="fold"),
        _parts(view, blocks),
        Text(_left(view)),
        *_figures(part),
        *_curves(part, everything, blocks),
        *_health(part),
        *([] if view.page is None else [Text(f"report: {view.page}", overflow="fold")]),
    )


def line(view: View) -> str:
    """Return how far a run is, in one line."""
    part = view.parts[view.current]
    total = "" if part.total is None else f"/{part.total}"
    facts = [f"{part.done}{total} {part.unit}", part.state]
    if part.curves:
        facts.append(f"{part.curves[0].name} {_number(part.curves[0].values[-1])}")
    facts += [f"{name} {value}" for name, value in list(part.figures.items())[:1]]
    return f"{part.name}: {', '.join(facts)}; {_left(view)}"


def sparkline(values: Sequence[float], width: int = _WIDTH, marks: str = _BLOCKS) -> str:
    """Return a curve in one line of text.

    Args:
        values: Finite, at least one; where there are more than ``width``, means of neighbours.
        width: In characters, at most.
        marks: From the lowest to the highest.
    """
    if len(values) > width:
        edges = [round(i * len(values) / width) for i in range(width + 1)]
        parts = [values[a:b] for a, b in itertools.pairwise(edges)]
        values = [sum(part) / len(part) for part in parts]
    low, high = min(values), max(values)
    if high <= low:
        return marks[len(marks) // 2] * len(values)
    steps = len(marks) - 1
    return "".join(marks[round((value - low) / (high - low) * steps)] for value in values)


def has_blocks(console: Console) -> bool:
    """Return whether a console can print block characters."""
    try:
        _BLOCKS.encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _parts(view: View, blocks: bool) -> Table:
    table = Table.grid(padding=(0, 2))
    for each in view.parts:
        total = "" if each.total is None else f" of {each.total}"
        share = (each.done, each.total or max(each.done, 1))
        bar: RenderableType = ProgressBar(total=share[1], completed=share[0], width=24)
        if not blocks:
            filled = round(24 * min(1.0, share[0] / share[1]))
            bar = Text("#" * filled + "." * (24 - filled))
        table.add_row(
            Text(each.name, style="bold" if each is view.parts[view.current] else ""),
            bar,
            Text(f"{each.done}{total} {each.unit}"),
            Text(_time(each)),
            Text(each.state, overflow="fold"),
        )
    return table


def _time(part: Part) -> str:
    if part.is_finished:
        return "" if part.spent is None else f"took {in_words(part.spent)}"
    if part.left is None:
        return "time unknown"
    return f"about {in_words(part.left)}" if part.is_guess else f"{in_words(part.left)} left"


def _left(view: View) -> str:
    if view.is_over:
        return "everything is finished"
    if view.left is None:
        return "time left: unknown yet"
    several = len([part for part in view.parts if not part.is_finished]) > 1
    return f"time left: {in_words(view.left)}{' for all of it' if several else ''}"


def _figures(part: Part) -> list[RenderableType]:
    said = [f"{name} {value}" for name, value in part.figures.items()]
    if part.age is not None and not part.is_finished:
        said.append(f"last line {in_words(part.age)} ago")
    return [Text(f"{part.name}: {', '.join(said)}", overflow="fold")] if said else []


def _curves(part: Part, everything: bool, blocks: bool) -> list[RenderableType]:
    shown = part.curves if everything else part.curves[:_SHOWN]
    if not shown:
        return [Text("no numbers yet")]
    table = Table.grid(padding=(0, 2))
    table.add_row("", "", Text("first", style="dim"), Text("now", style="dim"))
    for curve in shown:
        table.add_row(
            Text(curve.name),
            Text(sparkline(curve.values, marks=_BLOCKS if blocks else _PLAIN), style="cyan"),
            Text(_number(curve.values[0]), justify="right"),
            Text(_number(curve.values[-1]), justify="right"),
        )
    return [table]


def _health(part: Part) -> list[RenderableType]:
    if part.wrong:
        return [Text(f"! {said}", style="bold red", overflow="fold") for said in part.wrong]
    if part.checked:
        return [Text(f"nothing wrong at {part.checked}", style="green")]
    return [Text("not checked yet", style="dim")]


def _number(value: float) -> str:
    return f"{value:.4g}"
