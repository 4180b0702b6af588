"""A block: norms and residuals around a mixer and a feed-forward, whatever they are."""

import jax
from flax import nnx

from llmarch.config import BlockConfig
from llmarch.layers.context import Context
from llmarch.layers.norm import Norm
from llmarch.layers.param import Maker
from llmarch.layers.registry import FFNS, MIXERS
from llmarch.ops.norm import rms
from llmarch.sharding import NORMED, RESIDUAL, move, shard, sum_over_mesh


class Block(nnx.Module):
  """x, state, aux = block(x, context, state, shared, key). The formulas are in BlockConfig."""

  def __init__(self, config: BlockConfig, d_model: int, make: Maker):
    self.config = config
    scales = config.init_scale, config.output_init_scale
    self.mixer = MIXERS[type(config.mixer)](config.mixer, d_model, make.child("mixer"), *scales)
    if config.ffn:
      self.ffn = FFNS[type(config.ffn)](config.ffn, d_model, make.child("ffn"), *scales)
    branches = ("mixer", "ffn") if config.ffn and config.residual != "parallel" else ("mixer",)
    for branch in branches:
      setattr(self, f"{branch}_norm", Norm(config.norm, d_model, make))
      if config.residual == "sandwich":
        setattr(self, f"{branch}_out_norm", Norm(config.norm, d_model, make))

  def __call__(self, x: jax.Array, context: Context, state, shared, key: jax.Array | None):
    """x [B, T, D] -> x, the mixer's new state, aux."""
    keys = [None] * 3 if key is None else jax.random.split(key, 3)
    aux = {}

    def mixer(h):
      nonlocal state
      y, state, more = self.mixer(h, context, state, shared, keys[0])
      aux.update(more)
      return y

    def ffn(h):
      y, more = self.ffn(h, context, keys[1])
      aux.update(more)
      return y

    if self.config.residual.startswith("parallel"):
      entered = _enter(x)
      h = self.mixer_norm(entered, NORMED[-1])
      if hasattr(self, "fused"):  # layers/fused.py
        y, state, aux = self.fused(h, context, state, shared, keys[0])
      else:
        y = mixer(h) + ffn(h if self.config.residual == "parallel" else self.ffn_norm(entered, NORMED[-1]))
      x = self._join(x, sum_over_mesh(y), keys[2])
    else:
      keys_out = [None] * 2 if key is None else jax.random.split(keys[2])
      x = self._branch("mixer", mixer, x, keys_out[0])
      if self.config.ffn:
        x = self._branch("ffn", ffn, x, keys_out[1])
    if context.telemetry:
      aux["residual_rms"] = rms(x)
    return x, state, aux

  def _branch(self, name: str, f, x: jax.Array, key) -> jax.Array:
    """One serial branch, its norms where the residual form wants them."""
    norm, form = getattr(self, f"{name}_norm"), self.config.residual
    h = _enter(x)
    h = norm(h, NORMED[-1]) if form in ("pre", "sandwich") else h
    y = sum_over_mesh(f(h))
    if form == "sandwich":
      y = getattr(self, f"{name}_out_norm")(y, RESIDUAL[-1])
    if form == "output":
      y = norm(y, RESIDUAL[-1])
    x = self._join(x, y, key)
    return norm(x, RESIDUAL[-1]) if form == "post" else x

  def _join(self, x: jax.Array, y: jax.Array, key) -> jax.Array:
    """a x + m dropout(y)."""
    c = self.config
    if key is not None and c.dropout:
      y = y * (jax.random.bernoulli(key, 1 - c.dropout, y.shape) / (1 - c.dropout)).astype(y.dtype)
    x = x if c.skip_scale == 1 else x * c.skip_scale
    y = y if c.branch_scale == 1 else y * c.branch_scale
    return shard(x + y, *RESIDUAL)


def _enter(x: jax.Array) -> jax.Array:
  """The residual stream, where the norms and the first matrices of a branch want it."""
  return move(x, RESIDUAL, NORMED)
