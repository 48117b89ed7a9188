"""Reward functions get what their parameters are called: texts, columns of the data, the prompt's turns."""

import json

import numpy as np
import pytest
import torch
from helpers import flags, load_main, make_model, make_reward_model, read_metrics
from test_rlhf import _trainer

from training.step3_rlhf_finetuning.reporting import StepTimes, sample_rows
from utils.arguments import RLHFBatchSizes
from utils.data.batching import DataCollatorRLHF
from utils.engine.nonfinite import refuse_nonfinite
from utils.model.reward_functions import RewardFunction, check_columns, columns_wanted, load_reward_functions
from utils.process.errors import UserError
from utils.process.seeds import set_random_seed

PROMPTS, ANSWERS = ["one?", "two?"], [" 1", " 2"]
COLUMNS = [
    {"answer": "so #### 1", "level": 3, "prompt_messages": [{"role": "user", "content": "one?"}]},
    {"answer": "so #### 7", "level": None, "prompt_messages": [{"role": "user", "content": "two?"}]},
]


def seen_by(function, columns=COLUMNS) -> dict:
    """What a function was called with; it hands that to ``seen``."""
    seen.clear()
    RewardFunction("f", function)(PROMPTS, ANSWERS, columns)
    return dict(seen)


seen = {}


def note(**arguments):
    seen.update(arguments)
    return [0.0] * len(ANSWERS)


def test_arguments_go_by_name_whatever_their_order():
    assert seen_by(lambda answers, prompts: note(a=answers, p=prompts)) == {"a": ANSWERS, "p": PROMPTS}
    assert seen_by(lambda completions, answer: note(c=completions, a=answer)) == {
        "c": ANSWERS,
        "a": ["so #### 1", "so #### 7"],
    }
    assert seen_by(lambda *, level, prompt_messages: note(v=level, m=prompt_messages)) == {
        "v": [3, None],
        "m": [row["prompt_messages"] for row in COLUMNS],
    }


def test_a_function_of_trl_gets_the_rest_as_keywords():
    def reward_func(completions, answer, **kwargs):
        return note(completions=completions, answer=answer, kwargs=kwargs)

    got = seen_by(reward_func)
    assert got["completions"] == ANSWERS and got["answer"] == ["so #### 1", "so #### 7"]
    assert got["kwargs"] == {
        "prompts": PROMPTS,
        "answers": ANSWERS,
        "ended": [True, True],
        "level": [3, None],
        "prompt_messages": [row["prompt_messages"] for row in COLUMNS],
    }


def test_a_function_may_ask_whether_answers_ended():
    function = RewardFunction("f", lambda ended: [float(end) for end in ended])
    assert function(PROMPTS, ANSWERS, COLUMNS, [True, False]) == [1.0, 0.0]
    assert function(PROMPTS, ANSWERS) == [1.0, 1.0]
    assert function.wants() == ()  # no column of the data


def test_a_default_stands_where_the_data_have_no_such_column():
    def score(answers, level=9, style="plain"):
        return note(level=level, style=style)

    assert seen_by(score) == {"level": [3, None], "style": "plain"}
    assert seen_by(score, None) == {"level": 9, "style": "plain"}


def test_the_texts_win_over_columns_of_their_names_and_that_is_said_once(capsys):
    rows = [{"answers": "of the data", "prompts": "too"} for _ in ANSWERS]
    assert seen_by(lambda prompts, answers: note(p=prompts, a=answers), rows) == {"p": PROMPTS, "a": ANSWERS}
    functions = [RewardFunction("f", lambda answers: []), RewardFunction("g", lambda prompts: [])]
    check_columns(functions, ["answers", "prompts", "level"])
    [line] = capsys.readouterr().out.splitlines()
    assert "column answers, prompts is not what --reward_function gets" in line
    check_columns(functions, ["answer", "level"])
    check_columns([], ["answers"])
    assert not capsys.readouterr().out


