"""Data and processes: preparation that is killed or runs in several at once, rows that workers read."""

import json
import multiprocessing
import os
import random
import signal

import pytest
from datasets import Dataset
from helpers import make_tokenizer

from utils.data import preparation
from utils.data.encoding import SFT, RowEncoder
from utils.data.preparation import create_prompt_dataset
from utils.data.readers import open_file


def _write_rows(folder, count=3000):
    folder.mkdir(exist_ok=True)
    for name, rows in (("train", count), ("eval", 50)):
        lines = [
            json.dumps({"prompt": f" Human: say {i} Assistant:", "chosen": f" {i}" * (i % 40 + 1), "rejected": " no"})
            for i in range(rows)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def _prepare(folder, cache, tokenizer):
    return create_prompt_dataset(0, [str(folder)], "1,1,1", cache, SFT, 1, tokenizer, 64, preprocessing_num_workers=1)


def _in_child(work) -> int:
    """Fork; the child does the work and leaves without any clean-up of its own."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def _cached_bytes(cache):
    return {file.name: file.read_bytes() for file in sorted(cache.rglob("*.arrow"))}


def _killed_at(event: int, work) -> None:
    """Do the work, and kill this process when it reads, finishes or moves something for the ``event``-th time."""
    seen = 0

    def counting(function):
        def counted(*args, **options):
            nonlocal seen
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return counted

    RowEncoder.read, RowEncoder.finish = counting(RowEncoder.read), counting(RowEncoder.finish)
    os.replace = counting(os.replace)
    work()


def test_after_twenty_kills_a_normal_run_makes_the_cache_of_an_undisturbed_one(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "ROWS_PER_CHUNK", 100)
    tokenizer = make_tokenizer(tmp_path / "t")
    folder = _write_rows(tmp_path / "data")
    _prepare(folder, tmp_path / "calm", tokenizer)
    generator = random.Random(0)
    for kill in range(20):
        # Ten chunks are read and finished, then files are moved into place: each kill hits one of these moments.
        event, cache = generator.randint(1, 24), tmp_path / f"troubled{kill}"
        child = _in_child(lambda e=event, c=cache: _killed_at(e, lambda: _prepare(folder, c, tokenizer)))
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        _prepare(folder, cache, tokenizer)
        assert _cached_bytes(cache) == _cached_bytes(tmp_path / "calm")


def test_two_runs_at_once_share_one_cache(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "t")
    folder = _write_rows(tmp_path / "data")
    children = [_in_child(lambda: _prepare(folder, tmp_path / "shared", tokenizer)) for _ in range(3)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    _prepare(folder, tmp_path / "calm", tokenizer)
    assert _cached_bytes(tmp_path / "shared") == _cached_bytes(tmp_path / "calm")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_rows_reach_worker_processes_forked_and_spawned(kind, tmp_path):
    texts = [{"prompt": f'q{i}, "quoted"\nnew line', "chosen": f"ja {i} ü", "rejected": f"nein {i}"} for i in range(20)]
    table, path = Dataset.from_list(texts), tmp_path / f"d.{kind}"
    {"jsonl": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}[kind](path)
    rows = open_file(path)
    rows.keep_columns(["prompt"])
    expected = [rows[i] for i in range(20)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(rows.__getitem__, range(20)) == expected
    copy, arguments, state = rows.__reduce__()
    again = copy(*arguments)
    again.__dict__.update(state)
    assert list(again) == expected
