"""Tokenizers: bytes, or a Hugging Face `tokenizer.json`. Text in, ids out; one id ends a document."""

import abc
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from llmarch.data.tokenfile import new_file
from llmarch.errors import UserError

END = "<|endoftext|>"
# GPT-2 Qwen OLMo; Llama 2 Mistral BLOOM; Gemma; Llama 3; DeepSeek. The first present ends a document.
END_TOKENS = (END, "</s>", "<eos>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "[EOS]")


class Tokenizer(abc.ABC):
  """Text <-> ids in [0, vocab_size). `definition` is the JSON text that `save` writes."""

  vocab_size: int
  end_id: int  # ends every document; no text encodes to it
  begin_ids: tuple[int, ...] = ()  # what its makers put before a text (Llama's <s>); `encode` does not
  definition: str

  @abc.abstractmethod
  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Ids of each text, nothing added. Special tokens spelt out are plain text; a lone surrogate is `?`."""

  @abc.abstractmethod
  def decode(self, ids: Iterable[int]) -> str:
    """Text of the ids. Invalid UTF-8 becomes U+FFFD; the end and ids outside the vocabulary, nothing."""

  def encode(self, text: str) -> list[int]:
    return self.encode_batch([text])[0].tolist()

  @functools.cached_property
  def fingerprint(self) -> str:
    """sha256 (hex) of the definition, whatever its indentation and order of keys."""
    return hashlib.sha256(json.dumps(json.loads(self.definition), sort_keys=True).encode()).hexdigest()

  def save(self, directory: str | os.PathLike) -> None:
    """Writes tokenizer.json, from which `load_tokenizer(directory)` gives this tokenizer again."""
    with new_file(Path(directory) / "tokenizer.json") as f:
      f.write(self.definition.encode())


class ByteTokenizer(Tokenizer):
  """The id of a byte is its value; 256 ends a document."""

  vocab_size = 257
  end_id = 256
  definition = '{"kind": "bytes"}\n'

  def encode_batch(self, texts):
    return [np.frombuffer(text.encode("utf-8", "replace"), np.uint8) for text in texts]

  def decode(self, ids):
    return bytes(i for i in map(int, ids) if 0 <= i < 256).decode("utf-8", "replace")


class HFTokenizer(Tokenizer):
  """A tokenizer.json of the package `tokenizers`. Its truncation, padding and added specials are not used."""

  def __init__(self, definition: str, name: str):
    import tokenizers

    try:
      self._tokenizer = tokenizers.Tokenizer.from_str(definition)
    except Exception as e:  # the package raises bare Exceptions
      raise UserError(f"tokenizer {name} is not a tokenizer.json ({e}); give another file") from None
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self._tokenizer.encode_special_tokens = True  # so that no text can forge the end of a document
    self.definition = definition
    self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1  # ids may have holes
    ends = [i for token in END_TOKENS if (i := self._tokenizer.token_to_id(token)) is not None]
    if not ends:
      raise UserError(
        f"tokenizer {name} has no token that ends a document; add one of {', '.join(END_TOKENS)} to it"
      )
    self.end_id = ends[0]
    plain, whole = (self._tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    starts = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
    self.begin_ids = tuple(whole[: starts[0]]) if starts else ()

  def encode_batch(self, texts):
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(e.ids, np.int64) for e in found]

  def decode(self, ids):
    return self._tokenizer.decode([i for i in map(int, ids) if 0 <= i < self.vocab_size and i != self.end_id])


def load_tokenizer(spec: str) -> Tokenizer:
  """`spec`: "bytes", a tokenizer.json, or a directory that holds one. Raises UserError for anything else."""
  if spec == "bytes":
    return ByteTokenizer()
  path = Path(spec).expanduser()
  path = path / "tokenizer.json" if path.is_dir() else path
  try:
    definition = path.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as e:
    why = getattr(e, "strerror", None) or "not UTF-8"
    raise UserError(f"tokenizer {path} cannot be read ({why}); give 'bytes' or a tokenizer.json") from None
  if definition == ByteTokenizer.definition:
    return ByteTokenizer()
  return HFTokenizer(definition, str(path))


def train_bpe(texts: Iterable[str], vocab_size: int, show_progress: bool = False) -> HFTokenizer:
  """Byte-level BPE (GPT-2's) of at most `vocab_size` ids: the end, 256 bytes, then merges. Deterministic.

  Raises UserError below 257, where the bytes have no room, and above what 32 bits count.
  """
  if vocab_size < 257:
    raise UserError(f"vocab_size={vocab_size} has no room for the bytes and the end; give at least 257")
  if vocab_size >= 1 << 31:
    raise UserError(f"vocab_size={vocab_size} is more than ids can count; give less than 2^31")
  from tokenizers import Tokenizer as Model
  from tokenizers import decoders, models, pre_tokenizers, trainers

  model = Model(models.BPE())
  model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=show_progress
  )
  model.train_from_iterator(texts, trainer)
  return HFTokenizer(model.to_str(pretty=True) + "\n", "just trained")
