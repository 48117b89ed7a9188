"""Talk to trained models in the terminal.

    python inference/chatbot.py --path output/actor
    python inference/chatbot.py --path output/sft output/actor --history talk.json     # side by side, kept for later
    python inference/chatbot.py --path output/actor --task_prompt 'Say it politely: {input}' < sentences.txt

Each answer appears while it is written and ends at EOS or where the model would begin the next human turn. The whole
conversation is the prompt of each answer; what no longer fits is forgotten from the oldest turn on.
"""

import argparse
import contextlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from inference.conversation import (
    TEMPERATURE,
    AnswerStream,
    add_conversation_arguments,
    answer_settings,
    asks_alone,
    build_prompt,
    check_model_folders,
    check_system_prompt,
    describe,
    input_limit,
    load_models,
)
from utils.data.conversation import Conversation, Message, Texts, assistant, system, user
from utils.data.row_texts import SkipRow
from utils.generation.saved_model import (
    LanguageModel,
    add_backend_argument,
    check_backend,
    check_ids,
    generate_ids,
    warn,
)
from utils.process.errors import UserError
from utils.process.files import check_writable, write_text
from utils.process.launch import run_main
from utils.process.seeds import set_random_seed

LEAVING = ("quit", "stop")
FORGETTING = "clear"
INPUT = "{input}"  # what an input takes the place of in --task_prompt


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Talk to model folders that training saved (or any causal language models in Hugging Face format).",
        epilog=f"In the chat: '{FORGETTING}' begins a new conversation; '{LEAVING[0]}', '{LEAVING[1]}' or Ctrl-D ends; "
        "Ctrl-C cuts an answer short. Input may come from a pipe, one message a line.",
    )
    parser.add_argument(
        "--path", nargs="+", required=True, help="the model folder, for instance output/actor; several answer in turn"
    )
    parser.add_argument(
        "--history",
        metavar="JSON",
        help="file that the conversations are kept in: it is read if it exists, and written after every answer; a row "
        "for each model with its messages (default: kept nowhere)",
    )
    parser.add_argument(
        "--task_prompt",
        metavar="TEXT",
        help=f"do one task over and over: each line of input takes the place of {INPUT} in this text and is answered "
        "on its own, greedily unless --temperature says otherwise (default: a conversation)",
    )
    parser.add_argument("--seed", type=int, default=None, help="makes answers repeatable (default: not)")
    add_conversation_arguments(parser)
    add_backend_argument(parser)
    args = parser.parse_args(argv)
    if args.task_prompt is not None and INPUT not in args.task_prompt:
        raise UserError(f"--task_prompt {args.task_prompt!r}: {INPUT} is missing, where each input is to stand")
    if args.task_prompt is not None and args.history:
        raise UserError("--history: with --task_prompt each input is answered on its own, so there is none")
    return args


@dataclass
class Dialogue:
    """One model's conversation with the user."""

    lm: LanguageModel
    max_input_tokens: int | None
    speaker: str  # how the model's lines begin
    system_prompt: str | None = None
    turns: list[Message] = field(default_factory=list)
    forgetting_announced: bool = False

    def clear(self) -> None:
        self.turns, self.forgetting_announced = [], False

    def say(self, message: str, settings: dict) -> None:
        """Answer a message, as the next turn."""
        self.turns.append(user(message))
        prompt_ids, dropped, lost = build_prompt(self.turns, self.lm, self.max_input_tokens, self.system_prompt)
        if dropped and not self.forgetting_announced:
            print(f"({self.why_forgotten()})")
            self.forgetting_announced = True
        if lost:
            print(f"(this is longer than {self.max_input_tokens} tokens: its beginning is not seen)")
        self.turns.append(assistant(self.answer(prompt_ids, settings)))

    def why_forgotten(self) -> str:
        if asks_alone(self.lm):
            return f"{self.lm.name} was trained on single questions: earlier turns are not seen"
        return f"the conversation is longer than {self.max_input_tokens} tokens: its oldest turns are forgotten"

    def do_task(self, text: str, settings: dict) -> None:
        """Answer a text on its own, outside the conversation; one that is too long loses its beginning."""
        task = Texts(text)
        if self.system_prompt is not None:
            task = Conversation([system(self.system_prompt), *task.as_conversation().prompt])
        try:
            prompt = self.lm.prompts.write(task, self.max_input_tokens)
        except SkipRow as reason:
            warn(f"{self.lm.name} cannot be asked this: {reason}")
            return
        if prompt.dropped or prompt.lost:
            warn(f"an input is longer than {self.max_input_tokens} tokens: it loses its beginning")
        self.answer(prompt.ids, settings)

    def answer(self, prompt_ids: list[int], settings: dict) -> str:
        """Generate and print an answer. Ctrl-C ends an answer early; the text until then counts as the answer."""
        check_ids([prompt_ids], self.lm.model, self.lm.name)
        print(f"{self.speaker}: ", end="", flush=True)
        lm, show = self.lm, lambda piece: print(piece, end="", flush=True)
        stream = AnswerStream(lm, len(prompt_ids), show)
        note = ""
        try:
            generate_ids(lm, [prompt_ids], stopping_criteria=[stream], **settings)
        except KeyboardInterrupt:
            note = " [cut short]"
        answer = stream.close()
        print(note, flush=True)
        return answer


