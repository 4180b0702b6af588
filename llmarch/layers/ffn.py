"""Feed-forward networks of two matrices, or of three when gated.  B batch, T length, D model, F hidden."""

from collections.abc import Callable
from typing import Literal

import jax
from flax import nnx

from llmarch.branches import FFNConfig
from llmarch.build import config_dataclass
from llmarch.errors import check, check_at_least
from llmarch.layers.param import Maker
from llmarch.layers.site import Out, Site
from llmarch.ops.activation import activate
from llmarch.ops.einsum import einsum, einsums
from llmarch.ops.matmul import Product

Activation = Literal["identity", "relu", "relu2", "gelu", "gelu_tanh", "silu", "sigmoid", "swiglu_oss"]


@config_dataclass
class MLPConfig(FFNConfig, kind="mlp"):
  """Fields of down(act(up x)) or, if gated, down(act(gate x) * up x) (2002.05202).

  The gated form is called GLU with the activation sigmoid, Bilinear with identity, ReGLU with relu, GEGLU with gelu
  and SwiGLU with silu. The activation swiglu_oss takes gate and up together.
  """

  d_ff: int
  activation: Activation = "silu"
  gated: bool = True
  bias: bool = False

  def __post_init__(self):
    check_at_least(self, 1, "d_ff")
    joint = self.activation == "swiglu_oss"
    check(self.gated or not joint, "activation='swiglu_oss' is of a gate; use gated=True, or another activation")

  @property
  def mlp(self) -> "MLPConfig":
    return self

  def extents(self) -> tuple[tuple[str, str, int], ...]:
    return (("d_ff", "mlp", self.d_ff),)

  def summed(self, d_model: int) -> list[tuple[int, ...]]:
    return [(d_model,), (self.d_ff,)]

  def toy(self, *, window: int, hidden: Callable[[int], int]) -> dict:
    return {"d_ff": hidden(self.d_ff)}


class MLP(nnx.Module):
  """A feed-forward network as a branch: out = mlp(h, site)."""

  def __init__(self, config: MLPConfig, d_model: int, make: Maker, init_scale: float, output_scale: float):
    self.config = config
    D, F = d_model, config.d_ff
    for name in ("gate", "up") if config.gated else ("up",):
      setattr(self, name, make.weight(name, "embed mlp", (D, F), fan_in="embed", scale=init_scale))
      if config.bias:
        setattr(self, f"{name}_bias", make.constant("mlp", (F,), 0.0))
    self.down = make.weight("down", "mlp embed", (F, D), fan_in="mlp", scale=init_scale * output_scale)
    if config.bias:
      self.down_bias = make.constant("embed", (D,), 0.0)

  def __call__(self, x: jax.Array, site: Site) -> Out:
    """Maps x [B, T, D] to an Out whose y is the Partial of a [B, T, D]."""
    names = ("gate", "up") if self.config.gated else ("up",)
    # Under ws_2d: [batch, length, embed.x] @ [embed.x, mlp.zy] -> partial over x -> [batch, length, mlp.zyx]
    inner = einsums(
      x, *(Product("btd,df->btf", getattr(self, name), getattr(self, f"{name}_bias", None)) for name in names)
    )
    h = activate(self.config.activation, *inner)
    # [batch, length, mlp.zyx], gathered over x, @ [mlp.zy, embed.x] -> partial over z, y
    return Out(einsum("btf,fd->btd", h, self.down, bias=getattr(self, "down_bias", None), partial=True))
