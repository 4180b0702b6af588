"""Additional query heads, so that a mesh divides their number: PaLM 540B's 48 become 64 (2211.05102, section 4).

Heads are added to each group that shares a key-value head; if every head has its own, key-value heads are added too.
The output matrix of an added head is zero, so that it changes no logit.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from llmarch.build import FrozenDict
from llmarch.config import ModelConfig
from llmarch.errors import check
from llmarch.layers.param import flatten, unflatten
from llmarch.layers.position import ALiBi
from llmarch.models.decoder import Decoder, abstract, unstack


def pad_heads(config: ModelConfig, multiple: int) -> ModelConfig:
  """Raises every num_heads of a config to the next possible multiple of `multiple`.

  Raises UserError if heads know their number (ALiBi's slopes) or are normalised all at once.
  """

  def padded(name, mixer):
    wanted = mixer.with_fields(num_heads=mixer.heads, num_kv_heads=mixer.kv_heads) is not None
    if not wanted or mixer.num_heads % multiple == 0:
      return mixer
    where = f"blocks.{name}.mixer: heads cannot be padded from {mixer.num_heads} to a multiple of {multiple}"
    check(not isinstance(mixer.position, ALiBi), f"{where}, for ALiBi's slopes depend on their number")
    check(not (mixer.qk_norm and mixer.qk_norm.whole), f"{where}, for qk_norm.whole is a mean over all of them")
    K = mixer.kv_heads
    own = K == mixer.num_heads
    step = multiple if own else math.lcm(multiple, K)
    heads = -(-mixer.num_heads // step) * step
    return dataclasses.replace(
      mixer, num_heads=heads, num_kv_heads=heads if own else K, head_dim=mixer.dim(config.d_model)
    )

  blocks = {n: dataclasses.replace(b, mixer=padded(n, b.mixer)) for n, b in config.blocks.items()}
  return dataclasses.replace(config, blocks=FrozenDict(blocks))


def pad_params(params: nnx.State, config: ModelConfig, padded: ModelConfig) -> nnx.State:
  """Turns parameters of `config`, stacked or not, into those of `padded = pad_heads(config, ...)`, by adding zeros."""
  target = nnx.state(abstract(padded))
  ranks_of = lambda params: {name: value.ndim for name, value in flatten(params).items()}
  if ranks_of(params) != ranks_of(target):
    target = nnx.state(nnx.eval_shape(lambda: unstack(Decoder(padded, jax.random.key(0)))))
  flat, named = flatten(params), flatten(target, variables=True)
  return unflatten(target, {path: _grow(flat[path], p, block_of(path, config)) for path, p in named.items()})


def block_of(path: str, config: ModelConfig):
  """The config of the block that a parameter belongs to; None for parameters outside of the blocks."""
  match path.split("/"):
    case ["stack", "segments", segment, "blocks", i, *_]:
      pattern = config.segments[int(segment)][0]
      return config.blocks[pattern[int(i) % len(pattern)]]
    case ["stack", "shared", name, *_]:
      return config.blocks[name]
  return None


def _grow(value, param: nnx.Param, block):
  """Fills a parameter of the unpadded model up with zeros, to the heads of `param`, its shape in the padded model."""
  want = param.get_value().shape
  if value.shape == want:
    return value
  K = block.mixer.kv_heads
  groups = 1 if K == block.mixer.num_heads else K  # if each head has its own key-value head, all heads are one group
  for dim, (have, size) in enumerate(zip(value.shape, want, strict=True)):
    if have != size:
      apart = value.reshape(*value.shape[:dim], groups, have // groups, *value.shape[dim + 1 :])
      pad = [(0, (size - have) // groups if i == dim + 1 else 0) for i in range(apart.ndim)]
      value = jnp.pad(apart, pad).reshape(*value.shape[:dim], size, *value.shape[dim + 1 :])
  return value
