"""Checkpoints of a run, by orbax: the train state and a JSON record of what it belongs to.

A workdir holds config.json (the run's identity), tokenizer.json, metrics.jsonl, TensorBoard events, and
checkpoints/STEP.
"""

import contextlib
import fcntl
import json
import os
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from orbax.checkpoint import v1 as ocp

from llmarch.config import UserError, build, differences, to_dict
from llmarch.experiment import CheckpointConfig, ExperimentConfig
from llmarch.layers.param import flatten, unflatten
from llmarch.models.decoder import abstract

FORMAT = 2

# Where a run computes and caches is not what it computes.
NOT_IDENTITY = {("mesh",), ("data", "cache_dir"), ("data", "prefetch")}


def check_workdir(workdir: str, config: ExperimentConfig) -> bool:
  """Whether `workdir` holds a run of this config; False if it is new or empty. Nothing is written.

  Raises UserError if the folder holds another config (the keys that differ are named) or files that are no run.
  """
  folder, path = Path(workdir), Path(workdir) / "config.json"
  if path.exists():
    differ = differences(_identity(to_dict(config)), _identity(_read_json(path)))
    if differ:
      raise UserError(
        f"{workdir} holds a run of another config ({'; '.join(differ[:8])}); give another --workdir, or the same config"
      )
    return True
  if folder.is_dir() and any(folder.iterdir()):
    raise UserError(f"{workdir} is not empty and holds no run (no config.json); give a new --workdir")
  return False


def claim_workdir(workdir: str, config: ExperimentConfig, tokenizer=None) -> None:
  """Makes `workdir` this config's: writes config.json, and the tokenizer, into a new or empty folder.

  The run keeps its tokenizer, for the file that data.tokenizer names may change or stay behind. Raises UserError
  as `check_workdir` does, and where the folder cannot be written.
  """
  if check_workdir(workdir, config):
    return
  path = Path(workdir) / "config.json"
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(to_dict(config), indent=1))
  except OSError as e:
    raise UserError(f"--workdir: cannot write {path} ({e.strerror}); give a folder that can be written") from None
  if tokenizer is not None:
    tokenizer.save(workdir)


@contextlib.contextmanager
def only_process(workdir: str):
  """Holds a claimed workdir: a second process that trains in it would mix its rows and checkpoints with ours.

  Raises UserError if another holds it. The lock goes with the process, however that ends.
  """
  with open(Path(workdir) / "config.json") as f:
    try:
      if jax.process_index() == 0:  # one for all hosts of a run
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(
        f"another process is training in {workdir}; wait for it to end, or give another --workdir"
      ) from None
    except OSError:
      pass  # a file system without locks
    yield


def read_config(workdir: str) -> ExperimentConfig:
  """The config of the run in a workdir."""
  import llmarch.layers.registry  # noqa: F401  fills the families of kinds

  return build(ExperimentConfig, _read_json(Path(workdir) / "config.json"), "config")


def write_atomically(path: Path, text: str) -> None:
  """Writes a file so that a reader, or a crash, sees the old text or the new."""
  with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as f:
    f.write(text)
    f.flush()
    os.fsync(f.fileno())
  os.replace(f.name, path)


def _read_json(path: Path) -> dict:
  try:
    data = json.loads(path.read_text())
    if not isinstance(data, dict):
      raise ValueError("not an object")
    return data
  except OSError as e:
    raise UserError(f"cannot read {path} ({e.strerror}); give the folder of a run") from None
  except (ValueError, RecursionError):
    raise UserError(f"{path} is damaged (not the JSON of a config); restore it, or give another --workdir") from None


def _identity(data: dict, path: tuple = ()) -> dict:
  return {
    k: _identity(v, (*path, k)) if isinstance(v, dict) else v for k, v in data.items() if (*path, k) not in NOT_IDENTITY
  }


