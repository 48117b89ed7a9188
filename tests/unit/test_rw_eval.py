"""Scoring answers with a saved reward model: same ids and scores as in training, honest figures, bad rows told."""

import csv
import json
import math
import shutil
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import make_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from evaluation_scripts import rw_eval
from utils.data.conversation import Texts
from utils.generation.asking import AskedFormat
from utils.model.tokenizer import load_hf_tokenizer
from utils.process.errors import UserError

DATASET_FORM = {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " a \n", "rejected": " b"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A random reward model as step 2 saves it, here by plain transformers."""
    language_model = make_model(tmp_path_factory.mktemp("llama"))
    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(language_model, num_labels=1)
    torch.nn.init.normal_(model.score.weight)
    model.config.reward_score_mean, model.config.reward_score_std = 1.25, 0.5
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(language_model).save_pretrained(folder)
    return str(folder)


def reward_args(folder, *more):
    return rw_eval.parse_args(["--model_name_or_path", folder, "--device", "cpu", *map(str, more)])


def evaluate(folder, *more):
    rw_eval.main(["--model_name_or_path", folder, "--device", "cpu", *map(str, more)])


@pytest.fixture(scope="module")
def judge(folder):
    return rw_eval.load_judge(folder, reward_args(folder))


def judge_in(tokenizer, prompt_format, known=True):
    """A judge without a model, which only encodes."""
    return rw_eval.Judge("x", None, tokenizer, 0, None, AskedFormat(prompt_format, known, "a test"))


def encoded(tokenizer, record, max_seq_len=512, prompt_format="human_assistant", known=True):
    """The rows of a record's answers."""
    _, [pair] = rw_eval.encode_records(judge_in(tokenizer, prompt_format, known), [record], max_seq_len)
    return pair.rows


def text_record(row):
    """A row of a file with texts."""
    answers = tuple(text for name, text in row.items() if name != "prompt")
    return rw_eval.record_of(Texts(row["prompt"], tuple(row["prompt"] + answer for answer in answers), answers))


def pair(prompt, chosen="yes", rejected="no"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def question(prompt, *answers):
    return rw_eval.question_record(prompt, *(answers or ("yes", "no")))


# ---------------------------------------------------------------- what is scored


def test_scores_are_those_of_plain_transformers_whatever_the_padding(folder, judge):
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    texts = ["short", "a somewhat longer prompt", "the longest of the three prompts, by far"]
    rows = [encoded(judge.tokenizer, question(text))[0] for text in texts]
    with torch.no_grad():
        direct = [plain(input_ids=torch.tensor([row])).logits.item() for row in rows]
    assert len(set(direct)) == 3
    for batch_size in (1, 2, 3):
        assert rw_eval.score_rows(judge.model, rows, batch_size) == pytest.approx(direct, abs=1e-5)


def test_scored_answers_end_with_one_eos_and_begin_with_one_blank(judge):
    eos = judge.tokenizer.eos_token_id
    for ids in encoded(judge.tokenizer, question("q", "fine", "  fine\n")):
        assert ids.count(eos) == 1 and ids[-1] == eos
        assert judge.tokenizer.decode(ids[1:-1]) == " Human: q Assistant: fine"


def test_a_row_in_the_datasets_form_is_scored_as_it_stands(judge):
    chosen, _ = encoded(judge.tokenizer, text_record(DATASET_FORM), prompt_format="hh")
    assert judge.tokenizer.decode(chosen[1:-1]) == DATASET_FORM["prompt"] + " a \n"


def test_rows_of_a_file_stand_as_they_are_unless_a_style_is_asked_for(folder, judge, tmp_path, capsys, monkeypatch):
    path = write_rows(tmp_path / "pairs.jsonl", [pair("a question ", "yes", "no ")])
    seen = []
    monkeypatch.setattr(rw_eval, "score_rows", lambda model, rows, size: seen.extend(rows) or [0.0] * len(rows))

    def texts(*flags):
        seen.clear()
        evaluate(folder, "--data_path", path, *flags)
        return [judge.tokenizer.decode(ids, skip_special_tokens=True) for ids in seen]

    assert texts() == ["a question yes", "a question no "]
    assert "scored as they stand" in capsys.readouterr().err
    assert texts("--prompt_style", "plain") == [f" Human: a question Assistant: {word}" for word in ("yes", "no")]
    assert texts("--prompt_style", "hh") == [f"\n\nHuman: a question\n\nAssistant: {word}" for word in ("yes", "no")]
    assert "scored as they stand" not in capsys.readouterr().err


def test_a_single_answer_has_the_score_it_has_in_a_pair(folder, judge):
    # The second one is cut. Answers of one length lose the same beginning of the prompt.
    pairs = [text_record(DATASET_FORM), question("x" * 300, "yes", "yes")]
    singles = [text_record({name: DATASET_FORM[name] for name in ("prompt", "chosen")}), question("x" * 300, "yes")]
    in_pairs = [chosen for chosen, _ in rw_eval.score_records(judge, pairs, 40, 8)[1]]
    alone = [score for (score,) in rw_eval.score_records(judge, singles, 40, 8)[1]]
    assert alone == pytest.approx(in_pairs, abs=1e-5)
    assert alone[0] != pytest.approx(alone[1], abs=1e-3)


def test_a_chat_template_brings_its_own_bos_and_no_second_one(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "<s>{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chosen, _ = encoded(tokenizer, question("q", "a", "b"), prompt_format="chat_template")
    assert tokenizer.decode(chosen) == "<s><user>q</s><assistant>a</s>"


def test_too_long_a_pair_loses_the_beginning_of_its_prompt(folder, judge, capsys):
    record = question("x" * 100, "good", "bad")
    rows = encoded(judge.tokenizer, record, max_seq_len=40)
    assert max(map(len, rows)) == 40
    texts = [judge.tokenizer.decode(ids[1:]) for ids in rows]
    prompts = [text[: text.index(" Assistant:")] for text in texts]
    assert prompts[0] == prompts[1]  # of both, so that they stay comparable
    assert set(prompts[0]) == {"x"} and len(prompts[0]) < 40
    assert [text[len(prompts[0]) :] for text in texts] == [" Assistant: good</s>", " Assistant: bad</s>"]
    _, [scores] = rw_eval.score_records(judge, [record], 40, 8)
    assert scores == pytest.approx(rw_eval.score_rows(judge.model, rows, 1), abs=1e-5)
    assert "1 of 1 rows are longer than 40 tokens" in capsys.readouterr().err


# ---------------------------------------------------------------- files


def write_rows(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


PAIRS = [pair(f"\n\nHuman: {i}\n\nAssistant:", " yes", " no") for i in range(5)]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_pairs_of_a_file_are_scored_and_written(folder, tmp_path, capsys, kind):
    path = write_rows(tmp_path / f"pairs.{kind}", PAIRS)
    output = tmp_path / "scores.jsonl"
    evaluate(folder, "--data_path", path, "--output", output, "--num_padding_at_beginning", 1)
    printed = capsys.readouterr()
    assert printed.err.count("--num_padding_at_beginning has no effect") == 1
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [{name: row[name] for name in PAIRS[0]} for row in written] == PAIRS
    correct = sum(row["chosen_score"] > row["rejected_score"] for row in written)
    assert sum(row["correct"] for row in written) == correct
    low, high = rw_eval.wilson_interval(correct, 5)
    assert f"({correct} of 5 pairs, 0 ties; 95 % interval {low:.4f} to {high:.4f})" in printed.out
    chosen = [row["chosen_score"] for row in written]
    mean = sum(chosen) / 5
    std = math.sqrt(sum((score - mean) ** 2 for score in chosen) / 5)
    assert f"chosen     mean {mean:>9.4f}   std {std:>9.4f}\n" in printed.out
    assert "saved      mean    1.2500   std    0.5000" in printed.out


def test_without_data_it_says_what_it_shows(folder, tmp_path, capsys):
    evaluate(folder)
    assert f"no --data_path: these are {len(rw_eval.PAIRS)} built-in pairs" in capsys.readouterr().out
    evaluate(folder, "--data_path", write_rows(tmp_path / "pairs.jsonl", PAIRS))
    assert "built-in" not in capsys.readouterr().out
    with pytest.raises(UserError, match="is a model folder"):
        evaluate(folder, "--data_path", folder)


def test_single_answers_of_a_folder_s_split_by_their_columns(folder, judge, tmp_path, capsys):
    for split in ("train", "test"):
        write_rows(tmp_path / f"{split}.jsonl", [{"question": f"{split} {i}", "reply": "yes"} for i in range(3)])
    output = tmp_path / "out" / "scores.jsonl"
    columns = ["--prompt_column", "question", "--answer_column", "reply"]
    evaluate(folder, "--data_path", tmp_path, *columns, "--output", output)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["test 0", "test 1", "test 2"]
    direct = rw_eval.score_rows(
        judge.model,
        [
            encoded(judge.tokenizer, text_record({name: row[name] for name in ("prompt", "answer")}), known=False)[0]
            for row in rows
        ],
        1,
    )
    assert [row["score"] for row in rows] == pytest.approx(direct, abs=1e-5)
    printed = capsys.readouterr()
    assert "accuracy" not in printed.out and "all scores mean" in printed.out
    assert "3 of 3 prompts are no ' Human: ... Assistant:' text; they are scored as they stand" in printed.err
    evaluate(folder, "--data_path", tmp_path, *columns, "--split", "train", "--output", output)
    assert "train 0" in output.read_text() and "test 0" not in output.read_text()
    with pytest.raises(UserError, match=r"--split dev: no such split; there are test, train"):
        evaluate(folder, "--data_path", tmp_path, "--split", "dev")


def test_a_file_of_pairs_has_single_answers_where_a_column_of_them_is_named(folder, tmp_path):
    path = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    records = rw_eval.read_records(reward_args(folder, "--data_path", path, "--answer_column", "rejected"))
    assert records == [
        replace(text_record({name: row[name] for name in ("prompt", "rejected")}), place=f"{path}, line {number}")
        for number, row in enumerate(PAIRS, start=1)
    ]


def test_rows_without_a_text_are_counted_with_their_place_and_none_left_is_an_error(folder, tmp_path, capsys):
    path = write_rows(tmp_path / "pairs.jsonl", [PAIRS[0], PAIRS[1] | {"chosen": " "}, {"prompt": "p", "chosen": "c"}])
    [record] = rw_eval.read_records(reward_args(folder, "--data_path", path))
    assert (record.prompt, *record.answers) == tuple(PAIRS[0].values())
    told = capsys.readouterr().err
    assert "1 of 3 rows used, 2 skipped" in told
    assert "line 2" in told and "field 'chosen' is empty" in told
    assert "line 3" in told and "field 'rejected' is missing" in told
    write_rows(path, [PAIRS[1] | {"chosen": " "}])
    with pytest.raises(UserError, match="0 of 1 rows used"):
        rw_eval.read_records(reward_args(folder, "--data_path", path))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data_path", "/no/such/file.jsonl"], "/no/such/file.jsonl: no such file"),
        (["--split", "test"], "--split names a split of --data_path"),
        (["--batch_size", "0"], "at least 1"),
        (["--show", "-1"], "not negative"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_loading(flags, message):
    with pytest.raises(UserError, match=message):
        evaluate("/no/such/model", *flags)


def test_a_file_with_neither_pairs_nor_answers_names_its_columns(folder, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"text_a": "p", "text_b": "c"}])
    with pytest.raises(UserError, match=r"expected the column 'prompt'.*, found .*'text_b'"):
        evaluate(folder, "--data_path", path)


# ---------------------------------------------------------------- the model


def test_a_language_model_is_no_reward_model_and_its_missing_head_is_named(model_folder):
    with pytest.raises(UserError, match=r"score\.weight"):
        evaluate(str(model_folder))


def test_a_token_that_the_checkpoint_does_not_know_is_an_error(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    tokenizer = load_hf_tokenizer(copy)
    tokenizer.add_tokens([f"<new{i}>" for i in range(64)])
    tokenizer.save_pretrained(copy)
    path = write_rows(tmp_path / "pairs.jsonl", [pair("say <new63>")])
    with pytest.raises(UserError, match="knows only"):
        evaluate(str(copy), "--data_path", path)


def test_a_name_on_the_hub_is_downloaded(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(rw_eval, "snapshot_download", lambda name: asked.append(name) or folder)
    monkeypatch.setattr("utils.model.loading.trouble_with_hub", lambda *_: None)
    judge = rw_eval.load_judge("someone/reward", reward_args("someone/reward"))
    assert asked == ["someone/reward"] and judge.name == "someone/reward"


def test_a_hub_that_cannot_be_reached_is_an_error_in_words():
    with pytest.raises(UserError, match=r"loaded from 'someone/reward'.*hub"):  # the tests run offline
        rw_eval.load_judge("someone/reward", reward_args("someone/reward"))


def test_bf16_computes_the_head_in_fp32(folder):
    judge = rw_eval.load_judge(folder, reward_args(folder, "--dtype", "bf16"))
    assert judge.model.rwtransformer.dtype == torch.bfloat16
    ids = torch.tensor([[5, 6, 7]])
    assert judge.model.forward_value(ids, torch.ones_like(ids))["values"].dtype == torch.float32


def test_scores_that_are_no_numbers_are_an_error(folder, judge, monkeypatch):
    monkeypatch.setattr(rw_eval, "score_rows", lambda *args: [0.0, 1.0, 0.0, math.nan])
    with pytest.raises(UserError, match="row 2 has the score nan"):
        rw_eval.score_records(judge, [question("p")] * 2, 100, 8)


# ---------------------------------------------------------------- what is told


def test_the_wilson_interval_has_its_known_values_and_solves_its_equation():
    assert rw_eval.wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert rw_eval.wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert rw_eval.wilson_interval(10, 10)[1] == 1.0
    for successes, total in ((3, 7), (61.5, 100)):
        for p in rw_eval.wilson_interval(successes, total):
            assert abs(successes / total - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / total), rel=1e-6)


def test_a_tie_is_half_right_and_marked(capsys):
    records = [question("first"), question("second"), question("third")]
    scores = [(2.0, 1.0), (1.5, 1.5), (0.0, 1.0)]
    assert [rw_eval.output_row(*row)["correct"] for row in zip(records, scores, strict=True)] == [1.0, 0.5, 0.0]
    assert "0.5000 (1.5 of 3 pairs, 1 ties;" in rw_eval.summary(records, scores, object())
    lines = rw_eval.score_table(records, scores, 20).splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["1.0000", "tie", "wrong"]
    assert "saved" not in rw_eval.summary(records, scores, object())


@pytest.mark.parametrize("record", [question("word " * 50), question("word " * 50, "word " * 50)])
def test_the_table_fits_100_columns_and_says_what_it_leaves_out(record):
    records = [record] * 30
    scores = [(-123.4567, 1234.5678)[: len(record.answers)]] * 30
    lines = rw_eval.score_table(records, scores, 20).splitlines()
    assert len(lines) == 22 and lines[-1] == "  ... and 10 more rows (--show)"
    assert max(map(len, lines)) <= 100


def test_without_a_file_the_built_in_pairs_are_scored(folder, capsys):
    evaluate(folder)
    printed = capsys.readouterr().out
    assert f"of {len(rw_eval.PAIRS)} pairs" in printed
    assert "Could you help me plan a vegetable garden" in printed
    evaluate(folder, "--show", "0")
    assert "vegetable garden" not in capsys.readouterr().out
