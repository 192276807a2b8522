import pytest

from trainer.rates import rates, wilson


def test_wilson_interval():
    assert wilson(0, 64) == pytest.approx((0.0, 0.0566), abs=1e-3)
    assert wilson(64, 64) == pytest.approx((0.9434, 1.0), abs=1e-3)
    assert wilson(32, 64) == pytest.approx((0.3807, 0.6193), abs=1e-3)
    low, high = wilson(1, 10)
    assert low < 0.1 < high and wilson(0, 10)[0] == 0.0
    assert wilson(8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-5)


def test_rates_have_their_intervals():
    assert rates(before=[True, True], after=[True, False]) == {"before": 1.0, "before_interval": wilson(2, 2), "after": 0.5,
                                                               "after_interval": wilson(1, 2)}
