"""A small real file of each kind that is read, whole and damaged."""

import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from utils.data import readers
from utils.data.errors import DataError
from utils.data.readers import ArrowFile, TextFile, TsvFile, file_kind, open_file
from utils.data.splits import open_splits

ROWS = [{"prompt": f'q{i}\t"é"\nline', "chosen": f"ja {i}"} for i in range(700)]


def zst(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(data)
    return sink.getvalue().to_pybytes()


def lines(rows=ROWS) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def tsv(rows=ROWS) -> bytes:
    quoted = [[value.replace('"', '""') for value in row.values()] for row in rows]
    return "".join("\t".join(f'"{value}"' for value in row) + "\n" for row in [["prompt", "chosen"], *quoted]).encode()


def arrow(stream: bool, rows=ROWS) -> bytes:
    table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=300)
    return sink.getvalue().to_pybytes()


FILES = {
    "a.jsonl": lines(),
    "a.jsonl.zst": zst(lines()),
    "a.JSONL.ZST": zst(lines()),
    "two_frames.jsonl.zst": zst(lines(ROWS[:9])) + zst(lines(ROWS[9:])),
    "a.json.zst": zst(json.dumps(ROWS).encode()),
    "a.tsv": tsv(),
    "a.tsv.gz": gzip.compress(tsv()),
    "a.tsv.zst": zst(tsv()),
    "file.arrow": arrow(False),
    "stream.arrow": arrow(True),
}


@pytest.mark.parametrize("name", FILES)
def test_rows_of_each_kind_are_the_same(name, tmp_path):
    (tmp_path / name).write_bytes(FILES[name])
    rows = open_file(tmp_path / name)
    assert rows.column_names == ["prompt", "chosen"] and list(rows) == ROWS and rows[-1] == ROWS[-1]
    some = open_file(tmp_path / name)
    some.keep_columns(["chosen"])
    assert some[699]["chosen"] == "ja 699"
    assert list(open_splits(tmp_path)["train"]) == ROWS


