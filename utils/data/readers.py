"""Row readers: json, jsonl, csv, tsv, txt, parquet and arrow files as sequences of dictionaries, in little memory.

Every reader has len(), [i] -> dict (any integer type, negative too), where(i) -> "file, line 12" and column_names.
Rows are read one at a time with pread, not through a memory map: the pages of a map count as resident memory of the
process, so that a pass over a large file would look, and be limited, as if the file had been loaded. pread leaves
nothing behind, is thread-safe, and stays right in forked workers.

JSON lines are read where they lie. Opening them reads them through once, since a key may first appear in any row (a
second of a core for every 200 MB). Parquet, Arrow, CSV and packed files (.gz, .zst) have no cheap access to row i, and
a shuffled split asks for exactly that: their rows are streamed once into an unnamed temporary file (TMPDIR decides
where), on first use.

Damage of a file (bytes that are not UTF-8, invalid JSON, duplicate keys, no rows) is a DataError that names file and
line. Whether the fields of a row are usable is not decided here: see utils.data.raw_datasets.
"""

import csv
import errno
import gzip
import io
import json
import os
import sys
import tempfile
import weakref
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from utils.data.errors import DataError, kind_of
from utils.data.parsing import decode_text, parse_json, parse_object
from utils.data.rows import ListRows, Rows, columns_of

BOM = b"\xef\xbb\xbf"
CHUNK_BYTES = 4 << 20
PARQUET_BATCH_ROWS = 256
PACKINGS: dict[str, Callable[[str], Any]] = {
    ".gz": gzip.GzipFile,
    ".zst": lambda path: pa.CompressedInputStream(pa.OSFile(path), "zstd"),
}
# Lines up to this length are looked at for being blank; a longer line of blanks only is reported as invalid JSON.
LONGEST_BLANK_LINE = 16


class _FileRows(Rows):
    """Rows that lie as JSON text at known offsets of an open file: the file itself or a temporary one.

    A subclass gives _open() -> (descriptor, starts, ends, line numbers or None), called on first use, so that a run
    which finds its tokens in the cache never copies the data file.
    """

    unit = "line"

    def __init__(self, path: str | os.PathLike):
        self.path = str(path)
        self.wanted: frozenset[str] | None = None
        self._index: tuple[int, np.ndarray, np.ndarray, np.ndarray | None] | None = None
        with _errors_name(self.path):
            if os.path.getsize(self.path) == 0:
                raise DataError(f"{self.path}: expected rows, found an empty file")
        self.column_names = self._peek_columns()

    def __reduce__(self) -> tuple:
        # Worker processes that are not forked open the file anew.
        return type(self), (self.path,), {"wanted": self.wanted}

    def keep_columns(self, names: Iterable[str]) -> None:
        self.wanted = frozenset(names)

    def _is_wanted(self, name: str) -> bool:
        return self.wanted is None or name in self.wanted

    def _peek_columns(self) -> list[str]:
        raise NotImplementedError

    def _open(self) -> tuple[int, np.ndarray, np.ndarray, np.ndarray | None]:
        raise NotImplementedError

    def _opened(self) -> tuple[int, np.ndarray, np.ndarray, np.ndarray | None]:
        if self._index is None:
            with _errors_name(self.path):
                index = self._open()
            weakref.finalize(self, os.close, index[0])
            if len(index[1]) == 0:
                raise DataError(f"{self.path}: expected at least one row, found none")
            self._index = index
        return self._index

    def __len__(self) -> int:
        return len(self._opened()[1])

    def _row(self, position: int) -> dict[str, Any]:
        descriptor, starts, ends, _ = self._opened()
        start = int(starts[position])
        return json.loads(os.pread(descriptor, int(ends[position]) - start, start))

    def where(self, index: int) -> str:
        lines = self._opened()[3]
        return f"{self.path}, {self.unit} {int(index) + 1 if lines is None else int(lines[index])}"


_COLUMNS: dict[tuple, tuple[list[str], list[tuple[int, dict[str, Any]]]]] = {}  # of JSON lines, by path, size and time


