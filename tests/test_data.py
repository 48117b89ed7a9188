"""From rows to batches: the split rule, EOS and masks, truncation, the cache, the order of batches."""

import json
from itertools import chain

import numpy as np
import pytest
from conftest import make_tokenizer, write_pairs

from utils.data import data_utils
from utils.data.data_utils import (
    FILLER,
    REWARD,
    RLHF,
    SFT,
    DataCollatorReward,
    DataCollatorRLHF,
    DataCollatorSFT,
    MiniDataset,
    StepBatchSampler,
    accumulation_windows,
    create_prompt_dataset,
    fit,
    get_raw_dataset_split_index,
    get_shuffle_idx,
    prompt_tokens_to_drop,
    split_boundaries,
)
from utils.distributed import UserError
from utils.utils import load_hf_tokenizer

# ------------------------------------------------------------------ split


def test_shuffled_indices_are_the_published_ones():
    expected = np.arange(10, dtype=np.uint32)
    np.random.RandomState(seed=1234).shuffle(expected)
    got = get_shuffle_idx(1234, 10)
    assert got.dtype == np.uint32
    assert got.tolist() == expected.tolist() == [7, 2, 9, 1, 0, 8, 4, 5, 6, 3]


@pytest.mark.parametrize(
    ("shares", "size", "boundaries"),
    [
        ("2,4,4", 10, [0, 2, 6, 10]),
        ("1,1,1", 10, [0, 4, 7, 10]),  # 3 + 3 + 3 = 9: the slack of -1 moves every boundary but the first
        ("1,1,1", 11, [0, 3, 7, 11]),  # 4 + 4 + 4 = 12: the slack of 1
        ("10,0,0", 7, [0, 7, 7, 7]),
        ("0,1,1", 3, [0, 0, 1, 3]),  # 0, 0 + 2, 4: the rule alone would start the second share at -1
        ("9,1", 100, [0, 90, 100]),
    ],
)
def test_boundaries_follow_the_published_rule_and_never_step_back(shares, size, boundaries):
    assert split_boundaries(shares, size) == boundaries


@pytest.mark.parametrize("shares", ["2,4,4", "0,5,5", "1,0,0", "3,3,3", "0.2,0.4,0.4"])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 100, 1001])
def test_shares_never_overlap_and_lose_nothing(tmp_path, shares, size):
    parts = [get_raw_dataset_split_index(0, tmp_path, "x", 7, "train", shares, i, size) for i in range(3)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(size))


def test_one_npy_file_per_share_records_the_indices_and_a_stale_one_is_replaced(tmp_path):
    file = tmp_path / "x_seed7_train_2,4,4_0.npy"
    get_raw_dataset_split_index(0, tmp_path, "x", 7, "train", "2,4,4", 0, 10)
    assert len(np.load(file)) == 2
    assert len(list(tmp_path.glob("*.npy"))) == 3
    assert len(get_raw_dataset_split_index(0, tmp_path, "x", 7, "train", "2,4,4", 0, 100)) == 20
    assert len(np.load(file)) == 20


@pytest.mark.parametrize("shares", ["", "a,b", "0,0,0", "-1,2"])
def test_a_senseless_split_is_refused(shares):
    with pytest.raises(UserError, match="data_split"):
        split_boundaries(shares, 10)


# ------------------------------------------------------------------ ids


def test_a_finished_answer_ends_with_exactly_one_eos_and_a_long_prompt_loses_its_beginning():
    bos, eos = 1, 2
    ids = [bos, 10, 11, 12, 13, 20, 21]  # four prompt tokens after bos, two of answer
    assert fit(ids, 5, eos, 8, 1, prompt_tokens_to_drop(8, 5, 8, 1)) == ([*ids, eos], 5, False)
    assert fit(ids, 5, eos, 6, 1, prompt_tokens_to_drop(8, 5, 6, 1)) == ([bos, 12, 13, 20, 21, eos], 3, True)
    # The published way: the end goes, and the EOS with it.
    assert fit(ids, 5, eos, 6) == ([bos, 10, 11, 12, 13, 20], 5, True)


