"""Residual schemes: how a block's branches read the residual stream x, and how their outputs are written to it.

A scheme names the norms that it needs, puts the branches into groups (the branches of a group read the same x, and
their outputs are added), and says what a group reads and what it writes. It sees the block through four functions,
so that a scheme knows nothing of norms, scales, dropout or meshes:

  block.enter(x)           x redistributed to where the branches read it
  block.norm_in(name, h)   the norm called `name` of h, which `enter` returned
  block.norm_out(name, y)  the norm called `name` of a branch's output or of the stream
  block.add(x, y)          a x + m dropout(y), with the block's scales a and m

The schemes, where f is a branch:

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
Names = tuple[str, ...]  # names of branches ("mixer", "cross", "ffn"), or of norms


class ResidualConfig(Variant):
  """A residual scheme. By default, branches read the stream unnormalised, one after the other."""

  by_name = True

  def groups(self, names: Names) -> tuple[Names, ...]:
    """Divides a block's branches, in order, into groups that read the same x."""
    return tuple((name,) for name in names)

  def norms(self, names: Names) -> Names:
    """Names of the norms that a block with these branches has."""
    return tuple(f"{name}_norm" for name in names)

  def read(self, block, group: Names, x: Array) -> dict[str, Array]:
    """The input of each branch of a group, made of the stream x [B, T, D]."""
    return dict.fromkeys(group, block.enter(x))

  def write(self, block, group: Names, x: Array, y: Array) -> Array:
    """The stream after a group, made of x and the sum y [B, T, D] of the group's outputs."""
    return block.add(x, y)


@config_dataclass
class Pre(ResidualConfig, kind="pre"):
  """x = a x + m f(norm(x))."""

  def read(self, block, group: Names, x: Array) -> dict[str, Array]:
    (name,) = group
    return {name: block.norm_in(f"{name}_norm", block.enter(x))}


@config_dataclass
class Post(ResidualConfig, kind="post"):
  """x = norm(a x + m f(x))."""

  def write(self, block, group: Names, x: Array, y: Array) -> Array:
    (name,) = group
    return block.norm_out(f"{name}_norm", block.add(x, y))


@config_dataclass
class Sandwich(Pre, kind="sandwich"):
  """x = a x + m norm'(f(norm(x)))."""

  def norms(self, names: Names) -> Names:
    return tuple(norm for name in names for norm in (f"{name}_norm", f"{name}_out_norm"))

  def write(self, block, group: Names, x: Array, y: Array) -> Array:
    (name,) = group
    return block.add(x, block.norm_out(f"{name}_out_norm", y))


@config_dataclass
class Output(ResidualConfig, kind="output"):
  """x = a x + m norm(f(x))."""

  def write(self, block, group: Names, x: Array, y: Array) -> Array:
    (name,) = group
    return block.add(x, block.norm_out(f"{name}_norm", y))


@config_dataclass
class Parallel(ResidualConfig, kind="parallel"):
  """x = a x + m (mixer(h) + ffn(h)), h = norm(x)."""

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
  """x = a x + m (mixer(norm(x)) + ffn(norm'(x)))."""

  def norms(self, names: Names) -> Names:
    return tuple(f"{name}_norm" for name in names)

  def read(self, block, group: Names, x: Array) -> dict[str, Array]:
    h = block.enter(x)
    return {name: block.norm_in(f"{name}_norm", h) for name in group}
