"""Rows in the schemas that datasets are published in: what each step makes of them, in text formats and templates.

In what is expected, what step 1 learns stands between double brackets.
"""

import csv
import json
import re
from itertools import count, pairwise
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_template_samples import sample
from helpers import make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils.data.chat_templates import named_template
from utils.data.encoding import RowEncoder, TokenRules
from utils.data.errors import DataError
from utils.data.own_files import get_raw_dataset
from utils.data.preparation import create_dataset_split, encode_rows

SPECIAL = ["<|im_start|>", "<|im_end|>", "<bos>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]"]
TEMPLATES = {"chatml": named_template("chatml"), "gemma2": sample("gemma2"), "qwen3": sample("qwen3")}
FORMATS = ("human_assistant", "hh", *TEMPLATES)


@pytest.fixture(scope="module", autouse=True)
def known_to_end():
    """The templates come to an end; a child process to try each of them takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.data.chat_templates.check_template_ends", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    made = make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    made.add_special_tokens({"additional_special_tokens": SPECIAL})
    return made


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
    else:
        text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(rows if path.suffix == ".txt" else text)
    return path


@pytest.fixture
def opened(tmp_path):
    """A function that opens rows as a dataset."""
    numbers = count()

    def opened(rows, ending="jsonl", **options):
        path = write(tmp_path / f"{next(numbers)}.{ending}", rows)
        return get_raw_dataset(str(path), str(tmp_path), 1, -1, **options)

    return opened


def encoded(dataset, tokenizer, step, style=None, length=1000):
    """(encoder, id rows) of all rows of a dataset in one step; ``style``: a format, or a template's name."""
    tokenizer.chat_template = TEMPLATES.get(style)
    rules = TokenRules(step, length, prompt_format="chat_template" if style in TEMPLATES else style)
    encoder, rows = RowEncoder(dataset, tokenizer, rules), dataset.rows_of("train")
    samples = encoder.read(rows, np.arange(len(rows)))
    return encoder, encoder.finish(*encoder.tokenise(samples)).to_pylist()


def written(tokenizer, step, row):
    """A row as text, without BOS; of step 1 with brackets, of step 2 its answers, the best one first."""

    def decode(ids):
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False).removeprefix("<s>")

    if step == 3:
        return decode(row["input_ids"])
    if step == 2:
        return [decode(ids) for ids in row["ranked_ids"] or (row["chosen_ids"], row["rejected_ids"])]
    ids, cuts = row["input_ids"], [0, *row["answer_spans"], len(row["input_ids"])]
    parts = [decode(ids[start:end]) for start, end in pairwise(cuts)]
    return "".join(f"[[{part}]]" if i % 2 else part for i, part in enumerate(parts))


def made(dataset, tokenizer, step, style=None):
    return [written(tokenizer, step, row) for row in encoded(dataset, tokenizer, step, style)[1]]


def skipped(dataset, tokenizer, step, style=None):
    return dict(encoded(dataset, tokenizer, step, style)[0].report.skipped)


# ---------------------------------------------------------------- the shapes


def user(content, **fields):
    return {"role": "user", "content": content} | fields


def answer(content, **fields):
    return {"role": "assistant", "content": content} | fields


def system(content):
    return {"role": "system", "content": content}


def said(who, value):
    return {"from": who, "value": value}


def hh(*turns):
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


def node(role, text, rank=None, *replies, **fields):
    return {"role": role, "text": text, "rank": rank, "lang": "en", "replies": list(replies)} | fields


def flat(root, tree="t", parent=None):
    """The messages of a tree as rows of their own."""
    name = f"{parent or tree}/{root['text']}"
    row = {"message_id": name, "parent_id": parent, "message_tree_id": tree} | root
    return [row | {"replies": None}, *(below for reply in root["replies"] for below in flat(reply, tree, name))]


HISTORY = [system("s"), user("q"), answer("m"), user("p")]
TREE = node(
    "prompter",
    "hi",
    None,
    node("assistant", "fair", 1),
    node(
        "assistant",
        "good",
        0,
        node("prompter", "more", None, node("assistant", "low", 2), node("assistant", "high", 0.0)),
        node("prompter", "gone", None, node("assistant", "x", 0), deleted=True),
    ),
    node("assistant", "unranked", float("nan")),
    node("assistant", "deleted", 0, deleted=True),
)
IN_TREE = [" Human: hi Assistant:[[ good]] Human: more Assistant:[[ high</s>]]"]
TREE_PAIRS = [
    [" Human: hi Assistant: good</s>", " Human: hi Assistant: fair</s>"],
    [f" Human: hi Assistant: good Human: more Assistant: {one}</s>" for one in ("high", "low")],
]
COMPLETION = {"critique": "c", "fine-grained_score": 1.0, "custom_system_prompt": "S", "annotations": {"a": None}}

ONE = " Human: q Assistant:[[ c</s>]]"
PAIR = [" Human: q Assistant: c</s>", " Human: q Assistant: r</s>"]
ASKED = " Human: q Assistant:"
LONG = " s Human: q Assistant:[[ m]] Human: p Assistant:"

