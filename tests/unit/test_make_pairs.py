"""Preference pairs from judged answers, and the sentiment judge of the proof on real language."""

import importlib
import json
import math
import sys
from collections import Counter
from itertools import permutations
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers import make_model, make_reward_model

from evaluation_scripts.judging import compare, comparison_table, comparisons
from evaluation_scripts.language_report import distinct_2, figures, log_prob_sums, markdown
from evaluation_scripts.language_report import main as report
from evaluation_scripts.make_pairs import best_rows, check_one_kind, main, pair_row, pairs_of, parse_args, reward_models
from evaluation_scripts.sampling import sample
from utils.data.conversation import Conversation, Texts, system, user
from utils.data.own_files import get_raw_dataset
from utils.generation.saved_model import load_language_model
from utils.process.errors import UserError

CHAT = Conversation([system("Be brief."), user("red?")])
LOADING = SimpleNamespace(
    device="cpu",
    dtype="fp32",
    prompt_format=None,
    trust_remote_code=False,
    allow_special_tokens=False,
    load_in_4bit=False,
    base_model=None,
)


def record(answers, worth, ended=None, number=0) -> dict:
    ended = [True] * len(answers) if ended is None else ended
    return {"prompt_number": number, "answers": answers, "worth": worth, "ended": ended}


def test_the_best_answer_meets_the_worst_and_all_pairs_are_ordered():
    one = record(["a", "b", "c"], [0.1, 0.9, -0.5])
    assert pairs_of(one, ["best_worst"], 0.0, Counter()) == [(1, 2)]
    assert pairs_of(one, ["all"], 0.0, Counter()) == [(1, 0), (1, 2), (0, 2)]


def test_ties_repetitions_and_empty_answers_are_left_out_and_counted():
    counts = Counter()
    assert pairs_of(record(["a", "b"], [1.0, 1.0]), ["best_worst"], 0.0, counts) == []
    assert counts["ties"] == 1
    assert pairs_of(record(["a", "b", "c"], [1.0, 0.8, 0.0]), ["all"], 0.5, counts) == [(0, 2), (1, 2)]
    assert counts["ties"] == 2
    assert pairs_of(record(["a", "a", ""], [1.0, 1.0, -1.0]), ["best_worst"], 0.0, counts) == []
    assert (counts["repeated answers"], counts["empty answers"], counts["prompts with a single answer"]) == (1, 1, 1)


@pytest.mark.parametrize("order", list(permutations([1.0, 5.0, 3.0, math.nan])))
def test_an_answer_without_a_finite_score_is_in_no_pair_and_counted(order):
    counts, one = Counter(), record(["a", "b", "c", "d"], list(order))
    assert pairs_of(one, ["best_worst"], 0.0, counts) == [(order.index(5.0), order.index(1.0))]
    assert len(pairs_of(one, ["all"], 0.0, Counter())) == 3
    assert counts["answers without a finite score"] == 1 and counts["ties"] == 0
    assert best_rows([one], [CHAT])[0]["score"] == 5.0


def test_prompts_without_a_finite_score_are_left_out_of_a_comparison_and_said():
    def records(title, scores):
        return [dict(prompt_number=i, mode="Greedy", title=title, scores={"judge": of}) for i, of in enumerate(scores)]

    ours = [[2.0, math.nan], [math.nan], [3.0], [1.0]]  # of two answers the other one counts
    found = comparisons(records("base", [[1.0], [1.0], [math.inf], [2.0]]) + records("ours", ours))
    assert (found[0].mean, found[0].left_out) == (pytest.approx(4 / 3), 1)
    assert (found[1].better, found[1].ties, found[1].worse, found[1].left_out) == (1, 0, 1, 2)
    assert (found[1].win_rate, found[1].difference, found[1].mean) == (0.5, 0.0, 1.5)
    assert "ours, Greedy: 2 prompts without a finite score by judge are left out" in comparison_table(found)
    assert math.isnan(compare("judge", "Greedy", "ours", [math.nan], [1.0]).mean)


