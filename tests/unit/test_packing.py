"""--packing: rows of a block score as they do alone, in every family, or the family is refused."""

import pytest
import torch
from helpers import ALIBI, FAMILIES, WINDOWED, WITH_STATE, make_model, random_model

from utils.data.batching import DataCollatorPacked, DataCollatorSFT
from utils.model import packing
from utils.model.inputs import sft_inputs
from utils.model.losses import LabelLogProbs
from utils.model.packing import choose_packing, refuse_state
from utils.process.errors import UserError

PLAIN = {name: FAMILIES[name] for name in ("llama", "qwen3", "gemma2", "phi", "gpt2", "gpt_neo", "gpt_neox", "opt")}
CASES = [*PLAIN.items(), *WINDOWED.items(), *((name, ALIBI[name]) for name in ("mpt", "falcon"))]


def rows_of(*lengths):
    ids = torch.randint(5, 300, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": r.tolist(), "answer_spans": [], "answers_only": False} for r in ids.split(lengths)]


def difference_from_alone(model, way: str) -> float:
    """The largest difference of log-probs between rows in one block, with pads at its end, and rows alone."""
    label_log_probs = LabelLogProbs(model)

    def scores(batch):
        return label_log_probs(sft_inputs(model, batch, way), batch["labels"])[0]

    rows = rows_of(21, 13, 17, 5, 1)
    with torch.no_grad():
        alone = torch.cat([scores(DataCollatorSFT(2, 64)([row])) for row in rows if len(row["input_ids"]) > 1])
        blocks = DataCollatorPacked(2)([rows, rows_of(60)])
        return (scores(blocks)[: len(alone)] - alone).abs().max().item()


@pytest.mark.parametrize(("family", "config"), CASES, ids=[name for name, _ in CASES])
def test_rows_of_a_block_score_as_they_do_alone(family, config, capsys):
    model = random_model(config)
    model.train()
    way = choose_packing(LabelLogProbs(model))
    assert model.training
    assert f"packing: by {way}" in capsys.readouterr().out
    assert difference_from_alone(model.eval(), way) < 1e-5


def test_one_mask_for_all_layers_undoes_their_windows():
    model = random_model(WINDOWED["mistral"])
    assert difference_from_alone(model, "one mask") > 0.1
    assert difference_from_alone(model, "positions") < 1e-5


def test_layers_of_two_kinds_get_masks_of_their_own():
    """gpt_oss finds no rows in positions; it takes a table of masks."""
    model = random_model(WINDOWED["gpt_oss"])
    assert choose_packing(LabelLogProbs(model)) == "masks by layer type"
    assert difference_from_alone(model, "positions") > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("config", "way"),
    [
        (FAMILIES["llama"], "positions"),
        (WINDOWED["gemma3_text"], "positions"),
        (WINDOWED["gpt_oss"], "masks by layer type"),
        (FAMILIES["opt"], "one mask"),
    ],
)
def test_the_check_sees_through_the_rounding_of_16_bits(config, way, dtype):
    assert choose_packing(LabelLogProbs(random_model(config).to(dtype))) == way


def test_windows_wider_than_the_rows_of_the_check_are_narrowed_and_restored(monkeypatch):
    """A window of 4,096 tokens in which one mask would do for rows of the check, and not for those of training."""
    model = random_model(WINDOWED["mistral"] | {"sliding_window": 4096})
    monkeypatch.setattr(packing, "packing_ways", lambda _model: ["one mask"])
    with pytest.raises(UserError, match=r"do not score as they do alone.*by one mask, 0\.\d+ \(rounding: .*e-\d+\)"):
        choose_packing(LabelLogProbs(model))
    assert model.config.sliding_window == 4096


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_family_that_cannot_keep_rows_apart_is_refused_with_the_figures(dtype):
    model = random_model(ALIBI["bloom"]).to(dtype)
    message = r"BloomForCausalLM do not score.*by positions, 0\.0\d+ when the row.*; by one mask, ValueError"
    with pytest.raises(UserError, match=message):
        choose_packing(LabelLogProbs(model))


@pytest.mark.parametrize("family", WITH_STATE)
def test_models_with_a_state_are_refused_by_what_they_are(family):
    with pytest.raises(UserError, match=r"--packing: \w+ForCausalLM has layers with a state"):
        refuse_state(random_model(WITH_STATE[family]))


@pytest.mark.parametrize("config", [*PLAIN.values(), *WINDOWED.values()], ids=[*PLAIN, *WINDOWED])
def test_models_without_a_state_are_not(config):
    refuse_state(random_model(config))


@pytest.mark.parametrize("flags", [[], ["--dry_run"]])
def test_a_run_says_so_before_it_trains(flags, run_step, pairs_folder, cache_folder, tmp_path, capsys):
    model = make_model(tmp_path / "model", WITH_STATE["lfm2"])
    paths = dict(model_name_or_path=model, data_path=pairs_folder, data_output_path=cache_folder)
    with pytest.raises(UserError) as error:
        run_step(1, ["--packing", *flags, *(part for name, path in paths.items() for part in (f"--{name}", path))])
    assert "Lfm2ForCausalLM has layers with a state" in capsys.readouterr().out + str(error.value)
