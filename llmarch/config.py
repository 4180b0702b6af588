"""Architectures as data: small frozen dataclasses, and the one place where plain dicts become them.

A component's config holds only what that component reads. Alternatives with parameters of their own
(positions, norms, mixers ...) are `Variant` families: `{"kind": "rope", "theta": 1e4}` in a dict,
`RoPE(theta=1e4)` in Python. This module imports the standard library alone; a component's config sits
beside its layer and registers itself in its family when that layer is imported.
"""

import ast
import dataclasses
import difflib
import functools
import importlib.util
import math
import os
import re
import traceback
import types
import typing
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

config_dataclass = dataclasses.dataclass(frozen=True, kw_only=True)


class UserError(ValueError):
  """Bad input. The message is one sentence that names the field or file and the mend."""

  exit_code = 2  # of the command


class FrozenDict(dict):
  """A dict that can sit in a frozen config: hashable, never mutated after construction."""

  def __hash__(self):
    return hash(tuple(self.items()))

  def _refuse(self, *args, **kwargs):
    raise TypeError("a config is immutable; use dataclasses.replace")

  __setitem__ = __delitem__ = update = pop = clear = setdefault = popitem = __ior__ = _refuse

  def __reduce__(self):  # copying and pickling would set items
    return FrozenDict, (dict(self),)


class Variant:
  """Root of a family of alternative configs. `class RoPE(PositionConfig, kind="rope")` joins one."""

  kind: ClassVar[str] = ""
  variants: ClassVar[dict[str, type]] = {}

  def __init_subclass__(cls, kind: str = "", **kwargs):
    super().__init_subclass__(**kwargs)
    if kind:
      cls.kind = kind
      cls.variants[kind] = cls
    else:
      cls.variants = {}


# --------------------------------------------------------------------------- checks shared by configs


def check(condition: bool, sentence: str) -> None:
  """Raises UserError(sentence) unless the condition holds; `build` prefixes the path of the config."""
  if not condition:
    raise UserError(sentence)


def check_at_least(config: Any, low: float, *names: str) -> None:
  """Each named field is None or at least `low`."""
  for name in names:
    value = getattr(config, name)
    check(value is None or value >= low, f"{name} must be at least {low}, got {value}")


def check_above(config: Any, low: float, *names: str) -> None:
  """Each named field is None or greater than `low`."""
  for name in names:
    value = getattr(config, name)
    check(value is None or value > low, f"{name} must be greater than {low}, got {value}")


def check_rate(config: Any, *names: str) -> None:
  """Each named field lies in [0, 1)."""
  for name in names:
    value = getattr(config, name)
    check(0 <= value < 1, f"{name} must be at least 0 and below 1, got {value}")


# --------------------------------------------------------------------------------------- the families


class NormConfig(Variant):
  """A normalisation; see layers/norm.py."""


class PositionConfig(Variant):
  """A position scheme, inside attention or at the embedding; see layers/position.py."""


class ScalingConfig(Variant):
  """A context extension of RoPE; see layers/position.py."""


class MixerConfig(Variant):
  """A token mixer; see layers/attention.py."""


class FFNConfig(Variant):
  """A feed-forward; see layers/ffn.py."""


class InitConfig(Variant):
  """A distribution for weight matrices. `std(fan_in, fan_out)` is its standard deviation."""


@config_dataclass
class FanIn(InitConfig, kind="fan_in"):
  """Truncated normal of standard deviation gain / sqrt(fan_in)."""

  gain: float = 1.0

  def __post_init__(self):
    check_at_least(self, 0, "gain")

  def std(self, fan_in: int, fan_out: int) -> float:
    return self.gain / math.sqrt(fan_in)


@config_dataclass
class Normal(InitConfig, kind="normal"):
  """Truncated normal of one standard deviation for every matrix (GPT-2: 0.02)."""

  stddev: float = 0.02

  def __post_init__(self):
    check_at_least(self, 0, "stddev")

  def std(self, fan_in: int, fan_out: int) -> float:
    return self.stddev


