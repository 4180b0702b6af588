"""Programs compiled ahead of time for machines that are not present, and a receipt of the result.

The compilers come from the package index (extras `tpu` and `cuda13`) and need no device. Nothing is allocated:
parameters and states are shapes.
"""

import contextlib
import dataclasses
import importlib.util
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from llmarch.config import ModelConfig
from llmarch.errors import UserError, check, nearest
from llmarch.run_config import RunConfig

GiB = 2**30


class Family(NamedTuple):
  """The machines with one kind of chip, as their compiler names them."""

  platform: Literal["tpu", "cuda"]
  example: str
  memory: int  # bytes that the compiler grants a device (a TPU reserves 1/4 to 1/2 GiB)
  options: Mapping[str, str] = {}


H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  shared_memory_per_block: 49152
  shared_memory_per_core: 233472  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98
  device_memory_size: 84942979072  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# One device is one chip. On v4 that takes the option "megacore" (by default, each of the two cores is a device); a
# tpu7x chip always counts as two devices.
FAMILIES = {
  "v4": Family("tpu", "v4:4x4x4", int(30.75 * GiB), {"chip_config_name": "megacore"}),
  "v5e": Family("tpu", "v5e:16x16", int(15.75 * GiB)),
  "v5p": Family("tpu", "v5p:4x4x4", int(95.73 * GiB)),
  "v6e": Family("tpu", "v6e:16x16", int(31.24 * GiB)),
  "tpu7x": Family("tpu", "tpu7x:4x4x4", int(94.74 * GiB)),
  "h100": Family("cuda", "h100:8", 84942979072, {"target_config": H100}),
}


class Topology(NamedTuple):
  """The devices of a machine, and the sides of its torus."""

  name: str
  family: Family
  sides: tuple[int, ...]  # sides of the torus, or the number of GPUs
  devices: list


def prepare() -> None:
  """Tells jax and libtpu that there is no accelerator here. Call it before the first use of either."""
  quiet = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # otherwise a second process fails at libtpu's lock file
    "TPU_SKIP_MDS_QUERY": "1",  # otherwise libtpu asks the network which TPU this is
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "1",  # sends warnings to stderr, where `_messages` reads them
    "TPU_MIN_LOG_LEVEL": "1",
  }
  for name, value in quiet.items():
    os.environ.setdefault(name, value)
  os.environ["JAX_PLATFORMS"] = "cpu"


def find_topology(name: str) -> Topology:
  """Finds the devices of a name such as "v4:4x4x4". Raises UserError for one that no compiler here knows."""
  kind, _, shape = name.partition(":")
  known = ", ".join(f.example for f in FAMILIES.values())
  check(kind in FAMILIES, f"--topology: there is no {kind!r}{nearest(kind, FAMILIES)}; write one like {known}")
  family = FAMILIES[kind]
  check(
    bool(re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape)),
    f"--topology={name}: {shape!r} is not a shape; write one like {family.example}",
  )
  _check_installed(name, family)
  prepare()
  from jax.experimental import topologies

  sides = tuple(map(int, shape.split("x")))
  where = {"topology_name": name} if family.platform == "tpu" else {"topology": f"1x1x{'x'.join(map(str, sides))}"}
  try:
    devices = topologies.get_topology_desc(platform=family.platform, **where, **family.options).devices
  except Exception as e:
    reason = str(e).strip().splitlines()[0]
    raise UserError(
      f"--topology={name}: the compiler does not know it ({reason}); write one like {family.example}"
    ) from None
  return Topology(name, family, sides, list(devices))


def _check_installed(name: str, family: Family) -> None:
  if family.platform == "tpu":
    found = importlib.util.find_spec("libtpu")
  else:
    plugins = importlib.util.find_spec("jax_plugins")
    found = plugins and any(importlib.util.find_spec(f"jax_plugins.xla_cuda{v}") for v in (12, 13))
  package, extra = ("libtpu", "tpu") if family.platform == "tpu" else ("jax's CUDA plugin", "cuda13")
  check(bool(found), f"--topology={name} needs {package}; pip install 'llmarch[{extra}]'")


# ---------------------------------------------------------------------------------------------- one program


