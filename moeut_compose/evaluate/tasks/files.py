"""Benchmark files as they are handed out: plain, compressed, or inside an archive.

A pattern is a path below the folder of benchmarks, such as `blimp.zip/data/*.jsonl`: parts that end in .zip,
.tgz or .tar.gz are archives, the last part may hold `*`. A plain file may also be packed as .gz, .bz2 or .xz.
"""

from __future__ import annotations

import fnmatch
import json
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from moeut_compose.data.errors import DataError
from moeut_compose.data.files import UNREADABLE, open_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

T = TypeVar("T")

PACKED = ("", ".xz", ".gz", ".bz2")
ARCHIVES = (".zip", ".tgz", ".tar.gz")


@dataclass(frozen=True)
class BenchmarkFile:
    """The text of one file, and where it came from."""

    stem: str
    """Name of the file without folders and endings."""
    path: str
    text: str


def read_files(folder: Path, patterns: Sequence[str]) -> list[BenchmarkFile]:
    """The files of the first pattern that matches any, sorted by name.

    Raises `DataError`, naming all patterns, if none does, or if a file cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder of benchmark files")
    for pattern in patterns:
        found = sorted(_matches(folder, pattern), key=lambda file: file.path)
        if found:
            return found
    expected = ", ".join(str(PurePosixPath(pattern)) for pattern in patterns)
    raise DataError(
        f"{folder} does not have the files expected: one of {expected} (also packed as .xz, .gz or .bz2)"
    )


def read_file(folder: Path, patterns: Sequence[str]) -> BenchmarkFile:
    """The one file of the first pattern that matches. Raises `DataError`."""
    return read_files(folder, patterns)[0]


def _matches(folder: Path, pattern: str) -> Iterator[BenchmarkFile]:
    parts = PurePosixPath(pattern).parts
    archive = next((i for i, part in enumerate(parts) if part.endswith(ARCHIVES)), None)
    if archive is not None:
        path = folder.joinpath(*parts[: archive + 1])
        if path.is_file():
            yield from _unpacked(path, "/".join(parts[archive + 1 :]))
        return
    for ending in PACKED:
        paths = [path for path in folder.glob(pattern + ending) if not path.name.startswith(".")]
        for path in paths:
            try:
                with open_text(path) as file:
                    yield BenchmarkFile(_stem(path.name), str(path), file.read())
            except UNREADABLE as error:
                raise DataError(f"cannot read {path}: {error}") from error
        if paths:
            return


def _unpacked(path: Path, pattern: str) -> Iterator[BenchmarkFile]:
    """The members of an archive that match."""
    try:
        for name, content in _members(path, pattern):
            yield BenchmarkFile(_stem(PurePosixPath(name).name), f"{path}/{name}", content.decode("utf-8"))
    except (*UNREADABLE, zipfile.BadZipFile, tarfile.TarError) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _members(path: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if _is_wanted(name, pattern):
                    yield name, archive.read(name)
        return
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member) if _is_wanted(member.name, pattern) else None
            if file is not None:
                yield member.name, file.read()


def _is_wanted(name: str, pattern: str) -> bool:
    hidden = PurePosixPath(name).name.startswith(".")
    return not hidden and fnmatch.fnmatchcase(name.removeprefix("./"), pattern)


def _stem(name: str) -> str:
    return name.split(".")[0]


@dataclass(frozen=True)
class Record:
    """One object of a JSON file, whose fields are checked when they are read."""

    values: dict[str, Any]
    where: str

    def get(self, key: str, kind: type[T]) -> T:
        """A field that must be there and be a `kind`. Raises `DataError`."""
        value = self.values.get(key)
        if not isinstance(value, kind):
            raise DataError(f"{self.where}: expected {key!r} to be a {kind.__name__}, found {value!r}")
        return value

    def records(self, key: str) -> list[Record]:
        """A field that must be a list of objects. Raises `DataError`."""
        return [_record(value, f"{self.where}, {key}") for value in self.get(key, list)]


def read_jsonl(file: BenchmarkFile) -> Iterator[Record]:
    """The objects of a file with one on each line. Raises `DataError`."""
    for number, line in enumerate(file.text.split("\n"), 1):
        if line.strip():
            where = f"{file.path}, line {number}"
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not JSON ({error})") from error
            yield _record(value, where)


def _record(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object, found {value!r}")
    return Record(value, where)
