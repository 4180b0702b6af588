"""Builds frozen dataclasses from plain dicts and back, sets their fields by dotted keys, and compares them.

`build` is the only way from a dict to a config. It refuses an unknown key, a missing value and a wrong type, each in
one sentence with the path of the field. Alternatives with parameters of their own (positions, norms, mixers ...) are
`Variant` families: `{"kind": "rope", "theta": 1e4}` in a dict is `RoPE(theta=1e4)` in Python.
"""

import ast
import dataclasses
import importlib.util
import math
import os
import re
import traceback
import types
import typing
import zlib
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any, ClassVar, Literal

from llmarch.errors import UserError, check, nearest

config_dataclass = dataclasses.dataclass(frozen=True, kw_only=True)


class FrozenDict(dict):
  """A dict that can be part of a frozen config: hashable, and never changed after construction."""

  def __hash__(self):
    return hash(tuple(self.items()))

  def _refuse(self, *args, **kwargs):
    raise TypeError("a config is immutable; use dataclasses.replace")

  __setitem__ = __delitem__ = update = pop = clear = setdefault = popitem = __ior__ = _refuse

  def __reduce__(self):  # copy and pickle would otherwise set items one by one, which is refused
    return FrozenDict, (dict(self),)


class Variant:
  """The root of a family of alternative configs. `class RoPE(PositionConfig, kind="rope")` joins a family."""

  kind: ClassVar[str] = ""
  variants: ClassVar[dict[str, type]] = {}
  by_name: ClassVar[bool] = False  # a member without fields is written as its kind alone, such as "causal"

  def __init_subclass__(cls, kind: str = "", **kwargs):
    super().__init_subclass__(**kwargs)
    if kind:
      cls.kind = kind
      cls.variants[kind] = cls
    else:
      cls.variants = {}


# --------------------------------------------------------------------------------- dicts <-> dataclasses


def build(annotation: Any, value: Any, path: str = "config") -> Any:
  """Turns plain data into the annotated type, strictly.

  Raises UserError that names the path, for an unknown key (with the nearest valid name), a missing value, a wrong
  type, a number that is not finite, an unknown kind, and whatever the config itself refuses.
  """
  value = _plain(value)
  origin, args = typing.get_origin(annotation), typing.get_args(annotation)
  if origin in (typing.Union, types.UnionType):
    if value is None and type(None) in args:
      return None
    (inner,) = [a for a in args if a is not type(None)]
    return build(inner, value, path)
  if origin is Literal:
    if value is None and "none" in args:  # a command line's `none`, where "none" is one of the allowed words
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


def _plain(value: Any) -> Any:
  """Numbers, texts and arrays of NumPy and JAX as Python's own; everything else as it is."""
  if not hasattr(value, "dtype") or not hasattr(value, "tolist"):
    return value
  return value.tolist()


def accept_name(config: Any, field: str, family: type) -> None:
  """Lets a field of a family be given by the name of a member: `mask="causal"` for `mask=Causal()`.

  For the `__post_init__` of frozen dataclasses. Raises UserError for anything that is no member.
  """
  object.__setattr__(config, field, build(family, getattr(config, field), field))


UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def number_with_unit(text: str) -> int | float | str:
  """Reads a number with a unit: 16k is 16,000, 16ki is 16,384, 1.5M is 1,500,000; other texts come back as they are."""
  found = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?)\s?([kmgb]|[kmg]i)", text.strip().lower())
  if not found:
    return text
  value = Fraction(found[1].replace("_", "")) * UNITS[found[2]]
  return int(value) if value.denominator == 1 else float(value)


def _scalar(annotation, value, path):
  if annotation in (int, float) and isinstance(value, str):
    value = number_with_unit(value)
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
  if issubclass(annotation, Variant) and value.get("kind") == annotation.kind:  # the kind is given, or the only one
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
  """The plain data of a config with every default written out, so that `build(type(c), to_dict(c)) == c`."""
  if dataclasses.is_dataclass(config):
    return with_kind(config, {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)})
  if isinstance(config, Mapping):
    return {k: to_dict(v) for k, v in config.items()}
  if isinstance(config, (list, tuple)):
    return [to_dict(v) for v in config]
  return config


