"""Scores of given text: log-probabilities of tokens, and perplexity.

B rows, T tokens, V vocabulary.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmarch.config import ModelConfig
from llmarch.errors import check
from llmarch.infer.lm import LM, bucket
from llmarch.models.decoder import abstract

CHUNK = 128  # tokens of a row whose logits exist at the same time


class Scores(NamedTuple):
  """Scores of a row's tokens but the first: log p(token | tokens before) in nats, and if it was the most likely."""

  logprobs: np.ndarray  # f32 [T - 1]
  greedy: np.ndarray  # bool [T - 1]


def score(lm: LM, rows: Sequence[Sequence[int]], batch: int = 8) -> list[Scores]:
  """Scores each token of a row given those before it, except the first. Rows may differ in length.

  Raises UserError for ids outside the vocabulary and for rows of more than max_seq_len + 1 tokens.
  """
  V, limit = lm.config.vocab_size, lm.config.max_seq_len
  for row in rows:
    check(len(row) <= limit + 1, f"a row has {len(row)} tokens, above model.max_seq_len={limit} and one; shorten it")
    check(len(row) > 0 and 0 <= min(row) and max(row) < V, f"a row must hold token ids from 0 to {V - 1}")
  found: list[Scores | None] = [None] * len(rows)
  batch = min(batch, len(rows))
  order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # rows of one batch then have similar lengths
  for first in range(0, len(rows), batch or 1):
    chosen = order[first : first + batch]
    width = bucket(max(len(rows[chosen[0]]) - 1, 1), 16)
    tokens, positions = np.zeros((2, batch, width), np.int32)
    positions -= 1  # -1 marks padding, and rows without tokens
    targets = np.zeros((batch, width), np.int32)
    for b, i in enumerate(chosen):
      n = len(rows[i]) - 1
      tokens[b, :n], targets[b, :n], positions[b, :n] = rows[i][:-1], rows[i][1:], np.arange(n)
    logprobs, greedy = jax.device_get(_scorer(lm.config)(lm.params, tokens, positions, targets))
    for b, i in enumerate(chosen):
      n = len(rows[i]) - 1
      check(bool(np.isfinite(logprobs[b, :n]).all()), "the model's logits are not finite; its parameters are damaged")
      found[i] = Scores(logprobs[b, :n], greedy[b, :n])
  return found


@functools.lru_cache(maxsize=16)
def _scorer(config: ModelConfig):
  """(params, tokens, positions, targets), int32 [B, T] each -> log p of the targets f32 [B, T], argmax or not."""
  graph = nnx.graphdef(abstract(config))

  @jax.jit
  def score_targets(params, tokens, positions, targets):
    model = nnx.merge(graph, params)
    hidden = model.trunk(tokens, positions)[0]
    B, T = tokens.shape
    pad = -T % min(CHUNK, T)
    padded = lambda a: jnp.pad(a, [(0, 0), (0, pad), (0, 0)][: a.ndim])
    split_in_chunks = lambda a: padded(a).reshape(B, -1, min(CHUNK, T), *a.shape[2:])

    def score_chunk(piece):
      hidden, targets = piece
      logits = model.unembed(hidden)  # f32 [B, CHUNK, V]
      mine = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
      return mine - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets

    pieces = jax.lax.map(score_chunk, jax.tree.map(lambda a: split_in_chunks(a).swapaxes(0, 1), (hidden, targets)))
    return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(B, -1)[:, :T], pieces)

  return score_targets


def beginning(tokenizer) -> list[int]:
  """The ids that stand before a text: those that the tokenizer puts there, else the end of the document before."""
  before = (tokenizer.end_id, tokenizer.begin_token_id)
  found = list(tokenizer.begin_ids) or [i for i in before if i is not None][:1]
  check(bool(found), "the tokenizer has no token that begins or ends a text; put its tokenizer_config.json beside it")
  return found


def perplexity(lm: LM, text: str, *, length: int | None = None, stride: int | None = None, batch: int = 8) -> dict:
  """The perplexity of the tokens x_1 .. x_n of a text; x_0 is the token that stands before it (`beginning`).

  Windows of `length` inputs (None: max_seq_len) begin every `stride` tokens (None: length). A window predicts the
  token after each of its inputs. The first window counts all of these, and the others count the last `stride`, so that
  every token counts once, and has at least length - stride tokens of context if the text has them. The last window ends
  with the text. Then, with N = -sum_i log p(x_i | its window) in nats:

    loss = N / n        perplexity = exp(N / n)        bits_per_byte = N / ln 2 / bytes of the text in UTF-8

  Sums are in float64. Perplexities of different tokenizers cannot be compared, but bits per byte can. Raises UserError
  for an empty text, a model without a tokenizer, and impossible lengths.
  """
  limit = lm.config.max_seq_len
  length = limit if length is None else length
  stride = length if stride is None else stride
  check(1 <= length <= limit, f"length={length} must lie between 1 and model.max_seq_len={limit}")
  check(1 <= stride <= length, f"stride={stride} must lie between 1 and length={length}")
  check(batch >= 1, f"batch must be at least 1, got {batch}")
  check(lm.tokenizer is not None, "the model has no tokenizer, so it cannot read a text; put its tokenizer.json there")
  begin, ids = beginning(lm.tokenizer), lm.tokenizer.encode(text)
  check(bool(ids), "the text is empty; give one with at least one token")
  check(len(begin) <= length, f"length={length} has no room for the {len(begin)} tokens before a text")
  stream, given = begin + ids, len(begin)
  # A window's targets end at `end`; those before `done` have been counted.
  nats, done, end, windows = 0.0, given, min(length + 1, len(stream)), []
  while done < end:
    windows.append((max(0, end - length - 1), done, end))
    done, end = end, min(end + stride, len(stream))
  rows = [stream[start:end] for start, _, end in windows]
  for (start, first, _), scores in zip(windows, score(lm, rows, batch)):
    nats -= float(np.sum(scores.logprobs[first - start - 1 :], dtype=np.float64))
  num_bytes = len(text.encode("utf-8", "replace"))
  return {
    "tokens": len(ids),
    "bytes": num_bytes,
    "loss": nats / len(ids),
    "perplexity": math.exp(min(nats / len(ids), 700)),
    "bits_per_byte": nats / math.log(2) / num_bytes,
    "length": length,
    "stride": stride,
    "windows": len(windows),
  }
