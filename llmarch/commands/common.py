"""Shared parts of the commands: flags, configs from files and overrides, JSON or tables."""

import json
import os
import sys
from collections.abc import Callable

from absl import flags

from llmarch.build import build, execute, override, to_dict
from llmarch.errors import UserError, nearest


def parse_flags(argv: list[str], define: Callable[[flags.FlagValues], None], usage: str) -> flags.FlagValues:
  """Parses a command's own flags. `--help` prints usage and exits 0; a bad flag raises UserError."""
  values, rest = parse_words(argv, define, usage)
  if rest:
    raise UserError(f"{rest[0]!r} is not a flag; write --name=value (--help lists the flags)")
  return values


def parse_words(
  argv: list[str], define: Callable[[flags.FlagValues], None], usage: str
) -> tuple[flags.FlagValues, list[str]]:
  """`parse_flags` of a command that takes words as well, which may stand anywhere: -> the flags, the words."""
  values = flags.FlagValues()
  flags.DEFINE_bool("help", False, "show this help", short_name="h", flag_values=values)
  define(values)
  try:
    rest = values(["llmarch", *argv])[1:]
  except flags.Error as e:
    raise UserError(" ".join(str(e).split())) from None
  if values.help:
    print(f"usage: {usage}\n{_flag_help(values)}")
    raise SystemExit(0)
  return values, rest


def _flag_help(values: flags.FlagValues) -> str:
  shown = [values[name] for name in sorted(values) if name == values[name].name]
  default = lambda f: "" if f.default in (None, "", False, []) else f" (default {f.default})"
  return "\n".join(f"  --{f.name}: {f.help}{default(f)}" for f in shown)


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


def load_config(source: str | None, overrides: list[tuple[str, str]] = ()):
  """A RunConfig from "FILE.py", "FILE.py:argument", "config.json", a preset's name, the folder of a run or of
  a model (ours or transformers'), which has no more than model.*.

  Overrides are applied to the complete config, so that every key can be set, whether the file names it or
  not. Raises UserError for whatever is wrong with any of them.
  """
  import llmarch.layers.registry  # noqa: F401  the kinds of mixers, ffns, norms and positions join their families
  from llmarch.run_config import RunConfig

  if not source:
    raise UserError("--config is missing; give a file such as configs/tiny.py, or the name of a preset")
  config = build(RunConfig, _read_config(source), "config")
  if overrides:
    config = build(RunConfig, override(to_dict(config), overrides), "config")
  return config


def _read_config(source: str) -> dict:
  path, _, argument = source.partition(".py:")
  if source.endswith(".py") or argument:
    return _run_config(path if not argument else f"{path}.py", argument)
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


def _run_config(path: str, argument: str) -> dict:
  config = execute(path, "get_config", *([argument] if argument else []), flag="--config")
  return config.to_dict() if hasattr(config, "to_dict") else config


def print_table(rows: list[dict], as_json: bool, *, title: str = "") -> None:
  """Rows of equal keys, as JSON on request, else as a table (None is a dash, integers get separators)."""
  if as_json:
    json.dump(rows, sys.stdout, indent=1)
    print()
    return
  from rich.console import Console
  from rich.table import Table

  table = Table(title=title or None, box=None, header_style="bold", pad_edge=False)
  for i, key in enumerate(rows[0]):
    right = any(isinstance(row[key], (int, float)) for row in rows)
    table.add_column(key, justify="right" if right else "left", overflow="fold", no_wrap=right or i == 0)
  for row in rows:
    table.add_row(*(_cell(value) for value in row.values()))
  Console(width=None if sys.stdout.isatty() else 160, markup=False).print(table)  # brackets are text


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
