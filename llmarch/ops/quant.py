"""Quantised arrays: small codes and scales, w = decode(codes) * scale, symmetric around zero.

Elements share a scale along the dimensions that a matmul sums over: all of them (one scale per output channel, as AQT),
or groups of neighbours. A per-channel scale factors out of the sum, so the codes themselves are multiplied, and only
they are read; a grouped array is decoded first.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llmarch.errors import UserError, check

# These levels are quantiles of a normal distribution, with an exact zero (QLoRA, 2305.14314, appendix E).
NF4 = (
  -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
  -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
  0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class Format(NamedTuple):
  """A format: the rule by which a number in [-top, top] becomes a code."""

  dtype: str  # dtype of the codes
  top: float
  group: int | None = None  # number of elements that share a scale; None: all that a matmul sums over
  levels: tuple[float, ...] | None = None  # a code is the index of the nearest level; None: it is the rounded number

  @property
  def scale_dtype(self) -> str:
    """16 bits if scales are many: 4.5, 4.25 or 4.125 bits a weight for groups of 32, 64 or 128."""
    return "float32" if self.group is None else "bfloat16"


FORMATS = {
  "int8": Format("int8", 127),
  "fp8": Format("float8_e4m3fn", 448),
  "int4": Format("int4", 7, group=64),
  "int4_32": Format("int4", 7, group=32),
  "int4_128": Format("int4", 7, group=128),
  "nf4": Format("uint4", 1, group=64, levels=NF4),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
  """An array in a format, in place of the plain one in a Param or a decoding state.

  `scale` has the rank of `codes`, and each of its dimensions divides that of the codes. Either may hold whatever
  stands for an array: a shape, a sharding, a Spec.
  """

  codes: jax.Array
  scale: jax.Array
  format: str = dataclasses.field(metadata={"static": True})

  @property
  def shape(self) -> tuple[int, ...]:
    return self.codes.shape

  @property
  def ndim(self) -> int:
    return len(self.shape)

  @property
  def dtype(self):
    """The dtype of the plain array before it is rounded to another."""
    return jnp.dtype("float32")

  def astype(self, dtype) -> jax.Array:
    """Decodes to the plain array, rounded once, from f32."""
    return (decode(self.codes, self.format) * spread(self.scale, self.shape)).astype(dtype)

  def __getitem__(self, index) -> "QTensor":
    """Selects rows of leading dimensions; `[...]`, which is how a Param is read, selects all."""
    dims = 0 if index is Ellipsis else len(index) if isinstance(index, tuple) else 1
    assert self.scale.shape[:dims] == self.shape[:dims], "rows that share a scale cannot be picked one by one"
    return jax.tree.map(lambda a: a[index], self)


def quantize(w: jax.Array, summed: Sequence[int], format: str) -> QTensor:
  """Quantises w to a format; `summed` are the dimensions that a matmul with it sums over.

  The scale is rounded before the codes are chosen, so the codes make up for its rounding, except that the largest
  element may be clipped. Raises UserError if the summed elements are no whole number of groups.
  """
  f, w = FORMATS[format], w.astype(jnp.float32)
  pairs = [n for size, parts in zip(w.shape, scale_shape(w.shape, summed, format)) for n in (parts, size // parts)]
  top = jnp.max(jnp.abs(w).reshape(pairs), axis=tuple(range(1, 2 * w.ndim, 2)))
  info = jnp.finfo(f.scale_dtype)
  # `reduce_precision` rounds the scale; XLA may leave out a cast there and back.
  scale = jax.lax.reduce_precision(top / f.top, info.nexp, info.nmant)
  # An all-zero group needs no scale. A value that is not finite makes the scale not finite, since no code can show it.
  scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1, scale)
  return QTensor(encode(w / spread(scale, w.shape), format), scale.astype(f.scale_dtype), format)


def scale_shape(shape: Sequence[int], summed: Sequence[int], format: str) -> list[int]:
  """The shape of an array's scale; a group fills the last summed dimension first, then those before it."""
  group, blocks = FORMATS[format].group, [1] * len(shape)
  left = math.prod(shape[i] for i in summed) if group is None else group
  for i in sorted((i % len(shape) for i in summed), reverse=True):
    blocks[i] = math.gcd(left, shape[i])
    left //= blocks[i]
    if blocks[i] < shape[i]:
      break
  if left > 1:
    size = " x ".join(str(shape[i]) for i in summed)
    raise UserError(f"{size} summed elements are no whole number of groups of {group}; use int8 or fp8")
  return [size // block for size, block in zip(shape, blocks)]


def encode(x: jax.Array, format: str) -> jax.Array:
  """Encodes numbers in [-top, top]; numbers outside are clipped."""
  f = FORMATS[format]
  x = jnp.clip(x, -f.top, f.top)
  if f.levels:
    middles = [(a + b) / 2 for a, b in zip(f.levels, f.levels[1:])]
    return sum((x > m).astype(jnp.int8) for m in middles).astype(f.dtype)
  return (jnp.round(x) if jnp.issubdtype(f.dtype, jnp.integer) else x).astype(f.dtype)


def decode(codes: jax.Array, format: str, dtype=jnp.float32) -> jax.Array:
  """Decodes to numbers without their scale, exactly in any float dtype except for the levels of NF4."""
  levels = FORMATS[format].levels
  return jnp.asarray(levels, dtype)[codes.astype(jnp.int32)] if levels else codes.astype(dtype)


def spread(scale: jax.Array, shape: Sequence[int]) -> jax.Array:
  """The scale in f32, repeated so that it broadcasts against codes of this shape."""
  scale = scale.astype(jnp.float32)
  for axis, (n, size) in enumerate(zip(scale.shape, shape, strict=True)):
    scale = jnp.repeat(scale, size // n, axis) if 1 < n < size else scale
  return scale


FEW_ROWS = 32  # with more rows, the product takes longer than decoding the matrix
BLOCK = 2**17  # elements of a decoded block: half a megabyte of f32, which stays in a core's cache


def matmul(equation: str, x: jax.Array, w: QTensor) -> jax.Array:
  """`jnp.einsum(equation, x, w)` of rows of activations with a matrix, accumulated and returned in f32.

  The equation names the rows first, as in "rd,dnh->rnh". XLA's CPU backend would write the decoded matrix to memory
  before it multiplies, at six times the cost of a matrix in f32; block by block, it stays in the cache.
  """
  lhs, rhs, out = equation.replace("->", ",").split(",")
  inside = any(n > 1 for n, c in zip(w.scale.shape, rhs, strict=True) if c in lhs)  # scales vary along the sum
  at_once = functools.partial(_product, equation, inside=inside)
  if x.shape[0] <= FEW_ROWS and w.codes.size > BLOCK:
    y = jax.lax.platform_dependent(x, w, cpu=functools.partial(_in_blocks, equation, at_once), default=at_once)
  else:
    y = at_once(x, w)
  if inside:
    return y
  scale = jnp.einsum(f"{rhs}->{''.join(c for c in out if c in rhs)}", w.scale.astype(jnp.float32))
  sizes = iter(scale.shape)
  return y * scale.reshape([next(sizes) if c in rhs else 1 for c in out])


def _product(equation: str, x: jax.Array, w: QTensor, *, inside: bool) -> jax.Array:
  """The product with the codes, or with the decoded matrix if the scale varies along the sum."""
  matrix = w.astype(x.dtype) if inside else decode(w.codes, w.format, x.dtype)
  return jnp.einsum(equation, x, matrix, preferred_element_type=jnp.float32)


def _in_blocks(equation: str, product: Callable, x: jax.Array, w: QTensor) -> jax.Array:
  """Computes the product in blocks of the matrix's first dimension, whose results are summed or concatenated."""
  lhs, rhs, out = equation.replace("->", ",").split(",")
  divisor = math.gcd(w.shape[0], *(n for n in w.scale.shape[:1] if n > 1))
  n = next(n for n in range(min(-(-w.codes.size // BLOCK), divisor), 0, -1) if divisor % n == 0)
  split_axis = lambda a, axis: jnp.moveaxis(a.reshape(*a.shape[:axis], n, -1, *a.shape[axis + 1 :]), axis, 0)
  scales = split_axis(w.scale, 0) if w.scale.shape[0] > 1 else jnp.broadcast_to(w.scale, (n, *w.scale.shape))
  blocks = dataclasses.replace(w, codes=split_axis(w.codes, 0), scale=scales)
  x = x.astype(jnp.float32)
  if rhs[0] in lhs:
    add_block = lambda y, pair: (y + product(*pair), None)
    shape = jax.eval_shape(product, x, w)
    return jax.lax.scan(add_block, jnp.zeros(shape.shape, shape.dtype), (split_axis(x, lhs.index(rhs[0])), blocks))[0]
  _, y = jax.lax.scan(lambda _, block: (None, product(x, block)), None, blocks)
  axis = out.index(rhs[0])
  y = jnp.moveaxis(y, 0, axis)
  return y.reshape(*y.shape[:axis], -1, *y.shape[axis + 2 :])


def nbytes(tree) -> int:
  """Bytes of a tree of arrays or shapes; two four-bit codes take one byte."""
  info_of = lambda dtype: jnp.iinfo(dtype) if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype)
  bits_of = lambda dtype: 8 if jnp.dtype(dtype) == jnp.bool_ else info_of(dtype).bits
  return sum(math.prod(a.shape) * bits_of(a.dtype) for a in jax.tree.leaves(tree)) // 8


def check_format(name: str, value: str | None) -> None:
  """Raises UserError unless the value is None or the name of a format."""
  check(value is None or value in FORMATS, f"{name}={value!r} is not a format (known: {', '.join(FORMATS)})")


def rounded_at_random(x: jax.Array, dtype, key: jax.Array) -> jax.Array:
  """Rounds f32 numbers to bfloat16 up or down at random, so that their mean is x; to float32, x itself.

  Rounding to the nearest would lose an update of less than half a unit in the last place, 2^-9 of the parameter, at
  every step (2010.06192). Random rounding keeps it on average, without a second copy of the parameter.
  """
  if dtype == jnp.float32:
    return x
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  cut = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
  return jnp.where(jnp.isfinite(x), cut, x).astype(dtype)
