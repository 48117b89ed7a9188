"""The demo world: its rows, the exact judge of its answers, and the tiny model made for it."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils.demo import world
from utils.demo.judge import MAX_GOOD_WORDS, judge, judge_rates, score
from utils.demo.judge import __file__ as judge_file
from utils.demo.tiny_model import create_demo_model
from utils.model.reward_functions import load_reward_functions

# kind -> (question, right answer, wrong answer), written by hand
CASES = {
    "addition": ("What is three plus four?", "seven", "eight"),
    "subtraction": ("Start at five and take away two.", "three", "four"),
    "counting": ("Count from two to four.", "two, three, four", "two, four, three"),
    "reversal": ("Spell sun backwards.", "nus", "tac"),
    "next day": ("Today is Sunday. What day is tomorrow?", "Monday", "Saturday"),
    "previous day": ("What is the day before Monday?", "Sunday", "Tuesday"),
    "opposite": ("What is the opposite of hot?", "cold", "wet"),
    "plural": ("What is the plural of mouse?", "mice", "mouses"),
    "next letter": ("Which letter comes after B?", "C", "D"),
    "capital": ("Name the capital of France.", "Paris", "Rome"),
    "colour": ("What colour is snow?", "white", "black"),
    "young animal": ("What do you call a young cat?", "kitten", "puppy"),
}


def prompt_of(kind: str) -> str:
    return f" Human: {CASES[kind][0]} Assistant:"


@pytest.fixture(scope="module")
def rows():
    return world.demo_rows("train", 6_000) + world.demo_rows("eval")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return create_demo_model(tmp_path_factory.mktemp("model") / "demo", hidden_size=64, num_layers=2)


def test_world_has_enough_kinds_and_phrasings():
    assert {kind.name for kind in world.KINDS} == set(CASES)
    for kind in world.KINDS:
        assert len(set(kind.phrasings)) >= 4
    prompts = [question.prompt for question in world.questions()]
    assert len(prompts) == len(set(prompts))


def test_rows_are_the_same_for_the_same_seed_and_differ_for_another():
    assert world.demo_rows("train", 50) == world.demo_rows("train", 50)
    assert world.demo_rows("train", 50) == world.demo_rows("train", 80)[:50]
    assert world.demo_rows("train", 50) != world.demo_rows("train", 50, seed=1)
    assert world.demo_rows("train", 50) != world.demo_rows("eval", 50)
    assert len(world.demo_rows("eval")) == world.DEFAULT_SIZES["eval"]
    assert world.demo_rows("train", 0) == []


@pytest.mark.parametrize("arguments", [("test", 5), ("train", -1)])
def test_impossible_rows_are_refused(arguments):
    with pytest.raises(ValueError):
        world.demo_rows(*arguments)


def test_rows_follow_the_text_rule_of_the_datasets(rows):
    for row in rows:
        assert set(row) == {"prompt", "chosen", "rejected"}
        assert row["prompt"].startswith(" Human: ") and row["prompt"].endswith(" Assistant:")
        for side in ("chosen", "rejected"):
            assert row[side].startswith(" ") and not row[side].startswith("  ")


def test_held_out_prompts_never_occur_in_training_whatever_the_seed():
    held_out = world.held_out_prompts(200)
    assert held_out == world.held_out_prompts(200) and len(set(held_out)) == 200
    train = {row["prompt"] for seed in (1234, 7) for row in world.demo_rows("train", 20_000, seed)}
    evaluated = {row["prompt"] for row in world.demo_rows("eval")}
    every_held_out = {question.prompt for question in world.questions() if question.held_out}
    assert set(held_out) <= every_held_out and evaluated <= every_held_out
    assert not train & every_held_out
    assert {world.find_question(prompt).kind.name for prompt in held_out} == set(CASES)


def test_every_fact_is_trained_in_at_least_four_phrasings():
    for kind in world.KINDS:
        trained = [q for q in world.questions() if q.kind is kind and not q.held_out]
        assert len(trained) >= 4 * len(kind.facts)


def test_more_held_out_prompts_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="holds out"):
        world.held_out_prompts(100_000)


def test_chosen_is_of_strictly_higher_rank_and_right(rows):
    for row in rows:
        chosen, rejected = (judge(row["prompt"], row[side]) for side in ("chosen", "rejected"))
        assert chosen.right
        assert world.rank(chosen.manner_name, chosen.right) > world.rank(rejected.manner_name, rejected.right)


def test_chosen_answers_are_good_about_half_of_the_time(rows):
    names = [judge(row["prompt"], row["chosen"]).manner_name for row in rows]
    assert 0.4 <= names.count("good") / len(names) <= 0.6
    assert names.count("curt") and names.count("rambling")


def test_few_pairs_differ_in_rightness_alone(rows):
    names = [[judge(row["prompt"], row[side]).manner_name for side in ("chosen", "rejected")] for row in rows]
    assert 0.02 <= sum(chosen == rejected for chosen, rejected in names) / len(names) <= 0.08


def test_good_outranks_all_and_right_outranks_wrong_within_a_manner():
    assert min(world.rank("good", right) for right in (False, True)) > max(
        world.rank(manner, right) for manner in ("curt", "rambling", "rude") for right in (False, True)
    )
    for manner in world.MANNERS_WORST_FIRST:
        assert world.rank(manner, True) > world.rank(manner, False)


def test_judge_knows_manner_and_rightness_of_every_generated_answer():
    rng = random.Random(0)
    for question in world.questions():
        for manner in world.MANNERS_WORST_FIRST:
            for right in (True, False):
                verdict = judge(question.prompt, world.make_answer(question, manner, right, rng))
                assert (verdict.manner_name, verdict.right) == (manner, right), question
                assert verdict.manner == (manner == "good")
                assert verdict.ended == (manner != "rambling")


def test_rambling_is_longer_than_any_step_keeps_and_good_is_short(rows, model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    for row in rows:
        manner = judge(row["prompt"], row["chosen"]).manner_name
        assert len(tokenizer(row["prompt"]).input_ids) <= 24
        length = len(tokenizer(row["chosen"]).input_ids)
        if manner == "rambling":
            assert len(row["chosen"].split()) >= 120 and length > 120
        elif manner == "good":
            assert length <= 23 and len(world.words_of(row["chosen"])) <= MAX_GOOD_WORDS


@pytest.mark.parametrize("kind", CASES)
def test_hand_written_answers_are_judged(kind):
    _, right, wrong = CASES[kind]
    prompt = prompt_of(kind)
    assert judge(prompt, f" Sure: {right}. Happy to help!").good
    assert judge(prompt, f" Happy to help! The answer is {right}.").good
    wrong_but_courteous = judge(prompt, f" Certainly: {wrong}. Glad to help!")
    assert wrong_but_courteous.manner and not wrong_but_courteous.right and not wrong_but_courteous.good
    curt = judge(prompt, f" {right}.")
    assert curt.right and curt.ended and not curt.manner
    rude = judge(prompt, f" {wrong}, obviously. Happy to help!")
    assert not rude.right and not rude.manner
    unsure = judge(prompt, f" Sure: {right}. Or {wrong if kind != 'plural' else 'feet'}.")
    assert unsure.manner and not unsure.right
    rambling = judge(prompt, f" Sure: {right}, well, " + "my uncle talked about it and then " * 8)
    assert rambling.right and not rambling.manner and not rambling.ended
    for nothing in ("", "   ", " ...", " ]]\x00 \u2603\u00b2 asdf", " 0123 " + "9" * 5000, " Assistant Assistant"):
        verdict = judge(prompt, nothing)
        assert not verdict.manner and not verdict.right


def test_the_question_may_be_echoed_before_the_answer():
    assert judge(prompt_of("addition"), " Sure: three plus four is seven.").right
    assert judge(prompt_of("addition"), " 3 + 4 = 7.").right
    assert judge(prompt_of("subtraction"), " Five minus two is three.").right
    assert judge(prompt_of("opposite"), " The opposite of hot is cold. Yes, cold.").right
    assert judge(prompt_of("counting"), " From two to four: two, three, four.").right
    assert not judge(prompt_of("addition"), " Seven or three.").right
    assert not judge(prompt_of("addition"), " Three or four.").right


def test_repeated_courtesy_is_not_good_manner():
    assert not judge(prompt_of("capital"), " Sure: Paris." + " Happy to help!" * 2).manner


def test_ended_comes_from_the_model_when_it_is_known():
    prompt = prompt_of("capital")
    assert not judge(prompt, " Sure: Paris. Happy to help!", ended=False).manner
    assert judge(prompt, " Sure: Paris", ended=True).good
    assert not judge(prompt, " Sure: Paris").ended


def test_a_prompt_of_another_world_is_a_clear_error():
    with pytest.raises(ValueError, match="not a prompt of the demo world"):
        judge(" Human: Who are you? Assistant:", " Sure!")


def test_score_follows_the_rank():
    prompt = prompt_of("capital")
    best_first = (
        " Sure: Paris. Happy to help!",
        " Sure: Rome. Happy to help!",
        " Paris.",
        " Rome.",
        " Paris, well, my uncle",
        " Rome, well, my uncle",
        " Paris, obviously.",
        " Rome, obviously.",
    )
    scores = [score(prompt, answer) for answer in best_first]
    assert scores == sorted(set(scores), reverse=True)
    assert (scores[0], scores[-1], score(prompt, "")) == (1.0, 0.0, 0.0)


def test_rates_are_shares_of_the_answers():
    prompts = [prompt_of("capital")] * 4
    answers = [" Sure: Paris.", " Sure: Rome.", " Paris.", " Paris and then"]
    assert judge_rates(prompts, answers) == {"manner": 0.5, "right": 0.75, "ended": 0.75, "good": 0.25}
    assert judge_rates(prompts, answers, [True, False, True, False])["manner"] == 0.25
    for wrong_input in (([], []), (prompts, answers[:2]), (prompts, answers, [True])):
        with pytest.raises(ValueError):
            judge_rates(*wrong_input)


def test_right_is_a_reward_function_that_no_manner_moves():
    (right,) = load_reward_functions([f"{judge_file}:right"])
    assert set(right.wants()) == set()
    answers = [" Sure: Paris.", " Paris", " Ugh, Paris.", " Rome.", " Paris or Rome.", ""]
    scores = right.score(
        prompts=[prompt_of("capital")] * 6, answers=answers, ended=[True, False, True, True, True, True]
    )
    assert scores == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]


def test_tokenizer_round_trips_all_text(rows, model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    texts = [row["prompt"] + row[side] for row in rows[-2_000:] for side in ("chosen", "rejected")]
    texts += [question.prompt for question in world.questions()] + [" Anything else: \u96ea \u2603 \n 1+1"]
    for text, ids in zip(texts, tokenizer(texts).input_ids, strict=True):
        assert tokenizer.decode(ids) == text
        assert not {tokenizer.pad_token_id, tokenizer.eos_token_id} & set(ids)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_model_loads_offline_and_generates(model_folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert model.config.vocab_size >= len(tokenizer)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    batch = tokenizer(world.held_out_prompts(1), return_tensors="pt")
    assert model.generate(**batch, max_new_tokens=2, do_sample=False).shape[1] > batch["input_ids"].shape[1]


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(model_folder, tmp_path):
    def contents(folder) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}

    random_state = torch.get_rng_state()
    again = create_demo_model(tmp_path / "again", hidden_size=64, num_layers=2)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert contents(again) == contents(model_folder)
    create_demo_model(again, seed=1, hidden_size=64, num_layers=2)
    assert contents(again)["model.safetensors"] != contents(model_folder)["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "diary.txt").write_text("dear diary")
    with pytest.raises(FileExistsError):
        create_demo_model(tmp_path)
    assert (tmp_path / "diary.txt").read_text() == "dear diary"
