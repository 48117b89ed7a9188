"""What is read of the data before a run costs time: by which rank, how much, and whom its error reaches."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import flags

from utils import arguments
from utils.data import preparation, readers
from utils.data.encoding import REWARD, SFT
from utils.data.shape_kinds import GroupedRows
from utils.process import ranks
from utils.process.errors import SharedError, UserError

GOOD = {"prompt": " Human: q Assistant:", "chosen": " a", "rejected": " b"}
BAD = GOOD | {"chosen": None}


@pytest.fixture
def spools(monkeypatch):
    """The files whose rows were copied to a temporary file."""
    made, spool = [], readers._spool
    monkeypatch.setattr(readers, "_spool", lambda rows: made.append(1) or spool(rows))
    return made


@pytest.fixture
def look(tmp_path, monkeypatch):
    """look(*paths): as a rank with this number on its node."""

    def look(*paths, step=SFT, local_rank=0):
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        words = flags("--dtype fp32", model_name_or_path="a", data_output_path=tmp_path / "cache")
        words = [*words, "--data_path", *paths]
        args = arguments.settle(arguments.build_parser(step).parse_args(list(map(str, words))), step)
        return preparation.check_data_of_step(args, step)

    return look


def table(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def folder(path, **splits):
    path.mkdir()
    for name, rows in splits.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_one_row_that_can_be_used_is_found_without_a_copy_of_the_rows(look, spools, tmp_path):
    columns = look(table(tmp_path / "a.parquet", [BAD] * 20 + [GOOD] * 2000))
    assert columns == [*GOOD, "prompt_messages"] and not spools
    assert not list((tmp_path / "cache").glob("*"))  # such as the index that sets evaluation rows aside


def test_rows_that_are_grouped_are_not_all_read(look, spools, tmp_path, monkeypatch):
    rated = [{"prompt": f"q{i // 2}", "response": f"a{i}", "helpfulness": i % 2} for i in range(2000)]
    node = {"parent_id": None, "role": "prompter", "text": "q", "rank": 0}
    tree = []
    for i in range(300):
        root = node | {"message_id": f"{i}"}
        replies = [
            root | {"message_id": f"{i}.{n}", "parent_id": f"{i}", "role": "assistant", "rank": n} for n in (0, 1)
        ]
        tree += [root, *replies]
    whole, make = [], GroupedRows._made
    monkeypatch.setattr(GroupedRows, "_made", lambda rows: whole.append(len(rows.rows)) or make(rows))
    look(table(tmp_path / "rated.parquet", rated), step=REWARD)
    look(table(tmp_path / "flat.parquet", tree), step=REWARD)
    assert not spools and max(whole) <= 100


def test_only_the_first_rank_of_a_node_reads_rows(look, spools, tmp_path, monkeypatch):
    path = table(tmp_path / "a.parquet", [BAD] * 500)
    with pytest.raises(UserError, match=r"a\.parquet: 0 of 500 rows used, 500 skipped: 500 x field 'chosen' is null"):
        look(path)
    assert len(spools) == 1
    assert look(path, local_rank=1) == [*GOOD, "prompt_messages"] and len(spools) == 1
    monkeypatch.setattr(ranks, "all_gather_objects", lambda mine: [mine] if mine else ["what the first found", mine])
    with pytest.raises(SharedError, match="what the first found"):
        look(path, local_rank=1)


def test_a_row_far_behind_the_first_is_found(look, spools, tmp_path):
    look(table(tmp_path / "a.parquet", [BAD] * 500 + [GOOD]))
    assert len(spools) == 1


def test_evaluation_rows_are_looked_at_too(look, tmp_path):
    fine = folder(tmp_path / "fine", train=[GOOD], test=[GOOD])
    bad = folder(tmp_path / "bad", train=[GOOD], test=[BAD] * 3)
    damaged = folder(tmp_path / "damaged", train=[GOOD])
    (damaged / "test.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"bad: 0 of 3 rows used.*test\.jsonl, line 1"):
        look(bad)
    look(fine, bad)  # the first one evaluates
    look(bad, fine)
    with pytest.raises(UserError, match=r"test\.jsonl, line 1: expected valid JSON"):
        look(fine, damaged)
