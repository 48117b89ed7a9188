"""Data preparation that is killed, run twice at once, or fed with anything at all."""

import json
import os
import random
import signal
import time

import pytest
from conftest import make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils.data.batching import DataCollatorReward, DataCollatorSFT
from utils.data.data_utils import create_prompt_dataset
from utils.data.encoding import REWARD, SFT
from utils.distributed import UserError


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


def test_after_twenty_kills_a_normal_run_makes_the_cache_of_an_undisturbed_one(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "t")
    folder = _write_rows(tmp_path / "data")
    _prepare(folder, tmp_path / "calm", tokenizer)
    start = time.perf_counter()
    os.waitpid(_in_child(lambda: _prepare(folder, tmp_path / "timed", tokenizer)), 0)
    seconds = time.perf_counter() - start
    generator, killed = random.Random(0), 0
    for _ in range(20):
        child = _in_child(lambda: _prepare(folder, tmp_path / "troubled", tokenizer))
        time.sleep(generator.uniform(0, 0.9 * seconds))
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        if (tmp_path / "troubled").exists() and generator.random() < 0.5:
            for file in (tmp_path / "troubled").rglob("*.arrow"):
                file.unlink()  # a child may have been done before it was killed: let the next one work again
    assert killed >= 10
    _prepare(folder, tmp_path / "troubled", tokenizer)
    assert _cached_bytes(tmp_path / "troubled") == _cached_bytes(tmp_path / "calm")


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