# name: (rows, what the log says, what the steps make of them; None: refused). Answers that the format writes are
# preceded by one blank, so that is part of them.
SHAPES = {
    "ultrafeedback_binarized": (
        [
            {
                **{"prompt": "q", "prompt_id": "7", "chosen": [user("q"), answer("c")]},
                **{"rejected": [user("q"), answer("r")], "messages": [user("q"), answer("c")], "score_chosen": 8.0},
            }
        ],
        "preference pairs as texts and messages, which begin with the prompt; columns not read: prompt_id, messages, "
        "score_chosen",
        ([ONE], [PAIR], [ASKED]),
    ),
    "pairs, explicit": (
        [{"prompt": HISTORY, "chosen": [answer("c")], "rejected": [answer("r")]}],
        "preference pairs as messages, prompt explicit",
        (
            [f"{LONG}[[ c</s>]]"],
            [[f" s Human: q Assistant: m Human: p Assistant: {one}</s>" for one in "cr"]],
            [" s Human: q Assistant: m Human: p Assistant:"],
        ),
    ),
    "pairs, implicit": (
        [
            {"chosen": [*HISTORY, answer("c")], "rejected": [*HISTORY, answer("r")]},
            {  # they part early
                "chosen": [user("q"), answer("m"), user("p"), answer("c")],
                "rejected": [user("q"), answer("n"), user("o"), answer("r")],
            },
            {"chosen": [system("s"), user("q"), answer("c")], "rejected": [system("s"), user("z"), answer("r")]},
        ],
        "preference pairs as messages, prompt implicit",
        (
            [f"{LONG}[[ c</s>]]", " Human: q Assistant:[[ m]] Human: p Assistant:[[ c</s>]]"],
            [
                [f" s Human: q Assistant: m Human: p Assistant: {one}</s>" for one in "cr"],
                [f" Human: q Assistant: {a} Human: {b} Assistant: {c}</s>" for a, b, c in ("mpc", "nor")],
            ],
            [" s Human: q Assistant: m Human: p Assistant:", ASKED],
        ),
    ),
    "a prompt beside whole conversations with a system turn": (
        [{"prompt": "q", "chosen": [*HISTORY, answer("c")], "rejected": [*HISTORY, answer("r")]}],
        "preference pairs as texts and messages, which begin with the prompt",
        (
            [f"{LONG}[[ c</s>]]"],
            [[f" s Human: q Assistant: m Human: p Assistant: {one}</s>" for one in "cr"]],
            [" s Human: q Assistant: m Human: p Assistant:"],
        ),
    ),
    "a prompt of messages beside answers with a system turn": (
        [{"prompt": [user("q")], "chosen": [system("s"), user("q"), answer("c")], "rejected": [answer("r")]}],
        "preference pairs as messages, which begin with the prompt",
        ([f" s{ONE}"], [[" s" + one for one in PAIR]], [" s" + ASKED]),
    ),
    "Intel/orca_dpo_pairs": (
        [{"system": text, "question": "q", "chosen": "c", "rejected": "r"} for text in ("", "s")],
        "preference pairs as texts, written as conversations",
        ([ONE, f" s{ONE}"], [PAIR, [" s" + one for one in PAIR]], [ASKED, " s" + ASKED]),
    ),
    "texts with a system column are conversations in every row": (
        [{"system": text, "prompt": "q", "chosen": "c", "rejected": "r"} for text in ("", None, "s")],
        "preference pairs as texts, written as conversations",
        ([ONE, ONE, f" s{ONE}"], [PAIR, PAIR, [" s" + one for one in PAIR]], [ASKED, ASKED, " s" + ASKED]),
    ),
    "texts and lists in one column": (
        [
            {"prompt": "q", "chosen": " c", "rejected": " r"},
            {"prompt": [user("q")], "chosen": " c", "rejected": " r"},
            {"prompt": "q", "chosen": [user("q"), answer("c")], "rejected": "r"},
        ],
        "preference pairs as texts, written as conversations",
        ([ONE] * 3, [PAIR] * 3, [ASKED] * 3),
    ),
    "a question with an input, chosen and rejected": (
        [{"instruction": "q", "input": "i", "chosen": "c", "rejected": "r"}],
        "preference pairs as texts, written as conversations with input",
        (
            [" Human: q\n\ni Assistant:[[ c</s>]]"],
            [[f" Human: q\n\ni Assistant: {one}</s>" for one in "cr"]],
            [" Human: q\n\ni Assistant:"],
        ),
    ),
    "ShareGPT with one answer each in chosen and rejected": (
        [{"conversations": [said("human", "q")], "chosen": said("gpt", "c"), "rejected": said("gpt", "r")}],
        "preference pairs as messages, prompt explicit",
        ([ONE], [PAIR], [ASKED]),
    ),
    "OpenAI preference files": (
        [
            {
                "input": {"messages": [user("q")], "tools": [], "parallel_tool_calls": True},
                "preferred_output": [answer("c")],
                "non_preferred_output": [answer("r")],
            }
        ],
        "preference pairs as messages, as OpenAI's files hold them",
        ([ONE], [PAIR], [ASKED]),
    ),
    "prompt and completion as texts": (
        [{"prompt": "The sky is", "completion": " blue."}],
        "prompts and answers as texts",
        (["The sky is[[ blue.</s>]]"], None, ["The sky is"]),
    ),
    "prompt and completion as messages": (
        [{"prompt": [user("q")], "completion": [answer("c")]}],
        "prompts and answers as messages, prompt explicit",
        ([ONE], None, [ASKED]),
    ),
    "unpaired": (
        [{"prompt": [user("q")], "completion": [answer(one)], "label": one == "c"} for one in "cr"],
        "unpaired feedback (answers that were liked are used) as messages, prompt explicit",
        ([ONE], None, [ASKED, ASKED]),
    ),
    "unpaired, labels as numbers": (
        [{"prompt": "q", "completion": f" {one}", "label": int(one == "c")} for one in "cr"],
        "unpaired feedback (answers that were liked are used) as texts",
        (["q[[ c</s>]]"], None, ["q", "q"]),
    ),
    "HelpSteer2": (
        [
            *[{"prompt": "q", "response": one, "helpfulness": "xrc".index(one), "verbosity": 2} for one in "rc"],
            *[{"prompt": "p", "response": one, "helpfulness": 3, "verbosity": 2} for one in "xy"],  # a tie
            {
                **{"prompt": "q\n<extra_id_1>Assistant\nm\n<extra_id_1>User\np", "response": "c"},
                **{"helpfulness": 1, "verbosity": 2},
            },
        ],
        "rated responses, grouped by prompt; columns not read: verbosity",
        (
            [ONE, " Human: p Assistant:[[ x</s>]]", " Human: q Assistant:[[ m]] Human: p Assistant:[[ c</s>]]"],
            [PAIR],
            [ASKED, " Human: p Assistant:", " Human: q Assistant: m Human: p Assistant:"],
        ),
    ),
    "rated responses under system prompts": (
        [{"system": "st"[i // 2], "prompt": "q", "response": "rcxy"[i], "helpfulness": i % 2} for i in range(4)],
        "rated responses, grouped by prompt",
        (
            [f" s{ONE}", " t Human: q Assistant:[[ y</s>]]"],
            [[" s" + one for one in PAIR], [f" t Human: q Assistant: {one}</s>" for one in "yx"]],
            [" s" + ASKED, " t" + ASKED],
        ),
    ),
    "HelpSteer2 preference": (
        [
            {"prompt": "q", "response_1": "c", "response_2": "r", "preference_strength": -3},
            {"prompt": "p", "response_1": "x", "response_2": "y", "preference_strength": 0},
            {"prompt": "q", "response_1": "r", "response_2": "c", "preference_strength": 1},
        ],
        "comparisons of two responses by preference_strength",
        ([ONE, ONE], [PAIR, PAIR], [ASKED, " Human: p Assistant:", ASKED]),
    ),
    "HelpSteer3": (
        [{"domain": "code", "context": [user("q")], "response1": "c", "response2": "r", "overall_preference": -1}],
        "comparisons of two responses by overall_preference; columns not read: domain",
        ([ONE], [PAIR], [ASKED]),
    ),
    "PKU-SafeRLHF": (
        [{"prompt": "q", "response_0": "r", "response_1": "c", "better_response_id": 1, "safer_response_id": 0}],
        "comparisons of two responses by better_response_id; columns not read: safer_response_id",
        ([ONE], [PAIR], [ASKED]),
    ),
    "openai/summarize_from_feedback": (
        [
            {
                "info": {"id": "1", "post": "P", "title": "T", "subreddit": "s", "site": None, "article": None},
                "summaries": [{"text": " r", "policy": "a", "note": None}, {"text": " c", "policy": "b", "note": "n"}],
                **{"choice": 1, "worker": "w", "extra": {"confidence": 1}},
            },
            {"info": {"post": None, "article": "A"}, "summaries": [{"text": "c"}, {"text": "r"}], "choice": 0},
        ],
        "comparisons of two summaries; columns not read: worker, extra",
        (
            [
                " Human: Summarize this post.\nSUBREDDIT: s\nTITLE: T\nPOST: P Assistant:[[ c</s>]]",
                " Human: Summarize this post.\nPOST: A Assistant:[[ c</s>]]",
            ],
            [
                [f" Human: Summarize this post.\n{about} Assistant: {one}</s>" for one in "cr"]
                for about in ("SUBREDDIT: s\nTITLE: T\nPOST: P", "POST: A")
            ],
            [
                " Human: Summarize this post.\nSUBREDDIT: s\nTITLE: T\nPOST: P Assistant:",
                " Human: Summarize this post.\nPOST: A Assistant:",
            ],
        ),
    ),
    "Nectar": (
        [
            {
                "prompt": "\n\nHuman: q \n\nAssistant: ",
                "answers": [{"answer": a, "model": "m", "rank": float(r)} for a, r in ("r2", "c1", "r2", "x3")],
                "turns": 1,
            }
        ],
        "lists of answers, by their ranks or scores; columns not read: turns",
        ([ONE], [[f" Human: q Assistant: {one}</s>" for one in "crrx"]], [ASKED]),
    ),
    "UltraFeedback": (
        [
            {
                "instruction": "q",
                "completions": [COMPLETION | {"response": a, "overall_score": s} for a, s in ("r3", "c8")],
            }
        ],
        "lists of answers, by their ranks or scores",
        ([ONE], [PAIR], [ASKED]),
    ),
    "answers with scores beside them": (
        [{"prompt": "q", "answers": ["r", "c", "x"], "scores": [2, 3.5, -1]}],
        "lists of answers, by scores",
        ([ONE], [[f" Human: q Assistant: {one}</s>" for one in "crx"]], [ASKED]),
    ),
    "answers in order": (
        [{"prompt": "q", "answers": ["c", "r"]}],
        "lists of answers, the best one first",
        ([ONE], [PAIR], [ASKED]),
    ),
    "alpaca": (
        [{"instruction": "q", "input": text, "output": "c", "text": "Below is"} for text in ("", "i")],
        "questions with input and answers; columns not read: text",
        ([ONE, " Human: q\n\ni Assistant:[[ c</s>]]"], None, [ASKED, " Human: q\n\ni Assistant:"]),
    ),
    "alpaca with a history": (
        [{"instruction": "p", "input": "", "output": "c", "system": "s", "history": [["q", "m"]]}],
        "questions with input and answers",
        ([f"{LONG}[[ c</s>]]"], None, [" s Human: q Assistant: m Human: p Assistant:"]),
    ),
    "dolly": (
        [{"instruction": "q", "context": "i", "response": "c", "category": "x"}],
        "questions with context and answers; columns not read: category",
        ([" Human: q\n\ni Assistant:[[ c</s>]]"], None, [" Human: q\n\ni Assistant:"]),
    ),
    "GSM8K": (
        [{"question": "1 + 1", "answer": "two\n#### 2"}],
        "questions and answers",
        ([" Human: 1 + 1 Assistant:[[ two\n#### 2</s>]]"], None, [" Human: 1 + 1 Assistant:"]),
    ),
    "problem, solution and answer": (
        [{"problem": "q", "solution": "c", "answer": "42"}],
        "questions and answers; columns not read: answer",
        ([ONE], None, [ASKED]),
    ),
    "instruction and output": ([{"instruction": "q", "output": "c"}], "questions and answers", ([ONE], None, [ASKED])),
    "input and output": ([{"input": "q", "output": "c"}], "questions and answers", ([ONE], None, [ASKED])),
    "query and response": ([{"query": "q", "response": "c"}], "questions and answers", ([ONE], None, [ASKED])),
    "prompt and response": ([{"prompt": "q", "response": "c"}], "questions and answers", ([ONE], None, [ASKED])),
    "prompt and answer": ([{"prompt": "q", "answer": "c"}], "questions and answers", ([ONE], None, [ASKED])),
    "messages and answer": (
        [{"prompt": [user("q")], "question": "other", "answer": "c"}],
        "prompts and answers as texts and messages, prompt explicit; columns not read: question",
        ([ONE], None, [ASKED]),
    ),
    "OpenOrca": (
        [{"id": "1", "system_prompt": "s", "question": "q", "response": "c"}],
        "questions and answers; columns not read: id",
        ([f" s{ONE}"], None, [" s" + ASKED]),
    ),
    "ShareGPT": (
        [
            {"id": "1", "conversations": [said("system", "s"), said("human", "q"), said("chatgpt", "c")]},
            {"id": "2", "conversations": [said("human", "q"), said("gpt", "c"), said("human", "open")]},
            {"id": "3", "conversations": [said("gpt", "first"), said("human", "q"), said("gpt", "c")]},
        ],
        "conversations as ShareGPT; columns not read: id",
        ([f" s{ONE}", ONE], None, [" s" + ASKED, " Human: q Assistant: c Human: open Assistant:"]),
    ),
    "OpenHermes": (
        [
            {
                "conversations": [said("human", "q") | {"weight": None}, said("gpt", "c") | {"weight": 1.0}],
                **{"system_prompt": "s", "source": "x"},
            }
        ],
        "conversations as ShareGPT; columns not read: source",
        ([f" s{ONE}"], None, [" s" + ASKED]),
    ),
    "conversations of role and content": (
        [{"conversations": [user("q"), answer("c")]}],
        "conversations as messages",
        ([ONE], None, [ASKED]),
    ),
    "pairs of input and output": (
        [{"conversation": [{"input": "q", "output": "m"}, {"input": "p", "output": "c"}], "source": "x"}],
        "conversations as pairs of question and answer; columns not read: source",
        (
            [" Human: q Assistant:[[ m]] Human: p Assistant:[[ c</s>]]"],
            None,
            [" Human: q Assistant: m Human: p Assistant:"],
        ),
    ),
    "texts in turns": (
        [{"conversations": ["q", "c"], "source": "x"}],
        "conversations as texts in turns; columns not read: source",
        ([ONE], None, [ASKED]),
    ),
    "OpenAI chat files": (
        [
            {"messages": [{"role": "developer", "content": "s"}, user([{"type": "text", "text": "q"}]), answer("c")]},
            {"messages": [user("q"), answer("m", weight=0), user("p"), answer("c", weight=1)]},
            {"messages": [{"role": "system", "content": ""}, user("q"), answer("c", refusal=None)]},
        ],
        "conversations as messages",
        (
            [f" s{ONE}", ONE.replace("q Assistant:", "q Assistant: m Human: p Assistant:"), ONE],
            None,
            [" s" + ASKED, " Human: q Assistant: m Human: p Assistant:", ASKED],
        ),
    ),
    "messages as JSON": (
        [{"messages": json.dumps([user("q"), answer("c")], indent=2)}],
        "conversations as messages",
        ([ONE], None, [ASKED]),
    ),
    "thoughts inside the content": (
        [{"messages": [user("q"), answer("<think>\nt\n</think>\n\nc")]}],
        "conversations as messages",
        ([" Human: q Assistant:[[ <think>\nt\n</think>\n\nc</s>]]"], None, [ASKED]),
    ),
    "ultrachat": (
        [{"prompt": "q", "prompt_id": "7", "messages": [user("q"), answer("c")]}],
        "conversations as messages; columns not read: prompt, prompt_id",
        ([ONE], None, [ASKED]),
    ),
    "verl": (
        [
            {
                **{"data_source": "gsm8k", "prompt": [user("q")], "ability": "math"},
                **{"reward_model": {"style": "rule", "ground_truth": "42"}, "extra_info": {"answer": "a"}},
            }
        ],
        "prompts as messages; columns not read: data_source, ability, reward_model, extra_info",
        (None, None, [ASKED]),
    ),
    "trees": (
        [{"message_tree_id": "1", "prompt": TREE}, {"prompt": TREE | {"deleted": True}}],
        "trees of messages: best path, ranked siblings; columns not read: message_tree_id",
        (IN_TREE, TREE_PAIRS, [" Human: hi Assistant: good Human: more Assistant:"]),
    ),
    "messages of trees": (
        [*reversed(flat(TREE)), *flat(TREE | {"deleted": True}, "u")],
        "messages of trees: best path, ranked siblings; columns not read: lang, replies",
        (IN_TREE, TREE_PAIRS, [" Human: hi Assistant: good Human: more Assistant:"]),
    ),
    "prompts": ([{"prompt": "The sky"}], "prompts as texts", (None, None, ["The sky"])),
}


@pytest.mark.parametrize("name", SHAPES)
def test_what_each_step_makes_of_a_shape(name, opened, tokenizer):
    rows, words, steps = SHAPES[name]
    dataset = opened(rows)
    assert dataset.recognised() == words
    for step, expected in enumerate(steps, start=1):
        if expected is None:
            with pytest.raises(DataError, match=f"has no .*answers.*, so step {step} cannot use it"):
                encoded(dataset, tokenizer, step)
        else:
            assert made(dataset, tokenizer, step) == expected


def in_marks(text):
    """A text of the ChatML template as the format human_assistant writes it."""
    text = re.sub(r"<\|im_end\|>(\]\])?$", r"</s>\1", text)
    text = re.sub(r"<\|im_end\|>(\]\])?\n", r"\1", text)
    text = re.sub(r"<\|im_start\|>(system|developer)\n", " ", text).replace("<|im_start|>user\n", " Human: ")
    text = re.sub(r"<\|im_start\|>assistant\n(\[\[)?", r" Assistant:\1 ", text)
    return text.removesuffix(" ")


@pytest.mark.parametrize("name", SHAPES)
def test_a_chat_template_writes_the_same_turns(name, opened, tokenizer):
    rows, _, steps = SHAPES[name]
    dataset = opened(rows)
    for step in (1, 2, 3):
        if steps[step - 1] is None:
            continue
        found = made(dataset, tokenizer, step, "chatml")
        assert all("<|im_start|>" in text for texts in found for text in (texts if step == 2 else [texts]))
        found = [[in_marks(text) for text in texts] if step == 2 else in_marks(texts) for texts in found]
        assert found == made(dataset, tokenizer, step, "human_assistant")


@pytest.mark.parametrize("style", FORMATS)
def test_a_chosen_row_is_that_of_step_1_and_begins_with_the_prompt_of_step_3(style, opened, tokenizer):
    """But for templates that write earlier answers anew, where step 2 and 3 show them as a chat will."""
    for name, (rows, _, steps) in SHAPES.items():
        if None in steps[:2] or "tree" in name or (style == "gemma2" and "s Human" in str(steps)):
            continue
        rows = [row for row in rows if style != "qwen3" or "'m'" not in str(row)]
        dataset = opened(rows) if rows else None
        learned, compared, asked = ([*encoded(dataset, tokenizer, n, style)[1]] if rows else [] for n in (1, 2, 3))
        for row in learned:
            assert any(row["input_ids"][: len(one["input_ids"])] == one["input_ids"] for one in asked), name
        for row in compared:
            assert row["chosen_ids"] in [one["input_ids"] for one in learned], name
            assert any(row["chosen_ids"][: len(one["input_ids"])] == one["input_ids"] for one in asked), name


@pytest.mark.parametrize("style", FORMATS)
def test_one_conversation_in_every_shape_is_the_same_row(style, opened, tokenizer):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [*HISTORY, answer("c")] if style != "gemma2" else [*HISTORY[1:], answer("c")]
    before, last = turns[:-1], turns[-1:]
    other = [answer("r")]
    shapes = [
        {"messages": turns},
        {"conversations": [said(names[turn["role"]], turn["content"]) for turn in turns]},
        {"prompt": before, "chosen": last, "rejected": other},
        {"prompt": "p", "chosen": turns, "rejected": before + other},
        {"chosen": turns, "rejected": before + other},
        {"prompt": before, "completion": last},
        {"prompt": before, "response": "c"},
        {"prompt": before, "answers": ["c", "r"]},
        {"context": before, "response1": "r", "response2": "c", "overall_preference": 2},
        {"instruction": "p", "output": "c", "history": [["q", "m"]]} | ({"system": "s"} if len(turns) > 4 else {}),
        {"messages": json.dumps(turns)},
    ]
    for step in (1, 3):
        rows = [encoded(opened([row]), tokenizer, step, style)[1] for row in shapes]
        assert len(rows[0]) == 1 and rows.count(rows[0]) == len(shapes)


MIXED = ("texts and lists in one column", "OpenAI chat files")  # of several types, which columnar files cannot hold


@pytest.mark.parametrize("ending", ["json", "parquet", "csv"])
def test_other_kinds_of_files_hold_the_same_rows(ending, opened, tokenizer):
    """Parquet fills objects up with nulls; CSV has texts alone, and lists as JSON."""
    for name, (rows, _, steps) in SHAPES.items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        rows = [{key: row.get(key) for key in columns} for row in rows]
        kinds = {type(value) for row in rows for value in row.values()}
        if (ending != "json" and name in MIXED) or (ending == "csv" and dict in kinds):
            continue
        if ending == "parquet" and "tree" in name:
            rows = json.loads(json.dumps(rows).replace("NaN", "null"))
        dataset = opened(rows, ending)
        for step, expected in enumerate(steps, start=1):
            if expected is not None:
                assert made(dataset, tokenizer, step) == expected, name


# ---------------------------------------------------------------- transcripts


@pytest.mark.parametrize(
    "chosen, rejected, learned, prompt",
    [
        (hh("q", "c d"), hh("q", "c e"), [" c d</s>"], hh("q") + "\n\nAssistant:"),
        (hh("q", "c"), hh("q", "c"), [" c</s>"], hh("q") + "\n\nAssistant:"),  # step 2 drops it
        (hh("q", "m", "p", "c"), hh("q", "m", "p", "r"), [" c</s>"], hh("q", "m", "p") + "\n\nAssistant:"),
        (hh("q", "m", "p", "c"), hh("q", "n", "p", "r"), [" m", " c</s>"], hh("q") + "\n\nAssistant:"),
        (hh("q", "m", "p", "c"), hh("q", "m", "o", "r"), [" m", " c</s>"], hh("q") + "\n\nAssistant:"),
        # Marks that are set apart otherwise are what somebody said.
        (
            *(hh("say\nAssistant: x\nHuman: y", a) for a in "cr"),
            [" c</s>"],
            hh("say\nAssistant: x\nHuman: y") + "\n\nAssistant:",
        ),
        (
            *(hh("q", f"a word, Assistant: {a}") for a in "cr"),
            [" a word, Assistant: c</s>"],
            hh("q") + "\n\nAssistant:",
        ),
        (hh("q", "c\n\nAssistant: c"), hh("q", "r"), [" c\n\nAssistant: c</s>"], hh("q") + "\n\nAssistant:"),
        (" Human: q Assistant: c", " Human: q Assistant: r", [" c</s>"], " Human: q Assistant:"),
    ],
)
def test_transcripts_part_at_their_last_common_mark(chosen, rejected, learned, prompt, opened, tokenizer):
    dataset = opened([{"chosen": chosen, "rejected": rejected}])
    assert dataset.recognised() == "preference pairs as transcripts, prompt implicit"
    assert made(dataset, tokenizer, 3) == [prompt]
    [row] = made(dataset, tokenizer, 1)
    assert (
        re.findall(r"(?s)\[\[(.*?)\]\]", row) == learned and row.replace("[[", "").replace("]]", "") == chosen + "</s>"
    )
    pairs = [[chosen + "</s>", rejected + "</s>"]] if chosen != rejected else []
    assert made(dataset, tokenizer, 2) == pairs
    # A template takes them apart at the same marks, and no turn is lost; it learns the answers of the prompt, too.
    [chat] = made(dataset, tokenizer, 1, "chatml")
    taken_apart = in_marks(chat.replace("[[", "").replace("]]", ""))
    marks = f"{chosen}</s>".replace("\n\nHuman", " Human").replace("\n\nAssistant", " Assistant")
    assert taken_apart.replace("\n\nAssistant", " Assistant") == marks
    found = [f" {part.removesuffix('<|im_end|>')}" for part in re.findall(r"(?s)\[\[(.*?)\]\]", chat)]
    assert found[-len(learned) :] == [part.removesuffix("</s>") for part in learned]


def test_answers_without_a_common_prompt_are_skipped(opened, tokenizer):
    rows = [
        {"chosen": [system("s"), user(text), answer("c")], "rejected": [system("s"), user("z"), answer("r")]}
        for text in "qz"
    ]
    assert skipped(opened(rows), tokenizer, 2) == {"the answers have no prompt in common": 1}
    unanswered = [{"chosen": [user("q")], "rejected": [user("q"), answer("r")]}]
    assert skipped(opened(unanswered), tokenizer, 1) == {
        "field 'chosen': an answer ends in a turn that is not the assistant's": 1
    }
    inside = [{"chosen": hh("a, Assistant: q", "c"), "rejected": hh("a, Assistant: z", "c")}]
    assert skipped(opened(inside), tokenizer, 3) == {
        "the answers have no prompt in common that ends in 'Assistant:'": 1
    }
    dataset = opened(
        [{"chosen": hh("q", "c"), "rejected": hh("z", "c")}, {"chosen": hh("q", "c"), "rejected": hh("q", "")}]
    )
    assert skipped(dataset, tokenizer, 3) == {"the answers have no prompt in common that ends in 'Assistant:'": 1}
    assert skipped(dataset, tokenizer, 2) == {
        "the answers have no prompt in common that ends in 'Assistant:'": 1,
        "field 'rejected' after its prompt is empty": 1,
    }


def test_lines_of_text_are_questions(opened, tokenizer):
    dataset = opened("What?\n\n Human: q Assistant:\n", "txt")
    assert dataset.recognised() == "lines of text, a prompt each"
    assert made(dataset, tokenizer, 3) == [" Human: What? Assistant:", ASKED]


# ---------------------------------------------------------------- tools and reasoning

TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}},
}
OTHER_TOOL = {
    "type": "function",
    "function": {"name": "g", "parameters": {"type": "object", "properties": {"y": {"type": "string"}}}},
}


