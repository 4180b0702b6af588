"""Checkpoints that verify themselves: a run's train state and a record of it, by orbax, and a line in the journal.

orbax has no checksum on the data of arrays, so a changed bit comes back as another number. Therefore the record holds
a fingerprint of every array, and its own checksum, and an array that does not agree with it is not trusted.
"""

import collections
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import logging
import shutil
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from orbax.checkpoint import v1 as ocp

from llmarch.adapt.lora import Adapters
from llmarch.data.synthetic import TASKS
from llmarch.errors import UserError
from llmarch.files import sync_tree
from llmarch.layers.param import flatten, unflatten
from llmarch.models.decoder import abstract
from llmarch.run_config import CheckpointConfig, RunConfig
from llmarch.train import distributed
from llmarch.train.faults import Fault, StorageFault
from llmarch.train.journal import Journal
from llmarch.train.workdir import read_config, steps_of

# Orbax logs the stacks of errors that it then raises; they are told in a sentence where they are caught.
logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and "/orbax/" in record.pathname))

FORMAT = 3
TEMPORARY, DELETED = ".orbax-checkpoint-tmp", ".deleted-"


class Damaged(Exception):
  """Raised if a checkpoint is not what was saved. The message says which part of it."""


class Checkpoints:
  """Saves and restores the train states of a workdir. Close it (it is a context manager), since saves run in a thread.

  All answers come from the disk and from verifying what lies there, and never from what this process remembers.
  """

  def __init__(self, workdir: str, config: CheckpointConfig, journal: Journal | None = None):
    self.workdir, self._config = Path(workdir).absolute(), config
    self.folder = self.workdir / "checkpoints"
    self.journal = journal or Journal(workdir)
    self._thread, self._error = None, None
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      self._clear()
    except OSError as e:
      raise StorageFault(f"cannot write {self.folder} ({e.strerror}); give a workdir that can be written") from None

  def __enter__(self):
    return self

  def __exit__(self, kind, *exc):
    self.wait() if kind is None else self.join()

  def steps(self) -> list[int]:
    """The steps on the disk, ascending, good or not."""
    return steps_of(self.folder)

  def save(self, step: int, state: dict, meta: dict, metrics: dict | None, *, began: float | None = None) -> None:
    """Starts saving `state` as `step`; returns as soon as the arrays are copied, so that they may be donated.

    meta: further entries of the record. metrics: those of this step, {"eval/loss"} for keep_best. began: the time
    (time.monotonic) at which training paused for the save. Raises Fault, and saves nothing, if a number is not finite;
    StorageFault if this save cannot begin or an earlier one failed.
    """
    self.wait()
    began, at = time.monotonic() if began is None else began, time.time()
    newest = max(self.journal.saved(), default=None)
    if not (self.folder / str(newest or "")).is_dir():  # orbax would make the folder anew, perhaps below a lost mount
      raise self._failed(step, FileNotFoundError("the folder is gone, or what was in it"))
    flat = flatten_state(state)
    prints = jax.device_get(fingerprints(flat))
    for name, (_, finite) in prints.items():
      if not finite:
        raise Fault(
          f"{name} is not finite after step {step} in {self.workdir}; nothing is saved of it ({self._kept()})"
        )
    record = meta | {
      "step": step,
      "metrics": metrics,
      "versions": _versions(),
      "arrays": {name: [str(x.dtype), list(x.shape), int(prints[name][0])] for name, x in flat.items()},
    }
    try:
      response = ocp.save_checkpointables_async(self.folder / str(step), {"state": flat, "meta": _seal(record)})
    except Exception as e:  # orbax raises many kinds, some without a type of their own
      raise self._failed(step, e) from e
    line = {"step": step, "metrics": metrics, "at": at, "stall": time.monotonic() - began}
    self._thread = threading.Thread(target=self._finish, args=(response, line), name=f"save-{step}")
    self._thread.start()

  def check(self) -> None:
    """Raises StorageFault if a save has failed so far."""
    if self._error:
      error, self._error = self._error, None
      raise error

  def wait(self) -> None:
    """Waits until the last save is on the disk and in the journal. Raises StorageFault if it failed."""
    self.join()
    self.check()

  def join(self) -> None:
    """Waits until no save is in progress, whether it failed or not."""
    if self._thread:
      self._thread.join()
      self._thread = None

  def _finish(self, response, line: dict) -> None:
    """Completes a save after orbax's rename, in a thread: syncs the disk, writes the journal, removes old steps."""
    step = line["step"]
    try:
      response.result()
      if jax.process_index() == 0:
        sync_tree(self.folder / str(step))
        self.journal.add("saved", **line)
        self._prune()
    except BaseException as e:
      self._error = self._failed(step, e)

  def _clear(self) -> None:
    """Removes what killed processes and failed saves left; no save may be in progress."""
    for path in self.folder.iterdir() if jax.process_index() == 0 else ():
      if TEMPORARY in path.name or path.name.startswith(DELETED):
        shutil.rmtree(path, ignore_errors=True)

  def _failed(self, step: int, e: BaseException) -> StorageFault:
    with contextlib.suppress(OSError):
      self._clear()  # frees space on the disk
    free = "its size is unknown"
    with contextlib.suppress(OSError):
      free = f"{shutil.disk_usage(self.folder).free:,} bytes are free there"
    return StorageFault(f"cannot save step {step} in {self.folder} ({_first_line(e)}); {free}; {self._kept()}")

  def _kept(self) -> str:
    steps = sorted(set(self.journal.saved()) & set(self.steps()))
    return f"the checkpoint of step {steps[-1]} is kept" if steps else "nothing was saved before"

  def _prune(self) -> None:
    """Removes the steps that the config does not keep. Only steps in the journal count."""
    self._clear()
    saved = {step: m for step, m in self.journal.saved().items() if (self.folder / str(step)).is_dir()}
    by_loss = sorted((m["eval/loss"], step) for step, m in saved.items() if "eval/loss" in m)
    keep = set(sorted(saved)[-self._config.max_to_keep :]) | {step for _, step in by_loss[: self._config.keep_best]}
    for step in saved.keys() - keep:
      gone = (self.folder / str(step)).rename(self.folder / f"{DELETED}{step}")  # so that a kill leaves no partial step
      shutil.rmtree(gone)

  def restore(self, abstract_state: dict, step: int) -> tuple[dict, dict]:
    """Restores the state of `step` in the shapes, dtypes and shardings of `abstract_state` -> state, its record.

    Raises Damaged if it is not what was saved, and UserError if there is none or it is another model's.
    """
    flat, record = load_step(self.folder, step, flatten_state(abstract_state))
    leaves = [flat[name] for name in flatten_state(abstract_state)]
    return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), record

  def latest_good(
    self, abstract_state: dict, *, before: int | None = None, say: Callable[[str], None] = lambda text: None
  ) -> tuple[int, dict, dict] | None:
    """Restores the newest checkpoint that verifies -> step, state, record; None if there is none.

    With `before`, only earlier steps count. Newer checkpoints that do not verify, and those of a part of the run that
    was taken back, move to quarantine/, and `say` is told which and why. Raises Fault, and moves nothing, if all are
    damaged.
    """
    stale, damaged = [], []
    for step in reversed([s for s in distributed.from_main(self.steps()) if before is None or s < before]):
      try:
        state, record = self.restore(abstract_state, step)
      except Damaged as e:
        damaged.append((step, str(e)))
        continue
      if _missing(self.journal.skips(), record.get("skips", ()), step):
        stale.append((step, "it was taken back"))
        continue
      break
    else:
      if damaged:
        why = "; ".join(f"step {step}: {text}" for step, text in damaged)
        raise Fault(
          f"no checkpoint in {self.folder} can be restored ({why}); all are left as they are: put back sound files,"
          " or train in another --workdir"
        )
      step = None
    for bad, why in sorted(damaged + stale):
      say(f"step {bad}: {why}; moved to {self.quarantine(bad, why)}")
    for gone in sorted(set(self.journal.saved()) - set(self.steps())):
      if step is not None and step < gone and (before is None or gone < before):
        say(f"step {gone}: its checkpoint is gone")
        self.journal.add("quarantined", step=gone, why="it is gone", to=None)
    if step is None:
      return None
    if step not in self.journal.saved() and jax.process_index() == 0:  # the process died between rename and journal
      sync_tree(self.folder / str(step))
      self.journal.add("saved", step=step, metrics=record.get("metrics"), at=time.time(), stall=0.0)
    return step, state, record

  def quarantine(self, step: int, why: str) -> Path:
    """Moves a step to quarantine/, where it is neither resumed nor in the way of a new save. Nothing is deleted."""
    room = self.workdir / "quarantine"
    number = 1 + sum(path.name.split("-")[0] == str(step) for path in room.iterdir()) if room.is_dir() else 1
    target = room / f"{step}-{number}"
    if jax.process_index() == 0:
      try:
        room.mkdir(exist_ok=True)
        (self.folder / str(step)).rename(target)
      except OSError as e:
        raise StorageFault(f"cannot move {self.folder / str(step)} to {target} ({e.strerror})") from None
    self.journal.add("quarantined", step=step, why=why, to=str(target.relative_to(self.workdir)))
    return target


