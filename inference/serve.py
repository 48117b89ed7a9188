"""A web page on this machine to talk to a model, or to two side by side and say which answers better.

    python inference/serve.py --path output/actor                                  # http://127.0.0.1:7860
    python inference/serve.py --path output/sft output/actor --votes output/votes.jsonl

Each vote adds a row {"prompt", "chosen", "rejected"} of messages to the votes file, which is a --data_path for step 2
as it is, in any prompt format.
Needs Gradio: pip install -r requirements-extras.txt
"""

import argparse
import html
import importlib.metadata
import importlib.util
import json
import os
import random
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from inference.conversation import (
    add_conversation_arguments,
    answer_settings,
    asks_alone,
    build_prompt,
    check_model_folders,
    check_system_prompt,
    describe,
    input_limit,
    load_models,
    stream_answers,
)
from utils.data.conversation import Message, assistant, system, user
from utils.generation.saved_model import LanguageModel, check_ids
from utils.process.errors import UserError
from utils.process.launch import run_main

GRADIO = (6, 31), (7, 0)  # as in requirements-extras.txt. Before: a page that asks another host; from 7 on: not tested
SIDES = ("A", "B")
VOTES = {"A is better": 0, "Tie": None, "B is better": 1}  # text of a button -> the better side


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Talk to one model, or compare the answers of two, on a web page of this machine.",
        epilog="The page belongs to this machine alone, has no password and sends nothing anywhere. From another "
        "machine: ssh -L 7860:127.0.0.1:7860 HOST",
    )
    parser.add_argument(
        "--path", nargs="+", required=True, help="one model folder, or two (or one twice: two samples of it) to compare"
    )
    parser.add_argument(
        "--votes", default="output/votes.jsonl", help="with two: votes are added to this file (output/votes.jsonl)"
    )
    parser.add_argument(
        "--show_names",
        action="store_true",
        help="say which model is which, the first always on the left (off: sides are drawn anew for each question, and "
        "named after the vote)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (7860)")
    add_conversation_arguments(parser)
    args = parser.parse_args(argv)
    if len(args.path) > len(SIDES):
        raise UserError(f"--path names {len(args.path)} models; the page shows one or two")
    return args


# ---------------------------------------------------------------- the votes file