def test_no_function_sees_what_another_did_to_its_lists():
    def spoil(prompts, answers):
        answers.clear()
        return [0.0, 0.0]

    RewardFunction("f", spoil)(PROMPTS, ANSWERS)
    assert ANSWERS == [" 1", " 2"]


def test_what_functions_want_of_the_data():
    texts = RewardFunction("f", lambda prompts, answers, completions: [])
    some = RewardFunction("g", lambda answers, answer, level=1, *, prompt_messages: [])
    whole = RewardFunction("h", lambda completions, **columns: [])
    assert (texts.wants(), some.wants(), whole.wants()) == ((), ("answer", "prompt_messages", "level"), "all")
    assert columns_wanted([]) == columns_wanted([texts]) == ()
    assert columns_wanted([some, texts, some]) == ("answer", "level", "prompt_messages"), "in one order, for the cache"
    assert columns_wanted([some, whole]) == "all"


@pytest.mark.parametrize(
    "function, missing",
    [
        (lambda questions, replies: [], "questions, replies"),
        (lambda answers, ground_truth, **kwargs: [], "ground_truth"),
        (lambda answers, prompt_messages: [], "prompt_messages"),
    ],
)
def test_what_cannot_be_served_is_refused_with_what_it_asks_for_and_what_there_is(function, missing):
    named = RewardFunction("mine", function, flag="--judge_function")
    with pytest.raises(UserError) as error:
        check_columns([RewardFunction("good", lambda answers, label: []), named], ["label", "answer"])
    asked = ", ".join(named.required)
    assert f"--judge_function mine asks for {asked} by the names" in str(error.value)
    assert f"there is no {missing}. There are: prompts, answers (also called" in str(error.value)
    assert "columns of the data: label, answer." in str(error.value)


# ---------------------------------------------------------------- step 3, with a file like GSM8K's

EXACT = """
def final(text):
    return text.rpartition("####")[2].strip()

def exact(completions, answer, **columns):
    assert len(columns["question"]) == len(completions)
    return [float(final(said) == final(right)) for said, right in zip(completions, answer)]

def strange(questions, replies):
    return []
"""
QUESTIONS = [[10, 11, 12], [13], [14, 15, 16, 17, 18], [19, 20]]  # as ids


class Prompts(list):
    """A dataset of step 3, as preparation makes one."""

    def __init__(self, rights: list[str]):
        columns = [{"question": f"question {i}", "answer": f"so #### {right}"} for i, right in enumerate(rights)]
        super().__init__(
            {"input_ids": ids, "columns": json.dumps(row)} for ids, row in zip(QUESTIONS, columns, strict=True)
        )
        self.lengths, self.columns = np.array([len(ids) for ids in QUESTIONS]), ("question", "answer")


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    base = tmp_path_factory.mktemp("exact")
    actor = make_model(base / "actor", "llama")
    folders = actor, make_reward_model(base / "reward", actor)
    return _trainer(folders, "--num_generations_per_prompt 2 --generation_batches 2 --max_answer_seq_len 4")


