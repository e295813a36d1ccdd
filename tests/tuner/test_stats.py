"""The winner test on synthetic noise: how often it is wrong, and what it still sees."""

import numpy as np
import pytest

from tuner import stats

ROUNDS, CONTENDERS = 40, 6


def timings(rng, true_us, rounds=ROUNDS):
    """Interleaved rounds: 1 % noise with outliers, and clocks that wander by tens of percent, for all alike."""
    drift = np.exp(np.cumsum(0.01 * rng.standard_normal(rounds)) + np.linspace(0, 0.2, rounds))
    noise = np.exp(0.01 * rng.standard_t(3, size=(rounds, len(true_us))))
    return np.asarray(true_us)[None, :] * noise * drift[:, None]


def winners(true_us, repeats, margin, seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(repeats):
        times = timings(rng, true_us)
        found.append(stats.pick({i: times[:, i] for i in range(len(true_us))}, 0, margin=margin)[0])
    return np.array(found)


def test_default_loses_to_its_equals_no_more_often_than_alpha():
    wrong = (winners([10.0] * (1 + CONTENDERS), 400, margin=0.0) != 0).mean()
    # binomial: alpha = 0.01, three standard deviations above at 400 runs
    assert wrong <= 0.01 + 3 * np.sqrt(0.01 * 0.99 / 400), f"false positives: {wrong:.3%}"
    print(f"false positives without margin: {wrong:.2%}")


def test_margin_makes_false_winners_rarer_still():
    assert (winners([10.0] * (1 + CONTENDERS), 200, margin=stats.MARGIN) != 0).sum() <= 1


def test_a_gain_below_the_margin_is_not_worth_it():
    assert (winners([10.0, 9.95], 200, margin=stats.MARGIN) == 0).all()


def test_three_percent_are_seen_through_one_percent_noise():
    assert (winners([10.0, 9.7, 10.5, 12.0], 200, margin=stats.MARGIN) == 1).mean() > 0.95


def test_nobody_slower_than_the_default_ever_wins():
    assert (winners([10.0, 10.05, 10.2, 11.0], 200, margin=stats.MARGIN) == 0).all()


def test_of_equal_winners_the_first_is_taken():
    found = winners([10.0, 8.0, 8.0, 8.0], 100, margin=stats.MARGIN)
    assert (found == 1).mean() > 0.98


def test_unpaired_comparison_would_be_fooled_by_the_drift():
    """The drift is larger than the gain: without pairing there is nothing to see, with it there is."""
    rng = np.random.default_rng(1)
    times = timings(rng, [10.0, 9.7])
    assert np.ptp(times[:, 0]) > 1.0
    assert stats.compare(times[:, 1], times[:, 0]).faster


@pytest.mark.parametrize(
    ("candidate", "incumbent", "message"),
    [
        ([1.0] * 20, [1.0] * 19, "paired"),
        ([1.0] * 3, [2.0] * 3, "at least 7 rounds"),
        ([1.0] * 19 + [0.0], [2.0] * 20, "positive and finite"),
        ([1.0] * 19 + [float("nan")], [2.0] * 20, "positive and finite"),
    ],
)
def test_samples_that_say_nothing_are_refused(candidate, incumbent, message):
    with pytest.raises(ValueError, match=message):
        stats.compare(np.array(candidate), np.array(incumbent))


def test_summary_is_median_and_percentiles():
    s = stats.summary(np.arange(1, 102, dtype=float))
    assert (s.median_us, s.p20_us, s.p80_us) == (51.0, 21.0, 81.0)
