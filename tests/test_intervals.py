"""experiments/intervals.py against loops over all pairs and all resamples."""

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import intervals

samples = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30)


def mean(x: np.ndarray, axis: int = -1) -> np.ndarray:
    return x.mean(axis)


@given(samples)
def test_the_interquartile_mean_leaves_a_quarter_out_at_either_end(values):
    cut = len(values) // 4
    kept = sorted(values)[cut : len(values) - cut]
    assert intervals.iqm(values) == pytest.approx(math.fsum(kept) / len(kept), abs=1e-6)


def test_the_bootstrap_is_that_of_all_resamples():
    """Of five numbers there are 3,125 resamples: their percentiles are exact."""
    sample = [1.0, 2.0, 6.0, 6.5, 20.0]
    means = [statistics.mean(draw) for draw in itertools.product(sample, repeat=5)]
    low, high = np.percentile(means, [2.5, 97.5], method="inverted_cdf")
    assert intervals.bootstrap(mean, sample) == pytest.approx((low, high), abs=0.3)
    assert intervals.bootstrap(mean, sample[1:]) is None  # too few


def test_the_bootstrap_draws_from_each_sample_by_itself():
    """A difference of paired draws would have no spread here."""
    sample = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    low, high = intervals.bootstrap(intervals.mean_difference, sample, sample)
    half = 1.96 * (2 * np.var(sample) / 6) ** 0.5
    assert (low, high) == pytest.approx((-half, half), rel=0.05)


@pytest.mark.parametrize("counts", [(2, 2), (2, 3), (3, 3), (3, 10), (10, 3), (10, 10)])
def test_the_interval_of_a_difference_covers_the_truth_as_often_as_it_says(counts):
    rng, covered = np.random.default_rng(0), 0
    for _ in range(1000):
        a, b = rng.normal(300, 100, counts[0]), rng.normal(100, 200, counts[1])
        low, high = intervals.welch(a, b)
        covered += low <= 200 <= high
    assert 0.91 < covered / 1000 < 0.99


def test_two_numbers_beside_many_have_no_interval():
    assert intervals.welch([1.0, 2.0], [3.0, 5.0, 4.0]) is not None
    assert intervals.welch([1.0, 2.0], [3.0, 5.0, 4.0, 2.0]) is None
    assert intervals.difference([1.0, 2.0, 0.0, 0.0], [30.0, 50.0]) == ("-39", "-")


@pytest.mark.parametrize("count", [5, 10])
def test_the_bootstrap_covers_the_truth_less_often(count):
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        a, b = rng.normal(300, 100, count), rng.normal(100, 200, count)
        low, high = intervals.bootstrap(intervals.mean_difference, a, b)
        covered += low <= 200 <= high
    assert 0.8 < covered / 400 < 0.94


def test_an_interval_with_a_constant_sample_says_nothing_on_stderr(recwarn):
    low, high = intervals.welch([1000.0] * 3, [900.0, 950.0, 1000.0])
    assert low < 50 < high and not recwarn
    assert intervals.welch([0.1] * 3, [0.1] * 3) is None


def test_the_interval_of_a_difference_is_that_of_welchs_t():
    a, b = [1.0, 5.0, 9.0], [100.0, 103.0, 120.0, 90.0]
    errors = [statistics.variance(x) / len(x) for x in (a, b)]  # squared, of the means
    freedom = sum(errors) ** 2 / sum(e**2 / (len(x) - 1) for e, x in zip(errors, (a, b)))  # noqa: B905
    half = stats.t.ppf(0.975, freedom) * sum(errors) ** 0.5
    apart = statistics.mean(a) - statistics.mean(b)
    assert intervals.welch(a, b) == pytest.approx((apart - half, apart + half))


def test_differences_as_text():
    assert intervals.difference([10.0, 14.0], [0.0, 2.0]) == ("+11", "-3 to +25")
    assert intervals.difference([10.0], [1.0, 2.0]) == ("+8", "-")  # 8.5, to even
    assert intervals.difference([], [1.0]) == ("-", "-")
    assert intervals.difference([1.0], [1.3]) == ("+0", "-")  # not "-0"
    assert intervals.difference([3.0, 3.0], [1.0, 1.0]) == ("+2", "-")  # no spread, no interval