def calls(name, arguments):
    return [{"id": "call00001", "type": "function", "function": {"name": name, "arguments": arguments}}]


def test_calls_of_tools_are_the_same_in_every_spelling(opened, tokenizer):
    result = {"role": "tool", "content": "2"}
    rows = [
        {"messages": [user("q"), answer(None, tool_calls=calls("f", {"x": 1})), result, answer("c")], "tools": [TOOL]},
        {"messages": [user("q"), answer("", tool_calls=calls("f", '{"x": 1}')), result, answer("c")], "tools": [TOOL]},
        {
            "messages": [
                *[user("q"), answer(None, function_call={"name": "f", "arguments": '{"x": 1}'})],
                *[{"role": "function", "content": "2"}, answer("c")],
            ],
            "tools": json.dumps([TOOL]),
        },
        {
            "messages": [
                *[said("human", "q"), said("function_call", '{"name": "f", "arguments": {"x": 1}}')],
                *[said("observation", "2"), said("gpt", "c")],
            ],
            "tools": [TOOL],
        },
    ]
    texts = made(opened(rows), tokenizer, 1, "qwen3")
    assert len(texts) == 4 and len(set(texts)) == 1
    assert '"name": "f"' in texts[0] and re.search(
        r'\[\[[^]]*<tool_call>\n{"name": "f", "arguments": {"x": 1}}', texts[0]
    )
    assert "c<|im_end|>]]" in texts[0] and "None" not in texts[0] and "null" not in texts[0]
    assert skipped(opened(rows), tokenizer, 1) == {
        "field 'tool_calls' needs --chat_template, with a template that writes it": 4
    }
    assert skipped(opened(rows), tokenizer, 1, "gemma2") == {"the chat template writes no tools": 4}


