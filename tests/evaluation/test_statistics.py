"""Intervals, tests and ranks, by hand and against scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from nnunetv2_meddinov3.evaluation.statistics import (
    compare,
    holm,
    interval,
    mean_over_labels,
    rank_stability,
)


def scores(seed, patients=20, labels=3, level=0.8):
    return np.random.default_rng(seed).normal(level, 0.1, (patients, labels))


def test_the_mean_is_over_labels_of_means_over_patients():
    table = np.array([[1.0, np.nan], [0.0, 0.5], [0.5, np.nan]])
    assert mean_over_labels(table) == pytest.approx((0.5 + 0.5) / 2)
    assert math.isnan(mean_over_labels(np.full((2, 2), np.nan)))


def test_an_interval_is_that_of_scipys_bootstrap():
    table = scores(0, labels=1)
    found = interval(table)
    theirs = stats.bootstrap(
        (table[:, 0],), np.mean, n_resamples=10_000, method="percentile", rng=1
    ).confidence_interval
    assert found.mean == pytest.approx(table.mean())
    assert (found.low, found.high) == pytest.approx(tuple(theirs), abs=2e-3)
    assert found.patients == 20


def test_an_interval_covers_the_truth_as_often_as_it_says():
    hits = 0
    for seed in range(300):
        found = interval(scores(seed, patients=40, labels=1), resamples=500)
        hits += found.low <= 0.8 <= found.high
    assert 0.89 <= hits / 300 <= 0.98


def test_patients_without_a_score_are_none_and_one_alone_has_no_interval():
    table = np.array([[0.5, 0.7], [np.nan, np.nan]])
    found = interval(table)
    assert (found.mean, found.patients) == (pytest.approx(0.6), 1)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    nothing = interval(np.full((3, 2), np.nan))
    assert (nothing.patients, math.isnan(nothing.mean)) == (0, True)


def test_equal_scores_have_an_interval_of_no_width():
    found = interval(np.full((5, 2), 0.75))
    assert (found.mean, found.low, found.high) == (0.75, 0.75, 0.75)


def test_an_interval_does_not_change_from_call_to_call():
    assert interval(scores(1)) == interval(scores(1))


def test_a_comparison_is_paired_by_patient():
    first = scores(2)
    second = first - 0.02  # far below what patients differ by
    (found,) = compare({"a": first, "b": second})
    assert found.difference.mean == pytest.approx(0.02)
    assert found.difference.high - found.difference.low < 1e-9
    assert found.p == pytest.approx(stats.wilcoxon(np.full(20, 0.02)).pvalue)
    assert found.p < 1e-4


def test_tests_are_wilcoxons_on_the_patients_that_both_have():
    first, second = scores(3), scores(4)
    first[3] = second[5] = np.nan
    both = [at for at in range(20) if at not in (3, 5)]
    (found,) = compare({"a": first, "b": second})
    differences = first[both].mean(axis=1) - second[both].mean(axis=1)
    assert found.p == pytest.approx(stats.wilcoxon(differences).pvalue)
    assert found.difference.patients == 18


def test_no_difference_and_too_few_patients_are_no_finding():
    (same,) = compare({"a": scores(5), "b": scores(5)})
    assert same.p == 1.0
    (few,) = compare({"a": scores(6, patients=5), "b": scores(7, patients=5)})
    assert math.isnan(few.p)
    assert math.isnan(few.p_holm)
    assert math.isfinite(few.difference.low)


def test_holm_by_hand():
    # 0.01 * 4, 0.02 * 3, 0.03 * 2 (not below the one before), 0.5
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.9, math.nan, 0.6]) == pytest.approx([1.0, math.nan, 1.0], nan_ok=True)
    assert holm([]) == []


def test_all_comparisons_are_corrected_together():
    tables = {
        name: scores(seed, level=level)
        for name, seed, level in (("a", 8, 0.8), ("b", 9, 0.7), ("c", 10, 0.79))
    }
    found = compare(tables)
    assert [(c.first, c.second) for c in found] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [c.p_holm for c in found] == pytest.approx(holm([c.p for c in found]))
    against_one = compare(tables, [("b", "a"), ("c", "a")])
    assert [c.difference.mean > 0 for c in against_one] == [False, False]


def test_tables_of_other_patients_are_refused():
    with pytest.raises(ValueError, match="same patients and labels"):
        compare({"a": scores(1, patients=20), "b": scores(1, patients=19)})


def test_ranks_are_sure_where_methods_differ_and_unsure_where_they_do_not():
    best, worst = scores(11, level=0.9), scores(12, level=0.5)
    near = best[::-1]  # as good, on other patients
    ranks = rank_stability({"worst": worst, "best": best, "near": near}, resamples=2000)
    assert ranks.methods[2] == "worst"
    assert set(ranks.methods[:2]) == {"best", "near"}
    np.testing.assert_allclose(ranks.shares.sum(axis=1), 1.0)
    assert ranks.shares[2, 2] == 1.0
    assert 0.4 < ranks.shares[1, 0] < 0.6


def test_equal_methods_share_the_better_rank_and_distances_are_ranked_from_below():
    table = scores(14)
    tied = rank_stability({"a": table, "b": table.copy()}, resamples=500)
    np.testing.assert_array_equal(tied.shares, [[1, 0], [1, 0]])
    ranks = rank_stability({"far": table + 1, "near": table}, lower_is_better=True, resamples=500)
    assert ranks.methods == ["near", "far"]
    assert ranks.shares[0, 0] == 1.0
