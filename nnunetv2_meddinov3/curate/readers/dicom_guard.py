"""A guard before DICOM parsers: walks through a file's elements to see that they fit into it.

GDCM allocates whatever length a damaged element states, gigabytes at times, and does not always
give them back. So only a file whose elements fit reaches it, or pydicom. A deflated file is walked
through as what it inflates to.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from nnunetv2_meddinov3.curate.volume import MAX_VOXELS, check_memory

MARK = b"DICM"
START = 132  # behind the preamble and the mark
IMPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.2"
EXPLICIT, DEFLATED = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99"
NATIVE = (IMPLICIT, EXPLICIT, BIG_ENDIAN)  # syntaxes whose pixels are not compressed
CHUNK = 1 << 22  # bytes that are inflated at a time
MAX_INFLATED = 2 * MAX_VOXELS  # bytes
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


@dataclass(frozen=True, slots=True)
class Pixels:
    """Where the pixels of a file are.

    Attributes:
        at: Byte of ``open_plain`` at which the value of PixelData begins, None where a sequence of
            unknown type before it cannot be followed.
        length: Bytes of the value, None where it is divided into compressed fragments.
    """

    at: int | None
    length: int | None


NOWHERE = Pixels(None, None)


def open_plain(path: Path) -> BinaryIO:
    """Open a file with DICOM's mark; a deflated one as a copy in memory that is not deflated.

    Raises:
        Misfit: If an element before the deflated ones does not fit, or those cannot be inflated.
        Unreadable: If the memory does not suffice for what it inflates to.
    """
    file = path.open("rb")
    try:
        size = os.fstat(file.fileno()).st_size
        syntax, syntax_at, begin = _syntax(file, size)
        file.seek(0)
        if syntax != DEFLATED:
            return file
        head = bytearray(file.read(begin))
    except BaseException:
        file.close()
        raise
    with file:
        head[syntax_at : syntax_at + len(DEFLATED)] = EXPLICIT.encode().ljust(len(DEFLATED), b"\0")
        return _inflated(file, head)


def _syntax(file: BinaryIO, size: int) -> tuple[str, int, int]:
    """Return the transfer syntax, the byte at which it stands, and that of the data set."""
    at, syntax, syntax_at = START, IMPLICIT, START
    while at < size:
        file.seek(at)
        if file.read(2) != b"\x02\x00":
            break
        tag, _, length, begin = _element(file, at, "<", explicit=True, size=size)
        if tag == TRANSFER_SYNTAX:
            file.seek(begin)
            syntax, syntax_at = _plain(file.read(length)), begin
        at = begin + length
    return syntax, syntax_at, at


def _plain(value: bytes) -> str:
    return value.decode("ascii", "replace").strip(" \0")


def _inflated(file: BinaryIO, head: bytearray) -> io.BytesIO:
    """Return the elements before the deflated ones with what these inflate to, from its start."""
    result = io.BytesIO()
    result.write(head)
    decoder = zlib.decompressobj(-zlib.MAX_WBITS)  # without a header, as DICOM has it
    try:
        while not decoder.eof:
            data = decoder.unconsumed_tail or file.read(CHUNK)
            result.write(decoder.decompress(data, CHUNK) if data else decoder.flush())
            if not data and not decoder.eof:
                raise Misfit("its deflated elements are cut off")
            if result.tell() > MAX_INFLATED:
                raise Misfit(f"its deflated elements inflate to more than {MAX_INFLATED:.0e} bytes")
            check_memory(result.tell())  # growing takes as much again
    except zlib.error as error:
        raise Misfit("its deflated elements cannot be inflated") from error
    result.seek(0)
    return result


def check_lengths(file: BinaryIO) -> Pixels | None:
    """Walk through a file with DICOM's mark, not deflated, and return where it has pixels.

    Pixels inside sequences, those of icons, are passed by.

    Raises:
        Misfit: If an element reaches beyond the file, or is not an element.
    """
    size = file.seek(0, os.SEEK_END)
    syntax = IMPLICIT
    at, order, explicit = START, "<", True
    around: list[_Sequence] = []
    inside = False  # whether there are pixels in a sequence
    while at < size:
        while around and at >= around[-1].end:
            around.pop()
        unknown = bool(around) and around[-1].unknown
        file.seek(at)
        group = int.from_bytes(file.read(2), "little" if order == "<" else "big")
        if explicit and at > START and order == "<" and group != 2:
            order, explicit = _encoding(syntax)
        typed = (explicit or group == 2) and not unknown
        try:
            tag, kind, length, begin = _element(file, at, order, typed, size)
        except Misfit:
            if unknown:
                return NOWHERE  # only the parsers know such a sequence
            raise
        at = begin if length == UNDEFINED else begin + length
        if tag == PIXEL_DATA:
            if length == UNDEFINED:
                at = _end_of_fragments(file, begin, size, order)
            if not around:
                return Pixels(begin, None if length == UNDEFINED else length)
            inside = True
        elif tag == TRANSFER_SYNTAX:
            file.seek(begin)
            syntax = _plain(file.read(length))
        elif tag == END_OF_ITEMS and around and around[-1].end == math.inf:
            around.pop()
        elif tag[0] == DELIMITERS:
            at = begin
        elif kind == b"SQ" or length == UNDEFINED:
            end = math.inf if length == UNDEFINED else at
            around.append(_Sequence(end, unknown or kind == b"UN"))
            at = begin
    return NOWHERE if inside and around else None


class _Sequence(NamedTuple):
    """A sequence around an element.

    Attributes:
        end: Byte behind it, infinite where a delimiter ends it.
        unknown: Whether it is one of type UN or inside one, whose elements are implicit.
    """

    end: float
    unknown: bool


def _encoding(syntax: str) -> tuple[str, bool]:
    return (">" if syntax == BIG_ENDIAN else "<"), syntax != IMPLICIT


def _element(
    file: BinaryIO, at: int, order: str, explicit: bool, size: int
) -> tuple[tuple[int, int], bytes, int, int]:
    """Return tag, type (empty where not stated), length, and where the value begins."""
    tag, kind, length, begin = _head(file, at, order, explicit)
    if length != UNDEFINED and begin + length > size:
        raise Misfit("an element reaches beyond the end of the file")
    return tag, kind, length, begin


def _head(
    file: BinaryIO, at: int, order: str, explicit: bool
) -> tuple[tuple[int, int], bytes, int, int]:
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


def _end_of_fragments(file: BinaryIO, at: int, size: int, order: str) -> int:
    """Follow the compressed fragments of the pixels and return the byte behind them."""
    while at < size:
        tag, _, length, begin = _head(file, at, order, explicit=False)
        if tag == END_OF_ITEMS:
            return begin
        if tag != ITEM or begin + length > size:
            break
        at = begin + length
    raise Misfit("its compressed pixels are cut off")
