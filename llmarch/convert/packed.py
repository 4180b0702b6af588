"""Releases whose weights are codes: each stored form is one row of FORMS, and each quant_method one row of METHODS.

A form names the tensors that stand for one matrix (codes, scales, zero points) and decodes some rows of it in f32:

  X.weight            fp8 [300, 200]
  X.weight_scale_inv  f32 [3, 2]      ->  X.weight bf16 [300, 200] = codes x scale, one scale a block of 128 x 128

Codes are read and decoded when their tensor is asked for; then the matrix is held, its codes, and a few rows in f32.
What the releases do to activations (rounding them to 8 bits) is not done here. Letters: O rows of a Linear's weight
[O, I], G groups along I.
"""

import dataclasses
import math
import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from llmarch.convert.safetensors import DTYPES, Tensor
from llmarch.errors import UserError, check

FP8, BYTES, WORDS, INDICES, FLOATS = ("F8_E4M3",), ("U8",), ("I32",), ("I32", "I64"), tuple(DTYPES)
# The values of 4 bits in a float with 2 bits of exponent and 1 of mantissa (OCP Microscaling 1.0, 5.3.3).
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
# The column of eight that each nibble of AWQ's words holds, from the lowest nibble on.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
CHUNK = 1 << 20  # elements that are decoded at once
# Scales of activations and of the cache of keys and values, which have no use where these are not rounded.
OF_ACTIVATIONS = re.compile(r".*[._](activation|input|output|[qkv])_(scale|zero_point)")


@dataclasses.dataclass(frozen=True)
class Sizes:
  """The numbers of a quantization_config that decoding needs.

  block: the rows and columns that share a scale; None: all. offset: what is added to a stored zero point, or subtracted
  from a code without one. needs: the roles of optional tensors that must be there.
  """

  bits: int = 8
  block: tuple[int | None, int | None] = (None, None)
  offset: int = 0
  needs: tuple[str, ...] = ()

  def __str__(self) -> str:
    rows, columns = self.block
    if columns is None:
      return "a scale for each matrix" if rows is None else "a scale for each row"
    return f"groups of {columns}" if rows == 1 else f"blocks of {rows} x {columns}"


@dataclasses.dataclass(frozen=True)
class Form:
  """A way to store a matrix of numbers as codes.

  ranks: the numbers of dimensions that codes may have. plain: the ending of the decoded tensor's name.
  parts: {role: (ending of the tensor's name, its dtypes)}; optional: the same for those that may be absent.
  shapes(sizes, tensors): the decoded shape, and the shape that each part must have.
  rows(sizes, parts, start, stop): these rows in f32, from the parts as arrays.
  turned: the decoded matrix has its rows last.
  """

  title: str  # {} stands for the number of bits
  ranks: tuple[int, ...]
  plain: str
  parts: Mapping[str, tuple[str, tuple[str, ...]]]
  shapes: Callable[[Sizes, dict[str, Tensor]], tuple[tuple[int, ...], dict[str, tuple[int, ...]]]]
  rows: Callable[[Sizes, dict[str, np.ndarray], int, int], np.ndarray]
  optional: Mapping[str, tuple[str, tuple[str, ...]]] = dataclasses.field(default_factory=dict)
  turned: bool = False

  def stem(self, tensor: Tensor) -> str | None:
    """The part of a name that all tensors of one matrix share; None: the tensor is of no matrix in this form."""
    codes, dtypes = self.parts["codes"]
    if tensor.name.endswith(codes) and tensor.dtype in dtypes:
      return tensor.name.removesuffix(codes)
    endings = [ending for ending, _ in (self.parts | self.optional).values() if ending != codes]
    return next((tensor.name.removesuffix(e) for e in endings if tensor.name.endswith(e)), None)


