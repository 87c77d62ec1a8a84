"""The page of a demo: what was measured, how it looks, and what to type to get the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from nnunetv2_meddinov3.evaluation.dice import DiceTable, text_rows
from nnunetv2_meddinov3.html import Code, Picture, Section, Table, Text, write_page


def write_report(
    path: Path,
    title: str,
    note: str,
    table: DiceTable,
    overlay: Path,
    commands: Sequence[str],
    versions: Mapping[str, str],
) -> None:
    """Write one HTML file that needs no other: the table, the picture, the commands, the versions.

    Args:
        path: The page to write.
        title: Heading of the page.
        note: What the numbers mean and do not mean, in a sentence or two.
        table: Dice of ``dice_per_label``.
        overlay: PNG of ``save_overlay``, which is embedded.
        commands: The lines a reader types to get the same.
        versions: Name of a piece of software -> its version.

    Raises:
        UserError: If the page cannot be written.
    """
    head, *rows = text_rows(table)
    absent = Text("A dash: the label is in neither the reference nor the prediction.")
    sides = Text("Left the contours of the reference, right those of the prediction.")
    picture = Picture(overlay.read_bytes(), "Contours of reference and prediction")
    sections = [
        Section("Dice on held-out cases", [Table(head, rows, last_is_total=True), absent]),
        Section("Pictures", [sides, picture]),
        Section("Commands", [Code("\n".join(commands))]),
        Section("Versions", [Table(["software", "version"], list(versions.items()))]),
    ]
    write_page(path, title, [Text(note, "note")], sections)
