"""Several processes that train together: they find each other, share a batch, and end together.

Every process runs the same program over one mesh of all their devices. Only the main process (number 0) writes
metrics, the config and text to the terminal; all processes write checkpoints. The cluster is found from explicit flags
or from the environment; a single process does not start jax.distributed.
"""

import contextlib
import dataclasses
import os
import re
import socket
import sys
import threading
import traceback
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from llmarch.errors import UserError, check
from llmarch.train.faults import INTERRUPTED, WATCHDOG

# A process counts as dead after this many seconds without a heartbeat, and all others end (jax: 100).
HEARTBEAT = 30
# All processes must have started within this many seconds.
START_TIMEOUT = 300
# `from_main` passes this many numbers on.
ROOM = 256


@dataclasses.dataclass(frozen=True)
class Cluster:
  """This process, as one of the processes of its job."""

  num_processes: int
  process_id: int
  coordinator: str | None  # HOST:PORT of process 0; None: jax finds all processes by itself (Cloud TPU)
  local_devices: tuple[int, ...] | None = None  # the GPUs of this process; None: all that it sees
  one_host: bool = False


# ----------------------------------------------------------------------------------------------- detection


def find_cluster(
  *, num_processes: int | None = None, process_id: int | None = None, coordinator: str | None = None,
  environ: Mapping[str, str] = os.environ,
) -> Cluster | None:  # fmt: skip
  """The cluster of this process, from the given numbers or else the environment; None for a single process.

  Sources in order: the arguments (or JAX_NUM_PROCESSES, JAX_PROCESS_ID, JAX_COORDINATOR_ADDRESS; in an indexed
  Kubernetes job, the number of processes is enough), Slurm, Open MPI, Cloud TPU. Raises UserError if only a part of a
  cluster is given.
  """
  given_or_set = lambda given, name: given if given is not None else _integer(environ, name)
  num_processes = given_or_set(num_processes, "JAX_NUM_PROCESSES")
  process_id = given_or_set(process_id, "JAX_PROCESS_ID")
  coordinator = coordinator or environ.get("JAX_COORDINATOR_ADDRESS")
  if num_processes is not None:
    return _explicit(num_processes, process_id, coordinator, environ)
  check(
    process_id is None, "--process_id (JAX_PROCESS_ID) is given without --num_processes; give both and --coordinator"
  )
  for find in (_slurm, _open_mpi, _cloud_tpu):
    if cluster := find(environ):
      if coordinator and cluster.coordinator:  # an explicit address wins: hosts may have several networks, or firewalls
        cluster = dataclasses.replace(cluster, coordinator=coordinator)
      return cluster if cluster.num_processes > 1 else None
  check(coordinator is None, "--coordinator (JAX_COORDINATOR_ADDRESS) is given without --num_processes; give both")
  return None


def _explicit(num_processes, process_id, coordinator, environ) -> Cluster | None:
  check(num_processes >= 1, f"--num_processes={num_processes} must be at least 1")
  if num_processes == 1:
    return None
  if "KUBERNETES_SERVICE_HOST" in environ and process_id is None:  # an indexed job numbers its pods
    process_id = _integer(environ, "JOB_COMPLETION_INDEX")
    if coordinator is None and process_id is not None:
      coordinator = _first_pod(socket.getfqdn(), process_id)
  check(
    process_id is not None and 0 <= process_id < num_processes,
    f"--process_id={process_id} must be one of 0 to {num_processes - 1}, for --num_processes={num_processes}",
  )
  check(
    coordinator is not None and re.fullmatch(r".+:\d+", coordinator),
    f"--coordinator={coordinator} must be HOST:PORT of process 0, the same for all {num_processes} processes",
  )
  one_host = _is_loopback(coordinator)
  return Cluster(num_processes, process_id, coordinator, _own_gpu(environ, process_id) if one_host else None, one_host)


def _first_pod(name: str, index: int) -> str | None:
  """JOB-3.SERVICE.NAMESPACE... -> JOB-0.SERVICE.NAMESPACE...:PORT; pods have names if the job has a subdomain."""
  pod, dot, domain = name.partition(".")
  return f"{pod.removesuffix(str(index))}0.{domain}:8476" if dot and pod.endswith(f"-{index}") else None


