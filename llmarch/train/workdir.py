"""The folder of a run.

It holds config.json (the run's identity), tokenizer.json, metrics.jsonl, TensorBoard events, journal.jsonl,
checkpoints/STEP, quarantine/ for checkpoints that were damaged or taken back, and stacks-PID.txt of a stuck process.
"""

import contextlib
import json
from pathlib import Path

from llmarch import locks
from llmarch.build import build, differences, to_dict
from llmarch.errors import UserError
from llmarch.files import or_refuse, write_text
from llmarch.run_config import RunConfig
from llmarch.train.distributed import is_main

# These keys may differ on resume. They change where and how a run executes and what it tells, not its numbers; the
# pipeline's hash guards the data whose place they name, and `_check_steps` the number of steps.
NOT_IDENTITY = {
  ("mesh",), ("log",), ("data", "cache_dir"), ("data", "prefetch"), ("data", "tokenizer"), ("data", "source", "path"),
  ("data", "source", "paths"), ("train", "steps"), ("train", "watchdog"), ("train", "replay_every"),
  ("train", "log_every"), ("train", "telemetry_every"), ("train", "remat"), ("eval", "every"),
  ("eval", "sample_tokens"), ("eval", "sample_prompt"), ("eval", "temperature"),
}  # fmt: skip
CHECKPOINT = ("checkpoint",)  # may differ too, unless spikes take the run back to its checkpoints (train.spike)

TEMPORARY = ".config.json."  # prefix of a file that a process leaves if it is killed while it claims the folder
LOGS = "logs"  # folder in which `llmarch launch` and Slurm put the output of the processes


def check_workdir(workdir: str, config: RunConfig) -> bool:
  """True if `workdir` holds a run of this config; False if it is new or empty. Nothing is written.

  Raises UserError if the folder holds another config (the keys that differ are named) or files that are no run.
  """
  folder, path = Path(workdir), Path(workdir) / "config.json"
  if path.exists():
    there = _complete(_read_json(path))
    free = NOT_IDENTITY | (set() if config.train.spike else {CHECKPOINT})
    differ = differences(_identity(to_dict(config), free), _identity(there, free))
    if differ:
      raise UserError(
        f"{workdir} holds a run of another config ({'; '.join(differ[:8])}); give the same config, another --workdir,"
        f" or go on from it in a new folder: llmarch train --from={workdir} --workdir=NEW --config.KEY=VALUE"
      )
    _check_steps(workdir, config, there["train"]["steps"])
    return True
  if folder.is_dir() and not all(p.name.startswith(TEMPORARY) or p.name == LOGS for p in folder.iterdir()):
    raise UserError(f"{workdir} is not empty and holds no run (no config.json); give a new --workdir")
  return False


def _check_steps(workdir: str, config: RunConfig, before: int) -> None:
  """Raises UserError if a run of `before` steps cannot become one of config.train.steps, with the same rates so far."""
  steps, done = config.train.steps, max(steps_of(Path(workdir) / "checkpoints"), default=0)
  if steps == before:
    return
  from llmarch.train.optim import rates_agree

  branch = f"llmarch train --from={workdir}@STEP --workdir=NEW --config.train.steps={steps}"
  if steps < done:
    raise UserError(
      f"train.steps={steps} is less than the {done} steps that {workdir} has done; give more, or go on from an earlier"
      f" checkpoint: {branch}"
    )
  if not rates_agree(config.optimizer, steps, before, done):
    raise UserError(
      f"train.steps={steps}: {workdir} has done {done} steps of a {config.optimizer.schedule.kind} schedule over"
      f" {before} steps, whose learning rates would have been others over {steps}; go on from it in a new folder, or"
      f" from a checkpoint before they part: {branch}"
    )


def steps_of(folder: Path) -> list[int]:
  """The steps of the checkpoints in a folder, ascending, read from the disk."""
  return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def _complete(data: dict) -> dict:
  """Completes a stored config with the defaults of keys that are newer than it."""
  try:
    return to_dict(build(RunConfig, data))
  except UserError:  # the config has a key that no longer exists, which `differences` will name
    return data


def claim_workdir(workdir: str, config: RunConfig, tokenizer=None) -> None:
  """Claims `workdir` for this config: writes config.json, and the tokenizer, into a new or empty folder.

  A run that is resumed with other keys than before, where they may differ, has the new ones in its config.json.

  The run keeps its tokenizer, because the file that data.tokenizer names may change or be missing later. Raises
  UserError as `check_workdir` does, and if the folder cannot be written.
  """
  path = Path(workdir) / "config.json"
  with or_refuse(f"--workdir: cannot write {path}", "give a folder that can be written"):
    if not check_workdir(workdir, config) or differences(to_dict(config), _complete(_read_json(path))):
      write_text(path, json.dumps(to_dict(config), indent=1))
    if tokenizer is not None and not (path.parent / "checkpoints").exists():
      tokenizer.save(workdir)


@contextlib.contextmanager
def only_process(workdir: str):
  """Holds a claimed workdir: a second process that trains in it would mix its rows and checkpoints with ours.

  Raises UserError if another process holds it, and names that process and its host.
  """
  if not is_main():  # the main process holds it for all hosts of a run
    yield
    return
  path = Path(workdir) / "lock"
  try:
    with or_refuse(f"--workdir: cannot write {path}", "give a folder that can be written"):
      lock = locks.take(path)
  except locks.Taken as holder:
    raise UserError(
      f"another process is training in {workdir} ({str(holder) or 'just started'}); wait for it to end, or give"
      " another --workdir"
    ) from None
  with lock:
    yield


def read_config(workdir: str) -> RunConfig:
  """The config of the run in a workdir."""
  import llmarch.layers.registry  # noqa: F401  fills the families of kinds

  return build(RunConfig, _read_json(Path(workdir) / "config.json"), "config")


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


def _identity(data: dict, free: set, path: tuple = ()) -> dict:
  """The part of a config that may not change on resume."""
  kept = {k: v for k, v in data.items() if (*path, k) not in free}
  return {k: _identity(v, free, (*path, k)) if isinstance(v, dict) else v for k, v in kept.items()}