def test_an_answer_that_alone_is_too_long_is_cut_without_eos_and_keeps_its_question():
    ids = [1, 10, 11, *range(20, 40)]
    kept, prompt_length, was_cut = fit(ids, 3, 2, 8, 1, prompt_tokens_to_drop(len(ids) + 1, 3, 8, 1))
    assert kept == [1, 10, 11, 20, 21, 22, 23, 24]
    assert (prompt_length, was_cut) == (3, True)


def _dataset(tmp_path, tokenizer, step, max_len=64, rows=None, **options):
    folder = tmp_path / "data"
    folder.mkdir(exist_ok=True)
    if rows is None:
        write_pairs(folder / "train.jsonl", 20)
        write_pairs(folder / "eval.jsonl", 10)
    else:
        for name in ("train", "eval"):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return create_prompt_dataset(
        0, [str(folder)], options.pop("data_split", "1,1,1"), tmp_path / "cache", step, 1, tokenizer, max_len, **options
    )


@pytest.mark.parametrize("pad", ["<pad>", "</s>", None])
def test_eos_is_in_ids_mask_and_labels_for_every_kind_of_pad_token(tmp_path, pad):
    make_tokenizer(tmp_path / "t", pad=pad)
    tokenizer = load_hf_tokenizer(tmp_path / "t")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    train, _ = _dataset(tmp_path, tokenizer, SFT)
    row = train[0]
    assert row["input_ids"].count(tokenizer.eos_token_id) == 1
    assert row["input_ids"][-1] == tokenizer.eos_token_id
    batch = DataCollatorSFT(tokenizer.pad_token_id, 64)([train[i] for i in range(4)])
    for i in range(4):
        length = len(train[i]["input_ids"])
        assert batch["attention_mask"][i].sum() == length
        assert batch["labels"][i, length - 1] == tokenizer.eos_token_id
        assert (batch["labels"][i, length:] == -100).all()
        assert (batch["labels"][i, :length] != -100).all()
    assert batch["input_ids"].shape[1] % 8 == 0


def test_masked_prompts_leave_exactly_the_answer_and_its_eos(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "t")
    train, _ = _dataset(tmp_path, tokenizer, SFT)
    batch = DataCollatorSFT(tokenizer.pad_token_id, 64, mask_prompt=True)([train[0]])
    learned = batch["labels"][0][batch["labels"][0] != -100].tolist()
    text = tokenizer.decode(train[0]["input_ids"][: train[0]["prompt_length"]], skip_special_tokens=True)
    assert text.endswith("Assistant:")
    assert tokenizer.decode(learned, skip_special_tokens=True).endswith(", thanks.")
    assert learned[-1] == tokenizer.eos_token_id


def test_pairs_share_their_prompt_tokens_and_identical_ones_are_dropped(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "t")
    rows = [
        {
            "prompt": " Human: say red red red red Assistant:",
            "chosen": " red",
            "rejected": " red, please, please, please.",
        }
    ]
    rows += [{"prompt": " Human: hi Assistant:", "chosen": " same", "rejected": " same"}]
    rows += [{"prompt": " Human: hi Assistant:", "chosen": " yes", "rejected": None}]
    train, _ = _dataset(tmp_path, tokenizer, REWARD, max_len=24, rows=rows * 4, data_split="0,1,0")
    assert len(train) == 4
    chosen, rejected, prompt = (train[0][name] for name in ("chosen_ids", "rejected_ids", "prompt_length"))
    assert chosen[:prompt] == rejected[:prompt]
    assert chosen[0] == tokenizer.bos_token_id
    assert chosen[-1] == rejected[-1] == tokenizer.eos_token_id
    assert max(len(chosen), len(rejected)) <= 24
    batch = DataCollatorReward(tokenizer.pad_token_id, 24)([train[0], FILLER])
    assert batch["input_ids"].shape[0] == 4
    assert batch["pair_weights"].tolist() == [1.0, 0.0]


def test_prompts_are_padded_on_the_left_and_a_long_one_keeps_its_question(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "t")
    train, _ = _dataset(tmp_path, tokenizer, RLHF, max_len=6)
    assert all(len(train[i]["input_ids"]) <= 6 for i in range(len(train)))
    assert tokenizer.decode(train[0]["input_ids"]).endswith("Assistant:")
    batch = DataCollatorRLHF(tokenizer.pad_token_id, 6)([{"input_ids": [5]}, {"input_ids": [6, 7, 8]}])
    assert batch["prompt_att_mask"].tolist() == [[0] * 7 + [1], [0] * 5 + [1] * 3]
    assert batch["prompt"][1, -3:].tolist() == [6, 7, 8]


