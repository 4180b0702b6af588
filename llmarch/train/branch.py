"""Branches: a new run that goes on from a checkpoint of another one, with another config.

    RUN:  0 ---- 4 ---- 8 ---- 12       llmarch train --from=RUN@8 --workdir=NEW --config.optimizer.learning_rate=1e-4
                        |
    NEW:                8 ---- 12 ---- 16

The new run saves the state that it begins with as its own first checkpoint, so that it needs the other run no more.
"""

import dataclasses
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llmarch.build import differences, to_dict
from llmarch.errors import UserError, check, nearest
from llmarch.files import absolute_path
from llmarch.run_config import RunConfig
from llmarch.train import distributed
from llmarch.train.checkpoint import Damaged, flatten_state, load_step, without_base
from llmarch.train.faults import Fault
from llmarch.train.journal import Journal, batch_index
from llmarch.train.optim import SCHEDULE_COUNT
from llmarch.train.workdir import read_config, steps_of

RESETS = ("moments", "step", "data")  # the optimizer's moments; the steps done, and the schedule with them; the data


@dataclasses.dataclass(frozen=True)
class Branch:
  """The beginning of a new run: a step of another run, and what of it starts anew.

  workdir: the other run's, absolute. step: None means its newest that verifies. reset: names of RESETS.
  """

  workdir: str
  step: int | None = None
  reset: tuple[str, ...] = ()

  @property
  def config(self) -> RunConfig:
    """The config of the other run."""
    return read_config(self.workdir)

  def check(self, workdir: str, config: RunConfig) -> None:
    """Raises UserError if `workdir` cannot hold this branch, or `config` cannot go on from it."""
    here, old = Path(workdir), self.config
    check(not here.exists() or not here.samefile(self.workdir), f"--workdir={workdir} is --from; give a new --workdir")
    if (here / "config.json").exists():
      begun = Journal(workdir).branched()
      own = begun is not None and begun["source"][0] == self.workdir and self.step in (None, begun["source"][1])
      check(own, f"{workdir} is a run, and no branch of {self.workdir}; give a new --workdir")
      return
    steps = steps_of(Path(self.workdir) / "checkpoints")
    check(bool(steps), f"--from: {self.workdir} holds no checkpoint; train first")
    known = f"{self.workdir} has the checkpoints {', '.join(map(str, steps))}"
    check(self.step is None or self.step in steps, f"--from: there is no step {self.step}; {known}")
    at = 0 if "step" in self.reset else steps[-1] if self.step is None else self.step
    check(
      config.train.steps > at,
      f"train.steps={config.train.steps} leaves nothing to do after step {at} of --from; raise it, branch from an"
      f" earlier step ({known}), or give --reset=step",
    )
    check(
      "moments" in self.reset or _moments_of(old) == _moments_of(config),
      f"optimizer.algorithm: {self.workdir} has the moments of {old.optimizer.algorithm.kind}, which"
      f" {config.optimizer.algorithm.kind} cannot use; give --reset=moments",
    )

  def restore(self, config: RunConfig, abstract_state: dict, fresh) -> tuple[int, dict, dict]:
    """Restores the other run's state as that of `config` -> step there, state, the checkpoint's record.

    abstract_state: shapes, dtypes and shardings of the new run's state. fresh() gives a state that starts anew. Nothing
    is moved or written in the other run.
    """
    old, wanted = self.config, flatten_state(without_base(abstract_state))
    is_fresh = lambda name: "moments" in self.reset and name.startswith("opt_state/")
    is_copy = lambda name: name.startswith("ema/") and not old.train.ema  # the average starts at the parameters
    arrays, record = self._load({n: s for n, s in wanted.items() if not is_fresh(n) and not is_copy(n)})
    step = record["step"]
    if any(is_fresh(name) for name in wanted):
      new = flatten_state(without_base(fresh()))
      arrays |= {name: new[name] for name in wanted if is_fresh(name)}
    for name in filter(is_copy, wanted):
      source = arrays[name.replace("ema/", "params/", 1)]
      arrays[name] = jax.device_put(jnp.array(source, jnp.float32, copy=True), wanted[name].sharding)
    for name in ("step", SCHEDULE_COUNT):
      count = np.asarray(0 if "step" in self.reset else step, wanted[name].dtype)
      arrays[name] = jax.device_put(count, wanted[name].sharding)
    state = jax.tree.unflatten(jax.tree.structure(without_base(abstract_state)), [arrays[name] for name in wanted])
    return step, state, record

  def _load(self, want: dict) -> tuple[dict, dict]:
    """Loads the step of the branch, or the newest one that verifies -> arrays by name, the record."""
    folder = Path(self.workdir) / "checkpoints"
    steps = distributed.from_main(steps_of(folder)) if self.step is None else [self.step]
    why = []
    for step in reversed(steps):
      try:
        return load_step(folder, step, want, partial=True)
      except Damaged as e:
        why.append(f"step {step}: {e}")
    raise Fault(f"no checkpoint in {folder} can be restored ({'; '.join(why)}); put back sound files")

  def first_batch(self, record: dict, config: RunConfig, data) -> tuple[int, str]:
    """The index of the batch that the branch reads first, and a sentence if that is not simply the next one.

    The place in the data is counted in tokens, and kept if the data is that of the other run.
    """
    if "data" in self.reset:
      return 0, "the data is read from its beginning"
    old, new = _train_of(record), config.train
    if data.hash_of(batch_size=old["batch_size"], seq_len=old["seq_len"]) != record["pipeline_hash"]:
      return 0, "the data is not that of the other run: it is read from its beginning"
    index = batch_index(record["step"], [tuple(s) for s in record.get("skips", ())])
    done, size = index * old["batch_size"] * old["seq_len"], new.batch_size * new.seq_len
    at = math.ceil(done / size)
    left = at * size - done
    return at, f"the next {left} tokens of the data are left out, which is less than a batch" if left else ""

  def describe(self, config: RunConfig, step: int) -> str:
    """A sentence on where the run begins, and what differs from the other run."""
    apart = {"log", "checkpoint", "eval"}
    plain = lambda c: {key: value for key, value in to_dict(c).items() if key not in apart}
    differ = differences(plain(config), plain(self.config))
    reset = f", reset: {', '.join(self.reset)}" if self.reset else ""
    return f"a branch of {self.workdir} after step {step}{reset} ({'; '.join(differ[:8]) or 'the same config'})"


