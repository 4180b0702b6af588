"""Mixtures of experts: a router sends each token to a few of many feed-forwards.

B batch, T length, D model, E experts, F hidden units of an expert, K experts a token.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from llmarch.branches import FFNConfig
from llmarch.build import Variant, config_dataclass
from llmarch.errors import UserError, check, check_above, check_at_least, check_rate
from llmarch.layers.context import Context
from llmarch.layers.ffn import MLP, MLPConfig
from llmarch.layers.param import Maker
from llmarch.layers.site import Out, Site
from llmarch.ops import moe as ops
from llmarch.ops.einsum import einsum


class RouterConfig(Variant):
  """A router: it decides which experts a token goes to, and the weight (gate) of each expert's output."""

  causal = True  # no later token affects the choice
  in_order = False  # the choice depends on the order of a row's tokens, or on a random draw at each place
  bias = False  # the router's logits have a bias
  balance_rate: float | None = None  # step of the bias on the choice that balances the load; None: no such bias


@config_dataclass
class Groups:
  """Experts in `num` groups of neighbours; a token chooses among those of its `top` best groups.

  In DeepSeek-V2 (2405.04434) a group lies on one device, so that a token goes to few devices. The score of a group is
  that of its best expert ("max", V2) or the sum of its best two ("top2", V3).
  """

  num: int
  top: int
  score: Literal["max", "top2"] = "top2"

  def __post_init__(self):
    check_at_least(self, 1, "num", "top")
    check(self.top <= self.num, f"top={self.top} groups are more than num={self.num}; lower top")


@config_dataclass
class TopK(RouterConfig, kind="top_k"):
  """Tokens choose experts: each token goes to the `k` experts with the largest score, computed in f32.

  The gate is the expert's score times `scale`. With `renormalize` it is the share of the score among the chosen
  experts; a softmax over the chosen logits is the softmax over all of them, renormalised. The Switch Transformer has
  k=1, renormalize=False, capacity_factor=1.25.

  capacity_factor c: of the n tokens of a row, an expert takes the first ceil(c n / E) that choose it, first choices
  before second ones; a token that no expert takes passes by on the residual stream (2101.03961, section 2.2;
  2006.16668). Padding takes no place. The limit applies only to training and to calls on whole sequences: with a
  decoding state no token is dropped, so that chunks of any size agree, and decoding computes the same function
  wherever the capacity sufficed. None: no token is ever dropped.

  balance_rate: each expert has a bias that is added to its score for the choice, not for the gate. After each train
  step the bias moves by this much against the error of the expert's load (2408.15664; DeepSeek-V3). 0 leaves the bias
  as it is; None: there is no bias.
  """

  k: int = 2
  scores: Literal["softmax", "sigmoid"] = "softmax"
  renormalize: bool = True
  scale: float = 1.0
  bias: bool = False  # the router's logits have a bias (gpt-oss)
  groups: Groups | None = None
  balance_rate: float | None = None
  capacity_factor: float | None = None
  jitter: float = 0.0  # in training, scales the router's input by a random factor in 1 +- jitter (Switch: 0.01)
  aux_loss: float = 0.0  # coefficient of the loss E sum f P over the tokens of a batch (Switch: 0.01)
  sequence_loss: float = 0.0  # coefficient of the same loss for each row, averaged over rows (DeepSeek-V3: 1e-4)
  z_loss: float = 0.0  # coefficient of the mean squared log-sum-exp of the logits (ST-MoE: 1e-3)

  def __post_init__(self):
    check_at_least(self, 1, "k")
    check_at_least(self, 0, "balance_rate", "aux_loss", "sequence_loss", "z_loss")
    check_above(self, 0, "capacity_factor", "scale")
    check_rate(self, "jitter")

  @property
  def in_order(self) -> bool:
    return self.capacity_factor is not None or self.jitter > 0

  def chosen(self, num_experts: int) -> float:
    """Number of experts that a token goes to."""
    return self.k

  def check_experts(self, num_experts: int) -> None:
    """Raises UserError if this router cannot choose among `num_experts` experts."""
    g, among = self.groups, num_experts
    if g:
      check(num_experts % g.num == 0, f"groups.num={g.num} must divide num_experts={num_experts}")
      check(g.score == "max" or num_experts > g.num, "groups.score='top2' needs two experts a group; use 'max'")
      among = num_experts // g.num * g.top
    check(self.k <= among, f"k={self.k} is more than the {among} experts to choose from; lower k")


