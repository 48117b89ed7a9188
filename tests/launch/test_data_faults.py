"""Data preparation that is killed, run twice at once, or fed with anything at all."""

import json
import os
import random
import signal

import pytest
from conftest import make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils.data import preparation
from utils.data.batching import DataCollatorReward, DataCollatorSFT
from utils.data.encoding import REWARD, SFT, RowEncoder
from utils.data.preparation import create_prompt_dataset
from utils.process.errors import UserError


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


texts = st.one_of(st.none(), st.text(max_size=40), st.integers(), st.lists(st.text(max_size=3), max_size=2))
rows = st.lists(st.fixed_dictionaries({"prompt": texts, "chosen": texts, "rejected": texts}), max_size=6)


@pytest.fixture(scope="module")
def fuzz_tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("t"))


@pytest.mark.parametrize("step", [SFT, REWARD])
@given(rows=rows, damage=st.binary(max_size=6), max_len=st.integers(4, 24))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_rows_end_in_a_dataset_a_counted_skip_or_a_clear_error(
    tmp_path_factory, fuzz_tokenizer, step, rows, damage, max_len
):
    folder = tmp_path_factory.mktemp("fuzz")
    content = "".join(json.dumps(row) + "\n" for row in rows).encode() + damage
    for name in ("train.jsonl", "eval.jsonl"):
        (folder / name).write_bytes(content)
    try:
        train, _ = create_prompt_dataset(0, [str(folder)], "1,1", folder / "cache", step, 1, fuzz_tokenizer, max_len)
    except UserError as error:
        assert str(error)
        return
    pad = fuzz_tokenizer.pad_token_id
    collator = DataCollatorSFT(pad, max_len, mask_prompt=True) if step == SFT else DataCollatorReward(pad, max_len)
    batch = collator([train[i] for i in range(len(train))])
    assert batch["attention_mask"].sum(1).max() <= max_len
    assert (batch["attention_mask"].sum(1) > 0).all()
