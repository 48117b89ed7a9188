"""Chat, comparison and reward scoring with models made here: a little training gives a model with known answers."""

import io
import json
import random
import re
import socket
import sys
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from evaluation_scripts import judging, prompt_eval, rw_eval
from evaluation_scripts.intervals import bootstrap_interval, wilson_interval
from evaluation_scripts.prompts import PROMPTS, read_prompts
from inference import chatbot, serve
from inference.conversation import AnswerStream, build_prompt
from utils.data import prompt_format as pf
from utils.generation.asking import AskedFormat, PromptWriter
from utils.generation.saved_model import LanguageModel, generate_answers, load_language_model, up_to_stop
from utils.model.tokenizer import end_token_ids
from utils.process.errors import UserError

BOS, EOS, PAD = 0, 1, 2
# What the tiny model has learned to say. The second answer goes on to write the human's next turn and never ends.
LESSONS = {
    "hi": " hello <b>you</b>",
    "talk": " yes\n\nHuman: no",
    "more": " Human: x",
}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}<{{ turn['role'] }}>{{ turn['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def make_tokenizer():
    """Bytes as tokens, so that each character of an ASCII text is one id; each text begins with BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def tiny_config(vocab_size, **changes):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    return LlamaConfig(vocab_size=vocab_size, max_position_embeddings=256, **sizes, **ids, **changes)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models of this size only lose by sharing out their work, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """Folders: "trained" knows LESSONS, "random" nothing, "reward" scores."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    random_model = LlamaForCausalLM(tiny_config(len(tokenizer)))
    random_model.save_pretrained(root / "random")
    trained = LlamaForCausalLM(tiny_config(len(tokenizer)))
    texts = []
    for question, answer in LESSONS.items():
        end = [EOS] if question == "hi" else []
        texts.append(tokenizer(f" Human: {question} Assistant:{answer}")["input_ids"] + end)
    longest = max(map(len, texts))
    ids = torch.tensor([text + [PAD] * (longest - len(text)) for text in texts])
    lengths = torch.tensor([len(text) for text in texts])
    labels = ids.masked_fill(torch.arange(longest) >= lengths[:, None], -100)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=5e-3)
    for _ in range(80):
        loss = trained(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained.save_pretrained(root / "trained")
    reward = LlamaForSequenceClassification(tiny_config(len(tokenizer), num_labels=1))
    torch.nn.init.normal_(reward.score.weight)
    reward.save_pretrained(root / "reward")
    for name in ("random", "trained", "reward"):
        tokenizer.save_pretrained(root / name)
    return {name: str(root / name) for name in ("random", "trained", "reward")}


def speaker(tokenizer, prompt_format="human_assistant", **changes):
    """A model that cannot speak, but is asked in a format."""
    return LanguageModel("x", None, tokenizer, [EOS], None, asked=AskedFormat(prompt_format, True, "a test"), **changes)


def chat_args(folder, *more):
    return chatbot.parse_args(["--path", folder, "--device", "cpu", *more])


@pytest.fixture(scope="module")
def trained(folders):
    return load_language_model(folders["trained"], chat_args(folders["trained"]))


@pytest.fixture(scope="module")
def random_lm(folders):
    return load_language_model(folders["random"], chat_args(folders["random"]))


# ---------------------------------------------------------------- the prompt format


def test_prompts_are_written_in_the_datasets_formats():
    turns = [user("q"), assistant("a"), user("q2 ")]
    assert pf.format_prompt(turns[:1]) == " Human: q Assistant:"
    assert pf.format_prompt(turns) == " Human: q Assistant: a Human: q2 Assistant:"
    assert pf.format_prompt(turns, "hh") == "\n\nHuman: q\n\nAssistant: a\n\nHuman: q2\n\nAssistant:"
    assert pf.format_answer("  an answer\n") == " an answer"


def test_a_chat_template_is_used_when_asked_and_missed_when_absent(tokenizer):
    with pytest.raises(ValueError, match="no chat template"):
        pf.format_prompt([user("q")], "chat_template", tokenizer)
    templated = make_tokenizer()
    templated.chat_template = CHAT_TEMPLATE
    text = pf.format_prompt([user("q")], "chat_template", templated)
    assert text == "<s><user>q</s><assistant>"
    assert pf.encode_prompt(text, templated, "chat_template").count(BOS) == 1
    assert pf.format_answer("a", "chat_template") == "a"
    assert pf.end_of_turn_id(templated) == EOS
    assert pf.end_of_turn_id(tokenizer) is None


@pytest.mark.parametrize(
    "turns", [[], [user("q"), assistant("a")], [user("q"), user("q")], [{"role": "critic", "content": "s"}, user("q")]]
)
def test_turns_that_make_no_prompt_are_refused(turns):
    with pytest.raises(ValueError):
        pf.format_prompt(turns)


def test_a_chat_template_that_refuses_the_turns_is_a_readable_error():
    refusing = make_tokenizer()
    refusing.chat_template = "{{ raise_exception('no such turns') }}"
    with pytest.raises(ValueError, match="refuses the conversation: no such turns"):
        pf.format_prompt([user("q")], "chat_template", refusing)


def test_an_unknown_style_is_refused():
    with pytest.raises(ValueError, match="unknown prompt format"):
        pf.format_prompt([user("q")], "xml")


@pytest.mark.parametrize("style", ["human_assistant", "hh"])
def test_a_formatted_prompt_is_read_back_and_left_as_it_is(style):
    turns = [user("q, Human: or not"), assistant("a"), user("q2")]
    text = pf.format_prompt(turns, style)
    assert pf.parse_turns(text) == turns
    assert pf.prompt_from_text(text, style) == text
    assert pf.prompt_from_text("What is up?", style) == pf.format_prompt([user("What is up?")], style)


def test_a_formatted_prompt_is_taken_apart_for_a_chat_template():
    templated = make_tokenizer()
    templated.chat_template = CHAT_TEMPLATE
    text = pf.prompt_from_text("\n\nHuman: q\n\nAssistant: a\n\nHuman: q2\n\nAssistant:", "chat_template", templated)
    assert text == "<s><user>q</s><assistant>a</s><user>q2</s><assistant>"


def test_an_answer_is_cut_where_the_next_human_turn_begins():
    assert pf.cut_at_next_human(" yes Human: no", "human_assistant") == " yes"
    assert pf.cut_at_next_human(" yes\n\nHuman: no Human: no", "hh") == " yes"
    assert pf.cut_at_next_human(" yes, Humans: no", "human_assistant") == " yes, Humans: no"
    assert pf.cut_at_next_human(" yes Human: no", "chat_template") == " yes Human: no"


def test_an_eos_that_the_tokenizer_appends_is_not_part_of_a_prompt(tokenizer):
    closing = make_tokenizer()
    closing.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    assert closing("q")["input_ids"] == [*tokenizer("q")["input_ids"], EOS]
    assert pf.encode_prompt("q", closing) == tokenizer("q")["input_ids"]


# ---------------------------------------------------------------- chat


def test_the_oldest_turns_are_lost_first_and_bos_stays(tokenizer):
    turns = [user("one"), assistant("1"), user("two"), assistant("2"), user("three")]

    def built(limit):
        ids, dropped, _ = build_prompt(turns, speaker(tokenizer), limit)
        return tokenizer.decode(ids[1:]), ids[0], len(ids), dropped

    whole = " Human: one Assistant: 1 Human: two Assistant: 2 Human: three Assistant:"
    assert built(None) == (whole, BOS, len(whole) + 1, 0)
    assert built(len(whole) + 1)[3] == 0
    assert built(len(whole))[0] == " Human: two Assistant: 2 Human: three Assistant:"
    assert built(30) == (" Human: three Assistant:", BOS, 25, 4)
    assert built(12) == (" Assistant:", BOS, 12, 4)


def test_an_answer_appears_bit_by_bit_without_marks_or_half_characters(tokenizer):
    shown = io.StringIO()
    stream = AnswerStream(speaker(tokenizer), 0, shown.write)
    ids = tokenizer(" héllo  Hum?\n\nHuman: again", add_special_tokens=False)["input_ids"]
    seen = []
    for length in range(1, len(ids) + 1):
        over = stream.update(ids[:length])
        seen.append(shown.getvalue())
        if over:
            break
    assert over and length < len(ids)
    assert "h" in seen and "hé" in seen and "héllo" in seen
    assert not any("\ufffd" in text or text.endswith((" ", " H", " Hu")) for text in seen)
    assert stream.close() == "héllo  Hum?"
    assert shown.getvalue() == "héllo  Hum?"


def test_an_empty_answer_before_the_next_turn_stays_empty(tokenizer):
    stream = AnswerStream(speaker(tokenizer), 0, io.StringIO().write)
    assert stream.update(tokenizer("\n\nHuman: x", add_special_tokens=False)["input_ids"])
    assert stream.close() == ""


def test_text_held_back_is_shown_when_the_answer_ends(tokenizer):
    shown = io.StringIO()
    stream = AnswerStream(speaker(tokenizer), 0, shown.write)
    ids = tokenizer(" a Hum", add_special_tokens=False)["input_ids"] + [EOS]
    assert stream.update(ids)
    assert shown.getvalue() == "a"
    assert stream.close() == "a Hum"


def test_chat_in_a_pipe(folders, monkeypatch, capsys):
    typed(monkeypatch, "hi\n\nclear\ntalk\nquit\nhi\n")
    chatbot.main(["--path", folders["trained"], "--greedy", "--device", "cpu"])
    printed = capsys.readouterr().out
    greeting, _, conversation = printed.partition("\n\n")
    assert all(word in greeting for word in ("clear", "quit", "stop"))
    assert printed.startswith(folders["trained"])
    assert conversation == (
        "Human: hi\nAssistant: hello <b>you</b>\n\nHuman: \nHuman: clear\n(a new conversation)\n\n"
        "Human: talk\nAssistant: yes\n\nHuman: quit\n"
    )


def chat_with(monkeypatch, capsys, lm, lines, **changes):
    """Chat in this process; returns the prompts that the model was given and the printed text."""
    prompts = []

    def remember(turns, *rest):
        prompts.append([turn["content"] for turn in turns])
        return original(turns, *rest)

    original = chatbot.build_prompt
    monkeypatch.setattr(chatbot, "build_prompt", remember)
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    conversation = chatbot.Dialogue(lm, changes.get("max_input_tokens"), "Assistant")
    chatbot.chat([conversation], {"do_sample": False, "max_new_tokens": 20})
    return prompts, capsys.readouterr().out


def test_the_conversation_is_remembered_until_clear_and_ends_with_the_input(monkeypatch, capsys, trained):
    prompts, _ = chat_with(monkeypatch, capsys, trained, ["hi", "more", "CLEAR", "hi"])
    assert prompts[0] == ["hi"]
    assert prompts[1][:2] == ["hi", "hello <b>you</b>"]
    assert prompts[2] == ["hi"]


@pytest.mark.parametrize("command", ["stop", "quit"])
def test_stop_and_quit_end_the_chat(monkeypatch, capsys, trained, command):
    prompts, _ = chat_with(monkeypatch, capsys, trained, [command, "hi"])
    assert prompts == []


def test_the_user_is_told_once_that_turns_are_forgotten(monkeypatch, capsys, trained):
    _, out = chat_with(monkeypatch, capsys, trained, ["hi", "hi", "hi"], max_input_tokens=30)
    assert out.count("its oldest turns are forgotten") == 1


def test_ctrl_c_cuts_the_answer_and_keeps_what_was_said(monkeypatch, capsys, trained):
    class Interrupting(chatbot.AnswerStream):
        def update(self, ids):
            if len(ids) == 6:
                raise KeyboardInterrupt
            return super().update(ids)

    monkeypatch.setattr(chatbot, "AnswerStream", Interrupting)
    prompts, out = chat_with(monkeypatch, capsys, trained, ["hi", "hi"])
    assert "[cut short]" in out
    assert prompts[1] == ["hi", "hell", "hi"]


def typed(monkeypatch, text):
    """Lines that come through a pipe."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **kwargs: None, raising=False)


def test_several_models_answer_side_by_side_and_their_histories_go_on(folders, monkeypatch, capsys, tmp_path):
    history = tmp_path / "talk.json"
    both = [folders["trained"], folders["trained"]]
    typed(monkeypatch, "hi\nquit\n")
    chatbot.main(["--path", *both, "--greedy", "--device", "cpu", "--history", str(history)])
    out = capsys.readouterr().out
    assert f"Assistant 1 ({both[0]}): hello <b>you</b>\nAssistant 2 ({both[1]}): hello <b>you</b>\n\n" in out
    said = [user("hi"), assistant("hello <b>you</b>")]
    assert json.loads(history.read_text()) == [{"model": path, "messages": said} for path in both]

    def started(*paths):
        args = chatbot.parse_args(["--path", *paths, "--history", str(history)])
        return chatbot.read_history(args.history, len(args.path))

    assert started(*both) == [said, said]
    with pytest.raises(UserError, match="holds 2 conversations, but --path names 1"):
        started(both[0])


def test_a_history_goes_into_the_next_prompt_and_clear_empties_the_file(monkeypatch, capsys, trained, tmp_path):
    history = tmp_path / "talk.json"
    history.write_text(json.dumps([{"messages": [user("a"), assistant("b")]}]))
    conversation = chatbot.Dialogue(trained, None, "Assistant")
    conversation.turns = chatbot.read_history(str(history), 1)[0]
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    prompts = []
    original = chatbot.build_prompt
    monkeypatch.setattr(
        chatbot, "build_prompt", lambda turns, *rest: prompts.append(turns[:]) or original(turns, *rest)
    )
    chatbot.chat([conversation], {"do_sample": False, "max_new_tokens": 3}, str(history))
    assert prompts == [[user("a"), assistant("b"), user("hi")]]
    assert len(json.loads(history.read_text())[0]["messages"]) == 4
    monkeypatch.setattr(sys, "stdin", io.StringIO("clear\n"))
    chatbot.chat([conversation], {}, str(history))
    assert json.loads(history.read_text())[0]["messages"] == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected a JSON list"),
        ('[{"turns": []}]', "expected a JSON list"),
        ('[{"messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": "a"}]}]', "is no text"),
        ('[{"messages": [{"role": "user", "content": "q"}]}]', "do not take turns"),
    ],
)
def test_a_broken_history_is_named(tmp_path, content, message):
    path = tmp_path / "talk.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        chatbot.read_history(str(path), 1)


def test_each_input_of_a_task_is_answered_on_its_own_and_greedily(folders, monkeypatch, capsys):
    typed(monkeypatch, "h\nstop\nh\n")
    prompts = []
    original = PromptWriter.write
    monkeypatch.setattr(PromptWriter, "write", lambda *args: prompts.append(original(*args)) or prompts[-1])
    chatbot.main(
        ["--path", folders["trained"], "--task_prompt", "{input}i", "--device", "cpu", "--max_new_tokens", "30"]
    )
    assert [one.text for one in prompts] == [f" Human: {line} Assistant:" for line in ("hi", "stopi", "hi")]
    out = capsys.readouterr().out
    assert "greedy" in out and out.count("Assistant: hello <b>you</b>\n") == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task_prompt", "Translate"], "is missing"),
        (["--task_prompt", "{input}", "--history", "x.json"], "there is none"),
    ],
)
def test_task_flags_that_make_no_sense_are_errors(folders, flags, message):
    with pytest.raises(UserError, match=message):
        chatbot.main(["--path", folders["random"], *flags])


def test_weights_in_4_bits_answer_alike_and_a_missing_package_is_named(folders, trained, monkeypatch):
    args = chat_args(folders["trained"], "--load_in_4bit")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        load_language_model(folders["trained"], args)
    monkeypatch.undo()
    pytest.importorskip("bitsandbytes")
    packed = load_language_model(folders["trained"], args)
    assert packed.model.get_memory_footprint() < 0.6 * trained.model.get_memory_footprint()
    [[answer]] = generate_answers(packed, prompts_of(packed, "hi"), 1, do_sample=False, max_new_tokens=60)
    assert (answer.text, answer.ended) == (LESSONS["hi"], True)


def test_what_is_no_language_model_folder_is_refused(folders, tmp_path):
    (tmp_path / "run" / "actor").mkdir(parents=True)
    (tmp_path / "run" / "actor" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"perhaps you mean .*actor"):
        chatbot.main(["--path", str(tmp_path / "run")])
    with pytest.raises(UserError, match=r"cannot be loaded|no tokenizer"):
        chatbot.main(["--path", str(tmp_path / "run" / "actor")])
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match="merge_lora"):
        chatbot.main(["--path", str(tmp_path)])
    with pytest.raises(UserError, match="is a reward model"):
        chatbot.main(["--path", folders["reward"], "--device", "cpu"])


@pytest.mark.parametrize(
    "flags",
    [
        ["--temperature", "-1"],
        ["--top_p", "0"],
        ["--top_k", "-1"],
        ["--max_new_tokens", "0"],
        ["--max_new_tokens", "256"],
        ["--max_input_tokens", "0"],
        ["--device", "no_such_device"],
        ["--prompt_style", "chat_template"],
    ],
)
def test_flags_that_make_no_sense_are_errors(folders, flags):
    with pytest.raises(UserError):
        chatbot.main(["--path", folders["random"], *flags])


# ---------------------------------------------------------------- generation


def prompts_of(lm, *questions):
    return [pf.encode_prompt(pf.format_prompt([user(question)]), lm.tokenizer) for question in questions]


def test_an_answer_ends_at_eos(trained):
    [[answer]] = generate_answers(trained, prompts_of(trained, "hi"), 1, do_sample=False, max_new_tokens=60)
    assert (answer.text, answer.ended) == (LESSONS["hi"], True)
    assert answer.num_tokens == len(LESSONS["hi"]) + 1
    [[cut]] = generate_answers(trained, prompts_of(trained, "hi"), 1, do_sample=False, max_new_tokens=3)
    assert (cut.text, cut.num_tokens, cut.ended) == (LESSONS["hi"][:3], 3, False)


def test_ids_after_the_first_stop_id_do_not_count():
    assert up_to_stop([5, 6, 1, 1, 0], [1]) == [5, 6, 1]
    assert up_to_stop([5, 6], [1]) == [5, 6]


@pytest.fixture(scope="module")
def gpt2(tokenizer, tmp_path_factory):
    """Absolute positions and tied weights: what Llama has not."""
    folder = str(tmp_path_factory.mktemp("gpt2"))
    torch.manual_seed(1)
    sizes = {"n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 2}
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), initializer_range=0.5, **sizes, **ids))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_language_model(folder, chat_args(folder))


@pytest.mark.parametrize("name", ["random_lm", "gpt2"])
def test_batch_neighbours_and_padding_do_not_change_greedy_answers(name, request):
    random_lm = request.getfixturevalue(name)
    prompts = prompts_of(random_lm, "a", "a much longer question than the first", "of middle length")
    settings = {"do_sample": False, "max_new_tokens": 24}
    alone = generate_answers(random_lm, prompts, 1, **settings)
    assert generate_answers(random_lm, prompts, 3, **settings) == alone


def test_a_pad_token_outside_the_embedding_does_not_change_answers(folders, random_lm):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == random_lm.model.config.vocab_size
    widened = LanguageModel("wide", random_lm.model, tokenizer, random_lm.stop_ids, random_lm.max_positions)
    prompts = prompts_of(random_lm, "a", "a much longer question than the first")
    settings = {"do_sample": False, "max_new_tokens": 12}
    assert generate_answers(widened, prompts, 2, **settings) == generate_answers(random_lm, prompts, 2, **settings)


def test_too_long_a_prompt_loses_its_beginning(random_lm, capsys):
    settings = {"do_sample": False, "max_new_tokens": 8}
    long, tail = [BOS] + [40] * 300 + [50] * 100, [BOS] + [40] * 147 + [50] * 100
    assert generate_answers(random_lm, [long], 1, **settings) == generate_answers(random_lm, [tail], 1, **settings)
    assert "lose their beginning" in capsys.readouterr().err


def test_ids_that_the_model_does_not_know_are_an_error(random_lm):
    with pytest.raises(UserError, match="knows only"):
        generate_answers(random_lm, [[BOS, 100_000]], 1, do_sample=False, max_new_tokens=4)


def test_saved_generation_settings_add_stop_ids_only_if_they_are_special(random_lm):
    model = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=[EOS, PAD, 50]))
    assert end_token_ids(model, random_lm.tokenizer) == [EOS, PAD]


# ---------------------------------------------------------------- the web page, without a browser


@pytest.fixture
def host(trained, random_lm, tmp_path):
    settings = {"do_sample": False, "max_new_tokens": 60}
    votes = serve.VotesFile(str(tmp_path / "votes" / "votes.jsonl"))
    return serve.Host([trained, random_lm], settings, [196, 196], votes, blind=False)


def asked(host, question, session=None):
    session = session or serve.Session()
    for _ in host.ask(session, question):
        pass
    return session


def rows_of(host):
    return [json.loads(line) for line in host.votes.path.read_text().splitlines()]


def test_two_answers_grow_at_the_same_time_and_the_better_one_goes_on(host):
    session, seen = serve.Session(), []
    for _ in host.ask(session, " hi "):
        seen.append(list(session.answers))
        assert not session.open_to_vote or len(seen) > 2
    assert session.open_to_vote and session.ended == [True, False]
    assert seen[0] == ["", ""] and seen[-1] == session.answers and session.answers[0] == "hello <b>you</b>"
    assert all(later[side].startswith(before[side]) for before, later in pairwise(seen) for side in (0, 1))
    assert "B stopped at 60 tokens" in host.verdict(session)
    worse = session.answers[1]
    told = host.vote(session, 0)
    assert "row 1 of" in told and f"A was {host.lms[0].name}" in told
    assert session.turns == [user("hi"), assistant("hello <b>you</b>")] and not session.open_to_vote
    assert rows_of(host) == [
        {"prompt": [user("hi")], "chosen": [assistant("hello <b>you</b>")], "rejected": [assistant(worse)]}
    ]


def test_a_tie_and_a_question_without_a_vote_write_nothing(host):
    session = asked(host, "hi")
    host.vote(session, None)
    session = asked(host, "talk", session)
    session = asked(host, "hi", session)
    assert rows_of(host) == []
    assert [turn["content"] for turn in session.turns[:2]] == ["hi", "hello <b>you</b>"]
    assert [turn["role"] for turn in session.turns] == ["user", "assistant"] * 2 + ["user"]


def test_what_was_not_seen_is_said_and_a_cut_question_is_not_voted_on(host):
    narrow = serve.Host(host.lms, host.settings | {"max_new_tokens": 5}, [24, 24], host.votes, blind=False)
    session = asked(narrow, "word " * 40)
    assert not session.open_to_vote and "The beginning of this question was not seen" in narrow.verdict(session)
    with pytest.raises(UserError, match="no two answers"):
        narrow.vote(session, 0)
    session = asked(narrow, "hi", session)
    assert session.open_to_vote and len(session.seen_turns) == 1
    assert "The oldest turns were not seen" in narrow.verdict(session)
    assert narrow.verdict(asked(narrow, "hi")).endswith("Which answer is better?")


def test_what_is_no_question_and_no_vote_is_refused(host, trained):
    with pytest.raises(UserError, match="Write a message first"):
        asked(host, "  \n")
    with pytest.raises(UserError, match="no two answers"):
        host.vote(serve.Session(), 0)
    twins = serve.Host([trained, trained], host.settings, [196, 196], host.votes)
    session = asked(twins, "hi")
    with pytest.raises(UserError, match="the same"):
        twins.vote(session, 0)
    session.answers = ["", "a"]
    with pytest.raises(UserError, match="without a word"):
        twins.vote(session, 1)
    assert session.open_to_vote and rows_of(host) == []


def test_sides_are_drawn_for_each_question_and_the_row_follows_the_side(host):
    random.seed(0)
    blind = serve.Host(host.lms, host.settings | {"max_new_tokens": 20}, host.limits, host.votes)
    orders = set()
    for _ in range(6):
        session = asked(blind, "hi")
        orders.add(tuple(session.order))
        assert session.answers[session.order.index(0)] == "hello <b>you</b>"
    assert orders == {(0, 1), (1, 0)}
    host.vote(session, session.order.index(0))
    assert rows_of(host)[-1]["chosen"] == [assistant("hello <b>you</b>")]


def test_a_stopped_answer_ends_early_and_is_not_voted_on(host):
    session = serve.Session()
    for count, _ in enumerate(host.ask(session, "hi")):
        session.stop = count >= 1
    assert not session.open_to_vote and len(session.answers[1]) < 30
    assert host.verdict(session) == "Stopped."
    session = serve.Session()
    for _ in host.ask(session, "hi"):
        session.clear()
    assert (session.turns, session.answers, session.stop) == ([], [], False)


def test_an_unfinished_line_of_the_votes_file_is_ended_and_its_rows_are_kept(tmp_path):
    path = tmp_path / "votes.jsonl"
    path.write_text(json.dumps({"prompt": [user("p")], "chosen": [assistant("c")], "rejected": [assistant("r")]}))
    votes = serve.VotesFile(str(path))
    votes.add([user("q")], "ü", "s")
    assert votes.count == 2
    added = {"prompt": [user("q")], "chosen": [assistant("ü")], "rejected": [assistant("s")]}
    assert json.loads(path.read_text().splitlines()[1]) == added
    with pytest.raises(UserError, match=r"end in \.jsonl"):
        serve.VotesFile(str(tmp_path / "votes.txt"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": " Human: hi Assistant:", "chosen": " a", "rejected": " b"}', "line 2: a vote as text.*new ones"),
        ('{"messages": []}', "line 2: no vote"),
        ("[1", "line 2: no JSON object"),
    ],
)
def test_a_votes_file_of_another_form_is_refused_and_stays_as_it_is(tmp_path, line, message):
    path = tmp_path / "votes.jsonl"
    path.write_text(content := json.dumps({"prompt": [user("p")]}) + "\n" + line)
    with pytest.raises(UserError, match=message):
        serve.VotesFile(str(path))
    assert path.read_text() == content


def test_the_page_is_refused_before_any_model_is_loaded(folders, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="names 3 models"):
        serve.main(["--path", "a", "b", "c"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"gradio: pip install -r requirements-extras.txt"):
        serve.main(["--path", folders["random"]])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    for version in ("5.50.0", "6.30.1", "7.0.0"):
        monkeypatch.setattr("importlib.metadata.version", lambda name, version=version: version)
        with pytest.raises(UserError, match=f"not tested with gradio {version}"):
            serve.main(["--path", folders["random"]])
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="cannot listen there"):
        serve.check_port("127.0.0.1", taken.getsockname()[1])


# ---------------------------------------------------------------- comparison


def headings(text):
    return [line for line in text.splitlines() if line.startswith("=====")]


def compare(folders, *flags, finetuned=("trained",)):
    prompt_eval.main(
        [
            *("--model_name_or_path_baseline", folders["random"], "--device", "cpu", "--max_new_tokens", "20"),
            *("--model_name_or_path_finetune", *(folders[name] for name in finetuned), *flags),
        ]
    )


def test_the_published_headings_are_printed(folders, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hi\n\ntalk\n")
    compare(folders, "--prompts_file", str(prompts))
    printed = capsys.readouterr().out
    assert headings(printed) == 2 * [
        "==========Baseline: Greedy=========",
        "==========finetune: Greedy=========",
        "====================prompt end=============================",
    ]
    assert "==========finetune: Greedy=========\nhello <b>you</b>\n" in printed


def test_several_models_and_modes_are_shown_in_order(folders, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "hi"}\n')
    flags = ["--do_sample", "--num_beams", "2", "--num_return_sequences", "2", "--prompts_file", str(prompts)]
    answers = tmp_path / "answers.jsonl"
    compare(folders, *flags, "--jsonl", str(answers), finetuned=("trained", "random"))
    out = capsys.readouterr().out
    assert headings(out) == [
        f"=========={title}: {mode}========="
        for mode in ("Greedy", "Beam", "Sampling", "Beam sampling")
        for title in ("Baseline", "finetune 1 (trained)", "finetune 2 (random)")
    ] + [prompt_eval.PROMPT_END]
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [len(row["answers"]) for row in rows] == [1] * 3 + [2] * 9
    greedy = rows[1]
    assert (greedy["title"], greedy["answers"], greedy["ended"]) == (
        "finetune 1 (trained)",
        ["hello <b>you</b>"],
        [True],
    )


def test_the_same_seed_gives_the_same_samples(folders, tmp_path):
    first, second = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    for path in (first, second):
        compare(folders, "--do_sample", "--jsonl", str(path))
    assert first.read_text() == second.read_text()


@pytest.mark.parametrize("ending", ["md", "html"])
def test_tables_escape_what_models_and_prompts_say(folders, tmp_path, ending):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "hi"}, {"prompt": "<script>alert(1)</script> a|b\nc"}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / f"table.{ending}"
    compare(folders, "--prompts_file", str(prompts), "--output", str(output))
    text = output.read_text()
    assert "<script>" not in text and "&lt;script&gt;" in text
    assert "hello &lt;b&gt;you&lt;/b&gt;" in text
    if ending == "md":
        table = [line for line in text.splitlines() if line.startswith("|")]
        assert len(table) == 2 + len(rows)
        assert {line.replace("\\|", "").count("|") for line in table} == {4}


def test_answers_of_every_way_are_judged_and_reported(folders, tmp_path, capsys):
    prompts, code = tmp_path / "prompts.jsonl", tmp_path / "judges.py"
    prompts.write_text('{"prompt": "hi", "wanted": "hello"}\n{"prompt": "talk", "wanted": "hello"}\n')
    code.write_text("def greeting(answers, wanted):\n    return [float(w in a) for a, w in zip(answers, wanted)]\n")
    flags = ["--prompts_file", str(prompts), "--judge_reward_model", folders["reward"]]
    flags += ["--judge_function", f"{code}:greeting", "--num_beams", "2", "--num_beam_groups", "2"]
    report, answers = tmp_path / "report.html", tmp_path / "answers.jsonl"
    compare(
        folders,
        *(*flags, "--contrastive_search", "--output", str(report), "--jsonl", str(answers)),
        finetuned=("trained", "random"),
    )
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    modes = ["Greedy", "Beam", "Diverse beam", "Contrastive"]
    assert [row["mode"] for row in rows] == [mode for mode in modes for _ in range(3)] * 2
    assert {name for row in rows for name in row["scores"]} == {"reward_model", "greeting"}
    greedy = {(row["prompt"], row["title"]): row["scores"] for row in rows if row["mode"] == "Greedy"}
    assert greedy["hi", "finetune 1 (trained)"]["greeting"] == [1.0]
    assert greedy["hi", "Baseline"] == greedy["hi", "finetune 2 (random)"]  # the same model: the same score, exactly
    expected = [score for row in rows[:3] for score in row["scores"]["reward_model"]]
    judge = rw_eval.load_judge(
        folders["reward"], rw_eval.parse_args(["--model_name_or_path", folders["reward"], "--device", "cpu"])
    )
    records = [
        replace(rw_eval.question_record(row["prompt"], row["answers"][0]), ended=tuple(row["ended"]))
        for row in rows[:3]
    ]
    assert {record.ended for record in records} == {(True,), (False,)}
    _, scores = rw_eval.score_records(judge, records, 200, 8)
    assert expected == pytest.approx([score for (score,) in scores], abs=1e-5)

    out = capsys.readouterr().out
    [line] = [line for line in out.splitlines() if re.match(r"greeting +Greedy +finetune 1", line)]
    assert "1/1/0" in line and "75.0% (" in line and "+0.500 (" in line
    page = report.read_text()
    assert "hello &lt;b&gt;you&lt;/b&gt;" in page and "<b>" not in page
    assert page.count('class="answer best"') >= 1 and "default-src 'none'" in page
    assert not re.findall(r"(?:src|href)=|url\(|@import|<script", page)


def test_a_comparison_counts_by_hand():
    found = judging.compare("judge", "Greedy", "model", [1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 1.0, 1.0])
    assert (found.better, found.ties, found.worse, found.win_rate, found.difference) == (2, 1, 1, 0.625, 0.5)
    assert found.win_rate_interval == wilson_interval(2.5, 4)
    low, high = found.difference_interval
    assert -1 <= low < 0.5 < high <= 2
    several = [
        {"prompt_number": 0, "mode": "Sampling", "title": title, "scores": {"judge": scores}}
        for title, scores in (("Baseline", [1.0, 0.0]), ("finetune", [0.9, 0.9]))
    ]
    assert [one.mean for one in judging.comparisons(several)] == [0.5, pytest.approx(0.9)]
    assert judging.comparisons(several)[1].better == 1


def test_the_bootstrap_interval_is_that_of_the_mean():
    assert bootstrap_interval([0.3] * 5) == pytest.approx((0.3, 0.3))
    torch.manual_seed(0)
    values = torch.randn(400, dtype=torch.float64) + 0.2
    low, high = bootstrap_interval(values.tolist())
    half = 1.96 * float(values.std()) / 400**0.5
    mean = float(values.mean())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.01)
    assert bootstrap_interval(values.tolist()) == (low, high)


def test_an_answer_can_be_cut_at_the_next_human_turn(folders, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("talk\n")
    answers = {}
    for flags in ([], ["--cut_at_next_human"]):
        output = tmp_path / "answers.jsonl"
        compare(folders, "--prompts_file", str(prompts), "--jsonl", str(output), *flags)
        [*_, answers[len(flags)]] = [json.loads(line)["answers"][0] for line in output.read_text().splitlines()]
    assert answers[0].startswith("yes\n\nHuman: no")
    assert answers[1] == "yes"


def test_each_language_asks_about_the_same_topics():
    assert list(PROMPTS) == ["English", "Chinese", "Japanese"]
    assert {len(prompts) for prompts in PROMPTS.values()} == {6}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_beam_groups", "2", "--num_beams", "3"], "must divide"),
        (["--num_beam_groups", "2", "--num_beams", "2", "--diversity_penalty", "-1"], "must not be negative"),
        (["--contrastive_search", "--top_k", "0"], "at least 1"),
        (["--contrastive_search", "--penalty_alpha", "1.5"], "from 0 to 1"),
        (["--judge_function", "/no/such/file.py:f"], "--judge_function: there is no file"),
        (["--judge_reward_model", "/no/such/folder"], "no such model folder"),
        (["--num_return_sequences", "2"], "greedy gives one answer"),
        (["--num_return_sequences", "3", "--num_beams", "2"], "more than --num_beams"),
        (["--output", "table.pdf"], "must end in"),
        (["--prompts_file", "/no/such/file.txt"], "cannot be read"),
        (["--prompts_file", "/no/such/file.jsonl"], "no such file"),
        (["--batch_size", "0"], "at least 1"),
        (["--do_sample", "--temperature", "0"], "must be above 0"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused_before_loading(folders, flags, message):
    with pytest.raises(UserError, match=message):
        compare(folders, *flags)


def test_flags_without_effect_are_pointed_out(capsys):
    models = ["--model_name_or_path_baseline", "a", "--model_name_or_path_finetune", "b"]
    given = {"penalty_alpha": "0.4", "top_k": "9", "temperature": "0.5", "diversity_penalty": "2"}
    flags = [word for name, value in given.items() for word in (f"--{name}", value)]
    prompt_eval.parse_args([*models, *flags])
    warnings = capsys.readouterr().err
    assert all(f"--{flag} has no effect" in warnings for flag in given)
    prompt_eval.parse_args([*models, *flags, "--contrastive_search", "--num_beams", "2", "--num_beam_groups", "2"])
    assert (
        "--temperature has no effect" in (warnings := capsys.readouterr().err) and warnings.count("has no effect") == 1
    )
    prompt_eval.parse_args(models)
    assert capsys.readouterr().err == ""


def test_a_row_without_a_prompt_is_named(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": null}\n')
    with pytest.raises(UserError, match=r"line 2.*'prompt'"):
        read_prompts(str(path))


def test_a_judge_that_asks_for_a_field_that_the_prompts_lack_is_refused_before_loading(folders, tmp_path):
    (tmp_path / "judges.py").write_text("def exact(answers, wanted):\n    return [0.0] * len(answers)\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hi", "wanted": "x"}\n{"prompt": "talk", "level": 1}\n')
    flags = ["--prompts_file", str(tmp_path / "prompts.jsonl"), "--judge_function", f"{tmp_path}/judges.py:exact"]
    with pytest.raises(UserError, match=r"exact asks for answers, wanted .*columns of the data: prompt\."):
        compare(folders, *flags)