@config_dataclass
class Xavier(InitConfig, kind="xavier"):
  """Truncated normal of standard deviation gain * sqrt(2 / (fan_in + fan_out)) (Glorot and Bengio 2010)."""

  gain: float = 1.0

  def __post_init__(self):
    check_at_least(self, 0, "gain")

  def std(self, fan_in: int, fan_out: int) -> float:
    return self.gain * math.sqrt(2 / (fan_in + fan_out))


# ----------------------------------------------------------------------------------- the architecture

Residual = Literal["pre", "post", "sandwich", "output", "parallel", "parallel_two_norms"]


@config_dataclass
class BlockConfig:
  """A token mixer and a feed-forward on a residual stream. With f either of them and a, m the scales:

  pre       x = a x + m f(norm(x))
  post      x = norm(a x + m f(x))              DeepNorm: skip_scale = a, init_scale = beta (2203.00555)
  sandwich  x = a x + m norm'(f(norm(x)))       Gemma 2, Grok
  output    x = a x + m norm(f(x))              OLMo 2
  parallel  x = a x + m (mixer(h) + ffn(h)), h = norm(x)           GPT-J, PaLM
  parallel_two_norms   the same, with a norm for each branch       GPT-NeoX, Falcon-40B
  """

  mixer: MixerConfig
  ffn: FFNConfig | None
  norm: NormConfig
  residual: Residual = "pre"
  skip_scale: float = 1.0  # a
  branch_scale: float = 1.0  # m (Granite's residual multiplier)
  dropout: float = 0.0  # on each branch, before it joins the stream
  init_scale: float = 1.0  # times the init of the value, output and feed-forward matrices (DeepNorm's beta)
  output_init_scale: float = 1.0  # times the init of the matrices that write the stream (GPT-2: 1/sqrt(2L))

  def __post_init__(self):
    check_rate(self, "dropout")
    check_above(self, 0, "init_scale", "output_init_scale")
    check(
      self.ffn is not None or not self.residual.startswith("parallel"),
      f"residual={self.residual!r} runs the mixer beside a feed-forward; give ffn, or use residual='pre'",
    )


@config_dataclass
class EmbedConfig:
  """tokens -> residual stream: dropout(norm(scale * table[tokens] + position)).

  With `dim`, the table has that width, a matrix leads from it to d_model, and one back before the head (OPT-350M).
  """

  scale: float = 1.0  # Gemma and the original Transformer: sqrt(d_model)
  norm: NormConfig | None = None  # BLOOM
  position: PositionConfig | None = None  # Sinusoidal or Learned: added here, once
  dropout: float = 0.0
  dim: int | None = None  # None: d_model

  def __post_init__(self):
    check_rate(self, "dropout")
    check_at_least(self, 1, "dim")


@config_dataclass
class HeadConfig:
  """residual stream -> logits: softcap(scale * (x @ table + bias))."""

  tied: bool = True  # the embedding table read the other way
  bias: bool = False  # GPT-J
  scale: float = 1.0  # Granite: 1 / logits_scaling
  softcap: float | None = None  # Gemma 2: 30

  def __post_init__(self):
    check_above(self, 0, "softcap")


DType = Literal["float32", "bfloat16", "float16"]
StateDType = Literal["float32", "bfloat16", "float16", "int8", "fp8", "int8_channel", "fp8_channel"]


@config_dataclass
class Precision:
  """dtype of the parameters at rest, of the residual stream and matmuls, and of the decoding state.

  state: "int8" and "fp8" (e4m3) hold each token's keys and values as codes with a scale a token and head; with
  "_channel", the keys' scales are by channel, and the newest 32 tokens are kept in bfloat16 (ops/kivi.py).
  """

  param: DType = "float32"
  compute: DType = "float32"
  state: StateDType = "float32"