def receipt(lower: Callable[[], Any], mesh, memory: int) -> dict:
  """Compiles what `lower()` returns (a jax.stages.Lowered) for the mesh's devices, and reports the result.

  Numbers are of one device and one run of the program. A loop whose end depends on data counts as one iteration, which
  is a decode step. A program that the compiler refuses for memory gives a receipt that says so.
  """
  import jax

  from llmarch.analysis import hlo

  began = time.perf_counter()
  with _messages() as messages:
    # Kernels choose their form by the current device, which must be the one that we compile for.
    with jax.default_device(mesh.devices.flat[0]), jax.set_mesh(mesh):
      lowered = lower()
    lowered_after = time.perf_counter() - began
    try:
      compiled, refusal = lowered.compile(), None
    except jax.errors.JaxRuntimeError as e:
      if "RESOURCE_EXHAUSTED" not in str(e):
        raise
      compiled, refusal = None, str(e)
  result = {"fits": False, "bytes_per_chip": None, "memory_per_chip": memory, "flops": None, "bytes_moved": None}
  result |= {"collectives": [], "open_loops": None, "opaque": {}, "refusal": None}
  result |= {
    "full_rematerialisations": sum("nvoluntary full rematerialization" in line for line in messages),
    "lower_seconds": round(lowered_after, 2),
    "compile_seconds": round(time.perf_counter() - began - lowered_after, 2),
  }
  if refusal is not None:
    wanted, granted = _refused_bytes(refusal)
    return result | {"bytes_per_chip": wanted, "memory_per_chip": granted or memory, "refusal": refusal[:400]}
  counts = hlo.count(compiled.as_text(), mesh.shape)
  needed = _device_bytes(compiled.memory_analysis())
  return result | {
    "fits": needed <= memory,
    "bytes_per_chip": needed,
    "flops": counts.flops,
    "bytes_moved": counts.bytes,
    "collectives": [c._asdict() for c in counts.collectives],
    "open_loops": counts.open_loops,
    "opaque": counts.opaque,
  }


def _device_bytes(m) -> int:
  """Bytes of arguments, results, temporaries and code at the worst moment."""
  parts = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
  return max(m.peak_memory_in_bytes, parts + m.temp_size_in_bytes + m.generated_code_size_in_bytes)


_SIZES = r"([\d.]+)([KMGT]?)"
_REFUSALS = (  # patterns of messages: what the program needs, what the device has
  re.compile(rf"\({_SIZES}\) exceeds available \w+ \({_SIZES}\)"),
  re.compile(rf"Used {_SIZES} of {_SIZES} hbm", re.IGNORECASE),
)


def _refused_bytes(message: str) -> tuple[int | None, int | None]:
  for pattern in _REFUSALS:
    if found := pattern.search(message):
      a, a_unit, b, b_unit = found.groups()
      to_bytes = lambda n, unit: int(float(n) * 1024 ** " KMGT".index(unit or " "))
      return to_bytes(a, a_unit), to_bytes(b, b_unit)
  return None, None


@contextlib.contextmanager
def _messages() -> Iterator[list[str]]:
  """Collects what the compilers write to stderr (file descriptor 2); shown only if they fail."""
  lines: list[str] = []
  sys.stderr.flush()
  kept = os.dup(2)
  with tempfile.TemporaryFile("w+", errors="replace") as file:
    os.dup2(file.fileno(), 2)
    failed = True
    try:
      yield lines
      failed = False
    except UserError:  # our own sentence needs no compiler output
      failed = False
      raise
    finally:
      os.dup2(kept, 2)
      os.close(kept)
      file.seek(0)
      lines += file.read().splitlines()
      if failed:
        print("\n".join(lines), file=sys.stderr)


# ---------------------------------------------------------------------------------------- llmarch's programs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
  """One program of the model: what to compile, and for which machine."""

  topology: str
  phase: Literal["prefill", "decode", "train"]
  batch: int
  context: int  # tokens of a row: the capacity of the state, or the length of a training sequence
  chunk: int | None = None  # prompt tokens of a prefill call; None: the whole context
  mesh: str = ""  # as "x=4,y=4,z=4"; "": the sides of the torus
  prefill_layout: str = "ws_2d"
  decode_layout: str = "ws_2d"
  weights: str | None = None  # format of the matrices, as "int8"; None: that of the config
  unrolled: bool = False  # compiles every layer by itself, as on one device; false: one scan, which compiles faster


