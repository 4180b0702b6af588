"""Shared parts of the commands: flags, configs from files and overrides, JSON or tables."""

import dataclasses
import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable

from absl import flags

from llmarch.build import assign, build, execute, number_with_unit, override, parse_value, to_dict
from llmarch.errors import UserError, nearest
from llmarch.files import local_path


def parse_flags(
  argv: list[str], define: Callable[[flags.FlagValues], None], usage: str, words: tuple[str, ...] = ()
) -> flags.FlagValues:
  """Parses a command's own flags. `--help` prints usage and exits 0; a bad flag raises UserError.

  words: flags that may be given as words alone, in this order: `describe llama_3_8b` is `describe --config=llama_3_8b`.
  """
  values, rest = parse_words(argv, define, usage)
  for name, word in zip(words, rest):
    if values[name].present:
      raise UserError(f"{word!r} and --{name}={values[name].value} say the same thing; give one of them")
    values[name].parse(word)
    values[name].using_default_value = False
  if rest[len(words) :]:
    raise UserError(f"{rest[len(words)]!r} is not a flag; write --name=value (--help lists the flags)")
  return values


def parse_words(
  argv: list[str], define: Callable[[flags.FlagValues], None], usage: str
) -> tuple[flags.FlagValues, list[str]]:
  """`parse_flags` of a command that takes words as well, which may stand anywhere: -> the flags, the words."""
  values = flags.FlagValues()
  flags.DEFINE_bool("help", False, "show this help", short_name="h", flag_values=values)
  define(values)
  for name in values:
    if type(values[name].parser) is type(_INTEGERS):
      values[name].parser = _Integers(values[name].parser.lower_bound, values[name].parser.upper_bound)
  try:
    rest = values(["llmarch", *argv])[1:]
  except flags.UnrecognizedFlagError as e:
    raise UserError(_unknown_flag(e.flagname, values)) from None
  except flags.Error as e:
    raise UserError(" ".join(str(e).split())) from None
  if values.help:
    print(f"usage: {usage}\n{_flag_help(values)}")
    raise SystemExit(0)
  return values, rest


_INTEGERS = flags.IntegerParser()


class _Integers(flags.IntegerParser):
  """Reads a whole number, which may end with a unit: 16k is 16,000 and 16ki is 16,384."""

  def convert(self, argument):
    return super().convert(number_with_unit(argument) if isinstance(argument, str) else argument)


def _unknown_flag(name: str, values: flags.FlagValues) -> str:
  """The sentence about a flag that is not there: a key of the config, or the nearest flag."""
  from llmarch.run_config import RunConfig

  name = name.partition("=")[0]
  keys = {f.name for f in dataclasses.fields(RunConfig)}
  if "config" in values and name.partition(".")[0] in keys:
    return f"there is no flag --{name}; a key of the config is set as --config.{name}=VALUE"
  return f"there is no flag --{name}{nearest(name, [n for n in values if len(n) > 1])}"


def _flag_help(values: flags.FlagValues) -> str:
  shown = [values[name] for name in sorted(values) if name == values[name].name]
  says_nothing = lambda x: x is None or x is False or x in ("", [])
  default = lambda f: "" if says_nothing(f.default) else f" (default {f.default})"
  lines = [f"  --{f.name}: {f.help}{default(f)}" for f in shown]
  if "config" in values:
    lines.append("  --config.KEY=VALUE: sets a key of the config (`llmarch describe --keys` lists them all)")
  return "\n".join(lines)


