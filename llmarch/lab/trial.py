"""One trial: a run, and what is measured of it.  python -m llmarch.lab.trial TRIAL.json [CORES]

The trial is a process of its own, so that one which runs out of memory or time, or meets numbers that are not finite,
ends alone. It writes RESULT beside its file; what its end means is sweep.finished's to say.
"""

import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from llmarch.build import build
from llmarch.errors import check
from llmarch.run_config import RunConfig
from llmarch.train.faults import Fault

TRIAL, RESULT, LOG, RUN = "trial.json", "result.json", "log.txt", "run"
CURVE = 60  # points of a recorded curve, at most


@dataclasses.dataclass(frozen=True)
class Trained:
  """A finished run, for measures: its config, its folder, and what they lead to."""

  config: RunConfig
  workdir: str

  @cached_property
  def lm(self):
    """The trained model (infer.lm.LM)."""
    import llmarch

    return llmarch.load(self.workdir)

  @cached_property
  def rows(self) -> list[dict]:
    """metrics.jsonl."""
    return read_rows(Path(self.workdir) / "metrics.jsonl")


LARGEST = 1e100  # of a metric: its square is a number, too


def read_rows(path: Path) -> list[dict]:
  """The whole rows of a metrics file, which a process may have left in the middle of a line; [] of none."""
  found = []
  for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
    try:
      row = json.loads(line)
    except ValueError:
      continue
    found += [row] if isinstance(row, dict) else []
  return found


def train_trial(config: RunConfig, workdir: str, measures=()) -> dict:
  """Trains, evaluates and measures: {"metrics", "curve", "eval_curve", "step_ms", "sample"}."""
  from llmarch.run import keep_programs, train_run

  keep_programs(config.data.cache_dir)
  train_run(config, workdir)
  trained = Trained(config, workdir)
  found = summary(trained.rows, config.train.batch_size * config.train.seq_len)
  for measure in measures:
    found["metrics"] |= measure(trained)
  return found | _text(trained)


def summary(rows: list[dict], tokens_per_step: int) -> dict:
  """The metrics, curves and times of a run's rows.

  step_ms: median and quartiles of the milliseconds of a step, from the rows after the first, which compiles.
  """
  having = lambda *names: [r for r in rows if all(isinstance(r.get(name), (int, float)) for name in names)]
  train = [r for r in having("step", "loss", "grad_norm", "tokens_per_second") if r["tokens_per_second"] > 0]
  evals = having("step", "eval/loss", "eval/bits_per_byte")
  metrics = {}
  if train:
    metrics |= {"train_loss": train[-1]["loss"], "max_grad_norm": max(r["grad_norm"] for r in train)}
  if evals:
    metrics |= {"loss": evals[-1]["eval/loss"], "bits_per_byte": evals[-1]["eval/bits_per_byte"]}
  times = [tokens_per_step / r["tokens_per_second"] * 1e3 for r in train[1:]]
  found = {
    "metrics": metrics,
    "curve": thinned([(r["step"], r["loss"]) for r in train]),
    "eval_curve": [(r["step"], r["eval/loss"]) for r in evals],
  }
  if len(times) >= 2:
    low, median, high = statistics.quantiles(times, n=4)
    found["step_ms"] = {"median": median, "low": low, "high": high}
  return found


def thinned(points: list, most: int = CURVE) -> list:
  """At most so many of the points, evenly; first and last stay."""
  if len(points) <= most:
    return points
  return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def _text(trained: Trained) -> dict:
  """The text that the model writes after the prompt of its config."""
  e, lm = trained.config.eval, trained.lm
  if lm.tokenizer is None or not e.sample_tokens:
    return {}
  n = min(e.sample_tokens, lm.config.max_seq_len - len(lm.tokenizer.encode_prompt(e.sample_prompt, special=True)))
  text = lm.generate(e.sample_prompt, max_new_tokens=n, temperature=e.temperature, seed=0)
  return {"sample": e.sample_prompt + text}


def run(folder: str | Path) -> dict:
  """Runs the trial whose TRIAL lies in `folder`; writes RESULT."""
  from llmarch.files import write_text
  from llmarch.lab.ablation import Trial, load_ablation

  import llmarch.layers.registry  # noqa: F401  isort: skip

  trial = Trial(**json.loads((Path(folder) / TRIAL).read_text()))
  ablation = load_ablation(trial.folder)
  config = build(RunConfig, trial.config, "config")
  if ablation.trial:
    found = {"metrics": ablation.trial(config, str(Path(folder) / RUN))}
  else:
    found = train_trial(config, str(Path(folder) / RUN), ablation.measures)
  found |= {"metrics": checked(found["metrics"]), "hardware": hardware(), "versions": versions()}
  write_text(Path(folder) / RESULT, json.dumps(found))
  return found


def checked(metrics) -> dict[str, float]:
  """The metrics of a trial as numbers by name. Raises UserError for what is none, and Fault for what is not finite."""
  check(isinstance(metrics, Mapping) and bool(metrics), f"a trial must give {{metric: number}}, got {metrics!r:.80}")
  found = {}
  for name, value in metrics.items():
    check(isinstance(name, str) and bool(name), f"the name of a metric must be a text, got {name!r:.80}")
    plain = value.item() if getattr(value, "shape", None) == () else value  # NumPy's and JAX's
    number = isinstance(plain, (int, float)) and not isinstance(plain, bool)
    check(number, f"the metric {name!r} of a trial must be a number, got {value!r:.80}")
    if not -LARGEST <= plain <= LARGEST:
      raise Fault(f"the metric {name!r} is {plain!s:.20}")
    found[name] = float(plain)
  return found


def hardware() -> str:
  """The device that ran a trial, in words."""
  import jax

  device = jax.devices()[0]
  if device.platform != "cpu":
    return device.device_kind
  names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
  return f"{names[0] if names else 'CPU'}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores"


def _lines(path: str) -> list[str]:
  try:
    return Path(path).read_text().splitlines()
  except OSError:
    return []


def versions() -> dict[str, str]:
  """Returns the versions of Python and of the libraries that a trial's numbers depend on."""
  from importlib.metadata import version

  return {"python": sys.version.split()[0]} | {name: version(name) for name in ("jax", "flax", "optax")}


if __name__ == "__main__":
  from llmarch.errors import UserError

  if len(sys.argv) > 2:  # before jax counts its threads
    os.sched_setaffinity(0, {int(core) for core in sys.argv[2].split(",")})
  try:
    run(sys.argv[1])
  except UserError as e:
    print(f"llmarch: {e}", file=sys.stderr)
    sys.exit(e.exit_code)
