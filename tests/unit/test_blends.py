"""Several datasets as one: whose rows are used, in which order, and what is said of them."""

import json
from collections import Counter

import numpy as np
import pytest
from helpers import make_tokenizer

from utils.data.encoding import REWARD, SFT, TokenRules
from utils.data.preparation import DataRequest, create_prompt_dataset, prepare_datasets, rows_of_blend
from utils.data.sources import DataSource
from utils.data.split_index import get_shuffle_idx
from utils.process.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write(folder, name, train=60, evaluation=30, answer="yes", bad=()):
    """A folder of rows that tell their dataset and number; the answers of the rows in ``bad`` are missing."""
    (folder / name).mkdir(parents=True)
    for split, count in (("train", train), ("eval", evaluation)):
        rows = [
            {
                "prompt": f" Human: {name} {i} Assistant:",
                "chosen": None if i in bad else f" {answer}",
                "rejected": " no",
            }
            for i in range(count)
        ]
        (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def prepare(folder, tokenizer, paths, step=SFT, **options):
    shares = options.pop("data_split", "1,1,1")
    return create_prompt_dataset(0, paths, shares, folder / "cache", step, 1, tokenizer, 64, **options)


def prepare_sources(folder, tokenizer, sources, **options):
    return prepare_datasets(DataRequest(TokenRules(SFT, 64), sources, folder / "cache", 1, **options), tokenizer)


def texts(dataset, tokenizer):
    """(name, number) of every row, in order."""
    ids = [dataset[i].get("input_ids") or dataset[i]["chosen_ids"] for i in range(len(dataset))]
    words = [tokenizer.decode(row, skip_special_tokens=True).split("Human: ")[1].split(" Assistant") for row in ids]
    return [tuple(text[0].split(" ", 1)) for text in words]


def names(dataset, tokenizer):
    return Counter(name for name, _ in texts(dataset, tokenizer))


@pytest.mark.parametrize("step", [SFT, REWARD])
def test_limits_draw_from_the_whole_blend(tmp_path, tokenizer, step, capsys):
    paths = [write(tmp_path, "a", 60, 30), write(tmp_path, "b", 120, 30)]
    train, evaluation = prepare(tmp_path, tokenizer, paths, step, max_train_samples=15, max_eval_samples=8)
    assert (len(train), len(evaluation)) == (15, 8)
    counts, told = names(train, tokenizer), capsys.readouterr().out
    assert set(counts) == {"a", "b"} == set(names(evaluation, tokenizer))
    assert f"data (train): a blend of 15 rows, limited to 15: {counts['a']} of {paths[0]}, {counts['b']} of" in told
    assert f"{paths[0]}: {counts['a']} of 60 rows used (share {step} of --data_split 1,1,1: 20; limited to" in told
    again = prepare(tmp_path, tokenizer, paths, step, max_train_samples=15, max_eval_samples=8, reload=True)
    assert list(again[0]) == list(train) and list(again[1]) == list(evaluation)


def test_the_first_rows_of_a_blend_are_a_sample_of_all_and_lengths_follow(tmp_path, tokenizer):
    paths = [write(tmp_path, "a", answer="yes yes yes yes"), write(tmp_path, "b"), write(tmp_path, "c")]
    for dataset in prepare(tmp_path, tokenizer, paths, data_split="1,0,0"):
        order = [name for name, _ in texts(dataset, tokenizer)]
        assert set(order[:20]) == set("abc") and sorted(order) != order
        assert dataset.lengths.tolist() == [len(dataset[i]["input_ids"]) for i in range(len(dataset))]
        assert Counter(texts(dataset, tokenizer)).most_common(1)[0][1] == 1


def test_one_dataset_keeps_its_order_with_and_without_a_limit(tmp_path, tokenizer):
    path = write(tmp_path, "a")
    expected = [("a", str(i)) for i in get_shuffle_idx(1, 60)[:20]]
    whole, _ = prepare(tmp_path, tokenizer, [path])
    limited, _ = prepare(tmp_path, tokenizer, [path], max_train_samples=7)
    assert texts(whole, tokenizer) == expected
    assert texts(limited, tokenizer) == expected[:7]
    used_whole, _ = prepare(tmp_path, tokenizer, [], sft_only_data_path=[path], max_train_samples=7)
    assert texts(used_whole, tokenizer) == [("a", str(i)) for i in range(7)]


def test_rows_that_are_skipped_do_not_shrink_a_limit(tmp_path, tokenizer, capsys):
    share = get_shuffle_idx(1, 60)[:20].tolist()
    path = write(tmp_path, "a", bad=share[0:9:2])
    train, _ = prepare(tmp_path, tokenizer, [path], max_train_samples=10)
    usable = [i for i in share if i not in share[0:9:2]]
    assert texts(train, tokenizer) == [("a", str(i)) for i in usable[:10]]
    told = capsys.readouterr().out
    assert (
        "10 of 60 rows used (share 1 of --data_split 1,1,1: 20; limited to 10), 5 skipped: 5 x field 'chosen'" in told
    )


def test_a_limit_counts_pairs_that_are_left_when_identical_ones_are_dropped(tmp_path, tokenizer, capsys):
    path = write(tmp_path, "a", answer="no")
    rows = [json.loads(line) for line in (tmp_path / "a/train.jsonl").read_text().splitlines()]
    rows = [row | {"chosen": " yes"} if i % 2 else row for i, row in enumerate(rows)]
    (tmp_path / "a/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a/eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, _ = prepare(tmp_path, tokenizer, [path], REWARD, data_split="0,1,0", max_train_samples=20)
    assert len(train) == 20
    assert f"{path}: 20 of 60 rows used" in capsys.readouterr().out


def test_a_dataset_without_shares_is_shuffled_before_a_blend_cuts_it(tmp_path, tokenizer):
    paths = [write(tmp_path, "a"), write(tmp_path, "b")]
    train, evaluation = prepare(tmp_path, tokenizer, paths[:1], sft_only_data_path=paths[1:], max_train_samples=20)
    numbers = sorted(int(number) for name, number in texts(train, tokenizer) if name == "b")
    assert len(numbers) > 5 and numbers != list(range(len(numbers)))
    assert len(evaluation) == 10 + 30


def test_other_datasets_fill_the_place_of_rows_that_cannot_be_used(tmp_path, tokenizer):
    paths = [write(tmp_path, "a", bad=range(1, 60)), write(tmp_path, "b", 90)]
    train, _ = prepare(tmp_path, tokenizer, paths, data_split="1,0,0", max_train_samples=88)
    assert names(train, tokenizer) == {"a": 1, "b": 87}


def test_a_dataset_of_which_no_row_is_used_is_named(tmp_path, tokenizer, capsys):
    paths = [write(tmp_path, "few", 3), write(tmp_path, "many", 300)]
    train, _ = prepare(tmp_path, tokenizer, paths, data_split="1,9,9", max_train_samples=5)
    assert names(train, tokenizer) == {"many": 5}
    assert f"WARNING: {paths[0]} is named, and not one row of it is used" in capsys.readouterr().out


def test_a_file_without_evaluation_split_says_where_its_rows_went(tmp_path, tokenizer, capsys):
    write(tmp_path, "a", 30)
    prepare(tmp_path, tokenizer, [str(tmp_path / "a/train.jsonl")], data_split="2,4,4")
    told = capsys.readouterr().out
    origin = "as there is no evaluation split; share 1 of --data_split 2,4,4"
    assert f"5 of 30 rows used (27 to train on, {origin}: 5)" in told
    assert f"1 of 30 rows used (3 to evaluate with, {origin}: 1)" in told


def test_the_usual_shares_of_a_file_that_step_2_cannot_read_are_spoken_of(tmp_path, tokenizer, capsys):
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"question": f"what is {i}?", "answer": "a number"}) + "\n" for i in range(30)))
    pairs = write(tmp_path, "pairs")
    for path, split, told in ((file, "2,4,4", True), (file, "1,0,0", False), (pairs, "2,4,4", False)):
        prepare(tmp_path, tokenizer, [str(path)], data_split=split)
        assert ("--data_split 1,0,0 gives step 1 all of the rows" in capsys.readouterr().out) == told