# ------------------------------------------------------------------ cache


def test_the_cache_is_reused_for_equal_content_and_rebuilt_for_changed_content(tmp_path, monkeypatch):
    tokenizer = make_tokenizer(tmp_path / "t")
    calls = []
    original = data_utils.create_dataset_split
    monkeypatch.setattr(data_utils, "create_dataset_split", lambda *a: calls.append(1) or original(*a))
    first, _ = _dataset(tmp_path, tokenizer, SFT)
    assert len(calls) == 2
    again, _ = _dataset(tmp_path, tokenizer, SFT)
    assert len(calls) == 2
    assert [first[i] for i in range(len(first))] == [again[i] for i in range(len(again))]
    _dataset(tmp_path, tokenizer, SFT, max_len=32)
    assert len(calls) == 4
    _dataset(tmp_path, tokenizer, SFT, reload=True)
    assert len(calls) == 6
    rows = [{"prompt": " Human: new Assistant:", "chosen": " new", "rejected": " no"}] * 6
    changed, _ = _dataset(tmp_path, tokenizer, SFT, rows=rows)
    assert len(calls) == 8
    assert "new" in tokenizer.decode(changed[0]["input_ids"])
    assert not list((tmp_path / "cache").rglob(".*"))


def test_a_failed_preparation_leaves_no_file_that_a_next_run_trusts(tmp_path, monkeypatch):
    tokenizer = make_tokenizer(tmp_path / "t")

    def explode(self, rows, positions):
        raise OSError("disk full")

    monkeypatch.setattr(data_utils.RowEncoder, "encode", explode)
    with pytest.raises(UserError, match="disk full"):
        _dataset(tmp_path, tokenizer, SFT)
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    monkeypatch.undo()
    assert len(_dataset(tmp_path, tokenizer, SFT)[0]) > 0


# ------------------------------------------------------------------ order


def _epoch(world, monkeypatch, rows=37, micro=4, accumulation=2, epoch=0, grouped=True):
    """Rows of each optimizer step, over all ranks of a world."""
    lengths = np.random.default_rng(0).integers(1, 50, rows)
    monkeypatch.setattr(data_utils, "get_world_size", lambda: world)
    per_rank = []
    for rank in range(world):
        monkeypatch.setattr(data_utils, "get_rank", lambda rank=rank: rank)
        sampler = StepBatchSampler(lengths, micro // world, accumulation, seed=3, group_by_length=grouped)
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        per_rank.append([list(chain.from_iterable(window)) for window in accumulation_windows(batches, accumulation)])
    return [
        sorted(r for rank in range(world) for r in per_rank[rank][s] if r is not FILLER)
        for s in range(len(per_rank[0]))
    ]


@pytest.mark.parametrize("grouped", [False, True])
def test_every_world_size_sees_the_same_rows_in_the_same_step_and_each_row_once(monkeypatch, grouped):
    one, two, four = (_epoch(world, monkeypatch, grouped=grouped) for world in (1, 2, 4))
    assert one == two == four
    assert sorted(chain.from_iterable(one)) == list(range(37))
    assert _epoch(1, monkeypatch, epoch=1, grouped=grouped) != one


def test_grouping_by_length_saves_padding():
    lengths = np.random.default_rng(0).integers(1, 200, 1000)

    def padded(grouped):
        sampler = StepBatchSampler(lengths, 8, seed=0, group_by_length=grouped)
        return sum(len(batch) * max(lengths[i] for i in batch) for batch in sampler)

    assert padded(True) < 0.7 * padded(False)


def test_mini_dataset_hands_out_what_it_collected():
    mini = MiniDataset(2, 2)
    assert mini.add({"x": np.arange(4)}) is None
    batches = mini.add({"x": np.arange(4, 8)})
    assert [batch["x"].tolist() for batch in batches] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert mini.add([1, 2, 3]) is None
