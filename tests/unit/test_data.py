"""From rows to batches: the split rule, EOS and masks, truncation, the cache, the order of batches."""

import functools
import json
from itertools import chain

import numpy as np
import pytest
from helpers import make_model, make_tokenizer, write_pairs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from utils.data import batching, preparation
from utils.data.batching import (
    FILLER,
    DataCollatorPacked,
    DataCollatorReward,
    DataCollatorRLHF,
    DataCollatorSFT,
    MiniDataset,
    PackedDataset,
    StepBatchSampler,
    accumulation_windows,
    count_batch,
    pad_rows,
)
from utils.data.encoding import REWARD, RLHF, SFT, RowEncoder, cut, moved_spans, prompt_tokens_to_drop
from utils.data.preparation import create_prompt_dataset
from utils.data.split_index import get_raw_dataset_split_index, get_shuffle_idx, split_boundaries
from utils.data.text_encoder import TextEncoder
from utils.model.tokenizer import load_hf_tokenizer
from utils.process.errors import UserError

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
    ids = [*ids, eos]
    assert prompt_tokens_to_drop(8, 5, 8, 1) == 0
    assert prompt_tokens_to_drop(8, 5, 6, 1) == 2
    assert cut(ids, 6, 1, 2) == [bos, 12, 13, 20, 21, eos]
    assert moved_spans([(5, 8)], 1, 2, 6) == [(3, 6)]
    # The published way: the end goes, and the EOS with it.
    assert cut(ids, 6) == [bos, 10, 11, 12, 13, 20]


def test_an_answer_that_alone_is_too_long_is_cut_without_eos_and_keeps_its_question():
    ids = [1, 10, 11, *range(20, 40), 2]
    assert cut(ids, 8, 1, prompt_tokens_to_drop(len(ids), 3, 8, 1)) == [1, 10, 11, 20, 21, 22, 23, 24]


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
    text = tokenizer.decode(train[0]["input_ids"][: train[0]["answer_spans"][0]], skip_special_tokens=True)
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
    batch = DataCollatorRLHF(6, pad_token_id=tokenizer.pad_token_id)([{"input_ids": [5]}, {"input_ids": [6, 7, 8]}])
    assert batch["prompt_att_mask"].tolist() == [[0] * 7 + [1], [0] * 5 + [1] * 3]
    assert batch["prompt"][1, -3:].tolist() == [6, 7, 8]


# ------------------------------------------------------------------ cache


def test_the_cache_is_reused_for_equal_content_and_rebuilt_for_changed_content(tmp_path, monkeypatch):
    tokenizer = make_tokenizer(tmp_path / "t")
    calls = []
    original = preparation.encode_rows
    monkeypatch.setattr(preparation, "encode_rows", lambda *a: calls.append(1) or original(*a))
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

    monkeypatch.setattr(RowEncoder, "read", explode)
    with pytest.raises(UserError, match="disk full"):
        _dataset(tmp_path, tokenizer, SFT)
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    monkeypatch.undo()
    assert len(_dataset(tmp_path, tokenizer, SFT)[0]) > 0


# ------------------------------------------------------------------ order


def _epoch(world, monkeypatch, rows=37, micro=4, accumulation=2, epoch=0, grouped=True):
    """Rows of each optimizer step, over all ranks of a world."""
    lengths = np.random.default_rng(0).integers(1, 50, rows)
    monkeypatch.setattr(batching, "get_world_size", lambda: world)
    per_rank = []
    for rank in range(world):
        monkeypatch.setattr(batching, "get_rank", lambda rank=rank: rank)
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


# ------------------------------------------------------------------ conversations


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = [
    {"role": "user", "content": "say red"},
    {"role": "assistant", "content": "red"},
    {"role": "user", "content": "say blue, please"},
    {"role": "assistant", "content": "blue blue"},
]


def test_a_conversation_is_one_text_in_every_step_and_each_answer_is_learned_with_its_end(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "t")
    rows = [{"messages": TURNS}] * 3
    row = _dataset(tmp_path, tokenizer, SFT, rows=rows, data_split="1,0,0")[0][0]
    text = " Human: say red Assistant: red Human: say blue, please Assistant: blue blue"
    eos = tokenizer.eos_token_id
    assert row["input_ids"] == [*tokenizer(text)["input_ids"], eos]
    labels = DataCollatorSFT(tokenizer.pad_token_id, 64)([row])["labels"][0].tolist()
    first, second = (
        len(tokenizer(text[: text.index(f"{answer}")])["input_ids"]) for answer in (" red Human", " blue b")
    )
    red, blue = (tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in (" red", " blue blue"))
    expected = [-100] * len(labels)
    # The answer in the middle is followed by a question, and yet the model is to end there.
    expected[first : first + len(red) + 1] = [*red, eos]
    expected[second : second + len(blue) + 1] = [*blue, eos]
    assert labels == expected
    prompt = _dataset(tmp_path, tokenizer, RLHF, rows=rows, data_split="0,0,1")[0][0]["input_ids"]
    assert prompt == row["input_ids"][:second]


