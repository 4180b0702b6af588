"""The data pipeline: batch = f(pipeline hash, step).

No iterator state is needed to resume, and the global batch of a step does not depend on how many processes read
it: each makes the rows that its devices hold.
grain permutes the rows of an epoch and makes batches ahead of time in a thread.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from llmarch.build import to_dict
from llmarch.data import sources
from llmarch.data.packing import PLANS, Stream
from llmarch.data.synthetic import TASKS, Draws, TaskRows
from llmarch.data.tokenfile import TokenStore, open_tokens, progress_bar, write_tokens
from llmarch.data.tokenizers import Tokenizer, load_tokenizer
from llmarch.errors import UserError
from llmarch.files import cache_folder, local_path
from llmarch.run_config import DataConfig, TokenFile

FORMAT = 1  # part of the hash: raise it with every change that gives other batches for the same inputs
Split = Literal["train", "validation"]


class TextRows:
  """Rows of a stream, each once an epoch, in another order every epoch.

  The validation split has one epoch alone, so that no row counts twice in an evaluation; rows past it are padding.
  """

  def __init__(self, stream: Stream, plan, *, seed: int, split: str, shuffle: bool):
    self._stream, self._plan = stream, plan
    self._words, self._split, self._shuffle = (seed, split), split, shuffle

  def fill(self, row: dict[str, np.ndarray], index: int) -> None:
    """Writes the row that comes at `index`, counted from the first epoch on."""
    number, slot = self._order(index), 0
    if number >= self._plan.num_rows:
      return
    cuts = Draws(*self._words, "prefix", index) if "prefix" in row else None
    for segment, (start, size) in enumerate(self._plan.pieces(number), self._plan.first_segment):
      ids, here = self._stream.read(start, size), slice(slot, slot + size)
      row["tokens"][here] = ids[:-1]
      row["targets"][here] = ids[1:]
      row["positions"][here] = np.arange(size)
      row["segment_ids"][here] = segment
      row["loss_weights"][here] = 1
      if cuts:
        cut = int(cuts.integers(1, size)[0])  # the last token of the prefix predicts what follows it
        row["prefix"][slot : slot + cut] = True
        row["loss_weights"][slot : slot + max(cut - 1, 0)] = 0
      slot += size

  @property
  def num_rows(self) -> int:
    return self._plan.num_rows

  def _order(self, index: int) -> int:
    """The plan's number of the row that comes at `index`; one past the end for none."""
    from grain.experimental import index_shuffle

    epoch, at = divmod(index, self._plan.num_rows)
    if epoch and self._split == "validation":
      return index
    if not self._shuffle:
      return at
    return index_shuffle(at, self._plan.num_rows - 1, _epoch_key(*self._words, epoch), 4)


@functools.lru_cache(maxsize=8)
def _epoch_key(seed: int, split: str, epoch: int) -> int:
  return int(Draws(seed, split, "epoch", epoch).integers(1, 1 << 32)[0])


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """Batches of one split. Made by `make_pipeline`."""

  rows: TextRows | TaskRows
  hash: str  # sha256 (hex) of all that decides the batches; where files lie and who reads them do not
  batch_size: int  # of the global batch
  seq_len: int
  vocab_size: int  # of the model
  prefix: bool
  prefetch: int
  corpus: str = ""  # sha256 (hex) of the whole source; "" for synthetic tasks, which are endless
  num_documents: int = 0  # of the split, like the next two
  num_tokens: int = 0  # ends of documents included; an epoch has each once as a target
  num_bytes: int = 0  # of text
  decides: dict = dataclasses.field(default_factory=dict, repr=False)  # that of which `hash` is

  @property
  def num_rows(self) -> int | None:
    """The number of rows of an epoch; None for a synthetic task, which has no end."""
    return self.rows.num_rows if isinstance(self.rows, TextRows) else None

  def hash_of(self, **other) -> str:
    """The hash of the pipeline that differs in these values alone, such as batch_size=8."""
    return _hash(**self.decides | other)

  @property
  def bytes_per_token(self) -> float:
    return self.num_bytes / self.num_tokens if self.num_tokens else 1.0

  def batch(self, step: int, rows: Sequence[int] | None = None) -> dict[str, np.ndarray]:
    """The global batch of `step`, each array [B, T]; or of it only these rows (in [0, B)), made as if all were.

    tokens        int32 inputs
    targets       int32 the tokens that follow them
    loss_weights  float32, 1 where a target counts: not in padding or prefix; an answer in synthetic tasks
    positions     int32, from 0 in every piece; -1 is padding (then all else is 0)
    segment_ids   int32, from 1 for packed documents; 0 in chunks, synthetic tasks and padding
    prefix        bool, only for prefix=True: tokens that see each other both ways, a random start of each
                  piece, or in synthetic tasks all before the first answer
    """
    if step < 0:
      raise ValueError(f"step must be at least 0, got {step}")
    zeros = {"tokens": np.int32, "targets": np.int32, "loss_weights": np.float32, "segment_ids": np.int32}
    rows = range(self.batch_size) if rows is None else rows
    shape = len(rows), self.seq_len
    batch = {name: np.zeros(shape, dtype) for name, dtype in zeros.items()}
    batch["positions"] = np.full(shape, -1, np.int32)
    if self.prefix:
      batch["prefix"] = np.zeros(shape, np.bool_)
    for i, row in enumerate(rows):
      self.rows.fill({name: array[i] for name, array in batch.items()}, step * self.batch_size + int(row))
    for name in ("tokens", "targets"):  # JAX would clamp an id outside the embedding in silence
      low, high = batch[name].min(), batch[name].max()
      if low < 0 or high >= self.vocab_size:
        raise UserError(
          f"the batch of step {step} holds the id {low if low < 0 else high}, outside"
          f" model.vocab_size={self.vocab_size}; its token file changed under the run, start again"
        )
    return batch

  def iterate(self, start_step: int = 0, rows: Sequence[int] | None = None) -> Iterator[dict[str, np.ndarray]]:
    """batch(start_step, rows), that of the next step ... for ever; `data.prefetch` are made ahead in a thread."""
    import grain

    options = grain.ReadOptions(num_threads=min(self.prefetch, 1), prefetch_buffer_size=self.prefetch)
    batch = functools.partial(self.batch, rows=rows)
    yield from grain.MapDataset.range(start_step, 1 << 62).map(batch).to_iter_dataset(options)