def test_weights_give_the_most_rows_that_hold_the_proportions(tmp_path, tokenizer, capsys):
    assert rows_of_blend([100, 100], [1, 3], None, 0) == [33, 100]
    assert rows_of_blend([100, 100], [0.1, 0.1], None, 0) == [100, 100]
    assert rows_of_blend([100, 100, 100], [1, 1, 1], 100, 0) in ([34, 33, 33], [33, 34, 33], [33, 33, 34])
    assert rows_of_blend([0, 9], [1, 1], None, 0) == [0, 9] and rows_of_blend([0, 0], [1, 1], None, 0) == [0, 0]
    assert rows_of_blend([6, 0, 9], [2, 5, 1], 6, 0) == [4, 0, 2]
    paths = [write(tmp_path, "a", bad=range(0, 60, 2)), write(tmp_path, "b")]
    sources = [DataSource(path, weight=weight) for path, weight in zip(paths, (2, 1), strict=True)]
    train, _ = prepare_sources(tmp_path, tokenizer, sources)
    assert names(train, tokenizer) == {"a": 30, "b": 15}
    assert f"{paths[1]}: 30 of 60 rows used (limited to 30); of these rows only 15 fit" in capsys.readouterr().out
    train, _ = prepare_sources(tmp_path, tokenizer, sources, max_train_samples=9)
    assert names(train, tokenizer) == {"a": 6, "b": 3}


