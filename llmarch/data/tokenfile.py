"""Token files: tokenised documents, memory-mapped, checked from the header to the last byte when opened.

  header     152 bytes, little endian: magic, version, bytes per token, vocabulary, tokens, documents, bytes
             of text, sha256 of the payload and of the corpus, fingerprint of the tokenizer, crc32 of all that
  tokens     uint16 or uint32; every document ends with the tokenizer's end id
  documents  a row each: where it ends (in tokens), its bytes of text, the first 8 bytes of its sha256

The corpus and the tokenizer are those a pipeline's hash names, so a file stands for its source exactly.
"""

import contextlib
import dataclasses
import hashlib
import os
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO

import numpy as np

from llmarch.data import sources
from llmarch.errors import UserError
from llmarch.files import or_refuse, replace_file

MAGIC, VERSION = b"LLMARCH\0", 1
HEADER = struct.Struct("<8sIIQQQQ32s32s32s")
CRC = struct.Struct("<Q")
HEADER_SIZE = HEADER.size + CRC.size
DTYPES = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
DOCUMENT = np.dtype([("end", "<u8"), ("num_bytes", "<u8"), ("hash", "<u8")])
PIECE = 1 << 22  # items or characters handled at a time


@dataclasses.dataclass(frozen=True)
class TokenStore:
  """An opened token file."""

  tokens: np.ndarray  # [tokens] memory-mapped
  documents: np.ndarray  # [documents] of DOCUMENT
  vocab_size: int
  corpus: str  # as in sources.Survey
  tokenizer: str  # fingerprint


def open_tokens(path: str | os.PathLike) -> TokenStore:
  """Opens and verifies a token file. Raises UserError naming it where anything is not as it was written."""
  try:
    with open(path, "rb") as f:
      return _open(f, str(path))
  except OSError as e:
    raise UserError(f"token file {path} cannot be read ({e.strerror}); correct data.source.path") from None


def _open(f: IO[bytes], path: str) -> TokenStore:
  def need(condition, why):
    if not condition:
      raise UserError(
        f"token file {path} is damaged: {why}; write it again with `llmarch tokenizer --encode`"
      )

  head = f.read(HEADER_SIZE)
  need(len(head) == HEADER_SIZE and head.startswith(MAGIC), "it has no header")
  need(zlib.crc32(head[: HEADER.size]) == CRC.unpack(head[HEADER.size :])[0], "its header fails its checksum")
  _, version, width, vocab_size, count, num_documents, num_bytes, *shas = HEADER.unpack(head[: HEADER.size])
  need(version == VERSION, f"its version is {version}, not {VERSION}")
  need(width in DTYPES, f"it claims {width} bytes a token")
  size = os.fstat(f.fileno()).st_size
  claimed = HEADER_SIZE + count * width + num_documents * DOCUMENT.itemsize
  need(size == claimed, f"it is {size} bytes long where its header says {claimed}")
  need(0 < num_documents <= count, "it holds no documents")
  tokens = np.memmap(f, DTYPES[width], mode="r", offset=HEADER_SIZE, shape=(count,))
  f.seek(HEADER_SIZE + count * width)
  documents = np.fromfile(f, DOCUMENT)
  payload = hashlib.sha256()
  for start in range(0, count, PIECE):
    piece = tokens[start : start + PIECE]
    payload.update(piece)
    need(piece.max() < vocab_size, f"a token id is not below its vocabulary of {vocab_size}")
  payload.update(documents)
  need(payload.digest() == shas[0], "its tokens fail their checksum")
  ends = documents["end"].astype(np.int64)
  need(np.diff(ends, prepend=0).min() > 0 and ends[-1] == count, "its documents do not fill it")
  need(documents["num_bytes"].sum() == num_bytes, "its documents do not add up to its bytes")
  return TokenStore(tokens, documents, vocab_size, shas[1].hex(), shas[2].hex())


def write_tokens(
  path, texts: Iterable[str], tokenizer, advance: Callable[[int], None] = lambda num_bytes: None
) -> None:
  """Tokenises `texts` into a token file, whole or not at all; `advance(bytes of text)` tells how far it is.

  Raises UserError for no text, for an id outside the vocabulary, and where the file cannot be written.
  """
  width = 2 if tokenizer.vocab_size <= 1 << 16 else 4
  payload, corpus, rows, count = hashlib.sha256(), hashlib.sha256(), [], 0
  with new_file(path) as f:
    f.write(bytes(HEADER_SIZE))
    for some in batches(texts):
      for text, ids in zip(some, tokenizer.encode_batch(some), strict=True):
        ids = tokenizer.as_document(ids)
        if ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
          raise UserError(f"the tokenizer gave an id outside its {tokenizer.vocab_size}; repair it")
        ids = ids.astype(DTYPES[width])
        f.write(ids)
        payload.update(ids)
        sha = sources.digest(text)
        corpus.update(sha)
        count += len(ids)
        rows.append((count, len(text.encode()), int.from_bytes(sha[:8], "little")))
      advance(sum(num_bytes for _, num_bytes, _ in rows[-len(some) :]))
    if not rows:
      raise UserError(f"there is no text to write to {path}; name another source")
    documents = np.array(rows, DOCUMENT)
    payload.update(documents)
    f.write(documents)
    num_bytes = int(documents["num_bytes"].sum())
    shas = payload.digest(), corpus.digest(), bytes.fromhex(tokenizer.fingerprint)
    head = HEADER.pack(MAGIC, VERSION, width, tokenizer.vocab_size, count, len(rows), num_bytes, *shas)
    f.seek(0)
    f.write(head + CRC.pack(zlib.crc32(head)))


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
  """Lists of some PIECE characters: enough for the tokenizer's threads, little enough for memory."""
  some, size = [], 0
  for text in texts:
    some.append(text)
    size += len(text)
    if size >= PIECE:
      yield some
      some, size = [], 0
  if some:
    yield some


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[IO[bytes]]:
  """Yields a file as `files.replace_file` does; raises UserError where the system refuses (disk full ...)."""
  with or_refuse(f"{path} cannot be written", "give another place"), replace_file(path) as f:
    yield f


@contextlib.contextmanager
def progress_bar(what: str, total: int, patience: float = 1.0) -> Iterator[Callable[[int], None]]:
  """Yields `advance(amount)`; on a terminal, shows a bar on stderr once `patience` seconds have passed."""
  if not sys.stderr.isatty():
    yield lambda amount: None
    return
  from rich.console import Console
  from rich.progress import Progress

  with contextlib.ExitStack() as shown:
    bar = Progress(console=Console(stderr=True), transient=True)
    task, begin = bar.add_task(what, total=total), time.monotonic()

    def advance(amount):
      bar.advance(task, amount)
      if not bar.live.is_started and time.monotonic() - begin > patience:
        shown.enter_context(bar)

    yield advance
