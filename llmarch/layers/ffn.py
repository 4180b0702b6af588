"""Feed-forwards: two matrices, or three when gated.  B batch, T length, D model, F hidden."""

from typing import Literal

import jax
from flax import nnx

from llmarch.config import FFNConfig, check, check_at_least, config_dataclass
from llmarch.layers.context import Context
from llmarch.layers.param import Maker
from llmarch.ops.activation import activate
from llmarch.ops.einsum import einsum, einsums
from llmarch.ops.matmul import Product

Activation = Literal["identity", "relu", "relu2", "gelu", "gelu_tanh", "silu", "sigmoid", "swiglu_oss"]


@config_dataclass
class MLPConfig(FFNConfig, kind="mlp"):
  """down(act(up x)), or gated: down(act(gate x) * up x) (2002.05202).

  Gated, the activations give: sigmoid GLU, identity Bilinear, relu ReGLU, gelu GEGLU, silu SwiGLU; swiglu_oss
  is one of gate and up together.
  """

  d_ff: int
  activation: Activation = "silu"
  gated: bool = True
  bias: bool = False

  def __post_init__(self):
    check_at_least(self, 1, "d_ff")
    joint = self.activation == "swiglu_oss"
    check(self.gated or not joint, "activation='swiglu_oss' is of a gate; use gated=True, or another activation")


class MLP(nnx.Module):
  """y, aux = mlp(x, context, key)."""

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

  def __call__(self, x: jax.Array, context: Context, key: jax.Array | None):
    """x [B, T, D] -> y, the Partial of a [B, T, D], and aux."""
    names = ("gate", "up") if self.config.gated else ("up",)
    # Under ws_2d: [batch, length, embed.x] @ [embed.x, mlp.zy] -> partial over x -> [batch, length, mlp.zyx]
    inner = einsums(
      x, *(Product("btd,df->btf", getattr(self, name), getattr(self, f"{name}_bias", None)) for name in names)
    )
    h = activate(self.config.activation, *inner)
    # [batch, length, mlp.zyx], gathered over x, @ [mlp.zy, embed.x] -> partial over z, y
    return einsum("btf,fd->btd", h, self.down, bias=getattr(self, "down_bias", None), partial=True), {}
