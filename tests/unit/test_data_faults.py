"""Data preparation that is fed with anything at all."""

import json

import pytest
from helpers import make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils.data.batching import DataCollatorReward, DataCollatorSFT
from utils.data.encoding import REWARD, SFT
from utils.data.preparation import create_prompt_dataset
from utils.process.errors import UserError

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