class JsonLinesFile(_FileRows):
    """One JSON object per line, read in place (a packed one from an unpacked copy). Blank lines do not count.

    In memory: three int64 per row.
    """

    def _peek_columns(self) -> list[str]:
        with _errors_name(self.path):
            state = os.stat(self.path)
        key = self.path, state.st_size, state.st_mtime_ns
        if key not in _COLUMNS:  # a start opens the data twice: to look at them, and to prepare them
            _COLUMNS[key] = columns_of(self._in_order())
        names, self._examples = _COLUMNS[key]
        if not names and not self._first_rows(1):
            raise DataError(f"{self.path}: expected at least one row, found only blank lines")
        return names

    def _first_rows(self, count: int) -> list[dict[str, Any]]:
        return list(islice(self._in_order(), count))

    def _in_order(self) -> Iterator[dict[str, Any]]:
        """All rows, from the first line on, without an index."""
        with _errors_name(self.path), _open_binary(self.path) as file:
            for number, line in enumerate(file, start=1):
                line = line.removesuffix(b"\n")
                line = line.removeprefix(BOM) if number == 1 else line
                if line.strip():
                    yield self._parsed(line, lambda number=number: f"{self.path}, line {number}")

    def _parsed(self, line: bytes, where: Callable[[], str]) -> dict[str, Any]:
        return parse_object(line, where)

    def _open(self) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        if _packing(self.path):
            with _open_binary(self.path) as packed, tempfile.TemporaryFile() as unpacked:
                while chunk := packed.read(CHUNK_BYTES):
                    unpacked.write(chunk)
                unpacked.flush()
                descriptor = os.dup(unpacked.fileno())
        else:
            descriptor = os.open(self.path, os.O_RDONLY)
        return descriptor, *_index_lines(descriptor)

    def _row(self, position: int) -> dict[str, Any]:
        descriptor, starts, ends, _ = self._opened()
        start = int(starts[position])
        return self._parsed(os.pread(descriptor, int(ends[position]) - start, start), lambda: self.where(position))


class TextFile(JsonLinesFile):
    """A row per line of plain text, in the field ``text``; blank lines do not count."""

    def _peek_columns(self) -> list[str]:
        with _errors_name(self.path), _open_binary(self.path) as file:
            if b"\0" in file.read(1 << 16):
                raise DataError(f"{self.path}: expected text, found a zero byte")
        return ["text"]

    def _parsed(self, line: bytes, where: Callable[[], str]) -> dict[str, Any]:
        return {"text": decode_text(line, where).rstrip("\r\n")}


class JsonArrayFile(ListRows):
    """A JSON array of objects. It has to be read whole: give large data as JSON lines."""

    def __init__(self, path: str | os.PathLike):
        self.path = str(path)
        with _errors_name(self.path), _open_binary(self.path) as file:
            rows = parse_json(file.read().removeprefix(BOM), lambda: self.path)
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict):
                raise DataError(f"{self.path}, row {number}: expected a JSON object, found {kind_of(row)}")
        if not rows:
            raise DataError(f"{self.path}: expected at least one row, found an empty array")
        super().__init__(rows, self.path)


class CsvFile(_FileRows):
    """Comma-separated values with a header line. A short row lacks its last fields; a long one is an error."""

    delimiter = ","

    def _peek_columns(self) -> list[str]:
        with _errors_name(self.path):
            header, _ = next(self._records(), ([], 1))
        repeated = [name for name, count in Counter(header).items() if count > 1]
        if not header or repeated:
            found = f"the column {repeated[0]!r} twice" if repeated else "none"
            raise DataError(f"{self.path}, line 1: expected a header with one name per column, found {found}")
        return header

    def _first_rows(self, count: int) -> list[dict[str, Any]]:
        with _errors_name(self.path):
            records = self._records()
            header, _ = next(records)
            return [dict(zip(header, record, strict=False)) for record, _ in islice(records, count)]

    def _records(self) -> Iterator[tuple[list[str], int]]:
        """Each record with the line on which it begins; a quoted field may span lines."""
        # The limit of the csv module (128 KB per field) is far below what a long conversation takes.
        csv.field_size_limit(sys.maxsize)
        with _open_binary(self.path) as file:
            reader = csv.reader(self._decoded(file), delimiter=self.delimiter, strict=True)
            begin = 1
            while True:
                try:
                    record = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    raise DataError(f"{self.path}, line {begin}: expected a CSV record, found: {error}") from error
                if record:
                    yield record, begin
                begin = reader.line_num + 1

    def _decoded(self, file: BinaryIO) -> Iterator[str]:
        # Decoded line by line, because a text file decodes ahead and could not tell the line of a bad byte.
        for number, line in enumerate(file, start=1):
            yield decode_text(line.removeprefix(BOM) if number == 1 else line, f"{self.path}, line {number}")

    def _open(self) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        records = self._records()
        header, _ = next(records)
        wanted = [i for i, name in enumerate(header) if self._is_wanted(name)]

        def rows() -> Iterator[tuple[dict[str, Any], int]]:
            for record, line in records:
                if len(record) > len(header):
                    raise DataError(f"{self.path}, line {line}: expected {len(header)} fields, found {len(record)}")
                yield {header[i]: record[i] for i in wanted if i < len(record)}, line

        return _spool(rows())


class TsvFile(CsvFile):
    """Tab-separated values, otherwise as CSV: a field with a tab, a line feed or a quote in it stands in quotes."""

    delimiter = "\t"


