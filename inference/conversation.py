"""A conversation with models: the prompt of the next answer, and the answer while it grows.

What the terminal chat and the web page share.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from transformers import StoppingCriteria

from utils.data import prompt_format
from utils.data.conversation import Conversation, Message, system, user
from utils.data.prompt_format import BARE, cut_at_next_human, stop_strings
from utils.data.row_texts import SkipRow
from utils.generation.saved_model import (
    LanguageModel,
    VllmUse,
    add_base_model_argument,
    add_load_in_4bit_argument,
    add_loading_arguments,
    check_model_folder,
    choosing_settings,
    decode_answer,
    generate_ids,
    load_language_model,
    room_for_prompt,
    warn,
)
from utils.process.errors import UserError

TEMPERATURE = 0.7  # of a chat, unless a flag says otherwise


def add_conversation_arguments(parser):
    """The flags of length, of choosing tokens and of loading."""
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
    choice.add_argument(
        "--temperature", type=float, default=None, help=f"0: greedy; 1: as the model says ({TEMPERATURE})"
    )
    choice.add_argument("--top_p", type=float, default=0.9, help="likeliest tokens of this total share (0.9; 1: off)")
    choice.add_argument("--top_k", type=int, default=0, help="so many of the likeliest tokens (default 0: off)")
    parser.add_argument(
        "--system_prompt",
        metavar="TEXT",
        help="what the model is told before the conversation, where its format has a place for it (default: nothing)",
    )
    add_base_model_argument(parser)
    add_loading_arguments(parser)
    add_load_in_4bit_argument(parser)


def answer_settings(args, temperature: float = TEMPERATURE) -> dict:
    """Settings of generate() that the flags ask for; ``temperature`` where they name none."""
    temperature = temperature if args.temperature is None else args.temperature
    do_sample = not args.greedy and temperature != 0
    settings = choosing_settings(do_sample, temperature, args.top_p, args.top_k)
    return settings | {"max_new_tokens": args.max_new_tokens}


def check_model_folders(paths: list[str]) -> None:
    """UserError, before anything is loaded, unless each folder holds a model or a soft prompt."""
    for path in paths:
        check_model_folder(path, allow_hub_name=False, allow_soft_prompt=True)


def load_models(args, by_vllm: bool = False) -> list[LanguageModel]:
    """The models of --path; one that is named twice is loaded once."""
    paths = list(dict.fromkeys(args.path))
    vllm = VllmUse(rows=1, models=len(paths)) if by_vllm else None
    loaded = {path: load_language_model(path, args, allow_hub_name=False, vllm=vllm) for path in paths}
    return [loaded[path] for path in args.path]


def describe(lm: LanguageModel, settings: dict) -> str:
    """Where a model is, how it answers and in which prompt format it is asked, in one line."""
    dtype = "4 bits" if lm.in_4bit else str(lm.model.dtype).removeprefix("torch.")
    choice = "sampling" if settings["do_sample"] else "greedy"
    where = f"on {lm.model.device}" if lm.engine is None else "by vLLM"
    return f"{lm.name} {where} in {dtype}, {choice}, asked in {lm.asked.reason}."


def asks_alone(lm: LanguageModel) -> bool:
    """Whether a model was trained on single questions, so that it sees no earlier turns."""
    return lm.prompt_format == BARE or prompt_format.asks_alone(lm.tokenizer)


def input_limit(lm: LanguageModel, args) -> int | None:
    """Longest prompt in tokens: --max_input_tokens, as far as the model has room for it; None: no limit."""
    room, limit = room_for_prompt(lm, args.max_new_tokens), args.max_input_tokens
    if limit is None:
        return room
    if limit < 1:
        raise UserError(f"--max_input_tokens {limit}: must be at least 1")
    if room is not None and limit > room:
        warn(f"--max_input_tokens {limit}: {lm.name} has room for {room} beside the answer")
        return room
    return limit


def check_system_prompt(lm: LanguageModel, text: str | None, max_input_tokens: int | None) -> None:
    """UserError, with the reason, where a model has no place for a system prompt, or no room."""
    if text is None:
        return
    if not text.strip():
        raise UserError("--system_prompt: the text is empty")
    try:
        prompt = lm.prompts.write(Conversation([system(text), user("?")]), max_input_tokens)
    except SkipRow as reason:
        raise UserError(f"--system_prompt: {lm.name} has no place for one: {reason}") from reason
    if prompt.lost:
        raise UserError(f"--system_prompt: it is too long for the {max_input_tokens} tokens that {lm.name} is given")


def build_prompt(
    turns: list[Message], lm: LanguageModel, max_input_tokens: int | None, system_prompt: str | None = None
) -> tuple[list[int], int, int]:
    """Token ids of the conversation; how many of its oldest turns, and how many tokens of the last question's
    beginning, had to be left out.

    Question and answer go together; the system prompt stays. If the last question alone is too long, it loses its
    beginning; BOS stays. A model that was trained on single questions sees the last one alone.
    """
    asked = turns[-1:] if asks_alone(lm) else turns
    before = [] if system_prompt is None else [system(system_prompt)]
    try:
        prompt = lm.prompts.write(Conversation([*before, *asked]), max_input_tokens)
    except SkipRow as reason:
        raise UserError(f"{lm.name} cannot be asked this: {reason}") from reason
    return prompt.ids, len(turns) - len(asked) + prompt.dropped, prompt.lost


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
    """Shows an answer while it grows, and ends it where the next human turn would begin.

    A stopping criterion because generate() shows those every new token and lets them say when to stop.

    Args:
        show: is given each new piece of text.
    """

    def __init__(self, lm: LanguageModel, prompt_length: int, show: Callable[[str], object]):
        self.lm, self.prompt_length, self.show = lm, prompt_length, show
        self.shown = ""
        self.unsettled = ""
        self.over = False

    def __call__(self, input_ids, scores, **kwargs):
        over = self.update(input_ids[0, self.prompt_length :].tolist())
        return torch.full((1,), over, dtype=torch.bool, device=input_ids.device)

    def update(self, answer_ids: list[int]) -> bool:
        """Show what is new in the answer so far; returns whether it is over."""
        text_ids = [token for token in answer_ids if token not in self.lm.stop_ids]
        self.unsettled = decode_answer(text_ids, self.lm.tokenizer)
        text, begins_next_turn = settled_part(self.unsettled, self.lm.prompt_format)
        self.over = begins_next_turn or len(text_ids) < len(answer_ids)
        self._show(text.lstrip())
        return self.over

    def close(self) -> str:
        """Show what was held back and return the whole answer."""
        self._show(cut_at_next_human(self.unsettled, self.lm.prompt_format).rstrip("\ufffd").strip())
        return self.shown

    def _show(self, text):
        if len(text) > len(self.shown):
            self.show(text[len(self.shown) :])
            self.shown = text


@dataclass
class GrowingAnswer:
    text: str = ""
    ended: bool = False  # by the model itself; otherwise it still grows, or was cut off at max_new_tokens


def stream_answers(
    lms: list[LanguageModel],
    prompts: list[list[int]],
    settings: dict,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Iterator[list[GrowingAnswer]]:
    """Let several models answer at the same time, each its own prompt; yields all answers whenever one has grown.

    The last yield holds the whole answers. Closing the iterator ends the generation too, after the token in hand.

    Args:
        settings: of generate(), max_new_tokens among them.
        is_stopped: called before each token; true ends the answers there.
    """
    answers = [GrowingAnswer() for _ in lms]
    changed, closed = threading.Event(), threading.Event()

    def generate(lm: LanguageModel, prompt: list[int], answer: GrowingAnswer) -> None:
        def show(piece: str) -> None:
            answer.text += piece
            changed.set()

        stream = AnswerStream(lm, len(prompt), show)

        def stop(input_ids, scores, **kwargs):
            return torch.full((1,), closed.is_set() or is_stopped(), dtype=torch.bool, device=input_ids.device)

        generate_ids(lm, [prompt], stopping_criteria=[stream, stop], **settings)
        stream.close()
        answer.ended = stream.over

    with ThreadPoolExecutor(len(lms)) as pool:
        working = [pool.submit(generate, *job) for job in zip(lms, prompts, answers, strict=True)]
        for future in working:
            future.add_done_callback(lambda _: changed.set())
        try:
            over = False
            while not over:
                changed.wait()
                changed.clear()
                over = all(future.done() for future in working)
                for future in working:
                    if future.done():
                        future.result()  # raises what went wrong there
                yield answers
        finally:
            closed.set()  # leaving the pool waits for its threads