@config_dataclass
class ExpertChoice(RouterConfig, kind="expert_choice"):
  """Experts choose tokens: each takes the floor(c n / E) of a document's n tokens with the largest softmax score.

  The score is also the gate (2202.09368). A token may go to any number of experts. The choice depends on later tokens,
  so a model with this router cannot decode.
  """

  capacity_factor: float = 2.0  # c, the number of experts that a token goes to on average

  causal = False
  in_order = True

  def __post_init__(self):
    check_above(self, 0, "capacity_factor")

  def chosen(self, num_experts: int) -> float:
    """Mean number of experts that a token goes to."""
    return self.capacity_factor

  def check_experts(self, num_experts: int) -> None:
    c = self.capacity_factor
    check(c <= num_experts, f"capacity_factor={c} is more than num_experts={num_experts}; lower it")


@config_dataclass
class MoEConfig(FFNConfig, kind="moe"):
  """Fields of the sum over the chosen experts of gate x expert(x), plus shared(x), which every token passes through."""

  num_experts: int
  expert: MLPConfig  # the feed-forward that each expert is
  router: RouterConfig = TopK()
  shared: MLPConfig | None = None  # n shared experts (DeepSeekMoE, 2401.06066) are one MLP of n times the width
  shared_gate: bool = False  # scales the shared output by sigmoid(w x) (Qwen2-MoE)

  def __post_init__(self):
    check_at_least(self, 1, "num_experts")
    check(self.shared is not None or not self.shared_gate, "shared_gate=True needs a shared expert; give shared")
    try:
      self.router.check_experts(self.num_experts)
    except UserError as e:
      raise UserError(f"router.{e}") from None

  @property
  def sees_ahead(self) -> str | None:
    return None if self.router.causal else f"router={self.router.kind!r}"

  @property
  def in_order(self) -> bool:
    return self.router.in_order

  @property
  def mlp(self) -> MLPConfig:
    return self.expert

  @property
  def experts(self) -> tuple[int, float]:
    return self.num_experts, self.router.chosen(self.num_experts)

  def extents(self) -> tuple[tuple[str, str, int], ...]:
    shared = (("shared.d_ff", "mlp", self.shared.d_ff),) if self.shared else ()
    return (("num_experts", "experts", self.num_experts), ("expert.d_ff", "expert_mlp", self.expert.d_ff), *shared)

  def summed(self, d_model: int) -> list[tuple[int, ...]]:
    return [(d_model,), (self.expert.d_ff,)] + ([(self.shared.d_ff,)] if self.shared else [])

  def toy(self, *, window: int, hidden: Any) -> dict:
    return {"num_experts": 6}


