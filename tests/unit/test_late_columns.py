"""Columns of JSON files that first appear, or first hold something, far behind the first rows."""

import gzip
import json
from itertools import islice

import numpy as np
import pytest
from helpers import make_tokenizer

from utils.data import readers, rows
from utils.data.encoding import SFT, RowEncoder, TokenRules
from utils.data.own_files import get_raw_dataset
from utils.data.readers import open_file

LATE, ALL = 130, 200
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def lines(made) -> str:
    return "".join(json.dumps(row) + "\n" for row in made)


def late(first, **more):
    """Rows of which the last ones have more fields; null stands in the row before them."""
    return [first] * (LATE - 1) + [first | dict.fromkeys(more)] + [first | more] * (ALL - LATE)


def in_lines(folder, made):
    (folder / "a.jsonl").write_text(lines(made))
    return folder / "a.jsonl"


def in_array(folder, made):
    (folder / "a.json").write_text(json.dumps(made, indent=1))
    return folder / "a.json"


def in_packed(folder, made):
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines(made).encode()))
    return folder / "a.jsonl.gz"


def in_pieces(folder, made):
    for number, part in enumerate((made[: LATE - 1], made[LATE - 1 :])):
        (folder / f"train-{number}.jsonl").write_text(lines(part))
    return folder


LAYOUTS = [in_lines, in_array, in_packed, in_pieces]


@pytest.fixture
def opened(tmp_path):
    return lambda layout, made: get_raw_dataset(str(layout(tmp_path, made)), str(tmp_path), 1, -1)


def example(dataset, position, need=("prompt", "chosen")):
    [found] = dataset.examples(dataset.rows_of("train")[position], need)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_goes_with_a_conversation_is_read(layout, opened):
    dataset = opened(layout, late({"messages": MESSAGES}, system="be brief", tools=TOOLS, note="n"))
    assert example(dataset, 0).prompt == [MESSAGES[0]] and example(dataset, 0).tools is None
    assert [turn["content"] for turn in example(dataset, ALL - 1).prompt] == ["be brief", "q"]
    assert example(dataset, ALL - 1).tools == TOOLS
    assert dataset.recognised() == "conversations as messages; columns not read: note"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_text_that_an_instruction_is_about_is_learned(layout, opened):
    dataset = opened(layout, late({"instruction": "translate this", "output": "oui"}, input="yes"))
    assert example(dataset, 0).prompt[0]["content"] == "translate this"
    assert example(dataset, ALL - 1).prompt[0]["content"] == "translate this\n\nyes"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_answer_that_was_not_liked_is_not_learned(layout, opened, tmp_path):
    dataset = opened(layout, late({"prompt": "q", "completion": "a"}, label=False) + [_liked()] * 3)
    made = dataset.rows_of("train")
    encoder = RowEncoder(dataset, make_tokenizer(tmp_path / "t"), TokenRules(SFT, 64))
    assert len(encoder.read(made, np.arange(len(made)))) == 3
    assert sum(encoder.report.skipped.values()) == ALL
    assert "unpaired feedback" in dataset.recognised()


def _liked():
    return {"prompt": "q", "completion": "a", "label": True}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rejected_answers_are_found(layout, opened):
    dataset = opened(layout, late({"prompt": "q", "chosen": "a"}, rejected="b"))
    assert dataset.has_rejected
    assert example(dataset, ALL - 1, ("prompt", "chosen", "rejected")).answers == ("a", "b")


def test_a_cache_made_without_the_column_is_not_taken_for_one_with_it(opened, monkeypatch):
    made = late({"messages": MESSAGES}, tools=TOOLS)
    with_column = opened(in_lines, made)
    monkeypatch.setattr(readers, "columns_of", lambda all_rows: rows.columns_of(islice(all_rows, 100)))
    without = opened(in_lines, made)
    assert without.shape.tools is None and with_column.fingerprint() != without.fingerprint()


def test_a_reward_function_may_ask_for_it(opened):
    dataset = opened(in_lines, late({"prompt": "q"}, reference="r"))
    assert "reference" in dataset.raw_datasets["train"].column_names
    assert dataset.recognised().endswith("columns not read: reference")


def test_keys_that_never_repeat_neither_fill_the_memory_nor_the_console(opened, monkeypatch, tmp_path):
    monkeypatch.setattr(rows, "MOST_EXAMPLES", 5)
    made = [{"prompt": "q", "chosen": "a", f"key {i}": i} for i in range(ALL)]
    found = open_file(in_lines(tmp_path, made))
    assert len(found.column_names) == ALL + 2 and len(found.head(2)) == 5
    assert opened(in_lines, made).recognised().endswith(f"'key 19' and {ALL - 20} more".replace("'", ""))


def test_the_first_rows_come_first_and_once(tmp_path):
    made = late({"prompt": "q"}, chosen="a")
    for layout in (in_lines, in_array):
        head = open_file(layout(tmp_path, made)).head(50)
        assert head == [*made[:50], made[LATE]]
        assert open_file(layout(tmp_path, made)).head(500) == made
