"""Parameters: their names, how they are drawn, and the names of their dimensions for sharding."""

import dataclasses
import math
import zlib

import jax
import jax.numpy as jnp
from flax import nnx

from llmarch.config import InitConfig
from llmarch.errors import check


@dataclasses.dataclass(frozen=True)
class Maker:
  """Draws the parameters of a module. The key of each comes from its name, so the order of drawing does not matter."""

  key: jax.Array
  init: InitConfig
  dtype: str

  def child(self, name: str, init: InitConfig | None = None) -> "Maker":
    """The maker of the submodule `name`, with the initialisation `init` or else this one's."""
    key = jax.random.fold_in(self.key, zlib.crc32(name.encode()))
    return dataclasses.replace(self, key=key, init=init or self.init)

  def weight(self, name: str, axes: str, shape: tuple[int, ...], fan_in: str, scale: float = 1.0) -> nnx.Param:
    """Draws a random matrix.

    `axes` names its dimensions, and `fan_in` names those that are summed over when it is applied. The metadata
    `sizes` keeps the shape of one layer over all devices. These parameters alone get weight decay and Muon, which
    read the metadata `decay` and `fan_in`.
    """
    names = axes.split()
    summed = math.prod(n for name, n in zip(names, shape, strict=True) if name in fan_in.split())
    experts = math.prod(n for name, n in zip(names, shape, strict=True) if name == "experts")  # one matrix for each
    std = scale * self.init.std(summed, math.prod(shape) // summed // experts)
    # A normal truncated at two deviations has this deviation, so dividing by it restores the one asked for.
    draw = jax.random.truncated_normal(self.child(name).key, -2, 2, shape, jnp.float32) / 0.87962566103423978
    value = (std * draw).astype(self.dtype)
    return nnx.Param(value, axes=tuple(names), sizes=shape, fan_in=tuple(fan_in.split()), decay=True)

  def constant(self, axes: str, shape: tuple[int, ...], value: float) -> nnx.Param:
    """Makes a vector that starts constant and does not decay, such as a norm's scale (1) or a bias (0)."""
    value = jnp.full(shape, value, self.dtype)
    return nnx.Param(value, axes=tuple(axes.split()), sizes=shape, fan_in=(), decay=False)


def _name(path) -> str:
  return "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def _variables(state):
  is_variable = lambda x: isinstance(x, nnx.Variable)
  return jax.tree_util.tree_flatten_with_path(state, is_leaf=is_variable)


def flatten(state, *, variables: bool = False) -> dict:
  """Flattens an nnx.State to {"stack/segments/0/blocks/1/mixer/q": array}, or to its Params with their metadata.

  Abstract states are flattened in the same way.
  """
  return {_name(path): p if variables else p.get_value() for path, p in _variables(state)[0]}


def unflatten(abstract_state, flat: dict, *, same_dtypes: bool = False):
  """Puts arrays by name into the tree of an abstract state: the inverse of `flatten`.

  Raises UserError, with all differences, unless names and shapes (and dtypes, if same_dtypes) are the same.
  """
  leaves, tree = _variables(abstract_state)
  params = {_name(path): p for path, p in leaves}
  describe = lambda a: f"{a.dtype if same_dtypes else ''}{list(a.shape)}"
  wrong = [f"{name} is missing" for name in params if name not in flat]
  wrong += [f"{name} is unknown" for name in flat if name not in params]
  for name, param in params.items():
    want, found = describe(param.get_value()), describe(flat.get(name, param.get_value()))
    wrong += [f"{name} is {found}, not {want}"] if found != want else []
  check(not wrong, f"parameters differ: {'; '.join(wrong)}")
  return jax.tree_util.tree_unflatten(tree, [param.replace(flat[name]) for name, param in params.items()])