@config_dataclass
class ModelConfig:
  """A decoder. `stack` orders the named blocks: "3*dense 2*(5*local global)" (see parse_stack)."""

  d_model: int
  vocab_size: int
  max_seq_len: int
  stack: str
  blocks: dict[str, BlockConfig]
  embed: EmbedConfig = EmbedConfig()
  head: HeadConfig = HeadConfig()
  final_norm: NormConfig | None = None
  init: InitConfig = FanIn()
  embed_init: InitConfig = Normal(stddev=0.02)  # fan_in is d_model here: FanIn gives std 1/sqrt(d_model)
  precision: Precision = Precision()

  def __post_init__(self):
    object.__setattr__(self, "blocks", FrozenDict(self.blocks))
    check_at_least(self, 1, "d_model", "vocab_size", "max_seq_len")
    used = set(self.layers)
    for name in used - set(self.blocks):
      raise UserError(f"stack names the block {name!r}, which is not in blocks{nearest(name, self.blocks)}")
    for name in set(self.blocks) - used:
      raise UserError(f"blocks.{name} is not used by stack={self.stack!r}; add it there or drop it")
    at_embedding = self.embed.position
    check(
      at_embedding is None or getattr(at_embedding, "at_embedding", False),
      f"embed.position must be sinusoidal or learned, got {at_embedding and at_embedding.kind!r}; give the"
      " others to a block's mixer",
    )
    if at_embedding is not None:
      at_embedding.check_against(self.d_model, self.max_seq_len)
    for name, block in self.blocks.items():
      for part in ("mixer", "ffn"):
        if hasattr(getattr(block, part), "check_against"):
          try:
            getattr(block, part).check_against(self.d_model, self.max_seq_len)
          except UserError as e:
            raise UserError(f"blocks.{name}.{part}.{e}") from None

  @functools.cached_property
  def segments(self) -> tuple[tuple[tuple[str, ...], int], ...]:
    return parse_stack(self.stack)

  @functools.cached_property
  def layers(self) -> tuple[str, ...]:
    """Block names from the bottom to the top."""
    return tuple(name for pattern, repeat in self.segments for name in pattern * repeat)


MAX_LAYERS = 100_000  # so that a slip of the finger cannot fill the memory


def parse_stack(text: str) -> tuple[tuple[tuple[str, ...], int], ...]:
  """The order of layers as ((pattern of block names, repeats), ...); each term becomes one scan.

  >>> parse_stack("3*dense 2*(2*local global)")
  ((('dense',), 3), (('local', 'local', 'global'), 2))

  Raises UserError for anything that is not `term term ...`, term = [count*](name | "(" stack ")").
  """
  tokens = re.findall(r"\d{1,9}\s*\*|[()]|[A-Za-z_]\w*|\S", text, re.ASCII)
  position = 0

  def fail(what):
    raise UserError(f"stack={text!r}: {what}; write it as '13*(local global)' or '3*dense 58*moe'")

  def terms(depth):
    nonlocal position
    if depth > 50:
      fail("its parentheses go more than 50 deep")
    found = []
    while position < len(tokens) and tokens[position] != ")":
      count = 1
      if re.fullmatch(r"\d+\s*\*", tokens[position]):
        count = int(tokens[position][:-1])
        position += 1
      if position == len(tokens):
        fail("it ends after a count")
      if count < 1:
        fail("a count must be at least 1")
      token = tokens[position]
      position += 1
      if token == "(":
        inner = terms(depth + 1)
        if position == len(tokens):
          fail("a '(' is never closed")
        position += 1
        pattern = tuple(name for names, n in inner for name in names * n)
      elif re.fullmatch(r"[A-Za-z_]\w*", token):
        pattern = (token,)
      else:
        fail(f"{token!r} is out of place")
      if len(pattern) * count > MAX_LAYERS:
        fail(f"it has more than {MAX_LAYERS} layers")
      found.append((pattern, count))
    if depth == 0 and position < len(tokens):
      fail("a ')' has no '('")
    if not found:
      fail("it names no block")
    return found

  return tuple(terms(0))


