"""Writes files and folders so that a crash leaves the old one or the new one, and never a part.

replace_file, write_text   a file that takes its name when it is complete and on the disk
new_folder                 a folder that takes its name when all went well
append_line, read_lines    lines of JSON, each with its own checksum, on the disk when append_line returns
local_path, absolute_path  a path as a user wrote it, with `~` expanded; addresses such as gs://bucket are refused
sync_folder, sync_tree     wait until names, or whole trees, are on the disk

A temporary name is a dot, the final name and a random suffix (`.config.json.4f...`), so that files which a killed
process left behind can be recognised. All functions raise OSError if the system refuses; `or_refuse` makes a sentence
for the user of it.
"""
import contextlib
import json
import os
import re
import tempfile
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from llmarch.errors import UserError


@contextlib.contextmanager
def or_refuse(what: str, mend: str) -> Iterator[None]:
  """Turns an OSError of its block into UserError("WHAT (the system's reason); MEND")."""
  try:
    yield
  except OSError as e:
    raise UserError(f"{what} ({e.strerror}); {mend}") from None


def local_path(path: str | os.PathLike, key: str) -> str:
  """Expands `~` in a path that a user gave. Raises UserError, which names `key`, for an address such as gs://b/run."""
  path = os.fspath(path)
  scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*(?=://)", path)
  if scheme:
    raise UserError(
      f"{key}={path!r} is an address ({scheme[0]}://), and only folders and files of this machine are read and written;"
      " copy it here, or mount it (gcsfuse, mountpoint-s3) and give the folder"
    )
  return os.path.expanduser(path)


def cache_folder(given: str) -> str:
  """The folder of caches: the given one, or $LLMARCH_CACHE, or ~/.cache/llmarch."""
  if given:
    return local_path(given, "data.cache_dir")
  return local_path(os.environ.get("LLMARCH_CACHE") or "~/.cache/llmarch", "LLMARCH_CACHE")


def absolute_path(path: str | os.PathLike, key: str) -> str:
  """`local_path` from the root, so that the path means the same in every working directory."""
  return os.path.abspath(local_path(path, key))


# ------------------------------------------------------------------------------------ whole files and folders


@contextlib.contextmanager
def replace_file(path: str | os.PathLike) -> Iterator[IO[bytes]]:
  """Yields a file that takes the name `path` when the block ends, complete and on the disk.

  A failure leaves an older file as it was, and nothing else. If several processes write, the last one's file stays.
  """
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # every writer has its own temporary name
  try:
    with open(partial, "xb") as f:
      yield f
      f.flush()
      os.fsync(f.fileno())
    os.replace(partial, path)
  finally:
    with contextlib.suppress(OSError):
      partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes a file by `replace_file`, so that a reader sees the old text or the new, even after a crash."""
  with replace_file(path) as f:
    f.write(text.encode())


@contextlib.contextmanager
def new_folder(path: str | os.PathLike, *, replace: bool = False) -> Iterator[Path]:
  """Yields an empty folder that takes the name `path` when the block ends without an error.


  An empty folder of that name is replaced. One that holds something is replaced only with `replace`, and is an
  OSError otherwise.
  """
  target = Path(path)
  target.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
    new = Path(scratch) / "new"
    new.mkdir()
    yield new
    if target.exists():
      if replace:
        target.rename(Path(scratch) / "old")
      else:
        target.rmdir()
    new.rename(target)


# ------------------------------------------------------------------------------------------- lines of JSON


def append_line(path: Path, row: dict) -> None:
  """Appends a row as one line with its checksum, `{..., "crc32": N}`. It is on the disk when this returns."""
  text = json.dumps(row)
  line = f'{text[:-1]}, "crc32": {zlib.crc32(text.encode())}}}\n'.encode()
  new = not path.exists()
  file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
  try:
    size = os.fstat(file).st_size
    if size and os.pread(file, 1, size - 1) != b"\n":  # a crash cut the last line off; it stays a line of its own
      line = b"\n" + line
    if os.write(file, line) != len(line):
      raise OSError(28, "no space left on device")
    os.fsync(file)
  finally:
    os.close(file)
  if new:
    sync_folder(path.parent)


def read_lines(path: Path) -> list[dict]:
  """Reads the rows that `append_line` wrote, [] if there is no file; skips lines that were cut off or damaged."""
  try:
    lines = path.read_bytes().split(b"\n")
  except FileNotFoundError:
    return []
  return [row for line in lines if (row := parse_line(line)) is not None]


def parse_line(line: bytes) -> dict | None:
  """Parses a line that `append_line` wrote; None if it was cut off or damaged."""
  text, mark, crc = line.rpartition(b', "crc32": ')
  if not mark or crc != f"{zlib.crc32(text + b'}')}}}".encode():
    return None
  return json.loads(text + b"}")


# ------------------------------------------------------------------------------------------- the disk


def sync_folder(folder: Path) -> None:
  """Waits until the names in a folder are on the disk."""
  handle = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def sync_tree(folder: Path) -> None:
  """Waits until a folder, everything in it, and its own name are on the disk."""
  for root, _, files in os.walk(folder):
    for name in files:
      sync_folder(Path(root) / name)  # syncing opens a file in the same way as a folder
    sync_folder(Path(root))
  sync_folder(folder.parent)