@dataclasses.dataclass(frozen=True)
class Packed:
  """A matrix that is stored as codes, with the face of a Tensor: `read` decodes it to `dtype`."""

  form: Form
  sizes: Sizes
  parts: dict[str, Tensor]
  name: str
  dtype: str  # one of DTYPES
  shape: tuple[int, ...]

  def __str__(self) -> str:
    return str(self.parts["codes"])

  @property
  def kind(self) -> str:
    """The form in a few words, such as "fp8 in blocks of 128 x 128"."""
    return f"{self.form.title.format(self.sizes.bits)} ({self.sizes})"

  def read(self) -> np.ndarray:
    """Reads the codes and decodes them, rounded once from f32. Raises UserError if a value is not finite."""
    parts = {role: tensor.read() for role, tensor in self.parts.items()}
    values = np.empty(self.shape, DTYPES[self.dtype])
    for index in np.ndindex(self.shape[:-2]):
      here = values[index].T if self.form.turned else values[index]
      inner = {role: part[index] for role, part in parts.items()} if index else parts
      step = max(1, CHUNK // (32 * here.shape[1])) * 32  # words of AWQ and GPTQ hold up to 16 rows
      for start in range(0, len(here), step):
        stop = min(start + step, len(here))
        with np.errstate(over="ignore", invalid="ignore"):
          here[start:stop] = self.form.rows(self.sizes, inner, start, stop).astype(values.dtype)
    finite = bool(np.isfinite(values).all())
    check(finite, f"{self} decodes to values that {values.dtype.name} cannot hold; restore the file")
    return values


# ----------------------------------------------------------------------------------------------------- forms


def _unpack(words: np.ndarray, bits: int) -> np.ndarray:
  """The codes of 32-bit words [R, W] as [R, W x 32 / bits], from the lowest bits on."""
  shifts = np.arange(0, 32, bits, dtype=np.uint32)
  codes = (np.ascontiguousarray(words).view(np.uint32)[..., None] >> shifts) & np.uint32(2**bits - 1)
  return codes.reshape(len(words), -1).astype(np.int32)


def _nibbles(codes: np.ndarray) -> np.ndarray:
  """The values of bytes [R, W] that hold two E2M1 numbers each, the lower half first: [R, 2 W]."""
  return E2M1[np.stack([codes & 15, codes >> 4], -1).reshape(len(codes), -1)]


def _powers(scale: np.ndarray) -> np.ndarray:
  """The powers of two of E8M0, stored as bytes; 255 is not a number."""
  return np.where(scale == 255, np.float32(np.nan), np.ldexp(np.float32(1), scale.astype(np.int32) - 127))


def _grid(sizes: Sizes, codes: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape of the scales of a matrix; blocks at its ends may be cut off, but groups of one row may not."""
  rows, columns = sizes.block
  check(rows != 1 or shape[-1] % (columns or 1) == 0, f"{codes} has {shape[-1]} columns, no whole number of {sizes}")
  return *shape[:-2], *(1 if block is None else -(-size // block) for size, block in zip(shape[-2:], sizes.block))


def _spread(sizes: Sizes, scale: np.ndarray, columns: int, start: int, stop: int) -> np.ndarray:
  """The scales (or zero points) of some rows of a matrix, one for each element, or for each of its rows."""
  rows, block = sizes.block
  scale = scale.reshape(1, 1) if scale.size == 1 else scale
  scale = scale[np.arange(start, stop) // rows] if rows else scale
  return np.repeat(scale, block, 1)[:, :columns] if block else scale


def _scaled(sizes: Sizes, codes: np.ndarray, part: dict[str, np.ndarray], start: int, stop: int) -> np.ndarray:
  columns, values = codes.shape[1], codes.astype(np.float32)
  if "zeros" in part:
    values -= _spread(sizes, part["zeros"], columns, start, stop).astype(np.float32)
  return values * _spread(sizes, part["scale"], columns, start, stop).astype(np.float32)


def _scaled_shapes(sizes: Sizes, tensors: dict[str, Tensor]):
  shape = tensors["codes"].shape
  grid = _grid(sizes, tensors["codes"], shape)
  one = math.prod(grid) == 1 and len(tensors["scale"].shape) < 2
  wanted = tensors["scale"].shape if one and math.prod(tensors["scale"].shape) == 1 else grid
  return shape, dict.fromkeys(tensors.keys() - {"codes"}, wanted)


def _scaled_rows(sizes: Sizes, part: dict[str, np.ndarray], start: int, stop: int) -> np.ndarray:
  return _scaled(sizes, part["codes"][start:stop], part, start, stop)


def _mxfp4_shapes(sizes: Sizes, tensors: dict[str, Tensor]):
  """Codes [E, O, G, 16] of two numbers each, scales [E, O, G]; decoded [E, 32 G, O]."""
  codes = tensors["codes"].shape
  check(codes[3] == 16, f"{tensors['codes']} has the shape {list(codes)}, not [., ., ., 16]; restore the file")
  return (codes[0], 32 * codes[2], codes[1]), {"scale": codes[:3]}


def _mxfp4_rows(sizes: Sizes, part: dict[str, np.ndarray], start: int, stop: int) -> np.ndarray:
  codes = part["codes"][start:stop]
  return _nibbles(codes.reshape(len(codes), -1)) * np.repeat(_powers(part["scale"][start:stop]), 32, 1)


def _nibble_shapes(sizes: Sizes, tensors: dict[str, Tensor]):
  rows, half = tensors["codes"].shape
  return (rows, 2 * half), {"scale": _grid(sizes, tensors["codes"], (rows, 2 * half))}


def _nibble_rows(sizes: Sizes, part: dict[str, np.ndarray], start: int, stop: int) -> np.ndarray:
  scale = {"scale": _powers(part["scale"])}
  return _scaled(sizes, _nibbles(part["codes"][start:stop]), scale, start, stop)


def _word_shapes(sizes: Sizes, tensors: dict[str, Tensor]):
  """Words [O, I bits / 32], whose last one may be filled up; the true [O, I] is stored beside them."""
  sides = tensors["shape"]
  check(sides.shape == (2,), f"{sides} must hold two sizes; restore the file")
  shape = tuple(map(int, sides.read()))
  words = (shape[0], -(-shape[1] * sizes.bits // 32))
  fits = min(shape) > 0 and words == tensors["codes"].shape
  check(fits, f"{sides} says {list(shape)}, which {list(tensors['codes'].shape)} words cannot hold; restore the file")
  grid = _grid(sizes, tensors["codes"], shape)
  packed = (-(-grid[0] * sizes.bits // 32), grid[1])
  return shape, {"shape": (2,), "scale": grid, "zeros": packed, "groups": (shape[1],)}


def _word_rows(sizes: Sizes, part: dict[str, np.ndarray], start: int, stop: int) -> np.ndarray:
  columns = int(part["shape"][1])
  codes = _unpack(part["codes"][start:stop], sizes.bits)[:, :columns]
  if "zeros" in part:
    part = part | {"zeros": _unpack(part["zeros"].T, sizes.bits).T}
  else:
    codes = codes - sizes.offset
  if "groups" in part and (part["groups"] != -1).any():  # -1 stands for groups of neighbours
    groups = _groups(part["groups"], part["scale"].shape[1])
    sizes = dataclasses.replace(sizes, block=(sizes.block[0], 1))
    part = {role: array[:, groups] if role in ("scale", "zeros") else array for role, array in part.items()}
  return _scaled(sizes, codes, part, start, stop)


def _groups(groups: np.ndarray, count: int) -> np.ndarray:
  fits = groups.min() >= 0 and groups.max() < count
  check(fits, f"g_idx names groups from {groups.min()} to {groups.max()}, where there are {count}; restore the file")
  return groups


def _turned_groups(sizes: Sizes, rows: int, tensors: dict[str, Tensor]) -> int:
  """The number of groups along I, where scales [G, O] may be of one more that is cut off."""
  return 1 if sizes.block[1] is None else -(-rows // sizes.block[1])


def _gptq_shapes(sizes: Sizes, tensors: dict[str, Tensor]):
  """Words [I bits / 32, O], zeros [G, O bits / 32], scales [G, O]; decoded [O, I]."""
  words, columns = tensors["codes"].shape
  rows = words * 32 // sizes.bits
  groups = _turned_groups(sizes, rows, tensors)
  zeros = (groups, columns * sizes.bits // 32)
  return (columns, rows), {"scale": (groups, columns), "zeros": zeros, "groups": (rows,)}


def _gptq_rows(sizes: Sizes, part: dict[str, np.ndarray], start: int, stop: int) -> np.ndarray:
  codes = _unpack(part["codes"][:, start:stop].T, sizes.bits)
  scale = part["scale"][:, start:stop].T.astype(np.float32)
  word = 32 // sizes.bits
  zeros = _unpack(part["zeros"][:, start // word : -(-stop // word)], sizes.bits)[:, : stop - start].T
  zeros = (zeros + sizes.offset) & (2**sizes.bits - 1)
  columns = codes.shape[1]
  if "groups" in part:
    groups = _groups(part["groups"], scale.shape[1])
  else:
    groups = np.arange(columns) // (sizes.block[1] or columns)
  return (codes - zeros[:, groups]).astype(np.float32) * scale[:, groups]


def _awq_shapes(sizes: Sizes, tensors: dict[str, Tensor]):
  """Words [I, O / 8], zeros [G, O / 8], scales [G, O]; decoded [O, I]."""
  rows, words = tensors["codes"].shape
  groups, group = _turned_groups(sizes, rows, tensors), sizes.block[1] or rows
  check(groups * group == rows, f"{tensors['codes']} has {rows} rows, no whole number of groups of {group}")
  return (8 * words, rows), {"scale": (groups, 8 * words), "zeros": (groups, words)}


def _awq_rows(sizes: Sizes, part: dict[str, np.ndarray], start: int, stop: int) -> np.ndarray:
  order = np.argsort(AWQ_ORDER)
  unpack = lambda words: _unpack(words, 4).reshape(len(words), -1, 8)[..., order].reshape(len(words), -1)
  words = slice(start // 8, stop // 8)
  scale, zeros = part["scale"][:, start:stop].astype(np.float32), unpack(part["zeros"][:, words])
  codes = unpack(part["codes"][:, words])
  groups = np.arange(len(codes)) // (sizes.block[1] or len(codes))
  return ((codes - zeros[groups]).astype(np.float32) * scale[groups]).T


_WORDS = {"codes": (".qweight", WORDS), "zeros": (".qzeros", WORDS), "scale": (".scales", FLOATS)}

FORMS = {
  "fp8": Form(
    "fp8", (2, 3), "", {"codes": ("", FP8), "scale": ("_scale_inv", (*FLOATS, "F8_E8M0"))}, _scaled_shapes, _scaled_rows
  ),
  "mxfp4": Form(
    "mxfp4",
    (4,),
    "",
    {"codes": ("_blocks", BYTES), "scale": ("_scales", BYTES)},
    _mxfp4_shapes,
    _mxfp4_rows,
    turned=True,
  ),
  "gptq": Form("{}-bit gptq", (2,), ".weight", _WORDS, _gptq_shapes, _gptq_rows, {"groups": (".g_idx", INDICES)}),
  "awq": Form("{}-bit awq", (2,), ".weight", _WORDS, _awq_shapes, _awq_rows),
  "int-quantized": Form(
    "int{}",
    (2,),
    ".weight",
    {"codes": (".weight", ("I8",)), "scale": (".weight_scale", FLOATS)},
    _scaled_shapes,
    _scaled_rows,
    {"zeros": (".weight_zero_point", ("I8",))},
  ),
  "float-quantized": Form(
    "fp8",
    (2,),
    ".weight",
    {"codes": (".weight", FP8), "scale": (".weight_scale", FLOATS)},
    _scaled_shapes,
    _scaled_rows,
  ),
  "pack-quantized": Form(
    "packed int{}",
    (2,),
    ".weight",
    {"codes": (".weight_packed", WORDS), "scale": (".weight_scale", FLOATS), "shape": (".weight_shape", INDICES)},
    _word_shapes,
    _word_rows,
    {"zeros": (".weight_zero_point", WORDS), "groups": (".weight_g_idx", INDICES)},
  ),
  "mxfp4-pack-quantized": Form(
    "mxfp4",
    (2,),
    ".weight",
    {"codes": (".weight_packed", BYTES), "scale": (".weight_scale", BYTES)},
    _nibble_shapes,
    _nibble_rows,
  ),
}


# --------------------------------------------------------------------------------------------------- configs


@dataclasses.dataclass(frozen=True)
class Names:
  """The modules that a list of a quantization_config names: by whole names, last words, or patterns."""

  words: frozenset[str]
  patterns: re.Pattern
  starts: re.Pattern  # those marked "re:"

  @classmethod
  def of(cls, entries: list[str]) -> "Names":
    """Raises re.error if a pattern is none."""
    globs = ["(.*[.])?" + ".*".join(map(re.escape, entry.split("*"))) for entry in entries if "*" in entry]
    marked = [entry.removeprefix("re:") for entry in entries if entry.startswith("re:")]
    never = "(?!)"
    return cls(
      frozenset(entry for entry in entries if "*" not in entry),
      re.compile("|".join(f"(?:{glob})(?:[.].*)?" for glob in globs) or never),
      re.compile("|".join(f"(?:{pattern})" for pattern in marked) or never),
    )

  def __contains__(self, stem: str) -> bool:
    """True for a module that is named, and for one inside it."""
    name = stem.removesuffix(".weight")
    words = name.split(".")
    spans = (".".join(words[i:j]) for j in range(len(words), 0, -1) for i in range(j))
    named = not self.words.isdisjoint(spans) or self.patterns.fullmatch(name) or self.starts.match(name)
    return bool(named)


@dataclasses.dataclass(frozen=True)
class Coding:
  """A quantization_config that has been read.

  groups: (modules, form, sizes) each; a module belongs to the first group that names it, or else to the first for all
  (None). plain: the modules whose weights are stored as numbers. activations: what the release does to
  activations, which is not done here.
  """

  groups: tuple[tuple[Names | None, Form, Sizes], ...]
  plain: Names
  activations: str | None = None

  @classmethod
  def of(cls, config: Any) -> "Coding":
    """Raises UserError, which names what is missing, unless the tables hold all that it says."""
    check(isinstance(config, dict), f"{config!r} must be a dict")
    producer = config.get("producer")
    method = config.get("quant_method") or (producer.get("name") if isinstance(producer, dict) else None)
    known = ", ".join(METHODS)
    said = f"quant_method={method!r} is not among those that are read ({known}); save the weights dequantised"
    check(isinstance(method, str) and method in METHODS, said)
    options = _Options(config, f"quant_method={method!r}")
    coding = METHODS[method](options)
    options.check_rest()
    return coding

  def decoded(self, tensors: dict[str, Tensor], dtype: str) -> dict[str, Tensor | Packed]:
    """All tensors of a folder by name, where a matrix replaces the tensors of its codes. Raises UserError.

    dtype: that of the decoded matrices, one of "float32", "float16" and "bfloat16".
    """
    stored = next(name for name, of in DTYPES.items() if of.name == dtype)
    forms = {id(form): form for _, form, _ in self.groups}.values()
    tensors = {name: tensor for name, tensor in tensors.items() if not OF_ACTIVATIONS.fullmatch(name)}
    stems = dict.fromkeys(stem for t in tensors.values() for form in forms if (stem := form.stem(t)) is not None)
    found, used = {}, set()
    for stem in stems:
      form, sizes = self._group(stem)
      packed = _packed(stem, form, sizes, tensors, stored)
      check(stem not in self.plain, f"{packed} holds codes, but is among the modules that are said not to be converted")
      used |= {tensor.name for tensor in packed.parts.values()}
      twin = packed.name in tensors and packed.name not in used
      check(not twin, f"{packed} stands for {packed.name}, which is there as well; remove one of them")
      found[packed.name] = packed
    return {name: tensor for name, tensor in tensors.items() if name not in used} | found

  def _group(self, stem: str) -> tuple[Form, Sizes]:
    named = [group for group in self.groups if group[0] and stem in group[0]]
    others = [group for group in self.groups if group[0] is None]
    check(bool(named + others), f"{stem} holds codes, but no group of quantization_config is for it")
    return (named + others)[0][1:]


def _packed(stem: str, form: Form, sizes: Sizes, tensors: dict[str, Tensor], dtype: str) -> Packed:
  """The matrix of a stem. Raises UserError unless all of its tensors are there, in their dtypes and shapes."""
  parts = {}
  for role, (ending, dtypes) in (form.parts | form.optional).items():
    tensor = tensors.get(stem + ending)
    if tensor is None:
      there = next(tensors[stem + e] for e, _ in (form.parts | form.optional).values() if stem + e in tensors)
      needless = role in form.optional and role not in sizes.needs
      check(needless, f"{there} needs {stem + ending}, which is missing; restore the file")
      continue
    check(tensor.dtype in dtypes, f"{tensor} has the dtype {tensor.dtype}, which must be {' or '.join(dtypes)} here")
    parts[role] = tensor
  codes = parts["codes"]
  fits = len(codes.shape) in form.ranks and math.prod(codes.shape) > 0
  kind = form.title.format(sizes.bits)
  check(fits, f"{codes} has the shape {list(codes.shape)}, which is none of {kind}; restore the file")
  shape, wanted = form.shapes(sizes, parts)
  for role, tensor in parts.items():
    right = wanted.get(role, tensor.shape)
    said = f"{tensor} has the shape {list(tensor.shape)}, where {codes.name} {list(codes.shape)} needs {list(right)}"
    check(tensor.shape == right, said)
  return Packed(form, sizes, parts, stem + form.plain, dtype, shape)


class _Options:
  """The options of a quantization_config. It notes which are asked for, so that no other is silently ignored."""

  def __init__(self, options: Any, where: str):
    check(isinstance(options, dict), f"{where} must be a dict, not {options!r}")
    self.options, self.where = options, where
    self.used = {"quant_method"}

  def get(self, key: str, default: Any = None) -> Any:
    self.used.add(key)
    value = self.options.get(key)
    return default if value is None else value

  def one_of(self, key: str, *known: Any) -> Any:
    """An option that has one of the values, the first by default."""
    value = self.get(key, known[0])
    said = f"{key}={value!r} of {self.where} is not read; it is known with {', '.join(map(repr, known))}"
    check(any(type(value) is type(k) and value == k for k in known), said)
    return value

  def size(self, key: str, default: int | None = None) -> int | None:
    """The size of a group; -1 stands for all."""
    value = self.get(key, default)
    right = value is None or (type(value) is int and (value == -1 or 0 < value < 2**31))
    check(right, f"{key}={value!r} of {self.where} must be a whole number above 0, or -1")
    return None if value == -1 else value

  def list_of(self, key: str) -> list[str]:
    value = self.get(key, [])
    right = isinstance(value, list) and all(isinstance(name, str) and name for name in value)
    check(right, f"{key}={value!r} of {self.where} must be a list of names")
    return value

  def names(self, key: str) -> Names:
    try:
      return Names.of(self.list_of(key))
    except re.error as e:
      raise UserError(f"{key} of {self.where} has the pattern {e.pattern!r}, which is none ({e})") from None

  def skip(self, text: str) -> None:
    """Passes over options that do not change how weights are decoded."""
    self.used |= set(text.split())

  def check_rest(self) -> None:
    rest = {k: v for k, v in self.options.items() if k not in self.used and not (v is None or v is False)}
    said = ", ".join(f"{key}={reprlib.repr(value)}" for key, value in sorted(rest.items()) if value not in ([], {}))
    check(not said, f"{said} of {self.where} is not known; save the weights dequantised")


def _fp8(o: _Options) -> Coding:
  o.one_of("fmt", "e4m3", "float8_e4m3fn")
  o.one_of("scale_fmt", "float", "ue8m0")
  o.skip("dequantize")
  block = _block(o, "weight_block_size")
  scheme = o.one_of("activation_scheme", "dynamic", "static")
  sizes = Sizes(8, block or (None, None))
  return Coding(((None, FORMS["fp8"], sizes),), o.names("modules_to_not_convert"), f"fp8, {scheme}")


def _block(o: _Options, key: str) -> tuple[int, int] | None:
  value = o.get(key)
  if value is None:
    return None
  right = isinstance(value, list) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)
  check(right, f"{key}={value!r} of {o.where} must be two whole numbers above 0")
  return tuple(value)


def _mxfp4(o: _Options) -> Coding:
  o.skip("dequantize")
  return Coding(((None, FORMS["mxfp4"], Sizes(4, (1, 32))),), o.names("modules_to_not_convert"))


def _gptq(o: _Options) -> Coding:
  """In the first version of the format, zero points are stored minus one."""
  bits = o.one_of("bits", 4, 2, 8)
  version = o.one_of("checkpoint_format", o.one_of("format", "gptq", "gptq_v2"), "gptq", "gptq_v2")
  o.one_of("pack_dtype", "int32")
  o.skip(
    "sym damp_percent damp_auto_increment static_groups true_sequential model_name_or_path lm_head meta"
    " model_file_base_name quantizer backend use_exllama exllama_config disable_exllama max_input_length dataset"
    " tokenizer cache_block_outputs modules_in_block_to_quantize batch_size pad_token_id use_cuda_fp16 model_seqlen"
    " block_name_to_quantize module_name_preceding_first_block act_group_aware mse hyb_act"
  )
  needs = ("groups",) if o.one_of("desc_act", False, True) else ()
  sizes = Sizes(bits, (1, o.size("group_size", 128)), 1 if version == "gptq" else 0, needs)
  return Coding(((None, FORMS["gptq"], sizes),), Names.of([]))


def _awq(o: _Options) -> Coding:
  o.one_of("bits", 4)
  o.one_of("zero_point", True)
  version = o.get("version", "gemm")
  check(str(version).lower() == "gemm", f"version={version!r} of {o.where} is not read; it is known with 'gemm'")
  o.one_of("backend", "autoawq")
  for key in ("format", "checkpoint_format"):
    o.one_of(key, "gemm")
  o.one_of("pack_dtype", "int32")
  o.skip("do_fuse fuse_max_seq_len modules_to_fuse exllama_config lm_head meta sym desc_act")
  sizes = Sizes(4, (1, o.size("group_size", 128)))
  return Coding(((None, FORMS["awq"], sizes),), o.names("modules_to_not_convert"))


def _modelopt(o: _Options) -> Coding:
  """NVIDIA's Model Optimizer: fp8 with a scale for each matrix. It may leave out quant_method, but names itself."""
  o.one_of("quant_algo", "FP8")
  o.skip("producer kv_cache_scheme kv_cache_quant_algo config_groups")
  names = Names.of(o.list_of("ignore") + o.list_of("exclude_modules"))
  return Coding(((None, FORMS["float-quantized"], Sizes()),), names, "fp8, static")


def _compressed(o: _Options) -> Coding:
  o.one_of("quantization_status", "compressed")
  o.skip("global_compression_ratio kv_cache_scheme version")
  whole, groups, rounded = o.get("format"), o.get("config_groups", {}), set()
  check(isinstance(groups, dict) and bool(groups), f"config_groups={groups!r} of {o.where} must have a group")
  found = []
  for name, group in groups.items():
    g = _Options(group, f"config_groups.{name}")
    form = g.get("format", whole)
    w = _Options(g.get("weights"), f"config_groups.{name}.weights")
    targets = g.list_of("targets")
    # A class of modules, such as "Linear", stands for all: the tensors show which are matrices of codes.
    to_all = not targets or any(target[0].isupper() for target in targets)
    kind, sizes = _compressed_sizes(w, form)
    found.append((None if to_all else g.names("targets"), FORMS[kind], sizes))
    inputs = _Options(g.get("input_activations", {}), f"config_groups.{name}.input_activations").options
    if inputs:
      rounded.add(f"{inputs.get('num_bits')} bits, {'dynamic' if inputs.get('dynamic') else 'static'}")
    g.skip("output_activations")
    w.check_rest()
    g.check_rest()
  return Coding(tuple(found), o.names("ignore"), "; ".join(sorted(rounded)) or None)


def _compressed_sizes(w: _Options, form: Any) -> tuple[str, Sizes]:
  """The form and the sizes of a group of weights, which "naive-quantized" leaves to their type."""
  kind, bits = w.one_of("type", "int", "float"), w.get("num_bits")
  form = {"int": "int-quantized", "float": "float-quantized"}[kind] if form == "naive-quantized" else form
  known = {
    "int-quantized": ("int", (8,)),
    "float-quantized": ("float", (8,)),
    "pack-quantized": ("int", (2, 4, 8)),
    "mxfp4-pack-quantized": ("float", (4,)),
  }
  said = f"format={form!r} of {w.where} is not read; it is known with {', '.join(known)}"
  check(form in known, f"{said}; save the weights dequantised")
  right = kind == known[form][0] and type(bits) is int and bits in known[form][1]
  check(right, f"num_bits={bits!r} and type={kind!r} of {w.where} are not read in the format {form!r}")
  w.one_of("dynamic", False)
  w.skip("observer observer_kwargs scale_dtype zp_dtype")
  order = w.one_of("actorder", "static", "weight", "group", "dynamic")
  needs = () if w.one_of("symmetric", True, False) else ("zeros",)
  needs += ("groups",) if order in ("group", "dynamic") else ()
  group, block = w.size("group_size"), _block(w, "block_structure")
  strategy = w.one_of("strategy", "group" if group else "channel" if block is None else "block",
                      "tensor", "channel", "group", "block")  # fmt: skip
  missing = (strategy == "group" and not group) or (strategy == "block" and not block)
  check(not missing, f"strategy={strategy!r} of {w.where} needs group_size or block_structure, which is missing")
  blocks = {"tensor": (None, None), "channel": (1, None), "group": (1, group), "block": block}
  return form, Sizes(bits, blocks[strategy], 2 ** (bits - 1), needs)


METHODS: dict[str, Callable[[_Options], Coding]] = {
  "fp8": _fp8,
  "mxfp4": _mxfp4,
  "gptq": _gptq,
  "awq": _awq,
  "compressed-tensors": _compressed,
  "modelopt": _modelopt,
}