def test_the_published_form_of_a_conversation_reads_as_messages(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "t")
    rows = [{"conversation": [{"human": "qqq", "assistant": "aa"}]}] * 3
    row = _dataset(tmp_path, tokenizer, SFT, rows=rows, data_split="1,0,0")[0][0]
    assert tokenizer.decode(row["input_ids"]) == "<s> Human: qqq Assistant: aa</s>"
    start, end = row["answer_spans"]
    assert tokenizer.decode(row["input_ids"][start:end]) == " aa</s>" and row["answers_only"]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_chat_templates_learn_answers_and_their_end_of_turn_with_and_without_markers(tmp_path, template):
    tokenizer = make_tokenizer(tmp_path / "t")
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = template
    train, _ = _dataset(
        tmp_path, tokenizer, SFT, rows=[{"messages": TURNS}] * 3, data_split="1,0,0", chat_template=True
    )
    row = train[0]
    rendered = tokenizer.apply_chat_template(TURNS, return_dict=True)["input_ids"]
    assert row["input_ids"] == rendered[: len(row["input_ids"])]
    assert row["input_ids"][-1] == tokenizer.eos_token_id
    labels = DataCollatorSFT(tokenizer.pad_token_id, 64)([row])["labels"][0]
    assert tokenizer.decode(labels[labels != -100]) == "red<|im_end|>blue blue<|im_end|>"
    if template is MARKED:
        own = tokenizer.apply_chat_template(TURNS, return_dict=True, return_assistant_tokens_mask=True)
        assert (labels[: len(rendered) - 1] != -100).long().tolist() == own["assistant_masks"][: len(rendered) - 1]


def test_pairs_go_through_the_chat_template_when_asked(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "t")
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    train, _ = _dataset(tmp_path, tokenizer, REWARD, chat_template=True)
    text = tokenizer.decode(train[0]["chosen_ids"])
    assert text.startswith("<|im_start|>user\nsay ")
    assert text.endswith(", thanks.<|im_end|>")
    prompts, _ = _dataset(tmp_path, tokenizer, RLHF, chat_template=True)
    assert tokenizer.decode(prompts[0]["input_ids"]).endswith("<|im_start|>assistant\n")
    assert "Human" not in tokenizer.decode(prompts[0]["input_ids"])


@pytest.mark.parametrize("template", [False, True])
def test_a_long_conversation_loses_its_oldest_turns_whole_and_keeps_its_head(tmp_path, template):
    tokenizer = make_tokenizer(tmp_path / "t")
    if template:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.chat_template = "{{ bos_token }}" + CHATML
    system = {"role": "system", "content": "please"}
    rows = [{"messages": [system, *TURNS * 4]}] * 3
    whole = _dataset(
        tmp_path, tokenizer, SFT, rows=[{"messages": [system, *TURNS]}] * 3, max_len=99, chat_template=template
    )
    expected = whole[0][0]["input_ids"]
    for room in (0, 3):  # tokens that the oldest turns would leave free
        train, _ = _dataset(
            tmp_path,
            tokenizer,
            SFT,
            rows=rows,
            data_split="1,0,0",
            max_len=len(expected) + room,
            chat_template=template,
        )
        assert train[0]["input_ids"] == expected
    # A question that alone is too long loses its beginning, behind the head.
    rows = [{"messages": [system, {"role": "user", "content": "cat " * 50 + "dog"}, TURNS[1]]}] * 3
    train, _ = _dataset(tmp_path, tokenizer, SFT, rows=rows, data_split="1,0,0", max_len=40, chat_template=template)
    text = tokenizer.decode(train[0]["input_ids"])
    head = "<s><|im_start|>system\nplease<|im_end|>\n<|im_start|>user\n" if template else "<s> please Human:"
    assert text.startswith(head) and " dog" in text and len(train[0]["input_ids"]) == 40
    assert text.endswith("red<|im_end|>" if template else " Assistant: red</s>")


def test_columns_can_be_named(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "t")
    rows = [{"question": " Human: a Assistant:", "good": " yes", "bad": " no"}] * 6
    names = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    train, _ = _dataset(tmp_path, tokenizer, REWARD, rows=rows, columns=names)
    assert tokenizer.decode(train[0]["chosen_ids"], skip_special_tokens=True) == " Human: a Assistant: yes"


# ------------------------------------------------------------------ packing


class _Rows(list):
    @property
    def lengths(self):
        return np.array([len(row["input_ids"]) for row in self])


