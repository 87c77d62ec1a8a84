import hashlib

import numpy as np
import pytest

from nnunetv2_meddinov3.curate.resampling import resample_slices
from nnunetv2_meddinov3.curate.slices import SliceRules, cut_volume, stack_slices
from nnunetv2_meddinov3.curate.volume import Unreadable, Volume
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.store.fingerprints import (
    as_numbers,
    bit_distances,
    perceptual_hash,
    slice_sha256,
    source_sha256,
)

SPACING = (2.0, 0.9, 0.9)


def volume_of(array, intensity=None, modality="CT", windowed=False, spacing=SPACING):
    positions = None if spacing is None else spacing[0] * np.arange(len(array))
    return Volume(array, spacing, "LPS", modality, windowed, positions, intensity, ())


def cut(volume, near_excluded=(), **rules):
    return cut_volume(volume, stack_slices(volume), SliceRules(**rules), near_excluded)


def body(shape=(3, 20, 20)):
    """Air with a square of tissue that covers a quarter of each slice, one HU more in each."""
    array = np.full(shape, -1000, np.int16)
    array[:, :10, :10] = 50
    return array + np.arange(shape[0], dtype=np.int16)[:, None, None]


def test_whole_hu_pass_unchanged_and_are_described():
    array = body()
    result = cut(volume_of(array))
    np.testing.assert_array_equal(result.array, array)
    assert result.left_out == []
    first = result.records[0]
    assert (first.index, first.z, first.position_mm) == (0, 0, 0.0)
    assert first.sha256 == hashlib.sha256(array[0].astype("<i2").tobytes()).hexdigest()
    assert first.body_fraction == 0.25
    assert (first.hu_min, first.hu_max, first.hu_mean) == (-1000, 50, 0.75 * -1000 + 0.25 * 50)
    assert (first.saturated_fraction, first.padding_fraction, first.flags) == (0.0, 0.0, [])
    assert result.records[2].position_mm == 4.0


def test_float_copies_of_whole_hu_have_the_same_bytes():
    array = body()
    assert [r.sha256 for r in cut(volume_of(array.astype(np.float32))).records] == [
        r.sha256 for r in cut(volume_of(array)).records
    ]


def test_fractions_of_hu_are_rounded_and_noted():
    array = body().astype(np.float32) + np.float32(0.4)
    stack = stack_slices(volume_of(array))
    np.testing.assert_array_equal(stack.array, body())
    assert stack.notes == ("values rounded to whole numbers",)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (np.nan, "NaN or infinity (1 pixel)"),
        (np.inf, "NaN or infinity (1 pixel)"),
        (40000, "outside int16 (values from -999 to 40000)"),
        (-40000, "outside int16 (values from -40000 to 51)"),
    ],
)
def test_a_slice_that_int16_cannot_hold_is_left_out_and_its_neighbours_enter(value, reason):
    array = body().astype(np.float32)
    array[1, 15, 15] = value
    result = cut(volume_of(array), keep_flagged=True)
    assert result.left_out == [(1, reason)]
    assert [record.z for record in result.records] == [0, 2]
    np.testing.assert_array_equal(result.array, body()[[0, 2]])


def test_the_ends_of_int16_still_enter():
    array = body().astype(np.int32)
    array[0, 0, :2] = (-32768, 32767)
    result = cut(volume_of(array))
    assert result.left_out == []
    assert (result.records[0].hu_min, result.records[0].hu_max) == (-32768, 32767)


def test_constant_and_air_only_slices_are_left_out_by_default_and_flagged_on_request():
    array = body((4, 20, 20))
    array[1] = -1024
    array[2] = np.where(np.arange(400).reshape(20, 20) == 7, 0, -1000)  # 1 of 400 is 0.25 %
    assert cut(volume_of(array)).left_out == [
        (1, "constant (every pixel is -1024)"),
        (2, "air only (0.25% of the pixels above -500 HU)"),
    ]
    kept = cut(volume_of(array), keep_flagged=True)
    assert [record.flags for record in kept.records] == [[], ["constant"], ["air_only"], []]
    assert kept.left_out == []


def test_half_a_percent_of_body_is_no_longer_air_only():
    array = body()
    array[1] = -1000
    array[1, 0, :2] = 0  # 2 of 400
    assert cut(volume_of(array)).left_out == []