def test_columnar_files_add_nothing_to_calls_and_tools(opened, tokenizer):
    """They fill each call with the arguments of the others, and each turn with the fields of the others."""
    rows = [
        {
            "messages": [
                user("q"),
                answer(None, tool_calls=calls(name, arguments)),
                {"role": "tool", "content": "2"},
                answer("c"),
            ],
            "tools": [tool],
        }
        for name, arguments, tool in (("f", {"x": 1}, TOOL), ("g", {"y": "z"}, OTHER_TOOL))
    ]
    parquet = opened(rows, "parquet")
    first = parquet.rows_of("train")[0]["messages"]
    assert first[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1, "y": None} and "tool_calls" in first[0]
    for step in (1, 3):
        assert made(parquet, tokenizer, step, "qwen3") == made(opened(rows), tokenizer, step, "qwen3")


@pytest.mark.parametrize(
    "call, reason",
    [
        ({"function": {"arguments": "{}"}}, "field 'messages': expected calls of functions with a name"),
        (
            {"function": {"name": "f", "arguments": "x"}},
            "field 'messages.arguments': expected an object, or JSON that spells one, found a string",
        ),
        ({"function": {"name": "f", "arguments": "{x"}}, "field 'arguments' begins like JSON and is none"),
        (3, "field 'messages': expected calls of functions with a name"),
    ],
)
def test_calls_that_say_nothing_are_skipped(call, reason, opened, tokenizer):
    rows = [{"messages": [user("q"), answer(None, tool_calls=[call]), {"role": "tool", "content": "2"}, answer("c")]}]
    assert skipped(opened(rows), tokenizer, 1, "qwen3") == {reason: 1}


