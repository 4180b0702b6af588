"""Normalisation layers: one config for each kind, and one module for all of them."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from llmarch.build import config_dataclass
from llmarch.config import NormConfig
from llmarch.errors import check, check_above
from llmarch.layers.param import Maker
from llmarch.ops import norm as ops
from llmarch.sharding import Axis, move


def _centred(scale: jax.Array) -> jax.Array:
  """1 + scale, in f32: bfloat16 has no number between 1 and 1.0078, so it would lose a small scale."""
  return 1 + scale.astype(jnp.float32)


@config_dataclass
class RMSNorm(NormConfig, kind="rmsnorm"):
  """x / rms(x) times a scale of the last dimension (1910.07467)."""

  eps: float = 1e-6
  zero_centered: bool = False  # multiplies by 1 + scale, where scale starts at 0 (Gemma)

  def __post_init__(self):
    check_above(self, 0, "eps")

  def make(self, dim: int, make: Maker):
    return {"scale": make.constant("norm", (dim,), 0.0 if self.zero_centered else 1.0)}

  def apply(self, x: jax.Array, axis: Axis, scale: jax.Array) -> jax.Array:
    return ops.rms_norm(x, _centred(scale) if self.zero_centered else scale, eps=self.eps, axis=axis)


@config_dataclass
class LayerNorm(NormConfig, kind="layernorm"):
  """(x - mean(x)) / std(x), times a scale plus a bias of the last dimension (1607.06450)."""

  eps: float = 1e-5
  bias: bool = True
  scale: bool = True  # has a scale; with neither scale nor bias there are no parameters (OLMo)
  zero_centered: bool = False  # multiplies by 1 + scale, where scale starts at 0 (Nemotron's LayerNorm1p)

  def __post_init__(self):
    check_above(self, 0, "eps")
    check(self.scale or not self.zero_centered, "zero_centered is about a scale; set scale=true or drop it")

  def make(self, dim: int, make: Maker):
    params = {"scale": make.constant("norm", (dim,), 0.0 if self.zero_centered else 1.0)} if self.scale else {}
    return params | ({"bias": make.constant("norm", (dim,), 0.0)} if self.bias else {})

  def apply(self, x: jax.Array, axis: Axis, scale: jax.Array | None = None, bias: jax.Array | None = None) -> jax.Array:
    return ops.layer_norm(x, _centred(scale) if self.zero_centered else scale, bias, eps=self.eps, axis=axis)


@config_dataclass
class ScaleNorm(NormConfig, kind="scalenorm"):
  """g x / |x| with one scalar g, which starts at sqrt(dim) (1910.05895)."""

  eps: float = 1e-6

  def __post_init__(self):
    check_above(self, 0, "eps")

  def make(self, dim: int, make: Maker):
    return {"scale": make.constant("one", (1,), math.sqrt(dim))}

  def apply(self, x: jax.Array, axis: Axis, scale: jax.Array) -> jax.Array:
    return ops.scale_norm(x, scale, eps=self.eps, axis=axis)


class Norm(nnx.Module):
  """Normalises the last dimension as its config says, [..., dim] -> [..., dim].

  With `heads`, x is [..., heads, dim] and each head has its own parameters; None: all heads share them.
  """

  def __init__(self, config: NormConfig, dim: int, make: Maker, heads: int | None = None):
    self.config = config
    for name, param in config.make(dim, make).items():
      setattr(self, name, param if heads is None else _one_per_head(param, heads))

  def __call__(self, x: jax.Array, axis: Axis, heads: Axis = None) -> jax.Array:
    """Takes as `axis` the logical name of x's last dimension, and as `heads` that of the one before it."""
    params = {k: v[...] for k, v in vars(self).items() if isinstance(v, nnx.Param)}
    dims_of = lambda v: (heads,) * (v.ndim - 1) + (axis,)
    params = {k: v if v.shape == (1,) else move(v, (None,) * v.ndim, dims_of(v)) for k, v in params.items()}
    # The backward pass recomputes the norm from x, which saves the memory of f32 copies of x.
    return jax.checkpoint(self.config.apply, prevent_cse=False, static_argnums=1)(x, axis, **params)


def _one_per_head(param: nnx.Param, heads: int) -> nnx.Param:
  """Repeats a norm's vector [dim] for every head, as a parameter [heads, dim]."""
  shape = (heads, *param.sizes)
  value = jnp.broadcast_to(param.get_value(), shape)
  return nnx.Param(value, axes=("norm", *param.axes), sizes=shape, fan_in=(), decay=False)
