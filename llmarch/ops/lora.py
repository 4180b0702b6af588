"""A frozen weight with a low-rank adapter: W + scale A B (2106.09685, section 4.1), whose sum is never formed."""

import dataclasses

import jax

from llmarch.ops.quant import QTensor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
  """A weight with an adapter, in place of the plain array in a Param; `ops.einsum` applies it.

  If `summed` are the dimensions of W that a matmul sums over, and `others` its remaining ones, then with stacked layers
  a is [layers, *summed, rank] and b is [layers, rank, *others].
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
    """Selects one of the stacked layers; `[...]`, which is how a Param is read, selects all."""
    return jax.tree.map(lambda a: a[index], self)