class MoE(nnx.Module):
  """A mixture of experts as a branch: out = moe(h, site)."""

  def __init__(self, config: MoEConfig, d_model: int, make: Maker, init_scale: float, output_scale: float):
    self.config = config
    c, D, E, F = config.expert, d_model, config.num_experts, config.expert.d_ff
    self.router = make.weight("router", "embed router", (D, E), fan_in="embed")
    if config.router.bias:
      self.router_bias = make.constant("router", (E,), 0.0)
    if config.router.balance_rate is not None:
      # The bias is f32 in every precision, since its steps are small. The train step reads balance_rate.
      bias = dataclasses.replace(make, dtype="float32").constant("router", (E,), 0.0)
      self.selection_bias = bias.replace(balance_rate=config.router.balance_rate)
    for name in ("gate", "up") if c.gated else ("up",):
      setattr(self, name, make.weight(name, "experts embed expert_mlp", (E, D, F), fan_in="embed", scale=init_scale))
      if c.bias:
        setattr(self, f"{name}_bias", make.constant("experts expert_mlp", (E, F), 0.0))
    scale = init_scale * output_scale
    self.down = make.weight("down", "experts expert_mlp embed", (E, F, D), fan_in="expert_mlp", scale=scale)
    if c.bias:
      self.down_bias = make.constant("experts embed", (E, D), 0.0)
    if config.shared:
      self.shared = MLP(config.shared, D, make.child("shared"), init_scale, output_scale)
    if config.shared_gate:
      self.shared_gate = make.weight("shared_gate", "embed one", (D, 1), fan_in="embed")

  def __call__(self, x: jax.Array, site: Site) -> Out:
    """Maps x [B, T, D] to an Out whose y is the Partial of a [B, T, D]."""
    keys = (None, None) if site.key is None else jax.random.split(site.key)
    route = self._tokens_choose if isinstance(self.config.router, TopK) else self._experts_choose
    routes, stats, loss = route(x, site.context, keys[0])
    weights = ops.Experts(*(getattr(self, name, None) for name in ops.Experts._fields))
    y = ops.experts(x, routes, weights, self.config.expert.activation)
    if self.config.shared:
      shared = self.shared(x, dataclasses.replace(site, key=keys[1])).y
      if self.config.shared_gate:
        # [batch, length, embed.x] @ [embed.x, 1] -> partial over x, summed -> [batch, length, 1]
        gate = einsum("btd,dg->btg", x.astype(jnp.float32), self.shared_gate)
        shared = shared.scaled(jax.nn.sigmoid(gate).astype(shared.value.dtype))
      y = y + shared
    return Out(y, stats=stats, loss=loss)

  def _logits(self, x: jax.Array) -> jax.Array:
    """Router logits f32 [B, T, E] of all experts, on every device that holds the token."""
    # Under ws_2d: [batch, length, embed.x] @ [embed.x, router] -> partial over x, summed -> [batch, length, router]
    return einsum("btd,de->bte", x.astype(jnp.float32), self.router, bias=getattr(self, "router_bias", None))

  def _tokens_choose(self, x: jax.Array, context: Context, key: jax.Array | None):
    """Routes each token to its k best experts; returns the routes, the statistics and the loss."""
    c, E, real = self.config.router, self.config.num_experts, context.real
    if key is not None and c.jitter:
      x = x.astype(jnp.float32) * jax.random.uniform(key, x.shape, minval=1 - c.jitter, maxval=1 + c.jitter)
    logits = self._logits(x)
    scores = ops.scores(logits, c.scores)
    choice = jax.lax.stop_gradient(scores)
    if c.balance_rate is not None:
      choice = choice + self.selection_bias[...]
    if c.groups:
      choice = ops.limit_to_groups(choice, c.groups.num, c.groups.top, c.groups.score)
    routes = ops.top_k(scores, choice, real, c.k, renormalize=c.renormalize, scale=c.scale)
    choices = ops.chosen(routes.expert, real, E)
    load, buffers = jnp.sum(choices, axis=(0, 1)), None
    if c.capacity_factor is not None and context.cursor is None:
      routes, buffers = ops.limit_capacity(routes, E, c.capacity_factor)
    p = scores / jnp.sum(scores, -1, keepdims=True)
    loss = c.aux_loss and c.aux_loss * ops.balance_loss(p, choices, real, by_row=False)
    loss += c.sequence_loss and c.sequence_loss * ops.balance_loss(p, choices, real, by_row=True)
    loss += c.z_loss and c.z_loss * ops.z_loss(logits, real)
    if c.balance_rate is not None:
      loss += ops.pull_to_balance(self.selection_bias[...], load)
    stats = ops.statistics(load, jnp.sum(routes.taken), jnp.sum(load)) if context.telemetry else {}
    return routes if buffers is None else buffers, stats, loss if isinstance(loss, jax.Array) else None

  def _experts_choose(self, x: jax.Array, context: Context, key: jax.Array | None):
    """Routes to each expert its best tokens; returns the routes, the statistics and the loss."""
    scores = ops.scores(self._logits(x), "softmax")
    buffers = ops.expert_choice(scores, context.real, context.segments, self.config.router.capacity_factor)
    return buffers, {}, None
