"""What a store holds already is compared with new exclusions as if it were to enter now."""

import json

import numpy as np
import pytest

from nnunetv2_meddinov3 import files
from nnunetv2_meddinov3.curate.discover import find_sources
from nnunetv2_meddinov3.curate.ingest import Job, ingest
from nnunetv2_meddinov3.curate.leakage import build_guard, check_store, mark_compared
from nnunetv2_meddinov3.curate.pipeline import curate
from nnunetv2_meddinov3.curate.slices import SliceRules
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.store import layout
from nnunetv2_meddinov3.store.fingerprints import slice_sha256, turned
from nnunetv2_meddinov3.store.index import read_records
from nnunetv2_meddinov3.store.reader import SliceStore
from nnunetv2_meddinov3.store.verify import verify
from nnunetv2_meddinov3.store.writer import StoreWriter

SYMMETRIES = range(8)
NATIVE = SliceRules()


def chest(slices=3, noise=8.0, seed=0):
    """Draw axial slices of a chest (S, 72, 56) in HU: lungs of two sizes, heart, spine, table."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : 72 * 1j, -1 : 1 : 56 * 1j]

    def ellipse(at_y, at_x, high, wide):
        return ((y - at_y) / high) ** 2 + ((x - at_x) / wide) ** 2 < 1

    volume = []
    for z in range(slices):
        image = np.where(ellipse(0, 0, 0.8, 0.9), 30.0, -1000.0)
        image[ellipse(-0.1, -0.42, 0.5, 0.3 + 0.02 * z)] = -820
        image[ellipse(0.05, 0.5, 0.4, 0.2)] = -800
        image[ellipse(-0.15, 0.15, 0.28, 0.26)] = 120
        image[ellipse(0.55, 0.05, 0.14, 0.13)] = 650
        image[np.abs(y - 0.93) < 0.03] = -100
        volume.append(image)
    array = np.stack(volume) + generator.normal(0, noise, (slices, 72, 56))
    return np.rint(array).astype(np.int16)


def belly(slices=3):
    """Draw axial slices of an abdomen (S, 72, 56) in HU: liver, two kidneys, gas in the bowel."""
    y, x = np.mgrid[-1 : 1 : 72 * 1j, -1 : 1 : 56 * 1j]
    image = np.where((y / 0.7) ** 2 + (x / 0.95) ** 2 < 1, -90.0, -1000.0)
    image[(y / 0.6) ** 2 + (x / 0.8) ** 2 < 1] = 45
    image[((y + 0.1) / 0.4) ** 2 + ((x + 0.4) / 0.4) ** 2 < 1] = 150
    image[((y + 0.3) / 0.12) ** 2 + ((x - 0.4) / 0.2) ** 2 < 1] = -900
    for side in (-0.4, 0.35):
        image[((y - 0.3) / 0.2) ** 2 + ((x - side) / 0.13) ** 2 < 1] = 190
    noise = np.random.default_rng(5).normal(0, 8, (slices, 72, 56))
    return np.rint(image + noise).astype(np.int16)


def turn(volume, symmetry):
    return np.stack([list(turned(image))[symmetry] for image in volume])


@pytest.fixture
def stored(tmp_path, write_image):
    """A function that makes a store of volumes without asking for exclusions."""

    def make(volumes, rules=NATIVE, name="store"):
        writer = StoreWriter(tmp_path / name, rules.options())
        for key, array in volumes.items():
            write_image(tmp_path / "mine" / f"{key}.nii.gz", array)
        for source in find_sources([tmp_path / "mine"])[0]:
            assert ingest(source, Job(writer, rules)).state == "entered"
        return writer

    return make


@pytest.fixture
def guard(tmp_path, write_image):
    """What keeps the chest out."""
    write_image(tmp_path / "tests" / "chest.nii.gz", chest())
    return build_guard([tmp_path / "tests"])


def flags_of(store):
    return {
        record.source_key: ["near_excluded" in each.flags for each in record.slices]
        for record in read_records(store)
    }


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_a_stored_copy_is_found_in_every_symmetry(stored, guard, symmetry):
    writer = stored({"a": belly(), "c": turn(chest(), symmetry)})
    how = "" if symmetry == 0 else ", mirrored or turned"
    with pytest.raises(UserError, match=f"mine/c.nii.gz in it shares 3 slices with tests{how}: "):
        check_store(guard, writer.folder)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_a_stored_slice_that_looks_alike_is_flagged_in_every_symmetry_and_no_other(
    stored, guard, symmetry
):
    writer = stored({"a": belly(), "c": turn(chest(seed=9), symmetry)})
    alike = check_store(guard, writer.folder)
    assert alike == {"mine/a.nii.gz": [], "mine/c.nii.gz": [0, 1, 2]}
    assert mark_compared(guard, writer, alike) == 3
    assert flags_of(writer.folder) == {"mine/a.nii.gz": [False] * 3, "mine/c.nii.gz": [True] * 3}


@pytest.mark.parametrize("kind", ["list", "store"])
def test_of_a_list_or_a_store_of_exclusions_a_turned_copy_is_found_too(
    tmp_path, stored, write_image, kind
):
    writer = stored({"c": turn(chest(), 6)})
    exclusion = tmp_path / "hashes.txt"
    if kind == "list":
        exclusion.write_text("\n".join(map(slice_sha256, chest())))
    else:
        write_image(tmp_path / "mine" / "c.nii.gz", chest())
        exclusion = stored({}, name="excluded").folder
    with pytest.raises(UserError, match=f"with {exclusion.name}, mirrored or turned"):
        check_store(build_guard([exclusion]), writer.folder)


def test_values_that_are_not_hu_are_compared_as_they_are_stored(tmp_path, stored, write_image):
    # whole numbers that cannot be HU keep their own scale in the store
    volume = (chest(seed=3).astype(int) + 1000) * 5
    write_image(tmp_path / "tests" / "chest.nii.gz", volume.astype(np.int32))
    guard = build_guard([tmp_path / "tests"])
    writer = stored({"c": turn(volume, 5).astype(np.int32)})
    with pytest.raises(UserError, match="shares 3 slices"):
        check_store(guard, writer.folder)
    noisy = volume + np.random.default_rng(2).integers(-20, 21, volume.shape)
    writer = stored({"c": turn(noisy, 3).astype(np.int32)}, name="other")
    assert check_store(guard, writer.folder) == {"mine/c.nii.gz": [0, 1, 2]}


def test_what_was_compared_once_is_not_read_again(stored, guard, tmp_path, write_image):
    writer = stored({"a": belly(), "c": turn(chest(seed=9), 4)})
    mark_compared(guard, writer, check_store(guard, writer.folder))
    for path in (writer.folder / layout.VOLUMES).iterdir():
        path.write_bytes(bytes(path.stat().st_size))
    assert check_store(guard, writer.folder) == {}
    write_image(tmp_path / "tests" / "more.nii.gz", belly()[:1])
    with pytest.raises(UserError, match="missing or damaged"):
        check_store(build_guard([tmp_path / "tests"]), writer.folder)


def of_an_earlier_version(store):
    """Take from the notes of a store that copies were turned, which versions before did not say."""
    for path in (store / layout.RECORDS).iterdir():
        values = layout.unsealed(path.read_bytes(), "record_sha256")
        values["notes"] = [note.split(", mirrored")[0] for note in values["notes"]]
        files.write_bytes(path, layout.sealed(values, "record_sha256"))
    return store


def test_a_store_of_before_turned_copies_were_looked_for_is_compared_anew(
    tmp_path, stored, guard, write_image
):
    write_image(tmp_path / "mine" / "c.nii.gz", turn(chest(), 3))
    (source,), _ = find_sources([tmp_path / "mine"])
    writer = StoreWriter(tmp_path / "s", NATIVE.options())
    ingest(source, Job(writer))
    writer.remark(source.key, guard.note(), "near_excluded", [])
    assert check_store(guard, writer.folder) == {}
    of_an_earlier_version(writer.folder)
    with pytest.raises(UserError, match="shares 3 slices with tests, mirrored or turned"):
        check_store(guard, writer.folder)


def test_turned_copies_in_a_resampled_store_of_before_are_flagged(stored, guard):
    rules = SliceRules(size=48)
    writer = stored({"a": belly(), "c": turn(chest(), 7)}, rules)
    with pytest.raises(UserError, match="was not compared with the exclusions"):
        check_store(guard, writer.folder)
    for key in ("mine/a.nii.gz", "mine/c.nii.gz"):
        writer.remark(key, guard.note(), "near_excluded", [])
    of_an_earlier_version(writer.folder)
    alike = check_store(guard, writer.folder)
    assert alike == {"mine/a.nii.gz": [], "mine/c.nii.gz": [0, 1, 2]}


def test_a_stored_volume_that_lacks_its_array_is_left_to_be_written_anew(stored, guard):
    writer = stored({"a": belly()})
    (array,) = (writer.folder / layout.VOLUMES).iterdir()
    array.unlink()
    assert check_store(guard, writer.folder) == {}


@pytest.mark.slow
def test_curate_flags_what_it_held_says_so_and_leaves_an_intact_store(
    tmp_path, stored, write_image
):
    writer = stored({"a": belly(), "c": turn(chest(seed=9), 2)})
    write_image(tmp_path / "tests" / "chest.nii.gz", chest())
    summary = curate([tmp_path / "mine"], writer.folder, exclude=[tmp_path / "tests"])
    assert (summary.present, summary.flagged) == (2, 3)
    assert "flagged near_excluded: 3 slices that the store had" in str(summary)
    rows = SliceStore(writer.folder).rows.to_pylist()
    flagged = {row["source_key"] for row in rows if "near_excluded" in row["flags"]}
    assert flagged == {"mine/c.nii.gz"}
    manifest = json.loads((writer.folder / layout.MANIFEST).read_bytes())
    (note,) = (note for note in manifest["notes"] if note.startswith("leakage guard"))
    assert note == "leakage guard: compared with N excluded slices, mirrored and turned too"
    assert verify(writer.folder) == []
    again = curate([tmp_path / "mine"], writer.folder, exclude=[tmp_path / "tests"])
    assert (again.flagged, again.present) == (0, 2)
