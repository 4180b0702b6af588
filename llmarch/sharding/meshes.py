"""Making meshes of devices."""

import math
import sys
from collections.abc import Mapping, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from llmarch.errors import check
from llmarch.sharding.mesh_text import parse_mesh


def make_mesh(sizes: Mapping[str, int], devices: Sequence | None = None) -> Mesh:
  """A mesh of exactly these devices (None: all there are), the first axis over the slowest network.

  Raises UserError unless the sizes multiply to them.
  """
  need = math.prod(sizes.values())
  devices = jax.devices() if devices is None else devices
  # jax.make_mesh would leave the rest idle without a word.
  count = len(devices)
  check(need == count, f"mesh {dict(sizes)} covers {need} devices of {count}; make the sizes multiply to {count}")
  # Auto: GSPMD places the collectives (jax.make_mesh would make the axes Explicit).
  shape, auto = tuple(sizes.values()), (AxisType.Auto,) * len(sizes)
  if (outer := across_granules(sizes, devices)) is not None:
    inner = [n // o for n, o in zip(shape, outer, strict=True)]
    by_slice = len(_slices(devices)) > 1
    arranged = mesh_utils.create_hybrid_device_mesh(
      inner, outer, devices, process_is_granule=not by_slice, allow_split_physical_axes=True
    )
    return Mesh(arranged, tuple(sizes), axis_types=auto)
  try:
    return jax.make_mesh(shape, tuple(sizes), axis_types=auto, devices=devices)
  except NotImplementedError:  # jax wants leave to let two mesh axes share a side of a torus
    arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(arranged, tuple(sizes), axis_types=auto)


def device_mesh(text: str, num_processes: int = 1) -> Mesh:
  """The mesh of a text such as "data=2,tensor=4" or "x=2,y=2,z=2", over the devices there are.

  A machine without accelerators gets as many fake ones as it needs, and a line that says so; it must be called before
  jax's devices are first used. Each process (train/distributed.py) has an equal share of the devices.
  """
  sizes = parse_mesh(text)
  need = math.prod(sizes.values())
  check(
    need % num_processes == 0,
    f"{num_processes} processes cannot share devices evenly, of which mesh {text!r} has {need}; make it a multiple of"
    f" {num_processes}",
  )
  # This is read by the CPU backend alone. (If more devices are needed, `make_mesh` says so.)
  jax.config.update("jax_num_cpu_devices", min(need // num_processes, 4096))
  if jax.default_backend() == "cpu" and need > 1 and jax.process_index() == 0:
    print(f"no accelerator: {need} fake devices on this CPU", file=sys.stderr)
  return make_mesh(sizes)


def _slices(devices: Sequence) -> set:
  return {getattr(d, "slice_index", 0) for d in devices}


def across_granules(sizes: Mapping[str, int], devices: Sequence) -> list[int] | None:
  """The factor of each mesh axis that lies between granules, the outermost axis first; None if there is one granule.

  A granule has a fast network of its own: a TPU slice, and elsewhere the devices of one process.
  Raises UserError where the granules do not fit into the leading axes.
  """
  granules, what = len(_slices(devices)), "slices"
  if granules == 1 and devices[0].platform != "tpu":
    granules, what = len({d.process_index for d in devices}), "processes"
  if granules == 1:
    return None
  left, outer = granules, []
  for n in sizes.values():
    outer.append(math.gcd(n, left))
    left //= outer[-1]
    if outer[-1] < n:  # a part of this axis lies inside, and so must all that follow
      break
  outer += [1] * (len(sizes) - len(outer))
  given = ",".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1)
  check(
    left == 1,
    f"mesh: {given} cannot be cut into {granules} {what}; give its leading axes sizes that multiply to {granules}",
  )
  return outer