def _random_rows(count, longest=20):
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, longest, count)
    return _Rows(
        {
            "input_ids": generator.integers(5, 300, n).tolist(),
            "answer_spans": [int(n) // 2, int(n)],
            "answers_only": False,
        }
        for n in lengths
    )


def test_packing_keeps_every_row_once_and_leaves_hardly_a_pad():
    rows = _random_rows(500)
    packed = PackedDataset(rows, 64, seed=1)
    assert sorted(i for block in packed.blocks for i in block) == list(range(500))
    assert packed.lengths.max() <= 64
    assert packed.fill > 0.95


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mask_prompt", [False, True])
def test_the_packed_loss_equals_the_unpacked_one(tmp_path, family, attention, mask_prompt):
    import torch
    from transformers import AutoModelForCausalLM

    from utils.model.inputs import sft_inputs
    from utils.model.losses import LabelLogProbs, causal_lm_loss_sum

    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path, family), attn_implementation=attention).eval()
    rows = _random_rows(12)
    plain = DataCollatorSFT(2, 64, mask_prompt)([*rows, FILLER])
    packed = PackedDataset(rows, 40, seed=0)
    blocks = DataCollatorPacked(2, mask_prompt)([*(packed[i] for i in range(len(packed))), FILLER])
    assert count_batch(plain) == count_batch(blocks)
    losses = []
    for batch in (plain, blocks):
        with torch.no_grad():
            losses.append(causal_lm_loss_sum(LabelLogProbs(model), sft_inputs(model, batch), batch["labels"]).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_pads_are_no_tokens():
    ids, mask = pad_rows([[1, 2, 3], [4]], 0, to_length=5)
    assert ids.tolist() == [[1, 2, 3, 0, 0], [4, 0, 0, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]


def test_rows_are_padded_to_the_longest_or_to_the_next_multiple():
    ids, mask = pad_rows([[1, 2, 3], [4]], 9, "left", multiple_of=1)
    assert (ids.tolist(), mask.tolist()) == ([[1, 2, 3], [9, 9, 4]], [[1, 1, 1], [0, 0, 1]])
    assert [pad_rows([[1, 2, 3], []], 9, multiple_of=n)[0].shape[1] for n in (1, 2, 8)] == [3, 4, 8]


# ---------------------------------------------------------------- where an answer begins


@pytest.fixture(scope="module")
def byte_level():
    return functools.cache(_byte_level)


def _byte_level(trim_offsets, bos, normalizer=None, words=()):
    """A byte-level tokenizer; ``words`` are added tokens that take the blanks before them along."""
    backend = Tokenizer(models.BPE())
    if normalizer:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["</s>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" Human: über ärger Assistant: ja, 你好!\n\n", "  and   blanks"] * 9, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_tokens([AddedToken(word, lstrip=True) for word in words])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>" if bos else None)


@pytest.mark.parametrize("bos", [True, False], ids=["bos", "no bos"])
@pytest.mark.parametrize("allow", [True, False], ids=["special tokens", "text"])
@given(text=st.text(max_size=30) | st.lists(st.sampled_from(["a", " :", "\n", "é", "</s>", "<s>", "<"])).map("".join))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_answer_begins_at_the_token_that_holds_its_first_character(byte_level, bos, allow, text):
    # Offsets that keep their blanks are an outsider's answer; ours come from the bytes of the tokens.
    [encoded] = TextEncoder(byte_level(True, bos), allow_special_tokens=allow).encode([text])
    backend = byte_level(False, bos).backend_tokenizer
    backend.encode_special_tokens = not allow
    reference = backend.encode(text)
    for char in range(len(text)):
        assert encoded.token_at(char) == min(reference.char_to_token(char), len(encoded.ids))
    assert encoded.token_at(len(text)) == len(encoded.ids)
    assert encoded.offsets is None, "byte counts were enough"


def test_a_text_that_the_tokenizer_normalises_is_measured_by_offsets():
    encoder = TextEncoder(_byte_level(True, True, normalizers.NFC()))
    plain, composed = encoder.encode(["Human: \u00e9 ja", "Human: e\u0301 ja"])
    assert plain.ids == composed.ids
    assert plain.token_at(len("Human: \u00e9")) == composed.token_at(len("Human: e\u0301"))
    assert plain.offsets is None and composed.offsets is not None


def test_tokens_that_swallow_blanks_are_found_by_offsets():
    encoder = TextEncoder(_byte_level(True, True, words=["<sep>"]))
    [encoded] = encoder.encode(["Human  <sep>yes"])
    start = encoded.token_at(len("Human  <sep>"))
    assert "".join(encoder.tokenizer.convert_ids_to_tokens(encoded.ids[start:])) == "yes"
    assert encoded.offsets is not None