# --------------------------------------------------------------------------------- dicts <-> dataclasses


def nearest(name: str, known) -> str:
  """'; did you mean 'x'?' where there is a near name, else the known names."""
  close = difflib.get_close_matches(name, list(known), n=1)
  return f"; did you mean {close[0]!r}?" if close else f" (known: {', '.join(sorted(known))})"


def build(annotation: Any, value: Any, path: str = "config") -> Any:
  """Turns plain data into the annotated type, strictly. The only door from dicts to configs.

  Raises UserError naming the path for an unknown key (with the nearest valid name), a missing value, a
  wrong type, a non-finite number, an unknown kind, and whatever the config itself refuses.
  """
  origin, args = typing.get_origin(annotation), typing.get_args(annotation)
  if origin in (typing.Union, types.UnionType):
    if value is None and type(None) in args:
      return None
    (inner,) = [a for a in args if a is not type(None)]
    return build(inner, value, path)
  if origin is Literal:
    if value is None and "none" in args:  # a command line's `none` where it is a word like any other
      value = "none"
    if value not in args:
      suffix = nearest(value, args) if isinstance(value, str) else f" (known: {', '.join(map(str, args))})"
      raise UserError(f"{path}: unknown value {value!r}{suffix}")
    return value
  if origin is dict:
    if not isinstance(value, Mapping):
      raise UserError(f"{path} must be a dict, got {value!r}")
    for k in value:
      check(isinstance(k, str), f"{path} has the key {k!r}; give it a name, in quotes")
    return FrozenDict({k: build(args[1], v, f"{path}.{k}") for k, v in value.items()})
  if origin is tuple:
    if not isinstance(value, (list, tuple)):
      raise UserError(f"{path} must be a list, got {value!r}")
    return tuple(build(args[0], v, f"{path}[{i}]") for i, v in enumerate(value))
  if annotation in (bool, int, float, str):
    return _scalar(annotation, value, path)
  return _dataclass(annotation, value, path)


def _scalar(annotation, value, path):
  if annotation is float and type(value) is int:
    value = float(value) if abs(value) < 2**1023 else math.inf
  if type(value) is not annotation:
    raise UserError(f"{path} must be of type {annotation.__name__}, got {value!r}")
  if annotation is float and not math.isfinite(value):
    raise UserError(f"{path} must be a finite number, got {value}")
  return value


def _dataclass(annotation, value, path):
  if isinstance(value, annotation):
    return value
  if issubclass(annotation, Variant) and not dataclasses.is_dataclass(annotation):
    value = {"kind": value} if isinstance(value, str) else value
    if not isinstance(value, Mapping) or "kind" not in value:
      raise UserError(f"{path} must name its kind, one of {', '.join(sorted(annotation.variants))}; got {value!r}")
    kind = value["kind"]
    if not isinstance(kind, str) or kind not in annotation.variants:
      raise UserError(f"{path}.kind: unknown kind {kind!r}{nearest(str(kind), annotation.variants)}")
    annotation = annotation.variants[kind]
  if not isinstance(value, Mapping):
    raise UserError(f"{path} must be a dict of {annotation.__name__}, got {value!r}")
  if issubclass(annotation, Variant) and value.get("kind") == annotation.kind:  # told, or the only one there can be
    value = {k: v for k, v in value.items() if k != "kind"}
  fields = {f.name: f for f in dataclasses.fields(annotation)}
  hints = typing.get_type_hints(annotation)
  for key in value:
    if key not in fields:
      raise UserError(f"{path}.{key}: no such key{nearest(str(key), fields)}")
  built = {key: build(hints[key], v, f"{path}.{key}") for key, v in value.items()}
  for name, f in fields.items():
    if name not in built and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
      of = hints[name].__name__ if isinstance(hints[name], type) else hints[name]
      raise UserError(f"{path}.{name} is missing; give it a value of type {of}")
  try:
    return annotation(**built)
  except UserError as e:
    raise UserError(f"{path}.{e}") from None