def test_reasoning_needs_a_template_that_writes_it(opened, tokenizer):
    rows = [{"messages": [user("q"), answer("c", **{name: "t"})]} for name in ("reasoning_content", "thinking")]
    dataset = opened(rows)
    assert dataset.recognised() == "conversations as messages"
    assert (
        made(dataset, tokenizer, 1, "qwen3")
        == ["<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[[<think>\nt\n</think>\n\nc<|im_end|>]]"] * 2
    )
    for style, reason in (("hh", "needs --chat_template, with a template that writes it"), ("gemma2", "writes no")):
        [(found, rows)] = skipped(dataset, tokenizer, 1, style).items()
        assert reason in found and "reasoning_content" in found and rows == 2
    assert len(made(dataset, tokenizer, 3)) == 2  # the prompts say nothing of it


# ---------------------------------------------------------------- nothing is lost in silence


def unused(dataset, tokenizer, step=1, style=None):
    """What the counts of a run say is not used."""
    tokenizer.chat_template = TEMPLATES.get(style)
    rules = TokenRules(step, 1000, prompt_format="chat_template" if style in TEMPLATES else style)
    encoder, rows = RowEncoder(dataset, tokenizer, rules), dataset.rows_of("train")
    encode_rows(encoder, rows, np.arange(len(rows)), SimpleNamespace(write_batch=lambda batch: None))
    assert not encoder.counts.unused or f"not used: {next(iter(encoder.counts.unused))} (" in str(encoder.counts)
    return encoder.counts.unused