def test_robust_differences_are_those_of_interquartile_means():
    few = intervals.difference([0.0, 1.0, 1.0, 900.0], [0.0, 0.0], robust=True)
    assert few == ("+1", "-")
    shown, found = intervals.difference([5.0, 5, 5, 5, 5, 5, 5, 900], [1.0] * 8, robust=True)
    assert shown == "+4" and found.startswith("+4 to ")
    assert int(found.split("+")[2]) < 400  # a mean's would reach 350 and more


@given(samples, samples)
def test_the_probability_to_be_higher_counts_pairs(a, b):
    pairs = [1.0 if x > y else 0.5 if x == y else 0.0 for x in a for y in b]
    found = intervals.probability_higher(np.array(a), np.array(b))
    assert found == pytest.approx(statistics.mean(pairs))
    assert found == pytest.approx(stats.mannwhitneyu(a, b).statistic / len(pairs))


def test_distance_in_deviations_of_the_reference():
    a, b = [0.0, 10.0, 20.0], [11.0, 12.0, 13.0]  # standard deviations 10 and 1
    assert intervals.deviations(a, b) == pytest.approx(2)
    assert intervals.deviations(b, a) == pytest.approx(0.2)
    assert intervals.deviations([5.0, 5.0], a) == pytest.approx(0.5)
    assert intervals.deviations(a, [5.0]) is intervals.deviations(a, [5.0, 5.0]) is None


def cell(rng: np.random.Generator, shift: float, scale: float, count: int = 10) -> tuple:
    """Returns of both around 1, times scale; the first are higher by shift."""
    a, b = 1 + 0.05 * rng.normal(size=(2, count))
    return scale * (a + shift), scale * b


def test_over_cells_a_difference_is_relative_and_its_interval_holds_the_truth():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(100):
        (found, (low, high)), _ = intervals.over_cells(
            [cell(rng, 0.1, scale) for scale in (1, 30, 5000)]
        )
        assert low < found < high
        covered += low <= 0.1 <= high
    assert covered >= 88


def test_over_cells_a_negative_task_has_no_other_sign():
    """As on Pendulum-v1: -150 is higher than -200."""
    high, low = np.linspace(-155, -145, 5), np.linspace(-205, -195, 5)
    (apart, _), (higher, _) = intervals.over_cells([(high, low), (high, low)])
    assert apart == pytest.approx(0.25) and higher == 1
    (apart, _), (higher, _) = intervals.over_cells([(low, high)])
    assert apart == pytest.approx(-1 / 3) and higher == 0


def test_over_cells_a_reference_around_0_is_no_measure():
    around, beyond = np.linspace(-10, 12, 5), np.linspace(90, 112, 5)
    assert intervals.over_cells([(beyond, beyond), (beyond, around)]) is None


def test_over_cells_one_task_of_four_may_collapse_unseen():
    """The interquartile mean leaves out a quarter: the docs tell the reader to look at each."""
    fine = np.linspace(95, 105, 10)
    (apart, _), _ = intervals.over_cells([(fine, fine)] * 3 + [(fine / 1000, fine)])
    assert -0.1 < apart < 0


def test_over_cells_probabilities_are_means_over_the_tasks():
    few, many = np.arange(5.0), np.arange(100.0, 120.0)
    cells = [(few + 100, few + 1), (many, many)]  # always higher; as often as not
    _, (higher, (low, high)) = intervals.over_cells(cells)
    assert higher == pytest.approx(0.75)
    assert 0.5 < low < 0.75 < high < 0.95
    first = intervals.over_cells([cells[0], (many[:5], many[:5])])
    assert intervals.over_cells(cells) == first  # as many seeds of each task
    assert intervals.over_cells([(few[1:] + 9, few + 9)])[1][1] is None  # too few


def test_a_mean_with_its_spread():
    assert intervals.spread([1.0, 3.0]) == "2 ± 1"
    assert intervals.spread([1.0]) == "1" and intervals.spread([]) == "-"
