"""`llmarch describe`: what a config builds and what it costs, by formula; or what a layout places where, and the
collectives of one layer under it. Nothing is built."""

import dataclasses
import json
import textwrap
from collections import Counter

from absl import flags

from llmarch.build import to_dict
from llmarch.commands.common import (
  load_config,
  parse_flags,
  print_table,
  short,
  short_bytes,
  split_overrides,
  terminal_width,
)
from llmarch.errors import check

USAGE = """llmarch describe --config=FILE|PRESET|RUN [--config.a.b=value ...] [--json]
       llmarch describe --layout=NAME [--mesh=x=2,y=2,z=2] [--config=FILE|PRESET|RUN ...] [--json]
       llmarch describe --keys [PREFIX] [--json]       every key of a config: its type, its default, what it is

  The first word may stand for --config: llmarch describe llama_3_8b."""


def _define(values: flags.FlagValues) -> None:
  flags.DEFINE_string(
    "config", None, "config file (FILE.py or FILE.py:argument), preset or run folder", flag_values=values
  )
  flags.DEFINE_string(
    "layout", None, "describe this layout: train, megatron, or one for inference such as ws_2d+batch_xyz; of the blocks"
    " of --config, or of a small one", flag_values=values
  )  # fmt: skip
  flags.DEFINE_string("mesh", None, "with --layout: the mesh; by default 8 devices", flag_values=values)
  flags.DEFINE_bool("keys", False, "list every key of a config, or those below a prefix", flag_values=values)
  flags.DEFINE_bool("json", False, "print JSON", flag_values=values)


def main(argv: list[str]) -> int:
  """Runs `llmarch describe`; returns its exit code."""
  argv, overrides = split_overrides(argv)
  argv = [part for word in argv for part in (["--keys", word[7:]] if word.startswith("--keys=") else [word])]
  args = parse_flags(argv, _define, USAGE, words=("config",))
  if args.keys:
    _print_keys(args.config or "", args.json)
    return 0
  if args.layout is not None:
    from llmarch.analysis.layer import describe_layout

    found = describe_layout(args.layout, args.mesh, load_config(args.config, overrides) if args.config else None)
    if args.json:
      print(json.dumps(found, indent=1))
    else:
      _print_layout(found)
    return 0
  check(args.mesh is None, "--mesh says where a layout is described; give --layout too, such as --layout=ws_2d")
  config = load_config(args.config, overrides)
  costs = describe(config)
  if args.json:
    print(json.dumps({"model": to_dict(config.model)} | costs, indent=1))
  else:
    _print_model(config.model)
    _print_costs(costs)
  return 0


def _print_keys(prefix: str, as_json: bool) -> None:
  from llmarch.commands.keys import keys

  found = keys(prefix)
  if as_json:
    print(json.dumps([key._asdict() for key in found], indent=1))
    return
  width = terminal_width()
  for key in found:
    default = "required" if key.default == "required" else f"default {key.default}" if key.default else ""
    print(f"{key.key}: " + ", ".join(filter(None, (key.type, default))))
    for line in textwrap.wrap(key.sentence, max(width - 4, 20), break_long_words=False):
      print(f"    {line}")


def describe(config) -> dict:
  """The costs of an RunConfig: parameters by component, FLOPs a token, bytes of training and decoding."""
  from llmarch.analysis import cost

  model = config.model
  return {
    "layers": len(model.layers),
    "params": cost.params(model),
    "active_params": cost.active_params(model),
    "flops_per_token": [
      {
        "length": length,
        "forward": cost.flops_per_token(model, length),
        "train": cost.train_flops_per_token(model, length),
      }
      for length in sorted({config.train.seq_len, model.max_seq_len})
    ],
    "training_bytes": cost.training_bytes(config),
    "state_bytes": {
      "per_token": int(cost.kv_bytes_per_token(model, cost.BYTES[model.precision.state])),
      "max_seq_len": cost.state_bytes(model, 1, model.max_seq_len),
    },
  }


def _print_model(model) -> None:
  """The stack, its blocks, and what else differs from the defaults."""
  counts = Counter(model.layers)
  print(f"stack: {model.stack} ({len(model.layers)} layers)")
  for name, block in model.blocks.items():
    print(f"  {name} ({counts[name]} layers)")
    for part, words in _parts(block).items():
      print(f"    {part}: {words}")
  for part, words in _parts(model).items():
    if part not in ("stack", "blocks"):
      print(f"{part}: {words}")


def _parts(config) -> dict[str, str]:
  """The fields that say something, in words: those without a default or away from it."""
  fields = dataclasses.fields(config)
  return {f.name: _words(getattr(config, f.name)) for f in fields if getattr(config, f.name) != f.default}


def _words(value) -> str:
  """A config in one line: attention(num_heads=32, num_kv_heads=8, position=rope)."""
  if not dataclasses.is_dataclass(value):
    return f"{value:g}" if isinstance(value, float) else str(value)
  parts = ", ".join(f"{name}={words}" for name, words in _parts(value).items())
  kind = getattr(value, "kind", "")
  return f"{kind}({parts})" if parts else kind


def _print_costs(costs: dict) -> None:
  total, active = costs["params"]["total"], costs["active_params"]
  params = costs["params"] | ({"active": active} if active < total else {})
  _table([{"component": k, "parameters": n, "share": f"{n / total:.1%}"} for k, n in params.items() if n])
  _table(
    [
      {"FLOPs a token, sequences of": f"{r['length']:,}", "forward": short(r["forward"]), "train": short(r["train"])}
      for r in costs["flops_per_token"]
    ]
  )
  for title, key in (("training, without activations", "training_bytes"), ("decoding, one row", "state_bytes")):
    _table([{title: name, "bytes": n, "": short_bytes(n)} for name, n in costs[key].items() if n])


def _table(rows: list[dict]) -> None:
  print()
  print_table(rows, False)


def _print_layout(found: dict) -> None:
  """The row, the places, and a table of collectives for each block."""
  from llmarch.sharding import split_text

  mesh = ",".join(f"{axis}={size}" for axis, size in found["mesh"].items())
  ways = {
    "local": "each product is a manual program of its own",
    "manual": "the whole step is one manual program",
    "rings": "the whole step is one manual program, with looped collective einsums",
  }
  print(f"layout {found['layout']} on mesh {mesh or 'of one device'}: {ways[found['products']]}\n")
  for part, axes in found["axes"].items():
    words = (f"{axis}{split_text(split)}" for axis, split in axes.items())
    print(f"  {part:<12} {'  '.join(words)}")
  print()
  for place, text in found["places"].items():
    print(f"  {place:<12} {text}")
  batch, length = found["tokens"]
  for block, collectives in found["collectives"].items():
    print()
    title = f"collectives of one layer {block!r}, on {batch} x {length} tokens"
    if not collectives:
      print(f"{title}: none")
      continue
    rows = [
      {
        "collective": c["kind"],
        "over": ", ".join(c["axes"]),
        "sends": f"{c['dtype']}[{','.join(map(str, c['shape']))}]" + (f" x {c['count']}" if c["count"] > 1 else ""),
        "asked for in": c["where"] + (" (placed by XLA)" if c["implied"] else ""),
      }
      for c in collectives
    ]
    print_table(rows, False, title=title)
  print("\nA device's arrays. The compiler may merge collectives, and drop one that repeats another.")
