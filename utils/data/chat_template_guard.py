"""A chat template is tried before it is used: does it end, in time and memory that suit a chat template?

A template is a program that comes with a model. transformers runs it in jinja2's sandbox, which keeps it from Python's
internals, files and long range()s, but lets nested loops and strings of any length pass. So a template is first tried
in a child process, which the system ends where it takes too much. This module is also the child's program; the child
imports transformers' own environment for templates and nothing of torch.
"""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template

CPU_SECONDS, WALL_SECONDS = 5, 60  # of all trials together; a template takes milliseconds
MEMORY = 1 << 30  # bytes, beyond what the child has once its modules are imported
LONGEST = 1_000_000  # characters of a short conversation

_TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
_CONVERSATIONS = [_TURNS[:1], _TURNS[:2], _TURNS, [{"role": "system", "content": "s"}, *_TURNS]]
# What templates have branches for: reasoning, tools with their calls and results, contents in parts.
_FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"p": {"type": "string"}}}}
_CALL = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": {"p": "v"}}}
_CALLED = [{"role": "assistant", "content": None, "reasoning_content": "r", "tool_calls": [_CALL]}]
_CALLED += [{"role": "tool", "content": "t", "tool_call_id": "call00001", "name": "f"}]
_CONVERSATIONS += [
    [_TURNS[0], {"role": "assistant", "content": "b", "reasoning_content": "r"}],
    [_TURNS[0], *_CALLED, *_TURNS[1:]],
    [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
    [{"role": "developer", "content": "s"}, _TURNS[0]],
]
_TRIALS = [(turns, None) for turns in _CONVERSATIONS]
_TRIALS += [(turns, [{"type": "function", "function": _FUNCTION}]) for turns in (_TURNS, _CONVERSATIONS[5])]
_PASSED = "passed"
_verdicts: dict[str, str] = {}  # template -> _PASSED, or what is wrong with it


def check_template_ends(template: str, special_tokens: dict[str, str]) -> None:
    """Raise ValueError unless short conversations can be written with a template; each template is tried once.

    That a template refuses a conversation is no matter here: whoever renders it will hear of it.
    """
    if template not in _verdicts:
        _verdicts[template] = _verdict_of_child(template, special_tokens)
    if _verdicts[template] != _PASSED:
        raise ValueError(f"the tokenizer's chat template is not used: {_verdicts[template]}")


def _verdict_of_child(template: str, special_tokens: dict[str, str]) -> str:
    trial = {"template": template, "special_tokens": special_tokens, "cpu_seconds": CPU_SECONDS}
    too_long = f"it does not come to an end within {CPU_SECONDS} s on a conversation of a few words"
    try:
        child = subprocess.run(
            [sys.executable, "-m", "utils.data.chat_template_guard"],
            cwd=Path(__file__).resolve().parents[2],
            input=json.dumps(trial),
            capture_output=True,
            text=True,
            timeout=WALL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return too_long
    if child.returncode in (-signal.SIGKILL, -signal.SIGXCPU):
        return too_long
    if child.returncode != 0:
        return f"trying it ended with status {child.returncode}: {child.stderr.strip()[-300:]}"
    return child.stdout


def _main() -> None:
    """The child: a trial on stdin, the verdict on stdout."""
    trial = json.load(sys.stdin)
    _limit_this_process(trial["cpu_seconds"])
    print(_verdict(trial["template"], trial["special_tokens"]), end="")


def _limit_this_process(cpu_seconds: int) -> None:
    if os.path.exists("/proc/self/statm"):  # Linux: elsewhere memory is bounded by the time alone
        with open("/proc/self/statm") as sizes:
            address_space = int(sizes.read().split()[0]) * resource.getpagesize()
        _limit(resource.RLIMIT_AS, address_space + MEMORY)
    _limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + cpu_seconds)
    _limit(resource.RLIMIT_CORE, 0)


def _limit(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


def _verdict(template: str, special_tokens: dict[str, str]) -> str:
    for turns, tools in _TRIALS:
        try:
            [text], _ = render_jinja_template(
                [turns],
                tools=tools,
                chat_template=template,
                add_generation_prompt=turns[-1]["role"] == "user",
                **special_tokens,
            )
        except MemoryError:
            return f"it takes more than {MEMORY >> 20} MiB of memory for a conversation of a few words"
        except Exception:  # a refusal, of whatever kind
            continue
        if len(text) > LONGEST:
            return f"it makes {len(text):,} characters of a conversation of a few words"
    return _PASSED


if __name__ == "__main__":
    _main()
