"""A block: its branches, whatever they are, with the norms and residual connections around them.

B batch, T length, D model.
"""

import dataclasses
from typing import NamedTuple

import jax
from flax import nnx

from llmarch.config import BlockConfig
from llmarch.layers.norm import Norm
from llmarch.layers.param import Maker
from llmarch.layers.registry import module_of
from llmarch.layers.site import Out, Site
from llmarch.ops.norm import rms
from llmarch.sharding import NORMED, RESIDUAL, move, shard, sum_over_mesh


class Block(nnx.Module):
  """One block, out = block(x, site): the residual stream after its branches (formulas in residual.py)."""

  def __init__(self, config: BlockConfig, d_model: int, make: Maker):
    self.config = config
    scales = config.init_scale, config.output_init_scale
    for name, branch in config.branches.items():
      setattr(self, name, module_of(branch)(branch, d_model, make.child(name), *scales))
    for name in config.norms:
      setattr(self, name, Norm(config.norm, d_model, make))

  def __call__(self, x: jax.Array, site: Site) -> Out:
    """Maps x [B, T, D] to an Out whose y is the new stream.

    The state, in and out, is {branch: its state} of the branches that have one.
    """
    c = self.config
    names = tuple(c.branches)
    key_of = _keys(names, site.key)
    out = Out(x, {})
    for group in c.residual.groups(names):
      stream = _Stream(self, key_of[group[0] if len(group) == 1 else "all"].out)
      inputs = c.residual.read(stream, group, out.y)
      y = None
      for name, branch in self._branches(group):
        state = None if site.state is None else site.state.get(name)
        kept = {**site.kept, **out.keep}
        branch_out = branch(inputs[name], dataclasses.replace(site, state=state, kept=kept, key=key_of[name].inside))
        y = branch_out.y if y is None else y + branch_out.y
        out = _joined(out, name, branch_out)
      out = dataclasses.replace(out, y=c.residual.write(stream, group, out.y, sum_over_mesh(y)))
    if site.context.telemetry:
      out = dataclasses.replace(out, stats={**out.stats, "residual_rms": rms(out.y)})
    return out

  def _branches(self, group: tuple[str, ...]):
    """(name, module) of each branch of a group. Fused branches (layers/fused.py) are one module, named as the first."""
    return [(group[0], self.fused)] if hasattr(self, "fused") else [(name, getattr(self, name)) for name in group]


class _Keys(NamedTuple):
  """Random keys of one branch: `inside` for what it draws itself, `out` for the dropout of its output."""

  inside: jax.Array | None
  out: jax.Array | None


def _keys(names: tuple[str, ...], key: jax.Array | None) -> dict[str, _Keys]:
  """Splits a block's key into those of its branches; "all" has the key for the joint output of parallel branches.

  Mixer and feed-forward get the same keys whether or not the block has the other one.
  """
  order = ("mixer", "ffn", "cross") if "cross" in names else ("mixer", "ffn")
  if key is None:
    return dict.fromkeys((*order, "all"), _Keys(None, None))
  *inside, last = jax.random.split(key, len(order) + 1)
  found = {name: _Keys(*pair) for name, *pair in zip(order, inside, jax.random.split(last, len(order)), strict=True)}
  return found | {"all": _Keys(None, last)}


class _Stream(NamedTuple):
  """The four functions through which a residual scheme sees a block (residual.py)."""

  block: Block
  key: jax.Array | None  # random key of the dropout of the branches' output

  def enter(self, x: jax.Array) -> jax.Array:
    """Redistributes the residual stream to where a branch's norm and first matrices read it."""
    return move(x, RESIDUAL, NORMED)

  def norm_in(self, name: str, h: jax.Array) -> jax.Array:
    """Normalises h, which `enter` has redistributed."""
    return getattr(self.block, name)(h, NORMED[-1])

  def norm_out(self, name: str, y: jax.Array) -> jax.Array:
    """Normalises y, which is sharded as the residual stream is."""
    return getattr(self.block, name)(y, RESIDUAL[-1])

  def add(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """The residual sum a x + m dropout(y)."""
    c = self.block.config
    if self.key is not None and c.dropout:
      y = y * (jax.random.bernoulli(self.key, 1 - c.dropout, y.shape) / (1 - c.dropout)).astype(y.dtype)
    x = x if c.skip_scale == 1 else x * c.skip_scale
    y = y if c.branch_scale == 1 else y * c.branch_scale
    return shard(x + y, *RESIDUAL)


def _joined(out: Out, name: str, added: Out) -> Out:
  """Adds one branch's state, kept values, statistics and loss to the Out of its block."""
  state = out.state if added.state is None else {**out.state, name: added.state}
  loss = out.loss if added.loss is None else added.loss if out.loss is None else out.loss + added.loss
  return Out(out.y, state, {**out.keep, **added.keep}, {**out.stats, **added.stats}, loss)
