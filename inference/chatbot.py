"""Talk to a trained model in the terminal.

    python inference/chatbot.py --path output/actor
    printf 'What is 2 plus 3?\\nquit\\n' | python inference/chatbot.py --path output/actor --greedy

Each answer appears while it is written and ends at EOS or where the model would begin the next human turn. The whole
conversation is the prompt of each answer; what no longer fits is forgotten from the oldest turn on.
"""

import argparse
import contextlib
import sys
from pathlib import Path

import torch
from transformers import StoppingCriteria

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.data.prompt_format import PLAIN, cut_at_next_human, encode_prompt, format_prompt, stop_strings, truncate_left
from utils.distributed import UserError, run_main
from utils.generation import (
    LanguageModel,
    add_base_model_argument,
    add_loading_arguments,
    check_ids,
    choosing_settings,
    decode_answer,
    generate_ids,
    load_language_model,
    room_for_prompt,
    warn,
)
from utils.utils import set_random_seed

LEAVING = ("quit", "stop")
FORGETTING = "clear"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Talk to a model folder that training saved (or any causal language model in Hugging Face format).",
        epilog=f"In the chat: '{FORGETTING}' begins a new conversation; '{LEAVING[0]}', '{LEAVING[1]}' or Ctrl-D ends; "
        "Ctrl-C cuts an answer short. Input may come from a pipe, one message a line.",
    )
    parser.add_argument("--path", required=True, help="the model folder, for instance output/actor")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="longest answer in tokens (128)")
    parser.add_argument(
        "--max_input_tokens",
        type=int,
        default=None,
        help="longest conversation in tokens that an answer takes into account; the oldest turns are lost first "
        "(default: what the model holds, less --max_new_tokens)",
    )
    choice = parser.add_argument_group("how the next token is chosen")
    choice.add_argument("--greedy", action="store_true", help="always the most probable token; the flags below rest")
    choice.add_argument("--temperature", type=float, default=0.7, help="0: greedy; 1: as the model says (0.7)")
    choice.add_argument("--top_p", type=float, default=0.9, help="likeliest tokens of this total share (0.9; 1: off)")
    choice.add_argument("--top_k", type=int, default=0, help="so many of the likeliest tokens (default 0: off)")
    choice.add_argument("--seed", type=int, default=None, help="makes answers repeatable (default: not)")
    add_base_model_argument(parser)
    add_loading_arguments(parser)
    return parser.parse_args(argv)


def build_prompt(
    turns: list[dict], tokenizer, style: str, max_input_tokens: int | None, allow_special_tokens: bool = False
) -> tuple[list[int], int]:
    """Token ids of the conversation, and how many of its oldest turns had to be left out.

    Question and answer go together. If the last question alone is too long, it loses its beginning; BOS stays.
    """
    for dropped in range(0, len(turns), 2):
        text = format_prompt(turns[dropped:], style, tokenizer)
        ids = encode_prompt(text, tokenizer, style, allow_special_tokens)
        if max_input_tokens is None or len(ids) <= max_input_tokens:
            return ids, dropped
    return truncate_left(ids, max_input_tokens, tokenizer.bos_token_id), dropped


def settled_part(text: str, style: str) -> tuple[str, bool]:
    """The part of a growing answer that no further token can take back, and whether the answer is over.

    Held back are an unfinished character, blanks at the end, and what may become the mark of the next human turn.
    """
    answer = cut_at_next_human(text, style)
    if answer != text:
        return answer.rstrip(), True
    answer = text.rstrip("\ufffd")  # bytes of a character whose other bytes are still to come
    beginnings = (stop[:length] for stop in stop_strings(style) for length in range(1, len(stop)))
    held_back = max((len(part) for part in beginnings if answer.endswith(part)), default=0)
    return answer[: len(answer) - held_back].rstrip(), False


