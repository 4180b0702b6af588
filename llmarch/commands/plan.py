"""`llmarch plan`: layouts, meshes, batches and numbers of chips for serving a decoder, by formula; nothing runs."""

import json
import os
import sys

from absl import flags

from llmarch.build import number_with_unit
from llmarch.commands.common import load_config, parse_flags, print_table
from llmarch.errors import UserError, nearest

USAGE = """llmarch plan --model=PRESET|FILE --hardware=CHIP [--chips=64] [--batch=64] [--json]

  llmarch plan --model=palm_540b --hardware=tpu_v4 --chips=64 --batch=64 --weights=int8
  llmarch plan --model=palm_540b --hardware=tpu_v4 --plot=DIR          every batch and number of chips: the Pareto front

  --chips and --batch may be lists (8,16,32); left out, they are powers of two."""

ROOFLINE_NOTE = (
  "a roofline is a lower bound: it knows peaks, not kernels; the 28.5 ms that 2211.05102 measured of a decode step"
  " (PaLM-540B, batch 64, int8, 64 TPU v4) is 2.3 times its 12.4 ms"
)


def _define(values: flags.FlagValues) -> None:
  text = lambda name, default, help: flags.DEFINE_string(name, default, help, flag_values=values)
  number = lambda name, default, help: flags.DEFINE_integer(name, default, help, flag_values=values)
  text("model", None, "preset, or a config as of `llmarch describe`")
  text("hardware", "tpu_v4", "chip of the hardware table")
  text("chips", "", "number of chips, or a list (default: powers of two to 256)")
  text("batch", "", "sequences, or a list (default: powers of two to 1024)")
  number("prompt", 1984, "tokens of a prompt")
  number("generate", 64, "tokens decoded after it; 0 plans the prefill alone")
  text("weights", "bf16", "bf16, or a format such as int8 or int4")
  text("kv", "bf16", "keys and values: bf16, int8 or fp8")
  text("layout.prefill", "", "only this one: wg_xyz with any attention, or ws_2d+heads")
  text("layout.decode", "", "only this one: ws_2d with any attention, or ws_2d+batch_xyz")
  text("mesh", "", "only this one: x=4,y=4,z=4; or `all` factorisations, whether the torus has them or not")
  text("plot", "", "folder for the Pareto front: plan.png, plan.html")
  flags.DEFINE_bool("calibrated", False, "with two constants fitted on the paper's PaLM-62B rows", flag_values=values)
  flags.DEFINE_bool("json", False, "print JSON", flag_values=values)


def main(argv: list[str]) -> int:
  """Runs `llmarch plan`; returns its exit code."""
  args = parse_flags(argv, _define, USAGE, words=("model",))
  from llmarch.analysis import planner

  found, plans, notes = _search(args, planner)
  best = planner.best(plans)
  if args.plot:
    from llmarch.report.plots import pareto_chart

    title = f"{args.model} on {args.hardware}, {args.prompt} + {args.generate} tokens, {args.weights} weights"
    paths = pareto_chart(_points(found, planner), os.path.join(args.plot, "plan"), title=title)
    print(f"wrote {' and '.join(map(str, paths))}", file=sys.stderr)
  if args.json:
    front = planner.pareto(plans, lambda p: p.latency_s, lambda p: p.chip_ms_per_token)
    result = {
      "model": args.model,
      "hardware": args.hardware,
      "options": [_as_dict(o) for o in found],
      "best": {aim: _plan_dict(p) for aim, p in best.items()},
      "pareto": [_plan_dict(p) for p in front],
      "notes": notes,
    }
    print(json.dumps(result, indent=1))
  else:
    _print(args, planner, found, plans, best, notes)
  return 0


def _search(args, planner):
  """-> options, the best plan of each batch and number of chips that fits, and notes. Raises UserError."""
  model = _model(args.model)
  chips = _numbers(args.chips, "chips") or [2**i for i in range(9)]
  batches = _numbers(args.batch, "batch") or [2**i for i in range(11)]
  layouts = {phase: args[f"layout.{phase}"].value for phase in planner.PHASES}
  fit, judged = planner.calibrated() if args.calibrated else (planner.ROOFLINE, {})
  single = len(chips) == len(batches) == 1
  found, plans, refused = [], [], None
  for n in chips:
    for batch in batches:
      try:
        r = planner.Request(model, args.hardware, n, batch, args.prompt, args.generate, args.weights, args.kv)
        options = planner.options(r, layouts, _meshes(args.mesh, n, planner), fit)
        plan = planner.best_plan(options)
        if plan is None and not refused:
          refused = UserError(planner.why_it_does_not_fit(r, options, layouts)) if single else None
      except UserError as e:  # of a sweep, those that cannot be are left out
        refused = refused or e
        continue
      found += options if single else planner.best_meshes(options)
      plans += [plan] if plan else []
  if not plans:
    where = f"on {min(chips)} to {max(chips)} {args.hardware} with a batch of {min(batches)} or more"
    raise refused or UserError(f"--chips: nothing fits {where}; give more chips, --weights=int8 or a shorter --prompt")
  return found, plans, _notes(args, planner, model, plans, fit, judged)


def _model(name: str | None):
  from llmarch.presets import PRESETS

  if not name:
    raise UserError("--model is missing; give the name of a preset such as palm_540b")
  if name in PRESETS:
    return PRESETS[name]()
  if not (os.path.exists(name) or ".py" in name or name.endswith(".json")):
    raise UserError(f"--model: there is no preset {name!r}{nearest(name, PRESETS)}")
  return load_config(name).model