def test_saturation_and_padding_are_flags_and_padding_is_not_rewritten():
    array = body((2, 20, 20))
    array[0, 19, :] = -2000  # 20 of 400
    array[1, 0, :4] = 3071
    result = cut(volume_of(array))
    np.testing.assert_array_equal(result.array, array)
    padded, saturated = result.records
    assert (padded.padding_fraction, padded.flags) == (0.05, ["padded"])
    assert (saturated.saturated_fraction, saturated.flags) == (0.01, ["saturated"])


def test_a_lone_dark_pixel_is_not_padding():
    array = body((1, 20, 20))
    array[0, 19, :3] = -1050  # 3 of 400 are less than 1 %
    assert cut(volume_of(array)).records[0].padding_fraction == 0.0


@pytest.mark.parametrize("shape", [(64, 1, 64), (64, 64, 1), (30, 15, 200), (30, 200, 15)])
def test_stripes_are_refused(shape):
    array = np.random.default_rng(0).integers(-1000, 1000, shape).astype(np.int16)
    with pytest.raises(Unreadable, match=f"{shape[2]}x{shape[1]} pixels, narrower than 16"):
        cut(volume_of(array))
    assert len(cut(volume_of(np.pad(array, ((0, 0), (0, 15), (0, 15))))).array) == len(array)


def test_thinning_goes_from_the_lowest_slice_up():
    volume = volume_of(body((7, 20, 20)), spacing=(0.7, 0.9, 0.9))
    result = cut(volume, min_gap_mm=2.0)  # at 0, 0.7, 1.4, 2.1, 2.8, 3.5, 4.2 mm
    assert [record.z for record in result.records] == [0, 3, 6]
    assert dict(result.left_out)[2] == "nearer than 2 mm to a slice kept (1.40 mm)"


def test_thinning_counts_from_slices_that_enter_and_allows_rounding():
    array = body((5, 20, 20))
    array[0] = -1000
    result = cut(volume_of(array, spacing=(1.9999, 0.9, 0.9)), min_gap_mm=2.0)
    assert [record.z for record in result.records] == [1, 2, 3, 4]


def test_whole_and_fractional_mr_are_mapped_alike_and_can_be_mapped_back():
    array = np.tile(np.arange(400).reshape(20, 20), (2, 1, 1)).astype(np.float32)
    for factor in (1, 0.37, 900):
        values = (array * factor).astype(np.float32)
        stack = stack_slices(volume_of(values, {"low": 0.0, "high": 256.0 * factor}, "MR"))
        np.testing.assert_array_equal(stack.array, array * 64)
        facts = stack.intensity
        assert (facts["stored_low"], facts["stored_high"]) == (0.0, 16384.0)
        back = stack.array * facts["slope"] + facts["intercept"]
        np.testing.assert_allclose(back, values, rtol=0, atol=facts["slope"] / 2 + 1e-3 * factor)


def test_fractional_mr_is_mapped_by_its_contract_and_clipped_far_above():
    array = np.zeros((1, 20, 20), np.float32)
    array[0, 0, :5] = (0.25, 0.5, 0.75, 1.25, 9.0)
    stack = stack_slices(volume_of(array, {"low": 0.25, "high": 1.25}, "MR"))
    np.testing.assert_array_equal(stack.array[0, 0, :6], [0, 4096, 8192, 16384, 32767, -4096])
    assert stack.intensity["stored_low"] == 0
    assert stack.intensity["stored_high"] == 16384
    assert stack.notes == (
        "values from 0.25 to 1.25 mapped to 0 to 16384",
        "values far beyond them clipped (0.25% of the voxels)",
    )


def test_fractional_mr_without_contrast_cannot_enter():
    array = np.full((1, 20, 20), 0.5, np.float32)
    with pytest.raises(Unreadable, match=r"no contrast: .* 0.5 and 0.5"):
        stack_slices(volume_of(array, {"low": 0.5, "high": 0.5}, "MR"))


def test_windowed_pictures_are_judged_on_their_own_scale():
    array = np.zeros((1, 20, 20), np.int16)
    array[0, :10] = 255
    record = cut(volume_of(array, {"low": 0.0, "high": 255.0}, "unknown", True, None)).records[0]
    assert (record.body_fraction, record.saturated_fraction, record.flags) == (0.5, 0.0, [])
    assert record.position_mm is None


def test_slices_that_look_like_excluded_ones_are_flagged():
    result = cut(volume_of(body()), near_excluded={1})
    assert [record.flags for record in result.records] == [[], ["near_excluded"], []]