class VotesFile:
    """Rows of prompt, chosen and rejected as messages, one JSON object a line; each is added whole.

    Raises:
        UserError: the file cannot be written, or holds something else than such rows.
    """

    def __init__(self, path: str):
        self.path, self._lock = Path(path), threading.Lock()
        if self.path.suffix != ".jsonl":
            raise UserError(f"--votes {path}: the name must end in .jsonl")
        try:
            content = self.path.read_bytes() if self.path.exists() else b""
            self._check(content)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                if content and not content.endswith(b"\n"):  # an editor left the last line open
                    file.write(b"\n")
        except OSError as error:
            raise UserError(f"--votes {path} cannot be written: {error}") from error
        self.count = len(content.splitlines())

    def _check(self, content: bytes) -> None:
        """A file of both forms would be read as one of them, and the rows of the other left out."""
        for number, line in enumerate(content.splitlines(), start=1):
            try:
                row = json.loads(line) if line.strip() else {"prompt": []}
            except ValueError as error:
                raise UserError(f"--votes {self.path}, line {number}: no JSON object: {error}") from error
            prompt = row.get("prompt") if isinstance(row, dict) else None
            if isinstance(prompt, str):
                raise UserError(
                    f"--votes {self.path}, line {number}: a vote as text, as earlier versions wrote them; new ones are "
                    "messages. Name another file; step 2 reads both: --data_path OLD NEW"
                )
            if not isinstance(prompt, list):
                raise UserError(f"--votes {self.path}, line {number}: no vote; name a file of votes, or a new one")

    def add(self, prompt: list[Message], chosen: str, rejected: str) -> None:
        row = {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
        line = json.dumps(row, ensure_ascii=False) + "\n"
        with self._lock, self.path.open("ab") as file:
            file.write(line.encode())
            self.count += 1


# ---------------------------------------------------------------- questions, answers and votes


@dataclass
class Session:
    """One browser tab: the conversation, and the answers to its last question that are not part of it yet.

    Attributes:
        order: the number of the model on each side.
        answers, ended: of each side; an answer that did not end was cut off.
        open_to_vote: both answers are there, to the whole question, and nobody has voted.
        unseen: what the models were not shown, for want of room; "" for nothing.
        seen_turns: the part of the conversation that the models could take into account, system prompt included.
        running: answers are being written, by the one thread that changes a session meanwhile.
        stop, forget: what that thread is asked to do: end the answers there, and begin a new conversation.
    """

    turns: list[Message] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    ended: list[bool] = field(default_factory=list)
    open_to_vote: bool = False
    unseen: str = ""
    seen_turns: list[Message] = field(default_factory=list)
    running: bool = False
    stop: bool = False
    forget: bool = False

    def clear(self) -> None:
        """Begin a new conversation; while answers are being written, as soon as they have stopped."""
        self.forget = self.stop = True
        if not self.running:
            self.turns, self.order, self.answers, self.ended = [], [], [], []
            self.open_to_vote = self.forget = self.stop = False

    def continue_with(self, side: int) -> None:
        """Let the answer of one side go on in the conversation."""
        if self.answers:
            self.turns.append(assistant(self.answers[side]))
        self.answers, self.ended, self.open_to_vote = [], [], False


class Host:
    """Lets the models answer a session's questions, and records its votes."""

    def __init__(
        self,
        lms: list[LanguageModel],
        settings: dict,
        limits: list[int | None],
        votes: VotesFile | None,
        blind: bool = True,
        system_prompt: str | None = None,
    ):
        self.lms, self.settings, self.limits = lms, settings, limits
        self.votes, self.blind, self.system_prompt = votes, blind, system_prompt
        for lm, limit in zip(lms, limits, strict=True):
            check_system_prompt(lm, system_prompt, limit)

    def ask(self, session: Session, message: str) -> Iterator[None]:
        """Answer a question in the session, token by token; yields whenever an answer has grown.

        Answers that nobody voted on count as a tie: the left one goes on in the conversation.

        Raises:
            UserError: an empty question.
        """
        message = message.strip()
        if not message:
            raise UserError("Write a message first.")
        session.continue_with(0)
        order = list(range(len(self.lms)))
        if self.blind:
            random.shuffle(order)
        lms, limits = [self.lms[number] for number in order], [self.limits[number] for number in order]
        turns = [*session.turns, user(message)]

        def build_prompts(turns):
            return [build_prompt(turns, lm, limit, self.system_prompt) for lm, limit in zip(lms, limits, strict=True)]

        # Both see the same part of the conversation, which is the prompt of the vote.
        seen_turns = turns[max(dropped for _, dropped, _ in build_prompts(turns)) :]
        prompts, _, lost = map(list, zip(*build_prompts(seen_turns), strict=True))
        session.unseen = ""
        if any(lost):
            session.unseen = "The beginning of this question was not seen: it is too long. "
        elif len(seen_turns) < len(turns) and not any(map(asks_alone, lms)):
            session.unseen = "The oldest turns were not seen: the conversation is too long. "
        for lm, ids in zip(lms, prompts, strict=True):
            check_ids([ids], lm.model, lm.name)

        before = [] if self.system_prompt is None else [system(self.system_prompt)]
        session.turns, session.seen_turns, session.order = turns, [*before, *seen_turns], order
        session.answers, session.ended = [""] * len(lms), [False] * len(lms)
        session.running, session.stop = True, False
        try:
            yield
            for answers in stream_answers(lms, prompts, self.settings, lambda: session.stop):
                session.answers = [answer.text for answer in answers]
                session.ended = [answer.ended for answer in answers]
                yield
            # A pair with the whole question would say that the answers are to all of it.
            session.open_to_vote = len(lms) == len(SIDES) and not session.stop and not any(lost)
        finally:
            session.running = False
            if session.forget:
                session.clear()

    def vote(self, session: Session, better: int | None) -> str:
        """Add the vote to the votes file and let the better answer go on; None is a tie, of which nothing is written.

        Returns:
            a message for the voter.

        Raises:
            UserError: there is nothing to vote on, or the pair would teach nothing.
        """
        if not session.open_to_vote:
            raise UserError("There are no two answers to vote on.")
        if better is None:
            message = "A tie: nothing is written, and the conversation goes on with A's answer."
        else:
            chosen, rejected = session.answers[better], session.answers[1 - better]
            if chosen == rejected:
                raise UserError("Both answers are the same: choose the tie.")
            if not (chosen and rejected):
                raise UserError("An answer without a word makes no pair to learn from: choose the tie.")
            self.votes.add(session.seen_turns, chosen, rejected)
            message = f"{SIDES[better]} is better: row {self.votes.count} of {self.votes.path}."
        names = [f"{side} was {self.lms[number].name}" for side, number in zip(SIDES, session.order, strict=True)]
        session.continue_with(better or 0)
        return f"{message} {', '.join(names)}."

    def remark(self) -> str:
        """What the page says above the conversations: that earlier turns are not seen, where it is so."""
        if not any(map(asks_alone, self.lms)):
            return ""
        trained = "A model here was" if len(self.lms) > 1 else "This model was"
        return f"{trained} trained on single questions: each question is answered alone, earlier turns are not seen."

    def verdict(self, session: Session) -> str:
        """The status under finished answers: whether one was cut off, and the question for a vote."""
        if session.stop or not session.answers:
            return "Stopped." if session.answers else ""
        names = SIDES if len(session.answers) == len(SIDES) else ["The answer"]
        cut = [name for name, ended in zip(names, session.ended, strict=True) if not ended]
        limit = f"{' and '.join(cut)} stopped at {self.settings['max_new_tokens']} tokens (--max_new_tokens). "
        return session.unseen + (limit if cut else "") + ("Which answer is better?" if session.open_to_vote else "")


# ---------------------------------------------------------------- the page


# The conversations take the height that the rest of the page leaves, so that nothing is scrolled to write or to vote.
# Gradio's page is a flex box, in which a container with automatic margins is as narrow as it can be without a width.
CSS = """
.gradio-container { width: 100% !important; max-width: 1100px !important; margin: 0 auto !important; }
#side-A, #side-B { height: calc(100dvh - 330px) !important; min-height: 150px; }
@media (max-width: 700px) {  /* one below the other */
  .gradio-container .main { padding: 8px 12px !important; }
  .gradio-container :is(.row, .column) { gap: 8px !important; }
  .gradio-container button { padding: 6px !important; font-size: 14px !important; }
  .gradio-container:has(#side-B) :is(#side-A, #side-B) { height: calc(50dvh - 200px) !important; min-height: 120px; }
}
footer, .icon-button-wrapper { display: none !important; }  /* its bin would empty one side alone */
"""


class PageEvents:
    """What the page does on a click: each method gives the new values of components.

    Args:
        gr: the package gradio.
    """

    def __init__(self, gr, host: Host, num_vote_buttons: int):
        self.gr, self.host, self.num_vote_buttons = gr, host, num_vote_buttons

    def state(self, session: Session) -> list:
        """The session, each side's conversation, and the vote buttons: on while there are answers to compare."""
        sides, gr = [], self.gr
        for side in range(len(self.host.lms)):
            answer = [assistant(session.answers[side])] if session.answers else []
            # Messages are text; the page would take a "<b>" in them for HTML.
            turns = [turn | {"content": html.escape(turn["content"], quote=False)} for turn in session.turns + answer]
            sides.append(turns)
        return [session, *sides, *(gr.Button(interactive=session.open_to_vote) for _ in range(self.num_vote_buttons))]

    def ask(self, text: str, session: Session) -> Iterator[list]:
        """Yields values of the message box, the status and the state while the answers grow."""
        gr, box = self.gr, ""  # the box is emptied once: the next message may be written while this one is answered
        try:
            for _ in self.host.ask(session, text):
                yield [box, "", *self.state(session)]
                box = gr.skip()
            yield [box, self.host.verdict(session), *self.state(session)]
        except UserError as error:
            gr.Warning(str(error))
            yield [gr.skip(), gr.skip(), *self.state(session)]

    def vote(self, better: int | None, session: Session) -> list:
        """Values of the status and the state."""
        try:
            return [self.host.vote(session, better), *self.state(session)]
        except UserError as error:
            self.gr.Warning(str(error))
            return [self.gr.skip(), *self.state(session)]

    def stop(self, session: Session) -> None:
        session.stop = True

    def clear(self, session: Session) -> list:
        """Values of the status and the state."""
        session.clear()
        return ["", *self.state(session)]


def build_page(gr, host: Host, title: str):
    """The Gradio page of a host; ``gr`` is the package gradio."""
    compares = len(host.lms) == len(SIDES)
    labels = [lm.name if not host.blind or not compares else side for lm, side in zip(host.lms, SIDES, strict=False)]
    votes = VOTES if compares else {}
    events = PageEvents(gr, host, len(votes))
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as page:
        session = gr.State(Session())
        gr.Markdown(f"## {title}")
        gr.Markdown(host.remark(), visible=bool(host.remark()))
        with gr.Row():
            chats = [_chat_column(gr, side, label) for side, label in zip(SIDES, labels, strict=False)]
        with gr.Row(visible=compares):
            vote_buttons = [gr.Button(text, interactive=False, min_width=90) for text in votes]
        status = gr.Markdown("", elem_id="status")
        with gr.Row():
            hint = "Write a message; Enter sends it"
            message = gr.Textbox(
                placeholder=hint, show_label=False, container=False, scale=8, min_width=300, autofocus=True
            )
            send = gr.Button("Send", variant="primary", scale=1, min_width=90)
            stop = gr.Button("Stop", scale=1, min_width=90)
            clear = gr.Button("New", scale=1, min_width=90)

        state = [session, *chats, *vote_buttons]
        # Private: a page, not an API. transformers serve is one.
        hidden = {"api_visibility": "private", "show_progress": "hidden"}
        gr.on([message.submit, send.click], events.ask, [message, session], [message, status, *state], **hidden)
        for button, better in zip(vote_buttons, votes.values(), strict=True):
            button.click(partial(events.vote, better), session, [status, *state], **hidden)
        stop.click(events.stop, session, None, **hidden)
        clear.click(events.clear, session, [status, *state], **hidden)
    # One question at a time: the others wait for their turn.
    return page.queue(default_concurrency_limit=1, max_size=64)


def _chat_column(gr, side: str, label: str):
    """One side's conversation under its label."""
    with gr.Column():
        gr.Markdown(f"**{label}**")
        return gr.Chatbot(show_label=False, render_markdown=False, buttons=[], elem_id=f"side-{side}")


def check_port(host: str, port: int) -> None:
    """UserError if nothing can listen there, before a model is loaded."""
    try:
        family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.create_server((host, port), family=family):
            pass
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port}: cannot listen there: {error}") from error


