"""Synthetic tasks: rows drawn from (seed, split, index); the loss counts what the row determines.

With K = num_symbols, a task makes a sequence (ids below its vocabulary) and the indices of its answers. A
row's inputs are the sequence without its last token, its targets the sequence without its first, and the loss
counts the targets that are answers. Every answer is a function of the tokens before it.
"""

import dataclasses
import hashlib
from collections.abc import Callable

import numpy as np

from llmarch.errors import UserError
from llmarch.run_config import Copy, Induction, Needle, Recall, SourceConfig


class Draws:
  """Uniform draws, a pure function of `words`: raw Philox bits, which NumPy promises to keep (NEP 19)."""

  def __init__(self, *words):
    key = hashlib.sha256("/".join(map(str, words)).encode()).digest()[:16]
    self._bits = np.random.Philox(key=int.from_bytes(key, "little"))

  def integers(self, count: int, below: int) -> np.ndarray:
    """int64 [count] in [0, below); the bias of the remainder is below 2^-32 for any size used here."""
    return (self._bits.random_raw(count) % np.uint64(below)).astype(np.int64)

  def permutation(self, count: int) -> np.ndarray:
    return np.argsort(self._bits.random_raw(count), kind="stable")


def copy(task: Copy, draws: Draws, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
  """s_1 .. s_L SEP s_1 .. s_L with L = length, SEP = K. Answers: the second s_1 .. s_L."""
  symbols = draws.integers(task.length, task.num_symbols)
  sequence = np.concatenate([symbols, [task.num_symbols], symbols])
  return sequence, np.arange(task.length + 1, len(sequence))


def recall(task: Recall, draws: Draws, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
  """k_1 v_1 .. k_N v_N, then the same pairs in another order, N = num_pairs. Answers: the latter's values.

  Keys are N different ids of [0, K); values are any of [K, 2K).
  """
  keys = draws.permutation(task.num_symbols)[: task.num_pairs]
  values = task.num_symbols + draws.integers(task.num_pairs, task.num_symbols)
  pairs = np.stack([keys, values], 1)  # [N, 2]
  sequence = np.concatenate([pairs, pairs[draws.permutation(task.num_pairs)]]).reshape(-1)
  return sequence, np.arange(2 * task.num_pairs + 1, len(sequence), 2)


def induction(task: Induction, draws: Draws, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
  """s_1 .. s_P s_1 .. s_P s_1 .. up to T + 1 tokens, P = period. Answers: all after the first s_P."""
  sequence = np.resize(draws.integers(task.period, task.num_symbols), seq_len + 1)
  return sequence, np.arange(task.period, seq_len + 1)


def needle(task: Needle, draws: Draws, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
  """Noise x_1 .. x_L with `MARK k v` at a random place in it, then `ASK k v`. Answer: the last v.

  L = length, MARK = K, ASK = K + 1; k, v and the noise are ids of [0, K).
  """
  noise = draws.integers(task.length, task.num_symbols)
  key, value = draws.integers(2, task.num_symbols)
  mark, ask = task.num_symbols, task.num_symbols + 1
  sequence = np.insert(noise, draws.integers(1, task.length + 1)[0], [mark, key, value])
  return np.append(sequence, [ask, key, value]), np.array([task.length + 5])


@dataclasses.dataclass(frozen=True)
class SyntheticTask:
  """A synthetic task: how a row of it is made, and what it needs of the vocabulary and of the row."""

  make: Callable  # (config, draws, T) -> sequence, indices of the answers
  vocab_size: Callable[[SourceConfig], int]
  seq_len: Callable[[SourceConfig], int]  # the shortest row that holds it
  sized_by: str  # the field to lower where that is too long


TASKS = {
  Copy: SyntheticTask(copy, lambda c: c.num_symbols + 1, lambda c: 2 * c.length, "length"),
  Recall: SyntheticTask(recall, lambda c: 2 * c.num_symbols, lambda c: 4 * c.num_pairs - 1, "num_pairs"),
  Induction: SyntheticTask(induction, lambda c: c.num_symbols, lambda c: c.period, "period"),
  Needle: SyntheticTask(needle, lambda c: c.num_symbols + 2, lambda c: c.length + 5, "length"),
}


class TaskRows:
  """Endless rows of a task. Raises UserError where the vocabulary or the row is too small for it."""

  def __init__(self, config: SourceConfig, *, seed: int, split: str, seq_len: int, vocab_size: int):
    task = TASKS[type(config)]
    symbols, need = task.vocab_size(config), task.seq_len(config)
    if symbols > vocab_size:
      raise UserError(
        f"data.source ({config.kind}) uses {symbols} ids but model.vocab_size={vocab_size}; raise it, or"
        f" lower data.source.num_symbols={config.num_symbols}"
      )
    if need > seq_len:
      size = getattr(config, task.sized_by)
      raise UserError(
        f"data.source.{task.sized_by}={size} needs rows of {need} tokens but train.seq_len={seq_len};"
        " lower the one or raise the other"
      )
    self._config, self._make, self._seq_len = config, task.make, seq_len
    self._words = seed, split, config.kind

  def fill(self, row: dict[str, np.ndarray], index: int) -> None:
    """Writes row `index`; with a prefix, it is all before the first answer."""
    sequence, answers = self._make(self._config, Draws(*self._words, index), self._seq_len)
    here = slice(len(sequence) - 1)
    row["tokens"][here] = sequence[:-1]
    row["targets"][here] = sequence[1:]
    row["positions"][here] = np.arange(len(sequence) - 1)
    row["loss_weights"][answers - 1] = 1
    if "prefix" in row:
      row["prefix"][: answers[0]] = True
