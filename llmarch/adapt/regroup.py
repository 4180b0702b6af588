"""Fewer key-value heads than a model was trained with: multi-head to grouped-query or multi-query attention.

"GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints" (2305.13245, section 2.1) merges
neighbouring heads, then trains a little more. It found the mean of the heads better than the first of them, and the
first better than new heads.

K key-value heads, G of which become one, H head dim.
"""

import dataclasses
from collections.abc import Collection

import jax
import jax.numpy as jnp
from flax import nnx

from llmarch.adapt.padding import block_of
from llmarch.branches import MixerConfig
from llmarch.build import FrozenDict
from llmarch.config import ModelConfig
from llmarch.errors import check, nearest
from llmarch.layers.param import flatten, unflatten
from llmarch.models.decoder import Decoder, abstract

HOW = ("mean", "first", "random")


def regroup_config(config: ModelConfig, num_kv_heads: int, blocks: Collection[str] = ()) -> ModelConfig:
  """Sets `num_kv_heads` key-value heads in the named blocks of a config (none named: in all that have such heads).

  Raises UserError for a block that does not exist, that has no key-value heads, or whose heads do not fall into groups
  of equal size.
  """
  for name in blocks:
    check(name in config.blocks, f"blocks: there is no block {name!r}{nearest(name, config.blocks)}")
    mixer = config.blocks[name].mixer
    check(has_groups(mixer), f"blocks.{name}.mixer is {mixer.kind}, which has no key-value heads; leave it out")
  chosen = blocks or [name for name, block in config.blocks.items() if has_groups(block.mixer)]
  kinds = ", ".join(sorted({block.mixer.kind for block in config.blocks.values()}))
  check(bool(chosen), f"no block has key-value heads (its mixers are {kinds}); there is nothing to regroup")

  def with_fewer(name):
    block = config.blocks[name]
    K = block.mixer.kv_heads
    check(
      num_kv_heads >= 1 and K % num_kv_heads == 0,
      f"num_kv_heads={num_kv_heads} does not divide the {K} key-value heads of blocks.{name}; give a divisor of {K}",
    )
    head_dim = block.mixer.dim(config.d_model)
    return dataclasses.replace(
      block, mixer=dataclasses.replace(block.mixer, num_kv_heads=num_kv_heads, head_dim=head_dim)
    )

  changed = {name: with_fewer(name) for name in chosen}
  return dataclasses.replace(config, blocks=FrozenDict({**config.blocks, **changed}))


def has_groups(mixer: MixerConfig) -> bool:
  """True if a mixer has its own key-value heads, and their number can be chosen."""
  return mixer.with_fields(num_kv_heads=mixer.kv_heads) is not None and not mixer.reads_kept


def regroup_params(
  params: nnx.State, config: ModelConfig, regrouped: ModelConfig, how: str, key: jax.Array
) -> nnx.State:
  """Turns the parameters of `config` into those of `regrouped = regroup_config(config, ...)`, in the same dtypes.

  how: the "mean" of the G heads that become one, the "first" of them, or "random" new heads, drawn from `key` as
  training would draw them. Keys, values, their biases, and the scales of a norm over all keys at once change; a norm of
  each head is shared by the heads and stays. Means are taken in f32.
  """
  target = flatten(nnx.state(abstract(regrouped)))
  flat = flatten(params)
  changed = {name for name, a in target.items() if a.shape != flat[name].shape}
  if how == "random":
    # The function is jitted, so that only the changed parameters are drawn.
    draw = jax.jit(lambda key: {n: v for n, v in flatten(nnx.state(Decoder(regrouped, key))).items() if n in changed})
    new = {name: value.astype(flat[name].dtype) for name, value in draw(key).items()}
  else:
    kv_heads_of = lambda config, name: block_of(name, config).mixer.kv_heads
    new = {name: _fewer(flat[name], target[name].shape, kv_heads_of(regrouped, name), how) for name in changed}
  return unflatten(nnx.state(abstract(regrouped)), flat | new)


def _fewer(value: jax.Array, want: tuple[int, ...], heads: int, how: str) -> jax.Array:
  """Merges the heads of a parameter: [..., K, ...] or [..., K * H] -> [..., heads, ...] or [..., heads * H]."""
  (dim,) = (i for i, (a, b) in enumerate(zip(value.shape, want, strict=True)) if a != b)
  group = value.shape[dim] // want[dim]
  apart = value.reshape(*value.shape[:dim], heads, group, -1, *value.shape[dim + 1 :])
  if how == "first":
    merged = jnp.take(apart, 0, axis=dim + 1)
  else:
    merged = jnp.mean(apart, axis=dim + 1, dtype=jnp.float32).astype(value.dtype)
  return merged.reshape(want)
