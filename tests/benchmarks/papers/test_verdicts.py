"""Verdicts: intervals are Student's, and seeds that were seen do not decide."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from benchmarks.papers.raw_files import RawFiles, measure
from benchmarks.papers.reproduction import FIRST, SECOND_LOOK, Cause, Claim, Job, Run
from benchmarks.papers.verdicts import (
    CONFIDENCE,
    CONFIDENCE_AGAIN,
    Cell,
    Verdict,
    explained,
    shown,
    verdict,
)
from tests.benchmarks.papers.made_up import PAPER, first

SEEDS = range(FIRST, FIRST + 5)


def cell(values, **bounds):
    claim = Claim("a", "b", "c", "x", ("run",), first, **bounds)
    return Cell(claim, "run", SEEDS, dict(enumerate(values, FIRST)), {})


def claim_of(name):
    return next(claim for claim in PAPER.claims if claim.name == name)


@pytest.fixture
def results(tmp_path):
    results = RawFiles(tmp_path)
    for run in PAPER.runs:
        for seed in SEEDS:
            results.write(measure(PAPER, run, "small", Job(seed)))
    return results


def test_the_interval_is_that_of_students_t():
    values = [1.0, 2.0, 4.0, 4.5, 3.0]
    low, mean, high = cell(values, at_least=0).interval
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert (low, high) == pytest.approx((expected.low, expected.high))
    assert mean == pytest.approx(2.9)
    logs = stats.ttest_1samp(np.log(values), 0).confidence_interval(0.9)
    low, mean, high = cell(values, at_least=0, geometric=True).interval
    assert (low, high) == pytest.approx((math.exp(logs.low), math.exp(logs.high)))
    assert mean == pytest.approx(math.prod(values) ** 0.2)


def test_an_interval_has_the_mean_in_nine_of_ten_draws():
    random = np.random.default_rng(0)
    within = [
        low <= 1 <= high
        for low, _, high in (
            cell(random.normal(1, 2, 5).tolist(), at_least=0).interval for _ in range(2000)
        )
    ]
    assert np.mean(within) == pytest.approx(0.9, abs=0.02)  # three deviations


def test_a_run_that_is_looked_at_again_has_more_seeds_and_wider_intervals(tmp_path):
    """Its first seeds alone decide nothing any more."""
    run = replace(PAPER.run("steep"), looked_again=("up",))
    paper = replace(PAPER, runs=(run, *(each for each in PAPER.runs if each.name != "steep")))
    results, claim = RawFiles(tmp_path), replace(claim_of("up"), runs=("steep",))
    for seed in range(FIRST, FIRST + SECOND_LOOK):
        assert verdict(results, paper, claim, "small").word == "not measured"
        results.write(measure(paper, run, "small", Job(seed)))
    (found,) = verdict(results, paper, claim, "small").cells
    assert found.word != "not measured"
    assert len(found.figures) == SECOND_LOOK == 20
    values = list(found.figures.values())
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.98)
    low, _, high = found.interval
    assert (low, high) == pytest.approx((expected.low, expected.high))
    first = stats.ttest_1samp(values[:5], 0).confidence_interval(0.9)
    assert found.first.interval[::2] == pytest.approx((first.low, first.high))
    assert str(found).endswith(f", at first {found.first}")


def test_two_looks_are_wrong_on_one_side_once_in_seventeen_times():
    """What is at its threshold holds at the first look, or it is open and holds at the second."""
    draws = np.random.default_rng(0).normal(size=(100_000, 20))

    def reach(part, confidence):
        error = part.std(1, ddof=1) / part.shape[1] ** 0.5
        return stats.t.ppf((1 + confidence) / 2, part.shape[1] - 1) * error

    first, both = draws[:, :5], draws
    at_first = reach(first, CONFIDENCE)
    holds = first.mean(1) > at_first
    left_open = abs(first.mean(1)) < at_first
    holds |= left_open & (both.mean(1) > reach(both, CONFIDENCE_AGAIN))
    assert holds.mean() == pytest.approx(1 / 17, abs=0.003)  # four deviations


def test_a_second_look_is_of_claims_that_there_are():
    run = PAPER.run("steep")
    with pytest.raises(ValueError, match=r"looked at again for none of \{'sideways'\}"):
        replace(PAPER, runs=(replace(run, looked_again=("sideways",)), *PAPER.runs[1:]))
    with pytest.raises(ValueError, match="has 20 seeds: no second look has more"):
        replace(run, seeds=SECOND_LOOK, looked_again=("up",))


@pytest.mark.parametrize(
    ("values", "bounds", "word"),
    [
        ([2.0] * 5, {"at_least": 2.0}, "holds"),
        ([2.0] * 5, {"at_most": 2.0}, "holds"),
        ([2.0] * 5, {"at_most": 1.9}, "fails"),
        ([1.0, 1.1, 0.9, 1.0, 1.05], {"at_least": 0.5}, "holds"),
        ([1.0, 1.1, 0.9, 1.0, 1.05], {"at_least": 1.0}, "inconclusive"),
        ([1.0, 1.1, 0.9, 1.0, 1.05], {"at_least": 0.5, "at_most": 1.0}, "inconclusive"),
        ([1.0, 1.1, 0.9, 1.0, 1.05], {"at_least": 0.5, "at_most": 1.5}, "holds"),
        ([1.0, 1.1, 0.9, 1.0, 1.05], {"at_least": 1.5, "at_most": 1.9}, "fails"),
        ([1.0, 1.1, 0.9, 1.0, 1.05], {"at_least": 0.5, "at_most": 0.7}, "fails"),
        # One seed far on the wrong side is scatter, and not a veto.
        ([1.0, 1.1, 0.9, 1.0, 0.4], {"at_least": 0.5}, "holds"),
        ([1.0, 1.1, 0.9, 1.0, -9.0], {"at_least": 0.5}, "inconclusive"),
        ([1.0, 1.1, 0.9, 1.0], {"at_least": 0.5}, "not measured"),
        ([1.0, 1.1, 0.9, math.nan, math.nan], {"at_least": 0.5}, "holds"),
        ([1.0, 1.1, math.nan, math.nan, math.nan], {"at_least": 0.5}, "untestable"),
        ([1.0] * 5, {"at_least": 0.5, "untestable": "Too few images."}, "untestable"),
        ([math.inf, 1.0, 2.0, 3.0, 4.0], {"at_least": 0.5}, "holds"),
        ([math.inf, 1.0, 2.0, 3.0, 4.0], {"at_least": 1.5}, "inconclusive"),
        ([math.inf, 1.0, 2.0, 3.0, 4.0], {"at_most": 0.5}, "fails"),
        # Of fewer than five none is beyond the median as rarely as that.
        ([math.inf, 1.0, 2.0, 3.0, math.nan], {"at_least": 0.5}, "inconclusive"),
        # A ratio of nought has no logarithm.
        ([0.0, 4.0, 4.0, 4.0, 4.0], {"at_most": 5.0, "geometric": True}, "holds"),
        ([-1.0, 4.0, 4.0, 4.0, 4.0], {"at_least": 1.0, "geometric": True}, "inconclusive"),
    ],
)
def test_a_cell_is_decided_by_its_interval(values, bounds, word):
    assert cell(values, **bounds).word == word


def test_of_more_seeds_some_may_be_on_the_other_side_where_there_is_no_mean():
    """Of ten, two are above the median once in 93, and three once in 18."""
    cell_of_ten = cell([math.inf, *range(1, 10)], at_least=0)
    assert cell_of_ten.interval == (2, 5.5, 9)


def test_a_cell_is_written_with_its_interval_and_with_what_is_missing():
    assert str(cell([2.0] * 5, at_least=1)) == "2"
    assert str(cell([1.0, 2.0, 3.0, 2.0, 2.0], at_least=1)) == "2 [1.33, 2.67]"
    assert str(cell([1.0, 3.0, 2.0, math.nan, 2.0], at_least=1)) == "2 [1.04, 2.96] (4 of 5)"
    assert str(cell([2.5, math.nan], at_least=1)) == "2.5 (1 of 2)"
    assert str(cell([], at_least=1)) == "–"
    # With more digits, where three would put it on the other side.
    assert str(cell([0.99996] * 5, at_least=1)) == "0.99996"
    assert str(cell([1e-15] * 5, at_least=0)) == "below 1e-12"


def test_a_claim_holds_if_it_does_in_every_run(results):
    found = {claim.name: verdict(results, PAPER, claim, "small") for claim in PAPER.claims}
    # y(1) is 2.10 to 2.14 and 0.60 to 0.64; one over nothing decides nothing.
    assert {name: each.word for name, each in found.items()} == {
        "up": "holds",
        "fast": "partly",
        "near": "inconclusive",
        "two": "holds",
        "flat": "fails",
        "empty": "untestable",
    }
    assert str(found["fast"]) == "holds in 1 of 2"
    assert found["fast"].exceptions == {"flat": "fails"}
    assert found["fast"].cells[0].premises == dict.fromkeys(SEEDS, True)
    assert found["fast"].cells[1].premises == dict.fromkeys(SEEDS, False)
    assert (found["fast"].granted, found["up"].granted) == (True, True)
    (other,) = found["up"].readings["flat"]
    assert (other.run, other.word, other.figures[FIRST]) == ("eyed", "fails", 0.15)
    assert not found["near"].readings


def test_what_cannot_be_tested_in_one_run_is_decided_by_the_others(results):
    half = replace(claim_of("up"), measure=lambda raw: raw["slope"] / (raw["slope"] > 1))
    found = verdict(results, PAPER, half, "small")
    assert (found.word, found.exceptions) == ("holds", {"flat": "untestable"})
    assert str(found) == "holds in 1 of 2"


def test_what_is_taken_for_granted_is_so_for_half_of_the_seeds_at_least(results):
    never = replace(claim_of("up"), premise=lambda raw: raw["values"][0] < 0.62)
    found = verdict(results, PAPER, never, "small")  # 2 of 10 seeds
    assert (found.word, found.granted) == ("holds", False)


def test_a_cause_is_shown_by_what_holds(results):
    def told(name, *shown_by, **shown_in):
        paper = replace(PAPER, causes={name: Cause("So it is.", shown_by, shown_in)})
        found = [verdict(results, paper, claim, "small") for claim in paper.claims]
        return explained(paper, next(f for f in found if f.claim.name == name), found)

    assert told("fast", "two")  # another claim, which holds
    assert told("fast", "flat", "two")
    assert not told("fast", "flat")  # a claim that fails, and a run where this one does
    assert told("fast", "steep")  # a run where it holds
    assert told("fast", flat=("two",))  # the run in which it fails
    assert not told("fast", steep=("two",))  # and the one in which it holds
    assert not told("fast", "eyed")
    assert not told("fast")  # a guess
    assert not told("up", "two")  # it holds itself
    assert not told("empty", "two")  # nobody can tell


def test_a_cause_is_shown_for_each_run_in_which_a_claim_does_not_hold(results):
    never = replace(claim_of("fast"), at_least=9.0)
    claims = tuple(never if claim.name == "fast" else claim for claim in PAPER.claims)

    def told(**shown_in):
        paper = replace(PAPER, claims=claims, causes={"fast": Cause("So.", (), shown_in)})
        found = [verdict(results, PAPER, claim, "small") for claim in PAPER.claims]
        fast = Verdict(never, [replace(each, claim=never) for each in found[1].cells], {})
        assert set(fast.exceptions.values()) == {"fails"}
        told = shown(paper, fast, found)
        assert explained(paper, fast, found) == all(told.values())
        return told

    both = {"steep": ("two",), "flat": ("two",)}
    assert told(**both) == both
    assert told(flat=("two",)) == {"steep": (), "flat": ("two",)}
    assert told(flat=("two",), steep=("flat", "two")) == both
    # A claim that holds in that run, though not in others.
    assert told(flat=("two",), steep=("fast",)) == {"steep": ("fast",), "flat": ("two",)}
    assert told(flat=("fast",), steep=("two",)) == {"steep": ("two",), "flat": ()}


def test_a_name_that_there_is_not_is_no_missing_figure(results):
    misspelt = replace(claim_of("up"), measure=lambda raw: raw["valeus"][0])
    with pytest.raises(KeyError):
        verdict(results, PAPER, misspelt, "small")


def test_fewer_seeds_decide_nothing(results):
    assert verdict(results, PAPER, claim_of("up"), "paper").word == "not measured"
    results.path("made_up", "steep", "small", SEEDS[0]).unlink()
    assert verdict(results, PAPER, claim_of("two"), "small").word == "not measured"
    # Nor does another one in its place: that would be a choice.
    results.write(measure(PAPER, PAPER.run("steep"), "small", Job(SEEDS[-1] + 1)))
    assert verdict(results, PAPER, claim_of("two"), "small").word == "not measured"


@pytest.mark.parametrize(
    "other",
    [
        {"at_least": 1.7},
        {"at_most": 2.3},
        {"formula": "2"},
        {"geometric": True},
        {"kind": "ours"},
        {"untestable": "It failed."},
    ],
)
def test_seeds_that_were_run_under_another_rule_do_not_decide(results, other):
    claim = claim_of("two")
    assert verdict(results, PAPER, claim, "small").word == "holds"
    assert verdict(results, PAPER, replace(claim, says="It is about 2."), "small").word == "holds"
    found = verdict(results, PAPER, replace(claim, **other), "small")
    assert (found.word, found.cells[0].figures) == ("not measured", {})


def test_other_seeds_do_not_decide(results):
    """Neither trials nor more than there were to be."""
    for seed in (*range(FIRST), SEEDS[-1] + 1):
        results.write(measure(PAPER, PAPER.run("steep"), "small", Job(seed)))
    found = verdict(results, PAPER, claim_of("two"), "small")
    assert list(found.cells[0].figures) == list(SEEDS)


def test_a_run_has_five_seeds_at_least():
    with pytest.raises(ValueError, match="run 'a' has 4 seeds: at least 5"):
        Run("a", "b", lambda job: {}, {}, {}, seeds=4)
