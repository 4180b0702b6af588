"""Sources: a config of llmarch/run_config.py -> documents, in a stable order."""

import dataclasses
import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from llmarch.errors import UserError, nearest
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
  for path in _files(source.paths):
    try:
      text = _read(path).decode()
    except UnicodeDecodeError as e:
      raise UserError(
        f"{path} is not UTF-8 at byte {e.start}; convert it or leave it out of data.source.paths"
      ) from None
    yield from text.split(source.separator) if source.separator else [text]


def _jsonl(source: JSONL) -> Iterator[str]:
  for path in _files(source.paths):
    for number, line in enumerate(_lines(path), 1):
      if line.strip():
        yield _field(line, source.field, f"{path}, line {number},")


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
  """The files of all the globs, sorted, each once."""
  found = set()
  for pattern in patterns:
    matches = [p for p in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(p)]
    if not matches:
      raise UserError(f"no file matches {pattern!r}; correct data.source.paths")
    found.update(matches)
  return sorted(found)


def _read(path: str) -> bytes:
  try:
    return Path(path).read_bytes()
  except OSError as e:
    raise UserError(f"{path} cannot be read ({e.strerror}); correct data.source.paths") from None


def _lines(path: str) -> Iterator[bytes]:
  try:
    with open(path, "rb") as f:
      yield from f
  except OSError as e:
    raise UserError(f"{path} cannot be read ({e.strerror}); correct data.source.paths") from None


READERS = {Stdlib: _stdlib, TextFiles: _text, JSONL: _jsonl, HFDataset: _hf}
