"""Tokenizers: bytes, or a Hugging Face `tokenizer.json`. Text in, ids out; one id ends a document."""

import abc
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from llmarch.data import companions
from llmarch.data.companions import Companions
from llmarch.data.tokenfile import new_file
from llmarch.errors import UserError, check, nearest

END = "<|endoftext|>"  # of the tokenizers that are made here
NOTHING = Companions()  # no file stands beside


class Tokenizer(abc.ABC):
  """Text <-> ids in [0, vocab_size). `definition` is the JSON text that says what it is."""

  vocab_size: int
  end_id: int | None  # ends every document, and no text encodes to it; None if nothing says which token does
  begin_ids: tuple[int, ...] = ()  # what its makers put before a text (Llama's <s>); `encode` does not
  begin_token_id: int | None = None  # the begin token, whether its makers put it before every text or not
  definition: str
  companions: Companions = NOTHING  # the files beside it

  @property
  def end_ids(self) -> tuple[int, ...]:
    """All ids that end a text which a model writes; a chat model has more than the one that ends documents."""
    return () if self.end_id is None else (self.end_id,)

  @abc.abstractmethod
  def encode_batch(self, texts: Sequence[str], special: bool = False) -> list[np.ndarray]:
    """Ids of each text, nothing added. A lone surrogate is `?`.

    Special tokens that a text spells out are plain text, as data needs it; with `special` they are the tokens.
    """

  @abc.abstractmethod
  def decode(self, ids: Iterable[int]) -> str:
    """Text of the ids. Invalid UTF-8 becomes U+FFFD; special tokens and ids outside the vocabulary, nothing."""

  def special_id(self, text: str) -> int | None:
    """The id of the special token that is spelt so; None if there is none."""
    return None

  def piece_id(self, text: str) -> int | None:
    """The id of the SentencePiece piece that is spelt so, such as "▁the" or "<0x0A>"; None if there is none."""
    return None

  def encode(self, text: str, special: bool = False) -> list[int]:
    (ids,) = self.encode_batch([text], special) if special else self.encode_batch([text])
    return ids.tolist()

  def encode_prompt(self, text: str, special: bool = False) -> list[int]:
    """Ids of a text that a model is to go on with: `begin_ids`, unless the text spells them itself, and its own.

    An empty text is the begin token, if there is one, and no id otherwise.
    """
    ids, begin = self.encode(text, special), list(self.begin_ids)
    if not ids and not begin:
      return [] if self.begin_token_id is None else [self.begin_token_id]
    return ids if begin and ids[: len(begin)] == begin else begin + ids

  def as_document(self, ids: np.ndarray) -> np.ndarray:
    """The ids of a whole document, as training reads it: what begins a text, the text, what ends a document."""
    return np.concatenate([np.array(self.begin_ids, np.int64), ids, [self.document_end]]).astype(np.int64)

  @property
  def document_end(self) -> int:
    """`end_id` where one is needed. Raises UserError if it is not known."""
    check(
      self.end_id is not None,
      "data.tokenizer does not say which token ends a document; name it in data.document_end, or put the"
      " tokenizer_config.json of its makers beside its tokenizer.json, with an eos_token",
    )
    return self.end_id

  @abc.abstractmethod
  def with_end(self, token: str) -> "Tokenizer":
    """This tokenizer, with the token that is spelt so at the end of a document. Raises UserError if it has none."""

  @property
  def _identity(self) -> str:
    return json.dumps(json.loads(self.definition), sort_keys=True)

  @functools.cached_property
  def fingerprint(self) -> str:
    """sha256 (hex) of what decides a document's ids: the definition, whatever its indentation and order of keys, and
    the ids around a document where the definition does not say them."""
    return hashlib.sha256(self._identity.encode()).hexdigest()

  def save(self, directory: str | os.PathLike) -> None:
    """Writes tokenizer.json and the files beside it, from which `load_tokenizer(directory)` gives this tokenizer again.

    The package transformers reads them too (AutoTokenizer).
    """
    files = self.companions.written()
    if companions.TOKENIZER not in files:
      files[companions.TOKENIZER] = json.dumps(self._described(), indent=2) + "\n"
    for name, text in {"tokenizer.json": self._written(), **files}.items():
      with new_file(Path(directory) / name) as f:
        f.write(text.encode())

  def _written(self) -> str:
    return self.definition

  def _described(self) -> dict:
    """The tokenizer_config.json that is written for a tokenizer that came without one."""
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}


