"""The files of a run's metrics, for scripts that only read them. Imports nothing heavy."""

import json
from pathlib import Path

from utils.process.files import METRICS_FILE

SAMPLES_FILE = "samples.jsonl"
FILES = METRICS_FILE, SAMPLES_FILE


def read_rows(folder: Path, prefix: str) -> list[dict]:
    """The rows of one kind in a metrics file, names without their prefix."""
    rows = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    wanted = [row for row in rows if any(name.startswith(prefix + "/") for name in row)]
    return [{name.removeprefix(prefix + "/"): value for name, value in row.items()} for row in wanted]