def _numbers(text: str, flag: str) -> list[int]:
  try:
    return [int(number_with_unit(part)) for part in text.split(",") if part.strip()]
  except ValueError:
    raise UserError(f"--{flag}: cannot read {text!r}; give a number, or a list such as 8,16,32") from None


def _meshes(text: str, chips: int, planner):
  """--mesh -> the meshes to look at; None: those of the chip's torus."""
  if text in ("", "all"):
    return planner.meshes(chips) if text else None
  import math

  from llmarch.sharding import parse_mesh

  mesh = parse_mesh(text)
  if set(mesh) != {"x", "y", "z"} or math.prod(mesh.values()) != chips:
    raise UserError(f"--mesh={text} does not cover --chips={chips}; give x=,y=,z= that multiply to it, or `all`")
  return [mesh]


def _notes(args, planner, model, plans, fit, judged) -> list[str]:
  from llmarch.analysis.hardware import find_chip

  notes, chip = [ROOFLINE_NOTE], find_chip(args.hardware)
  largest = max(p.prefill.chips for p in plans)
  for n in sorted({p.prefill.chips for p in plans}):
    for name, block in model.blocks.items():
      heads = planner.pad_heads(model, n).blocks[name].mixer.num_heads
      if heads != block.mixer.num_heads:
        before = block.mixer.num_heads
        notes.append(f"{n} chips: heads of {name} padded from {before} to {heads}, MFU counts the former")
  if largest > chip.domain:
    notes.append(
      f"the links of {args.hardware} join at most {chip.domain} chips; the slower network beyond them is not modelled"
    )
  if args.calibrated:
    errors = ", ".join(f"{r.phase} batch {r.batch} {e:+.0%}" for r, e in judged.items())
    notes.append(
      f"calibrated on the TPU v4 rows of PaLM-62B: matmuls reach {fit.matmul:.0%} of peak, each layer takes"
      f" {fit.layer_s * 1e6:.0f} us more, a third of the links at a time; errors on the unseen PaLM-540B rows: {errors}"
    )
    if args.hardware != "tpu_v4":
      notes.append(f"nothing was fitted on {args.hardware}: the constants are those of TPU v4")
  return notes


def _as_dict(o) -> dict:
  return {**o._asdict(), "fits": o.fits}


def _plan_dict(p) -> dict:
  phases = {name: _as_dict(o) if o else None for name, o in (("prefill", p.prefill), ("decode", p.decode))}
  head = {"chips": p.prefill.chips, "batch": p.prefill.batch, "mesh": p.prefill.mesh}
  return {**head, **p._asdict(), **phases}


POINT = ("phase", "latency_s", "chip_ms_per_token", "mfu", "ffn", "attention", "chips", "batch")


def _points(found: list, planner) -> list[dict]:
  """The options that fit, as rows of the plot."""
  points = []
  for phase in planner.PHASES:
    fitting = [o for o in found if o.phase == phase and o.fits]
    front = planner.pareto(fitting, lambda o: o.latency_s, lambda o: o.chip_ms_per_token)
    for o in fitting:
      point = {name: getattr(o, name) for name in POINT}
      points.append({**point, "mesh": planner.layout(o).split()[1], "front": o in front})
  return points


def _print(args, planner, found, plans, best, notes) -> None:
  if len(plans) == 1:
    for phase in planner.PHASES:
      rows = [_row(o, planner) for o in planner.best_meshes(found) if o.phase == phase]
      if rows:
        print_table(rows, False, title=f"{phase}: the best mesh of each layout")
  else:
    front = planner.pareto(plans, lambda p: p.latency_s, lambda p: p.chip_ms_per_token)
    print_table([_plan_row(p, planner) for p in front], False, title="the Pareto front of latency and cost")
  print()
  for p in {id(p): p for p in best.values()}.values():
    aims = [aim for aim, q in best.items() if q is p]
    head = f"{p.prefill.chips} chips, batch {p.prefill.batch}: {p.latency_s:.3g} s, {p.tokens_per_s:,.0f} tokens/s"
    print(f"best for {', '.join(aims)}: {head}, {p.chip_ms_per_token:.3g} chip-ms/token, MFU {p.mfu:.1%}\n  {p.why}")
  print()
  for note in notes:
    print(f"note: {note}")


def _row(o, planner) -> dict:
  layout, mesh = planner.layout(o).split()
  ms = lambda s: f"{1e3 * s:.4g}"
  return {
    "layout": layout,
    "mesh": mesh,
    "latency": ms(o.latency_s),
    "MFU": f"{o.mfu:.1%}",
    "chip-ms/token": o.chip_ms_per_token,
    "GiB/chip": f"{o.bytes_per_chip / 2**30:.2f}" + ("" if o.fits else f" ({o.bytes_over / 2**30:.2f} too many)"),
    "passes": o.passes,
    "compute ms": ms(o.compute_s),
    "weights": ms(o.weights_s),
    "kv": ms(o.kv_s),
    "links": ms(o.comm_s),
    "gathers": ms(o.gather_s),
    "at least": ms(o.latency_lower_s),
    "no overlap": ms(o.latency_upper_s),
    "context": o.max_context,
  }


def _plan_row(p, planner) -> dict:
  return {
    "chips": p.prefill.chips,
    "batch": p.prefill.batch,
    "prefill": planner.layout(p.prefill),
    "s": p.prefill.latency_s,
    "decode": planner.layout(p.decode) if p.decode else None,
    "s ": p.decode.latency_s if p.decode else None,
    "tokens/s": p.tokens_per_s,
    "chip-ms/token": p.chip_ms_per_token,
    "MFU": f"{p.mfu:.1%}",
  }


if __name__ == "__main__":
  from llmarch.__main__ import main as llmarch

  sys.exit(llmarch(["plan", *sys.argv[1:]]))
