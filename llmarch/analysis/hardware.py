"""Peak matmul rates of devices, the denominator of MFU."""

import functools
import time

# Dense (no structured sparsity) FLOP/s by how `device_kind` starts: in 16 bits, and for f32 arrays at JAX's
# default precision: TF32 tensor cores on GPUs, one bf16 pass on TPUs. The first row that fits counts.
# Sources: NVIDIA's data sheets, halved where they print the sparse rate, and Google Cloud's pages on each TPU.
PEAKS = {
  "NVIDIA GB200": (2500e12, 1250e12),
  "NVIDIA B200": (2250e12, 1125e12),
  "NVIDIA H200 NVL": (835e12, 417e12),
  "NVIDIA H200": (989e12, 494e12),
  "NVIDIA GH200": (989e12, 494e12),
  "NVIDIA H100 NVL": (835e12, 417e12),
  "NVIDIA H100 PCIe": (756e12, 378e12),
  "NVIDIA H100": (989e12, 494e12),
  "NVIDIA A100": (312e12, 156e12),
  "NVIDIA L40S": (362e12, 183e12),
  "TPU v4": (275e12, 275e12),
  "TPU v5 lite": (197e12, 197e12),
  "TPU v5e": (197e12, 197e12),
  "TPU v5": (459e12, 459e12),  # v5p
  "TPU v6": (918e12, 918e12),  # v6e, "v6 lite"
}


def peak_flops(device, dtype: str = "bfloat16") -> float:
  """FLOP/s of one jax device at matmuls of `dtype`: published where PEAKS has it, measured elsewhere (CPUs)."""
  for kind, (half, single) in PEAKS.items():
    if device.device_kind.startswith(kind):
      return single if dtype == "float32" else half
  return _measured_peak(device, dtype)


@functools.cache
def _measured_peak(device, dtype: str) -> float:
  """The best of several square matmuls: what this machine can reach, other load included."""
  import jax
  import jax.numpy as jnp

  n = 1024 if device.platform == "cpu" else 8192  # 20 ms or more on 2 cores
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
  """Bytes/s that a jax device reads, measured: the best of several sums over an array that no cache holds."""
  import jax
  import jax.numpy as jnp

  n = 2**26 if device.platform == "cpu" else 2**30  # f32: 256 MiB, 4 GiB
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
