"""`llmarch launch`: several processes of one command, on this machine, on hosts over ssh, or under Slurm.

On this machine and over ssh the launcher stays: it follows the log of process 0, ends all when one fails, and passes
SIGTERM on. To Slurm it hands a job over, and leaves.
"""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from absl import flags

from llmarch.commands.common import parse_flags
from llmarch.errors import UserError, check
from llmarch.train.workdir import LOGS

USAGE = """llmarch launch --workdir=DIR (--local=N | --hosts=A,B,... | --slurm) [--flags] -- train --config=... [...]

  llmarch launch --local=2 --workdir=runs/a -- train --config=configs/tiny.py --config.mesh=data=2
  llmarch launch --hosts=tpu-0,tpu-1 --workdir=/shared/runs/a -- train --config=llama_3_8b --config.mesh=fsdp=8
  llmarch launch --slurm --nodes=4 --gpus_per_node=8 --minutes=1440 --workdir=runs/a -- train ..."""

GRACE = 60  # seconds between SIGTERM and SIGKILL: a save must fit in

# One process, started by sh on its host. It holds the launcher's pipe, whose end, also where the launcher or the
# connection dies, is its SIGTERM; a shell that waits outside keeps the exit code.
SCRIPT = """cd {folder} || exit 2
exec 3<&0
{command} </dev/null 3<&- & child=$!
{{ cat <&3; kill -TERM $child; sleep {grace}; kill -KILL $child; }} >/dev/null 2>&1 & guard=$!
exec 3<&-
wait $child; code=$?
kill $guard 2>/dev/null
exit $code"""


def _define(values: flags.FlagValues) -> None:
  def number(name, default, help):
    flags.DEFINE_integer(name, default, help, lower_bound=1, flag_values=values)

  def text(name, default, help):
    flags.DEFINE_string(name, default, help, flag_values=values)

  text("workdir", None, "folder of the run, the same on all hosts; logs go to its folder logs")
  number("local", None, "so many processes on this machine")
  flags.DEFINE_list(
    "hosts", [], "a process on each of these, over ssh (no password), TPU workers in their order; the first leads",
    values,
  )  # fmt: skip
  flags.DEFINE_bool("slurm", False, "a job of Slurm, by sbatch (pip install 'llmarch[slurm]')", values)
  text("coordinator", None, "HOST:PORT where process 0 listens (default: the first host, a free port of this machine)")
  text("python", sys.executable, "the interpreter on the hosts")
  number("nodes", 1, "Slurm: nodes")
  number("tasks_per_node", 1, "Slurm: processes on a node; GPUs are dealt one to each where there are several")
  flags.DEFINE_integer("gpus_per_node", None, "Slurm: GPUs on a node", flag_values=values)
  number("cpus_per_task", None, "Slurm: cores of a process")
  number("minutes", 60, "Slurm: time limit")
  text("partition", None, "Slurm: partition")
  flags.DEFINE_list("srun", [], "Slurm: more arguments for srun, such as --mpi=none", values)
  number("save_seconds", 120, "Slurm: so long before the time limit the run saves, and is queued again")
  number("requeues", 3, "Slurm: how often, at most, for the time limit (preemptions do not count)")


def main(argv: list[str]) -> int:
  """Runs `llmarch launch`; returns its exit code."""
  at = argv.index("--") if "--" in argv else len(argv)
  args, command = parse_flags(argv[:at], _define, USAGE), argv[at + 1 :]
  check(bool(args.workdir), "--workdir is missing; give a folder for the run")
  ways = [name for name in ("local", "hosts", "slurm") if args[name].value]
  check(len(ways) == 1, f"launch on one of --local=N, --hosts=A,B or --slurm (given: {', '.join(ways) or 'none'})")
  check(
    command[:1] == ["train"],
    f"launch runs `train`, not {command[0]!r}" if command else "launch what? Write -- train --config=... at the end",
  )
  clash = [a for a in command if a.startswith(("--workdir", "--num_processes", "--process_id", "--coordinator"))]
  check(not clash, f"{clash[0] if clash else ''} stands after `--`; the launcher gives it to every process")
  workdir = os.path.abspath(args.workdir)
  command = [*command, f"--workdir={workdir}"]
  logs = Path(workdir) / LOGS
  try:
    logs.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise UserError(f"--workdir: cannot write {logs} ({e.strerror}); give a folder that can be written") from None
  if args.slurm:
    return _submit(command, logs, args)
  hosts = args.hosts or [None] * args.local
  coordinator = args.coordinator or f"{hosts[0].rpartition('@')[2] if args.hosts else '127.0.0.1'}:{_free_port()}"
  return _run([[args.python, "-m", "llmarch", *command]] * len(hosts), hosts, coordinator, logs)


