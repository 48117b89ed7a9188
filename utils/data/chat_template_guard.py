"""A look at a chat template before it is used: does it end, in time and in memory that suit a chat template?

A template is a program that comes with a model. transformers runs it in jinja2's sandbox, which keeps it from Python's
internals, files and long range()s. The sandbox lets nested loops and strings of any length pass. So a template is first
tried in a process of its own, which the system ends where it takes too much.
"""

import os
import resource
import select
import signal

from transformers.utils.chat_template_utils import render_jinja_template

CPU_SECONDS, WALL_SECONDS = 5, 60  # of all trials together; a template takes milliseconds
MEMORY = 1 << 30  # bytes, beyond what this process has
LONGEST = 1_000_000  # characters of a short conversation

_TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
_CONVERSATIONS = (_TURNS[:1], _TURNS[:2], _TURNS, [{"role": "system", "content": "s"}, *_TURNS])
_found: dict[str, str] = {}  # template -> what is wrong with it, "" for nothing


def check_template_ends(template: str, special_tokens: dict[str, str]) -> None:
    """Raise ValueError unless short conversations can be written with a template; each template is tried once.

    That a template refuses a conversation is no matter here: whoever renders it will hear of it.
    """
    if template not in _found:
        _found[template] = _try_in_child(template, special_tokens)
    if _found[template]:
        raise ValueError(f"the tokenizer's chat template is not used: {_found[template]}")


def _try_in_child(template: str, special_tokens: dict[str, str]) -> str:
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _limit_this_process()
            os.write(sending, _try(template, special_tokens).encode())
        finally:
            os._exit(0)
    os.close(sending)
    with open(receiving, "rb") as results:
        ready, _, _ = select.select([results], [], [], WALL_SECONDS)
        if not ready:
            os.kill(child, signal.SIGKILL)
        said = results.read().decode()
    os.waitpid(child, 0)
    if said == "ends":
        return ""
    return said or f"it does not come to an end within {CPU_SECONDS} s on a conversation of a few words"


def _limit_this_process() -> None:
    if os.path.exists("/proc/self/statm"):  # Linux: elsewhere memory is bounded by the time alone
        with open("/proc/self/statm") as sizes:
            address_space = int(sizes.read().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = address_space + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _try(template: str, special_tokens: dict[str, str]) -> str:
    for turns in _CONVERSATIONS:
        try:
            [text], _ = render_jinja_template(
                [turns], chat_template=template, add_generation_prompt=turns[-1]["role"] == "user", **special_tokens
            )
        except MemoryError:
            return f"it takes more than {MEMORY >> 20} MiB of memory for a conversation of a few words"
        except Exception:  # a refusal, of whatever kind
            continue
        if len(text) > LONGEST:
            return f"it makes {len(text):,} characters of a conversation of a few words"
    return "ends"