class ByteTokenizer(Tokenizer):
  """The id of a byte is its value; 256 ends a document."""

  vocab_size = 257
  end_id = 256
  definition = '{"kind": "bytes"}\n'

  def encode_batch(self, texts, special=False):
    whole = [np.frombuffer(text.encode("utf-8", "replace"), np.uint8) for text in texts]
    return [self._with_ends(text) for text in texts] if special else whole

  def _with_ends(self, text: str) -> np.ndarray:
    pieces = [[*piece.encode("utf-8", "replace"), self.end_id] for piece in text.split(END)]
    return np.array([i for piece in pieces for i in piece][:-1], np.int64)

  def decode(self, ids):
    return bytes(i for i in map(int, ids) if 0 <= i < 256).decode("utf-8", "replace")

  def special_id(self, text):
    return self.end_id if text == END else None

  def with_end(self, token):
    check(token == END, f"data.document_end={token!r}: documents of bytes end with {END!r}; leave it out")
    return self

  def _written(self) -> str:
    return as_byte_bpe()

  def _described(self):
    return super()._described() | {"eos_token": END}


@functools.cache
def as_byte_bpe() -> str:
  """The tokenizer.json of `ByteTokenizer` for other programs: byte-level BPE without merges."""
  from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

  # GPT-2 writes the bytes that print as themselves, and the others as the characters from 256 on.
  prints = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
  others = [byte for byte in range(256) if byte not in prints]
  vocab = {chr(byte): byte for byte in prints} | {chr(256 + i): byte for i, byte in enumerate(others)}
  model = Tokenizer(models.BPE(vocab=vocab, merges=[]))
  model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  model.decoder = decoders.ByteLevel()
  model.add_special_tokens([AddedToken(END, special=True, normalized=False)])
  return model.to_str(pretty=True) + "\n"