def _slurm(environ) -> Cluster | None:
  """The cluster of an srun step of several tasks."""
  need = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
  if not all(name in environ for name in need):
    return None
  one_host = environ.get("SLURM_STEP_NUM_NODES") == "1"
  nodes = environ["SLURM_STEP_NODELIST"]  # node7 | node7,other | node[007-009,12],other
  first = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
  host = "127.0.0.1" if one_host else (first[1] + (first[2] or ""))
  # SLURM_STEP_TASKS_PER_NODE has the tasks of each node, as in 8(x2),4.
  alone = re.fullmatch(r"1(\(x\d+\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
  port = _port(*(environ.get(f"SLURM_{name}", "") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT")))
  return Cluster(
    int(environ["SLURM_NTASKS"]), int(environ["SLURM_PROCID"]), f"{host}:{port}",
    None if alone else _own_gpu(environ, int(environ["SLURM_LOCALID"])), one_host,
  )  # fmt: skip


def _open_mpi(environ) -> Cluster | None:
  """The cluster of a process of mpirun."""
  if "OMPI_COMM_WORLD_RANK" not in environ:
    return None
  size, on_host = int(environ["OMPI_COMM_WORLD_SIZE"]), int(environ["OMPI_COMM_WORLD_LOCAL_SIZE"])
  job = environ.get("OMPI_MCA_orte_hnp_uri") or environ.get("PMIX_NAMESPACE", "")
  if size == on_host:
    host = "127.0.0.1"
  else:  # "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911" has the addresses of mpirun, whose host has rank 0
    found = re.search(r"tcp://([^,:]+)|tcp6://(\[[^,\]]+)", job)
    check(
      found or "JAX_COORDINATOR_ADDRESS" in environ,
      "mpirun does not tell its address; set JAX_COORDINATOR_ADDRESS to HOST:PORT of rank 0, for all ranks",
    )
    host = (found[1] or found[2] + "]") if found else ""
  return Cluster(
    size, int(environ["OMPI_COMM_WORLD_RANK"]), f"{host}:{_port(job)}",
    None if on_host == 1 else _own_gpu(environ, int(environ["OMPI_COMM_WORLD_LOCAL_RANK"])), size == on_host,
  )  # fmt: skip


def _cloud_tpu(environ, chips: Callable[[], bool] | None = None) -> Cluster | None:
  """The cluster of a Cloud TPU slice of several hosts, or of several slices; jax finds the other hosts by itself."""
  chips = chips or (lambda: any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*")))
  if environ.get("JAX_PLATFORMS") == "cpu" or not chips():
    return None
  hosts = environ.get("TPU_WORKER_HOSTNAMES")
  if hosts is None and "TPU_SKIP_MDS_QUERY" not in environ:
    server = environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints"
    with contextlib.suppress(OSError):
      request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
      hosts = urllib.request.urlopen(request, timeout=3).read().decode()
  count = len((hosts or "").split(",")) * int(environ.get("MEGASCALE_NUM_SLICES") or 1)
  return Cluster(count, 0, None)  # jax finds this process's number


def _own_gpu(environ, index: int) -> tuple[int, ...] | None:
  """The one GPU of a process that shares its host with others; None if the launcher has hidden the other GPUs."""
  shown = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
  return None if len(shown) == 1 and shown[0] else (index,)


def _port(*words: str) -> int:
  """A port in [61440, 65536) that all processes of a job agree on and other jobs probably do not use."""
  return 61440 + zlib.crc32("/".join(words).encode()) % 4096


def _integer(environ, name: str) -> int | None:
  text = environ.get(name)
  check(text is None or text.isdecimal(), f"{name}={text!r} in the environment is not a number; mend or unset it")
  return None if text is None else int(text)


def _is_loopback(address: str) -> bool:
  host = address.rpartition(":")[0].strip("[]")
  return host == "localhost" or host == "::1" or host.startswith("127.")


# ------------------------------------------------------------------------------------------------ start-up


def initialize(cluster: Cluster | None, *, heartbeat: int = HEARTBEAT, timeout: int = START_TIMEOUT) -> None:
  """Joins the processes of a cluster, before the first use of jax's devices; does nothing for a single process.

  If all processes are on one host, the coordinator listens on the loopback alone; otherwise on all interfaces, or on
  JAX_COORDINATOR_BIND_ADDRESS. It knows no passwords, so keep its port behind a firewall. If not all have joined within
  `timeout` seconds, this process ends with code 75 and a sentence (jax would abort it). Raises UserError if the
  coordinator cannot listen.
  """
  if cluster is None:
    return
  import jax

  address = cluster.coordinator
  bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or (address if cluster.one_host else None)
  if address and cluster.process_id == 0:
    _check_free(bind or f":{address.rpartition(':')[2]}")
  given = {} if address is None else dict(
    coordinator_address=address, num_processes=cluster.num_processes, process_id=cluster.process_id,
    local_device_ids=cluster.local_devices, cluster_detection_method="deactivate", coordinator_bind_address=bind,
  )  # fmt: skip
  jax.config.update("jax_enable_preemption_service", True)
  who = f"process {cluster.process_id}" if address else "this process"
  late = threading.Timer(
    timeout,
    lambda: die(
      WATCHDOG,
      f"{who} of {cluster.num_processes} waited {timeout} s for the others at {address or 'the coordinator'}; start"
      " them all, with the same --coordinator, and see that its port is reachable",
    ),
  )
  late.daemon = True
  late.start()
  try:
    jax.distributed.initialize(**given, heartbeat_timeout_seconds=heartbeat, initialization_timeout=timeout + 60)
  except (RuntimeError, ValueError) as e:
    raise UserError(f"cannot join {cluster.num_processes} processes at {address}: {_first_line(e)}") from e
  finally:
    late.cancel()


def _check_free(address: str) -> None:
  """Raises UserError if nothing can listen at this address; jax would crash."""
  host, _, port = address.rpartition(":")
  host = host.strip("[]")
  try:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as s:
      s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a socket that a run has just closed is no obstacle
      s.bind((host, int(port)))
  except OSError as e:
    raise UserError(
      f"process 0 cannot listen at {address} ({e.strerror}); give another --coordinator, or end the run that does"
    ) from None


def several() -> bool:
  """True if this process trains together with others."""
  import jax

  return jax.distributed.is_initialized()


def is_main() -> bool:
  """True in the process that writes metrics and text; a single process is the main one."""
  import jax

  return not several() or jax.process_index() == 0


# ------------------------------------------------------------------------------------------------ together


def barrier(name: str) -> None:
  """Returns once every process has called it; at once in a single process."""
  if several():
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def main_first(name: str):
  """Lets the main process run the body before the others do, so that a cache which it fills is made only once."""
  if not is_main():
    barrier(name)
  yield
  if is_main():
    barrier(name)


def from_main(numbers: list[int]) -> list[int]:
  """Passes the main process's numbers, from 0 to 2^31, to every process, since each may read a disk differently.

  Only the last ROOM numbers are passed.
  """
  if not several():
    return numbers
  from jax.experimental import multihost_utils

  numbers = numbers[-ROOM:]
  padded = np.array(numbers + [-1] * (ROOM - len(numbers)), np.int32)
  return [int(n) for n in multihost_utils.broadcast_one_to_all(padded) if n >= 0]


def anywhere(condition: bool) -> bool:
  """True if the condition holds on any process; all processes must ask."""
  if not several():
    return condition
  from jax.experimental import multihost_utils

  return bool(np.any(multihost_utils.process_allgather(np.array(condition))))


def check_same(**texts: str) -> None:
  """Raises UserError, on every process, unless all processes were given the same texts."""
  if not several():
    return
  from jax.experimental import multihost_utils

  mine = np.array([zlib.crc32(text.encode()) for text in texts.values()], np.uint32)
  everyone = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, len(texts))
  for name, row in zip(texts, everyone.T, strict=True):
    odd = np.flatnonzero(row != row[0]).tolist()
    check(not odd, f"process{'es' * (len(odd) > 1)} {', '.join(map(str, odd))} started with another {name} than 0")


def preempted(step: int) -> bool:
  """True if all processes are to stop after this step, because one of them got SIGTERM; all get the same answer.

  Every process must ask after every step, because they agree on a step that none has passed yet.
  """
  from jax.experimental import multihost_utils

  return multihost_utils.reached_preemption_sync_point(step)


def gather(tree):
  """Gathers every array to numpy on the main process (None elsewhere), leaf by leaf. All processes must call it."""
  import jax
  from jax.experimental import multihost_utils

  def gather_leaf(x):
    value = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(value) if is_main() else None

  return jax.tree.map(gather_leaf, tree)


# ----------------------------------------------------------------------------------------------- the batch


def local_rows(sharding, shape: tuple[int, int]) -> np.ndarray:
  """The rows of a [B, T] batch of which this process's devices hold a part, ascending."""
  return rows_of(sharding.addressable_devices_indices_map(shape).values(), shape[0])


def rows_of(indices: Iterable[tuple[slice, ...]], size: int) -> np.ndarray:
  """The rows, of `size` many, that any of these indices of arrays takes, ascending."""
  return np.unique(np.concatenate([np.arange(size)[index[0]] for index in indices]))


def place(batch: dict[str, np.ndarray], rows: np.ndarray, sharding, size: int):
  """Makes the global batch {name: [size, T]} on the mesh, from this process's rows (`local_rows`) in `batch`."""
  import jax

  def global_array(local):
    def piece_at(index):
      start, stop, _ = index[0].indices(size)
      first = np.searchsorted(rows, start)
      return local[(slice(first, first + stop - start), *index[1:])]

    return jax.make_array_from_callback((size, *local.shape[1:]), sharding, piece_at)

  return {name: global_array(local) for name, local in batch.items()}


# ----------------------------------------------------------------------------------------------- endings


def die(code: int, message: str = "") -> None:
  """Ends the process now, without exit handlers, which might wait for another process that waits for this one."""
  if message:
    print(f"llmarch: {message}", file=sys.stderr)
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(Exception):
      stream.flush()
  os._exit(code)


@contextlib.contextmanager
def ends_together():
  """Ends this process at once on an exception in the body if there are several, and thereby soon the others.

  Otherwise it would wait in jax's barrier at exit, or in the close of a save, for processes that wait for it in a
  collective. The exit codes are those of train/faults.py.
  """
  try:
    yield
  except BaseException as e:
    if not several() or isinstance(e, SystemExit):
      raise
    if isinstance(e, UserError):
      die(e.exit_code, str(e))
    if isinstance(e, KeyboardInterrupt):
      die(INTERRUPTED, "interrupted")
    traceback.print_exc()
    die(1)


def _first_line(e: Exception) -> str:
  return (str(e).strip().splitlines() or [type(e).__name__])[0][:300]
