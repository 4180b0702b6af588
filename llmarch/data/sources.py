"""Sources: a config of llmarch/run_config.py -> documents, in a stable order."""

import codecs
import contextlib
import dataclasses
import glob
import gzip
import hashlib
import importlib
import json
import os
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from llmarch.errors import UserError, nearest
from llmarch.files import local_path
from llmarch.run_config import JSONL, HFDataset, SourceConfig, Stdlib, TextFiles

# Third-party packages, tests (odd encodings, odd code), and what differs between builds of one version.
STDLIB_SKIPS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
STDLIB_SKIP_PREFIXES = ("config-", "_sysconfigdata")


@dataclasses.dataclass(frozen=True)
class Survey:
  """The contents of a source. `corpus` is the sha256 (hex) over the sha256 of each document, in order."""

  corpus: str
  num_documents: int
  num_bytes: int  # of UTF-8 text


def documents(source: SourceConfig) -> Iterator[str]:
  """The texts of a source; none is empty. Raises UserError for what cannot be read."""
  return (text for text in READERS[type(source)](source) if text)


def survey(source: SourceConfig) -> Survey:
  """Reads a source once. Raises UserError where it is unreadable or empty."""
  corpus, num_documents, num_bytes = hashlib.sha256(), 0, 0
  for text in documents(source):
    corpus.update(digest(text))
    num_documents += 1
    num_bytes += len(text.encode())
  if not num_documents:
    raise UserError(f"data.source ({source.kind}) holds no text; name another source or other paths")
  if isinstance(source, TextFiles) and source.separator and num_documents <= len(_files(source.paths)):
    print(
      f"data.source.separator={source.separator!r} is in none of the files: each of them is one document",
      file=sys.stderr,
    )
  return Survey(corpus.hexdigest(), num_documents, num_bytes)


def digest(text: str) -> bytes:
  """sha256 of a document. Raises UserError for a lone surrogate: JSON can spell one, UTF-8 cannot."""
  try:
    return hashlib.sha256(text.encode()).digest()
  except UnicodeEncodeError as e:
    around = ascii(text[max(e.start - 20, 0) : e.end + 20])
    raise UserError(
      f"data.source: a document holds the lone surrogate in {around}; repair or drop it"
    ) from None


def _stdlib(source: Stdlib) -> Iterator[str]:
  root = sysconfig.get_paths()["stdlib"]
  if not os.path.isdir(root):
    raise UserError(f"this Python has no standard library source at {root}; set data.source to text or jsonl")
  for path in stdlib_files(root):
    try:
      yield Path(path).read_bytes().decode()
    except (OSError, UnicodeDecodeError):
      continue  # a few files are in other encodings on purpose


def stdlib_files(root: str) -> list[str]:
  """The *.py files under `root` that belong to the library itself, sorted by their parts."""
  found = []
  for folder, folders, files in os.walk(root):
    folders[:] = [f for f in folders if f not in STDLIB_SKIPS and not f.startswith(STDLIB_SKIP_PREFIXES)]
    names = [f for f in files if f.endswith(".py") and not f.startswith(STDLIB_SKIP_PREFIXES)]
    found += [path for f in names if os.path.isfile(path := os.path.join(folder, f))]
  return sorted(found, key=lambda path: path.split(os.sep))


def _text(source: TextFiles) -> Iterator[str]:
  separator = unescaped(source.separator)
  for path in _files(source.paths):
    if path.endswith(PARQUET):
      yield from _column(path, "text")
      continue
    with _opened(path) as f:
      data = f.read()
    try:
      text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as e:
      raise UserError(
        f"{path} is not UTF-8 at byte {e.start}; convert it or leave it out of data.source.paths"
      ) from None
    yield from text.split(separator) if separator else [text]


def unescaped(separator: str) -> str:
  """A separator as it was meant: a shell passes `\\n\\n` on as four characters."""
  for typed, meant in (("\\r", "\r"), ("\\n", "\n"), ("\\t", "\t")):
    separator = separator.replace(typed, meant)
  return separator.replace("\r\n", "\n")


