"""Quantised parameters for inference."""

import functools

import jax
from flax import nnx

from llmarch.errors import UserError
from llmarch.ops import quant


def quantize_params(params: nnx.State, format: str) -> nnx.State:
  """Quantises every matrix and table to a QTensor; norms and biases stay as they are.

  A matrix is a parameter that names the dimensions it sums over (`fan_in`). Layers may be stacked or apart, and arrays
  abstract. Raises UserError, which names the parameter, if these dimensions are no whole number of the format's groups.
  """
  quant.check_format("weights", format)

  def quantize(path, param: nnx.Param) -> nnx.Param:
    # T5's tables of biases are small and multiply nothing; routers are small and make choices, so both stay exact.
    if not param.fan_in or {"buckets", "router"} & set(param.axes):
      return param
    summed = tuple(param.axes.index(name) - len(param.axes) for name in param.fan_in)
    try:
      return param.replace(_quantize(param.get_value(), summed, format))
    except UserError as e:
      raise UserError(f"weights={format}: {'.'.join(str(k.key) for k in path)}: {e}") from None

  return jax.tree_util.tree_map_with_path(quantize, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


# The function is compiled, so that a matrix is read once and leaves no f32 copies behind.
_quantize = functools.partial(jax.jit, static_argnums=(1, 2))(quant.quantize)
