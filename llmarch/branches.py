"""Facts of branches (mixers, cross-attentions, feed-forwards): all that the rest of the code may ask of them.

A branch is a module of layers/ that reads the residual stream and writes to it. Its config joins one of the three
families below and answers the questions of `BranchConfig`. Every question has a default answer, so a new branch
answers only those where it differs. No module outside layers/ asks a config for its class.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llmarch.build import Variant
from llmarch.errors import check


class BranchConfig(Variant):
  """Facts of any branch. A branch may answer with a class attribute, a field or a property."""

  # The choice that lets a token depend on later ones, such as "mask='bidirectional'"; None if no choice does. A model
  # with such a choice cannot decode.
  sees_ahead: str | None = None
  reads_prefix = False  # earlier tokens see the marked ones, so a prompt can be the prefix of a prefix-LM
  in_order = False  # the result depends on where a token stands in its row: on its order there, or on a random draw
  grows = False  # the decoding state grows with the text
  keeps: tuple[str, ...] = ()  # names of the values that this branch leaves for later layers
  reads_kept: tuple[str, ...] = ()  # names of the values of earlier layers that this branch reads
  reads_memory = False  # the branch reads an encoder's output

  @property
  def causal(self) -> bool:
    """True if no token's output depends on a later token."""
    return self.sees_ahead is None

  def check_against(self, d_model: int, max_seq_len: int) -> None:
    """Raises UserError, beginning with a field, if something does not fit a model of this width and context."""

  def check_kept(self, name: str, owner: Any) -> None:
    """Raises UserError if this branch cannot read the value `name` that the branch `owner` keeps."""

  def check_state(self, dtype: str) -> None:
    """Raises UserError if the decoding state cannot be held in this dtype or format (config.Precision)."""

  def state_spec(self, d_model: int, batch: int, max_len: int, chunk: int, dtype: str) -> Any:
    """Specs of the decoding state's arrays as a pytree (ops/cache.py); {} if there is no state."""
    return {}

  def buffer(self, max_len: int, chunk: int, dtype: str) -> Any:
    """The buffer (ops/cache.py) in which state_spec holds one entry per token; None if it has no such buffer."""
    return None

  def extents(self) -> tuple[tuple[str, str, int], ...]:
    """(field, logical axis, size) of each dimension that a mesh may have to divide."""
    return ()

  def summed(self, d_model: int) -> list[tuple[int, ...]]:
    """The dimensions that products with this branch's matrices sum over; quantised weights have groups along them."""
    return [(d_model,)]

  def toy(self, *, window: int, hidden: Any) -> dict[str, Any]:
    """Changes of fields that make this branch small for a test; hidden(d_ff) is a small width in place of d_ff."""
    return {}


class MixerConfig(BranchConfig):
  """Facts of a token mixer; layers/attention.py has an example."""

  attends = False  # the mixer is softmax attention over keys, with `mask` and `window`
  heads: int | None = None
  kv_heads: int | None = None
  mask: Any = None  # the MaskConfig of attention
  window: int | None = None  # tokens at this distance or beyond are not seen
  position: Any = None  # the PositionConfig of attention
  dropout = 0.0  # dropout rate of the attention weights
  rank: int | None = None  # width of the latent of which all keys and values of a token are made (layers/mla.py)

  def dim(self, d_model: int) -> int | None:
    """Width of a head's queries and keys."""
    return None

  @property
  def sharing(self) -> str:
    """The way in which heads share keys and values, in one word for tables."""
    return self.kind

  def make_shared(self, make: Any) -> Any:
    """The parameter (nnx.Param) that all layers of one block name share, drawn by the Maker `make`; None if none."""
    return None

  def shared_size(self) -> int:
    """Number of elements of the parameter that `make_shared` draws."""
    return 0

  def with_fields(self, **changes: Any) -> "MixerConfig | None":
    """This mixer with other values of some fields; None if it lacks one of these fields."""
    fields = {f.name for f in dataclasses.fields(self)}
    return dataclasses.replace(self, **changes) if set(changes) <= fields else None


class CrossConfig(BranchConfig):
  """Facts of a branch that reads an encoder's output; layers/cross.py has an example."""

  reads_memory = True
  heads: int | None = None
  kv_heads: int | None = None
  dropout = 0.0  # dropout rate of the attention weights

  def check_memory(self, memory_dim: int) -> None:
    """Raises UserError, beginning with a field, unless the branch can read an encoder's output of this width."""


class FFNConfig(BranchConfig):
  """Facts of a feed-forward; layers/ffn.py has an example."""

  mlp: Any = None  # the MLPConfig of the network that a token passes through, or of one of several such networks
  experts: tuple[int, float] | None = None  # (number of experts, number of experts that a token goes to)




def check_kept(blocks: Mapping[str, Mapping[str, BranchConfig]], segments: Any) -> None:
  """Raises UserError unless each value that a branch reads was kept before, in the same turn or an earlier term.

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
  finished: dict[str, BranchConfig] = {}  # the branch that kept each value, for the terms that have ended
  for pattern, repeat in segments:
    turn: dict[str, BranchConfig] = {}
    kept_here = {v for block in pattern for branch in blocks[block].values() for v in branch.keeps}
    for block in pattern:
      for name, branch in blocks[block].items():
        for value in branch.reads_kept:
          where = f"blocks.{block}.{name} reads {value!r}"
          check(value in owners, f"{where}, which no block keeps; let one keep it, or leave that out")
          # From the second turn on, the value of the turn before would be nearer than that of the earlier term.
          ambiguous = value in kept_here and value not in turn and repeat > 1
          check(
            not ambiguous and (value in turn or value in finished),
            f"{where} before {owners[value]} keeps it; put that block before this one in the same term of the stack",
          )
          branch.check_kept(value, turn.get(value, finished.get(value)))
        turn |= dict.fromkeys(branch.keeps, branch)
    finished |= turn