class _BatchFile(_FileRows):
    """A file of Arrow batches, streamed once in small batches of the wanted columns.

    A subclass gives _batches(columns), which may raise what Arrow raises.
    """

    unit = "row"

    def _batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        raise NotImplementedError

    def _first_rows(self, count: int) -> list[dict[str, Any]]:
        with _errors_name(self.path):
            return [row for row, _ in islice(self._batched_rows(), count)]

    def _open(self) -> tuple[int, np.ndarray, np.ndarray, None]:
        descriptor, starts, ends, _ = _spool(self._batched_rows())
        return descriptor, starts, ends, None

    def _batched_rows(self) -> Iterator[tuple[dict[str, Any], int]]:
        wanted = [name for name in self.column_names if self._is_wanted(name)]
        repeated = [name for name, count in Counter(wanted).items() if count > 1]
        if repeated:
            raise DataError(f"{self.path}: expected one column {repeated[0]!r}, found several")
        number = 0
        try:
            for batch in self._batches(wanted):
                for row in _batch_rows(batch, self.path, number):
                    number += 1
                    yield row, number
        except DataError:
            raise
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{self.path}, after row {number}: expected more rows, found: {error}") from error


class ParquetFile(_BatchFile):
    """A parquet file."""

    def _peek_columns(self) -> list[str]:
        return list(self._parquet().schema_arrow.names)

    def _parquet(self) -> pq.ParquetFile:
        try:
            # Without a buffer size Arrow holds whole column chunks, which is the file where one row group is all of it.
            return pq.ParquetFile(self.path, buffer_size=1 << 20)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{self.path}: expected a parquet file, found: {error}") from error

    def _batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        with self._parquet() as file:
            # One thread: Arrow's thread pool does not survive the fork of a worker process.
            yield from file.iter_batches(PARQUET_BATCH_ROWS, columns=columns, use_threads=False)


class ArrowFile(_BatchFile):
    """An Arrow file, of either kind: with an index at its end, or a plain stream, as the cache of ``datasets`` is."""

    FILE_MAGIC = b"ARROW1"
    END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"

    def _peek_columns(self) -> list[str]:
        with self._reader() as reader:
            return list(reader.schema.names)

    @contextmanager
    def _reader(self, columns: list[str] | None = None) -> Iterator[pa.ipc.RecordBatchStreamReader]:
        with open(self.path, "rb") as file:
            has_index = file.read(len(self.FILE_MAGIC)) == self.FILE_MAGIC
        open_reader = pa.ipc.open_file if has_index else pa.ipc.open_stream
        with pa.OSFile(self.path) as file:
            try:
                reader = open_reader(file)
                _ = reader.schema.names  # damaged names show here
                if columns is not None:
                    options = pa.ipc.IpcReadOptions(
                        included_fields=[reader.schema.get_field_index(name) for name in columns], use_threads=False
                    )
                    file.seek(0)
                    reader = open_reader(file, options=options)
            except (pa.ArrowException, OSError, ValueError) as error:
                raise DataError(f"{self.path}: expected an Arrow file, found: {error}") from error
            yield reader

    def _batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        with self._reader(columns) as reader:
            has_index = isinstance(reader, pa.ipc.RecordBatchFileReader)
            if not has_index:
                self._refuse_open_end()
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if has_index else reader
            for batch in batches:
                batch.validate(full=True)  # a damaged file may point outside itself
                for begin in range(0, batch.num_rows, PARQUET_BATCH_ROWS):
                    yield batch.slice(begin, PARQUET_BATCH_ROWS)

    def _refuse_open_end(self) -> None:
        """Arrow takes a stream that stops between two batches for a whole one."""
        with open(self.path, "rb") as file:
            file.seek(-len(self.END_OF_STREAM), os.SEEK_END)
            if file.read() != self.END_OF_STREAM:
                raise DataError(f"{self.path}: expected the mark of a stream's end, found none: it was cut short")


