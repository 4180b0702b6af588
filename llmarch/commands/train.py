"""`llmarch train`: a config and a workdir in; a trained, checkpointed, sampled model out."""

import contextlib
import shlex
import sys

from absl import flags

from llmarch.commands.common import load_config, parse_flags, split_overrides
from llmarch.errors import UserError, check
from llmarch.files import local_path
from llmarch.train import distributed

USAGE = """llmarch train --config=FILE|PRESET --workdir=DIR [--config.a.b=value ...]
  llmarch train --from=RUN[@STEP] --workdir=NEW [--config.a.b=value ...]   (goes on from a checkpoint of another run)"""


def _define(values: flags.FlagValues) -> None:
  text = lambda name, help: flags.DEFINE_string(name, None, help, flag_values=values)
  text("config", "config file (FILE.py or FILE.py:argument), preset or run folder")
  text("workdir", "folder of the run; resumed if it holds the same config")
  text("from", "RUN or RUN@STEP: start from this checkpoint of another run; its config is the default of --config")
  what = "what a branch (--from) does not keep: moments of the optimizer, step (and schedule), data (its place there)"
  flags.DEFINE_list("reset", [], what, flag_values=values)
  what = "start it again when it dies (by the table of llmarch/train/faults.py), and account for the time"
  flags.DEFINE_bool("supervise", False, what, flag_values=values)
  number = lambda name, default, help: flags.DEFINE_integer(name, default, help, flag_values=values)
  number("num_processes", None, "processes of this run, where neither Slurm, Open MPI nor a TPU tells; 1: alone")
  number("process_id", None, "this one's number, from 0")
  text("coordinator", "HOST:PORT of process 0, the same for all")
  number("heartbeat", distributed.HEARTBEAT, "seconds without a sign of life after which a process counts as dead")
  number("start_timeout", distributed.START_TIMEOUT, "seconds in which all processes must have started")


def main(argv: list[str]) -> int:
  """Runs `llmarch train`; returns the exit code of train/faults.py."""
  rest, overrides = split_overrides(argv)
  args = parse_flags(rest, _define, USAGE, words=("config", "workdir"))
  if not args.workdir:
    raise UserError("--workdir is missing; give a folder for the run")
  workdir = local_path(args.workdir, "--workdir")
  if args.supervise:
    from llmarch.train.supervise import supervise

    again = [word for word in argv if word.lstrip("-").partition("=")[0] != "supervise"]
    return supervise([sys.executable, "-m", "llmarch", "train", *again], workdir)
  from llmarch.run import keep_programs, train_run

  source = args["from"].value
  check(bool(source) or not args.reset, "--reset is of a branch; give --from=RUN too, or leave it out")
  if source:
    from llmarch.train.branch import parse_branch

    branch = parse_branch(source, args.reset)
  else:
    branch = None
  config = load_config(args.config or (branch and branch.workdir), overrides, trains=True)
  cluster = distributed.find_cluster(
    num_processes=args.num_processes, process_id=args.process_id, coordinator=args.coordinator
  )
  check(
    cluster is None or bool(config.mesh),
    "config.mesh is one device, of one process; give a mesh of the devices of all, such as --config.mesh=data=8",
  )
  keep_programs(config.data.cache_dir)
  with distributed.ends_together():
    distributed.initialize(cluster, heartbeat=args.heartbeat, timeout=args.start_timeout)
    last = train_run(config, workdir, cluster.num_processes if cluster else 1, branch)
  if distributed.is_main():
    _say_next(config, workdir, last)
  return 0


def _say_next(config, workdir: str, last: dict) -> None:
  """Says where the model of a finished run is, and what to type next."""
  from llmarch.data.synthetic import TASKS
  from llmarch.infer.decoder import check_generates

  folder = shlex.quote(workdir)
  commands = [f"llmarch report {folder}"]
  if type(config.data.source) not in TASKS:
    with contextlib.suppress(UserError):
      check_generates(config.model)
      commands.insert(0, f"llmarch generate --from={folder} --prompt={shlex.quote(config.eval.sample_prompt)}")
  loss = f", eval loss {last['eval/loss']:.4f}" if "eval/loss" in last else ""
  print(f"the model is in {workdir} (step {config.train.steps}{loss}); next:", file=sys.stderr)
  print("\n".join(f"  {command}" for command in commands), file=sys.stderr)


if __name__ == "__main__":
  from llmarch.__main__ import main as llmarch

  sys.exit(llmarch(["train", *sys.argv[1:]]))