def test_fields_of_turns_that_nothing_is_done_with_are_counted(opened, tokenizer):
    rows = [
        {"messages": [user("q", name="Bo", lang="en"), answer("c", refusal=None, audio={"id": None}, score=0.5)]},
        {"messages": [user("q", name="Al"), answer("c", score=0.1), user("p"), answer("c", name="me")]},
    ]
    assert unused(opened(rows), tokenizer) == {"name": 3, "messages[].lang": 1, "messages[].score": 2}
    assert unused(opened(rows), tokenizer, step=3)["name"] == 2


def test_names_and_ids_are_used_by_the_templates_that_write_them(opened, tokenizer, monkeypatch):
    names = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.name }}\n{{ m.content }}<|im_end|>{% endfor %}"
    monkeypatch.setitem(TEMPLATES, "names", names)
    rows = [{"messages": [user("q", name="Bo"), answer("c")]}]
    assert unused(opened(rows), tokenizer, style="names") == {}
    assert unused(opened(rows), tokenizer, style="qwen3") == {"name": 1}
    monkeypatch.setitem(TEMPLATES, "mistral", sample("mistral_nemo"))
    result = {"role": "tool", "content": "2", "tool_call_id": "call00001", "name": "f"}
    rows = [{"messages": [user("q"), answer(None, tool_calls=calls("f", {"x": 1})), result, answer("c")]}]
    assert unused(opened(rows), tokenizer, style="mistral") == {"name": 1}
    assert unused(opened(rows), tokenizer, style="qwen3") == {"name": 1, "tool_call_id": 1}


