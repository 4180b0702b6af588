"""Low-rank adapters of parameters (LoRA 2106.09685; QLoRA 2305.14314).

The patterns name matrices W of the blocks, which become W + alpha/rank A B. W and all other parameters are frozen, and
the matrices of the blocks are quantised if a format is given. The optimizer sees only A and B. Parameters are flat
dicts {name: array} here.
"""

import fnmatch
import math
import string
import zlib

import jax
import jax.numpy as jnp
from flax import nnx

from llmarch.config import ModelConfig
from llmarch.errors import UserError, check
from llmarch.layers.param import flatten
from llmarch.models.decoder import abstract
from llmarch.ops import quant
from llmarch.ops.lora import Adapted
from llmarch.run_config import LoRAConfig

A, B = "lora_a", "lora_b"
RANK = "adapter"  # name of the axis between A and B


class Adapters:
  """The adapters of a config for a model. Raises UserError for a pattern that names no matrix.

  params: {"stack/segments/0/blocks/0/mixer/q/lora_a": abstract Param, ...}. A [*summed, rank] is drawn with variance
  1 / fan-in, and B [rank, *others] is zero, so that the model is unchanged at first; both are f32.
  """

  def __init__(self, config: LoRAConfig, model: ModelConfig):
    self.config = config
    self.scale = config.alpha / config.rank
    self._named = flatten(nnx.state(abstract(model)), variables=True)
    self._matrices = [name for name, p in self._named.items() if _is_matrix(name, p)]
    self.targets = _matching(config.targets, self._matrices)
    self.params = {}
    for name in self.targets:
      p = self._named[name]
      summed, unsummed = _sides(p)
      layers = p.shape[: len(p.shape) - len(p.axes)]
      self.params[f"{name}/{A}"] = _param(layers, [*summed, (RANK, config.rank)], fan_in=[n for n, _ in summed])
      self.params[f"{name}/{B}"] = _param(layers, [(RANK, config.rank), *unsummed], fan_in=[RANK])

  @property
  def size(self) -> int:
    """Number of trained parameters."""
    return sum(math.prod(p.shape) for p in self.params.values())

  @property
  def frozen_bytes(self) -> int:
    """Bytes of all parameters of the model, in the form in which `freeze` keeps them."""
    return quant.nbytes(jax.eval_shape(self.freeze, {name: p.get_value() for name, p in self._named.items()}))

  def draw(self, key: jax.Array) -> dict[str, jax.Array]:
    """Draws adapters that leave the model as it is."""

    def draw_factor(name, p):
      if name.endswith(B):
        return jnp.zeros(p.shape, jnp.float32)
      fan_in = math.prod(size for axis, size in zip(p.axes, p.sizes, strict=True) if axis in p.fan_in)
      draw = jax.random.normal(jax.random.fold_in(key, zlib.crc32(name.encode())), p.shape)
      return draw / math.sqrt(fan_in)

    return {name: draw_factor(name, p) for name, p in self.params.items()}

  def freeze(self, params: dict) -> dict:
    """All parameters of the model as training keeps them, with the blocks' matrices in the format config.weights."""
    return params | {name: self._quantize(name, params[name]) for name in self._matrices if self.config.weights}

  def _quantize(self, name: str, value: jax.Array) -> quant.QTensor:
    axes = self._named[name].axes
    summed = [axes.index(axis) - len(axes) for axis in self._named[name].fan_in]
    try:
      return quant.quantize(value, summed, self.config.weights)
    except UserError as e:
      raise UserError(f"train.lora.weights={self.config.weights}: {name}: {e}") from None

  def attach(self, base: dict, params: dict) -> dict:
    """The parameters for a forward pass: the base that `freeze` gave, and for each target its adapter beside it."""
    adapt = lambda name: Adapted(base[name], params[f"{name}/{A}"], params[f"{name}/{B}"], self.scale)
    return base | {name: adapt(name) for name in self.targets}

  def merge(self, base: dict, params: dict) -> dict[str, jax.Array]:
    """Plain parameters W + alpha/rank A B, each in the dtype of the model's parameter; the sum is in f32."""

    def merge_matrix(name, p):
      value = base[name]
      if name in self.targets:
        value = value.astype(jnp.float32) + self.scale * product(params[f"{name}/{A}"], params[f"{name}/{B}"], p)
      return value.astype(p.dtype)

    return {name: merge_matrix(name, p) for name, p in self._named.items()}


def product(a: jax.Array, b: jax.Array, p: nnx.Param) -> jax.Array:
  """The product A B in the shape of the (abstract) parameter p that it adapts."""
  letters = dict(zip(p.axes, string.ascii_lowercase))
  letters_of = lambda side: "".join(letters[axis] for axis, _ in side)
  summed, unsummed = map(letters_of, _sides(p))
  equation = f"...{summed}Z,...Z{unsummed}->...{''.join(letters[axis] for axis in p.axes)}"
  return jnp.einsum(equation, a, b, precision=jax.lax.Precision.HIGHEST)


def _is_matrix(name: str, p: nnx.Param) -> bool:
  """True for matrices of the blocks that every token meets: not experts', nor gates that choose or weigh experts."""
  return name.startswith("stack/segments") and bool(p.fan_in) and not {"experts", "router", "one"} & set(p.axes)


def _matching(patterns: tuple[str, ...], matrices: list[str]) -> list[str]:
  known = sorted({"/".join(name.split("/")[5:]) for name in matrices})
  for pattern in patterns:
    found = any(fnmatch.fnmatchcase(name, f"*/{pattern}") for name in matrices)
    check(found, f"train.lora.targets: {pattern!r} names no matrix of the blocks (they are {', '.join(known)})")
  return [name for name in matrices if any(fnmatch.fnmatchcase(name, f"*/{pattern}") for pattern in patterns)]


def _sides(p: nnx.Param) -> tuple[list, list]:
  """The (axis, size) pairs that a matmul with this matrix sums over, and the remaining pairs."""
  dims = list(zip(p.axes, p.sizes, strict=True))
  return [d for d in dims if d[0] in p.fan_in], [d for d in dims if d[0] not in p.fan_in]


def _param(layers: tuple[int, ...], dims: list, fan_in: list[str]) -> nnx.Param:
  axes, sizes = zip(*dims)
  value = jax.ShapeDtypeStruct((*layers, *sizes), jnp.float32)
  return nnx.Param(value, axes=axes, sizes=sizes, fan_in=tuple(fan_in), decay=True)
