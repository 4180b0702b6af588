"""What the guards of training cost, and how long a restart takes: one JSON object on stdout.

  python benchmarks/reliability.py guards --config=benchmarks/llama_512.py [--steps=5]
  python benchmarks/reliability.py restart --config=configs/tiny.py --workdir=NEW [--kills=3]

guards: the train step as it is, and without its looking for numbers that are not finite, in turns in one process
(on a machine that is shared, the difference drowns; finite_alone is that look by itself);
what a save adds to it before the loop goes on (fingerprints, and finiteness of every leaf). restart: `llmarch train
--supervise`, its child killed with -9 after a checkpoint; seconds from there to the end of the next step, of which
one is the supervisor's pause.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock


def guards(config: str, steps: int) -> dict:
  import jax
  import numpy as np

  from llmarch.commands.common import load_config
  from llmarch.train import step as module
  from llmarch.train.checkpoint import fingerprints, flatten_state

  experiment = load_config(config)
  c = experiment.train
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, experiment.model.vocab_size, (c.batch_size, c.seq_len + 1)).astype(np.int32)
  batch = jax.device_put(
    {
      "tokens": tokens[:, :-1],
      "targets": tokens[:, 1:],
      "positions": np.tile(np.arange(c.seq_len, dtype=np.int32), (c.batch_size, 1)),
      "segment_ids": np.zeros((c.batch_size, c.seq_len), np.int32),
      "loss_weights": np.ones((c.batch_size, c.seq_len), np.float32),
    }
  )

  def timed(f, *args) -> tuple[float, object]:
    began = time.perf_counter()
    out = jax.block_until_ready(f(*args))
    return time.perf_counter() - began, out

  guarded = module.make_train_step(experiment)
  state = guarded.init()
  with mock.patch.multiple(module, _where=lambda sound, new, old: new, _finite=lambda tree: np.bool_(True)):
    plain = module.make_train_step(experiment)
    _, (state, _) = timed(plain.step, state, batch)  # traced without the guards
  _, (state, _) = timed(guarded.step, state, batch)
  look = jax.jit(module._finite)
  jax.block_until_ready((fingerprints(flatten_state(state)), look(state)))
  times = {"step": [], "step_without": [], "finite_alone": [], "fingerprints": []}
  for _ in range(steps):
    for name, f in (("step", guarded.step), ("step_without", plain.step)):
      seconds, (state, _) = timed(f, state, batch)
      times[name].append(seconds)
    times["finite_alone"].append(timed(look, state)[0])
    times["fingerprints"].append(timed(fingerprints, flatten_state(state))[0])
  seconds = {name: statistics.median(values) for name, values in times.items()}
  every = experiment.checkpoint.every
  return {
    "seconds": {name: [round(v, 4) for v in values] for name, values in times.items()},
    "state_bytes": sum(x.nbytes for x in jax.tree.leaves(state)),
    "finite_of_step": statistics.median(a / b - 1 for a, b in zip(times["step"], times["step_without"], strict=True)),
    "finite_alone_of_step": seconds["finite_alone"] / seconds["step"],
    "fingerprints_of_step_at_a_save": seconds["fingerprints"] / seconds["step"],
    "fingerprints_of_step_at_its_cadence": seconds["fingerprints"] / seconds["step"] / every if every else 0.0,
    "checkpoint_every": every,
  }


def restart(config: str, workdir: str, kills: int) -> dict:
  from llmarch.files import read_lines
  from llmarch.train.journal import NAME

  events = lambda kind: [row for row in read_lines(Path(workdir) / NAME) if row["event"] == kind]
  command = [sys.executable, "-m", "llmarch", "train", f"--config={config}", f"--workdir={workdir}", "--supervise"]
  command += ["--config.checkpoint.every=10", "--config.eval.every=0", "--config.train.steps=100000"]
  run = subprocess.Popen(command, stderr=subprocess.DEVNULL)
  seconds = []
  try:
    for kill in range(kills):
      while len(events("stepping")) <= kill or not _since(events("saved"), events("stepping")):
        time.sleep(0.1)
        if run.poll() is not None:
          raise SystemExit(f"the run ended with exit code {run.returncode}")
      began = time.time()
      os.kill(events("start")[-1]["pid"], signal.SIGKILL)
      while len(events("stepping")) <= kill + 1:
        time.sleep(0.05)
      seconds.append(round(events("stepping")[-1]["time"] - began, 2))
  finally:
    run.send_signal(signal.SIGTERM)
    run.wait()
  return {"kill_to_next_step_seconds": seconds, "largest": max(seconds)}


def _since(saved: list[dict], stepping: list[dict]) -> bool:
  return bool(saved) and saved[-1]["time"] > stepping[-1]["time"]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("what", choices=("guards", "restart"))
  parser.add_argument("--config", required=True)
  parser.add_argument("--workdir", default="")
  parser.add_argument("--steps", type=int, default=5)
  parser.add_argument("--kills", type=int, default=3)
  a = parser.parse_args()
  result = guards(a.config, a.steps) if a.what == "guards" else restart(a.config, a.workdir, a.kills)
  print(json.dumps({"what": a.what, "config": a.config, **result}, indent=1))


if __name__ == "__main__":
  main()