def to_dict(config: Any) -> Any:
  """The plain data of a config, every default written out: `build(type(c), to_dict(c)) == c`."""
  if dataclasses.is_dataclass(config):
    kind = {"kind": config.kind} if isinstance(config, Variant) else {}
    return kind | {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
  if isinstance(config, Mapping):
    return {k: to_dict(v) for k, v in config.items()}
  if isinstance(config, (list, tuple)):
    return [to_dict(v) for v in config]
  return config


def override(data: dict, assignments: list[tuple[str, str]], path: str = "config") -> dict:
  """A copy of nested `data` with each dotted key set to its parsed text, in order (see `assign`).

  >>> override({"a": {"b": 1}}, [("a.b", "2")])
  {'a': {'b': 2}}
  """
  return assign(data, [(key, parse_value(text)) for key, text in assignments], path)


def assign(data: dict, assignments: Iterable[tuple[str, Any]], path: str = "config") -> dict:
  """A copy of nested `data` with each dotted key set to its value, in order.

  Only existing keys can be set, so that a typing error cannot pass; `build` then checks the value. A
  variant may be switched by its name alone (`mixer.position=alibi`).
  """
  data = _copy(data)
  for key, value in assignments:
    *parents, last = key.split(".")
    node, at = data, path
    for parent in parents:
      node, at = _child(node, parent, at), f"{at}.{parent}"
    if isinstance(node, str):
      raise UserError(f"{at}={node!r} has no keys yet; write {at}='{{\"kind\": \"{node}\", \"{last}\": ...}}'")
    _child(node, last, at)
    node[last] = value
  return data


def _copy(data):
  return {k: _copy(v) for k, v in data.items()} if isinstance(data, Mapping) else data


def _child(node, key, at):
  if not isinstance(node, dict):
    raise UserError(f"{at}.{key}: {at} is {node!r} and has no keys; set {at} to a kind first")
  if key not in node:
    raise UserError(f"{at}.{key}: no such key{nearest(key, node)}")
  return node[key]


def parse_value(text: str) -> Any:
  """A command-line value: a Python literal, true/false/none, or else the text itself."""
  words = {"true": True, "false": False, "none": None, "null": None}
  words |= {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
  if text.lower() in words:
    return words[text.lower()]
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # all that literal_eval may raise
    return text


def differences(a: Any, b: Any, path: str = "config") -> list[str]:
  """Sentences 'key: x here, y there' for every leaf in which two plain-data configs differ."""
  if isinstance(a, Mapping) and isinstance(b, Mapping):
    missing = object()
    keys = list(a) + [k for k in b if k not in a]
    return [d for k in keys for d in differences(a.get(k, missing), b.get(k, missing), f"{path}.{k}")]
  if a == b and type(a) is type(b):
    return []
  show = lambda v: "absent" if type(v) is object else repr(v)
  return [f"{path}: {show(a)} here, {show(b)} there"]


def execute(path: str | os.PathLike, function: str, *args, flag: str) -> Any:
  """What `function(*args)` of a Python file returns: configs and ablations are data that a file computes.

  Raises UserError, which begins with the flag that named the file, where there is none, it has no such function, or
  either fails.
  """
  if not os.path.isfile(path):
    raise UserError(f"{flag}: there is no file {path}; give one that exists")
  spec = importlib.util.spec_from_file_location(f"llmarch_file_{zlib.crc32(os.path.abspath(path).encode())}", path)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    return getattr(module, function)(*args)
  except UserError:
    raise
  except (Exception, SystemExit) as e:
    lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == str(path)]
    at = f", line {lines[-1]}," if lines else ""
    raise UserError(f"{flag}: {path}{at} failed with {type(e).__name__}: {e}; mend the file") from e
