"""What a run writes down: one JSON object per line in metrics.jsonl, and the same numbers to TensorBoard; rollouts for
a person to read in samples.jsonl."""

import json
import math
import time
from pathlib import Path

from utils.distributed import UserError
from utils.utils import is_rank_0


class MetricsWriter:
    """Writes rows to ``folder/metrics.jsonl`` and, if asked, scalars to TensorBoard; each row is flushed as written."""

    def __init__(self, folder: str | Path | None, tensorboard_path: str | Path | None = None):
        self._file, self._samples, self._tensorboard = None, None, None
        self._start = time.time()
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._file = (Path(folder) / "metrics.jsonl").open("w", encoding="utf-8")
            self._samples = Path(folder) / "samples.jsonl"
            self._samples.unlink(missing_ok=True)
        if tensorboard_path is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise UserError(
                    "--enable_tensorboard needs the package tensorboard: pip install tensorboard"
                ) from error
            self._tensorboard = SummaryWriter(str(tensorboard_path))

    def write(self, step: int, values: dict, prefix: str = "train") -> None:
        """One row: {"step", "time", "prefix/name": value, ...}; a number that is not finite becomes null."""
        row = {"step": step, "time": round(time.time() - self._start, 3)}
        for name, value in values.items():
            is_number = isinstance(value, int | float)
            row[f"{prefix}/{name}"] = None if is_number and not math.isfinite(value) else value
            if is_number and self._tensorboard is not None:
                self._tensorboard.add_scalar(f"{prefix}/{name}", value, step)
        if self._file is not None:
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._file.flush()

    def write_samples(self, step: int, samples: list[dict]) -> None:
        """Rows of texts and figures, each with its step, to samples.jsonl."""
        if self._samples is not None:
            with self._samples.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step} | row, ensure_ascii=False) + "\n" for row in samples)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


class NullWriter:
    """The twin for the other ranks: takes everything, does nothing."""

    def write(self, step: int, values: dict, prefix: str = "train") -> None:
        pass

    def write_samples(self, step: int, samples: list[dict]) -> None:
        pass

    def close(self) -> None:
        pass


def make_writer(args) -> MetricsWriter | NullWriter:
    if not is_rank_0():
        return NullWriter()
    return MetricsWriter(args.output_dir, args.tensorboard_path if args.enable_tensorboard else None)


def read_rows(folder: Path, prefix: str) -> list[dict]:
    """The rows of one kind in a metrics file, names without their prefix."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    wanted = [row for row in rows if any(name.startswith(prefix + "/") for name in row)]
    return [{name.removeprefix(prefix + "/"): value for name, value in row.items()} for row in wanted]
