"""The files of a run's metrics, for scripts that only read them. Imports nothing heavy."""

import json
from pathlib import Path

from utils.process.errors import UserError
from utils.process.files import METRICS_FILE

SAMPLES_FILE = "samples.jsonl"
FILES = METRICS_FILE, SAMPLES_FILE


def read_rows(folder: Path, prefix: str) -> list[dict]:
    """The rows of one kind in a metrics file, names without their prefix.

    A last line that is not whole, as a killed run or a full disk leaves it, does not count.

    Raises:
        UserError: another line that is no row.
    """
    lines, rows = (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines(), []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"{folder / METRICS_FILE}, line {number}: no row of metrics: {error}") from error
    wanted = [row for row in rows if any(name.startswith(prefix + "/") for name in row)]
    return [{name.removeprefix(prefix + "/"): value for name, value in row.items()} for row in wanted]
