"""The demo's sums in GSM8K's form: rows, held-out questions, and the functions that judge answers."""

import json

import pytest

from utils.demo import arithmetic
from utils.model.reward_functions import load_reward_functions


def test_rows_are_right_by_pythons_own_arithmetic_and_the_same_for_a_seed():
    rows = arithmetic.arithmetic_rows("train", 400)
    assert rows == arithmetic.arithmetic_rows("train", 500)[:400] != arithmetic.arithmetic_rows("train", 400, seed=1)
    for row in rows:
        first, second, final = row["answer"].split(". ")
        for equation in (first, second):
            left, right = equation.split("=")
            assert eval(left) == int(right) and 0 <= int(right) <= arithmetic.LARGEST
        assert second.startswith(first.split("=")[1]) and final == f"#### {second.split('=')[1]}"
    answers = [row["answer"] for row in rows]
    assert set(arithmetic.exact(answers, answers)) == set(arithmetic.working(answers)) == {1.0}


def test_a_share_of_the_rows_that_teach_has_one_wrong_step_from_which_the_rest_goes_on():
    rows = arithmetic.arithmetic_rows("train", 1000, mistakes=0.3)
    wrong = [
        row for row, right in zip(rows, arithmetic.working([row["answer"] for row in rows]), strict=True) if not right
    ]
    assert 250 <= len(wrong) <= 350
    for row in wrong:
        first, second, final = row["answer"].split(". ")
        off = [eval(left) - int(right) for left, right in (each.split("=") for each in (first, second))]
        assert sorted(map(bool, off)) == [False, True] and max(map(abs, off)) <= 2
        assert second.startswith(first.split("=")[1]) and final == f"#### {second.split('=')[1]}"
        assert "-" not in final


def test_held_out_questions_are_never_trained_on_whatever_the_seed():
    train = {row["question"] for seed in (1, 2) for row in arithmetic.arithmetic_rows("train", 8_000, seed)}
    assert not train & {row["question"] for row in arithmetic.arithmetic_rows("eval", seed=3)}
    with pytest.raises(KeyError):
        arithmetic.arithmetic_rows("test")


@pytest.mark.parametrize(
    "said, right",
    [
        ("12+5=17. #### 17", True),
        ("#### 17.0", True),
        ("so #### 3, no: ####17", True),
        ("17", False),
        ("#### 171", False),
        ("#### -17", False),
        ("#### 17 no, #### 3", False),
        ("", False),
    ],
)
def test_the_final_number_decides_and_nothing_else(said, right):
    assert arithmetic.exact([said], ["12+5=17. #### 17"]) == [float(right)]


def test_gsm8ks_own_answers_are_read():
    row = "He sold 1,000*2 = <<1000*2=2000>>2000 eggs.\n#### 2,000"
    assert arithmetic.final_number(row) == 2000 and arithmetic.exact(["#### 2000"], [row]) == [1.0]


def test_the_working_is_true_where_each_equation_is():
    said = ["12+5=17. 17-8=9. #### 9", "12+5=16. 16-8=8. #### 9", "#### 9", "9 - 3 = 6"]
    assert arithmetic.working(said) == [1.0, 0.0, 0.0, 1.0]


def test_its_file_is_one_of_reward_functions_and_its_program_writes_both_splits(monkeypatch, tmp_path):
    (function,) = load_reward_functions([f"{arithmetic.__file__}:exact"])
    assert function.wants() == ("answer",)
    assert function([""], ["#### 4"], [{"answer": "#### 4"}]) == [1.0]
    monkeypatch.setattr("sys.argv", ["arithmetic", "--output", str(tmp_path), "--rows", "70"])
    arithmetic.main()
    for folder, mistakes in (("taught", 0.4), ("asked", 0.0)):
        for split, size in (("train", 70), ("eval", arithmetic.SIZES["eval"])):
            lines = (tmp_path / folder / f"{split}.jsonl").read_text().splitlines()
            assert [json.loads(line) for line in lines] == arithmetic.arithmetic_rows(split, size, mistakes=mistakes)
    assert (
        0
        < sum(arithmetic.working([row["answer"] for row in arithmetic.arithmetic_rows("train", 70, mistakes=0.4)]))
        < 70
    )