class Checkpoints:
  """Saves and restores train states. Close it (it is a context manager): saving goes on in the background."""

  def __init__(self, workdir: str, config: CheckpointConfig):
    policies = ocp.training.preservation_policies
    keep = [policies.LatestN(config.max_to_keep)]
    if config.keep_best:
      by_loss = lambda metrics: metrics["eval/loss"]
      # Descending, because orbax keeps the end of the list.
      keep.append(
        policies.BestN(get_metric_fn=by_loss, reverse=True, n=config.keep_best, keep_checkpoints_without_metrics=False)
      )
    self.folder = Path(workdir).absolute() / "checkpoints"
    try:
      self._orbax = ocp.training.Checkpointer(
        self.folder,
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
        preservation_policy=policies.AnyPreservationPolicy(keep),
        cleanup_tmp_directories=True,
      )
    except Exception as e:  # it reads the metadata of every step there is
      raise UserError(_damaged(self.folder, e)) from e

  def __enter__(self):
    return self

  def __exit__(self, *exc):
    self._orbax.close()

  def save(self, step: int, state: dict, meta: dict, metrics: dict | None) -> None:
    """Starts saving `state` as `step`; returns once the arrays are copied, so that they may be donated.

    Raises OSError or what orbax raises if an earlier save failed, RuntimeError if this one is refused.
    """
    self._orbax.wait()
    flat = flatten_state(state)
    sums = {name: int(value) for name, value in jax.device_get(_checksums(flat)).items()}
    record = {"format": FORMAT, "step": step, "jax": jax.__version__, "checksums": json.dumps(sums), **meta}
    items = {"state": flat, "meta": record}
    if self._orbax.save_checkpointables_async(step, items, metrics=metrics, force=True) is None:
      raise RuntimeError(f"orbax refused to save step {step} in {self.folder}")

  def wait(self) -> None:
    """Until the last save is on disk."""
    self._orbax.wait()

  def latest(self) -> int | None:
    """The newest finished step on disk."""
    return latest_step(self.folder)

  def restore(self, abstract_state: dict, *, step: int | None = None) -> tuple[dict, dict]:
    """The state of `step` (None: the newest) in the shapes, dtypes and shardings of `abstract_state`: -> state, meta.

    Raises UserError if there is none, or it does not fit.
    """
    step = self.latest() if step is None else step
    loaded = _load(self.folder, step, flatten_state(abstract_state))
    leaves = [loaded["state"][name] for name in flatten_state(abstract_state)]
    return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), loaded["meta"]


def flatten_state(state: dict) -> dict:
  """A train state as {"opt_state/0/mu/embed": array, ...}: readable, and free of optax's classes."""
  key = lambda k: str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))))
  return {"/".join(map(key, path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def latest_step(folder: Path) -> int | None:
  """The newest finished checkpoint, read from the disk: what the checkpointer believes may never have got there."""
  steps = [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
  return max(steps, default=None)


def restore_params(workdir: str, *, step: int | None = None):
  """(ModelConfig, nnx.State of its Decoder, tokenizer spec) of a run, the moving average where there is one.

  The tokenizer is the one that the run keeps, where it does.

  Parameters only: the optimizer's state is not read.
  """
  config = read_config(workdir)
  folder = Path(workdir).absolute() / "checkpoints"
  step = latest_step(folder) if step is None else step
  root = "ema" if config.train.ema else "params"
  abstract_params = nnx.state(abstract(config.model))
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  dtype = lambda p: "float32" if config.train.ema else p.dtype
  want = {
    f"{root}/{name}": jax.ShapeDtypeStruct(p.shape, dtype(p), sharding=device)
    for name, p in flatten(abstract_params).items()
  }
  loaded = _load(folder, step, want, partial=True)["state"]
  flat = {name.removeprefix(f"{root}/"): value for name, value in loaded.items()}
  flat = {name: flat[name].astype(p.dtype) for name, p in flatten(abstract_params).items()}
  own = (Path(workdir) / "tokenizer.json").exists()
  return config.model, unflatten(abstract_params, flat), os.fspath(workdir) if own else config.data.tokenizer


def _load(folder: Path, step: int | None, want: dict, *, partial: bool = False) -> dict:
  if step is None or not (folder / str(step)).is_dir():
    raise UserError(f"{folder} holds no checkpoint{'' if step is None else f' of step {step}'}; train first")
  try:
    context = ocp.Context()
    context.pytree.loading.partial_load = partial
    with context:
      loaded = ocp.load_checkpointables(folder / str(step), {"state": want, "meta": None})
  except Exception as e:  # orbax raises many kinds, some without a type of their own
    raise UserError(_damaged(folder / str(step), e)) from e
  meta = loaded["meta"]
  if meta["format"] != FORMAT:
    raise UserError(f"{folder / str(step)} has format {meta['format']}, not {FORMAT}; use the llmarch that wrote it")
  saved = json.loads(meta["checksums"])
  for name, value in jax.device_get(_checksums({name: loaded["state"][name] for name in want})).items():
    if saved[name] != value:
      raise UserError(_damaged(folder / str(step), ValueError(f"{name} fails its checksum")))
  return loaded


@jax.jit
def _checksums(arrays: dict) -> dict:
  """{name: array} -> {name: uint32}: the sum, modulo 2^32, of an array's elements as integers times odd numbers.

  It changes with any one element, and does not depend on how the array is sharded.
  """

  def one(x):
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
      index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)

  return jax.tree.map(one, arrays)


def _damaged(path: Path, e: Exception) -> str:
  first = str(e).strip().splitlines()[0][:200] if str(e).strip() else type(e).__name__
  return f"{path} cannot be restored ({first}); remove the damaged step's folder to go back to the one before"