def _jsonl(source: JSONL) -> Iterator[str]:
  for path in _files(source.paths):
    if path.endswith(PARQUET):
      yield from _column(path, source.field)
      continue
    with _opened(path) as f:
      for number, line in enumerate(f, 1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if line.strip():
          yield _field(line, source.field, f"{path}, line {number},")


PARQUET = ".parquet"


def _column(path: str, field: str) -> Iterator[str]:
  """The texts of a column of a parquet file, a batch of rows in memory at a time."""
  try:
    import pyarrow
    from pyarrow import parquet
  except ImportError:
    raise UserError(f"{path} is a parquet file and needs the package pyarrow; run pip install pyarrow") from None
  try:
    with parquet.ParquetFile(path) as file:
      if field not in file.schema_arrow.names:
        known = nearest(field, file.schema_arrow.names)
        raise UserError(f"{path} has no column {field!r}; take data.source.kind=jsonl, and its field{known}")
      for batch in file.iter_batches(columns=[field]):
        for text in batch.column(0).to_pylist():
          if not isinstance(text, str | None):
            raise UserError(f"{path} holds {type(text).__name__}, not text, in {field!r}; set data.source.field")
          yield text or ""
  except (OSError, pyarrow.ArrowException) as e:
    why = " ".join(str(e).split())
    raise UserError(f"{path} cannot be read as parquet ({why}); correct data.source.paths") from None


def _field(line: bytes, field: str, where: str) -> str:
  try:
    row = json.loads(line)
  except (ValueError, RecursionError) as e:
    raise UserError(f"{where} is not JSON ({e}); repair or drop the line") from None
  if not isinstance(row, dict) or field not in row:
    known = nearest(field, row) if isinstance(row, dict) else ""
    raise UserError(f"{where} has no field {field!r}; set data.source.field{known}")
  if not isinstance(row[field], str):
    raise UserError(
      f"{where} holds {type(row[field]).__name__}, not text, in {field!r}; set data.source.field"
    )
  return row[field]


def _hf(source: HFDataset) -> Iterator[str]:
  try:
    import datasets
  except ImportError:
    raise UserError("data.source hf needs the package datasets; run: pip install datasets") from None
  try:
    rows = datasets.load_dataset(source.path, source.name, split=source.split)
  except Exception as e:  # it raises whatever its back ends raise
    sentence = " ".join(str(e).split())
    raise UserError(f"data.source.path={source.path!r} cannot be loaded by datasets: {sentence}") from None
  if source.field not in rows.column_names:
    known = nearest(source.field, rows.column_names)
    raise UserError(f"data.source.field: {source.path!r} has no column {source.field!r}{known}")
  return (row[source.field] or "" for row in rows)


def _files(patterns: tuple[str, ...]) -> list[str]:
  """The files of all the globs, sorted, each once. A pattern that names a file is that file, brackets or not."""
  found = set()
  for pattern in patterns:
    pattern = local_path(pattern, "data.source.paths")
    if os.path.isdir(pattern):
      raise UserError(f"{pattern!r} is a folder; set data.source.paths to '{pattern}/*.txt', or the like")
    matches = [pattern] if os.path.isfile(pattern) else _matches(pattern) or _matches(pattern.replace("[", "[[]"))
    if not matches:
      raise UserError(f"no file matches {pattern!r}; correct data.source.paths")
    found.update(matches)
  return sorted(found)


def _matches(pattern: str) -> list[str]:
  return [p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)]


@contextlib.contextmanager
def _opened(path: str) -> Iterator[IO[bytes]]:
  """Opens a file, decompressed by the end of its name. Raises UserError if it cannot be read."""
  try:
    with _opener(path)(path, "rb") as f:
      yield f
  except UserError:
    raise
  except (OSError, EOFError, zlib.error) as e:  # what gzip raises for a damaged file
    why = getattr(e, "strerror", None) or str(e)
    raise UserError(f"{path} cannot be read ({why}); correct data.source.paths") from None
  except Exception as e:
    if type(e).__name__ != "ZstdError":
      raise
    raise UserError(f"{path} cannot be read ({e}); correct data.source.paths") from None


def _opener(path: str):
  if path.endswith(".gz"):
    return gzip.open
  if not path.endswith((".zst", ".zstd")):
    return open
  for package in ("compression.zstd", "backports.zstd", "zstandard"):  # the first is Python's own, from 3.14 on
    with contextlib.suppress(ImportError):
      return importlib.import_module(package).open
  raise UserError(f"{path} is compressed by zstd, for which the package zstandard is needed; run pip install zstandard")


READERS = {Stdlib: _stdlib, TextFiles: _text, JSONL: _jsonl, HFDataset: _hf}
