"""`llmarch bench`: train step, prefill and decode on given shapes, beside a floor and, on request, a peer."""

import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import typing

from absl import flags

from llmarch.commands.common import load_config, parse_flags, print_table, split_overrides
from llmarch.errors import UserError

USAGE = (
  "llmarch bench --config=FILE|PRESET [--phases=train,prefill,decode] [--batch=1,8] [--weights=bfloat16,int8]"
  " [--kv=bfloat16,int8] [--peer=SCRIPT] [--json]"
)


def _define(values: flags.FlagValues) -> None:
  text = lambda name, default, help: flags.DEFINE_string(name, default, help, flag_values=values)
  number = lambda name, default, help: flags.DEFINE_integer(name, default, help, lower_bound=1, flag_values=values)
  text("config", None, "config file, preset or run folder; its train.batch_size and train.seq_len shape the train step")
  text("phases", "train,prefill,decode", "what to measure")
  text("batch", "1,8", "batch sizes of prefill and decode")
  text("weights", None, "of prefill and decode: float types or quantised formats, a row each; precision.param if none")
  text("kv", None, "the same for the decoding state; precision.state if none")
  text("remat", "none,full", "rematerialisation policies of the train step, a row each")
  number("prompt", 64, "tokens of a prompt")
  number("generate", 64, "tokens decoded after it")
  number("repeats", 3, "repetitions a round, after one to warm up")
  number("rounds", 3, "rounds; with a peer, ours and the peer take turns")
  text("peer", None, "script that measures another library: benchmarks/transformers_llama.py says how")
  flags.DEFINE_bool("json", False, "print JSON", flag_values=values)


def main(argv: list[str]) -> int:
  """Runs `llmarch bench`; returns its exit code."""
  argv, overrides = split_overrides(argv)
  args = parse_flags(argv, _define, USAGE)
  config = load_config(args.config, overrides)
  shapes = _shapes(config, args)
  cases = [_PHASES[s["phase"]](config, s) for s in shapes]
  peer_shapes = [s for s in shapes if s.get("remat", "none") == "none"]
  ours, peers = [[] for _ in shapes], {}
  for _ in range(args.rounds):
    for i, case in enumerate(cases):
      ours[i].append([case.run() for _ in range(args.repeats)])
    if args.peer:
      for shape, seconds in zip(peer_shapes, _run_peer(args.peer, config, peer_shapes, args.repeats), strict=True):
        peers.setdefault(_name(shape), []).append(seconds)
  rows = [_row(s, c, o, peers.get(_name(s))) for s, c, o in zip(shapes, cases, ours, strict=True)]
  if not args.json:
    print(_machine())
    empty = {key for key in rows[0] if all(row[key] is None for row in rows)}
    rows = [{key: value for key, value in row.items() if key not in empty} for row in rows]
  print_table(rows, args.json)
  return 0


def _shapes(config, args) -> list[dict]:
  """The cases that the flags ask for, each a dict that a peer understands too."""
  try:
    batches = [int(b) for b in args.batch.split(",")]
  except ValueError:
    raise UserError(f"--batch={args.batch!r} must be numbers such as 1,8") from None
  if min(batches) < 1:
    raise UserError(f"--batch={args.batch!r} must be at least 1")
  phases = args.phases.split(",")
  for phase in phases:
    if phase not in _PHASES:
      raise UserError(f"--phases: there is no {phase!r} (known: {', '.join(_PHASES)})")
  length = args.prompt + args.generate
  if "decode" in phases and length > config.model.max_seq_len:
    raise UserError(f"--prompt and --generate make {length} tokens, above model.max_seq_len={config.model.max_seq_len}")
  c, shapes = config.train, []
  if "train" in phases:
    one = {"phase": "train", "batch": c.batch_size, "seq_len": c.seq_len}
    shapes += [{**one, "remat": remat} for remat in args.remat.split(",")]
  precision = config.model.precision
  formats = {
    "weights": args.weights.split(",") if args.weights else [precision.param],
    "kv": args.kv.split(",") if args.kv else [precision.state],
  }
  for phase, b, weights, kv in itertools.product(("prefill", "decode"), batches, *formats.values()):
    if phase in phases:
      shape = {"phase": phase, "batch": b, "prompt": args.prompt, "generate": args.generate}
      shapes.append({**shape, "weights": weights, "kv": kv})
      _in_formats(config.model, shapes[-1])
  return shapes