def with_kind(config: Any, fields: dict) -> dict | str:
  """Adds the kind of a variant to its plain data: {"kind": "rope", "theta": 1e4}, or the word "causal" alone."""
  if not isinstance(config, Variant):
    return fields
  return config.kind if config.by_name and not fields else {"kind": config.kind} | fields


def override(data: dict, assignments: list[tuple[str, str]], path: str = "config") -> dict:
  """Returns a copy of nested `data` with each dotted key set to its parsed text, in order (see `assign`).

  >>> override({"a": {"b": 1}}, [("a.b", "2")])
  {'a': {'b': 2}}
  """
  return assign(data, [(key, parse_value(text)) for key, text in assignments], path)


def assign(data: dict, assignments: Iterable[tuple[str, Any]], path: str = "config") -> dict:
  """Returns a copy of nested `data` with each dotted key set to its value, in order.

  Only existing keys can be set, so that a misspelled one is refused; `build` checks the value later. A variant may be
  switched by its name alone (`mixer.position=alibi`). A key below None makes a dict there, whose other keys have their
  defaults (`train.lora.rank=4`); so has a dict that an earlier assignment gave (`mixer={"kind": ...}`, then
  `mixer.head_dim=8`), and `build` checks its keys.
  """
  data = _copy(data)
  for key, value in assignments:
    value = _given(value)
    *parents, last = key.split(".")
    node, where = data, path
    for i, parent in enumerate(parents):
      if _child(node, parent, where) is None:
        node[parent] = _nested([*parents[i + 1 :], last], value)
        break
      node, where = node[parent], f"{where}.{parent}"
    else:
      _set(node, last, value, where)
  return data


def _nested(keys: list[str], value: Any) -> Any:
  """{"a": {"b": value}} of the keys a and b."""
  for key in reversed(keys):
    value = {key: value}
  return value


def _set(node: Any, last: str, value: Any, where: str) -> None:
  """Sets an existing key of a dict. Raises UserError if there is none."""
  if isinstance(node, str):
    raise UserError(f"{where}={node!r} has no keys yet; write {where}='{{\"kind\": \"{node}\", \"{last}\": ...}}'")
  _child(node, last, where)
  node[last] = value


class _Given(dict):
  """A dict that an assignment gave. It need not have every key that can be set."""


def _given(value: Any) -> Any:
  return _Given({k: _given(v) for k, v in value.items()}) if isinstance(value, Mapping) else value


def _copy(data):
  return {k: _copy(v) for k, v in data.items()} if isinstance(data, Mapping) else data


def _child(node, key, where):
  if not isinstance(node, dict):
    raise UserError(f"{where}.{key}: {where} is {node!r} and has no keys; set {where} to a kind first")
  if key not in node and not isinstance(node, _Given):
    raise UserError(f"{where}.{key}: no such key{nearest(key, node)}")
  return node.get(key)


def parse_value(text: str) -> Any:
  """Parses a command-line value: a Python literal, true/false/none, or else the text itself."""
  words = {"true": True, "false": False, "none": None, "null": None}
  words |= {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
  if text.lower() in words:
    return words[text.lower()]
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # all that literal_eval may raise
    return text


def differences(a: Any, b: Any, path: str = "config") -> list[str]:
  """Lists a sentence 'key: x here, y there' for every leaf in which two plain-data configs differ."""
  if isinstance(a, Mapping) and isinstance(b, Mapping):
    missing = object()
    keys = list(a) + [k for k in b if k not in a]
    return [d for k in keys for d in differences(a.get(k, missing), b.get(k, missing), f"{path}.{k}")]
  if a == b and type(a) is type(b):
    return []
  describe = lambda v: "absent" if type(v) is object else repr(v)
  return [f"{path}: {describe(a)} here, {describe(b)} there"]


def execute(path: str | os.PathLike, function: str, *args, flag: str) -> Any:
  """Runs `function(*args)` of a Python file and returns its result, which is a config or an ablation.

  Raises UserError, which begins with the flag that named the file, if there is no such file or function, or if either
  fails.
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