def test_what_datasets_keeps_in_its_cache_is_read(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(lines(ROWS[:50]))
    loaded = datasets.load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"))
    [file] = [entry["filename"] for entry in loaded["train"].cache_files]
    assert list(open_file(file)) == ROWS[:50]
    loaded.save_to_disk(str(tmp_path / "saved"))
    assert list(open_splits(tmp_path / "saved/train")["train"]) == ROWS[:50]


@pytest.mark.parametrize("packed", [False, True])
def test_text_is_a_prompt_a_line(tmp_path, packed):
    data = "\ufeffWhat is two plus two?\r\n\r\nSag é.\n".encode()
    path = tmp_path / ("a.txt.zst" if packed else "a.txt")
    path.write_bytes(zst(data) if packed else data)
    rows = open_file(path)
    assert type(rows) is TextFile and rows.column_names == ["text"]
    assert list(rows) == [{"text": "What is two plus two?"}, {"text": "Sag é."}]
    assert rows.where(1).endswith("line 3")


def test_text_beside_data_files_is_no_data(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(lines())
    (tmp_path / "LICENSE.txt").write_text("Do as you like.")
    assert "LICENSE" not in open_splits(tmp_path).notes and len(open_splits(tmp_path)["train"]) == 700
    (tmp_path / "train.jsonl").unlink()
    assert [row["text"] for row in open_splits(tmp_path)["train"]] == ["Do as you like."]


def test_columns_of_an_arrow_file_are_read_alone(tmp_path):
    for stream in (False, True):
        (tmp_path / "a.arrow").write_bytes(arrow(stream, [row | {"wide": [1, 2, 3]} for row in ROWS]))
        rows = ArrowFile(tmp_path / "a.arrow")
        rows.keep_columns(["chosen", "prompt"])
        assert rows[3] == ROWS[3] and list(rows[3]) == ["prompt", "chosen"]
        assert rows.where(3).endswith("a.arrow, row 4")


DAMAGED = {
    "no zst": ("a.jsonl.zst", b"not packed", "a.jsonl.zst: cannot be read"),
    "half a zst": ("a.jsonl.zst", FILES["a.jsonl.zst"][:-20], "a.jsonl.zst: cannot be read: Truncated"),
    "something behind a zst": ("a.jsonl.zst", FILES["a.jsonl.zst"] + b"more", "a.jsonl.zst: cannot be read"),
    "a bomb": ("a.jsonl.zst", zst(lines(ROWS[:1]) * 1_000_000), "a.jsonl.zst: unpacks to more than 100 times its size"),
    "a bomb of text": ("a.txt.zst", zst(b"x" * (100 << 20)), "a.txt.zst: unpacks to more than 100 times its size"),
    "a key twice in a zst": (
        "a.jsonl.zst",
        zst(b'{"prompt": 1, "prompt": 2}'),
        "expected each key once, found 'prompt'",
    ),
    "no arrow": ("a.arrow", b"not arrow at all", "a.arrow: expected an Arrow file"),
    "half an arrow file": ("a.arrow", FILES["file.arrow"][:-500], "a.arrow: expected an Arrow file"),
    "half an arrow stream": ("a.arrow", FILES["stream.arrow"][:-5000], "a.arrow: .* the mark of a stream's end"),
    "an arrow stream without its end": ("a.arrow", FILES["stream.arrow"][:-8], "a.arrow: .* it was cut short"),
    "half an arrow stream with an end": (
        "a.arrow",
        FILES["stream.arrow"][:-5000] + ArrowFile.END_OF_STREAM,
        "a.arrow, after row 300: expected more rows",
    ),
    "an empty arrow": ("a.arrow", b"", "a.arrow: expected rows, found an empty file"),
    "an arrow without rows": ("a.arrow", arrow(True, []), "a.arrow: expected at least one row, found none"),
    "a long line of tsv": ("a.tsv", b"prompt\tchosen\na\tb\tc\n", "a.tsv, line 2: expected 2 fields, found 3"),
    "an open quote in tsv": ("a.tsv", b'prompt\tchosen\n"a\tb\n', "a.tsv, line 2: expected a CSV record"),
    "a zero byte in tsv": ("a.tsv", b"prompt\tchosen\na\0\tb\n", "a.tsv, line 2: expected text, found a zero byte"),
    "a zero byte in csv": ("a.csv", b"prompt,chosen\na,b\0\n", "a.csv, line 2: expected text, found a zero byte"),
    "text of two bytes": ("a.txt", "ab\n".encode("utf-16-le"), "a.txt: expected text, found a zero byte"),
    "a zero byte late in text": ("a.txt", b"a\n" * 40_000 + b"\0\n", "a.txt, line 40001: expected text, found a zero"),
    "text that is no UTF-8": ("a.txt", b"a\n\xff\n", "a.txt, line 2: expected UTF-8"),
    "packed parquet": ("a.parquet.zst", b"x", "but for .parquet and .arrow"),
    "packed arrow": ("a.arrow.gz", b"x", "but for .parquet and .arrow"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_names_the_file_and_the_place(case, tmp_path):
    name, data, message = DAMAGED[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        list(open_file(tmp_path / name))


def test_an_arrow_file_that_points_outside_itself_is_refused(tmp_path):
    offsets = pa.array([0, 300, 3], pa.int32()).buffers()[1]
    table = pa.table({"prompt": pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"abc"))})
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match=r"a.arrow, after row 0: .*out of bounds: 300 > 3"):
        open_file(tmp_path / "a.arrow")[0]


def test_every_ending_has_its_kind():
    assert file_kind("a.TSV.gz") == ".tsv" and file_kind("a.txt.zst") == ".txt" and file_kind("a.arrow") == ".arrow"
    assert file_kind("a.zst") is file_kind("a.arrow.zst") is file_kind("a.parquet.gz") is file_kind("a.md") is None
    assert issubclass(TsvFile, readers.CsvFile) and set(readers.PACKINGS) == {".gz", ".zst"}


def test_parquet_is_still_read_in_small_batches(tmp_path, monkeypatch):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    sizes, original = [], readers._batch_rows
    monkeypatch.setattr(readers, "_batch_rows", lambda batch, *a: sizes.append(len(batch)) or original(batch, *a))
    assert list(open_file(tmp_path / "a.parquet")) == ROWS
    (tmp_path / "a.arrow").write_bytes(arrow(False, ROWS))
    assert list(open_file(tmp_path / "a.arrow")) == ROWS
    assert max(sizes) <= readers.PARQUET_BATCH_ROWS