def _in_formats(model, shape: dict):
  """The model with the shape's state format, and its weights' type where that is a float one. Raises UserError."""
  from llmarch.build import build
  from llmarch.config import DType, StateDType
  from llmarch.errors import nearest
  from llmarch.ops.quant import FORMATS

  weights, floats = shape["weights"], typing.get_args(DType)
  if weights not in (*FORMATS, *floats):
    raise UserError(f"--weights: there is no {weights!r}{nearest(weights, (*FORMATS, *floats))}")
  param = weights if weights in floats else model.precision.param
  state = build(StateDType, shape["kv"], "--kv")
  return dataclasses.replace(model, precision=dataclasses.replace(model.precision, param=param, state=state))


@dataclasses.dataclass(frozen=True)
class Case:
  """One thing to time: `run()` gives the seconds of one repetition of `tokens` tokens."""

  run: object
  tokens: int
  floor_seconds: float  # no machine of this matmul rate and memory bandwidth can do it faster
  bound: str  # which of the two sets the floor
  bytes_moved: float  # at least, to and from memory
  peak_bytes: int | None  # of the compiled program: arguments, results and temporaries


def _case(run, program, tokens: int, flops: float, bytes_moved: float, dtype: str) -> Case:
  import jax

  from llmarch.analysis import hardware

  device = jax.devices()[0]
  compute = flops / hardware.peak_flops(device, dtype)
  memory = bytes_moved / hardware.memory_bandwidth(device)
  run()  # warm up
  m = program.memory_analysis()
  peak = m and m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
  return Case(run, tokens, max(compute, memory), "compute" if compute > memory else "memory", bytes_moved, peak)


def _train(config, shape: dict) -> Case:
  import jax
  import numpy as np

  from llmarch.analysis import cost
  from llmarch.train.step import make_train_step

  c = dataclasses.replace(config.train, remat=shape["remat"])
  functions = make_train_step(dataclasses.replace(config, train=c))
  B, T, V = c.batch_size, c.seq_len, config.model.vocab_size
  tokens = np.random.default_rng(0).integers(0, V, (B, T + 1), np.int32)
  batch = jax.device_put(
    {
      "tokens": tokens[:, :-1],
      "targets": tokens[:, 1:],
      "positions": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
      "segment_ids": np.zeros((B, T), np.int32),
      "loss_weights": np.ones((B, T), np.float32),
    }
  )
  program = functions.step.lower(functions.abstract_state, batch).compile()
  state = functions.init()

  def run() -> float:
    nonlocal state
    began = time.perf_counter()
    state, _ = program(state, batch)
    jax.block_until_ready(state)
    return time.perf_counter() - began

  flops = cost.train_flops_per_token(config.model, T) * B * T
  # AdamW reads and writes parameters and both moments once.
  moved = 6 * 4 * cost.params(config.model)["total"]
  return _case(run, program, B * T, flops, moved, config.model.precision.compute)


def _decoder(config, shape: dict):
  """Compiled prefill and decode programs, parameters, and a function that makes a carry after a prefill."""
  import jax
  import numpy as np
  from flax import nnx

  from llmarch.infer.decoder import decoding_params, make_decoder
  from llmarch.infer.quantize import quantize_params
  from llmarch.models.decoder import Decoder
  from llmarch.ops.quant import FORMATS
  from llmarch.ops.sampling import Sampling

  model = _in_formats(config.model, shape)
  B, P, max_len = shape["batch"], shape["prompt"], shape["prompt"] + shape["generate"] + 1
  programs = make_decoder(model, batch=B, max_len=max_len, chunk=P, sampling=Sampling(temperature=0.0))
  params = jax.jit(lambda: decoding_params(model, nnx.state(Decoder(model, jax.random.key(0)))))()
  if shape["weights"] in FORMATS:
    params = quantize_params(params, shape["weights"])
  tokens = np.random.default_rng(0).integers(0, model.vocab_size, (B, P), np.int32)
  positions = np.tile(np.arange(P, dtype=np.int32), (B, 1))
  fresh = lambda: programs.start(jax.random.split(jax.random.key(0), B), np.full(B, max_len, np.int32))
  prefill = programs.prefill.lower(params, fresh(), tokens, positions).compile()
  return programs, params, fresh, lambda carry: prefill(params, carry, tokens, positions), prefill


def _prefill(config, shape: dict) -> Case:
  import jax

  from llmarch.analysis import cost

  _, params, fresh, prefill, program = _decoder(config, shape)

  def run() -> float:
    carry = jax.block_until_ready(fresh())
    began = time.perf_counter()
    jax.block_until_ready(prefill(carry))
    return time.perf_counter() - began

  model, B, P = config.model, shape["batch"], shape["prompt"]
  head = 2 * cost.head_macs(model)  # only the last position's logits are made
  flops = B * (P * (cost.flops_per_token(model, P) - head) + head)
  return _case(run, program, B * P, flops, _weight_bytes(model, params), model.precision.compute)


