"""From documents to rows of T tokens: plans that say which pieces of a stream of tokens fill which row.

A stream S is an end token followed by the chosen documents, each with its end token. A piece (start, n) is
n inputs S[start : start + n] with the n targets that follow them, S[start + 1 : start + n + 1]. A plan puts
every target into exactly one row (chunks drop the last, unfilled row): an epoch counts every token once.
"""

from bisect import bisect_left, bisect_right, insort

import numpy as np


class Stream:
  """S over the documents of a token store that are `chosen` (bool [documents])."""

  def __init__(self, tokens: np.ndarray, ends: np.ndarray, chosen: np.ndarray, end_id: int):
    starts = np.append(0, ends[:-1])[chosen]
    ends = ends[chosen]
    self.lengths = ends - starts  # of each document, its end token included
    fresh = np.append(True, starts[1:] != ends[:-1])  # neighbours in the store are read as one extent
    self._begin = starts[fresh].tolist()
    self._at = np.append(np.cumsum(np.append(0, self.lengths))[:-1][fresh], self.lengths.sum()).tolist()
    self._tokens, self._end_id = tokens, end_id

  def __len__(self) -> int:
    """Targets: the tokens of the documents."""
    return self._at[-1]

  def read(self, start: int, count: int) -> np.ndarray:
    """S[start : start + count + 1], int32."""
    out = np.full(count + 1, self._end_id, np.int32)
    at, stop = max(start, 1), start + count + 1
    while at < stop:
      extent = bisect_right(self._at, at - 1) - 1  # S[at] is token at - 1 of the documents
      here, until = at - 1 - self._at[extent], min(stop, self._at[extent + 1] + 1)
      begin = self._begin[extent] + here
      out[at - start : until - start] = self._tokens[begin : begin + until - at]
      at = until
    return out


class Chunks:
  """Row r is the piece (r T, T); documents follow each other across row ends."""

  first_segment = 0

  def __init__(self, lengths: np.ndarray, seq_len: int):
    self._seq_len = seq_len
    self.num_rows = int(lengths.sum()) // seq_len

  def pieces(self, row: int) -> list[tuple[int, int]]:
    return [(row * self._seq_len, self._seq_len)]


class Documents:
  """Documents cut every T tokens; the pieces are packed by best-fit decreasing, each a segment of its row."""

  first_segment = 1

  def __init__(self, lengths: np.ndarray, seq_len: int):
    starts, sizes = cut(lengths, seq_len)
    rows = best_fit_decreasing(sizes, seq_len)
    self.num_rows = int(rows.max()) + 1
    order = np.argsort(rows, kind="stable")
    self._starts, self._sizes = starts[order], sizes[order]
    self._bounds = np.append(0, np.cumsum(np.bincount(rows)))

  def pieces(self, row: int) -> list[tuple[int, int]]:
    here = slice(self._bounds[row], self._bounds[row + 1])
    return list(zip(self._starts[here].tolist(), self._sizes[here].tolist(), strict=True))


PLANS = {"chunks": Chunks, "documents": Documents}


def cut(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
  """Pieces (start, size) of documents of these lengths, in order; T tokens each, but a document's last."""
  counts = -(-lengths // seq_len)
  within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
  offset = within * seq_len
  starts = np.repeat(np.cumsum(lengths) - lengths, counts) + offset
  return starts, np.minimum(np.repeat(lengths, counts) - offset, seq_len)


def best_fit_decreasing(sizes: np.ndarray, capacity: int) -> np.ndarray:
  """The row of each piece: largest first, each into the fullest row that takes it.

  At most 11/9 of the fewest possible rows, plus one (Johnson 1973). Rows are grouped by the room they have
  left, so a piece costs a search among at most `capacity` rooms. Deterministic; rows are numbered by their
  first piece, which keeps the order of the corpus.
  """
  open_rows = [[] for _ in range(capacity + 1)]  # by room left
  rooms = []  # those with open rows, sorted
  rows, num_rows = np.empty(len(sizes), np.int64), 0
  for piece in np.argsort(-sizes, kind="stable").tolist():
    size = int(sizes[piece])
    found = bisect_left(rooms, size)
    if found < len(rooms):
      room = rooms[found]
      row = open_rows[room].pop()
      if not open_rows[room]:
        del rooms[found]
    else:
      row, room = num_rows, capacity
      num_rows += 1
    rows[piece] = row
    left = room - size
    if left:
      if not open_rows[left]:
        insort(rooms, left)
      open_rows[left].append(row)
  _, first = np.unique(rows, return_index=True)
  rank = np.empty(num_rows, np.int64)
  rank[np.argsort(first)] = np.arange(num_rows)
  return rank[rows]
