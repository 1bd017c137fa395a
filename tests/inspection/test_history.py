"""Events of a run as arrays: repeated, broken and missing ones."""

from __future__ import annotations

import math

import numpy as np

from softprompt.inspection.history import at_steps, series, smooth, thin, token_series


def test_a_resumed_run_repeats_steps_and_the_last_counts() -> None:
    events = [{"event": "step", "step": s, "loss": loss} for s, loss in ((1, 9.0), (2, 8.0), (2, 7.0), (3, 6.0))]
    steps, losses = series(at_steps([*events, {"event": "end"}, {"event": "step"}], "step"), "loss")
    assert steps.tolist() == [1, 2, 3]
    assert losses.tolist() == [9, 7, 6]


def test_what_is_no_number_is_left_out() -> None:
    events = [{"step": 1, "loss": math.nan}, {"step": 2, "loss": None}, {"step": 3}, {"step": 4, "loss": 1}]
    assert [part.tolist() for part in series(events, "loss")] == [[4], [1]]
    assert [len(part) for part in series([], "loss")] == [0, 0]


def test_numbers_of_each_token() -> None:
    events = [
        {"step": 1, "n": [1, 2]},
        {"step": 2, "n": [1, 2, 3]},
        {"step": 3, "n": None},
        {"step": 4, "n": [3, None]},
    ]
    steps, values = token_series(events, "n", 2)
    assert steps.tolist() == [1, 4]
    np.testing.assert_array_equal(values, [[1, 2], [3, np.nan]])
    assert token_series([], "n", 2)[1].shape == (0, 2)


def test_thinning_keeps_the_mean_and_the_last_step() -> None:
    steps, values = thin(np.arange(1, 1001), np.arange(1000.0), 100)
    assert len(steps) == 100
    assert steps[-1] == 1000
    assert values.mean() == 499.5
    table = np.stack([np.arange(10.0), np.full(10, np.nan)], axis=1)
    assert np.isnan(thin(np.arange(10), table, 3)[1][:, 1]).all()


def test_smoothing_keeps_a_constant_and_the_number_of_points() -> None:
    np.testing.assert_allclose(smooth(np.full(7, 2.5), 5), 2.5)
    np.testing.assert_allclose(smooth(np.arange(5.0), 3), [0.5, 1, 2, 3, 3.5])