def test_an_answer_that_was_cut_off_may_lose_and_never_wins():
    counts, one = Counter(), record(["a", "b", "c"], [0.9, 0.5, 0.1], ended=[False, True, False])
    assert pairs_of(one, ["best_worst"], 0.0, counts) == [(1, 2)]
    assert pairs_of(one, ["all"], 0.0, counts) == [(1, 2)]
    assert counts["pairs won by an answer that was cut off"] == 2
    assert pairs_of(record(["a", "b"], [1, 0], ended=[True, False]), ["best_worst"], 0.0, counts) == [(0, 1)]
    assert pairs_of(record(["a", "b"], [0, 1], ended=[True, False]), ["best_worst"], 0.0, counts) == []
    assert best_rows([one], [CHAT])[0]["messages"][-1]["content"] == "b"
    assert best_rows([record(["a"], [1.0], ended=[False])], [CHAT]) == []


def test_finished_answers_meet_among_themselves_and_no_pair_comes_twice():
    counts, one = Counter(), record(["a", "b", "c", "d"], [0.9, 0.5, 0.1, -1.0], ended=[False, True, True, False])
    assert pairs_of(one, ["finished"], 0.0, counts) == [(1, 2)]
    assert pairs_of(one, ["best_worst", "finished"], 0.0, counts) == [(1, 3), (1, 2)]
    assert pairs_of(one, ["finished", "all"], 0.0, counts) == [(1, 2), (1, 3), (2, 3)]
    finished = record(["a", "b"], [1.0, 0.0])
    assert pairs_of(finished, ["best_worst", "finished"], 0.0, counts) == [(0, 1)]
    assert counts["prompts with fewer than two finished answers"] == 0
    assert pairs_of(record(["a", "b"], [1, 0], ended=[True, False]), ["finished"], 0.0, counts) == []
    assert counts["prompts with fewer than two finished answers"] == 1


def test_conversations_stay_conversations_and_the_steps_read_them(tmp_path):
    one = record(["yes", "no"], [1.0, 0.0])
    rows = {"pairs": pair_row(CHAT, one, 0, 1), "best": best_rows([one], [CHAT])[0]}
    examples = {}
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        dataset = get_raw_dataset(str(tmp_path / f"{name}.jsonl"), str(tmp_path), 0, -1, {})
        need = ("prompt", "chosen", "rejected") if name == "pairs" else ("prompt", "chosen")
        (examples[name],) = dataset.examples(row, need)
    assert examples["pairs"].prompt == CHAT.prompt
    assert [answer[0]["content"] for answer in examples["pairs"].answers] == ["yes", "no"]
    assert examples["best"].answers[-1][-1]["content"] == "yes"


def test_texts_with_marks_stay_texts_and_both_kinds_do_not_mix():
    row = pair_row(Texts(" Human: red? Assistant:"), record(["yes", "no"], [1.0, 0.0]), 0, 1)
    assert row["prompt"] + row["chosen"] == " Human: red? Assistant: yes"
    with pytest.raises(UserError, match=r"prompt 1 has no .* prompt 2 has"):
        check_one_kind([CHAT, Texts(" Human: red? Assistant:")])