def import_gradio():
    """Gradio, told to send nothing and to ask nobody for newer versions; UserError where it is missing."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the web page needs the package gradio: pip install -r requirements-extras.txt")
    version = importlib.metadata.version("gradio")
    if not GRADIO[0] <= tuple(map(int, version.split(".")[:2])) < GRADIO[1]:
        raise UserError(f"the web page is not tested with gradio {version}: pip install -r requirements-extras.txt")
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    import gradio

    return gradio


def make_host(args) -> Host:
    """The models of the flags, loaded, and the votes file."""
    settings = answer_settings(args)
    check_model_folders(args.path)
    votes = VotesFile(args.votes) if len(args.path) == len(SIDES) else None
    lms = load_models(args)
    limits = [input_limit(lm, args) for lm in lms]
    return Host(lms, settings, limits, votes, not args.show_names, args.system_prompt)


def main(argv=None):
    args = parse_args(argv)
    gr = import_gradio()
    check_port(args.host, args.port)
    host = make_host(args)
    for lm in host.lms:
        print(describe(lm, host.settings))
    if host.votes:
        print(f"votes go to {host.votes.path}, which has {host.votes.count} rows")
    page = build_page(gr, host, "Compare two models" if host.votes else "Talk to the model")
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"open http://{host}:{args.port} in a browser; Ctrl-C ends", flush=True)
    page.launch(
        server_name=args.host,
        server_port=args.port,
        share=False,
        inbrowser=False,
        quiet=True,
        footer_links=[],
        theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),  # no web fonts
        head=f"<style>{CSS}</style>",  # its css= rewrites selectors, those inside @media to ones that fit nothing
    )


if __name__ == "__main__":
    run_main(main)