def test_max_rows_cut_a_dataset_to_a_sample_of_its_own(tmp_path, tokenizer):
    paths = [write(tmp_path, "a"), write(tmp_path, "b")]
    train, _ = prepare_sources(tmp_path, tokenizer, [DataSource(paths[0], max_rows=5), DataSource(paths[1])])
    assert names(train, tokenizer) == {"a": 5, "b": 60}
    assert {int(number) for name, number in texts(train, tokenizer) if name == "a"} != set(range(5))
    train, _ = prepare_sources(tmp_path, tokenizer, [DataSource(paths[0], max_rows=9)], max_train_samples=5)
    assert names(train, tokenizer) == {"a": 5}


def test_a_seeded_draw_takes_each_row_at_the_same_odds():
    sizes = [1000, 3000, 0, 6000]
    counts = np.array([rows_of_blend(sizes, None, 500, seed) for seed in range(40)])
    assert (counts.sum(1) == 500).all() and (counts[:, 2] == 0).all()
    assert np.abs(counts.mean(0) - [50, 150, 0, 300]).max() < 8
    assert rows_of_blend(sizes, None, 10_000, 0) == sizes


def test_a_dataset_without_an_evaluation_row_has_no_part_in_the_proportions(tmp_path, tokenizer, capsys):
    paths = [write(tmp_path, "a", 200), write(tmp_path, "b", 4)]
    for path in paths:
        (tmp_path / path / "eval.jsonl").unlink()
    sources = [DataSource(path, weight=1) for path in paths]
    train, evaluation = prepare_sources(tmp_path, tokenizer, sources)
    assert names(train, tokenizer) == {"a": 4, "b": 4} and names(evaluation, tokenizer) == {"a": 20}
    told = capsys.readouterr().out
    assert f"data (eval): WARNING: {paths[1]} is named, and not one row of it is used" in told
    assert "a is named" not in told


def test_a_weight_that_cannot_be_held_is_refused_with_its_dataset_alone(tmp_path, tokenizer):
    paths = [write(tmp_path, "a", 200), write(tmp_path, "few", 4)]
    sources = [DataSource(path, weight=1, data_split="1,9,9") for path in paths]
    message = r"no train row is left for step 1 of \S+/few: 0 of 4 rows used \(share 1 of --data_split 1,9,9: 0\)"
    with pytest.raises(UserError, match=message) as caught:
        prepare_sources(tmp_path, tokenizer, sources)
    assert "/a:" not in str(caught.value)


def pairs_alike(folder, name, **options):
    """Pairs that differ in nothing but what right truncation cuts off."""
    path = write(folder, name, answer="no " + "yes " * 90 + "red", **options)
    for split in ("train", "eval"):
        file = folder / name / f"{split}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        same = [row | {"rejected": row["chosen"].replace("red", "blue")} for row in rows]
        file.write_text("".join(json.dumps(row) + "\n" for row in same))
    return path


def test_why_no_row_is_left_is_said_without_shares_that_have_nothing_to_do_with_it(tmp_path, tokenizer):
    path = pairs_alike(tmp_path, "alike", train=6, evaluation=4)
    rules = TokenRules(REWARD, 16, truncation_side="right")
    with pytest.raises(UserError, match=r"no train row is left for step 2 of \S+alike: .*6 pairs dropped") as caught:
        prepare_datasets(DataRequest(rules, [DataSource(path)], tmp_path / "cache", 1), tokenizer)
    assert "--max_seq_len" in str(caught.value) and "data_split" not in str(caught.value)
    with pytest.raises(UserError, match=r"1 of --data_split 0,1,1: 0\) \(--data_split 0,1,1 leaves this step too"):
        prepare(tmp_path, tokenizer, [write(tmp_path, "whole")], data_split="0,1,1")
    with pytest.raises(UserError, match=r"no eval row .*0 of 2 rows used .*\(it has too few rows to set some aside\)"):
        file = f"{write(tmp_path, 'two', 2)}/train.jsonl"
        prepare_sources(tmp_path, tokenizer, [DataSource(file)])


def test_evaluation_rows_that_cannot_be_used_end_a_run_only_where_no_other_dataset_has_some(
    tmp_path, tokenizer, capsys
):
    paths = [write(tmp_path, "a"), write(tmp_path, "b", evaluation=5)]
    broken = tmp_path / "b/eval.jsonl"
    broken.write_text(broken.read_text().replace('" yes"', "null"))
    for options in ({}, {"max_eval_samples": 7}, {"weights": (1, 3)}):
        weights = options.pop("weights", (None, None))
        sources = [DataSource(path, weight=weight) for path, weight in zip(paths, weights, strict=True)]
        train, evaluation = prepare_sources(tmp_path, tokenizer, sources, **options)
        assert set(names(train, tokenizer)) == {"a", "b"} and set(names(evaluation, tokenizer)) == {"a"}
        told = capsys.readouterr().out
        assert f"data (eval): WARNING: {paths[1]} is named, and not one row of it is used" in told
        assert "5 skipped: 5 x field 'chosen' is null" in told
    with pytest.raises(UserError, match=r"no eval row is left for step 1 of \S+/b: .*5 x field 'chosen' is null"):
        prepare_sources(tmp_path, tokenizer, sources[1:])