def split_overrides(argv: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
  """Takes `--config.a.b=value` (or `--config.a.b value`) out of argv: -> the rest, [("a.b", "value"), ...]."""
  rest, found, i = [], [], 0
  while i < len(argv):
    arg, i = argv[i], i + 1
    if not arg.startswith("--config."):
      rest.append(arg)
      continue
    key, equals, value = arg.removeprefix("--config.").partition("=")
    if not equals:
      if i == len(argv):
        raise UserError(f"{arg} has no value; write {arg}=VALUE")
      value, i = argv[i], i + 1
    found.append((key, value))
  return rest, found


def load_config(source: str | None, overrides: list[tuple[str, str]] = (), *, trains: bool = False):
  """A RunConfig from "FILE.py", "FILE.py:argument", "config.json", a preset's name, the folder of a run or of
  a model (ours or transformers'), which has no more than model.*.

  Overrides are applied to the complete config, so that every key can be set, whether the file names it or
  not. With `trains`, parameters that are trained are kept in f32, whatever the dtype of the model in a folder, unless
  an override says otherwise. Raises UserError for whatever is wrong with any of them.
  """
  import llmarch.layers.registry  # noqa: F401  the kinds of mixers, ffns, norms and positions join their families
  from llmarch.run_config import RunConfig

  if not source:
    raise UserError("--config is missing; give a file such as configs/tiny.py, or the name of a preset")
  config = build(RunConfig, _read_config(local_path(source, "--config"), overrides), "config")
  if overrides:
    config = build(RunConfig, override(to_dict(config), overrides), "config")
  named = any(key.startswith("model.precision") for key, _ in overrides)
  if trains and not named and config.train.lora is None and _holds_model(local_path(source, "--config")):
    config = build(RunConfig, assign(to_dict(config), [("model.precision.param", "float32")]), "config")
  return config


def _holds_model(source: str) -> bool:
  """True if a source of a config is the folder of a model, or its config.json, and no run's."""
  path = source if source.endswith(".json") else os.path.join(source, "config.json")
  if not os.path.isfile(path):
    return False
  with open(path) as f:
    return "train" not in json.load(f)


def _read_config(source: str, overrides: list[tuple[str, str]] = ()) -> dict:
  path, _, argument = source.partition(".py:")
  if source.endswith(".py") or argument:
    return _run_config(path if not argument else f"{path}.py", argument, overrides)
  if os.path.exists(source):
    from llmarch.convert import hf

    if hf.is_checkpoint(source):
      folder = hf.base_folder(source) if os.path.isdir(source) else os.path.dirname(source)
      return _of_model(folder, to_dict(_of_checkpoint(source)))
    source = os.path.join(source, "config.json") if os.path.isdir(source) else source
  if source.endswith(".json"):
    try:
      with open(source) as f:
        data = json.load(f)
    except OSError as e:
      raise UserError(f"--config: cannot read {source} ({e.strerror}); give an existing file or run folder") from None
    except (ValueError, RecursionError) as e:
      raise UserError(f"--config: {source} is not valid JSON ({e}); restore it from the run's own copy") from None
    saved = isinstance(data, dict) and {"format", "model"} <= data.keys()  # a model folder's
    return _of_model(os.path.dirname(source), data["model"]) if saved else data
  from llmarch.presets import PRESETS

  if source not in PRESETS:
    raise UserError(f"--config: {source!r} is neither a .py file, a run folder nor a preset{nearest(source, PRESETS)}")
  return {"model": PRESETS[source]()}


def _of_checkpoint(source: str):
  """The ModelConfig of a folder or a config.json of transformers, in the dtype of its weights where they are there."""
  from llmarch.convert import hf

  if os.path.isdir(source) and not hf.Described.of(hf.base_folder(source)).is_coded and hf.has_weights(source):
    return hf.Checkpoint(source).config
  return hf.read_config(source)


def _of_model(folder: str, model) -> dict:
  """A model's folder as a config: the model, its tokenizer, and no more tokens at once than it can read."""
  from llmarch.config import ModelConfig
  from llmarch.run_config import TrainConfig

  limit = build(ModelConfig, model, "config.model").max_seq_len
  own = os.path.exists(os.path.join(folder, "tokenizer.json"))
  data = {"tokenizer": os.path.abspath(folder)} if own else {}
  return {"model": model, "data": data, "train": {"seq_len": min(limit, TrainConfig.seq_len)}}


def _run_config(path: str, argument: str, overrides: list[tuple[str, str]]) -> dict:
  config = execute(path, "get_config", *([argument] if argument else []), flag="--config")
  if not hasattr(config, "to_dict"):
    return config
  for key, text in overrides:
    _set_reference(config, key.split("."), parse_value(text))
  return _resolved(config, path, "config")


def _set_reference(config, keys: list[str], value) -> None:
  """Sets a key of a ConfigDict if it is there, so that what the file computes from it by references follows."""
  from ml_collections import ConfigDict

  *parents, last = keys
  for parent in parents:
    if not isinstance(config, ConfigDict) or parent not in config:
      return
    config = config[parent]
  if isinstance(config, ConfigDict) and last in config:
    with config.unlocked(), config.ignore_type():
      config[last] = value


def _resolved(config, file: str, path: str) -> dict:
  """A ConfigDict as a dict. A placeholder that has no value is left out, so that its key has its default.

  Raises UserError if a required placeholder has no value.
  """
  from ml_collections import ConfigDict, FieldReference
  from ml_collections.config_dict import RequiredValueError

  found = {}
  for key, value in config.items(preserve_field_references=True):
    try:
      plain = value.get() if isinstance(value, FieldReference) else value
    except RequiredValueError:
      raise UserError(f"{path}.{key} has no value in {file}; give it with --{path}.{key}=VALUE") from None
    if plain is None and isinstance(value, FieldReference):
      continue
    found[key] = _resolved(plain, file, f"{path}.{key}") if isinstance(plain, ConfigDict) else plain
  return found


def print_table(rows: list[dict], as_json: bool, *, title: str = "") -> None:
  """Prints rows of equal keys, as JSON on request, else as a table (None is a dash, integers get separators).

  A table is as wide as the terminal. Columns of words are wrapped at spaces, numbers never; the last columns that then
  have no room are left out, and named below it.
  """
  if as_json:
    json.dump(rows, sys.stdout, indent=1)
    print()
    return
  print("\n".join(table_lines(rows, terminal_width(), title)))


def terminal_width() -> int:
  """Columns of the terminal ($COLUMNS where it is set); 160 where the output is no terminal."""
  if os.environ.get("COLUMNS", "").isdigit() or sys.stdout.isatty():
    return shutil.get_terminal_size().columns
  return 160


GAP = "  "  # between columns
NUMBER = 24  # characters of a number with its unit, at most; a sentence may begin with a digit too
NARROW = 12  # characters that a column of words has at least, if it is not narrower by itself


def table_lines(rows: list[dict], width: int, title: str = "") -> list[str]:
  """The lines of a table, none longer than the width unless the first column alone is."""
  names = list(rows[0])
  cells = {name: [_cell(row[name]) for row in rows] for name in names}
  rigid = {n for i, n in enumerate(names) if not i or any(_is_number(row[n], c) for row, c in zip(rows, cells[n]))}
  full = {name: max(map(len, [name, *cells[name]])) for name in names}
  least = {n: full[n] if n in rigid else min(full[n], max(NARROW, _longest_word([n, *cells[n]]))) for n in names}
  kept = names
  while len(kept) > 1 and sum(least[n] for n in kept) + len(GAP) * (len(kept) - 1) > width:
    kept = kept[:-1]
  room = width - sum(least[n] for n in kept) - len(GAP) * (len(kept) - 1)
  sizes = {}
  for name in kept:  # the room that is left goes to the columns of words, from the left
    sizes[name] = least[name] + min(max(room, 0), full[name] - least[name])
    room -= sizes[name] - least[name]
  right = {n for n in kept if any(isinstance(row[n], (int, float)) for row in rows)}
  lines = textwrap.wrap(title, max(width, 20)) if title else []
  for row in [kept, *([cells[n][i] for n in kept] for i in range(len(rows)))]:
    wrapped = [textwrap.wrap(c, sizes[n], break_long_words=False, break_on_hyphens=False) or [""] if n not in rigid
               else [c] for n, c in zip(kept, row)]  # fmt: skip
    for i in range(max(map(len, wrapped))):
      parts = [w[i] if i < len(w) else "" for w in wrapped]
      fit = lambda n, text: text.rjust(sizes[n]) if n in right else text.ljust(sizes[n])
      lines.append(GAP.join(fit(n, part) for n, part in zip(kept, parts)).rstrip())
  if hidden := [name for name in names if name not in kept]:
    words = f"hidden for want of room: {', '.join(hidden)} (a wider terminal, or --json, shows all)"
    lines += textwrap.wrap(words, max(width, 20), break_long_words=False)
  return lines


def _is_number(value, text: str) -> bool:
  """True for a number, and for words that are one with its unit, such as "8.03 B (3.1 B)" or "32/8"."""
  return isinstance(value, (int, float)) or (len(text) <= NUMBER and bool(re.match(r"\d", text)))


def _longest_word(texts: list[str]) -> int:
  return max((len(word) for text in texts for word in text.split()), default=0)


def short(n: float, base: int = 1000, units: tuple[str, ...] = ("", "K", "M", "B", "T")) -> str:
  """A number in three digits: 8030261248 is "8.03 B"."""
  power = 0
  while n >= 999.5 * base**power and power < len(units) - 1:
    power += 1
  digits = f"{n / base**power:#.3g}".rstrip(".") if power else f"{n:.3g}"
  return f"{digits} {units[power]}".rstrip()


def short_bytes(n: float) -> str:
  """5611978752 is "5.23 GiB"."""
  return short(n, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def _cell(value) -> str:
  if value is None:
    return "-"
  if isinstance(value, int) and not isinstance(value, bool):
    return f"{value:,}"
  return f"{value:.4g}" if isinstance(value, float) else str(value)
