"""What the returns of several seeds can tell: differences and their intervals.

A sample is one number per seed. Two samples of one task are a cell: returns, and those of a
reference. What several cells say together follows Agarwal et al., "Deep Reinforcement Learning at
the Edge of the Statistical Precipice" (2021): interquartile mean, probability of improvement, and
a bootstrap that draws seeds anew in each sample by itself.
"""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

LEAST_SEEDS = 5  # for a bootstrap: with fewer its interval is far too narrow
Sample = Sequence[float] | np.ndarray
Interval = tuple[float, float]


def iqm(x: Sample, axis: int = -1) -> np.ndarray:
    """Interquartile mean: without the int(n / 4) lowest and as many of the highest of n."""
    return stats.trim_mean(x, 0.25, axis=axis)


def bootstrap(statistic: Callable, *samples: Sample) -> Interval | None:
    """95% interval by percentiles; None if a sample has fewer than LEAST_SEEDS numbers.

    Args:
        statistic: (samples..., axis) -> its value along that axis.
    """
    if min(map(len, samples)) < LEAST_SEEDS:
        return None
    options = {"n_resamples": 10_000, "method": "percentile", "rng": 1, "vectorized": True}
    return tuple(stats.bootstrap(samples, statistic, **options).confidence_interval)


def welch(a: Sample, b: Sample) -> Interval | None:
    """95% interval of mean(a) - mean(b), by Welch's t; None if their spread is not known.

    Nor is it from two numbers beside many: the interval would hold the truth in 88% of cases.
    """
    fewer, more = sorted((len(a), len(b)))
    if fewer < 2 or (fewer == 2 and more > 3) or np.ptp(a) + np.ptp(b) == 0:
        return None
    with warnings.catch_warnings(action="ignore"):  # of a sample whose numbers are all equal
        return tuple(stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95))


def probability_higher(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
    """How often a number of a is above one of b, over all pairs; equal ones count half.

    The statistic of Mann and Whitney's U test, divided by the number of pairs.
    """
    a, b = np.moveaxis(a, axis, -1)[..., :, None], np.moveaxis(b, axis, -1)[..., None, :]
    return (0.5 + 0.5 * np.sign(a - b)).mean((-2, -1))


def mean_difference(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
    return a.mean(axis) - b.mean(axis)


def iqm_difference(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
    return iqm(a, axis) - iqm(b, axis)


def difference(returns: Sample, reference: Sample, robust: bool = False) -> tuple[str, str]:
    """How much higher returns are than those of a reference, and the 95% interval, as text.

    Of means, with Welch's interval, or if robust of interquartile means, with a bootstrap. "-"
    where there are too few numbers.
    """
    if not len(returns) or not len(reference):
        return "-", "-"
    a, b = np.array(returns, np.float64), np.array(reference, np.float64)
    if robust:
        return signed(iqm_difference(a, b)), as_text(bootstrap(iqm_difference, a, b))
    return signed(mean_difference(a, b)), as_text(welch(a, b))


def signed(x: float) -> str:
    return f"{round(x):+d}"  # never "-0"


def deviations(returns: Sample, reference: Sample) -> float | None:
    """Distance of the means in standard deviations of the reference; None where there is none.

    The paper finds all returns "within a standard deviation of each other" (Sec. V-C): up to 1.
    """
    if len(reference) < 2 or not (deviation := np.std(reference, ddof=1)):
        return None
    return abs(np.mean(returns) - np.mean(reference)) / deviation


def over_cells(
    cells: Sequence[tuple[Sample, Sample]],
) -> list[tuple[float, Interval | None]] | None:
    """What several cells say together, and the 95% interval of each.

    Args:
        cells: (returns, reference) of each task. Both are taken relative to the size of the
            reference's mean; of each as many seeds, the first ones, as the task with the fewest
            has, so that the tasks weigh the same.

    Returns:
        Difference of the interquartile means over all seeds of all cells, 0.05 for five per cent
        higher; mean over the cells of the probability that a seed is above one of the reference.
        None where a reference's mean is no measure: it lies within a deviation of 0.
    """
    samples, least = [], min(len(each) for cell in cells for each in cell)
    for cell in cells:
        returns, reference = (np.array(each[:least], np.float64) for each in cell)
        size = abs(reference.mean())
        if size <= reference.std(ddof=1):
            return None
        samples += [returns / size, reference / size]

    def together(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
        ours, reference = (np.concatenate(samples[i::2], axis) for i in (0, 1))
        return iqm_difference(ours, reference, axis)

    def higher(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
        pairs = zip(samples[::2], samples[1::2], strict=True)
        return np.mean([probability_higher(*pair, axis) for pair in pairs], 0)

    return [(float(f(*samples)), bootstrap(f, *samples)) for f in (together, higher)]


def as_text(interval: Interval | None, form: str = "+.0f") -> str:
    return "-" if interval is None else f"{interval[0]:{form}} to {interval[1]:{form}}"


def spread(returns: Sample) -> str:
    """Mean ± sample standard deviation over seeds, or what there is of it."""
    if len(returns) < 2:
        return f"{returns[0]:.0f}" if len(returns) else "-"
    return f"{np.mean(returns):.0f} ± {np.std(returns, ddof=1):.0f}"