def _batch_rows(batch: pa.RecordBatch, path: str, rows_before: int) -> list[dict[str, Any]]:
    """The rows of an Arrow batch; text that is not UTF-8 is looked for row by row only once it is known to be there."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        for offset in range(batch.num_rows):
            try:
                batch.slice(offset, 1).to_pylist()
            except UnicodeDecodeError as error:
                place = f"{path}, row {rows_before + offset + 1}"
                raise DataError(f"{place}: expected UTF-8 text, found: {error.reason}") from error
        raise


def _packing(path: str | os.PathLike) -> str | None:
    """The ending that says how a file is packed, or None."""
    return next((ending for ending in PACKINGS if str(path).lower().endswith(ending)), None)


def without_packing(name: str) -> str:
    """The name that a file has once it is unpacked: "a.jsonl" for "a.jsonl.gz"."""
    return name[: len(name) - len(_packing(name) or "")]


def _open_binary(path: str) -> BinaryIO:
    return open(path, "rb") if _packing(path) is None else io.BufferedReader(_Unpacked(path))


class _Unpacked(io.RawIOBase):
    """What a packed file holds. Texts shrink to a tenth; what grows a hundredfold and more was made to fill memory."""

    FREE_BYTES, MOST_TIMES = 16 << 20, 100

    def __init__(self, path: str):
        self.path, self.file, self.position = path, PACKINGS[_packing(path)](path), 0
        self.limit = max(self.FREE_BYTES, self.MOST_TIMES * os.path.getsize(path))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self.file.readinto(buffer)
        self.position += count
        if self.position > self.limit:
            raise DataError(f"{self.path}: unpacks to more than {self.MOST_TIMES} times its size; unpack it first")
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


@contextmanager
def _errors_name(path: str) -> Iterator[None]:
    """Turns what the operating system and the unpackers raise into a DataError that names the file."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            place = tempfile.gettempdir()
            raise DataError(
                f"{path}: no room for a copy of its rows in {place} (TMPDIR names another place)"
            ) from error
        raise DataError(f"{path}: cannot be read: {error}") from error


def _index_lines(descriptor: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(starts, ends, line numbers from 1) of the lines that are not blank, each int64, without BOM and line feeds."""
    size = os.fstat(descriptor).st_size
    line_feeds = [
        np.flatnonzero(np.frombuffer(os.pread(descriptor, CHUNK_BYTES, offset), np.uint8) == 0x0A) + offset
        for offset in range(0, size, CHUNK_BYTES)
    ]
    ends = np.concatenate([*line_feeds, [size]]).astype(np.int64)
    starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)
    if os.pread(descriptor, len(BOM), 0) == BOM:
        starts[0] = len(BOM)
    keep = ends > starts
    for i in np.flatnonzero(keep & (ends - starts <= LONGEST_BLANK_LINE)):
        keep[i] = bool(os.pread(descriptor, int(ends[i] - starts[i]), int(starts[i])).strip())
    return starts[keep], ends[keep], np.flatnonzero(keep) + 1


def _spool(rows: Iterable[tuple[dict[str, Any], int]]) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """Writes (row, line number) pairs as JSON into an unnamed temporary file: (descriptor, starts, ends, lines)."""
    # A date or a byte string of a parquet column is no text for us; it must not turn into some.
    encode = json.JSONEncoder(ensure_ascii=False, default=lambda value: {"type": type(value).__name__}).encode
    starts, ends, lines = array("q"), array("q"), array("q")
    position = 0
    with tempfile.TemporaryFile() as file:
        for row, line in rows:
            starts.append(position)
            position += file.write(encode(row).encode())
            ends.append(position)
            lines.append(line)
        file.flush()
        descriptor = os.dup(file.fileno())
    return descriptor, *(np.array(part, np.int64) for part in (starts, ends, lines))


def _begins_with_bracket(path: Path) -> bool:
    with _errors_name(str(path)), _open_binary(str(path)) as file:
        while chunk := file.read(1 << 16):
            text = chunk.removeprefix(BOM).lstrip()
            if text:
                return text.startswith(b"[")
    return False


def _json_file(path: Path) -> Rows:
    if _begins_with_bracket(path):
        return JsonArrayFile(path)
    try:
        return JsonLinesFile(path)
    except DataError as error:
        raise DataError(f"{error}; a .json file holds an array of objects, or one object per line") from error


READERS: dict[str, Callable[[Path], Rows]] = {
    ".json": _json_file,
    ".jsonl": JsonLinesFile,
    ".ndjson": JsonLinesFile,
    ".csv": CsvFile,
    ".tsv": TsvFile,
    ".txt": TextFile,
    ".parquet": ParquetFile,
    ".arrow": ArrowFile,
}
NEVER_PACKED = (".parquet", ".arrow")


def file_kind(path: str | os.PathLike) -> str | None:
    """The ending that decides the reader (".jsonl" for "a.jsonl.gz"), or None where no reader fits."""
    name = Path(path).name.lower()
    kind = Path(without_packing(name)).suffix
    packing = _packing(name)
    return kind if kind in READERS and not (packing and kind in NEVER_PACKED) else None


def open_file(path: str | os.PathLike) -> Rows:
    """The rows of one file by its ending.

    Raises:
        DataError: the file is missing, empty, damaged or of an unknown kind.
    """
    kind = file_kind(path)
    if kind is None:
        raise DataError(
            f"{path}: expected a file that ends in one of {', '.join(READERS)} (or {' or '.join(PACKINGS)} after it, "
            f"but for {' and '.join(NEVER_PACKED)})"
        )
    return READERS[kind](Path(path))
