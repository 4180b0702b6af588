"""Normalisation layers: a config for each, one module for all."""

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
  """1 + scale, in f32: bfloat16 has no number between 1 and 1.0078, and a small scale would be lost."""
  return 1 + scale.astype(jnp.float32)


@config_dataclass
class RMSNorm(NormConfig, kind="rmsnorm"):
  eps: float = 1e-6
  zero_centered: bool = False  # multiplies by 1 + scale, scale starting at 0 (Gemma)

  def __post_init__(self):
    check_above(self, 0, "eps")

  def make(self, dim: int, make: Maker):
    return {"scale": make.constant("norm", (dim,), 0.0 if self.zero_centered else 1.0)}

  def apply(self, x: jax.Array, axis: Axis, scale: jax.Array) -> jax.Array:
    return ops.rms_norm(x, _centred(scale) if self.zero_centered else scale, eps=self.eps, axis=axis)


@config_dataclass
class LayerNorm(NormConfig, kind="layernorm"):
  eps: float = 1e-5
  bias: bool = True
  scale: bool = True  # without it and the bias there are no parameters (OLMo)
  zero_centered: bool = False  # Nemotron's LayerNorm1p

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
  """g x / |x|, one scalar g that starts at sqrt(dim) (1910.05895)."""

  eps: float = 1e-6

  def __post_init__(self):
    check_above(self, 0, "eps")

  def make(self, dim: int, make: Maker):
    return {"scale": make.constant("one", (1,), math.sqrt(dim))}

  def apply(self, x: jax.Array, axis: Axis, scale: jax.Array) -> jax.Array:
    return ops.scale_norm(x, scale, eps=self.eps, axis=axis)


class Norm(nnx.Module):
  """The normalisation of the last dimension that its config says.  [..., dim] -> [..., dim].

  heads: of x [..., heads, dim], each of which has parameters of its own (None: they share them).
  """

  def __init__(self, config: NormConfig, dim: int, make: Maker, heads: int | None = None):
    self.config = config
    for name, param in config.make(dim, make).items():
      setattr(self, name, param if heads is None else _each(param, heads))

  def __call__(self, x: jax.Array, axis: Axis, heads: Axis = None) -> jax.Array:
    """`axis`: the logical name of x's last dimension; `heads`: of the one before it."""
    params = {k: v[...] for k, v in vars(self).items() if isinstance(v, nnx.Param)}
    place = lambda v: (heads,) * (v.ndim - 1) + (axis,)
    here = {k: v if v.shape == (1,) else move(v, (None,) * v.ndim, place(v)) for k, v in params.items()}
    # The backward pass recomputes it from x rather than keep f32 copies of x on the way.
    return jax.checkpoint(self.config.apply, prevent_cse=False, static_argnums=1)(x, axis, **here)


def _each(param: nnx.Param, heads: int) -> nnx.Param:
  """A vector [dim] of a norm as one for each head [heads, dim]."""
  shape = (heads, *param.sizes)
  value = jnp.broadcast_to(param.get_value(), shape)
  return nnx.Param(value, axes=("norm", *param.axes), sizes=shape, fan_in=(), decay=False)
