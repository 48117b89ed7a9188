"""What a run writes down: one JSON object per line in metrics.jsonl, and the same numbers to TensorBoard, wandb or
trackio; rollouts for a person to read in samples.jsonl."""

import contextlib
import importlib
import json
import math
import os
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from utils.process.console import is_rank_0
from utils.process.errors import UserError
from utils.process.files import flush_to_disk
from utils.process.ranks import agree
from utils.run.former_run import remove_former_run
from utils.run.metrics_file import FILES, METRICS_FILE, SAMPLES_FILE

PROJECT = "three-steps-to-chat"  # among the projects of a tracker, unless WANDB_PROJECT or TRACKIO_PROJECT names one


class TensorBoard:
    """Scalars for TensorBoard."""

    def __init__(self, folder: str | Path, purge_step: int | None = None):
        from torch.utils.tensorboard import SummaryWriter

        try:
            self._writer = SummaryWriter(str(folder), purge_step=purge_step)
        except OSError as error:
            raise UserError(f"--tensorboard_path {folder}: cannot be written: {error.strerror}") from error

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Tracker:
    """wandb or trackio: two packages with one interface. Keys and offline mode: by their environment variables."""

    def __init__(self, package: str, run_name: str | None, settings: dict):
        self._package = importlib.import_module(package)
        project = os.environ.get(f"{package.upper()}_PROJECT", PROJECT)
        try:
            self._package.init(project=project, name=run_name, config=settings)
        except Exception as error:  # no key, no network, ...: theirs to say, before the first step
            raise UserError(f"--report_to {package}: {error}") from error

    def log(self, values: dict[str, float], step: int) -> None:
        self._package.log(values, step=step)

    def close(self) -> None:
        self._package.finish()


def _cut_back(file: Path, size: int, checksum: int) -> None:
    """Leave the first bytes of a file; one that does not begin as it did is of another run, and put aside."""
    start = b""
    if file.exists():
        with file.open("rb") as content:
            start = content.read(size)
    if start and zlib.crc32(start) == checksum:
        os.truncate(file, size)
    elif size and start:
        file.replace(file.with_name(f"{file.name}.other"))
    else:
        file.unlink(missing_ok=True)


class MetricsWriter:
    """Writes rows to ``folder/metrics.jsonl`` and numbers to each tracker; a row is flushed as written.

    Args:
        position: what ``position()`` gave when the checkpoint was written from which the run goes on: rows written
            after it are cut off. None for a fresh start.
        before_first: called once, when the first row is there to be written: a run that fails before it leaves alone
            what an earlier one wrote.
    """

    def __init__(
        self,
        folder: str | Path | None,
        trackers: Sequence[TensorBoard | Tracker] = (),
        position: dict | None = None,
        before_first: Callable[[], None] = lambda: None,
    ):
        self._before_first = before_first
        self._folder, self._trackers, self._resumed, self._file = folder and Path(folder), trackers, position, None
        self._start = time.time() - (position["seconds"] if position else 0)

    def _open(self) -> None:
        """Only when there is something to write: a start that fails before leaves the files of an earlier run alone."""
        if self._folder is None or self._file is not None:
            return
        self._before_first()
        self._folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            _cut_back(self._folder / name, *(self._resumed["files"].get(name, (0, 0)) if self._resumed else (0, 0)))
        self._file = (self._folder / METRICS_FILE).open("a", encoding="utf-8")

    def sizes(self) -> dict[str, int] | None:
        """Of the files as they are now, for ``position``; None before the first row."""
        if self._file is None:
            return None
        with self._naming_the_file():
            files = (self._folder / name for name in FILES)
            return {file.name: file.stat().st_size for file in files if file.exists()}

    def position(self, sizes: dict[str, int] | None = None) -> dict:
        """How far the files are written, or were when they had these sizes; on the disk by now. For a checkpoint."""
        files = {}
        with self._naming_the_file():
            self._open()
            for file in (self._folder / name for name in FILES if self._folder is not None):
                content = file.read_bytes() if file.exists() else b""
                content = content if sizes is None else content[: sizes.get(file.name, 0)]
                if content:
                    flush_to_disk(file)
                files[file.name] = [len(content), zlib.crc32(content)]
        return {"seconds": time.time() - self._start, "files": files}

    def write(self, step: int, values: dict, prefix: str = "train") -> None:
        """One row: {"step", "time", "prefix/name": value, ...}; a number that is not finite becomes null."""
        row = {f"{prefix}/{name}": value for name, value in values.items()}
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
        row |= {name: None for name, value in numbers.items() if not math.isfinite(value)}
        with self._naming_the_file():
            for tracker in self._trackers:
                tracker.log(numbers, step)
            self._open()
            if self._file is not None:
                row = {"step": step, "time": round(time.time() - self._start, 3)} | row
                self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
                self._file.flush()

    def write_samples(self, step: int, samples: list[dict]) -> None:
        """Rows of texts and figures, each with its step, to samples.jsonl."""
        if self._folder is None:
            return
        with self._naming_the_file():
            self._open()
            with (self._folder / SAMPLES_FILE).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step} | row, ensure_ascii=False) + "\n" for row in samples)

    @contextlib.contextmanager
    def _naming_the_file(self):
        """While open, a file that cannot be written is a UserError that names it."""
        try:
            yield
        except OSError as error:
            place = "--report_to" if self._folder is None else self._folder / METRICS_FILE
            raise UserError(f"the metrics could not be written ({place}): {error}") from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        for tracker in self._trackers:
            tracker.close()


class NullWriter:
    """The twin for the other ranks: takes everything, does nothing."""

    def sizes(self) -> None:
        return None

    def position(self, sizes=None) -> dict:
        return {}

    def write(self, step: int, values: dict, prefix: str = "train") -> None:
        pass

    def write_samples(self, step: int, samples: list[dict]) -> None:
        pass

    def close(self) -> None:
        pass


def make_writer(args, resumed: dict | None = None) -> MetricsWriter | NullWriter:
    """The writer of this rank, with the trackers of ``--report_to``; every rank must call this.

    Args:
        resumed: the state of the checkpoint that the run goes on from, in its files and in TensorBoard; for wandb and
            trackio it is another run of the same name.
    """
    writer = NullWriter()

    def open_writer() -> None:
        nonlocal writer
        settings = {name: value for name, value in vars(args).items() if isinstance(value, str | int | float | list)}
        trackers = [
            TensorBoard(args.tensorboard_path, resumed and resumed["steps"] + 1)
            if name == "tensorboard"
            else Tracker(name, args.run_name or (args.output_dir and Path(args.output_dir).name), settings)
            for name in args.report_to
        ]
        more = {}
        if args.overwrite_output_dir and resumed is None and args.output_dir is not None:
            more["before_first"] = partial(remove_former_run, args.output_dir)
        writer = MetricsWriter(args.output_dir, trackers, resumed and resumed["metrics"], **more)

    agree(open_writer if is_rank_0() else lambda: None)
    return writer