def test_what_lists_and_nested_columns_hold_besides_is_counted(opened, tokenizer):
    assert unused(opened(SHAPES["Nectar"][0]), tokenizer) == {"answers[].model": 4}
    kinds = ("critique", "fine-grained_score", "custom_system_prompt")
    assert unused(opened(SHAPES["UltraFeedback"][0]), tokenizer) == {f"completions[].{one}": 2 for one in kinds}
    assert unused(opened(SHAPES["OpenAI preference files"][0]), tokenizer) == {"input.parallel_tool_calls": 1}
    assert unused(opened(SHAPES["trees"][0]), tokenizer) == {"prompt[].lang": 4}
    orphan = [*flat(TREE), node("assistant", "lost") | {"message_id": "x", "parent_id": "gone", "message_tree_id": "t"}]
    assert unused(opened(orphan), tokenizer) == {"messages whose parent is not there": 1}
    empty = [{"messages": [system(""), user("q"), answer("c")]}]
    assert unused(opened(empty), tokenizer) == {"messages[].content of system turns that are empty": 1}


def test_turns_and_prompts_that_are_not_used_are_counted(opened, tokenizer):
    bye = [{"messages": [user("q"), answer("c"), user("bye")]}, {"messages": [user("q"), answer("c")]}]
    assert unused(opened(bye), tokenizer) == {"turns behind the last answer": 1}
    assert unused(opened(bye[:1]), tokenizer, step=3) == {}  # there it is the question
    asks = node("prompter", "hi", None, node("assistant", "good", 0, node("prompter", "bye"))) | {"lang": None}
    assert unused(opened([{"prompt": asks}]), tokenizer)["turns behind the last answer"] == 1
    again = [*flat(TREE), flat(TREE)[1], flat(TREE)[2]]
    assert unused(opened(again), tokenizer) == {"messages whose message_id comes again later": 2}
    turns = [user("q"), answer("c"), user("p"), answer("d")]
    for prompt in ("q", "p", " p\n", hh("q", "c", "p") + "\n\nAssistant:", "be brief. p"):
        assert unused(opened([{"prompt": prompt, "chosen": turns}]), tokenizer) == {}, prompt
    other = [{"prompt": "something else", "chosen": turns}]
    assert unused(opened(other), tokenizer) == {"prompt, which is not what the answers begin with": 1}


def test_a_column_that_the_user_names_is_read_or_refused(opened):
    rows = [{"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": 1, "talk": [user("q")]}]
    with pytest.raises(DataError, match=r"--tools_column talk: .*is not used where rows are read as trees of messages"):
        opened([{"prompt": TREE, "talk": []}], columns={"tools": "talk"})
    with pytest.raises(DataError, match=r"--prompt_column prompt: .*not used .* conversations as messages"):
        opened(rows, columns={"messages": "talk", "prompt": "prompt"})


def test_reward_functions_get_the_columns_of_grouped_rows(opened, tokenizer):
    dataset = opened(SHAPES["HelpSteer2"][0])
    dataset.keep_also("all")
    maker = RowEncoder(dataset, tokenizer, TokenRules(3, 50, keep_columns=("verbosity", "prompt_messages"))).maker
    [(remembered, _)] = maker.samples(dataset.rows_of("train")[0])
    assert json.loads(remembered[2]) == {"verbosity": 2, "prompt_messages": [user("q")]}


# ---------------------------------------------------------------- what is no such shape


@pytest.mark.parametrize(
    "rows, words",
    [
        ([{"prompt": "q", "responses": ["a", "b"], "rewards": [7, 9]}], "lists of answers, by rewards"),
        ([{"messages": 3, "question": "q", "answer": "c"}], "questions and answers; columns not read: messages"),
        (
            [{"messages": None, "conversations": [said("human", "q")]}],
            "conversations as ShareGPT; columns not read: messages",
        ),
        ([{"question": "q", "answer": 42}], "questions; columns not read: answer"),
        (
            [{"question": "q", "answers": {"text": ["a"]}, "context": "i"}],
            "questions with context; columns not read: answers",
        ),
        (
            [{"prompt": "q", "completions": ["a", "b"], "labels": [True, False]}],
            "prompts as texts; columns not read: completions, labels",
        ),
        (
            [{"prompt": "q", "answers": ["a", "b"], "lengths": [7, 9]}],
            "prompts as texts; columns not read: answers, lengths",
        ),
        (
            [{"prompt": "q", "completion": " c", "label": "spam"}],
            "prompts and answers as texts; columns not read: label",
        ),
        ([{"question": "q", "answer": "c", "system": 3}], "questions and answers; columns not read: system"),
        ([{"question": "q", "answer": "c", "tools": "a hammer"}], "questions and answers; columns not read: tools"),
        (
            [{"info": "x", "summaries": 2, "choice": 1, "question": "q"}],
            "questions; columns not read: info, summaries, choice",
        ),
        ([{"prompt": "q", "": "0"}], "prompts as texts; columns not read: "),  # the index that pandas writes
        (
            [{"text": "x"}, {"messages": None}, {"messages": [user("q")]}],
            "conversations as messages; columns not read: text",
        ),
        ([{"question": None, "answer": ""}, {"question": "q", "answer": "c"}], "questions and answers"),
    ],
)
def test_contents_decide_as_names_do(rows, words, opened):
    assert opened(rows).recognised() == words


@pytest.mark.parametrize(
    "row",
    [
        {"text": "x"},
        {"chosen": 1, "rejected": 2},
        {"chosen": {"a": 1}, "rejected": {"a": 2}},
        {"answer": "a"},
        {"answers": ["a"], "scores": [1]},
        {"input": "x"},
        {"response_1": "a", "response_2": "b", "preference_strength": 1},
    ],
)
def test_columns_without_a_question_are_refused(row, opened):
    with pytest.raises(DataError, match="expected the column 'prompt' or 'messages' or 'conversation'"):
        opened([row])


