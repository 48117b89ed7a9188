"""What the measured ways share: the settings they are started with, and how they say what they measured."""

import json
import resource
import sys
from types import SimpleNamespace


def settings_of_way() -> SimpleNamespace:
    """What data.py asks of a way: file, step, tokenizer, max_seq_len, workers, work and more, as one JSON argument."""
    return SimpleNamespace(**json.loads(sys.argv[1]))


def report(**figures) -> None:
    """The last line of output, which data.py reads."""
    print(json.dumps(figures))


def peak_memory_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def columns_of(settings) -> tuple[str, ...]:
    """The answers of a row that the step tokenises behind its prompt."""
    return ("chosen",) if settings.step == "sft" else ("chosen", "rejected")
