"""A mixer that llmarch does not have, in three parts: the layer, its cost, its loop. test_contract.py registers it.

y_t = mean of the inner activations of the tokens of t's document up to t. B batch, T length, D model, F hidden.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmarch.analysis.cost import Cost
from llmarch.branches import MixerConfig
from llmarch.build import config_dataclass
from llmarch.layers.param import Maker
from llmarch.layers.site import Out, Site
from llmarch.ops import recurrence
from llmarch.ops.cache import Spec
from llmarch.ops.einsum import einsum
from llmarch.sharding import TOKENS, move

INSIDE = (*TOKENS, "act_mlp")
WHOLE_ROWS = ("batch", None, "act_mlp")


@config_dataclass
class RunningMeanConfig(MixerConfig, kind="running_mean"):
  width: int  # F

  in_order = True

  def extents(self) -> tuple[tuple[str, str, int], ...]:
    return (("width", "mlp", self.width),)

  def state_spec(self, d_model: int, batch: int, max_len: int, chunk: int, dtype: str) -> dict[str, Spec]:
    row = Spec((batch,), ("batch",), "int32")
    return {"total": Spec((batch, self.width), ("batch", "act_mlp"), "float32"), "count": row, "segment": row}


class RunningMean(nnx.Module):
  """out = running_mean(h, site)."""

  def __init__(self, config: RunningMeanConfig, d_model: int, make: Maker, init_scale: float, output_scale: float):
    self.config = config
    D, F = d_model, config.width
    self.up = make.weight("up", "embed mlp", (D, F), fan_in="embed", scale=init_scale)
    self.down = make.weight("down", "mlp embed", (F, D), fan_in="mlp", scale=init_scale * output_scale)

  def __call__(self, x: jax.Array, site: Site) -> Out:
    """x [B, T, D] -> y, the Partial of a [B, T, D]."""
    h = move(einsum("btd,df->btf", x, self.up), INSIDE, WHOLE_ROWS)
    B, T, F = h.shape
    zero = jnp.zeros((B,), jnp.int32)
    state = site.state or {"total": jnp.zeros((B, F), jnp.float32), "count": zero, "segment": None}
    positions, segments = (move(a, TOKENS, ("batch", None)) for a in (site.context.positions, site.context.segments))
    document, segment = recurrence.documents(positions, segments, state["segment"])
    seen = (document[:, :, None] == document[:, None, :]) & (document >= 0)[:, None, :] & jnp.tri(T, dtype=bool)
    goes_on = document == 0
    total = jnp.einsum("bts,bsf->btf", seen.astype(jnp.float32), h.astype(jnp.float32))
    total += jnp.where(goes_on[..., None], state["total"][:, None], 0.0)
    count = jnp.sum(seen, axis=2) + jnp.where(goes_on, state["count"][:, None], 0)
    y = (total / jnp.maximum(count, 1)[..., None]).astype(x.dtype)
    y = einsum("btf,fd->btd", move(y, WHOLE_ROWS, INSIDE), self.down, partial=True)
    if site.state is None:
      return Out(y)
    real = jnp.any(document >= 0, axis=1)
    last = T - 1 - jnp.argmax(document[:, ::-1] >= 0, axis=1)  # the newest token; padding leaves the state as it was
    total = jnp.where(real[:, None], jnp.take_along_axis(total, last[:, None, None], axis=1)[:, 0], state["total"])
    count = jnp.where(real, jnp.take_along_axis(count, last[:, None], axis=1)[:, 0], state["count"])
    return Out(y, {"total": total, "count": count, "segment": segment})


def cost(c: RunningMeanConfig, d_model: int) -> Cost:
  """2 D F parameters; a sum over the tokens before, and F + 2 numbers of state."""
  return Cost(
    matrices=2 * d_model * c.width,
    vectors=0,
    mixing=lambda length, dense: c.width * length,
    state=lambda max_len, chunk, dtype: 4 * (c.width + 2),
  )


def loop(c: RunningMeanConfig, p: dict, xs: list[np.ndarray], row, table, kept: dict) -> list[np.ndarray]:
  """The same in float64, token by token (tests/oracle.py)."""
  hs = [x @ p["up"] for x in xs]
  before = lambda t: [h for s, h in enumerate(hs[: t + 1]) if row.segments[s] == row.segments[t]]
  return [sum(before(t)) / len(before(t)) @ p["down"] for t in range(len(xs))]