def test_the_paper_geometry_has_its_size_and_keeps_the_field_of_view():
    result = cut(volume_of(body((1, 20, 30))), pixel_spacing_mm=0.45, size=16)
    assert result.array.shape == (1, 16, 16)
    assert result.spacing == pytest.approx((2.0, 20 * 0.9 / 16, 30 * 0.9 / 16))
    assert result.records[0].sha256 == slice_sha256(result.array[0])


def test_the_paper_geometry_needs_a_known_spacing():
    with pytest.raises(Unreadable, match="no known pixel spacing"):
        cut(volume_of(body(), spacing=None), pixel_spacing_mm=0.45)


def test_halving_the_spacing_interpolates_linearly_between_pixel_centres():
    array = np.array([[[0, 100]]], np.int16)
    finer, spacing = resample_slices(array, (1.0, 1.0, 1.0), 0.5, None)
    np.testing.assert_array_equal(finer, [[[0, 25, 75, 100]] * 2])
    assert spacing == (1.0, 0.5, 0.5)


def test_shrinking_widens_the_kernel_so_that_no_pixel_is_passed_over():
    array = np.zeros((1, 16, 16), np.int16)
    array[0, 5, 5] = 6400
    smaller, _ = resample_slices(array, None, None, 4)
    # kernels reach 4 pixels from centres at 1.5, 5.5, 9.5, ...: pixel 5 is 3.5 from the first,
    # whose weights within the image sum to 3.5, and 0.5 from the second, whose sum to 4
    weights = [(1 - 3.5 / 4) / 3.5, (1 - 0.5 / 4) / 4, 0, 0]
    expected = np.rint(6400 * np.outer(weights, weights))
    np.testing.assert_array_equal(smaller[0], expected)


def test_resampling_keeps_a_constant_at_the_end_of_int16():
    array = np.full((1, 7, 9), 32767, np.int16)
    result, _ = resample_slices(array, (1.0, 0.7, 0.7), 0.45, 16)
    assert result.min() == result.max() == 32767


@pytest.mark.parametrize(
    ("rules", "sentence"),
    [
        ({"pixel_spacing_mm": 0.0}, "pixel spacing must be from 0.05 to 20 mm, but is 0.0"),
        ({"pixel_spacing_mm": float("nan")}, "pixel spacing must be"),
        ({"size": 4}, "size must be from 16 to 4096 pixels, but is 4"),
        ({"min_gap_mm": -1.0}, "smallest gap must be at least 0 mm, but is -1.0"),
    ],
)
def test_rules_refuse_impossible_numbers(rules, sentence):
    with pytest.raises(UserError, match=sentence):
        SliceRules(**rules)


def test_the_perceptual_hash_of_a_cosine_has_the_bit_of_its_frequency():
    columns = (np.arange(64) + 0.5) / 64
    image = np.tile(np.cos(3 * np.pi * columns), (64, 1))
    spectrum = int(perceptual_hash(image, -1, 1), 16)
    assert spectrum == 1 << (63 - 3)  # row 0, column 3, from the most significant bit


def test_the_perceptual_hash_survives_resampling_and_noise_and_tells_volumes_apart(make_ct):
    image, other = make_ct(1, 64, seed=1)[0], make_ct(1, 64, seed=2)[0]
    larger, _ = resample_slices(image[None], None, None, 100)
    noisy = image + np.random.default_rng(0).integers(-10, 11, image.shape)
    hashes = as_numbers(perceptual_hash(each, -500, 500) for each in (larger[0], noisy, other))
    original = as_numbers([perceptual_hash(image, -500, 500)])[0]
    resampled, with_noise, different = bit_distances(original, hashes)
    assert max(resampled, with_noise) <= 4
    assert different >= 12


def test_bit_distances_count_bits():
    others = as_numbers(["0000000000000000", "ffffffffffffffff", "8000000000000001"])
    assert bit_distances(np.uint64(0), others).tolist() == [0, 64, 2]


def test_source_hashes_do_not_depend_on_names_or_order(tmp_path):
    for name, text in {"a": "one", "b": "two", "c": "two", "d": "one"}.items():
        (tmp_path / name).write_text(text)
    a, b, c, d = (str(tmp_path / name) for name in "abcd")
    assert source_sha256([a]) == hashlib.sha256(b"one").hexdigest()
    assert source_sha256([a, b]) == source_sha256([c, d]) != source_sha256([a, d])