@pytest.mark.parametrize(
    "row, step, reason",
    [
        ({"prompt": 3, "chosen": "c", "rejected": "r"}, 1, "field 'prompt': expected a string, found a number"),
        ({"prompt": "q", "chosen": ["c"], "rejected": "r"}, 1, "field 'chosen': expected a string, found a list"),
        (
            {"prompt": "q", "chosen": {"text": "c"}, "rejected": "r"},
            1,
            "field 'chosen': expected a string, found an object",
        ),
        ({"messages": str([user("q"), answer("c")])}, 1, "field 'messages' begins like JSON and is none"),
        ({"prompt": str([user("q")]), "chosen": "c"}, 3, "field 'prompt' begins like JSON and is none"),
        (
            {"prompt": [user("q"), answer("m")], "chosen": [answer("c")]},
            3,
            "field 'prompt': the prompt ends in a turn of the role assistant",
        ),
        (
            {"prompt": [user("z")], "chosen": [user("q"), answer("c")]},
            1,
            "field 'prompt' is not what the answers begin with",
        ),
        (
            {"prompt": [system("s"), user("q")], "chosen": [user("q"), answer("c")]},
            1,
            "field 'prompt' is not what the answers begin with",
        ),
        (
            {"prompt": [user("q")], "chosen": [answer("c"), user("p")]},
            1,
            "field 'prompt': an answer ends in a turn that is not the assistant's",
        ),
        (
            {"messages": [system("s"), user("q"), answer("c")], "system": "t"},
            1,
            "field 'system' and the first turn are two system prompts",
        ),
        (
            {"question": "q", "answer": "c", "context": {"a": 1}},
            1,
            "field 'context': expected a string, found an object",
        ),
        (
            {"prompt": "q", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": None}]},
            1,
            "field 'rank' is null",
        ),
        (
            {"prompt": "q", "answers": [{"answer": "a"}, {"answer": "b"}]},
            2,
            "field 'answers' holds objects without a rank or a score",
        ),
        (
            {"prompt": "q", "answers": [{"name": "f", "arguments": {}}]},
            1,
            "field 'answers' holds objects without any of answer, response, text, content, generated_text, output",
        ),
        (
            {"prompt": "q", "answers": ["a", "b"], "scores": [1, 1]},
            2,
            "field 'answers' holds no two answers of different ranks",
        ),
        (
            {"messages": [user([{"type": "image_url", "image_url": {}}]), answer("c")]},
            1,
            "field 'content' has parts that are no text",
        ),
        ({"messages": [system(None)]}, 1, "field 'messages' holds no turn but an empty one of the system's"),
        (
            {"instruction": "q", "output": "c", "history": [["a"]]},
            1,
            "field 'history': expected pairs of question and answer, found a list",
        ),
    ],
)
def test_rows_of_other_contents_are_skipped_with_the_reason(row, step, reason, opened, tokenizer):
    assert skipped(opened([row]), tokenizer, step) == {reason: 1}


def test_a_system_prompt_of_another_kind_is_skipped_and_not_left_out(opened, tokenizer):
    dataset = opened([{"question": "q", "answer": "c", "system": "s"}, {"question": "q", "answer": "c", "system": 3}])
    assert skipped(dataset, tokenizer, 1) == {"field 'system': expected a string, found a number": 1}


def test_steps_keep_to_one_format_where_an_answer_is_missing(opened, tokenizer):
    """A row whose answers are null is still a prompt of step 3, written as the others are."""
    rows = [{"prompt": "q", "chosen": [user("q"), answer("c")], "rejected": None}, {"prompt": "q", "chosen": None}]
    assert made(opened(rows), tokenizer, 3) == [ASKED, ASKED]


def test_rows_in_memory_are_read_as_those_of_files(opened, tokenizer):
    dataset, tokenizer.chat_template = opened(SHAPES["ShareGPT"][0]), None
    made_here = create_dataset_split(SHAPES["ShareGPT"][0], dataset, 1, tokenizer, None, 200)
    assert [written(tokenizer, 1, made_here[i]) for i in range(2)] == SHAPES["ShareGPT"][2][0]


# ---------------------------------------------------------------- anything at all

COLUMNS = sorted({key for rows, _, _ in SHAPES.values() for row in rows for key in row} | {"tools", "label", "history"})
KEYS = [
    "role",
    "from",
    "content",
    "value",
    "text",
    "rank",
    "score",
    "replies",
    "tool_calls",
    "function",
    "name",
    "answer",
]
values = st.recursive(
    st.one_of(
        st.sampled_from([None, "", "q", "user", "assistant", "prompter", "[]", "[{", "{}", '[{"role": "user"}]', True]),
        st.floats(allow_nan=True),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS), inner, max_size=3)),
    max_leaves=5,
)


@given(rows=st.lists(st.dictionaries(st.sampled_from(COLUMNS), values, min_size=1, max_size=8), min_size=1, max_size=4))
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_rows_are_read_skipped_or_refused(rows, opened, tokenizer):
    _read_skipped_or_refused(rows, opened, tokenizer)


@given(data=st.data())
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_value_in_any_place_of_a_shape_is_read_skipped_or_refused(data, opened, tokenizer):
    rows = json.loads(json.dumps(SHAPES[data.draw(st.sampled_from(list(SHAPES)))][0]))
    place = data.draw(st.sampled_from(rows))
    while True:
        key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(values)
    _read_skipped_or_refused(rows, opened, tokenizer)


def _read_skipped_or_refused(rows, opened, tokenizer):
    for step, style in ((1, None), (2, "hh"), (3, None), (1, "qwen3"), (2, "gemma2")):
        try:
            encoder, made_rows = encoded(opened(rows), tokenizer, step, style, length=60)
        except DataError:
            continue
        assert encoder.report.total == len(encoder.raw.rows_of("train"))
        assert all(row.get("input_ids") or row["chosen_ids"] for row in made_rows)


@pytest.mark.parametrize("empty", ["[]", " [ ]", "[\n\n\n\n\n\n\n\n\n\n\n]", []])
def test_a_list_that_is_empty_in_the_first_row_is_judged_by_another(empty, opened):
    rows = [{"prompt": "q", "answers": empty}, {"prompt": "q", "answers": '["good", "bad"]'}]
    dataset = opened(rows)
    assert dataset.recognised() == "lists of answers, the best one first" and dataset.has_rejected
    prompts = opened([{"prompt": "q", "answers": empty}] * 3)
    assert prompts.recognised() == "prompts as texts; columns not read: answers"


def test_conversations_and_tools_that_are_empty_in_the_first_row(opened):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    talk = [user("q"), answer("a")]
    rows = [{"prompt": "[]", "chosen": "[]", "tools": "[]"}]
    rows += [{"prompt": json.dumps(talk[:1]), "chosen": json.dumps(talk[1:]), "tools": json.dumps(tools)}]
    dataset = opened(rows)
    assert dataset.recognised() == "prompts and answers as messages, prompt explicit"
    assert dataset.examples(rows[1], ("prompt", "chosen"))[0].tools == tools
