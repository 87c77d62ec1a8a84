import pytest

from nnunetv2_meddinov3.store.records import kind_of


@pytest.mark.parametrize(
    ("remark", "kind"),
    [
        ("3 duplicate slices left out", "N duplicate slices left out"),
        ("1 duplicate slice left out", "N duplicate slices left out"),
        ("1 localizer left out", "N localizers left out"),
        ("slice thickness 2.5 mm", "slice thickness N mm"),
        ("values from -3.5 to 1e+06 mapped to 0 to 16384", "values from N to N mapped to N to N"),
        ("8-bit values, taken as windowed", "8-bit values, taken as windowed"),
        ("outside int16", "outside int16"),
        ("its 0.5th percentile", "its 0.5th percentile"),
        (
            "leakage guard 0123456789abcdef: compared with 12 excluded slices",
            "leakage guard: compared with N excluded slices",
        ),
        (
            "2 images left out, it has colour (3 samples per pixel): a 1.dcm, I0002 and 3 more",
            "N images left out, it has colour (N samples per pixel)",
        ),
        (
            "1 image left out, its pixels cannot be decoded: scan:2.dcm",
            "N images left out, its pixels cannot be decoded",
        ),
        (
            "it is named as the labels of ct_7.nii.gz beside it",
            "it is named as the labels of ... beside it",
        ),
        ("it is 4D (2x3x4x5 voxels), not one volume", "it is 4D (N voxels), not one volume"),
        ("slices 3, 7, 9 are missing", "slices N are missing"),
        ("the header says 'MR head' and \"x\"", "the header says ... and ..."),
        ("another patient's series and another's", "another patient's series and another's"),
    ],
)
def test_a_kind_is_a_remark_without_what_differs(remark, kind):
    assert kind_of(remark) == kind