def compile_cell(config: RunConfig, cell: Cell) -> dict:
  """The receipt of one cell. Raises UserError, before compiling, if the cell is impossible."""
  topology = find_topology(cell.topology)
  mesh = _mesh(cell, topology)
  build = {"prefill": _prefill, "decode": _decode, "train": _train}[cell.phase]
  return {"mesh": dict(mesh.shape), **receipt(build(config, cell, mesh), mesh, topology.family.memory)}


STEP = 128  # tokens; compilers lay caches out in tiles of this size


def longest_context(config: RunConfig, cell: Cell) -> tuple[int, dict | None]:
  """The longest context (in whole STEPs, within 2 %) whose program fits, and its receipt; (0, None) if none does."""
  low, high, best = 0, None, None
  while high is None or high - low > max(1, low // 64):
    steps = (2 * low or 1) if high is None else (low + high) // 2
    found = compile_cell(config, dataclasses.replace(cell, context=steps * STEP))
    if found["fits"]:
      low, best = steps, found
    else:
      high = steps
  return low * STEP, best


def _mesh(cell: Cell, topology: Topology):
  from llmarch import sharding

  sizes = sharding.parse_mesh(cell.mesh) if cell.mesh else _default_mesh(cell.phase, topology)
  return sharding.make_mesh(sizes, topology.devices)


def _default_mesh(phase: str, topology: Topology) -> dict[str, int]:
  """The sides of the torus; for training, its first side is the axis tensor, and the others are fsdp."""
  count, sides = len(topology.devices), topology.sides
  first, second = sides[:2] if len(sides) > 1 else (1, sides[0])
  if phase == "train":
    return {"fsdp": count // first, "tensor": first}
  return {"x": first, "y": second, "z": count // (first * second)}


def _decoder(config: ModelConfig, cell: Cell, mesh):
  """The programs, and the shapes of parameters and carry."""
  import jax
  from flax import nnx

  from llmarch.infer.decoder import decoding_params, make_decoder
  from llmarch.infer.quantize import quantize_params
  from llmarch.models.decoder import Decoder, stacked, unstack
  from llmarch.ops import cache
  from llmarch.ops.sampling import Sampling

  form = unstack if cell.unrolled else stacked
  programs = make_decoder(
    config,
    batch=cell.batch,
    max_len=cell.context,
    chunk=cell.chunk or cell.context,
    sampling=Sampling(temperature=0.0),
    mesh=mesh,
    prefill_layout=cell.prefill_layout,
    decode_layout=cell.decode_layout,
    weights=cell.weights,
    form=form,
  )
  params = jax.eval_shape(lambda: decoding_params(config, nnx.state(Decoder(config, jax.random.key(0))), form))
  if cell.weights:
    params = jax.eval_shape(lambda p: quantize_params(p, cell.weights), params)
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), cell.batch))
  shape_of = lambda s: keys if s.dtype == str(keys.dtype) else jax.ShapeDtypeStruct(s.shape, s.dtype)
  return programs, params, jax.tree.map(shape_of, programs.carry, is_leaf=cache.is_spec)


def _decode(config: RunConfig, cell: Cell, mesh) -> Callable:
  import jax

  programs, params, carry = _decoder(config.model, cell, mesh)
  return lambda: programs.decode.lower(params, carry, jax.ShapeDtypeStruct((), "int32"))


def _prefill(config: RunConfig, cell: Cell, mesh) -> Callable:
  import jax

  programs, params, carry = _decoder(config.model, cell, mesh)
  rows = jax.ShapeDtypeStruct((cell.batch, cell.chunk or cell.context), "int32")
  return lambda: programs.prefill.lower(params, carry, rows, rows)


def _train(config: RunConfig, cell: Cell, mesh) -> Callable:
  import jax

  from llmarch.train.step import make_train_step

  train = dataclasses.replace(config.train, batch_size=cell.batch, seq_len=cell.context)
  sizes = ",".join(f"{axis}={n}" for axis, n in mesh.shape.items())
  functions = make_train_step(dataclasses.replace(config, train=train, mesh=sizes), mesh)
  rows_of = lambda dtype: jax.ShapeDtypeStruct((cell.batch, cell.context), dtype, sharding=functions.batch_sharding)
  batch = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), rows_of("int32"))
  return lambda: functions.step.lower(functions.abstract_state, {**batch, "loss_weights": rows_of("float32")})