def make_pipeline(
  data: DataConfig,
  *,
  batch_size: int,
  seq_len: int,
  seed: int,
  vocab_size: int,
  split: Split,
  prefix: bool = False,
  progress: Callable[[int], None] | None = None,
) -> Pipeline:
  """The batches of a split: `batch_size` rows of `seq_len` tokens.

  `progress(bytes)` is called as text is tokenised; without it a bar shows on a terminal. Raises UserError for
  a vocabulary that is too small, an unreadable source, and too little text for one batch.
  """
  common = dict(batch_size=batch_size, seq_len=seq_len, vocab_size=vocab_size, prefix=prefix, prefetch=data.prefetch)
  decides = dict(format=FORMAT, batch_size=batch_size, seq_len=seq_len, seed=seed, split=split, prefix=prefix)
  if type(data.source) in TASKS:
    rows = TaskRows(data.source, seed=seed, split=split, seq_len=seq_len, vocab_size=vocab_size)
    decides |= dict(source=to_dict(data.source))
    return Pipeline(rows, hash=_hash(**decides), decides=decides, **common)

  tokenizer = load_tokenizer(data.tokenizer, data.document_end)
  if tokenizer.vocab_size > vocab_size:
    raise UserError(
      f"model.vocab_size={vocab_size} is smaller than the {tokenizer.vocab_size} ids of"
      f" data.tokenizer={data.tokenizer}; raise it"
    )
  end = tokenizer.document_end
  store = load_tokens(data, tokenizer, progress)
  chosen = split_documents(store.documents["hash"], data.validation_fraction, split)
  stream = Stream(store.tokens, store.documents["end"].astype(np.int64), chosen, end)
  plan = PLANS[data.packing](stream.lengths, seq_len)
  if plan.num_rows < batch_size:
    raise UserError(
      f"the {split} split makes {plan.num_rows} rows of {seq_len} tokens, fewer than"
      f" train.batch_size={batch_size}; lower train.batch_size or train.seq_len, give more text, or change"
      " data.validation_fraction"
    )
  decides |= dict(corpus=store.corpus, tokenizer=tokenizer.fingerprint)
  decides |= dict(packing=data.packing, shuffle=data.shuffle, validation_fraction=data.validation_fraction)
  return Pipeline(
    TextRows(stream, plan, seed=seed, split=split, shuffle=data.shuffle),
    hash=_hash(**decides),
    decides=decides,
    corpus=store.corpus,
    num_documents=int(chosen.sum()),
    num_tokens=len(stream),
    num_bytes=int(store.documents["num_bytes"][chosen].sum()),
    **common,
  )


def _hash(**decides) -> str:
  return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def split_documents(hashes: np.ndarray, fraction: float, split: Split) -> np.ndarray:
  """bool [documents]: those of the split. The contents with the lowest hashes are the validation split, so
  equal documents fall on the same side. Raises UserError where a split would be empty.
  """
  distinct = np.unique(hashes)
  held_out = max(round(fraction * len(distinct)), 1) if fraction else 0
  if split == "validation" and not held_out:
    raise UserError("data.validation_fraction=0 leaves nothing to evaluate; raise it or set eval.every=0")
  if held_out >= len(distinct):
    raise UserError(
      f"data.source has {len(distinct)} different documents, too few to train and validate on; give more, cut"
      " them (data.source.separator), or set data.validation_fraction=0 and eval.every=0"
    )
  validation = np.isin(hashes, distinct[:held_out])
  return validation if split == "validation" else ~validation


def load_tokens(
  data: DataConfig, tokenizer: Tokenizer, progress: Callable[[int], None] | None = None
) -> TokenStore:
  """The tokens of a source: its token file, or a cache, made again unless it is whole and the same."""
  if isinstance(data.source, TokenFile):
    store = open_tokens(local_path(data.source.path, "data.source.path"))
    if (store.tokenizer, store.vocab_size) != (tokenizer.fingerprint, tokenizer.vocab_size):
      raise UserError(
        f"token file {data.source.path} was written with another tokenizer than"
        f" data.tokenizer={data.tokenizer}; name that one, or write the file again"
      )
    return store
  found = sources.survey(data.source)
  name = _hash(corpus=found.corpus, tokenizer=tokenizer.fingerprint)[:32]
  path = Path(cache_folder(data.cache_dir)) / f"{name}.tokens"
  if path.exists():
    try:
      return _same(open_tokens(path), found.corpus, tokenizer)
    except UserError:
      print(f"llmarch: the tokenised cache {path} is damaged; making it again", file=sys.stderr)
  bar = contextlib.nullcontext(progress) if progress else progress_bar("tokenising", found.num_bytes)
  with bar as advance:
    write_tokens(path, sources.documents(data.source), tokenizer, advance)
  return _same(open_tokens(path), found.corpus, tokenizer)


def _same(store: TokenStore, corpus: str, tokenizer: Tokenizer) -> TokenStore:
  if (store.corpus, store.tokenizer) != (corpus, tokenizer.fingerprint):
    raise UserError("data.source changed while it was read; start again")
  return store
