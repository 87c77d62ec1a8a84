import numpy as np
import pytest

from nnunetv2_meddinov3.store.mapping import STORED_HIGH, Mapping, mapping_of


def image(seed=0):
    """Tissue in a zero background that fills three quarters of the volume."""
    generator = np.random.default_rng(seed)
    array = np.zeros((4, 40, 40))
    array[:, :20, :20] = generator.gamma(4, 100, (4, 20, 20))
    return array


def test_the_foregrounds_percentiles_become_the_ends():
    array = image()
    mapping = mapping_of(array)
    low, high = np.percentile(array[array > 0], [0.5, 99.5])
    assert (mapping.low, mapping.high, mapping.percentiles) == (low, high, (0.5, 99.5))
    assert mapping.stored(np.array([low, high])).tolist() == [0, STORED_HIGH]


def test_background_does_not_change_what_is_foreground():
    array = image()
    wider = np.pad(array, ((0, 0), (0, 200), (0, 200)))
    assert mapping_of(wider) == mapping_of(array)


@pytest.mark.parametrize("factor", [1e-6, 0.5, 1.0, 1e6])
@pytest.mark.parametrize("offset", [0.0, -3.0, 1e4])
def test_the_scale_of_a_volume_does_not_matter(factor, offset):
    array = image()
    other = array * factor + offset
    mapped = mapping_of(other).stored(other)
    difference = mapped.astype(int) - mapping_of(array).stored(array)
    assert np.abs(difference).max() <= 1  # rounding


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32])
def test_values_come_back_to_rounding(dtype):
    array = (image() / 8).astype(dtype)
    mapping = mapping_of(array)
    facts = mapping.facts()
    back = mapping.stored(array) * facts["slope"] + facts["intercept"]
    np.testing.assert_allclose(back, array, rtol=0, atol=facts["slope"] / 2 + 1e-6)


def test_a_few_bright_spots_take_no_range_and_are_clipped_at_the_end_of_int16():
    array = image()
    usual = mapping_of(array)
    array[0, 0, :2] = 1e7
    mapping = mapping_of(array)
    assert mapping.high < 1.1 * usual.high
    assert mapping.stored(array).max() == 32767
    assert mapping.stored(np.array([2 * mapping.high - mapping.low - 1])) < 32767  # room above


def test_values_that_are_not_finite_are_not_counted():
    array = image()
    array[1, :20, :20] = np.nan
    array[2, 3, 3] = np.inf
    good = array[np.isfinite(array)]
    assert mapping_of(array) == mapping_of(good)


def test_where_percentiles_coincide_the_ends_of_the_range_are_taken():
    array = np.full((4, 40, 40), 0.0)
    array[0, 0, 0] = -3  # ringing below a background that is nearly everything
    array[1, 5:7, 5:7] = np.arange(4).reshape(2, 2) + 90
    mapping = mapping_of(array)
    assert (mapping.low, mapping.high, mapping.percentiles) == (-3, 93, (0.0, 100.0))


@pytest.mark.parametrize("value", [0.0, 7.0, np.nan])
def test_a_constant_volume_has_no_contrast(value):
    mapping = mapping_of(np.full((2, 20, 20), value))
    assert not mapping.has_contrast
    assert Mapping(1, 2).has_contrast