def parse_branch(text: str, reset: list[str]) -> Branch:
  """The branch of `--from=RUN` or `--from=RUN@STEP`, and of `--reset`. Raises UserError if there is no such run."""
  for name in reset:
    check(name in RESETS, f"--reset: unknown name {name!r}{nearest(name, RESETS)}")
  path = absolute_path(text, "--from")
  at = re.fullmatch(r"(.+)@(\d+)", path)
  folder, step = (at[1], int(at[2])) if at and not Path(path).exists() else (path, None)
  if not (Path(folder) / "config.json").exists() or not (Path(folder) / "checkpoints").is_dir():
    raise UserError(
      f"--from: {folder} is no run (no config.json and checkpoints); to start from weights alone, give"
      " --config.train.init_from"
    )
  return Branch(folder, step, tuple(sorted(set(reset), key=RESETS.index)))


def tokens_seen(record: dict) -> int:
  """The number of tokens that a run had trained on at a checkpoint, by its record."""
  old = _train_of(record)
  return record.get("tokens", record["step"] * old["batch_size"] * old["seq_len"])


def _train_of(record: dict) -> dict:
  """The plain data of `train` in the config of a checkpoint's record."""
  return record["config"]["train"]


def _moments_of(config: RunConfig) -> tuple:
  """What decides which arrays an optimizer keeps."""
  algorithm = config.optimizer.algorithm
  return algorithm.kind, getattr(algorithm, "momentum", None) == 0
