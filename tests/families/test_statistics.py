"""Intervals cover, families err no more often than promised, and claims are judged by their interval."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from hone.evidence import statistics
from hone.evidence.statistics import Difference, Interval, bounds, holm, interval, judge, paired, verdict

SEED = 20260101
EIGHTHS = st.integers(-800, 800).map(lambda k: k / 8)  # sums and shifts of these are exact


def samples(n: int, count: int, kind: str = "normal") -> np.ndarray:
    """Return (count, n) values of mean 0.7."""
    generator = np.random.default_rng([SEED, n, count])
    noise = {
        "normal": generator.normal,
        "laplace": generator.laplace,
        "exponential": lambda size: generator.exponential(size=size) - 1,
        "lognormal": lambda size: generator.lognormal(size=size) - math.exp(0.5),
    }[kind]
    return 0.7 + noise(size=(count, n))


def coverage(rows: np.ndarray, mean: float = 0.7) -> float:
    found = bounds(rows, draws=2_000)
    return float(((found.low <= mean) & (mean <= found.high)).mean())


# --- coverage, errors and power, by simulation


@pytest.mark.parametrize("n", [2, 3, 5, 10, 30])
def test_intervals_cover_a_known_difference_of_normal_values(n: int) -> None:
    share = coverage(samples(n, 2_000))
    assert 0.935 <= share <= 0.98  # three standard errors of 0.0049 below 0.95; not so wide that they say nothing


@pytest.mark.parametrize(
    ("kind", "n", "least"),
    [  # what 10,000 or more simulations found, less 3 standard errors of 2,000 or a little more
        ("laplace", 3, 0.957), ("laplace", 5, 0.957), ("laplace", 10, 0.943),
        ("exponential", 3, 0.857), ("exponential", 5, 0.896), ("exponential", 10, 0.923),
        ("lognormal", 5, 0.834), ("lognormal", 10, 0.868),
    ],
)  # fmt: skip
def test_intervals_of_skewed_and_heavy_tailed_values_are_not_far_off(kind: str, n: int, least: float) -> None:
    assert coverage(samples(n, 2_000, kind)) >= least


@pytest.mark.parametrize(("n", "gain"), [(5, 0.02), (10, 0.02)])
def test_the_bootstrap_mends_what_students_t_misses_of_skewed_values(n: int, gain: float) -> None:
    rows = samples(n, 2_000, "exponential")
    students = (stats.ttest_1samp(rows, 0.7, axis=1).pvalue >= 0.05).mean()
    assert coverage(rows) >= students + gain


@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize("comparisons", [1, 3, 8])
def test_families_of_identical_variants_are_wrong_at_most_one_time_in_twenty(comparisons: int, n: int) -> None:
    families = 3_000
    scores = np.random.default_rng([SEED, comparisons, n]).normal(size=(families, comparisons + 1, n))
    differences = scores[:, 1:] - scores[:, :1]  # one baseline for all, so that they are not independent
    ps = bounds(differences.reshape(-1, n), draws=2_000).p.reshape(families, comparisons)
    wrong = np.mean([any(p is not None and p < 0.05 for p in holm(list(family))) for family in ps])
    assert wrong <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / families)
    if comparisons == 8:
        assert (ps.min(axis=1) < 0.05).mean() > 0.1  # without the correction


def test_identical_variants_with_outliers_are_not_called_different() -> None:
    scores = np.random.default_rng(SEED).standard_t(2, size=(3_000, 2, 10))
    assert (bounds(scores[:, 1] - scores[:, 0], draws=2_000).p < 0.05).mean() <= 0.05


@pytest.mark.parametrize(("n", "deviations", "found"), [(3, 5, 0.95), (5, 3, 0.95), (10, 1.5, 0.95)])
def test_a_clear_difference_is_found(n: int, deviations: float, found: float) -> None:
    rows = np.random.default_rng(SEED).normal(deviations, 1, size=(1_000, n))
    assert (bounds(rows).p < 0.05).mean() >= found


@pytest.mark.parametrize("sides", [2, 3, 5, 10])
def test_rounded_identical_variants_are_called_different_no_more_often(sides: int) -> None:
    generator = np.random.default_rng([SEED, sides])
    rounded = np.round(0.705 + 0.0015 * generator.normal(size=(4_000, 2, sides)), 2)  # between 0.70 and 0.71, at random
    differences = np.round(rounded[:, 0] - rounded[:, 1], 2)
    floored = bounds(differences, floor=0.01 / math.sqrt(6), draws=2_000).p
    assert (floored < 0.05).mean() <= 0.06
    if sides == 2:
        assert (bounds(differences).p < 0.05).mean() > 0.1  # two equal differences would pass for certainty


# --- the interval and its p-value


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_few_values_have_students_interval(n: int, level: float) -> None:
    values = samples(n, 1)[0]
    expected = stats.ttest_1samp(values, 0)
    low, high = expected.confidence_interval(level)
    found = paired(values.tolist(), [0.0] * n, level)
    assert (found.mean, found.low, found.high) == pytest.approx((values.mean(), low, high))
    assert found.p == pytest.approx(expected.pvalue)
    assert interval(values.tolist(), level) == Interval(found.mean, found.low, found.high)


@pytest.mark.parametrize("kind", ["normal", "exponential"])
def test_more_values_have_the_wider_of_students_and_the_bootstraps_interval(kind: str) -> None:
    values = samples(7, 1, kind)[0]
    n, error = len(values), stats.sem(values)
    generator = np.random.default_rng(SEED)
    weights = generator.beta(0.5, 1.5, size=(200_000, n))
    weights /= weights.sum(axis=1, keepdims=True)
    means = weights @ values
    spreads = np.sqrt((weights * (values - means[:, None]) ** 2).sum(axis=1) * n / (n - 1))
    ts = (means - values.mean()) / (spreads / math.sqrt(n))
    students = stats.t.ppf(0.975, n - 1)
    low = values.mean() - error * max(students, np.quantile(ts, 0.975))
    high = values.mean() - error * min(-students, np.quantile(ts, 0.025))
    found = interval(values.tolist())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.1 * error)  # other draws of the same weights
    t = values.mean() / error
    expected = max(stats.ttest_1samp(values, 0).pvalue, 2 * min((ts >= t).mean(), (ts <= t).mean()))
    assert paired(values.tolist(), [0.0] * n).p == pytest.approx(expected, abs=0.01)


def test_the_weights_have_the_distribution_that_the_method_needs() -> None:
    squared_radius, turn = np.random.Generator(np.random.PCG64(6)).random((2, 1_000, 6))
    raw = squared_radius * np.cos(2 * np.pi * turn) ** 2
    assert stats.kstest(raw.ravel(), stats.beta(0.5, 1.5).cdf).pvalue > 0.01
    weights = statistics._weights(6, 2_000)
    assert weights[:1_000] == pytest.approx(raw / raw.sum(axis=1, keepdims=True))
    assert np.array_equal(weights[1_000:], weights[:1_000, ::-1])


@settings(max_examples=60, deadline=None)
@given(values=st.lists(EIGHTHS, min_size=2, max_size=12), level=st.sampled_from([0.5, 0.8, 0.9, 0.95, 0.99, 0.999]))
def test_p_is_below_one_minus_the_level_exactly_when_the_interval_excludes_zero(
    values: list[float], level: float
) -> None:
    found = paired(values, [0.0] * len(values), level)
    assert found.p is not None and found.low is not None and found.high is not None
    assert (found.p < 1 - level) == (found.low > 0 or found.high < 0)
    assert 0 <= found.p <= 1


def test_p_and_interval_agree_about_many_borderline_samples() -> None:
    for n in (3, 6):
        found = bounds(np.random.default_rng(SEED).normal(1.1, 1, size=(4_000, n)), draws=2_000)
        excluded = (found.low > 0) | (found.high < 0)
        assert np.array_equal(found.p < 0.05, excluded)
        assert 0.1 < excluded.mean() < 0.9


def test_a_higher_level_gives_a_wider_interval() -> None:
    values = samples(6, 1)[0].tolist()
    found = [interval(values, level) for level in (0.5, 0.9, 0.95, 0.99, 0.999)]
    for narrow, wide in pairwise(found):
        assert wide.low < narrow.low < narrow.high < wide.high  # type: ignore[operator]


@settings(max_examples=40, deadline=None)
@given(
    method=st.lists(EIGHTHS, min_size=2, max_size=8),
    shift=EIGHTHS,
    scale=st.floats(1e-3, 1e3),
    data=st.data(),
)
def test_shifts_and_scales_carry_over(method: list[float], shift: float, scale: float, data: st.DataObject) -> None:
    baseline = data.draw(st.lists(EIGHTHS, min_size=len(method), max_size=len(method)))
    found = paired(method, baseline)
    both = paired([m + shift for m in method], [b + shift for b in baseline])
    assert both == found  # what all seeds share does not count
    moved = paired([m + shift for m in method], baseline)
    size = 1 + abs(shift) + max(map(abs, method + baseline))
    for now, before in ((moved.mean, found.mean), (moved.low, found.low), (moved.high, found.high)):
        assert now == pytest.approx(before + shift, abs=1e-9 * size)  # type: ignore[operator]
    scaled = paired([m * scale for m in method], [b * scale for b in baseline])
    for now, before in ((scaled.mean, found.mean), (scaled.low, found.low), (scaled.high, found.high)):
        assert now == pytest.approx(before * scale, rel=1e-6, abs=1e-9 * size * scale)  # type: ignore[operator]
    assert scaled.p == pytest.approx(found.p, abs=2.5e-4)


@settings(max_examples=40, deadline=None)
@given(method=st.lists(EIGHTHS, min_size=2, max_size=8), data=st.data())
def test_exchanging_the_sides_turns_the_interval_round(method: list[float], data: st.DataObject) -> None:
    baseline = data.draw(st.lists(EIGHTHS, min_size=len(method), max_size=len(method)))
    one, other = paired(method, baseline, resolution=0.125), paired(baseline, method, resolution=0.125)
    assert one.p == pytest.approx(other.p, abs=2.5e-4)
    assert (one.mean, one.low, one.high) == pytest.approx(
        (-other.mean, -other.high, -other.low), abs=1e-6  # type: ignore[operator]
    )  # fmt: skip


def test_the_result_is_the_same_every_time_and_in_any_order_of_the_seeds() -> None:
    values = samples(9, 1, "exponential")[0].tolist()
    once = paired(values, [0.0] * 9)
    statistics._weights.cache_clear()
    np.random.default_rng().random()
    assert paired(values, [0.0] * 9) == once == paired(values[::-1], [0.0] * 9)


def test_rows_are_treated_alike_alone_and_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = samples(5, 7)
    whole = bounds(rows)
    monkeypatch.setattr(statistics, "BLOCK", 2 * statistics.DRAWS)
    for at, column in enumerate(bounds(rows)):
        assert column == pytest.approx(whole[at])


# --- missing values, steps and values without spread


def test_a_pair_with_a_missing_side_is_left_out() -> None:
    found = paired([1.0, None, 3.0, 5.0, 2.5], [0.5, 2.0, None, 3.0, 1.0])
    assert found == paired([1.0, 5.0, 2.5], [0.5, 3.0, 1.0])
    assert found.n == 3
    assert interval([None, 1.0, 2.0, None]) == interval([1.0, 2.0])


def test_fewer_than_two_values_have_no_interval() -> None:
    assert paired([1.0, None], [0.25, 1.0]) == Difference(0.75, None, None, None, 1)
    assert paired([None], [1.0]) == Difference(None, None, None, None, 0)
    assert interval([0.5]) == Interval(0.5, None, None)
    assert interval([]) == Interval(None, None, None)


def test_equal_differences_of_a_metric_with_steps_are_not_certain() -> None:
    found = paired([0.81, 0.75, 0.69, 0.90, 0.77], [0.80, 0.74, 0.68, 0.89, 0.76], resolution=0.01)
    half = stats.t.ppf(0.975, 4) * 0.01 / math.sqrt(6) / math.sqrt(5)
    assert (found.low, found.high) == pytest.approx((0.01 - half, 0.01 + half))
    assert found.p == pytest.approx(2 * stats.t.sf(math.sqrt(30), 4))


def test_equal_accuracies_have_an_interval_as_wide_as_rounding_hides() -> None:
    found = interval([0.8] * 3, resolution=0.01)
    half = stats.t.ppf(0.975, 2) * 0.01 / math.sqrt(12) / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((0.8 - half, 0.8 + half))


def test_no_difference_at_all_has_p_one() -> None:
    same = [0.5, 0.25, 0.75, 0.5, 0.5]
    assert paired(same, same) == Difference(0.0, 0.0, 0.0, 1.0, 5)
    floored = paired(same, same, resolution=0.01)
    assert floored.p == 1
    assert floored.mean == 0 and floored.low == -floored.high < 0  # type: ignore[operator]


def test_the_floor_does_not_touch_values_that_are_spread_wider() -> None:
    values = samples(4, 1)[0].tolist()
    assert interval(values, resolution=0.01) == interval(values)


def test_one_odd_rounded_difference_among_many_does_not_undo_them() -> None:
    found = paired([0.01] * 9 + [0.0], [0.0] * 10, resolution=0.01)
    assert found.low is not None and 0.005 < found.low < 0.0075  # and 0.0067 by Student's t alone


def test_a_metric_that_chance_does_not_touch_leaves_no_doubt() -> None:
    assert paired([4096, 4096, 4096], [65536, 65536, 65536]) == Difference(-61440.0, -61440.0, -61440.0, 0.0, 3)
    dust = paired([0.3, 0.2, 0.1], [0.2, 0.1, 0.0])  # 0.3 - 0.2 and 0.2 - 0.1 differ in the last digit
    assert dust.p == 0 and dust.low == dust.high == pytest.approx(0.1)
    none = paired([0.1 + 0.2, 0.1 + 0.2], [0.3, 0.3])  # 6e-17 more, which is no difference
    assert none == Difference(0.0, 0.0, 0.0, 1.0, 2)


@pytest.mark.parametrize("scale", [1e-300, 1e-12, 1e12, 1e300])
@pytest.mark.parametrize("resolution", [0.0, 0.01])
def test_values_of_any_size_are_handled(scale: float, resolution: float) -> None:
    values = [1.0, 2.0, 4.0, 3.0, 2.5]
    plain = interval(values)
    found = interval([v * scale for v in values], resolution=resolution * scale)
    assert (found.low, found.high) == pytest.approx((plain.low * scale, plain.high * scale), rel=1e-9)  # type: ignore[operator]
    coarse = paired([v * scale for v in values], [0.0] * 5, resolution=0.01)
    assert coarse.p is not None and (coarse.p == pytest.approx(1)) == (scale < 1)


def test_values_far_below_one_step_are_no_difference() -> None:
    assert paired([1e-310, 3e-310], [0.0, 0.0], resolution=1.0).p == pytest.approx(1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="expected finite values, found"):
        interval([1.0, bad])
    with pytest.raises(ValueError, match="expected finite values, found"):
        paired([1.0, 2.0], [bad, 1.0])
    assert paired([1.0, 2.0, 3.0], [1.0, 2.0, None]).n == 2


def test_differences_that_overflow_are_refused() -> None:
    with pytest.raises(ValueError, match="found inf"):
        paired([1.7e308, 1.0], [-1.7e308, 1.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired([1.0, 2.0], [1.0]), "zip"),
        (lambda: interval([1.0, 2.0], level=1.0), "level is 1.0"),
        (lambda: interval([1.0], level=0.0), "level is 0.0"),
        (lambda: interval([1.0, 2.0], resolution=-0.1), "resolution is -0.1"),
        (lambda: paired([1.0], [2.0], resolution=math.inf), "resolution is inf"),
        (lambda: paired([1.0], [2.0], level=math.nan), "level is nan"),
        (lambda: bounds(np.zeros((3, 1))), "n of at least 2"),
        (lambda: bounds(np.zeros((3, 5)), floor=-1), "floor is -1"),
        (lambda: bounds(np.zeros((3, 5)), draws=38), "draws is 38; expected an even number of at least 40"),
        (lambda: bounds(np.zeros((3, 5)), draws=2_001), "draws is 2001"),
        (lambda: holm([0.5, 1.5]), "a p-value is 1.5"),
        (lambda: holm([math.nan]), "a p-value is nan"),
        (lambda: verdict(Difference(1, 0, 2, 0.1, 3), 0.1, "more"), "better is 'more'"),
        (lambda: judge(Interval(1, 0, 2), "above", 0), "direction is 'above'; expected one of higher"),  # type: ignore[arg-type]
        (lambda: judge(Interval(1, 0, 2), "same", -1), "effect is -1"),
        (lambda: judge(Interval(1, 0, 2), "same", math.nan), "effect is nan"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# --- several comparisons


def test_holm_gives_the_adjusted_values_of_published_examples() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    # the 15 p-values of Benjamini and Hochberg (1995), of which family-wise procedures reject the first three at 5%
    ps = [
        0.0001,
        0.0004,
        0.0019,
        0.0095,
        0.0201,
        0.0278,
        0.0298,
        0.0344,
        0.0459,
        0.3240,
        0.4262,
        0.5719,
        0.6528,
        0.7590,
        1,
    ]
    expected = [0.0015, 0.0056, 0.0247, 0.1140, 0.2211, 0.2780, 0.2780, 0.2780, 0.3213, *[1.0] * 6]
    assert holm(ps) == pytest.approx(expected)
    assert sum(p < 0.05 for p in holm(ps) if p is not None) == 3


@given(ps=st.lists(st.floats(0, 1), max_size=9), alpha=st.sampled_from([0.01, 0.05, 0.2]))
def test_holm_rejects_what_stepping_down_rejects(ps: list[float], alpha: float) -> None:
    rejected = set()
    for rank, at in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        if (len(ps) - rank) * ps[at] > alpha:
            break
        rejected.add(at)
    assert {at for at, p in enumerate(holm(ps)) if p is not None and p <= alpha} == rejected


def test_comparisons_without_a_p_value_are_not_counted() -> None:
    assert holm([None, 0.01, None, 0.03]) == [None, 0.02, None, 0.03]
    assert holm([None]) == [None]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("mean", "adjusted", "better", "expected"),
    [
        (0.1, 0.01, "higher", "better"), (0.1, 0.01, "lower", "worse"),
        (-0.1, 0.01, "higher", "worse"), (-0.1, 0.01, "lower", "better"),
        (0.1, 0.2, "higher", "no difference shown"), (0.1, None, "higher", "no difference shown"),
        (0.0, 1.0, "higher", "no difference shown"), (0.1, 0.06, "higher", "no difference shown"),
    ],
)  # fmt: skip
def test_verdicts(mean: float, adjusted: float | None, better: str, expected: str) -> None:
    assert verdict(Difference(mean, mean - 0.05, mean + 0.05, 0.01, 5), adjusted, better) == expected


def test_a_verdict_keeps_to_its_level() -> None:
    found = Difference(0.1, 0.05, 0.15, 0.03, 5)
    assert verdict(found, 0.06, "higher", level=0.9) == "better"
    assert verdict(found, 0.03, "higher", level=0.99) == "no difference shown"
    assert verdict(paired([1.0], [0.0]), None, "higher") == "no difference shown"


# --- claims


@pytest.mark.parametrize(
    ("direction", "mean", "low", "high", "effect", "expected"),
    [
        ("higher", 0.3, 0.1, 0.5, 0.2, "holds"),
        ("higher", 0.2, 0.1, 0.3, 0.2, "holds"),  # exactly the effect
        ("higher", 0.1 * 3 - 0.1, 0.1, 0.3, 0.2, "holds"),  # 0.20000000000000004
        ("higher", 0.05 - 1e-17, 0.01, 0.09, 0.05, "holds"),
        ("higher", 0.19, 0.1, 0.3, 0.2, "not at this scale"),  # real, but too small
        ("higher", 0.3, 0.0, 0.6, 0.2, "not at this scale"),  # 0 is in the interval
        ("higher", 0.3, -0.1, 0.7, 0.2, "not at this scale"),
        ("higher", -0.3, -0.6, 0.0, 0.2, "not at this scale"),
        ("higher", -0.3, -0.5, -0.1, 0.2, "contradicted"),
        ("higher", -0.01, -0.02, -0.005, 0.2, "contradicted"),  # however small
        ("higher", 0.3, 0.1, 0.5, 0.0, "holds"),
        ("higher", 0.0, 0.0, 0.0, 0.0, "not at this scale"),
        ("lower", -0.3, -0.5, -0.1, 0.2, "holds"),
        ("lower", -0.2, -0.3, -0.1, 0.2, "holds"),
        ("lower", -0.1, -0.3, -0.05, 0.2, "not at this scale"),
        ("lower", -0.3, -0.6, 0.0, 0.2, "not at this scale"),
        ("lower", 0.3, 0.1, 0.5, 0.2, "contradicted"),
        ("same", 0.0, -0.2, 0.2, 0.2, "holds"),  # both ends on the margin
        ("same", 0.1, 0.05, 0.15, 0.2, "holds"),  # different from 0, and yet the same for all that matters
        ("same", 0.0, 0.0, 0.0, 0.0, "holds"),
        ("same", 0.1, -0.1, 0.3, 0.2, "not at this scale"),
        ("same", -0.1, -0.3, 0.1, 0.2, "not at this scale"),
        ("same", 0.0, -0.3, 0.3, 0.2, "not at this scale"),
        ("same", 0.3, 0.2, 0.4, 0.2, "not at this scale"),  # touches the margin
        ("same", 0.3, 0.25, 0.35, 0.2, "contradicted"),
        ("same", -0.3, -0.35, -0.25, 0.2, "contradicted"),
        ("not lower", 0.0, -0.2, 0.2, 0.2, "holds"),
        ("not lower", 0.9, 0.5, 1.3, 0.2, "holds"),  # higher is not lower
        ("not lower", -0.1, -0.15, -0.05, 0.2, "holds"),
        ("not lower", -0.1, -0.3, 0.1, 0.2, "not at this scale"),
        ("not lower", -0.3, -0.4, -0.2, 0.2, "not at this scale"),
        ("not lower", -0.3, -0.4, -0.25, 0.2, "contradicted"),
        ("not higher", 0.0, -0.2, 0.2, 0.2, "holds"),
        ("not higher", -0.9, -1.3, -0.5, 0.2, "holds"),
        ("not higher", 0.1, -0.1, 0.3, 0.2, "not at this scale"),
        ("not higher", 0.3, 0.2, 0.4, 0.2, "not at this scale"),
        ("not higher", 0.3, 0.25, 0.4, 0.2, "contradicted"),
    ],
)  # fmt: skip
def test_claims_are_judged_by_the_interval(
    direction: statistics.Direction, mean: float, low: float, high: float, effect: float, expected: str
) -> None:
    assert judge(Interval(mean, low, high), direction, effect) == expected


@pytest.mark.parametrize("direction", ["higher", "lower", "same", "not lower", "not higher"])
def test_too_few_seeds_settle_no_claim(direction: statistics.Direction) -> None:
    assert judge(paired([0.9], [0.1]), direction, 0.1) == "not at this scale"
    assert judge(paired([], []), direction, 0.1) == "not at this scale"


@given(
    ends=st.tuples(EIGHTHS, EIGHTHS, EIGHTHS).map(sorted),
    effect=st.integers(0, 400).map(lambda k: k / 8),
    words=st.sampled_from([("higher", "lower"), ("not lower", "not higher"), ("same", "same")]),
)
def test_claims_about_the_other_direction_are_mirrored(
    ends: list[float], effect: float, words: tuple[statistics.Direction, statistics.Direction]
) -> None:
    low, mean, high = ends
    assert judge(Interval(mean, low, high), words[0], effect) == judge(Interval(-mean, -high, -low), words[1], effect)


@given(ends=st.tuples(EIGHTHS, EIGHTHS, EIGHTHS).map(sorted), effect=st.integers(1, 400).map(lambda k: k / 8))
def test_one_result_never_upholds_both_a_claim_and_its_opposite(ends: list[float], effect: float) -> None:
    low, mean, high = ends
    assume(low < high)
    found = {
        direction: judge(Interval(mean, low, high), direction, effect) for direction in ("higher", "lower", "not lower")
    }
    assert not (found["higher"] == "holds" and found["lower"] == "holds")
    assert not (found["higher"] == "holds" and found["not lower"] != "holds")
    assert not (found["not lower"] == "contradicted" and found["higher"] != "contradicted")
