"""Residual schemes: how the branches of a block read the residual stream x, and what becomes of their outputs.

A scheme names the norms that it needs, puts the branches into groups (the branches of a group read the same x, and
their outputs are added), and says what a group reads and what it writes. It sees the block through four functions,
so that a scheme knows nothing of norms, scales, dropout or meshes:

  block.enter(x)           x where the branches work
  block.norm_in(name, h)   the norm of that name, of what has entered
  block.norm_out(name, y)  the norm of that name, of a branch's summed output or of the stream
  block.add(x, y)          a x + m dropout(y), with the block's scales a and m

With f a branch:

  pre       x = a x + m f(norm(x))
  post      x = norm(a x + m f(x))              DeepNorm: skip_scale = a, init_scale = beta (2203.00555)
  sandwich  x = a x + m norm'(f(norm(x)))       Gemma 2, Grok
  output    x = a x + m norm(f(x))              OLMo 2
  parallel  x = a x + m (mixer(h) + ffn(h)), h = norm(x)           GPT-J, PaLM
  parallel_two_norms   the same, with a norm for each branch       GPT-NeoX, Falcon-40B
"""

from typing import Any

from llmarch.build import Variant, config_dataclass
from llmarch.errors import check

Array = Any  # a JAX array; this module only passes them on
Names = tuple[str, ...]  # of branches: "mixer", "cross", "ffn"


class ResidualConfig(Variant):
  """A residual scheme. These methods are those of a scheme whose branches read the stream as it is, one by one."""

  by_name = True

  def groups(self, names: Names) -> tuple[Names, ...]:
    """The branches of a block, in order, in groups that read the same x."""
    return tuple((name,) for name in names)

  def norms(self, names: Names) -> Names:
    """Names of the norms of a block that has these branches."""
    return tuple(f"{name}_norm" for name in names)

  def read(self, block, group: Names, x: Array) -> dict[str, Array]:
    """What each branch of a group works on, of the stream x [B, T, D]."""
    return dict.fromkeys(group, block.enter(x))

  def write(self, block, group: Names, x: Array, y: Array) -> Array:
    """The stream after a group, of the sum y [B, T, D] of its outputs."""
    return block.add(x, y)


@config_dataclass
class Pre(ResidualConfig, kind="pre"):
  def read(self, block, group: Names, x: Array) -> dict[str, Array]:
    (name,) = group
    return {name: block.norm_in(f"{name}_norm", block.enter(x))}


@config_dataclass
class Post(ResidualConfig, kind="post"):
  def write(self, block, group: Names, x: Array, y: Array) -> Array:
    (name,) = group
    return block.norm_out(f"{name}_norm", block.add(x, y))


@config_dataclass
class Sandwich(Pre, kind="sandwich"):
  def norms(self, names: Names) -> Names:
    return tuple(norm for name in names for norm in (f"{name}_norm", f"{name}_out_norm"))

  def write(self, block, group: Names, x: Array, y: Array) -> Array:
    (name,) = group
    return block.add(x, block.norm_out(f"{name}_out_norm", y))


@config_dataclass
class Output(ResidualConfig, kind="output"):
  def write(self, block, group: Names, x: Array, y: Array) -> Array:
    (name,) = group
    return block.add(x, block.norm_out(f"{name}_norm", y))


@config_dataclass
class Parallel(ResidualConfig, kind="parallel"):
  def groups(self, names: Names) -> tuple[Names, ...]:
    check(
      "ffn" in names,
      f"residual={self.kind!r} runs the mixer beside a feed-forward; give ffn, or use residual='pre'",
    )
    return (names,)

  def norms(self, names: Names) -> Names:
    return (f"{names[0]}_norm",)

  def read(self, block, group: Names, x: Array) -> dict[str, Array]:
    return dict.fromkeys(group, block.norm_in(f"{group[0]}_norm", block.enter(x)))


@config_dataclass
class ParallelTwoNorms(Parallel, kind="parallel_two_norms"):
  def norms(self, names: Names) -> Names:
    return tuple(f"{name}_norm" for name in names)

  def read(self, block, group: Names, x: Array) -> dict[str, Array]:
    h = block.enter(x)
    return {name: block.norm_in(f"{name}_norm", h) for name in group}
