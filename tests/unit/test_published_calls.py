"""The published calls give what the project's own give, in the form that published scripts expect."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, Subset
from transformers import AutoConfig, AutoModelForCausalLM, default_data_collator

from utils import perf
from utils.data import data_utils, preparation
from utils.data.batching import DataCollatorReward, DataCollatorRLHF, DataCollatorSFT, MiniDataset
from utils.data.encoding import REWARD, RLHF, SFT
from utils.model import saving
from utils.model.model_utils import create_critic_model
from utils.model.tokenizer import load_hf_tokenizer
from utils.process.errors import UserError
from utils.utils import get_tokenizer, load_state_dict_into_model, save_hf_format, save_zero_three_model

LENGTH = 40


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return get_tokenizer(str(model_folder), True)


def both(step: int, tokenizer, pairs_folder, cache_folder):
    """(training rows as the steps read them, as published)"""
    place = 0, [str(pairs_folder)], "1,1,1", cache_folder, step, 1, tokenizer, LENGTH
    return preparation.create_prompt_dataset(*place)[0], data_utils.create_prompt_dataset(*place, tokenizer.eos_token)[
        0
    ]


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------ data


def test_rows_of_step_1_are_tensors_that_the_default_collator_stacks(tokenizer, pairs_folder, cache_folder):
    ours, published = both(SFT, tokenizer, pairs_folder, cache_folder)
    batch = next(iter(DataLoader(published, batch_size=4, collate_fn=default_data_collator)))
    assert len(ours) == len(published) == 20
    collator = DataCollatorSFT(tokenizer.pad_token_id, LENGTH, pad_to_max_length=True)
    assert same(batch, collator([ours[i] for i in range(4)]))
    assert batch["labels"].shape == (4, LENGTH)
    assert (batch["labels"] == -100).sum() == (batch["attention_mask"] == 0).sum() > 0


def test_rows_of_step_2_are_four_tensors_that_the_collator_without_arguments_joins(
    tokenizer, pairs_folder, cache_folder
):
    ours, published = both(REWARD, tokenizer, pairs_folder, cache_folder)
    rows = [published[i] for i in range(3)]
    assert [part.shape for part in rows[0]] == [(1, LENGTH)] * 4
    batch = DataCollatorReward()(rows)
    wanted = DataCollatorReward(tokenizer.pad_token_id, LENGTH, True)([ours[i] for i in range(3)])
    assert wanted.pop("pair_weights").tolist() == [1, 1, 1]
    assert same(batch, wanted)


def test_rows_of_step_3_are_reversed_prompts_that_the_collator_pads_to_its_length(
    tokenizer, pairs_folder, cache_folder
):
    ours, published = both(RLHF, tokenizer, pairs_folder, cache_folder)
    ids, mask, pad_id = published[0]
    assert (ids.flip(0).tolist(), pad_id) == (ours[0]["input_ids"], tokenizer.pad_token_id)
    assert mask.all()
    rows = [0, 1, 2]
    for length in (LENGTH, 4):  # as the published collator, it cuts nothing
        batch = DataCollatorRLHF(length, 1)([published[i] for i in rows])
        assert batch["prompt"].shape[1] == max(length, *(len(ours[i]["input_ids"]) for i in rows))
        for i in rows:
            real = batch["prompt_att_mask"][i].bool()
            assert batch["prompt"][i][real].tolist() == ours[i]["input_ids"]
            assert real[-1] and (batch["prompt"][i][~real] == pad_id).all()


def test_one_dataset_and_rows_of_the_callers_choice_are_the_same_rows(tokenizer, pairs_folder, cache_folder):
    _, blended = both(SFT, tokenizer, pairs_folder, cache_folder)
    folder = str(pairs_folder)
    one, _ = data_utils.create_dataset(0, folder, "1,1,1", cache_folder, SFT, 1, tokenizer, "</s>", LENGTH, True)
    raw = data_utils.get_raw_dataset(folder, cache_folder, 1, 0)
    rows = raw.get_train_data()
    place = 0, cache_folder, raw.dataset_name_clean, 1, "train", "1,1,1", 0
    index = data_utils.get_raw_dataset_split_index(*place, len(rows))
    chosen = data_utils.create_dataset_split(Subset(rows, index), raw, SFT, tokenizer, "</s>", LENGTH)
    assert len(one) == len(chosen) == len(blended)
    assert all(same(one[i], blended[i]) and same(chosen[i], blended[i]) for i in range(len(one)))


def test_lists_of_tokenised_texts_are_a_dataset_of_each_step():
    mask = torch.tensor([1, 1, 0])
    one, other = ({"input_ids": torch.tensor(ids), "attention_mask": mask} for ids in ([5, 6, 0], [7, 8, 0]))
    assert data_utils.PromptDataset([], [one], [], 0, SFT)[0]["labels"].tolist() == [5, 6, -100]
    pairs = data_utils.PromptDataset([], [one], [other], 0, REWARD)
    batch = DataCollatorReward()([pairs[0]])
    assert batch["input_ids"].tolist() == [[5, 6, 0], [7, 8, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0]] * 2
    prompts = data_utils.PromptDataset([one, other], [], [], 9, RLHF)
    assert len(prompts) == 2
    assert DataCollatorRLHF(4, 1)([prompts[0], prompts[1]])["prompt"].tolist() == [[9, 9, 6, 5], [9, 9, 8, 7]]


def test_what_published_arguments_and_rows_cannot_hold_is_said(tokenizer, tmp_path, cache_folder, capsys):
    rows = [{"prompt": "say red", "chosen": " red", "rejected": " no"}] * 4
    rows += [{"prompt": "say blue", "responses": [" blue", " green", " no"], "ranks": [1, 2, 3]}] * 4
    for name, part in (("plain", rows[:4]), ("ranked", rows[4:])):
        (tmp_path / name).mkdir()
        for split in ("train", "eval"):
            (tmp_path / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    paths = [str(tmp_path / "plain"), str(tmp_path / "ranked")]
    place = 0, paths, None, cache_folder, REWARD, 1, tokenizer, LENGTH
    train, _ = data_utils.create_prompt_dataset(*place, "<|endoftext|>")
    console = capsys.readouterr().out
    assert console.count("4 of 8 rows rank several answers") == 2  # train and eval
    assert "end_of_conversation_token '<|endoftext|>' is not used" in console
    assert DataCollatorReward()([train[i] for i in range(8)])["input_ids"].shape == (16, LENGTH)
    with pytest.raises(UserError, match="DataCollatorReward: rows of ids need pad_token_id"):
        DataCollatorReward()([{"chosen_ids": [1], "rejected_ids": [2]}])
    with pytest.raises(UserError, match="DataCollatorRLHF: rows of ids need pad_token_id"):
        DataCollatorRLHF(256, 1)([{"input_ids": [1]}])


def test_batches_of_columns_are_cut_into_mini_batches():
    for kind in (list, tuple):
        mini = MiniDataset(1, 2)
        batches = mini.add(kind([torch.arange(3), torch.arange(10, 13)]))
        assert [[column.tolist() for column in batch] for batch in batches] == [[[0, 1], [10, 11]], [[2], [12]]]
        assert mini.add([[None] * 4]) == [[[None] * 2]] * 2


def test_plain_text_is_rows_for_the_default_collator(tokenizer, small_models, cache_folder):
    args = SimpleNamespace(
        unsupervised_dataset_name=str(small_models / "text.txt"),
        unsupervised_dataset_config_name=None,
        max_prompt_seq_len=8,
        max_answer_seq_len=8,
        data_output_path=cache_folder,
    )
    rows = data_utils.get_unsupervised_data(args, tokenizer)
    batch = default_data_collator([rows[0], rows[1]])
    assert batch["input_ids"].shape == (2, 16)
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert batch["attention_mask"].all()


# ------------------------------------------------------------------ models


@pytest.fixture(scope="module")
def reward_model(model_folder, tokenizer):
    torch.manual_seed(1)
    return create_critic_model(str(model_folder), tokenizer, None, 1).eval()


def test_a_reward_model_takes_published_batches_and_refuses_what_it_would_not_use(reward_model):
    ids = torch.tensor([[5, 60, 70], [5, 60, 80]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        outputs = reward_model(**batch, use_cache=False)
        assert torch.equal(outputs["loss"], reward_model(ids, None, batch["attention_mask"])["loss"])
        assert torch.equal(outputs["loss"], reward_model(ids)["loss"])  # no mask: no pads
        values = reward_model.forward_value(**batch, past_key_values=None, prompt_length=2, use_cache=False)
        assert torch.equal(values["chosen_end_scores"][:1], outputs["chosen_mean_scores"])
        whole = reward_model.forward_value(ids, batch["attention_mask"], None, None, None, None, True)
        assert torch.equal(whole, values["values"])
    for call in (reward_model, reward_model.forward_value):
        with pytest.raises(UserError, match="position_ids would not be used"):
            call(**batch, position_ids=torch.zeros_like(ids))
    with pytest.raises(UserError, match="past_key_values would not be used"):
        reward_model(ids, batch["attention_mask"])  # the order of other models


def test_loading_a_state_dict_gives_an_empty_list_of_errors():
    model = torch.nn.Linear(2, 2)
    assert load_state_dict_into_model(model, {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}, "", 0) == []


def test_rank_0_saves_alone_and_the_others_wait_for_nothing(
    tokenizer, model_folder, reward_model, tmp_path, monkeypatch
):
    def wait(*_):
        raise AssertionError("another rank would have to come")

    monkeypatch.setattr(saving, "barrier", wait)
    monkeypatch.setattr(saving, "agree", wait)
    args = SimpleNamespace(output_dir=str(tmp_path))
    for rank in (1, 0):
        monkeypatch.setattr(saving, "get_rank", lambda rank=rank: rank)
        save_hf_format(reward_model, tokenizer, args, "reward")
        save_zero_three_model(reward_model, rank, tmp_path / "weights")
        assert sorted(path.name for path in tmp_path.iterdir()) == ([] if rank else ["reward", "weights"])
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("reward", "weights")]
    assert weights[0] == weights[1]
    assert load_hf_tokenizer(tmp_path / "reward").get_vocab() == tokenizer.get_vocab()


# ------------------------------------------------------------------ throughput


def test_operations_of_a_configuration_are_those_of_its_model(model_folder):
    config = AutoConfig.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    assert perf.get_hf_configs(config) == perf.get_hf_configs(model) == (2, 32, config.vocab_size)
    assert perf.calculate_flops(3, 4, 16, config) == perf.calculate_flops(3, 4, 16, model)
    weights = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    assert perf.calculate_flops(3, 4, 16, config) == 3 * 4 * 16 * (2 * weights + 4 * 2 * 32 * 8)


def test_throughput_without_counts_takes_rows_as_many_and_long_as_the_arguments_allow(
    model_folder, reward_model, capsys
):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    args = SimpleNamespace(per_device_train_batch_size=4, max_seq_len=32, gradient_checkpointing=False)
    perf.print_throughput(model.model, args, 0.5, 1)
    assert capsys.readouterr().out == ""
    perf.print_throughput(model.model, args, 0.5, 0)
    assert "Samples/sec: 8.00, Time/seq 0.12s, Batch Size: 4, Sequence Length: 32\n" in capsys.readouterr().out
    args = SimpleNamespace(
        per_device_generation_batch_size=2,
        generation_batches=3,
        ppo_epochs=1,
        max_prompt_seq_len=8,
        max_answer_seq_len=8,
        actor_gradient_checkpointing=False,
        critic_gradient_checkpointing=False,
        dtype="fp32",
    )
    figures = perf.print_throughput_step3(model, reward_model, args, 3.0, 1.0, 2.0, 0)
    console = capsys.readouterr().out
    assert "End-to-End => Latency: 3.00s" in console and "Batch Size: 6, Total Seq. Length: 16" in console
    assert figures["samples_per_second"] == 2
    assert figures["tokens_per_second"] == 16
