"""``meddinov3 watch``: a pretraining or a training while it goes."""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2_meddinov3.errors import UserError

if TYPE_CHECKING:
    from nnunetv2_meddinov3.watch.view import View

_DESCRIPTION = """\
Shows a run of `meddinov3 pretrain`, or a training of nnU-Net by any trainer, from the files that it
writes: how far each stage or fold is, time left, losses, speed, and what is wrong, in words. The
folder may be another machine's; nothing but the folder is needed, and the run is not disturbed.
Ends when the run is finished; Ctrl-C ends only the view. Where the output is no terminal, it writes
a line whenever something has changed.
"""
_COLUMNS = 120  # of a file or a pipe, where nothing says how wide it is


def main(argv: list[str] | None = None) -> int:
    """Show a run until it is finished.

    Args:
        argv: What was typed after ``meddinov3 watch``; by default that of this process.

    Returns:
        The exit code, 0.

    Raises:
        UserError: If the folder is no run, or a file of it cannot be read.
    """
    arguments = _parser().parse_args(argv)
    if not 0 < arguments.every < float("inf"):
        raise UserError(f"--every must be a number of seconds above 0, got {arguments.every}.")
    view = read_run(arguments.folder)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # folders and labels may have letters that the terminal's encoding lacks
        sys.stdout.reconfigure(errors="replace")
    try:
        if arguments.once:
            _print(view, arguments.everything)
        elif sys.stdout.isatty():
            _live(view, arguments)
        else:
            _lines(view, arguments)
    except KeyboardInterrupt:
        pass  # of the view alone
    return 0


def read_run(folder: Path) -> View:
    """Return a run as it is now.

    Args:
        folder: Of a pretraining, one of its stages, a model of nnU-Net's or one of its folds.

    Raises:
        UserError: If it is none of these, or a file of it cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"the folder of a run must exist, but there is no folder {folder}.")
    from nnunetv2_meddinov3.report.model_folder import models_in
    from nnunetv2_meddinov3.watch.folds_view import is_training, view_of_folds
    from nnunetv2_meddinov3.watch.stages_view import is_pretraining, view_of_stages

    if is_pretraining(folder):
        return view_of_stages(folder)
    if is_training(folder):
        return view_of_folds(folder)
    raise UserError(
        "a run must be the --out of `meddinov3 pretrain` or a folder TRAINER__PLANS__CONFIGURATION "
        f"with folders fold_*, but {folder} has neither stages nor folds"
        f"{models_in(folder)}: give one of those, "
        "or wait until it has begun."
    )


def _print(view: View, everything: bool) -> None:
    from rich.console import Console

    from nnunetv2_meddinov3.watch.terminal import draw, has_blocks

    console = Console(width=None if sys.stdout.isatty() else _width())
    console.print(draw(view, everything=everything, blocks=has_blocks(console)))


def _width() -> int:
    """Return the columns of what is no terminal."""
    said = os.environ.get("COLUMNS", "")
    return int(said) if said.isdigit() and int(said) > 0 else _COLUMNS


def _live(view: View, arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.live import Live

    from nnunetv2_meddinov3.watch.terminal import draw, has_blocks

    console = Console()
    options = {"everything": arguments.everything, "blocks": has_blocks(console)}
    with Live(draw(view, **options), console=console, auto_refresh=False) as live:
        while not view.is_over:
            time.sleep(arguments.every)
            view = read_run(arguments.folder)
            live.update(draw(view, **options), refresh=True)


def _lines(view: View, arguments: argparse.Namespace) -> None:
    from nnunetv2_meddinov3.watch.terminal import line

    before: tuple[int, str] | None = None
    said: set[str] = set()
    while True:
        part = view.parts[view.current]
        now = (part.done, f"{part.name} {part.state}")
        if now != before:
            print(line(view), flush=True)
        for sentence in part.wrong:
            # the same is said again with other numbers in brackets
            if (head := f"{part.name} {sentence.partition('(')[0]}") not in said:
                said.add(head)
                print(f"{part.name}: {sentence}", flush=True)
        if view.is_over:
            return
        before = now
        time.sleep(arguments.every)
        view = read_run(arguments.folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="meddinov3 watch",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "folder",
        type=Path,
        metavar="RUN",
        help="the --out of a pretraining, a stage of it, a model's folder of nnU-Net or a fold",
    )
    add("--once", action="store_true", help="show it as it is now, and end")
    add(
        "--every",
        type=float,
        default=5.0,
        metavar="SECONDS",
        help="between two looks at the folder. Default: 5",
    )
    add("--all", dest="everything", action="store_true", help="show every curve")
    return parser