def start_conversations(lms: list[LanguageModel], args) -> list[Dialogue]:
    """One for each model, with an empty history."""
    speakers = ["Assistant"] if len(lms) == 1 else [f"Assistant {n} ({lm.name})" for n, lm in enumerate(lms, start=1)]
    conversations = [
        Dialogue(lm, input_limit(lm, args), speaker, args.system_prompt)
        for lm, speaker in zip(lms, speakers, strict=True)
    ]
    for one in conversations:
        check_system_prompt(one.lm, one.system_prompt, one.max_input_tokens)
    return conversations


# ---------------------------------------------------------------- the history file


def read_history(path: str, num_models: int) -> list[list[dict]]:
    """The turns of each conversation in a history file; none if there is no file yet.

    Raises UserError that names what is wrong in the file.
    """
    if not Path(path).exists():
        return [[] for _ in range(num_models)]
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
        histories = [[{"role": turn["role"], "content": turn["content"]} for turn in row["messages"]] for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--history {path}: expected a JSON list of objects with 'messages' of 'role' and 'content'; {error!r}"
        ) from error
    for number, turns in enumerate(histories, start=1):
        if any(not isinstance(turn["content"], str) for turn in turns):
            raise UserError(f"--history {path}: conversation {number} has a message whose content is no text")
        if [turn["role"] for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
            raise UserError(f"--history {path}: in conversation {number} user and assistant do not take turns")
    if len(histories) != num_models:
        raise UserError(f"--history {path} holds {len(histories)} conversations, but --path names {num_models} models")
    return histories


def write_history(path: str, conversations: list[Dialogue]) -> None:
    rows = [{"model": one.lm.name, "messages": one.turns} for one in conversations]
    write_text(path, json.dumps(rows, ensure_ascii=False, indent=1) + "\n")


# ---------------------------------------------------------------- the terminal


def read_message() -> str | None:
    """The user's next line; None when there is no more of them (Ctrl-D, Ctrl-C or the end of a pipe)."""
    try:
        message = input("Human: ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    if not sys.stdin.isatty():
        print(message)  # nobody typed it, so the terminal has not shown it
    return message


def chat(conversations: list[Dialogue], settings: dict, history: str | None = None):
    """The conversations, until the user leaves."""
    while (message := read_message()) is not None and message.lower() not in LEAVING:
        if not message:
            continue
        forgetting = message.lower() == FORGETTING
        for conversation in conversations:
            if forgetting:
                conversation.clear()
            else:
                conversation.say(message, settings)
        if history:
            write_history(history, conversations)
        print("(a new conversation)\n" if forgetting else "")


def do_tasks(conversations: list[Dialogue], settings: dict, task_prompt: str):
    """The task with each line of input. In a pipe every line is an input, also one that reads "stop"."""
    while (text := read_message()) is not None and not (sys.stdin.isatty() and text.lower() in LEAVING):
        if not text:
            continue
        for conversation in conversations:
            conversation.do_task(task_prompt.replace(INPUT, text), settings)
        print()


def main(argv=None):
    args = parse_args(argv)
    is_task = args.task_prompt is not None
    settings = answer_settings(args, temperature=0 if is_task else TEMPERATURE)
    check_model_folders(args.path)
    check_backend(args, args.path)
    check_writable(args.history)
    histories = read_history(args.history, len(args.path)) if args.history else [[] for _ in args.path]
    conversations = start_conversations(load_models(args, by_vllm=args.backend == "vllm"), args)
    set_random_seed(args.seed)
    # A pipe may hold bytes that are no text, and a terminal may lack a letter: neither ends the chat.
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() arrow keys and a history, where the system has it

    for conversation in conversations:
        print(describe(conversation.lm, settings))
    leave = "' or '".join(LEAVING)
    if is_task:
        print(f"Each input is answered on its own; '{leave}' ends, Ctrl-C cuts an answer short.\n")
        do_tasks(conversations, settings, args.task_prompt)
        return
    print(f"'{FORGETTING}' forgets the conversation, '{leave}' ends, Ctrl-C cuts an answer short.\n")
    for conversation, turns in zip(conversations, histories, strict=True):
        conversation.turns = turns
    if any(histories):
        print(f"({args.history}: the conversation goes on after {len(histories[0]) // 2} questions)\n")
    chat(conversations, settings, args.history)


if __name__ == "__main__":
    try:
        run_main(main)
    except KeyboardInterrupt:
        sys.exit(130)