class AnswerStream(StoppingCriteria):
    """Prints an answer while it grows, and ends it where the next human turn would begin.

    A stopping criterion because generate() shows those every new token and lets them say when to stop.
    """

    def __init__(self, tokenizer, prompt_length: int, stop_ids: list[int], style: str = PLAIN, out=None):
        self.tokenizer, self.prompt_length, self.stop_ids, self.style = tokenizer, prompt_length, stop_ids, style
        self.out = out or sys.stdout
        self.shown = ""
        self.unsettled = ""

    def __call__(self, input_ids, scores, **kwargs):
        over = self.update(input_ids[0, self.prompt_length :].tolist())
        return torch.full((1,), over, dtype=torch.bool, device=input_ids.device)

    def update(self, answer_ids: list[int]) -> bool:
        """Print what is new in the answer so far; returns whether it is over."""
        answer_ids = [token for token in answer_ids if token not in self.stop_ids]
        self.unsettled = decode_answer(answer_ids, self.tokenizer)
        text, over = settled_part(self.unsettled, self.style)
        self._show(text.lstrip())
        return over

    def close(self, note: str = "") -> str:
        """Print what was held back and the note, end the line and return the whole answer."""
        self._show(cut_at_next_human(self.unsettled, self.style).rstrip("\ufffd").strip())
        self.out.write(note + "\n")
        self.out.flush()
        return self.shown

    def _show(self, text):
        self.out.write(text[len(self.shown) :])
        self.out.flush()
        self.shown = text if len(text) > len(self.shown) else self.shown


def answer(lm: LanguageModel, prompt_ids: list[int], settings: dict, style: str) -> str:
    """Generate one answer while printing it. Ctrl-C ends it early; what was said until then counts as the answer."""
    stream = AnswerStream(lm.tokenizer, len(prompt_ids), lm.stop_ids, style)
    try:
        generate_ids(lm, [prompt_ids], stopping_criteria=[stream], **settings)
    except KeyboardInterrupt:
        return stream.close(" [cut short]")
    return stream.close()


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


def chat(
    lm: LanguageModel, settings: dict, style: str, max_input_tokens: int | None, allow_special_tokens: bool = False
):
    """The conversation, until the user leaves."""
    turns = []
    already_told = False
    while (message := read_message()) is not None and message.lower() not in LEAVING:
        if not message:
            continue
        if message.lower() == FORGETTING:
            turns, already_told = [], False
            print("(a new conversation)\n")
            continue
        turns.append({"role": "user", "content": message})
        prompt_ids, dropped = build_prompt(turns, lm.tokenizer, style, max_input_tokens, allow_special_tokens)
        check_ids([prompt_ids], lm.model, lm.name)
        if dropped and not already_told:
            print(f"(the conversation is longer than {max_input_tokens} tokens: its oldest turns are forgotten)")
            already_told = True
        print("Assistant: ", end="", flush=True)
        turns.append({"role": "assistant", "content": answer(lm, prompt_ids, settings, style)})
        print()


def input_limit(lm: LanguageModel, asked: int | None, max_new_tokens: int) -> int | None:
    """Longest prompt in tokens: what the user asks for, as far as the model has room for it."""
    room = room_for_prompt(lm, max_new_tokens)
    if asked is None:
        return room
    if asked < 1:
        raise UserError(f"--max_input_tokens {asked}: must be at least 1")
    if room is not None and asked > room:
        warn(f"--max_input_tokens {asked}: {lm.name} has room for {room} beside the answer")
        return room
    return asked


def main(argv=None):
    args = parse_args(argv)
    do_sample = not args.greedy and args.temperature != 0
    settings = choosing_settings(do_sample, args.temperature, args.top_p, args.top_k)
    settings["max_new_tokens"] = args.max_new_tokens
    lm = load_language_model(args.path, args, allow_hub_name=False)
    max_input_tokens = input_limit(lm, args.max_input_tokens, args.max_new_tokens)
    set_random_seed(args.seed)
    # A pipe may hold bytes that are no text, and a terminal may lack a letter: neither ends the chat.
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() arrow keys and a history, where the system has it

    dtype = str(lm.model.dtype).removeprefix("torch.")
    print(f"{args.path} on {lm.model.device} in {dtype}, {'sampling' if do_sample else 'greedy'}.")
    leave = "' or '".join(LEAVING)
    print(f"'{FORGETTING}' forgets the conversation, '{leave}' ends, Ctrl-C cuts an answer short.\n")
    chat(lm, settings, args.prompt_style, max_input_tokens, args.allow_special_tokens)


if __name__ == "__main__":
    try:
        run_main(main)
    except KeyboardInterrupt:
        sys.exit(130)