# ------------------------------------------------------------------------------------- this machine and ssh


def _run(commands: list[list[str]], hosts: list[str | None], coordinator: str, logs: Path) -> int:
  """Runs one process a host (None: this machine) to the end. Returns 0, or the code of the first that failed."""
  running: dict[int, subprocess.Popen] = {}
  first, told = 0, False  # the exit code; whether all were told to end
  shown = logs / "0.log"
  before = shown.stat().st_size if shown.exists() else 0  # an earlier run's

  def tell(*_):
    nonlocal told
    told = True
    for child in running.values():
      with contextlib.suppress(OSError):
        child.stdin.close()

  handlers = {name: signal.signal(name, tell) for name in (signal.SIGTERM, signal.SIGINT)}
  try:
    for i, (command, host) in enumerate(zip(commands, hosts, strict=True)):
      numbers = [f"--num_processes={len(hosts)}", f"--process_id={i}", f"--coordinator={coordinator}"]
      running[i] = _start([*command, *numbers], host, logs / f"{i}.log")
    if told:  # while they were started
      tell()
    with open(shown, errors="replace") as log:
      log.seek(before)
      while running:
        time.sleep(0.1)
        sys.stderr.write(log.read())
        sys.stderr.flush()
        for i, child in list(running.items()):
          code = child.poll()
          if code is None:
            continue
          del running[i]
          if code and not first:
            first = code if code > 0 else 128 - code
            where = f" on {hosts[i]}" if hosts[i] else ""
            log_of = logs / f"{i}.log"
            print(f"llmarch: process {i}{where} ended with code {first}; its log is {log_of}", file=sys.stderr)
            tell()
      sys.stderr.write(log.read())
  finally:
    tell()
    for name, handler in handlers.items():
      signal.signal(name, handler)
  return first


def _start(command: list[str], host: str | None, log: Path) -> subprocess.Popen:
  """One process, in a session of its own: a Ctrl-C reaches it by the launcher alone."""
  script = SCRIPT.format(folder=shlex.quote(os.getcwd()), command=shlex.join(command), grace=GRACE)
  ssh = ["ssh", "-o", "BatchMode=yes", host, "sh", "-c", shlex.quote(script)]
  with open(log, "ab") as out:
    try:
      return subprocess.Popen(
        ssh if host else ["sh", "-c", script],
        stdin=subprocess.PIPE, stdout=out, stderr=out, start_new_session=True,
      )  # fmt: skip
    except FileNotFoundError:
      raise UserError("there is no ssh on this machine; install an OpenSSH client, or launch with --slurm") from None


def _free_port() -> int:
  with socket.socket() as s:
    s.bind(("", 0))
    return s.getsockname()[1]


# ------------------------------------------------------------------------------------------------- Slurm


def _submit(command: list[str], logs: Path, args) -> int:
  """Hands the job to sbatch and prints its number."""
  try:
    import submitit
  except ImportError:
    raise UserError("--slurm needs submitit; run pip install 'llmarch[slurm]'") from None
  from llmarch.train.slurm import CommandTask

  try:
    executor = submitit.SlurmExecutor(folder=logs, python=shlex.quote(args.python), max_num_timeout=args.requeues)
  except RuntimeError:
    raise UserError("there is no srun on this machine; launch on a login node of a Slurm cluster") from None
  given = {name: getattr(args, name) for name in ("partition", "gpus_per_node", "cpus_per_task")}
  executor.update_parameters(
    job_name="llmarch", nodes=args.nodes, ntasks_per_node=args.tasks_per_node, time=args.minutes,
    signal_delay_s=args.save_seconds, stderr_to_stdout=True,
    srun_args=["--kill-on-bad-exit=1", *args.srun], additional_parameters={"requeue": True},
    **{name: value for name, value in given.items() if value is not None},
  )  # fmt: skip
  try:
    job = executor.submit(CommandTask([args.python, "-m", "llmarch", *command], os.getcwd()))
  except Exception as e:  # submitit has several, around what sbatch says
    raise UserError(f"sbatch refused the job: {str(e).strip().splitlines()[-1]}") from e
  print(f"submitted job {job.job_id}; its logs are {logs}/{job.job_id}_*_log.out; `scancel {job.job_id}` ends it")
  return 0