def _decode(config, shape: dict) -> Case:
  import jax
  import numpy as np

  from llmarch.analysis import cost
  from llmarch.ops.cache import allocate
  from llmarch.ops.quant import nbytes

  programs, params, fresh, prefill, _ = _decoder(config, shape)
  n = shape["generate"]
  program = programs.decode.lower(params, prefill(fresh()), np.int32(n)).compile()

  def run() -> float:
    carry = jax.block_until_ready(prefill(fresh()))
    began = time.perf_counter()
    _, _, steps = jax.block_until_ready(program(params, carry, np.int32(n)))
    seconds = time.perf_counter() - began
    assert int(steps) == n, "no row may end early: there is no stop token"
    return seconds

  model, B = config.model, shape["batch"]
  length = shape["prompt"] + shape["generate"]
  flops = n * B * cost.flops_per_token(model, length)
  state = jax.eval_shape(lambda: allocate(programs.carry["state"]["layers"]))
  moved = n * (_weight_bytes(model, params) + nbytes(state))
  return _case(run, program, B * n, flops, moved, model.precision.compute)


def _weight_bytes(model, params) -> int:
  """Bytes of weights that a step reads; of an untied embedding it reads one row a token."""
  from llmarch.ops.quant import nbytes

  return nbytes(params) - (0 if model.head.tied else nbytes(params["embed"]))


_PHASES = {"train": _train, "prefill": _prefill, "decode": _decode}


def _run_peer(script: str, config, shapes: list[dict], repeats: int) -> list[list[float]]:
  from llmarch.build import to_dict

  request = {"model": to_dict(config.model), "shapes": shapes, "repeats": repeats, "threads": os.cpu_count()}
  with tempfile.NamedTemporaryFile("w", suffix=".json") as f:
    json.dump(request, f)
    f.flush()
    done = subprocess.run([sys.executable, script, f.name], capture_output=True, text=True)
  if done.returncode:
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    raise UserError(f"--peer={script} failed ({last}); install what it imports, or leave --peer out")
  return [row["seconds"] for row in json.loads(done.stdout.strip().splitlines()[-1])]


def _name(shape: dict) -> tuple:
  return tuple(shape.get(key) for key in ("phase", "batch", "remat", "weights", "kv"))


def _row(shape: dict, case: Case, ours: list[list[float]], peer: list[list[float]] | None) -> dict:
  """ours, peer: seconds by round and repetition. Medians, and the least and greatest round.

  step_mb: what a step of the phase must move at least; bandwidth: that, as a fraction of the measured one.
  """
  import jax

  from llmarch.analysis import hardware

  steps = shape["generate"] if shape["phase"] == "decode" else 1
  seconds = sorted(s for r in ours for s in r)
  middle = statistics.median(seconds)
  row = {
    "phase": shape["phase"] + ("" if shape.get("remat", "none") == "none" else f", remat {shape['remat']}"),
    "batch": shape["batch"],
    "length": shape.get("seq_len", shape.get("prompt")),
    "weights": shape.get("weights"),
    "kv": shape.get("kv"),
    "tokens_per_second": round(case.tokens / middle, 1),
    "ms": 1e3 * middle,
    "ms_min": 1e3 * seconds[0],
    "ms_max": 1e3 * seconds[-1],
    "floor_ms": 1e3 * case.floor_seconds,
    "bound": case.bound,
    "times_floor": middle / case.floor_seconds,
    "step_mb": case.bytes_moved / steps / 1e6,
    "bandwidth": case.bytes_moved / middle / hardware.memory_bandwidth(jax.devices()[0]),
    "peak_mb": case.peak_bytes and round(case.peak_bytes / 1e6, 1),
  }
  if peer:
    ratios = [statistics.median(p) / statistics.median(o) for o, p in zip(ours, peer, strict=True)]
    row |= {
      "peer_tokens_per_second": round(case.tokens / statistics.median(s for r in peer for s in r), 1),
      "ratio": statistics.median(ratios),
      "ratio_min": min(ratios),
      "ratio_max": max(ratios),
    }
  else:
    row |= dict.fromkeys(("peer_tokens_per_second", "ratio", "ratio_min", "ratio_max"))
  return row


def _machine() -> str:
  import jax

  from llmarch.analysis import hardware

  device = jax.devices()[0]
  return (
    f"{device.device_kind} ({os.cpu_count()} cores), jax {jax.__version__}: "
    f"{hardware.peak_flops(device, 'float32'):.3g} FLOP/s f32 matmul, "
    f"{hardware.memory_bandwidth(device):.3g} B/s read"
  )
