"""The pixels of DICOM images, decoded and rescaled by SimpleITK (GDCM), one at a time.

What GDCM does not read as it should, a frame of a multi-frame file or an image that is deflated or
inverted, it is given as a copy: a file of one plain image with the same encoded pixels.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom import encaps
from pydicom.config import disable_value_validation
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    JPEG2000,
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSTransferSyntaxes,
    JPEGTransferSyntaxes,
    RLELossless,
    generate_uid,
)

from nnunetv2_meddinov3.curate.readers.dicom_guard import (
    BIG_ENDIAN,
    NATIVE,
    NOWHERE,
    Misfit,
    open_plain,
)
from nnunetv2_meddinov3.curate.readers.dicom_header import SliceHeader, without_pydicom_warnings
from nnunetv2_meddinov3.curate.readers.images import open_header, without_itk_warnings
from nnunetv2_meddinov3.curate.volume import Unreadable

INVERTED, UPRIGHT = b"MONOCHROME1", b"MONOCHROME2"
OF_PIXELS = ("BitsAllocated", "BitsStored", "Columns", "HighBit", "PixelRepresentation", "Rows")
DECODED = (  # by GDCM, besides those of NATIVE
    DeflatedExplicitVRLittleEndian,
    RLELossless,
    *JPEGTransferSyntaxes,
    *JPEGLSTransferSyntaxes,
    JPEG2000,
    JPEG2000Lossless,
)
MAX_OPEN = 8  # multi-frame files at a time


def check_decodable(header: SliceHeader) -> None:
    """Refuse a file that GDCM, which decodes the pixels, cannot read: alone, not with its series.

    Frames are looked at when they are decoded.

    Raises:
        Unreadable: If GDCM refuses it.
    """
    if header.frame is not None:
        return
    if header.syntax == RLELossless and header.pixels != NOWHERE:
        with PixelReader() as reader:
            reader.check_segments(header)
    try:
        with without_itk_warnings():
            open_header(header.path, "GDCMImageIO")
    except RuntimeError as error:
        raise Unreadable(
            _unknown_syntax(header) or "it is a damaged DICOM file, or one that GDCM cannot read"
        ) from error


def _unknown_syntax(header: SliceHeader) -> str | None:
    """Return what to do about pixels that are compressed as GDCM does not know, else None."""
    syntax = UID(header.syntax)
    if syntax in NATIVE or syntax in DECODED:
        return None
    return (
        f"its pixels are encoded as {syntax.name}, which GDCM does not decode; export it "
        "uncompressed, or as JPEG, JPEG-LS, JPEG 2000 (Part 1) or RLE"
    )


class PixelReader:
    """Reads the pixels of the images of a volume; a context manager, since it keeps files open."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, _Frames] = OrderedDict()
        self._folder = tempfile.TemporaryDirectory()
        self._copy = Path(self._folder.name) / "image.dcm"

    def __enter__(self) -> PixelReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for frames in self._open.values():
            frames.file.close()
        self._open.clear()
        self._folder.cleanup()

    def read(self, header: SliceHeader) -> np.ndarray:
        """Return the values of an image (rows, columns), rescale applied.

        Raises:
            Unreadable: If they cannot be decoded, or have another size than the header says.
            OSError: If the file cannot be read.
        """
        try:
            pixels = self._decoded(header)
        except (OSError, Unreadable):
            raise
        except Exception as error:  # GDCM's errors name the file and its addresses in memory
            reason = _unknown_syntax(header) or "its pixels cannot be decoded"
            raise Unreadable(reason) from error
        if pixels.shape != (header.rows, header.columns):
            raise Unreadable("its pixels are of another size than its header says")
        return pixels

    def check_segments(self, header: SliceHeader) -> None:
        """Refuse what is not encoded as RLE, where GDCM ends the process by dividing by zero.

        Raises:
            Unreadable: If the code stream of an image begins with no number of segments.
        """
        try:
            begin = self._frames(header).encoded(header)[:4]
        except OSError:
            raise
        except Exception as error:  # whatever malformed bytes lead a parser to
            raise Unreadable("its pixels cannot be decoded") from error
        if not any(begin):
            raise Unreadable("its pixels cannot be decoded")

    def _decoded(self, header: SliceHeader) -> np.ndarray:
        """Decode an image as it is, or a copy of it.

        GDCM turns MONOCHROME1 round for display, and not by the same rule for every number of bits
        and sign. How an image is shown changes no HU, so a copy says MONOCHROME2.
        """
        if header.frame is not None:
            if header.syntax == RLELossless:
                self.check_segments(header)
            self._frames(header).write(header, self._copy)
            return _gdcm_pixels(self._copy)
        path, at = header.path, header.photometric_at
        if header.text("PhotometricInterpretation") != INVERTED.decode() or at is None:
            return _gdcm_pixels(path)
        data = path.read_bytes()
        at = data.index(INVERTED, at)
        self._copy.write_bytes(data[:at] + UPRIGHT + data[at + len(UPRIGHT) :])
        return _gdcm_pixels(self._copy)

    def _frames(self, header: SliceHeader) -> _Frames:
        """Return the open file of a frame, and close the one that was not used for longest."""
        if header.path not in self._open:
            if len(self._open) == MAX_OPEN:
                self._open.popitem(last=False)[1].file.close()
            self._open[header.path] = _Frames(header)
        self._open.move_to_end(header.path)
        return self._open[header.path]


