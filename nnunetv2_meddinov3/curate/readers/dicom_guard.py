"""A guard before DICOM parsers: walks through a file's elements to see that they fit into it.

GDCM allocates whatever length a damaged element states, gigabytes at times, and does not always
give them back. So only a file whose elements fit reaches it, or pydicom.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

MARK = b"DICM"
START = 132  # behind the preamble and the mark
IMPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
TRANSFER_SYNTAX = (0x0002, 0x0010)
PIXEL_DATA, ITEM, END_OF_ITEMS = (0x7FE0, 0x0010), (0xFFFE, 0xE000), (0xFFFE, 0xE0DD)
DELIMITERS = 0xFFFE  # group of items and of the ends of items and sequences
UNDEFINED = 0xFFFFFFFF
LONG_TYPES = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SV", b"UC", b"UR", b"UT", b"UV")
NESTED_TYPES = (b"SQ", b"UN")


class Misfit(ValueError):
    """A file whose elements do not fit into it, or cannot be followed."""


def has_mark(path: Path) -> bool:
    """Return whether a file has DICOM's mark behind its preamble."""
    with path.open("rb") as file:
        return file.read(START)[-len(MARK) :] == MARK


def check_lengths(path: Path) -> bool:
    """Walk through a file with DICOM's mark and return whether it has pixels.

    Raises:
        Misfit: If an element reaches beyond the file, or is not an element.
    """
    size = path.stat().st_size
    syntax = IMPLICIT
    with path.open("rb") as file:
        at, order, explicit = START, "<", True
        while at < size:
            file.seek(at)
            group = int.from_bytes(file.read(2), "little" if order == "<" else "big")
            if explicit and at > START and order == "<" and group != 2:
                order, explicit = _encoding(syntax)
            tag, kind, length, begin = _element(file, at, order, explicit or group == 2)
            if length != UNDEFINED and begin + length > size:
                raise Misfit("an element reaches beyond the end of the file")
            if tag == PIXEL_DATA:
                if length == UNDEFINED:
                    _walk_fragments(file, begin, size, order)
                return True
            if tag == TRANSFER_SYNTAX:
                file.seek(begin)
                syntax = file.read(length).decode("ascii", "replace").strip(" \0")
            if kind == b"UN" and length == UNDEFINED:
                return True  # a private sequence, which the parsers have to know
            nested = tag[0] == DELIMITERS or kind == b"SQ" or length == UNDEFINED
            at = begin if nested else begin + length
    return False


def _encoding(syntax: str) -> tuple[str, bool]:
    if syntax == DEFLATED:
        raise Misfit("its elements are deflated")
    return (">" if syntax == BIG_ENDIAN else "<"), syntax != IMPLICIT


def _element(
    file: BinaryIO, at: int, order: str, explicit: bool
) -> tuple[tuple[int, int], bytes, int, int]:
    """Return tag, type (empty where not stated), length, and where the value begins."""
    file.seek(at)
    head = file.read(12)
    if len(head) < 8:
        raise Misfit("its last element is cut off")
    tag = struct.unpack(f"{order}HH", head[:4])
    if tag[0] == DELIMITERS or not explicit:
        return tag, b"", struct.unpack(f"{order}I", head[4:8])[0], at + 8
    kind = head[4:6]
    if not (kind.isalpha() and kind.isupper()):
        raise Misfit("an element has no type")
    if kind not in LONG_TYPES + NESTED_TYPES:
        return tag, kind, struct.unpack(f"{order}H", head[6:8])[0], at + 8
    if len(head) < 12:
        raise Misfit("its last element is cut off")
    return tag, kind, struct.unpack(f"{order}I", head[8:])[0], at + 12


def _walk_fragments(file: BinaryIO, at: int, size: int, order: str) -> None:
    """Follow the compressed fragments of the pixels up to their end."""
    while at < size:
        tag, _, length, begin = _element(file, at, order, explicit=False)
        if tag == END_OF_ITEMS:
            return
        if tag != ITEM or begin + length > size:
            break
        at = begin + length
    raise Misfit("its compressed pixels are cut off")
