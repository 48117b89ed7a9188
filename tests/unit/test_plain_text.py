"""Plain text for step 3: files, lines, blocks, and the loss it adds."""

import json
from types import SimpleNamespace

import pytest
from helpers import flags, read_metrics

from utils.data.unsupervised import get_unsupervised_data
from utils.model.tokenizer import load_hf_tokenizer
from utils.process.errors import UserError


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_step_3_learns_from_plain_text_too(start, run_step, tmp_path, suffix):
    lines = [f"the {color} house is {color}, thanks." for color in ("red", "green", "blue")] * 20
    file = tmp_path / f"text.{suffix}"
    file.write_text("".join((line if suffix == "txt" else json.dumps({"text": line})) + "\n" for line in lines))
    one_step = "--enable_test_mode --test_stop_step 1"
    run_step(3, [*start(3), *flags(one_step, unsupervised_dataset_name=file, output_dir=tmp_path / "out")])
    assert read_metrics(tmp_path / "out")[0]["train/unsupervised_loss"] > 1


def test_plain_text_becomes_blocks_joined_by_eos_and_bad_lines_are_named(model_folder, tmp_path):
    tokenizer = load_hf_tokenizer(model_folder)
    file = tmp_path / "text.jsonl"
    args = SimpleNamespace(
        unsupervised_dataset_name=str(file),
        unsupervised_dataset_config_name=None,
        data_output_path=str(tmp_path / "cache"),
        rebuild_cache=False,
        allow_special_tokens=False,
        max_prompt_seq_len=4,
        max_answer_seq_len=4,
    )
    file.write_text('{"text": "red green"}\n{"text": " "}\n{"text": "blue blue blue seven eight"}\n')
    blocks = get_unsupervised_data(args, tokenizer)
    texts = ["red green", "blue blue blue seven eight"]
    stream = [i for t in texts for i in [*tokenizer(t, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]]
    assert [row["input_ids"] for row in blocks] == [stream[i : i + 8] for i in range(0, len(stream) // 8 * 8, 8)]
    file.write_text('{"text": "red"}\n{"words": "blue"}\n')
    with pytest.raises(UserError, match=r"field 'text' is missing \(.*text\.jsonl, line 2\); not enough text"):
        get_unsupervised_data(args, tokenizer)


@pytest.mark.parametrize("name", ["text", "rows"])
def test_plain_text_files_count_only_where_no_data_file_lies_beside_them(model_folder, tmp_path, name):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "LICENSE.txt").write_text("red red red red red red red red\n")
    if name == "rows":
        (folder / "train.jsonl").write_text('{"text": "blue blue blue blue blue blue blue blue"}\n')
    args = SimpleNamespace(
        unsupervised_dataset_name=str(folder),
        unsupervised_dataset_config_name=None,
        data_output_path=str(tmp_path / "cache"),
        rebuild_cache=False,
        allow_special_tokens=False,
        max_prompt_seq_len=2,
        max_answer_seq_len=2,
    )
    tokenizer = load_hf_tokenizer(model_folder)
    text = tokenizer.decode(get_unsupervised_data(args, tokenizer)[0]["input_ids"])
    assert ("blue" in text) == (name == "rows")