def flatten_state(state: dict) -> dict:
  """Flattens a train state to {"opt_state/0/mu/embed": array, ...}, names that do not depend on optax's classes."""
  name_of = lambda k: str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))))
  return {"/".join(map(name_of, path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def without_base(state: dict) -> dict:
  """The part of a train state that is saved: all but adapters' frozen weights, which train.init_from keeps."""
  return {name: value for name, value in state.items() if name != "base"}


def needs_weights(config: RunConfig, workdir: str) -> bool:
  """True if a run needs the weights of train.init_from: at its start, and with adapters always."""
  return config.train.lora is not None or not steps_of(Path(workdir) / "checkpoints")


def weights_hash(params: dict) -> str:
  """A hash of arrays by name, which does not depend on their order."""
  sums = {name: zlib.crc32(np.ascontiguousarray(value).view(np.uint8)) for name, value in sorted(params.items())}
  return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def check_base(meta: dict, params: dict, workdir: str, source: str) -> None:
  """Raises UserError unless params are the weights that the adapters of a checkpoint were trained on."""
  if meta.get("base_hash") != weights_hash(params):
    raise UserError(f"the adapters in {workdir} were trained on other weights than {source} has now; restore them")


def restore_params(workdir: str, *, step: int | None = None, base: Callable[[str], dict] | None = None):
  """(ModelConfig, nnx.State of its Decoder, tokenizer spec) of a run, with the moving average if there is one.

  The spec is None for a synthetic task, whose ids are no text; otherwise it names the tokenizer that the run keeps, if
  it does. step: None means the newest step that verifies. Only parameters are read, not the optimizer's state, and
  nothing is moved or written. base(folder) gives the parameters by name of the model there, with which a run's
  adapters are merged.
  """
  config, flat, record = restore_trained(workdir, step=step)
  abstract_params = nnx.state(abstract(config.model))
  if config.train.lora:
    lora, dtypes = Adapters(config.train.lora, config.model), flatten(abstract_params)
    given = {name: np.asarray(value, dtypes[name].dtype) for name, value in base(config.train.init_from).items()}
    check_base(record, given, workdir, config.train.init_from)
    flat = lora.merge(lora.freeze(given), flat)
  flat = {name: flat[name].astype(p.dtype) for name, p in flatten(abstract_params).items()}
  own = (Path(workdir) / "tokenizer.json").exists()
  spec = None if type(config.data.source) in TASKS else str(workdir) if own else config.data.tokenizer
  return config.model, unflatten(abstract_params, flat), spec


def restore_trained(workdir: str, *, step: int | None = None) -> tuple[RunConfig, dict, dict]:
  """(config, {name: array} of what a run trains (all parameters, or adapters alone), the checkpoint's record)."""
  config = read_config(workdir)
  folder = Path(workdir).absolute() / "checkpoints"
  root = "ema" if config.train.ema else "params"
  trained = flatten(nnx.state(abstract(config.model)))
  if config.train.lora:
    trained = {name: p.get_value() for name, p in Adapters(config.train.lora, config.model).params.items()}
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  dtype_of = lambda p: "float32" if config.train.ema else p.dtype
  want = {f"{root}/{name}": jax.ShapeDtypeStruct(p.shape, dtype_of(p), sharding=device) for name, p in trained.items()}
  found = steps_of(folder) if step is None else [step]
  if not found:
    raise UserError(f"{folder} holds no checkpoint; train first")
  for candidate in reversed(found):
    try:
      loaded, record = load_step(folder, candidate, want, partial=True)
      break
    except Damaged as e:
      if candidate == found[0]:
        raise Fault(f"{folder / str(candidate)} cannot be restored ({e}), nor can a newer one") from e
      print(f"llmarch: {folder / str(candidate)} cannot be restored ({e}); reading the one before", file=sys.stderr)
  return config, {name: loaded[f"{root}/{name}"] for name in trained}, record


def load_step(folder: Path, step: int, want: dict, *, partial: bool = False) -> tuple[dict, dict]:
  """Loads and verifies the arrays that `want` ({name: ShapeDtypeStruct}) names -> {name: array}, the record.

  partial: `want` names only some of the saved arrays. Raises Damaged if an array, or the record, is not what was saved,
  and UserError if there is no such step or its names, shapes or dtypes are others.
  """
  path = folder / str(step)
  if not path.is_dir():
    raise UserError(f"{folder} holds no checkpoint of step {step}; train first")
  record = _read_together(lambda: _open(path, _load(path, {"meta": None}, "its record")["meta"]))
  if record["step"] != step:
    raise Damaged(f"its record is that of step {record['step']}")
  _refuse_others(path, record["arrays"], want, partial)
  try:
    arrays = _read_together(lambda: _load(path, {"state": want}, "its arrays")["state"])
  except Damaged as e:
    raise Damaged(_which(path, want) or str(e)) from e
  for name, x in want.items():  # if a bit of its metadata has changed, orbax silently returns a placeholder
    if not isinstance(arrays.get(name), jax.Array) or (arrays[name].shape, arrays[name].dtype) != (x.shape, x.dtype):
      raise Damaged(f"{name} was not read, by the checkpoint's metadata")
  for name, (value, finite) in jax.device_get(fingerprints({name: arrays[name] for name in want})).items():
    if value != record["arrays"][name][2] or not finite:
      raise Damaged(f"{name} fails its checksum")
  return arrays, record


def _read_together(read: Callable):
  """Runs read() on every process. If one finds damage, all raise Damaged, so that they take the same next step."""
  found, why = None, None
  try:
    found = read()
  except Damaged as e:
    why = e
  if distributed.anywhere(why is not None):
    raise why or Damaged("another process cannot read its part")
  return found


def _load(path: Path, items: dict, what: str) -> dict:
  """Reads the parts that this process's devices hold, and waits for no other process, which damage may have stopped."""
  try:
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    me = jax.process_index()
    context.multiprocessing.primary_host, context.multiprocessing.active_processes = me, {me}
    with context:
      return ocp.load_checkpointables(path, items)
  except PermissionError as e:
    raise UserError(f"cannot read {path} ({e.strerror}); ask for the right to") from None
  except MemoryError:
    raise
  except Exception as e:  # orbax raises many kinds, some without a type of their own
    raise Damaged(f"{what} cannot be read ({_first_line(e)})") from e


def _which(path: Path, want: dict) -> str | None:
  """Names the arrays that cannot be read, since orbax does not name them."""
  bad = []
  for name in want:
    try:
      _load(path, {"state": {name: want[name]}}, name)
    except Damaged as e:
      bad.append(str(e))
  return f"{bad[0]}{f', and {len(bad) - 1} more' if len(bad) > 1 else ''}" if bad else None


@functools.cache
def _versions() -> dict:
  """Versions of the installed packages, which are recorded in case a checkpoint's bits are ever questioned."""
  found = {}
  for name in ("llmarch", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[name] = importlib.metadata.version(name)
  return found


def _seal(record: dict) -> dict:
  text = json.dumps(record)
  return {"format": FORMAT, "record": text, "crc32": zlib.crc32(text.encode())}


def _open(path: Path, meta: dict) -> dict:
  if not isinstance(meta, dict) or not isinstance(meta.get("format"), int):
    raise Damaged("its record has no format")
  if meta["format"] != FORMAT and meta["format"] in range(1, FORMAT) and "crc32" not in meta:
    raise UserError(f"{path} has format {meta['format']}, not {FORMAT}; use the llmarch that wrote it")
  text = meta.get("record")
  if meta["format"] != FORMAT or not isinstance(text, str) or zlib.crc32(text.encode()) != meta.get("crc32"):
    raise Damaged("its record fails its checksum")
  return json.loads(text)


def _refuse_others(path: Path, saved: dict, want: dict, partial: bool) -> None:
  """Raises UserError, with all differences in one sentence, if the arrays are those of another model (no damage)."""
  describe = lambda kind, shape: f"{kind}{list(shape)}"
  wanted = {name: describe(x.dtype, x.shape) for name, x in want.items()}
  found = {name: describe(*entry[:2]) for name, entry in saved.items() if not partial or name in want}
  differ = [
    f"{name}: {wanted.get(name, 'absent')} here, {found.get(name, 'absent')} there"
    for name in sorted(wanted.keys() | found.keys())
    if wanted.get(name) != found.get(name)
  ]
  if differ:
    more = f"; and {len(differ) - 4} more" if len(differ) > 4 else ""
    raise UserError(f"{path} holds other arrays ({'; '.join(differ[:4])}{more}); use the config that it was saved with")


def _missing(journal: list, record: list, step: int) -> bool:
  """True if a checkpoint of `step` lacks a skip that the journal has for the steps before it."""
  count_before = lambda skips: collections.Counter(tuple(s) for s in skips if s[0] < step)
  return bool(count_before(journal) - count_before(record))


@jax.jit
def fingerprints(arrays: dict) -> dict:
  """{name: array} -> {name: uint32 [2]}: a fingerprint of its bits, and whether all its numbers are finite.

  The fingerprint is the sum, modulo 2^32, of a hash of each element's bits and index. The hash is the finaliser of
  MurmurHash3, a bijection: a single changed element always shows, and any other change escapes once in 2^32 cases. The
  fingerprint depends neither on how the array is sharded nor on the number of processes.
  """

  def fingerprint(x):
    finite = jnp.max(jnp.abs(x)) < jnp.inf if jnp.issubdtype(x.dtype, jnp.inexact) else True
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    h = jax.lax.bitcast_convert_type(x.astype(jnp.uint8) if x.dtype == bool else x, kind).astype(jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
      index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    h ^= index * jnp.uint32(0x9E3779B1)
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.stack([jnp.sum(h ^ (h >> 16), dtype=jnp.uint32), jnp.asarray(finite, jnp.uint32)])

  return jax.tree.map(fingerprint, arrays)


def _first_line(e: BaseException) -> str:
  lines = str(e).strip().splitlines()
  return f"{type(e).__name__}: {lines[0][:200]}" if lines else type(e).__name__
