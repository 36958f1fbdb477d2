"""Wilson's interval against numbers worked by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from advmoe.evaluation.intervals import wilson

# z^2 = 3.841459. 5 of 10: 0.5 +- 1.959964 * sqrt(0.025 + 0.0096036) / 1.3841459 = 0.5 +- 0.263407.
# None of 10: from 0 to z^2 / (10 + z^2). One of 1: from 1 / (1 + z^2).
WORKED = [(5, 10, 0.236593, 0.763407), (0, 10, 0, 0.277533), (10, 10, 0.722467, 1), (1, 1, 0.206549, 1)]


@pytest.mark.parametrize("successes, n, low, high", WORKED)
def test_by_hand(successes, n, low, high):
    assert wilson(successes, n) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_it_holds_the_share_mirrors_and_narrows(case):
    successes, n = case
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n <= high <= 1 and low < high
    assert wilson(n - successes, n) == (pytest.approx(1 - high, abs=1e-9), pytest.approx(1 - low, abs=1e-9))
    narrow = wilson(4 * successes, 4 * n)
    assert narrow[1] - narrow[0] < high - low


@pytest.mark.parametrize(
    "successes, n, message", [(0, 0, "n must be >= 1"), (4, 3, "0 ... 3, got 4"), (-1, 3, "got -1")]
)
def test_impossible_counts(successes, n, message):
    with pytest.raises(ValueError, match=message):
        wilson(successes, n)


@pytest.mark.parametrize(("successes", "n"), [(0, 7), (1, 7), (7, 7), (123, 1000), (9_999, 10_000), (1, 10**6)])
def test_scipy_has_the_same(successes, n):
    known = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert wilson(successes, n) == (pytest.approx(known.low, abs=1e-12), pytest.approx(known.high, abs=1e-12))
