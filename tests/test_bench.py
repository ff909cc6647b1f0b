"""What the page on speed shows was measured, of what bench/speed.py times today."""

import pytest

from bench import measured, speed

beside = pytest.mark.parametrize(
    ("ours", "theirs", "programs", "limit"),
    speed.BESIDE,
    ids=[f"{ours}, {theirs}" for ours, theirs, *_ in speed.BESIDE],
)


def test_all_pairs_were_measured_and_no_other():
    pairs = [(ours, theirs) for ours, theirs, _ in measured.beside]
    assert pairs == [(ours, theirs) for ours, theirs, *_ in speed.BESIDE]
    assert measured.tokens == speed.TOKENS and measured.experts == speed.EXPERTS


@beside
def test_where_a_limit_stands_it_was_kept(ours, theirs, programs, limit):
    ratio = dict(((a, b), r) for a, b, r in measured.beside)[ours, theirs]
    assert limit is None or ratio <= limit


@beside
def test_both_programs_run(ours, theirs, programs, limit, reference_library):
    if "Mixtral" in theirs:
        reference_library("transformers")
    for program in programs():
        program()


def test_a_ratio_is_above_one_where_ours_does_more():
    def work(times):
        return lambda: sum(range(1000 * times))

    assert speed.ratio(work(100), work(1), pairs=5) > 5
    assert speed.ratio(work(1), work(100), pairs=5) < 0.2
