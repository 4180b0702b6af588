"""`llmarch compile`: compiles a model for a machine that is not here and says what came out."""

import json
import subprocess
import sys
from pathlib import Path

from absl import flags

from llmarch.commands.common import load_config, parse_flags, print_table, short, short_bytes, split_overrides
from llmarch.errors import UserError, check

USAGE = (
  "llmarch compile --config=FILE|PRESET --topology=v4:4x4x4 --phase=prefill|decode|train [--batch=64]"
  " [--context=2048] [--json]\n       (with --phase=train, a config file has its own mesh, batch, dtype ...)"
  "\n       llmarch compile --suite=experiments/conformance/suite.json [--fast]"
)
PHASES = ("prefill", "decode", "train")


def _define(values: flags.FlagValues) -> None:
  text = lambda name, default, help: flags.DEFINE_string(name, default, help, flag_values=values)
  number = lambda name, default, help: flags.DEFINE_integer(name, default, help, lower_bound=1, flag_values=values)
  text("config", None, "config file, preset or run folder")
  text("topology", None, "machine: v4:4x4x4, v5e:16x16, v5p:4x4x4, v6e:16x16, tpu7x:4x4x4, h100:8")
  flags.DEFINE_enum("phase", "decode", PHASES, "the program: a step of it", flag_values=values)
  text("mesh", "", "'x=4,y=4,z=4', or 'fsdp=16,tensor=4' to train (default: the sides of the topology)")
  number("batch", 64, "rows")
  number("context", 2048, "tokens of a row: what the decoding state holds, or a training sequence")
  number("chunk", None, "prompt tokens of a prefill call (default: the whole context)")
  text("dtype", "bfloat16", "of parameters, arithmetic and state; for training of arithmetic alone")
  text("weights", None, "format of the matrices of prefill and decode, such as int8 (default: --dtype)")
  text("kv", None, "dtype or format of the decoding state, such as int8 (default: --dtype)")
  text("layout.prefill", "ws_2d", "row of the layout table")
  text("layout.decode", "ws_2d", "row of the layout table")
  text("suite", None, "compile the cells of this file instead; results and a table are written beside it")
  flags.DEFINE_bool("longest", False, "find the longest context that fits, by bisection", flag_values=values)
  flags.DEFINE_bool("unrolled", False, "compile layer after layer rather than a scan over them", flag_values=values)
  flags.DEFINE_bool("fast", False, "of the suite, only the cells marked fast; the record stays", flag_values=values)
  flags.DEFINE_bool("json", False, "print JSON", flag_values=values)


def main(argv: list[str]) -> int:
  """Runs `llmarch compile`; returns its exit code."""
  from llmarch.analysis import compile as ahead

  ahead.prepare()  # before jax starts
  argv, overrides = split_overrides(argv)
  args = parse_flags(argv, _define, USAGE, words=("config",))
  if args.suite:
    return _run_suite(Path(args.suite), args.fast)
  config, cell = _cell(args, overrides)
  if args.longest:
    context, found = ahead.longest_context(config, cell)
    check(found is not None, f"nothing fits, not even --context={ahead.STEP}; give more chips, or --weights=int8")
    found = {"context": context, **found}
  else:
    found = ahead.compile_cell(config, cell)
  if args.json:
    print(json.dumps(found, indent=1))
  else:
    _print(found)
  return 0


def _cell(args, overrides):
  from llmarch.analysis.compile import Cell

  check(args.topology is not None, "--topology is missing; give one such as v4:4x4x4")
  chosen = {"model.precision.compute": args.dtype}
  batch, context, mesh = args.batch, args.context, args.mesh
  if args.phase == "train":
    unread = ("weights", "kv", "chunk", "layout.prefill", "layout.decode", "unrolled")
    given = [f"--{name}" for name in unread if args[name].present]
    check(not given, f"--phase=train does not read {', '.join(given)}; leave them out, or take another phase")
    keys = {"mesh": "mesh", "batch": "train.batch_size", "context": "train.seq_len", "dtype": "model.precision.compute"}
    if _is_run(args.config):  # flags change what the config says of its run
      chosen = {key: str(args[name].value) for name, key in keys.items() if args[name].present}
    else:
      chosen = {key: str(args[name].value) for name, key in keys.items()} | {"train.remat": "full"}
  else:
    chosen |= {"model.precision.param": args.dtype, "model.precision.state": args.kv or args.dtype}
  config = load_config(args.config, [*chosen.items(), *overrides])
  if args.phase == "train":
    batch, context, mesh = config.train.batch_size, config.train.seq_len, config.mesh
  return config, Cell(
    topology=args.topology,
    phase=args.phase,
    batch=batch,
    context=context,
    chunk=args.chunk,
    mesh=mesh,
    prefill_layout=args["layout.prefill"].value,
    decode_layout=args["layout.decode"].value,
    weights=args.weights,
    unrolled=args.unrolled,
  )


def _is_run(source: str | None) -> bool:
  """True if a source of a config says how to train, and not only what: a file of Python, or the folder of a run."""
  return bool(source) and (".py" in source or (Path(source) / "checkpoints").is_dir())


