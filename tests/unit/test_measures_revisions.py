"""What refinements did to their drafts, worked by hand on four prompts; words; and the laws of flips and paths."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import CHAIN, chains, patterns

from upturn.evaluation import stats, words
from upturn.evaluation.revisions import corrected, paths, revisions
from upturn.evaluation.turns import transitions


def test_revisions_worked_by_hand():
    one, two, both = revisions(CHAIN)
    assert [(row.first, row.last, row.n) for row in (one, two, both)] == [(1, 2, 4), (2, 3, 4), (1, 3, 4)]
    assert one.fixed and one.broken and two.fixed and two.broken and both.fixed and both.broken
    assert (one.fixed.value, one.fixed.n, one.broken.value, one.broken.n) == (1 / 2, 2, 0, 2)
    assert (two.fixed.value, two.fixed.n, two.broken.value, two.broken.n) == (0, 1, 1 / 3, 3)
    assert (both.fixed.value, both.broken.value) == (1 / 2, 1 / 2)
    assert (one.copied, one.copied_right, one.copied_wrong) == (1 / 2, 1 / 2, 1 / 2)
    assert (two.copied, two.copied_right, two.copied_wrong) == (1 / 2, pytest.approx(1 / 3), 1)
    assert (both.copied, both.copied_right, both.copied_wrong) == (1 / 4, 0, 1 / 2)
    # a: one of three words; b: its only word; c: nothing; d: one of two words is gone
    assert one.edit_distance == pytest.approx((1 / 3 + 1 + 0 + 0) / 4)
    assert two.edit_distance == pytest.approx((0 + 1 + 0 + 1 / 2) / 4)
    assert both.edit_distance == pytest.approx((1 / 3 + 1 + 0 + 1 / 2) / 4)


def test_a_chain_of_two_turns_has_one_revision():
    assert [(row.first, row.last) for row in revisions(chains(["wr"]))] == [(1, 2)]
    only_wrong = revisions(chains(["wr"]))[0]
    assert (only_wrong.broken, only_wrong.copied_right) == (None, None)


def test_paths_worked_by_hand():
    found = [(path.pattern, path.count) for path in paths([*CHAIN, *chains(["wrr", "www", "wrr"])])]
    assert found == [("wrr", 3), ("www", 2), ("rrr", 1), ("rrw", 1)]


def test_tests_are_corrected_over_all_pairs_of_turns():
    rows = transitions(chains(["wrr"] * 9 + ["rrw"] + ["www"] * 5))
    found = corrected(rows)
    assert [test.flips for test in found] == rows
    assert tuple(test.p_holm for test in found) == stats.holm([row.p_value for row in rows])


@given(patterns)
def test_paths_and_flips_count_every_prompt(rows: list[str]):
    attempts = chains(rows)
    assert sum(path.count for path in paths(attempts)) == len(rows)
    for revision, flips in zip(revisions(attempts), [transitions(attempts)[place] for place in (0, 2, 1)], strict=True):
        fixed = revision.fixed.value * revision.fixed.n if revision.fixed else 0
        broken = revision.broken.value * revision.broken.n if revision.broken else 0
        assert (fixed, broken) == pytest.approx((flips.wrong_to_right, flips.right_to_wrong))


# words


def levenshtein(old: list[str], new: list[str]) -> int:
    if not old or not new:
        return len(old) + len(new)
    swap = levenshtein(old[1:], new[1:]) + (old[0] != new[0])
    return min(swap, levenshtein(old[1:], new) + 1, levenshtein(old, new[1:]) + 1)


@given(st.lists(st.sampled_from("abc"), max_size=5), st.lists(st.sampled_from("abc"), max_size=5))
def test_edit_distance_agrees_with_brute_force(old: list[str], new: list[str]):
    expected = levenshtein(old, new) / max(len(old), len(new), 1)
    assert words.edit_distance(" ".join(old), "\n".join(new)) == pytest.approx(expected)


def test_chinese_characters_are_words():
    assert words.words("两个 apples") == ["两", "个", "apples"]
    assert words.edit_distance("二加三", "二加四") == pytest.approx(1 / 3)


def test_distinct_worked_by_hand():
    texts = ["a b a b", "a b"]  # unigrams a b a b a b; bigrams ab ba ab, ab; trigrams aba bab
    assert [words.distinct(texts, n) for n in (1, 2, 3, 5)] == [2 / 6, 2 / 4, 2 / 2, None]
