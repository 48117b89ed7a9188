"""The files by which a run is known later: its model cards with the figures of its metrics, its run_config.yaml."""

import contextlib
import io
import re

import pytest
import torch
from helpers import flags, read_metrics
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification

from utils import arguments
from utils.arguments.config_file import RUN_CONFIG_FILE
from utils.data.prompt_format import format_answer
from utils.model.tokenizer import load_hf_tokenizer
from utils.run.model_card import RunCard, hub_name_of_base


def card_of(folder):
    return ModelCard.load(folder / "README.md")


def figures_of(card) -> dict[str, tuple[str, str]]:
    return {name: (value, step) for name, value, step in re.findall(r"\| (\w+/\w+) \| (\S+) \| (\d+) \|", card.text)}


def last_of(folder, name) -> tuple[str, str]:
    row = [row for row in read_metrics(folder, name.partition("/")[0]) if row.get(name) is not None][-1]
    return f"{row[name]:.6g}", str(row["step"])


def run_snippet(card) -> str:
    """What the Python on the card prints."""
    [code] = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {})
    return printed.getvalue()


def assert_reads_back(step, folder, arguments_of_run):
    """The run's file gives the arguments that the run had."""
    parse = arguments.build_parser(step).parse_args
    assert parse(["--config", str(folder / RUN_CONFIG_FILE)]) == parse([str(word) for word in arguments_of_run])


def test_step_1(run_step, start, tmp_path):
    given = [
        *start(1),
        *flags("--lora_dim 2 --only_optimize_lora --save_lora_adapters --learning_rate 1e-3", output_dir=tmp_path),
    ]
    run_step(1, given)
    assert_reads_back(1, tmp_path, given)
    card = card_of(tmp_path)
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["three-steps-to-chat", "sft"],
    }
    figures = figures_of(card)
    assert figures["eval/perplexity"] == last_of(tmp_path, "eval/perplexity")
    assert figures.keys() == {"eval/perplexity", "eval/loss", "train/loss"}
    assert "16 of 60 rows used" in card.text
    assert "' Human: What is the capital of Italy? Assistant:'" in card.text
    assert "    lora_dim: 2\n" in card.text and "transformers " in card.text
    assert run_snippet(card).strip() != ""
    adapter = card_of(tmp_path / "adapter")
    assert adapter.data.library_name == "peft" and "LoRA adapter" in adapter.text and "```python" not in adapter.text


def test_step_2_and_its_snippet_scores_as_training_did(run_step, start, tmp_path):
    given = [*start(2), *flags(output_dir=tmp_path)]
    run_step(2, given)
    assert_reads_back(2, tmp_path, given)
    card = card_of(tmp_path)
    assert (card.data.pipeline_tag, card.data.tags) == ("text-classification", ["three-steps-to-chat", "reward-model"])
    for name in ("eval/accuracy", "eval/score_mean", "eval/score_std"):
        assert figures_of(card)[name] == last_of(tmp_path, name)
    tokenizer = load_hf_tokenizer(tmp_path)
    text = " Human: What is the capital of Italy? Assistant:" + format_answer("Rome.")
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    expected = model(torch.tensor([ids])).logits[0, 0].item()
    assert float(run_snippet(card)) == pytest.approx(expected, abs=1e-5)


def test_step_3_names_what_its_models_come_from(run_step, start, small_models, tmp_path):
    given = [*start(3), *flags("--enable_ema", output_dir=tmp_path)]
    run_step(3, given)
    assert_reads_back(3, tmp_path, given)
    actor, average, critic = (card_of(tmp_path / name) for name in ("actor", "actor_ema", "critic"))
    for card in (actor, average):
        assert card.data.pipeline_tag == "text-generation"
        for name in ("train/score", "train/kl", "train/eos_rate"):
            assert figures_of(card)[name] == last_of(tmp_path, name)
    assert str(small_models / "actor") in actor.text and "moving average" in average.text
    assert critic.data.pipeline_tag == "text-classification" and str(small_models / "reward") in critic.text
    assert figures_of(critic)["train/critic_loss"] == last_of(tmp_path, "train/critic_loss")


# ---------------------------------------------------------------- without a run


def make_card(folder, **changes) -> RunCard:
    values = dict(step=1, output_dir=str(folder), flags={"run_name": "a```\n# b"}, datasets=["d"], rows=["2 of 3"])
    return RunCard(**values | changes)


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return load_hf_tokenizer(model_folder)


def test_names_of_the_hub_stand_in_the_header_and_follow_the_models(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    datasets = ["Dahoas/rm-static", "local/demo", "my/rows.jsonl", "my/folder", "Dahoas/rm-static"]
    (tmp_path / "my/folder").mkdir(parents=True)
    card = make_card(tmp_path, datasets=datasets, rows=["some"] * 5)
    text = card.text_for(tmp_path, "", "facebook/opt-1.3b", tokenizer)
    (tmp_path / "README.md").write_text(text)
    data = card_of(tmp_path).data
    assert (data.base_model, data.datasets) == ("facebook/opt-1.3b", ["Dahoas/rm-static"])
    assert hub_name_of_base(str(tmp_path)) == "facebook/opt-1.3b"  # of step 1's model, for step 3's card
    assert "which comes from facebook/opt-1.3b" in card.text_for(tmp_path / "new", "", str(tmp_path), tokenizer)


def test_what_a_flag_holds_cannot_end_its_block(tokenizer, tmp_path):
    text = make_card(tmp_path).text_for(tmp_path, "", "m", tokenizer)
    assert not re.search(r"^(# b|```)", text, re.MULTILINE)


def test_a_page_of_the_user_stays_and_one_of_an_earlier_run_goes(tokenizer, tmp_path, capsys):
    card, page = make_card(tmp_path), tmp_path / "README.md"
    for others in ("my notes", "---\ntags: [mine]\n---\n", "---\n- no header\n---\n", "---\n{\n---\n"):
        page.write_text(others)
        assert card.text_for(tmp_path, "", "m", tokenizer) is None
        assert f"{page} was not written by a run and stays" in capsys.readouterr().out
    page.unlink()
    page.write_text(card.text_for(tmp_path, "", "m", tokenizer))
    assert card.text_for(tmp_path, "", "m", tokenizer) is not None


def test_a_metrics_file_that_cannot_be_read_to_its_end_costs_no_model(tokenizer, tmp_path):
    rows = ['{"step": 4, "eval/perplexity": 2.5}', '{"step": 5, "eval/perplexity": null}', '{"step": 6, "eval/pe']
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    text = make_card(tmp_path).text_for(tmp_path, "", "m", tokenizer)
    assert "| eval/perplexity | 2.5 | 4 |" in text
