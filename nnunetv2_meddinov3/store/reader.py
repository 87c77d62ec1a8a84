"""Reading a store: any slice by its number, from any process."""

from __future__ import annotations

import json
import operator
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.store import layout
from nnunetv2_meddinov3.store.codec import open_array, read_slice
from nnunetv2_meddinov3.store.index import METADATA

_OPEN_ARRAYS = 64  # per thread; each holds a file descriptor, of which 1024 are usual


class SliceStore:
    """The slices of a store, in the order of its index.

    It pickles as its path, and opens index and arrays again in each process, so it can be handed to
    the workers of a data loader, forked or spawned, and read by several threads. The index and the
    arrays are memory-mapped: workers on one machine share them.

    Args:
        path: Folder of a store that has an index.

    Raises:
        UserError: If there is no store, no index, or one of another format.

    Examples:
        >>> store = SliceStore("ct-store")  # doctest: +SKIP
        >>> image = store.image(0)  # doctest: +SKIP
        >>> image, record = store[0]  # doctest: +SKIP
        >>> image.dtype, record["dataset"], record["spacing_y"]  # doctest: +SKIP
        (dtype('int16'), 'Dataset001_Liver', 0.78)
    """

    def __init__(self, path: Path | str):
        self.path = Path(path).absolute()
        self.rows, about = _open_index(self.path)
        self.options: dict[str, Any] = about["options"]
        self.records_sha256: str = about["records_sha256"]
        self._columns = {name: self.rows[name] for name in self.rows.column_names}
        self._opened = _OpenArrays()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[np.ndarray, dict[str, Any]]:
        """Return one slice and its row of the index.

        Args:
            index: Number of the row; negative ones count from the end.

        Returns:
            (H, W) int16, a copy of its own; the row by column name, None where unknown.

        Raises:
            IndexError: If there is no such row.
            UserError: If the array is missing or damaged.
        """
        number = self._number(index)
        record = {name: column[number].as_py() for name, column in self._columns.items()}
        return self._read(number, record["file"], record["slice"]), record

    def image(self, index: int) -> np.ndarray:
        """Return one slice alone: like ``store[index][0]``, but its row is not made.

        Args:
            index: Number of the row; negative ones count from the end.

        Returns:
            (H, W) int16, a copy of its own.

        Raises:
            IndexError: If there is no such row.
            UserError: If the array is missing or damaged.
        """
        number = self._number(index)
        return self._read(number, self._value("file", number), self._value("slice", number))

    def ends(self, index: int) -> tuple[float, float] | None:
        """Return the stored numbers that stand for the low and the high end of a volume's values.

        In normalised values they are 0 and 1. None where the numbers are HU, as those of a CT are.

        Raises:
            IndexError: If there is no such row.
        """
        number = self._number(index)
        low, high = (self._value(f"intensity_stored_{end}", number) for end in ("low", "high"))
        return None if low is None or high is None else (low, high)

    def _value(self, column: str, number: int) -> Any:
        return self._columns[column][number].as_py()

    def _number(self, index: int) -> int:
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(
                f"index must lie in -{len(self)}..{len(self) - 1} for a store of {len(self)} "
                f"slices, got {number}."
            )
        return number % len(self)

    def _read(self, number: int, file: str, place: int) -> np.ndarray:
        try:
            return read_slice(self._opened.get(self.path / file), place)
        except Exception as error:  # the decompressor raises whatever damaged bytes lead it to
            raise UserError(
                f"slice {place} of {self.path / file} (from {self._value('source_key', number)}) "
                f"cannot be read ({error}): `meddinov3 store verify {self.path}` finds what is "
                "damaged."
            ) from error

    def __reduce__(self) -> tuple[type[SliceStore], tuple[Path]]:
        return SliceStore, (self.path,)


class _OpenArrays(threading.local):
    """The arrays this thread read last; a forked process opens its own."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.process = os.getpid()
        self.arrays: OrderedDict[Path, blosc2.NDArray] = OrderedDict()

    def get(self, path: Path) -> blosc2.NDArray:
        if self.process != os.getpid():
            self.forget()
        if path in self.arrays:
            self.arrays.move_to_end(path)
        else:
            self.arrays[path] = open_array(path)
            if len(self.arrays) > _OPEN_ARRAYS:
                self.arrays.popitem(last=False)
        return self.arrays[path]


def _open_index(folder: Path) -> tuple[pa.Table, dict[str, Any]]:
    """Open the rows, memory-mapped where the mapped copy belongs to the index, and their metadata.

    Raises:
        UserError: If there is no store, no index, or one that cannot be read.
    """
    layout.read_options(folder)
    path = folder / layout.INDEX
    if not path.is_file():
        raise UserError(
            f"{folder} must have an index ({layout.INDEX}), but curating it has not finished: run "
            "the same `meddinov3 curate` again, it goes on where it stopped."
        )
    try:
        about = _about(pq.read_schema(path, memory_map=True))
        layout.check_format(about["format"], folder)
        mapped = _open_mapped(folder / layout.MAPPED_INDEX, about)
        table = pq.read_table(path).combine_chunks() if mapped is None else mapped
    except UserError:
        raise
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): run the same `meddinov3 curate` again, which "
            "rebuilds it."
        ) from error
    return table, about


def _about(schema: pa.Schema) -> dict[str, Any]:
    return json.loads((schema.metadata or {})[METADATA])


def _open_mapped(path: Path, about: dict[str, Any]) -> pa.Table | None:
    """Map the copy of the index; None where it is missing, damaged or of another index."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        return reader.read_all() if _about(reader.schema) == about else None
    except (pa.ArrowException, OSError, KeyError, ValueError):
        return None
