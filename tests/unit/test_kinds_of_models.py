"""Models that are no decoders are refused by what they are, in the steps, in chat and in evaluation."""

import argparse

import pytest
from helpers import make_model, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from evaluation_scripts.rw_eval import load_judge
from utils.generation.saved_model import load_language_model
from utils.model.loading import load_config
from utils.process.errors import UserError

BERT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
T5 = dict(d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    kinds = {"bert": (BERT, AutoModelForMaskedLM), "t5": (T5, AutoModelForSeq2SeqLM)}
    for name, (sizes, auto_class) in kinds.items():
        made[name] = tmp_path_factory.mktemp(name)
        make_tokenizer(made[name])
        auto_class.from_config(AutoConfig.for_model(name, vocab_size=320, **sizes)).save_pretrained(made[name])
    return made


KINDS = {"bert": r"\(bert\) is an encoder, in which", "t5": r"\(t5\) is an encoder-decoder model.*a decoder is needed"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [1, 2, 3])
def test_steps_refuse_what_is_no_decoder(kind, step, folders, run_step, pairs_folder, tmp_path):
    names = ["model_name_or_path"] if step < 3 else ["actor_model_name_or_path", "critic_model_name_or_path"]
    paths = [part for name in names for part in (f"--{name}", folders[kind])]
    with pytest.raises(UserError, match=KINDS[kind]):
        run_step(step, [*paths, "--data_path", pairs_folder, "--output_dir", tmp_path / "output"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_dry_run_says_so(kind, folders, run_step, pairs_folder, cache_folder, capsys):
    flags = ["--dry_run", "--model_name_or_path", folders[kind], "--data_path", pairs_folder]
    with pytest.raises(UserError):
        run_step(1, [*flags, "--data_output_path", cache_folder])
    assert f"({kind}) is an encoder" in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_chat_and_evaluation_refuse_it(kind, folders):
    flags = dict(device="cpu", dtype="fp32", trust_remote_code=False, prompt_format=None, base_model=None)
    args = argparse.Namespace(**flags, load_in_4bit=False, add_eot_token=False)
    for load in (load_language_model, load_judge):
        with pytest.raises(UserError, match=KINDS[kind]):
            load(str(folders[kind]), args)


def test_decoders_pass(tmp_path):
    config = AutoConfig.for_model("bert", vocab_size=320, is_decoder=True, **BERT)  # BERT's blocks, read left to right
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "bert")
    assert load_config(tmp_path / "bert").is_decoder
    assert load_config(make_model(tmp_path / "llama")).model_type == "llama"
