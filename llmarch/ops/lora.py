"""A frozen weight with a low-rank adapter: W + scale A B (2106.09685, section 4.1), never formed."""

import dataclasses

import jax

from llmarch.ops.quant import QTensor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
  """Takes the place of the plain array in a Param; `ops.einsum` applies it.

  With W's dimensions those that a matmul sums over and the others, and leading ones of stacked layers:
  a [layers, *summed, rank], b [layers, rank, *others].
  """

  base: jax.Array | QTensor
  a: jax.Array
  b: jax.Array
  scale: float = dataclasses.field(metadata={"static": True})

  @property
  def shape(self) -> tuple[int, ...]:
    return self.base.shape

  @property
  def ndim(self) -> int:
    return len(self.shape)

  @property
  def dtype(self):
    return self.base.dtype

  def __getitem__(self, index) -> "Adapted":
    """One of the stacked layers, and `[...]`, which is how a Param is read."""
    return jax.tree.map(lambda a: a[index], self)
