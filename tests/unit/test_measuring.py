"""Timing in turn and what is concluded from it, on a clock that the tests set. No framework."""

import functools

import pytest

from benchmarks.common.timing import time_rounds
from mbn_rewrite.errors import RewriteError
from mbn_rewrite.measurement import (
    Latencies,
    Measurement,
    Timing,
    _outside,
    percentiles,
    quartiles,
    ratio,
)
from mbn_rewrite.options import RunConfig
from mbn_rewrite.tuning.timing import time_calls, time_interleaved


class Clock:
    """Time passes only where a variant says how long it takes."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def taking(self, *seconds):
        """A function that takes so many seconds, one after the other, again and again."""
        calls = iter(range(10**6))

        def function():
            self.now += seconds[next(calls) % len(seconds)]

        return function


def test_all_variants_take_the_same_number_of_turns_while_they_are_close():
    clock = Clock()
    seconds = time_interleaved(
        {"a": clock.taking(0.1), "b": clock.taking(0.101)}, 10**6, clock=clock
    )
    assert len(seconds["a"]) == len(seconds["b"]) == 40
    assert seconds["a"] == pytest.approx([0.1] * 40)


def test_a_hopeless_variant_leaves_and_one_that_stays_does_not():
    clock = Clock()
    variants = {
        "fast": clock.taking(0.1), "slow": clock.taking(0.2), "input": clock.taking(0.3),
    }  # fmt: skip
    seconds = time_interleaved(variants, 10**6, stays=["input"], clock=clock)
    assert len(seconds["slow"]) == 7
    assert len(seconds["input"]) == len(seconds["fast"]) == 40


def test_the_deadline_ends_the_race():
    clock = Clock()
    variants = {"a": clock.taking(1.0), "b": clock.taking(1.0)}
    seconds = time_interleaved(variants, 10.0, stays=["a", "b"], clock=clock)
    assert clock.now <= 12
    assert len(seconds["a"]) == len(seconds["b"]) == 3


def test_who_there_is_no_time_for_takes_no_part():
    clock = Clock()
    variants = {
        name: clock.taking(seconds) for name, seconds in zip("abcd", (1, 1, 2, 3), strict=True)
    }
    seconds = time_interleaved(variants, 45.0, stays=["a", "b"], clock=clock)
    assert {name: len(each) for name, each in seconds.items()} == {"a": 7, "b": 7, "c": 7, "d": 0}
    assert clock.now == 21 + 28


def test_warming_up_ends_with_the_time():
    clock = Clock()
    time_interleaved(
        {"a": clock.taking(5.0), "b": clock.taking(5.0)}, 3.0, stays=["a", "b"], clock=clock
    )
    assert clock.now == 20


def test_short_calls_are_timed_several_at_a_time():
    clock = Clock()
    seconds = time_interleaved({"a": clock.taking(0.001)}, 10**6, clock=clock)
    assert seconds["a"][0] == pytest.approx(0.001)
    assert clock.now == pytest.approx(0.003 + 40 * 0.005)


@pytest.mark.parametrize(("count", "outside"), [(1, 0), (5, 0), (6, 0), (10, 1), (30, 9), (40, 13)])
def test_interval_of_a_median_is_that_of_the_binomial_table(count, outside):
    assert _outside(count) == outside


def test_ratio_pairs_what_was_measured_together():
    measured = ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0, 100.0])
    assert (measured.median, measured.low, measured.high) == (2.0, 2.0, 2.0)


def test_ratio_of_noise_includes_one():
    measured = ratio([1.0, 1.2, 0.9, 1.1, 0.8, 1.0], [1.1, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert measured.low < 1 < measured.high


def test_quartiles_of_one_value():
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)


@pytest.mark.parametrize(
    "given",
    [
        {"batch_size": 0},
        {"batch_size": 1.5},
        {"batch_size": True},
        {"dtype": "int8"},
        {"dtype": "bfloat16", "jit_compile": True},
    ],
)
def test_ways_that_make_no_sense(given):
    with pytest.raises(RewriteError):
        RunConfig(**given)


def test_measurement_is_a_table_and_json():
    timings = (
        Timing("input", (0.002, 0.002), ratio([1.0, 1.0], [1.0, 1.0])),
        Timing("folded", (0.001, 0.001), ratio([2.0, 2.0], [1.0, 1.0])),
        Timing("fused", note="not measured: out of memory"),
    )
    measurement = Measurement("some device", RunConfig(8), timings, "folded", "because")
    text = str(measurement)
    assert "some device, batch 8: because" in text
    (row,) = [line for line in text.split("\n") if line.startswith(" folded")]
    assert row.endswith("chosen")
    assert " - " in row  # two values have no interval
    assert "out of memory" in text
    forms = measurement.to_dict()["forms"]
    assert forms[1]["milliseconds"] == [1.0, 1.0]
    assert forms[1]["times_as_fast"]["median"] == 2.0


def test_each_variant_begins_a_round_in_its_turn():
    said = []
    variants = {name: functools.partial(said.append, name) for name in "abc"}
    seconds = time_rounds(variants, 3, 0, prepare=lambda: said.append("-"))
    assert "".join(said) == "-a-b-c-b-c-a-c-a-b"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_nothing_to_time_takes_no_time():
    assert time_rounds({}, 3) == {}


# ------------------------------------------------------------------------- single calls


def test_single_calls_are_timed_for_as_long_as_is_asked():
    clock = Clock()
    seconds = time_calls({"a": clock.taking(0.1), "b": clock.taking(0.3)}, 4.0, clock=clock)
    assert len(seconds["a"]) == len(seconds["b"]) == 11
    assert seconds["a"] == pytest.approx([0.1] * 11)
    seconds = time_calls({"a": clock.taking(0.1)}, 4.0, most=5, clock=clock)
    assert len(seconds["a"]) == 5


def test_slow_calls_are_timed_as_often_as_must_be():
    clock = Clock()
    seconds = time_calls({"a": clock.taking(60.0), "b": clock.taking(50.0)}, 5.0, clock=clock)
    assert seconds == {"a": [60.0], "b": [50.0]}
    assert clock.now == 220  # once beforehand
    assert len(time_calls({"a": clock.taking(60.0)}, 5.0, least=4, clock=clock)["a"]) == 4


def test_percentiles_are_of_as_many_values_as_they_need():
    assert percentiles([]) == {}
    assert percentiles([3.0]) == {"p50": 3.0}
    assert set(percentiles([1.0] * 99)) == {"p50", "p90"}
    assert percentiles(list(range(101))) == {"p50": 50, "p90": 90, "p99": 99}


def latencies(first, second, **fields):
    timings = (Timing("a", first), Timing("b", second, ratio(first, second)))
    return Latencies("a CPU", RunConfig(), timings, **fields)


def test_the_figure_is_one_line():
    faster = latencies((0.2,) * 10, (0.1,) * 10)
    assert faster.figure == "2.00 times as fast here (95% 2.00-2.00; batch 1, a CPU)"
    assert str(faster).endswith(f"speed: {faster.figure}")
    same = latencies((0.1, 0.2) * 5, (0.2, 0.1) * 5, threads=1, why="it is small")
    assert same.figure == (
        "no difference beyond noise here (95% 0.50-2.00; batch 1, 1 thread, a CPU): it is small"
    )
    few = latencies((30.0,), (20.0,))
    assert few.figure == "1.50 times as fast here, by 1 call only (batch 1, a CPU)"
    assert Latencies("", RunConfig(), (), why="no reason").figure == "not measured: no reason"


def test_latencies_as_data():
    read = latencies((0.2,) * 10, (0.1,) * 10).to_dict()
    assert read["device"] == "a CPU"
    assert read["models"][1]["percentiles"] == {"p50": 100, "p90": 100}
    assert read["models"][1]["times_as_fast"]["low"] == 2