def _print(found: dict) -> None:
  wanted = found["bytes_per_chip"]
  if "context" in found:
    print(f"longest context: {found['context']} tokens")
  print(
    f"{'fits' if found['fits'] else 'DOES NOT FIT'}: {short_bytes(wanted) if wanted else 'unknown'} of"
    f" {short_bytes(found['memory_per_chip'])} a chip, mesh {found['mesh']}; lowered in {found['lower_seconds']} s,"
    f" compiled in {found['compile_seconds']} s"
  )
  if found["refusal"]:
    print(found["refusal"])
    return
  print(
    f"{short(found['flops'])}FLOP and {short_bytes(found['bytes_moved'])} of memory traffic a chip;"
    f" {found['full_rematerialisations']} involuntary full rematerialisations"
  )
  for target, times in found["opaque"].items():
    print(f"opaque: {times} x {target}")
  if found["collectives"]:
    rows = [c | {"axes": "*".join(c["axes"]), "size": short_bytes(c["bytes"])} for c in found["collectives"]]
    print_table(rows, False)


# ---------------------------------------------------------------------------------------------- the suite


def _run_suite(path: Path, fast: bool) -> int:
  """Compiles every cell in a process of its own, and records the receipts and a table beside the suite.

  With `fast` only the cells marked so are compiled, and the record is left as it is. Returns 1 if a cell
  that the record has fitted and no longer does, or the other way round.
  """
  cells = [cell for cell in _read(path, None) if cell.get("fast") or not fast]
  record = path.with_name("results.json")
  before, now, changed = _read(record, {}), {}, []
  for cell in cells:
    name = cell["name"]
    now[name] = found = _run_cell(cell)
    if name in before and before[name]["fits"] != found["fits"]:
      changed.append(name)
    print(f"{name}: {_verdict(found)}{'  CHANGED' * (name in changed)}", flush=True)
    if not fast:  # after each cell: a run that is interrupted loses nothing
      kept = before | now
      record.write_text(json.dumps({c["name"]: kept[c["name"]] for c in cells if c["name"] in kept}, indent=1) + "\n")
      path.with_name("README.md").write_text(_page(cells, kept))
  if changed:
    print(f"{len(changed)} changed against {record}: {', '.join(changed)}", file=sys.stderr)
  return int(bool(changed))


def _read(path: Path, missing):
  """A JSON file; `missing` where there is none, unless that is None. Raises UserError."""
  if missing is not None and not path.exists():
    return missing
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError) as e:
    raise UserError(
      f"--suite: {path} cannot be read ({e}); give a JSON list of cells, or delete a broken record"
    ) from None


def _run_cell(cell: dict) -> dict:
  command = [sys.executable, "-m", "llmarch", "compile", "--json", *_arguments(cell)]
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return {"fits": False, "bytes_per_chip": None, "memory_per_chip": None, "refusal": last[:400]}
  return json.loads(done.stdout)


def _arguments(cell: dict) -> list[str]:
  return [f"--{name}={value}" for name, value in cell["flags"].items()]


def _verdict(found: dict) -> str:
  if not found["bytes_per_chip"]:
    return f"refused: {found['refusal']}"
  size = f"{found['bytes_per_chip'] / 2**30:.2f} of {found['memory_per_chip'] / 2**30:.2f} GiB"
  return f"{'fits' if found['fits'] else 'does not fit'}, {size}, {found['compile_seconds']} s"


def _page(cells: list[dict], known: dict) -> str:
  """The table of the suite as Markdown."""
  head = ["model, phase", "machine", "fits", "GiB a chip", "TFLOP a chip", "collectives, MiB a chip", "compile s"]
  lines = [
    "# Compiled ahead of time",
    "",
    "Made by `llmarch compile --suite=experiments/conformance/suite.json`. No device was at hand: programs are",
    "compiled for the machine, never run. Numbers are of one chip and one run of the program (one decode step).",
    "`8 all-reduce x*y 2.5 (was reduce-scatter)`: eight arrays, 2.5 MiB together, over the mesh axes x and y; the",
    "compiler wrote as all-reduces, which move their bytes twice, what the layout asks for as reduce-scatters.",
    "`receipts.md` sets one layer's collectives beside their prediction, `contexts.md` the longest contexts beside",
    "the paper's; the scripts of those names make them.",
    "",
    f"| {' | '.join(head)} |",
    f"|{'---|' * len(head)}",
  ]
  for cell in cells:
    if found := known.get(cell["name"]):
      lines.append(f"| {' | '.join(_line(cell, found))} |")
  return "\n".join(lines) + "\n"


def _line(cell: dict, found: dict) -> list[str]:
  flags_shown = " ".join(f"`--{k}={v}`" for k, v in cell["flags"].items() if k not in ("config", "phase", "topology"))
  where = f"{cell['flags']['topology']} {flags_shown}"
  name = f"{cell['flags']['config']} {cell['flags']['phase']}"
  if found.get("flops") is None:
    wanted = found["bytes_per_chip"]
    size = f"{wanted / 2**30:.1f} of {found['memory_per_chip'] / 2**30:.1f}" if wanted else found["refusal"]
    return [name, where, "🟥 no", size, "", "", str(found.get("compile_seconds", ""))]
  moved = [_collective(c) for c in found["collectives"]]
  if found["full_rematerialisations"]:
    moved.append(f"🟥 {found['full_rematerialisations']} involuntary full rematerialisations")
  size = f"{found['bytes_per_chip'] / 2**30:.1f} of {found['memory_per_chip'] / 2**30:.1f}"
  fits = "🟩 yes" if found["fits"] else "🟥 no"
  return [name, where, fits, size, f"{found['flops'] / 1e12:.4g}", "<br>".join(moved), str(found["compile_seconds"])]


def _collective(c: dict) -> str:
  rewritten = f" (was {c['rewritten']})" if c["rewritten"] else ""
  return f"{c['count']} {c['kind']} {'*'.join(c['axes'])} {c['bytes'] / 2**20:.4g}{rewritten}"
