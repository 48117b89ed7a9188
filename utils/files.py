"""Writing files whole."""

import json
import os
from pathlib import Path

from utils.distributed import UserError


def check_writable(path: str | None):
    """UserError now, rather than after an hour of generating, if a file cannot be written there."""
    if path is None:
        return
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder of {path} cannot be made: {error}") from error
    if target.is_dir() or not os.access(target.parent, os.W_OK):
        raise UserError(f"{path} cannot be written")


def write_text(path: str, text: str):
    """Write a file whole: a kill leaves the old file or the new one."""
    unfinished = Path(f"{path}.tmp{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def write_jsonl(path: str, rows: list[dict]):
    """Write one JSON object a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
