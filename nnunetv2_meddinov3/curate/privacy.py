"""What a store says of where a volume comes from: patients, and with ``--hide-paths`` names too."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from nnunetv2_meddinov3.curate.leakage import EXCLUDED
from nnunetv2_meddinov3.curate.volume import VolumeSource

_OF_NNUNET = re.compile(r"(Dataset\d{3}|Task\d{2,3})_\w+")  # names that nnU-Net asks for
_ABSOLUTE = re.compile(r"'/[^']*'|\"/[^\"]*\"|(?<![\w./])/[^\s'\":;,()]+")


@dataclass(frozen=True)
class Names:
    """Turns the names of sources into those that a store keeps.

    Attributes:
        key: Secret of the store, see ``layout.read_key``; None in a store of before, which keeps
            the hashes that it has.
        hides_paths: Keep hashes instead of names of files and folders.
        also: More names to be hidden in reasons, those of exclusions.
    """

    key: bytes | None = field(default=None, repr=False)
    hides_paths: bool = False
    also: tuple[str, ...] = ()

    def stored(self, source: VolumeSource) -> VolumeSource:
        """Return a source as the store names it; the same one gets the same names in one store.

        The patient of a DICOM series, a hash of PatientID already, is hashed with the key: whoever
        has the store without it cannot find an id by trying all.
        """
        dataset, patient = source.dataset, source.patient
        if self.key is not None and (source.kind == "dicom" or self.hides_paths):
            patient = self._code(f"patient/{patient}")
        if self.hides_paths and not _OF_NNUNET.fullmatch(dataset):
            dataset = self._code(dataset)
        return replace(source, key=self.source_key(source.key), dataset=dataset, patient=patient)

    def source_key(self, key: str) -> str:
        """Return the key under which the store keeps a source."""
        return self._code(key, digits=32) if self.hides_paths else key

    def remark(self, text: str, key: str, paths: Iterable[str] = ()) -> str:
        """Return a note or a reason without the names of a source, if names are hidden.

        Args:
            text: What the store would say.
            key: Of the source, as it is.
            paths: Of its files.
        """
        if not self.hides_paths:
            return text
        kept = EXCLUDED if text.startswith(EXCLUDED) else ""
        text = text[len(kept) :]
        for name in sorted(_names([key, *self.also, *paths]), key=len, reverse=True):
            pattern = rf"(?<!\w){re.escape(name)}(?!\w)"
            text = re.sub(pattern, lambda match: self._code(match[0]), text)
        return kept + _ABSOLUTE.sub(lambda match: self._code(match[0].strip("'\"")), text)

    def _code(self, text: str, digits: int = 16) -> str:
        assert self.key is not None
        return hmac.new(self.key, text.encode("utf-8"), hashlib.sha256).hexdigest()[:digits]


def _names(texts: Iterable[str]) -> set[str]:
    """Return paths, their parts, and these without endings, but no short numbers."""
    found = set(texts)
    for text in list(found):
        parts = [part for part in re.split(r"[/#]", text) if part]
        found |= {*parts, *(part.split(".")[0] for part in parts)}
    return {name for name in found if len(name) > 3 or re.search(r"[^\W\d]", name)}
