"""Real labels: three systems of OpenAI's GSM8K release on the same 1319 problems, one as turn 1, another as turn 2.

The labels are the `is_correct` of github.com/openai/grade-school-math, commit 3101c7d (MIT), one bit per problem in the
order of the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import scripted

from upturn.evaluation.assemble import Measured, model_study
from upturn.evaluation.compare import Run, compare
from upturn.evaluation.verdicts import verdict

DATA = Path(os.environ.get("UPTURN_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))

PROBLEMS = 1319
FINETUNED_6B = """
    20000250505040c028c0b80842622a418009004042684c210810c120c0c8e04a1165424200012040a020a0204002009a0c02400140424000
    00092200191c2000c630005181a5038808408840310a60d08f008012010700080406c0131090080580d2141340204a50107030240aa00500
    91081a1031045002041010a00804d004c416000a80820422281040c4400081840c9804304212081018400203080108486038142c01
"""
VERIFIED_6B = """
    2d08013450302ae82ec0892ac2e37a059b0d0241476854631a4043afe2c8c8e31166c2c355257047e027a038c80b06ca3d00700d56424926
    82afe344375c924ae75420f1a1ad722828209856537240dc8ec1a3ab8c05008c250bd830326829159ad21f1ac028651050383e28273a47a2
    dd4d9b02b10e99921411b224191cd2a06416203930c21522a81a54560889039d965484524414a4d01b42421191251c89da29316c05
"""
FINETUNED_175B = """
    090031b85053204a58c0ab28c8616661892c024543401c218854c6afeacac0c833e77242782526440037a0a94c4b054a0c0470003a700801
    840902041734b200221420f1a0afe3480a0480d4238268d00f20828e834312ad8002083c28500b0697d018d2c0186d547578422682b88512
    f80d8b20a10c5c82345016393001da2080122821968205a2883b54be0acc030c1a10840042844c590a6a2203996b00aa6abc956489
"""


def right(labels: str) -> list[bool]:
    """One bit per problem."""
    return [bit == "1" for bit in f"{int(''.join(labels.split()), 16):0{PROBLEMS}b}"]


def as_turns(first: str, last: str) -> Measured:
    pairs = zip(right(first), right(last), strict=True)
    chains = [scripted.chain(str(k), "".join("wr"[one] for one in pair)) for k, pair in enumerate(pairs)]
    return Measured("systems", 0, chains)


def hand_count(first: Sequence[bool], last: Sequence[bool]) -> tuple[int, int]:
    better = sum(1 for before, after in zip(first, last, strict=True) if after and not before)
    worse = sum(1 for before, after in zip(first, last, strict=True) if before and not after)
    return better, worse


def test_a_verifier_after_a_small_model_is_a_refinement():
    found = model_study(as_turns(FINETUNED_6B, VERIFIED_6B))
    flips = found.tests[0].flips
    counted = hand_count(right(FINETUNED_6B), right(VERIFIED_6B))
    assert (flips.wrong_to_right, flips.right_to_wrong) == counted == (293, 64)
    assert flips.p_value == pytest.approx(4e-36, rel=0.2)
    assert found.gain
    assert (found.gain.points, found.gain.n) == (pytest.approx(17.36, abs=0.01), PROBLEMS)
    assert (found.gain.low, found.gain.high) == pytest.approx((14.7, 20.0), abs=0.15)
    judged = verdict([found])
    assert judged and judged.kind == "refines"
    assert "turn 2 is right 17.4 points more often than turn 1 (95% interval 14." in judged.sentence


def test_a_larger_model_without_a_verifier_is_a_loss():
    found = model_study(as_turns(VERIFIED_6B, FINETUNED_175B))
    flips = found.tests[0].flips
    counted = hand_count(right(VERIFIED_6B), right(FINETUNED_175B))
    assert (flips.wrong_to_right, flips.right_to_wrong) == counted == (152, 209)
    assert flips.p_value == pytest.approx(0.003, abs=0.0005)
    assert found.gain and found.gain.points == pytest.approx(-4.3, abs=0.05)
    judged = verdict([found])
    assert judged and judged.kind == "harms"


def test_the_same_systems_as_arms_give_the_same_numbers():
    small, large = as_turns(FINETUNED_6B, FINETUNED_6B), as_turns(VERIFIED_6B, VERIFIED_6B)
    found = compare({"6B": [Run(0, "m", small.chain)], "6B verified": [Run(0, "m", large.chain)]})
    last = next(row for row in found.contrasts if row.what == "last turn")
    assert (last.difference.value, last.test) == (pytest.approx(229 / PROBLEMS), "McNemar")
    assert last.p_value == pytest.approx(4e-36, rel=0.2)
    assert (found.arms[0].last.value, found.arms[1].last.value) == (286 / PROBLEMS, 515 / PROBLEMS)


@pytest.mark.skipif(not (DATA / "gsm8k").is_dir(), reason="needs the GSM8K solutions; UPTURN_DATA names their folder")
def test_the_labels_are_those_of_the_data():
    lines = (DATA / "gsm8k" / "solutions_6b_verification.jsonl").read_text().splitlines()
    assert [json.loads(line)["is_correct"] for line in lines] == right(VERIFIED_6B)