@pytest.fixture
def rewards(tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text(EXACT)
    return file


def test_step_3_compares_each_answer_with_the_column_of_its_own_row(trainer, rewards, monkeypatch):
    main, args, asked = load_main(3), trainer.args, []

    def answers_to(prompts, functions):
        def datasets_of_step(*_, **options):
            asked.append(options)
            return prompts, prompts

        monkeypatch.setattr(main.preparation, "datasets_of_step", datasets_of_step)
        trainer.reward_functions = functions
        loader = main.load_prompts(args, trainer.tokenizer, RLHFBatchSizes.of(args), functions)[2]
        set_random_seed(0)
        experience = main.generate(trainer, loader, args, 0, StepTimes(), refuse_nonfinite)
        return experience, [row["answer"] for row in sample_rows(experience, trainer.tokenizer, len(experience))]

    experience, said = answers_to(Prompts(["?"] * 4), [])
    order = main.load_prompts(args, trainer.tokenizer, RLHFBatchSizes.of(args), [])[1].rows_of_step(0)
    # Each row's right answer is what the model says to it the second time, of two.
    rights = ["?"] * 4
    for place, row in enumerate(order):
        rights[row] = said[2 * place + 1].strip()
    again, _ = answers_to(Prompts(rights), load_reward_functions([f"{rewards}:exact"]))
    assert torch.equal(again.input_ids, experience.input_ids)
    expected = [float(text.strip() == said[i | 1].strip()) for i, text in enumerate(said)]
    assert again.score_parts[:, 1].tolist() == expected and 4 <= sum(expected) < 8
    assert asked[0] == {"keep_columns": ()} and asked[-1] == {"keep_columns": "all"}
    with pytest.raises(UserError, match=r"strange asks for questions, replies .* columns of the data: question, ans"):
        answers_to(Prompts(rights), load_reward_functions([f"{rewards}:strange"]))


def test_prompts_bring_the_columns_that_their_rows_keep():
    collator = DataCollatorRLHF(8, pad_token_id=0)
    assert set(collator([{"input_ids": [1]}])) == {"prompt", "prompt_att_mask"}
    rows = [{"input_ids": [1], "columns": json.dumps(row)} for row in COLUMNS]
    assert collator(rows)["columns"] == COLUMNS


def test_a_dry_run_refuses_what_the_run_would(trainer, rewards, monkeypatch):
    from utils.planning import preflight

    prompts, asked = Prompts(["?"] * 4), []
    monkeypatch.setattr(
        preflight, "datasets_of_step", lambda *_, **options: (asked.append(options), (prompts, prompts))[1]
    )
    text, _ = preflight._data(trainer.args, 3, trainer.tokenizer, load_reward_functions([f"{rewards}:exact"]))
    assert text.startswith("4 prompts") and asked == [{"keep_columns": "all"}]
    with pytest.raises(UserError, match="strange asks for"):
        preflight._data(trainer.args, 3, trainer.tokenizer, load_reward_functions([f"{rewards}:strange"]))


GSM8K = """
import json
from pathlib import Path

SEEN = Path(__file__).with_suffix(".seen")


def final(text):
    return text.rpartition("####")[2].strip()


def exact(completions, answer, prompt_messages, **columns):
    rows = [dict(zip(("completion", "answer", "messages"), row)) for row in zip(completions, answer, prompt_messages)]
    with SEEN.open("a") as file:
        file.writelines(json.dumps(row | {"columns": sorted(columns)}) + "\\n" for row in rows)
    return [float(final(right) in said) for said, right in zip(completions, answer)]
"""


def test_gsm8k_rows_meet_the_answers_to_their_own_questions(model_folder, run_step, tmp_path):
    rows = [{"question": f"How many are {n}?", "answer": f"They are {n}. #### {n}", "level": n} for n in range(8)]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "exact.py").write_text(GSM8K)
    text = "--dtype fp32 --data_split 0,0,1 --reward_model_weight 0 --advantage_estimator grpo --max_answer_seq_len 8"
    text += " --num_generations_per_prompt 2 --per_device_generation_batch_size 4 --per_device_training_batch_size 4"
    places = dict(data_path=tmp_path / "gsm8k.jsonl", data_output_path=tmp_path / "cache", output_dir=tmp_path / "out")
    places |= dict(reward_function=f"{tmp_path / 'exact.py'}:exact", actor_model_name_or_path=model_folder)
    run_step(3, flags(text, **places))
    seen = [json.loads(line) for line in (tmp_path / "exact.seen").read_text().splitlines()]
    assert len(seen) == 12  # two answers to each of the rows that are trained on, in whole batches
    for row in seen:
        number = row["answer"].rpartition("#### ")[2]
        assert row["messages"] == [{"role": "user", "content": f"How many are {number}?"}]
        assert {"question", "level"} <= set(row["columns"])
    hits = [float(row["answer"].rpartition("#### ")[2] in row["completion"]) for row in seen]
    scores = [row["train/score/exact"] for row in read_metrics(tmp_path / "out") if "train/score/exact" in row]
    assert np.mean(scores) == pytest.approx(np.mean(hits))