def test_a_model_its_prompts_and_two_judges_make_files_that_a_seed_repeats(tmp_path, capsys):
    make_model(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("red cat\nblue dog\ngreen house\n")
    (tmp_path / "judges.py").write_text(
        "def length(answers):\n    return [float(len(a)) for a in answers]\n"
        "def late(answers, ended):\n    return [0.0 if end else -1.0 for end in ended]\n"
    )
    judges = [f"{tmp_path}/judges.py:length", f"{tmp_path}/judges.py:late:1000"]
    given = ["--model_name_or_path", str(tmp_path / "model"), "--prompts_file", str(tmp_path / "prompts.txt")]
    given += ["--judge_function", *judges, "--num_generations_per_prompt", "6", "--max_new_tokens", "24"]
    for name in "ab":
        files = [f"{tmp_path}/{name}_{kind}.jsonl" for kind in ("pairs", "answers")]
        main([*given, "--pairs", "all", "--output", files[0], "--answers", files[1]])
    read = {name: (tmp_path / f"{name}_pairs.jsonl").read_text() for name in "ab"}
    assert read["a"] == read["b"] and read["a"]
    answers = [json.loads(line) for line in (tmp_path / "a_answers.jsonl").read_text().splitlines()]
    for one in answers:
        lengths, late = one["scores"]["length"], one["scores"]["late"]
        assert late == [0.0 if end else -1.0 for end in one["ended"]]
        assert one["worth"] == [a + 1000 * b for a, b in zip(lengths, late, strict=True)]
    for line in read["a"].splitlines():
        assert json.loads(line)["chosen_score"] > json.loads(line)["rejected_score"]
    assert "18 answers to 3 prompts" in capsys.readouterr().out


def test_a_reward_model_ranks_with_its_weight(tmp_path):
    make_model(tmp_path / "model")
    make_reward_model(tmp_path / "reward", tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("red cat\nblue dog\ngreen house\n")
    given = ["--model_name_or_path", str(tmp_path / "model"), "--prompts_file", str(tmp_path / "prompts.txt")]
    given += ["--num_generations_per_prompt", "6", "--max_new_tokens", "24", "--pairs", "all"]
    files = ["--output", str(tmp_path / "pairs.jsonl"), "--answers", str(tmp_path / "answers.jsonl")]
    main([*given, *files, "--judge_reward_model", f"{tmp_path}/reward:-2"])
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    for one in answers:
        assert one["worth"] == [-2 * score for score in one["scores"]["reward_model"]]


def test_flags_without_sense_are_refused(tmp_path):
    given = ["--model_name_or_path", "m", "--prompts_file", "p", "--output", "o"]
    with pytest.raises(UserError, match="nothing ranks the answers"):
        parse_args(given)
    with pytest.raises(UserError, match="a pair needs 2 answers"):
        parse_args([*given, "--judge_function", "f.py:x", "--num_generations_per_prompt", "1"])
    with pytest.raises(UserError, match="the weight 'much' is no number"):
        reward_models([f"{tmp_path}/r:much"])
    make_model(tmp_path / "r")
    assert [weight for _, _, weight in reward_models([f"{tmp_path}/r", f"{tmp_path}/r:0.5"])] == [1.0, 0.5]


def test_log_probs_of_samples_are_those_of_a_scoring_pass(tmp_path):
    make_model(tmp_path / "model")
    lm = load_language_model(str(tmp_path / "model"), LOADING)
    prompts = [lm.tokenizer(text)["input_ids"] for text in ("red", "red cat blue dog", "seven")]
    torch.manual_seed(0)
    samples = sample(lm, prompts, 2, 4, 12)
    assert [len(of) for of in samples] == [2, 2, 2]
    flat = [(prompt, one) for prompt, of in zip(prompts, samples, strict=True) for one in of]
    sums = log_prob_sums(lm, [prompt for prompt, _ in flat], [one.ids for _, one in flat], rows=4)
    assert sums == pytest.approx([one.log_prob for _, one in flat], abs=1e-3)
    assert all(one.ended == (one.ids[-1] in lm.stop_ids) for _, one in flat)


# ---------------------------------------------------------------- the judge and the report


@pytest.fixture
def vader(monkeypatch):
    """A stand-in for the package: a text is as positive as its share of "good"."""

    class Analyser:
        def polarity_scores(self, text):
            return {"compound": text.split().count("good") / len(text.split())}

    module = ModuleType("vaderSentiment.vaderSentiment")
    module.SentimentIntensityAnalyzer = Analyser
    monkeypatch.setitem(sys.modules, "vaderSentiment", ModuleType("vaderSentiment"))
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", module)
    monkeypatch.delitem(sys.modules, "evaluation_scripts.real_language.sentiment", raising=False)
    return importlib.import_module("evaluation_scripts.real_language.sentiment")


def test_sentiment_counts_only_in_answers_of_the_right_form(vader):
    four, five, sixty, more = ("good " * count for count in (4, 5, 60, 61))
    assert vader.sentiment([four, five, sixty, more], [True] * 4) == [-1.0, 1.0, 1.0, -1.0]
    assert vader.sentiment([five], [False]) == [-1.0]


def test_distinct_2_falls_with_repetition():
    assert distinct_2(["a b c d"]) == 1.0
    assert distinct_2(["a b a b a"]) == 0.5
    assert distinct_2(["one"]) == 0.0


def test_figures_and_report_hold_what_the_records_say():
    def of_model(name, gold):
        return [
            {
                "title": name,
                "prompt": f"p{n}",
                "answers": ["a b"],
                "num_tokens": [3],
                "ended": [n > 0],
                "scores": {"g": [s]},
            }
            for n, s in enumerate(gold)
        ]

    records = {"start": of_model("start", [0.0, 0.0, 0.0, 0.0]), "PPO": of_model("PPO", [1.0, 1.0, 0.0, 1.0])}
    models = {
        name: {"kl": 1.0, "plain_text_perplexity": 9.0} | figures(one, "g", None if name == "start" else [0.0] * 4)
        for name, one in records.items()
    }
    assert models["PPO"]["win_rate"] == 3.5 / 4 and models["start"]["win_rate"] is None
    assert models["PPO"]["eos_rate"] == 0.75 and models["PPO"]["gold"] == 0.75
    summary = {"models": models, "held_out_prompts": 4, "answers_per_prompt": 1, "seconds": 10.0}
    text = markdown(summary | {"reward_model": {"accuracy": 0.9, "pairs": 10}}, records, "g")
    assert "87.5%" in text and "10 held-out pairs: 90.0% right" in text and "- PPO (+1.00): a b" in text


def test_the_report_asks_each_model_that_is_there_and_keeps_all_answers(tmp_path, capsys):
    for name in ("base", "dpo", "grpo/actor"):
        make_model(tmp_path / name)
    prompts, plain, judge = tmp_path / "test.jsonl", tmp_path / "plain.txt", tmp_path / "judge.py"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("red cat", "blue dog", "seven")))
    plain.write_text("red house\n\nblue cat\n")
    judge.write_text("def brief(answers):\n    return [-float(len(a)) for a in answers]\n")
    given = ["--output_dir", str(tmp_path), "--prompts_file", str(prompts), "--judge_function", f"{judge}:brief"]
    report([*given, "--plain_text", str(plain), "--num_generations_per_prompt", "2", "--max_new_tokens", "6"])
    summary = json.loads((tmp_path / "report.json").read_text())
    assert list(summary["models"]) == ["start", "DPO", "GRPO"]
    kept = [json.loads(line) for line in (tmp_path / "report_answers.jsonl").read_text().splitlines()]
    assert [(one["title"], one["prompt_number"]) for one in kept] == [
        (title, number) for title in summary["models"] for number in range(3)
    ]
    for title, model in summary["models"].items():
        scores = [score for one in kept if one["title"] == title for score in one["scores"]["brief"]]
        answers = [answer for one in kept if one["title"] == title for answer in one["answers"]]
        assert scores == [-float(len(answer)) for answer in answers] and len(scores) == 6
        assert model["gold"] == pytest.approx(sum(scores) / 6)
        assert model["win_rate"] == (None if title == "start" else 0.5)  # the same weights and the same seed
        assert model["kl"] == pytest.approx(0, abs=1e-4)
    assert "3 held-out prompts, 2 sampled answers each." in (tmp_path / "report.md").read_text()
