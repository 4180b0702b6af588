"""`llmarch train`: a config and a workdir in; a trained, checkpointed, sampled model out."""

import sys

from absl import flags

from llmarch.commands.common import load_config, parse_flags, split_overrides
from llmarch.errors import UserError, check
from llmarch.train import distributed

USAGE = "llmarch train --config=FILE|PRESET --workdir=DIR [--config.a.b=value ...]"


def _define(values: flags.FlagValues) -> None:
  text = lambda name, help: flags.DEFINE_string(name, None, help, flag_values=values)
  text("config", "config file (FILE.py or FILE.py:argument), preset or run folder")
  text("workdir", "folder of the run; resumed if it holds the same config")
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
  if args.supervise:
    from llmarch.train.supervise import supervise

    again = [word for word in argv if word.lstrip("-").partition("=")[0] != "supervise"]
    return supervise([sys.executable, "-m", "llmarch", "train", *again], args.workdir)
  from llmarch.run import keep_programs, train_run

  config = load_config(args.config, overrides)
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
    train_run(config, args.workdir, cluster.num_processes if cluster else 1)
  return 0


if __name__ == "__main__":
  from llmarch.__main__ import main as llmarch

  sys.exit(llmarch(["train", *sys.argv[1:]]))
