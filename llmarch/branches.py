"""What the rest of the code may ask of a branch: the facts of mixers, cross-attentions and feed-forwards.

A branch is a module of layers/ that reads the residual stream and writes to it. Its config joins one of the three
families below and answers the questions of `BranchConfig`; each has an honest default, so that a new branch answers
only what differs. Nobody outside of layers/ asks a config for its class.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llmarch.build import Variant
from llmarch.errors import check


class BranchConfig(Variant):
  """Facts of any branch. A branch may answer with a class attribute, a field or a property."""

  # The choice by which a token depends on later ones, such as "mask='bidirectional'"; None where none does. A model
  # with such a choice cannot decode.
  sees_ahead: str | None = None
  reads_prefix = False  # marked tokens are seen by earlier ones: a prompt can be a prefix-LM's prefix
  in_order = False  # the result depends on a token's place in its row: on which comes first, or what is drawn there
  grows = False  # the decoding state grows with the text
  keeps: tuple[str, ...] = ()  # names of values that it leaves for later layers
  reads_kept: tuple[str, ...] = ()  # names of values of earlier layers that it reads
  reads_memory = False  # reads an encoder's output

  @property
  def causal(self) -> bool:
    """Whether no token's output depends on a later token."""
    return self.sees_ahead is None

  def check_against(self, d_model: int, max_seq_len: int) -> None:
    """Raises UserError, beginning with a field, for what does not fit a model of this width and context."""

  def check_kept(self, name: str, owner: Any) -> None:
    """Raises UserError where the value of this name, which the branch `owner` keeps, cannot be read here."""

  def check_state(self, dtype: str) -> None:
    """Raises UserError where the decoding state cannot be held in this dtype or format (config.Precision)."""

  def state_spec(self, d_model: int, batch: int, max_len: int, chunk: int, dtype: str) -> Any:
    """The arrays of decoding state as a pytree of specs (ops/cache.py); {}: none."""
    return {}

  def buffer(self, max_len: int, chunk: int, dtype: str) -> Any:
    """The buffer (ops/cache.py) in which state_spec holds an entry a token; None: it has no such buffer."""
    return None

  def extents(self) -> tuple[tuple[str, str, int], ...]:
    """(field, logical axis, size) of each dimension that a mesh may have to divide."""
    return ()

  def summed(self, d_model: int) -> list[tuple[int, ...]]:
    """The dimensions over which products with its matrices sum: formats of weights have groups along them."""
    return [(d_model,)]

  def toy(self, *, window: int, hidden: Any) -> dict[str, Any]:
    """Changes of fields that make this small for a test; hidden(d_ff) is a small width in place of d_ff."""
    return {}


class MixerConfig(BranchConfig):
  """A token mixer; see layers/attention.py."""

  attends = False  # is softmax attention over keys, with `mask` and `window`
  heads: int | None = None
  kv_heads: int | None = None
  mask: Any = None  # a MaskConfig, of attention
  window: int | None = None  # tokens at this distance or beyond are not seen
  position: Any = None  # a PositionConfig
  dropout = 0.0  # on attention weights
  rank: int | None = None  # all keys and values of a token are made of this many numbers

  def dim(self, d_model: int) -> int | None:
    """Width of a head's queries and keys."""
    return None

  @property
  def sharing(self) -> str:
    """How heads share keys and values, in a word for tables."""
    return self.kind

  def make_shared(self, make: Any) -> Any:
    """A parameter (nnx.Param) that all layers of one block's name share, drawn from the Maker `make`; None."""
    return None

  def shared_size(self) -> int:
    """Elements of that parameter."""
    return 0

  def with_fields(self, **changes: Any) -> "MixerConfig | None":
    """The same mixer with other values of some fields; None where it has no such field to choose."""
    fields = {f.name for f in dataclasses.fields(self)}
    return dataclasses.replace(self, **changes) if set(changes) <= fields else None


class CrossConfig(BranchConfig):
  """A branch that reads an encoder's output; see layers/cross.py."""

  reads_memory = True
  heads: int | None = None
  kv_heads: int | None = None
  dropout = 0.0  # on attention weights

  def check_memory(self, memory_dim: int) -> None:
    """Raises UserError, beginning with a field, unless it can read an encoder's output of this width."""


class FFNConfig(BranchConfig):
  """A feed-forward; see layers/ffn.py."""

  mlp: Any = None  # the MLPConfig of what one token passes through, or of one of several such
  experts: tuple[int, float] | None = None  # (how many there are, how many a token goes to)




def check_kept(blocks: Mapping[str, Mapping[str, BranchConfig]], segments: Any) -> None:
  """Raises UserError unless every value that a branch reads was kept before it, in the same turn or an earlier term.

  blocks: {name of a block: {name of a branch: its config, in the order in which they run}}; segments: ((names of a
  pattern, repeats), ...), as `config.parse_stack` gives them.
  """
  owners: dict[str, str] = {}
  for block, branches in blocks.items():
    for name, branch in branches.items():
      for value in branch.keeps:
        where = f"blocks.{block}.{name}"
        check(value not in owners, f"{where} keeps {value!r}, and so does {owners.get(value)}; give one another name")
        owners[value] = where
  finished: dict[str, BranchConfig] = {}  # who kept a value, in the terms that are done
  for pattern, repeat in segments:
    turn: dict[str, BranchConfig] = {}
    kept_here = {v for block in pattern for branch in blocks[block].values() for v in branch.keeps}
    for block in pattern:
      for name, branch in blocks[block].items():
        for value in branch.reads_kept:
          where = f"blocks.{block}.{name} reads {value!r}"
          check(value in owners, f"{where}, which no block keeps; let one keep it, or leave that out")
          # In the second turn, the value of the first would be nearer than that of the earlier term.
          ambiguous = value in kept_here and value not in turn and repeat > 1
          check(
            not ambiguous and (value in turn or value in finished),
            f"{where} before {owners[value]} keeps it; put that block before this one in the same term of the stack",
          )
          branch.check_kept(value, turn.get(value, finished.get(value)))
        turn |= dict.fromkeys(branch.keeps, branch)
    finished |= turn
