"""Every key of a run's config, with its type, its default and what its comment in the code says of it."""

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from llmarch.build import Variant, to_dict
from llmarch.errors import check, nearest


class Key(NamedTuple):
  """A key as `--config.KEY=VALUE` takes it. NAME stands for the name of a block."""

  key: str
  type: str
  default: str  # "required" where there is none
  sentence: str


def keys(prefix: str = "") -> list[Key]:
  """All keys, or those below a prefix such as "train" or "model.blocks.layer.mixer". Raises UserError if none is."""
  import llmarch.layers.registry  # noqa: F401  the kinds of mixers, ffns, norms and positions join their families
  from llmarch.run_config import RunConfig

  found = list(_keys_of(RunConfig, "", ()))
  wanted = [part for part in prefix.removeprefix("config.").split(".") if part]
  chosen = [key for key in found if _lies_below(key.key.partition(" ")[0].split("."), wanted)]
  parents = {part for key in found for part in key.key.partition(" ")[0].split(".")}
  check(bool(chosen), f"--keys: no key begins with {prefix!r}{nearest(wanted[-1] if wanted else '', parents)}")
  return chosen


def _lies_below(key: list[str], prefix: list[str]) -> bool:
  same = all(have in (want, "NAME") for have, want in zip(key, prefix))
  return len(key) >= len(prefix) and same


def _keys_of(config: type, path: str, seen: tuple[type, ...], only: str = "") -> Iterator[Key]:
  """The keys of a dataclass below a path; only: the kind of which they are, as a note after the key."""
  sentences, hints = _sentences(config), typing.get_type_hints(config)
  for f in dataclasses.fields(config):
    annotation, optional = _without_none(hints[f.name])
    key = f"{path}{f.name}"
    sentence, value = sentences[f.name] or _first_sentence(config), _default(f)
    inner = typing.get_args(annotation)[1] if typing.get_origin(annotation) is dict else annotation
    if inner is not annotation:
      key = f"{key}.NAME"
    if not (isinstance(inner, type) and (dataclasses.is_dataclass(inner) or issubclass(inner, Variant))):
      yield Key(key + only, _name(annotation) + (" or none" if optional else ""), value, sentence)
    elif inner in (*seen, config):  # a model may have an encoder, which is a model
      yield Key(key + only, f"a {inner.__name__}" + (" or none" if optional else ""), value, sentence)
    elif dataclasses.is_dataclass(inner):
      of = f"a {inner.__name__}" + (" or none" if optional else "")
      yield Key(key + only, of, value, sentences[f.name] or _first_sentence(inner))
      yield from _keys_of(inner, f"{key}.", (*seen, config), only)
    else:
      kinds = " | ".join(inner.variants) + (" | none" if optional else "")
      yield Key(key + only, kinds, value, sentences[f.name] or _first_sentence(inner))
      for kind, member in inner.variants.items():
        yield from _keys_of(member, f"{key}.", (*seen, config, inner), f" (of {kind})")


def _without_none(annotation) -> tuple:
  """(the type, whether it may be None)."""
  if typing.get_origin(annotation) in (typing.Union, types.UnionType):
    args = typing.get_args(annotation)
    (inner,) = [a for a in args if a is not type(None)]
    return inner, type(None) in args
  return annotation, False


def _name(annotation) -> str:
  """A type in the words of a command line: int, list of str, causal | prefix."""
  origin, args = typing.get_origin(annotation), typing.get_args(annotation)
  if origin is Literal:
    return " | ".join(map(str, args))
  return f"list of {_name(args[0])}" if origin is tuple else annotation.__name__


def _default(f: dataclasses.Field) -> str:
  if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
    return "required"
  value = f.default if f.default is not dataclasses.MISSING else f.default_factory()
  data = to_dict(value)
  if isinstance(data, Mapping):
    return data.get("kind", "{}" if not data else "")
  return {None: "none", True: "true", False: "false"}[data] if data is None or isinstance(data, bool) else str(data)


@functools.cache
def _sentences(config: type) -> dict[str, str]:
  """Finds the sentence about each field: the comment on its line or above it, else the docstring's words on it."""
  found = dict.fromkeys((f.name for f in dataclasses.fields(config)), "")
  for owner in reversed(config.__mro__):
    if dataclasses.is_dataclass(owner):
      found |= {name: text for name, text in _comments(owner).items() if name in found}
  return found


def _comments(config: type) -> dict[str, str]:
  source = textwrap.dedent(inspect.getsource(config))
  lines, found = source.splitlines(), {}
  for node in ast.parse(source).body[0].body:
    if not isinstance(node, ast.AnnAssign):
      continue
    line = lines[node.end_lineno - 1][node.end_col_offset :]
    texts = [line.partition("#")[2].strip()] if "#" in line else []
    after = node.end_lineno
    while texts and after < len(lines) and lines[after].strip().startswith("#"):  # it goes on below
      texts.append(lines[after].strip(" #"))
      after += 1
    before = node.lineno - 2
    if not texts:
      while before >= 0 and lines[before].strip().startswith("#"):
        texts.insert(0, lines[before].strip(" #"))
        before -= 1
    found[node.target.id] = " ".join(texts)
  return found


def _first_sentence(config: type) -> str:
  text = " ".join((inspect.getdoc(config) or "").split("\n\n")[0].split())
  return re.split(r"(?<=[.:;]) (?=[A-Z`])", text)[0]