class HFTokenizer(Tokenizer):
  """A tokenizer.json of the package `tokenizers`, with what the files beside it say of its ids.

  Its truncation and padding are not used, and its special tokens are added by `encode_prompt` alone.
  """

  def __init__(self, definition: str, name: str, beside: Companions = NOTHING):
    import tokenizers

    try:
      self._tokenizer = tokenizers.Tokenizer.from_str(definition)
    except Exception as e:  # the package raises bare Exceptions
      raise UserError(f"tokenizer {name} is not a tokenizer.json ({e}); give another file") from None
    self.definition, self.companions = definition, beside
    id_of = self._tokenizer.token_to_id
    before, after = self._around()
    named = {token: id_of(beside.named(f"{token}_token") or "") for token in ("bos", "eos")}
    begin, end = (next(iter(beside.ids(f"{token}_token_id")), None) if i is None else i for token, i in named.items())
    self._end_ids = tuple(dict.fromkeys([*([] if end is None else [end]), *beside.ids("eos_token_id")]))
    added = {t["content"]: t for t in json.loads(definition).get("added_tokens", [])}
    if not self._end_ids:
      specials = [t["id"] for t in added.values() if t.get("special")]
      self._end_ids = after or (tuple(specials) if len(specials) == 1 else ())
    self._mark_special(definition, added)
    self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1  # ids may have holes
    self.end_id = next((i for i in self._end_ids if i < self.vocab_size), None)
    self.begin_token_id = begin if begin is not None and begin < self.vocab_size else next(iter(before), None)
    self.begin_ids = before
    if beside.adds_begin is not None and named["bos"] is not None:
      rest = tuple(i for i in before if i != named["bos"])
      self.begin_ids = (named["bos"], *rest) if beside.adds_begin else rest

  def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the definition's template puts before and after a text."""
    plain, whole = (self._tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    starts = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
    return (tuple(whole[: starts[0]]), tuple(whole[starts[0] + len(plain) :])) if starts else ((), ())

  def _mark_special(self, definition: str, added: dict[str, dict]) -> None:
    """Makes the tokens that the files beside call special so: no text can then forge the end of a document."""
    import tokenizers

    spelt = self.companions.specials | {token for token, t in added.items() if t["id"] in self._end_ids}
    plain = [token for token in spelt if token in added and not added[token].get("special")]
    if plain:
      data = json.loads(definition)
      data["added_tokens"] = [t | {"special": t.get("special") or t["content"] in plain} for t in data["added_tokens"]]
      self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(data))
    known = [token for token in sorted(spelt - added.keys()) if self._tokenizer.token_to_id(token) is not None]
    self._tokenizer.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in known])
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self._tokenizer.encode_special_tokens = True
    decoder = self._tokenizer.get_added_tokens_decoder()
    self._specials = {t.content: i for i, t in decoder.items() if t.special}
    unknown = self._tokenizer.encode("\U000fffff", add_special_tokens=False).ids  # of no language: the unknown token
    self._never = np.array([i for i in self._specials.values() if i not in unknown], np.int64)

  def with_end(self, token):
    known = self._tokenizer.token_to_id(token) is not None
    check(known, f"data.document_end={token!r} is no token of data.tokenizer{nearest(token, self._specials)}")
    described = self.companions.named_options or self._described()
    return HFTokenizer(self.definition, "", self.companions.with_file(described | {"eos_token": token}))

  @functools.cached_property
  def _with_specials(self):
    """The tokenizer for which special tokens in a text are tokens."""
    import tokenizers

    found = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
    found.encode_special_tokens = False
    return found

  @property
  def end_ids(self):
    return self._end_ids

  def special_id(self, text):
    return self._specials.get(text)

  def piece_id(self, text):
    spells = "▁" in text or (len(text) == 6 and text.startswith("<0x") and text.endswith(">"))
    return self._tokenizer.token_to_id(text) if spells else None

  @property
  def _identity(self):
    bare = super()._identity
    alone = HFTokenizer(self.definition, "") if self.companions != NOTHING else self
    around = (self.begin_ids, self.end_id)
    return bare if around == ((), alone.end_id) else bare + json.dumps(around)

  def encode_batch(self, texts, special=False):
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    model = self._with_specials if special else self._tokenizer
    found = [np.array(e.ids, np.int64) for e in model.encode_batch_fast(texts, add_special_tokens=False)]
    return found if special else [self._spelt_out(text, ids) for text, ids in zip(texts, found)]

  def _spelt_out(self, text: str, ids: np.ndarray) -> np.ndarray:
    """Replaces special tokens by the tokens of their characters.

    A vocabulary that is searched for the most likely pieces (Unigram) may find a special token in a plain text.
    """
    if not np.isin(ids, self._never).any():
      return ids
    spelt = {i: [j for c in token for j in self._character(c)] for token, i in self._specials.items() if token in text}
    pieces = [spelt.get(i, [i]) if i in self._never else [i] for i in ids.tolist()]
    return np.array([i for piece in pieces for i in piece], np.int64)

  def _character(self, c: str) -> list[int]:
    found = self._tokenizer.token_to_id(c)
    return self._tokenizer.encode(c, add_special_tokens=False).ids[-1:] if found is None else [found]

  def decode(self, ids):
    kept = [i for i in map(int, ids) if 0 <= i < self.vocab_size and i not in self._end_ids]
    return self._tokenizer.decode(kept)

  def _described(self):
    """Names the begin and the end that the definition does not; how a text begins stays the definition's matter."""
    named = {"bos_token": self.begin_token_id, "eos_token": self.end_id}
    spelt = {name: self._tokenizer.id_to_token(i) for name, i in named.items() if i is not None}
    return super()._described() | spelt


def load_tokenizer(spec: str, end: str = "") -> Tokenizer:
  """`spec`: "bytes", a tokenizer.json, or a directory that holds one. Raises UserError for anything else.

  The files beside a tokenizer.json (data/companions.py) say which of its ids begin and end a text, unless `end` names
  the token that ends a document.
  """
  if spec == "bytes":
    return ByteTokenizer().with_end(end or END)
  path = Path(spec).expanduser()
  path = path / "tokenizer.json" if path.is_dir() else path
  beside = companions.read(path.parent) if path.name == "tokenizer.json" else NOTHING
  try:
    definition = path.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as e:
    why = getattr(e, "strerror", None) or "not UTF-8"
    raise UserError(f"tokenizer {path} cannot be read ({why}); give 'bytes' or a tokenizer.json") from None
  if definition in (ByteTokenizer.definition, as_byte_bpe()):
    tokenizer = ByteTokenizer()
    tokenizer.companions = beside
  else:
    tokenizer = HFTokenizer(definition, str(path), beside)
  return tokenizer.with_end(end) if end else tokenizer


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
