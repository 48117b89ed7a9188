"""A saved model is asked as it was trained: the ids of every script's prompts are those of the training rows."""

import io
import json
import sys

import pytest
from helpers import flags, make_model, make_reward_model, write_pairs
from transformers import AutoTokenizer

from evaluation_scripts import judging, prompt_eval, rw_eval
from inference import chatbot, conversation, serve
from utils.data import prompt_format as pf
from utils.data.conversation import Conversation, Texts, assistant, system, user
from utils.data.encoding import REWARD, RLHF, PromptRowMaker, RewardRowMaker, TokenRules, make_row_maker
from utils.data.own_files import get_raw_dataset
from utils.generation.asking import AskedFormat, PromptWriter, choose_format
from utils.generation.saved_model import Answer
from utils.process.errors import UserError

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}<{{ turn['role'] }}>{{ turn['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WITHOUT_SYSTEM = CHAT_TEMPLATE.replace(
    "<{{", "{% if turn.role == 'system' %}{{ raise_exception('no system') }}{% endif %}<{{"
)
TALK = [user("say red"), assistant("red\n\nHuman: is no mark"), user("and </s> blue?")]
MARKED = {"human_assistant": " Human: q Assistant:", "hh": "\n\nHuman: q\n\nAssistant:"}


def remember(folder, prompt_format):
    """Give a saved model a format, as training does; None: a chat template of its own and no format."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if prompt_format in (None, "chat_template"):
        tokenizer.chat_template = CHAT_TEMPLATE
    if prompt_format is not None:
        pf.remember(tokenizer, prompt_format)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Format -> a language model of it; "unnamed" and "instruct" name none, and the second has a chat template."""
    root = tmp_path_factory.mktemp("models")
    made = {name: remember(make_model(root / name), name) for name in pf.FORMATS}
    made["unnamed"] = str(make_model(root / "unnamed"))
    made["instruct"] = remember(make_model(root / "instruct"), None)
    return made


@pytest.fixture(scope="module")
def judges(folders, tmp_path_factory):
    root = tmp_path_factory.mktemp("judges")
    made = {name: make_reward_model(root / name, folders["unnamed"]) for name in [*pf.FORMATS, "unnamed"]}
    return {name: remember(folder, name) if name in pf.FORMATS else str(folder) for name, folder in made.items()}


def trained_ids(folder, prompt_format, turns, limit=400):
    """The ids of a row of step 3."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    maker = PromptRowMaker(None, tokenizer, TokenRules(RLHF, limit, prompt_format=prompt_format))
    return made_row(maker, Conversation(turns))[0]


def made_row(maker, example):
    [(remembered, texts)] = maker.samples_of(example, {})
    return maker.row(remembered, maker.encoder.encode(texts))


def typed(monkeypatch, *lines):
    text = "".join(line + "\n" for line in lines)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **kwargs: None, raising=False)


def chat_prompts(monkeypatch, folders, lines, *flags, answer=" red"):
    """Ids that each model in a chat is asked."""
    seen = []

    def generate(lm, prompts, stopping_criteria, **settings):
        seen.append(prompts[0])
        stopping_criteria[0].update(lm.tokenizer(answer, add_special_tokens=False)["input_ids"])

    monkeypatch.setattr(chatbot, "generate_ids", generate)
    typed(monkeypatch, *lines)
    chatbot.main(["--path", *folders, "--device", "cpu", *flags])
    return seen


def page(tmp_path, folders, *flags):
    votes = str(tmp_path / "votes.jsonl")
    flags = ["--device", "cpu", "--greedy", "--show_names", "--max_new_tokens", "20", "--votes", votes, *flags]
    return serve.make_host(serve.parse_args(["--path", *folders, *flags]))


def page_prompts(monkeypatch, host, questions, answers=("red", "blue")):
    """Ids that each model of a page is asked; it then knows its own answer to each question."""
    seen = []

    def stream(lms, prompts, settings, is_stopped):
        seen.append(prompts)
        yield [conversation.GrowingAnswer(text, True) for text in answers[: len(lms)]]

    monkeypatch.setattr(serve, "stream_answers", stream)
    session = serve.Session()
    for question in questions:
        for _ in host.ask(session, question):
            pass
    return seen, session


def compared_prompts(monkeypatch, paths, *flags):
    """Ids that each model of a comparison is asked."""
    seen = []

    def generate(lm, prompts, batch_size, **settings):
        seen.append(prompts)
        return [[Answer(" red", 1, True)] for _ in prompts]

    monkeypatch.setattr(prompt_eval, "generate_answers", generate)
    named = ["--model_name_or_path_baseline", paths[0], "--model_name_or_path_finetune", *paths[1:]]
    prompt_eval.main([*named, "--device", "cpu", *flags])
    return seen


# ---------------------------------------------------------------- each script, each format


@pytest.mark.parametrize("prompt_format", pf.FORMATS)
def test_the_chat_asks_in_the_format_of_training(monkeypatch, folders, capsys, prompt_format):
    folder = folders[prompt_format]
    first, second = chat_prompts(monkeypatch, [folder], ["say </s>", "more"])
    assert first == trained_ids(folder, prompt_format, [user("say </s>")])
    turns = [user("say </s>"), assistant("red"), user("more")]
    assert second == trained_ids(folder, prompt_format, turns[-1:] if prompt_format == "bare" else turns)
    out = capsys.readouterr().out
    assert f"asked in its own format, {prompt_format}." in out
    assert ("trained on single questions: earlier turns are not seen" in out) == (prompt_format == "bare")


def test_a_chat_with_single_questions_says_so_once(monkeypatch, folders, capsys):
    chat_prompts(monkeypatch, [folders["bare"]], ["a", "b", "c", "d"])
    assert capsys.readouterr().out.count("earlier turns are not seen") == 1


@pytest.mark.parametrize("prompt_format", pf.FORMATS)
def test_a_task_is_asked_in_the_format_of_training(monkeypatch, folders, prompt_format):
    [ids] = chat_prompts(monkeypatch, [folders[prompt_format]], ["red"], "--task_prompt", "say {input}")
    assert ids == trained_ids(folders[prompt_format], prompt_format, [user("say red")])


@pytest.mark.parametrize("prompt_format", pf.FORMATS)
def test_the_page_asks_in_the_format_of_training(monkeypatch, folders, tmp_path, prompt_format):
    folder = folders[prompt_format]
    host = page(tmp_path, [folder])
    seen, _ = page_prompts(monkeypatch, host, ["say red", "more"])
    turns = [user("say red"), assistant("red"), user("more")]
    if prompt_format == "bare":
        assert "earlier turns are not seen" in host.remark()
        turns = turns[-1:]
    else:
        assert host.remark() == ""
    assert seen == [[trained_ids(folder, prompt_format, part)] for part in ([user("say red")], turns)]


def test_a_comparison_asks_each_model_in_its_own_format(monkeypatch, folders, tmp_path, capsys):
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    rows = [{"messages": [user("say red"), assistant("red")]}, {"messages": [user("and </s> blue?")]}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--prompts_file", str(prompts), "--jsonl", str(answers)]
    seen = compared_prompts(monkeypatch, [folders[name] for name in pf.FORMATS], *flags)
    questions = [[user("say red")], [user("and </s> blue?")]]
    assert seen == [[trained_ids(folders[name], name, turns) for turns in questions] for name in pf.FORMATS]
    told = capsys.readouterr().err
    assert all(f"is asked in its own format, {name}\n" in told for name in pf.FORMATS)
    written = [json.loads(line) for line in answers.read_text().splitlines()]
    assert {row["prompt"] for row in written} == {"say red", "and </s> blue?"}
    assert written[1]["formatted_prompt"] == "\n\nHuman: say red\n\nAssistant:"


def test_prompts_of_several_turns_are_asked_as_messages_and_shown_with_their_roles(monkeypatch, folders, tmp_path):
    prompts, report = tmp_path / "prompts.json", tmp_path / "report.md"
    prompts.write_text(json.dumps([{"conversations": [*TALK, assistant("blue")]}]))
    names = ("hh", "chat_template")
    flags = ["--prompts_file", str(prompts), "--output", str(report)]
    seen = compared_prompts(monkeypatch, [folders[name] for name in names], *flags)
    assert seen == [[trained_ids(folders[name], name, TALK)] for name in names]
    assert "user: say red<br>assistant: red<br><br>Human: is no mark<br>user: and" in report.read_text()
    with pytest.raises(UserError, match="prompt 1 cannot be asked in bare: the format bare holds one question"):
        compared_prompts(monkeypatch, [folders["bare"], folders["hh"]], *flags)


def test_functions_that_judge_get_the_fields_and_the_turns_of_the_prompts(monkeypatch, folders, tmp_path):
    code, prompts, answers = (tmp_path / name for name in ("judges.py", "prompts.jsonl", "answers.jsonl"))
    code.write_text(
        "def fits(prompts, answers, prompt_messages, wanted):\n"
        "    return [float(w) + len(m) + ('Human: and' in p) for p, m, w in zip(prompts, prompt_messages, wanted)]\n"
    )
    prompts.write_text(json.dumps({"messages": TALK, "wanted": 10}))
    flags = ["--prompts_file", str(prompts), "--jsonl", str(answers), "--judge_function", f"{code}:fits"]
    compared_prompts(monkeypatch, [folders["bare"], folders["hh"]], *flags, "--prompt_format", "hh")
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["scores"]["fits"] for row in rows] == [[14.0], [14.0]]


@pytest.mark.parametrize("prompt_format", pf.FORMATS)
def test_a_reward_model_scores_in_the_format_of_training(monkeypatch, judges, tmp_path, prompt_format):
    turns = TALK if prompt_format != "bare" else TALK[:1]
    example = Conversation(turns, ([assistant("yes")], [assistant(" no\n")]))
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": turns, "chosen": example.answers[0], "rejected": example.answers[1]}))
    seen = scored_rows(monkeypatch, judges[prompt_format], "--data_path", str(path))
    tokenizer = AutoTokenizer.from_pretrained(judges[prompt_format])
    maker = RewardRowMaker(None, tokenizer, TokenRules(REWARD, 512, prompt_format=prompt_format))
    assert seen == list(made_row(maker, example)[:2])
    asked = trained_ids(judges[prompt_format], prompt_format, turns)
    assert all(row[: len(asked)] == asked for row in seen)


def scored_rows(monkeypatch, folder, *flags):
    seen = []
    monkeypatch.setattr(rw_eval, "score_rows", lambda model, rows, size: seen.extend(rows) or [0.0] * len(rows))
    rw_eval.main(["--model_name_or_path", folder, "--device", "cpu", *flags])
    return seen


def test_built_in_pairs_are_scored_in_the_judge_s_format(monkeypatch, judges, capsys):
    tokenizer = AutoTokenizer.from_pretrained(judges["unnamed"])
    for name, start in (("hh", "\n\nHuman: Could"), ("bare", "Could"), ("unnamed", " Human: Could")):
        rows = scored_rows(monkeypatch, judges[name])
        assert tokenizer.decode(rows[0][1:]).startswith(start)
    assert "names no format of its own" in capsys.readouterr().err


def test_answers_are_judged_in_the_judge_s_own_format(monkeypatch, judges):
    """Whatever format the answering models had; an answer that was cut off gets no end, as in training."""
    records = [{"prompt_number": number, "answers": ["red", "red"], "ended": [True, False]} for number in (0, 1)]
    prompts = [Texts("say it"), Conversation(TALK)]
    seen = []
    monkeypatch.setattr(rw_eval, "score_rows", lambda model, rows, size: seen.extend(rows) or [0.0] * len(rows))
    args = rw_eval.parse_args(["--model_name_or_path", judges["hh"], "--device", "cpu"])
    judging.judge_by_reward_model(records, prompts, judges["hh"], args)
    starts = [trained_ids(judges["hh"], "hh", turns) for turns in ([user("say it")], TALK)]
    for start, rows in zip(starts, (seen[:2], seen[2:]), strict=True):
        assert all(row[: len(start)] == start for row in rows)
        assert rows[0] == [*rows[1], AutoTokenizer.from_pretrained(judges["hh"]).eos_token_id]
    assert records[1]["scores"]["reward_model"] == [0.0, 0.0]


def test_a_text_with_marks_is_judged_as_it_stands_with_one_blank_before_the_answer():
    for prompt in MARKED.values():
        assert judging.answered(Texts(prompt), "a").wholes == (prompt + " a",)
        assert judging.answered(Texts(prompt + " "), "a").wholes == (prompt + " a",)


# ---------------------------------------------------------------- which format


def test_a_flag_goes_before_the_model_s_own_format(monkeypatch, folders, capsys):
    for flag in (["--prompt_format", "human_assistant"], ["--prompt_style", "plain"]):
        [ids] = chat_prompts(monkeypatch, [folders["hh"]], ["q"], *flag)
        assert ids == trained_ids(folders["hh"], "human_assistant", [user("q")])
        assert "human_assistant, as --prompt_format says, although it was trained on hh" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        (["--prompt_style", "plain"], "human_assistant"),
        (["--prompt_style", "hh", "--prompt_format", "hh"], "hh"),
        (["--prompt_format", "human_assistant", "--prompt_style", "plain"], "human_assistant"),
        ([], None),
    ],
)
def test_the_former_flag_is_another_name_of_it(given, asked):
    assert chatbot.parse_args(["--path", "x", *given]).prompt_format == asked
    assert rw_eval.parse_args(["--model_name_or_path", "x", *given]).prompt_format == asked


def test_two_formats_at_once_are_refused():
    with pytest.raises(UserError, match=r"--prompt_style hh: the prompt format was already given as bare"):
        serve.parse_args(["--path", "x", "--prompt_format", "bare", "--prompt_style", "hh"])


def test_a_model_that_names_no_format_is_asked_by_its_template_if_it_has_one(monkeypatch, folders, capsys):
    [ids] = chat_prompts(monkeypatch, [folders["instruct"]], ["q"])
    assert ids == trained_ids(folders["instruct"], "chat_template", [user("q")])
    assert "asked in its tokenizer's chat template (it names no format of its own)" in capsys.readouterr().out
    [ids] = chat_prompts(monkeypatch, [folders["unnamed"]], ["q"])
    assert ids == trained_ids(folders["unnamed"], "human_assistant", [user("q")])
    assert "human_assistant (it names no format of its own; --prompt_format" in capsys.readouterr().out


def test_a_model_of_the_demos_single_questions_is_asked_each_question_alone(tmp_path, run_step, cache_folder):
    model, pairs = make_model(tmp_path / "m"), write_pairs(tmp_path / "pairs.jsonl", 60)
    places = dict(model_name_or_path=model, data_output_path=cache_folder)
    few = "--dtype fp32 --max_train_samples 4 --max_eval_samples 4 --data_split 1,1,1"
    run_step(1, flags(few, data_path="local/demo", output_dir=tmp_path / "demo", **places))
    run_step(1, flags(few, data_path=pairs, output_dir=tmp_path / "pairs", **places))
    asked = {}
    for name in ("demo", "pairs"):
        args = serve.parse_args(["--path", str(tmp_path / name)])
        [lm] = conversation.load_models(args)
        asked[name] = [conversation.build_prompt(turns, lm, None) for turns in (TALK, TALK[-1:])]
    assert asked["demo"][0] == (asked["demo"][1][0], 2, 0), "the earlier turns count as left out"
    assert len(asked["pairs"][0][0]) > len(asked["pairs"][1][0])


@pytest.mark.parametrize("prompt_format", ["human_assistant", "hh", "bare"])
def test_a_template_that_training_set_aside_is_used_when_asked_for(tmp_path, prompt_format):
    folder = remember(make_model(tmp_path / "model"), None)
    remember(folder, None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pf.remember(tokenizer, prompt_format)
    tokenizer.save_pretrained(folder)
    args = chatbot.parse_args(["--path", folder, "--device", "cpu", "--prompt_format", "chat_template"])
    [lm] = conversation.load_models(args)
    ids, *_ = conversation.build_prompt([user("q")], lm, None)
    assert lm.tokenizer.decode(ids) == "<s><user>q</s><assistant>"
    assert lm.tokenizer.eos_token_id in lm.stop_ids
    with pytest.raises(UserError, match="no chat template of its own"):
        bare = AutoTokenizer.from_pretrained(make_model(tmp_path / "base"))
        choose_format("base", bare, "chat_template")


# ---------------------------------------------------------------- texts and conversations


def written(tokenizer, prompt_format, known, text):
    return PromptWriter(tokenizer, AskedFormat(prompt_format, known, "")).write(Texts(text)).text


def test_a_text_with_marks_is_written_anew_where_the_format_is_known_and_another(folders):
    tokenizer = AutoTokenizer.from_pretrained(folders["instruct"])
    for mine, text in MARKED.items():
        for known in (True, False):
            assert written(tokenizer, mine, known, text) == text
        assert written(tokenizer, "bare", True, text) == "q"
        assert written(tokenizer, "chat_template", False, text) == "<s><user>q</s><assistant>"
    assert written(tokenizer, "hh", True, MARKED["human_assistant"]) == MARKED["hh"]
    assert written(tokenizer, "human_assistant", False, MARKED["hh"]) == MARKED["hh"]  # as it stands: nobody knows
    assert written(tokenizer, "bare", True, "\n Say red. ") == "\n Say red. "
    assert written(tokenizer, "human_assistant", False, "q") == MARKED["human_assistant"]


@pytest.mark.parametrize("prompt_format", ["human_assistant", "hh", "chat_template"])
@pytest.mark.parametrize("told", [None, "Be kind to all."])
def test_a_long_conversation_loses_whole_turns_as_in_training(folders, prompt_format, told):
    args = chatbot.parse_args(["--path", folders[prompt_format], "--device", "cpu"])
    [lm] = conversation.load_models(args)
    turns = [*TALK, assistant("blue"), user("thanks, please say seven and eight and house")]
    before = [] if told is None else [system(told)]
    whole = trained_ids(lm.name, prompt_format, [*before, *turns])
    lost = set()
    for limit in range(30, len(whole) + 2):
        ids, dropped, _ = conversation.build_prompt(turns, lm, limit, told)
        assert ids == trained_ids(lm.name, prompt_format, [*before, *turns], limit)
        assert len(ids) <= limit and ids[0] == lm.tokenizer.bos_token_id
        if told:
            assert told in lm.tokenizer.decode(ids)
        lost.add(dropped)
    assert lost == {0, 2, 4}


def test_no_room_for_the_head_leaves_the_end_of_the_question(folders):
    [lm] = conversation.load_models(chatbot.parse_args(["--path", folders["chat_template"], "--device", "cpu"]))
    whole, *_ = conversation.build_prompt([user("say red and blue")], lm, None)
    ids, dropped, lost = conversation.build_prompt([user("say red and blue")], lm, 5)
    assert dropped == 0 and lost > 0
    assert ids == whole[-5:]


def test_a_system_prompt_stands_before_the_conversation_and_in_the_votes(monkeypatch, folders, tmp_path):
    pair = [folders["hh"], folders["chat_template"]]
    seen = chat_prompts(monkeypatch, pair, ["q"], "--system_prompt", "Be kind.")
    turns = [system("Be kind."), user("q")]
    assert seen == [
        trained_ids(folder, name, turns) for folder, name in zip(pair, ("hh", "chat_template"), strict=True)
    ]
    host = page(tmp_path, pair, "--system_prompt", "Be kind.")
    prompts, session = page_prompts(monkeypatch, host, ["q"])
    assert prompts == [seen]
    host.vote(session, 1)
    assert json.loads(host.votes.path.read_text())["prompt"] == turns


def test_a_system_prompt_without_a_place_or_room_is_refused_with_the_reason(monkeypatch, folders, tmp_path):
    told = ["--system_prompt", "Be kind."]
    with pytest.raises(
        UserError, match=r"--system_prompt: .* has no place for one: the format bare holds one question"
    ):
        chat_prompts(monkeypatch, [folders["bare"]], [], *told)
    with pytest.raises(UserError, match="too long for the 5 tokens"):
        chat_prompts(monkeypatch, [folders["hh"]], [], *told, "--max_input_tokens", "5")
    with pytest.raises(UserError, match="the text is empty"):
        page(tmp_path, [folders["hh"]], "--system_prompt", " ")
    folder = make_model(tmp_path / "refusing")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = WITHOUT_SYSTEM
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="has no place for one: the chat template writes no system turn"):
        page(tmp_path, [str(folder)], *told)


# ---------------------------------------------------------------- votes


@pytest.mark.parametrize("names", [("hh", "hh"), ("human_assistant", "chat_template"), ("bare", "hh")])
def test_votes_are_rows_of_step_2_whose_prompts_are_what_the_models_were_asked(monkeypatch, folders, tmp_path, names):
    host = page(tmp_path, [folders[name] for name in names])
    questions = ["say\n\nHuman: red", "and </s> blue?"]
    asked, session = page_prompts(monkeypatch, host, questions, answers=("Assistant: is\n\nno mark", "blue"))
    session.open_to_vote = True
    host.vote(session, 0)
    dataset = get_raw_dataset(str(host.votes.path), str(tmp_path), 1, -1)
    assert dataset.recognised() == "preference pairs as messages, prompt explicit"
    [row] = dataset.rows_of("train")
    for name, ids in zip(names, asked[-1], strict=True):
        tokenizer = AutoTokenizer.from_pretrained(folders[name])
        maker = make_row_maker(dataset, tokenizer, TokenRules(REWARD, 400, prompt_format=name))
        [(remembered, texts)] = maker.samples(row)
        chosen, rejected = maker.row(remembered, maker.encoder.encode(texts))[:2]
        assert chosen[: len(ids)] == rejected[: len(ids)] == ids
        assert tokenizer.decode(chosen[len(ids) :]).strip() == "Assistant: is\n\nno mark</s>"


def test_two_models_of_a_page_see_the_same_turns_each_in_its_format(monkeypatch, folders, tmp_path):
    names = ("hh", "chat_template")
    seen, _ = page_prompts(monkeypatch, page(tmp_path, [folders[name] for name in names]), ["a", "b"])
    turns = [user("a"), assistant("red"), user("b")]
    assert seen[1] == [trained_ids(folders[name], name, turns) for name in names]
    seen, session = page_prompts(monkeypatch, page(tmp_path, [folders["hh"], folders["bare"]]), ["a", "b"])
    assert seen[1] == [trained_ids(folders[name], name, [user("b")]) for name in ("hh", "bare")]
    assert session.seen_turns == [user("b")]


# ---------------------------------------------------------------- what a reward model's rows may look like


def records_of(tmp_path, rows, *flags):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rw_eval.read_records(rw_eval.parse_args(["--model_name_or_path", "x", "--data_path", str(path), *flags]))


def test_every_shape_of_step_2_is_read(tmp_path, capsys):
    implicit = {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
    [record] = records_of(tmp_path, [implicit])
    assert (record.prompt, record.answers) == ([user("q")], ([assistant("a")], [assistant("b")]))
    assert "read as preference pairs as messages, prompt implicit" in capsys.readouterr().err
    [record] = records_of(
        tmp_path, [{"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}]
    )
    assert (record.prompt, record.answers) == (MARKED["hh"], (" a", " b"))
    [record] = records_of(tmp_path, [{"ask": "p", "good": "a", "bad": "b"}], *own_columns())
    assert (record.prompt, record.answers) == ("p", ("a", "b"))
    [record] = records_of(tmp_path, [{"messages": [*TALK, assistant("blue")]}])
    assert (record.prompt, record.answers, record.pairs) == (TALK, ([assistant("blue")],), [])
    [record] = records_of(tmp_path, [{"prompt": " Human: q Assistant:", "answer": " a"}])
    assert record.example == Texts(" Human: q Assistant:", (" Human: q Assistant: a",), (" a",))


def own_columns():
    names = {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    return [word for name, column in names.items() for word in (f"--{name}_column", column)]


def test_held_out_rows_alone_a_split_and_a_configuration_are_found(tmp_path):
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}

    def write(name, prompt):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(row | {"prompt": prompt}))

    def prompts(folder, *flags):
        args = rw_eval.parse_args(["--model_name_or_path", "x", "--data_path", str(tmp_path / folder), *flags])
        return [record.prompt for record in rw_eval.read_records(args)]

    write("alone/test.jsonl", "test")
    assert prompts("alone") == ["test"]
    for name in ("train", "test"):
        write(f"both/main/{name}.jsonl", name)
        write(f"both/other/{name}.jsonl", f"other {name}")
    assert prompts("both", "--config", "main") == ["test"]
    assert prompts("both", "--config", "other", "--split", "train") == ["other train"]
    with pytest.raises(UserError, match="--config"):
        prompts("both")


def test_what_turns_hold_beside_their_text_is_told(tmp_path, capsys):
    records_of(tmp_path, [{"messages": [user("q") | {"score": 1}, assistant("a")]}])
    assert "not used: messages[].score (1 turns)" in capsys.readouterr().err


def test_all_pairs_of_a_ranked_list_count(judges, tmp_path, capsys, monkeypatch):
    rows = [{"prompt": "q", "answers": ["worst", "best", "middle", "also middle"], "ranks": [3, 1, 2, 2]}]
    path, output = tmp_path / "rows.jsonl", tmp_path / "scores.jsonl"
    path.write_text(json.dumps(rows[0]))
    monkeypatch.setattr(rw_eval, "score_rows", lambda *args: [3.0, 1.0, 3.5, 2.0])  # the best answer first
    rw_eval.main(
        ["--model_name_or_path", judges["hh"], "--data_path", str(path), "--output", str(output), "--device", "cpu"]
    )
    printed = capsys.readouterr().out
    # best > middle, best < also middle, best > worst, middle < worst, also middle > worst
    assert "accuracy (higher is better): 0.6000 (3 of 5 pairs of 1 rows, 0 ties;" in printed
    assert "3/5" in printed
    low, high = rw_eval.wilson_interval(0.6, 1)
    assert f"95 % interval {low:.4f} to {high:.4f}" in printed
    row = json.loads(output.read_text())
    assert (row["ranks"], row["scores"], row["correct"]) == ([1, 2, 2, 3], [3.0, 1.0, 3.5, 2.0], 0.6)


def test_rows_that_the_judge_s_format_cannot_write_are_counted_with_their_place(judges, tmp_path, capsys):
    rows = [{"prompt": [user("q")], "chosen": "a", "rejected": "b"}, {"prompt": TALK, "chosen": "a", "rejected": "b"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rw_eval.main(["--model_name_or_path", judges["bare"], "--data_path", str(path), "--device", "cpu"])
    printed = capsys.readouterr()
    assert "of 1 pairs" in printed.out
    assert "1 of 2 rows cannot be written in bare: 1 x the format bare holds one question" in printed.err
    assert "line 2)" in printed.err
