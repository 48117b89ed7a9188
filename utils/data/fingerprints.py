"""Fingerprints of files and texts, by which caches and checkpoints know their data again."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from utils.data.errors import DataError

CHUNK_BYTES = 4 << 20


def content_fingerprint(path_or_paths: str | os.PathLike | Iterable[str | os.PathLike]) -> str:
    """32 hex digits that depend on the bytes of the given files, in the given order, and on nothing else.

    The place and time stamps of a file do not count, so a copied file keeps its fingerprint on every machine.
    A folder stands for all files in it, with their names relative to the folder.
    """
    paths = [path_or_paths] if isinstance(path_or_paths, (str, os.PathLike)) else list(path_or_paths)
    digest = hashlib.blake2b(digest_size=16)
    for path in map(Path, paths):
        if path.is_dir():
            for file in sorted(item for item in path.rglob("*") if item.is_file()):
                digest.update(file.relative_to(path).as_posix().encode(errors="surrogateescape") + b"\0")
                _hash_file(file, digest)
        else:
            _hash_file(path, digest)
    return digest.hexdigest()


def _hash_file(path: Path, digest: "hashlib.blake2b") -> None:
    """Adds size and bytes of one file; the size keeps ["ab", "c"] and ["a", "bc"] apart."""
    try:
        with open(path, "rb") as file:
            digest.update(os.fstat(file.fileno()).st_size.to_bytes(8, "little"))
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def text_fingerprint(parts: Sequence[str]) -> str:
    """32 hex digits that depend on the given texts."""
    return hashlib.blake2b("\n".join(parts).encode(errors="surrogatepass"), digest_size=16).hexdigest()