class _Frames:
    """An open file of frames, of which one at a time is copied as a file of its own."""

    def __init__(self, header: SliceHeader) -> None:
        self.file: BinaryIO = open_plain(header.path)
        self.fragments: list[int] = []  # where each begins, if the pixels are divided into them
        at, length = header.pixels.at, header.pixels.length
        if at is None:
            raise Misfit("its pixels cannot be found")
        with without_pydicom_warnings():
            self.description = pydicom.dcmread(
                self.file, stop_before_pixels=True, specific_tags=list(OF_PIXELS)
            )
        if length is None:
            self.file.seek(at)
            encaps.parse_basic_offsets(self.file)
            self.fragments = encaps.parse_fragments(self.file)[1]

    def write(self, header: SliceHeader, path: Path) -> None:
        """Write a frame as a CT slice whose stored values and rescale are those of the frame."""
        data, syntax = self.encoded(header), header.syntax
        copy = pydicom.Dataset()
        for keyword in OF_PIXELS:
            if keyword in self.description:
                setattr(copy, keyword, self.description[keyword].value)
        copy.SOPClassUID, copy.SOPInstanceUID = CTImageStorage, generate_uid()
        copy.SamplesPerPixel, copy.PhotometricInterpretation = 1, UPRIGHT.decode()
        copy.file_meta = FileMetaDataset()
        if header.pixels.length is None:
            data = encaps.encapsulate([data])
        else:
            data += b"\0" * (len(data) % 2)
            syntax = ExplicitVRBigEndian if syntax == BIG_ENDIAN else ExplicitVRLittleEndian
        copy.file_meta.TransferSyntaxUID = UID(syntax)
        with without_pydicom_warnings(), disable_value_validation():
            for keyword in ("RescaleIntercept", "RescaleSlope"):
                if text := header.text(keyword):
                    setattr(copy, keyword, text)
            copy.PixelData = data
            copy["PixelData"].VR = "OB" if header.pixels.length is None else "OW"
            copy["PixelData"].is_undefined_length = header.pixels.length is None
            pydicom.dcmwrite(path, copy, enforce_file_format=True)

    def encoded(self, header: SliceHeader) -> bytes:
        """Return the bytes of a frame as they are in the file, without its fragments' heads."""
        at, frame = header.pixels.at, header.frame or 0
        assert at is not None
        if header.pixels.length is not None:
            bits = header.bits * header.rows * header.columns
            if header.frames > 1 and bits % 8:
                raise Misfit("its frames do not begin at whole bytes")
            self.file.seek(at + frame * (bits // 8))
            return self.file.read(-(-bits // 8))
        if len(self.fragments) == header.frames:
            self.file.seek(self.fragments[frame])
            return next(encaps.generate_fragments(self.file))
        self.file.seek(at)
        with without_pydicom_warnings():
            return encaps.get_frame(self.file, frame, number_of_frames=header.frames)


def _gdcm_pixels(path: Path) -> np.ndarray:
    image = sitk.ReadImage(str(path), imageIO="GDCMImageIO")
    return np.asarray(sitk.GetArrayFromImage(image)[0])
