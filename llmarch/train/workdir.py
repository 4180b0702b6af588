"""The folder of a run: config.json (the run's identity), tokenizer.json, metrics.jsonl, TensorBoard events,
journal.jsonl, checkpoints/STEP, quarantine/ for what was damaged or taken back, and stacks-PID.txt of a stuck process.
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

# Where a run computes and caches, and what watches it, is not what it computes.
NOT_IDENTITY = {
  ("mesh",), ("data", "cache_dir"), ("data", "prefetch"), ("train", "watchdog"), ("train", "replay_every"),
}  # fmt: skip

TEMPORARY = ".config.json."  # what a process leaves that was killed while it claimed the folder
LOGS = "logs"  # where `llmarch launch` and Slurm put what the processes say


def check_workdir(workdir: str, config: RunConfig) -> bool:
  """Whether `workdir` holds a run of this config; False if it is new or empty. Nothing is written.

  Raises UserError if the folder holds another config (the keys that differ are named) or files that are no run.
  """
  folder, path = Path(workdir), Path(workdir) / "config.json"
  if path.exists():
    differ = differences(_identity(to_dict(config)), _identity(_complete(_read_json(path))))
    if differ:
      raise UserError(
        f"{workdir} holds a run of another config ({'; '.join(differ[:8])}); give another --workdir, or the same config"
      )
    return True
  if folder.is_dir() and not all(p.name.startswith(TEMPORARY) or p.name == LOGS for p in folder.iterdir()):
    raise UserError(f"{workdir} is not empty and holds no run (no config.json); give a new --workdir")
  return False


def _complete(data: dict) -> dict:
  """A stored config with the defaults of keys that are newer than it."""
  try:
    return to_dict(build(RunConfig, data))
  except UserError:  # a key that is gone: `differences` will name it
    return data


def claim_workdir(workdir: str, config: RunConfig, tokenizer=None) -> None:
  """Makes `workdir` this config's: writes config.json, and the tokenizer, into a new or empty folder.

  The run keeps its tokenizer, for the file that data.tokenizer names may change or stay behind. Raises UserError
  as `check_workdir` does, and where the folder cannot be written.
  """
  path = Path(workdir) / "config.json"
  with or_refuse(f"--workdir: cannot write {path}", "give a folder that can be written"):
    if not check_workdir(workdir, config):
      write_text(path, json.dumps(to_dict(config), indent=1))
    if tokenizer is not None and not (path.parent / "checkpoints").exists():
      tokenizer.save(workdir)


@contextlib.contextmanager
def only_process(workdir: str):
  """Holds a claimed workdir: a second process that trains in it would mix its rows and checkpoints with ours.

  Raises UserError if another holds it, naming that process and its host.
  """
  if not is_main():  # one for all hosts of a run
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


def _identity(data: dict, path: tuple = ()) -> dict:
  return {
    k: _identity(v, (*path, k)) if isinstance(v, dict) else v for k, v in data.items() if (*path, k) not in NOT_IDENTITY
  }
