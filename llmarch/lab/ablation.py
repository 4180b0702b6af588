"""An ablation as data: a question, arms that differ from a baseline in named keys, rules written before the run.

A folder of experiments/ holds `ablation.py`, whose `get_ablation()` returns an `Ablation`. Its trials are the product
of arms and seeds; a seed decides the initial weights and the order of the data, so that arms are compared in pairs.

  Ablation(
    title="Gated feed-forwards", question="...", config="../byte_lm.py",
    arms=(Arm("relu"), *arms(grid({FFN + ".activation": ["silu", "gelu"]}), match=Match("params"))),
    comparisons=(Comparison("silu-below-relu", "...", arm="activation=silu", expect="less", by=0.03),),
    budgets={"tiny": Budget(seeds=3)},
  )
"""

import dataclasses
import hashlib
import inspect
import itertools
import json
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from llmarch.build import FrozenDict, assign, build, differences, execute, to_dict, with_kind
from llmarch.errors import UserError, check, check_above, check_at_least, nearest
from llmarch.lab.match import Match, matched
from llmarch.lab.statistics import MIN_PAIRS
from llmarch.run_config import RunConfig

FILE = "ablation.py"
ZERO = "0"  # as a comparison's baseline_metric: the number itself, for statements about one metric alone
Overrides = Mapping[str, Any]  # dotted key of the config -> plain value


# --------------------------------------------------------------------------------------------------- sweeps


def grid(values: Mapping[str, Sequence]) -> list[Overrides]:
  """Every combination: {"a": [1, 2], "b": [3, 4]} is four overrides."""
  return [dict(zip(values, combination)) for combination in itertools.product(*values.values())]


def zipped(values: Mapping[str, Sequence]) -> list[Overrides]:
  """Side by side: {"a": [1, 2], "b": [3, 4]} is two overrides. Raises UserError for lists of unequal length."""
  lengths = {key: len(list(v)) for key, v in values.items()}
  check(len(set(lengths.values())) <= 1, f"zipped lists must be of one length, got {lengths}")
  return [dict(zip(values, row)) for row in zip(*values.values())]


def chain(*sweeps: Sequence[Overrides]) -> list[Overrides]:
  """One sweep after another."""
  return [dict(one) for sweep in sweeps for one in sweep]


def arms(sweep: Sequence[Overrides], *, match: Match | None = None) -> tuple["Arm", ...]:
  """An arm for each of a sweep, named by what it sets: "num_kv_heads=1"."""
  label = lambda one: " ".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in one.items())
  return tuple(Arm(label(one), one, match=match) for one in sweep)


# ------------------------------------------------------------------------------------------------- the nouns


@dataclasses.dataclass(frozen=True)
class Arm:
  """A variant of the config. `match` then changes its size, until it costs what the baseline does."""

  name: str
  overrides: Overrides = dataclasses.field(default_factory=dict)
  match: Match | None = None

  def __post_init__(self):
    named = isinstance(self.name, str) and bool(self.name) and self.name.isprintable()
    check(named, f"an arm's name must be a text of one line, got {self.name!r:.80}")
    _check_overrides(self.overrides, f"arm {self.name!r}")
    matched = self.match is None or isinstance(self.match, Match)
    check(matched, f"arm {self.name!r}: match must be a Match, such as Match('params'), got {self.match!r:.80}")


def _check_overrides(overrides: Any, what: str) -> None:
  check(isinstance(overrides, Mapping), f"{what}: overrides must be {{dotted key: value}}, got {overrides!r:.80}")
  check(all(isinstance(key, str) for key in overrides), f"{what}: the keys of overrides must be texts")
  check("seed" not in overrides, f"{what} sets seed, which is the sweep's to set; give --seeds, or leave it out")


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A statement about the difference `arm` minus `baseline` of a metric, and the rule that will decide it.

  expect "less": supported if the whole interval is below -by; "greater": above by; "equal": within by of `to`. The
  full rule is statistics.verdict's. A side may be another metric (`baseline_metric`) of the same arm.
  """

  id: str
  statement: str
  arm: str
  expect: Literal["less", "greater", "equal"]
  by: float = 0.0
  to: float = 0.0  # of "equal"
  metric: str = "loss"
  baseline: str = ""  # "": the ablation's
  baseline_metric: str = ""  # "": metric

  def __post_init__(self):
    for name in ("id", "statement", "arm", "metric", "baseline", "baseline_metric"):
      check(isinstance(getattr(self, name), str), f"comparison {self.id!r}: {name} must be a text")
    for name in ("by", "to"):
      value = getattr(self, name)
      check(_is_number(value), f"comparison {self.id}: {name} must be a finite number, got {value!r:.80}")
    check_at_least(self, 0, "by")
    known = ("less", "greater", "equal")
    check(self.expect in known, f"comparison {self.id}: expect={self.expect!r} is not one of {', '.join(known)}")
    check(self.expect == "equal" or not self.to, f"comparison {self.id}: to={self.to} is of expect='equal'")

  @property
  def rule(self) -> str:
    """In words, for tables."""
    side = self.baseline_metric or self.metric
    less = "" if side == ZERO else f" - {side} of {self.baseline or 'the baseline'}"
    what = f"{self.metric} of {self.arm}{less}"
    if self.expect == "equal":
      return f"{what}: within {self.by:g} of {self.to:g}"
    bound = -self.by if self.expect == "less" else self.by
    return f"{what}: {'below' if self.expect == 'less' else 'above'} {bound or 0:g}"


@dataclasses.dataclass(frozen=True)
class Budget:
  """Limits of a sweep.

  `overrides` go before an arm's. The baseline runs with `noise_seeds` seeds, for the noise floor, and every arm with
  the first `seeds` of them.
  """

  seeds: int = 3
  noise_seeds: int = 0  # 0: seeds
  overrides: Overrides = dataclasses.field(default_factory=dict)
  limit: float = 3600.0  # seconds of a trial

  def __post_init__(self):
    for name, least in (("seeds", 1), ("noise_seeds", 0)):
      value = getattr(self, name)
      check(type(value) is int and value >= least, f"{name} must be a whole number from {least}, got {value!r:.80}")
    check_above(self, 0, "limit")
    _check_overrides(self.overrides, "a budget")


def budgets(seeds: int = 3, noise_seeds: int = 0, **overrides) -> dict[str, Budget]:
  """The three that an experiment on text offers: tiny, its config as it is, for CPU cores; small and gpu, longer runs
  of more tokens a step, for many cores and for a GPU."""
  small = {"train.steps": 2000, "train.batch_size": 16, "checkpoint.every": 500}
  gpu = small | {"train.steps": 10_000, "train.batch_size": 64, "model.precision.compute": "bfloat16"}
  return {
    "tiny": Budget(seeds, noise_seeds, overrides),
    "small": Budget(seeds, noise_seeds, overrides | small, limit=4 * 3600),
    "gpu": Budget(max(seeds, 5), noise_seeds, overrides | gpu, limit=12 * 3600),
  }


@dataclasses.dataclass(frozen=True)
class Ablation:
  """See the module. The first arm is the baseline. `measures` are functions of a trial.Trained to {metric: number};
  `trial` may replace training as a whole: (RunConfig, workdir) -> {metric: number}."""

  title: str
  question: str
  config: str  # a config file, relative to the ablation's
  arms: tuple[Arm, ...]
  comparisons: tuple[Comparison, ...]
  budgets: Mapping[str, Budget]
  measures: tuple[Callable, ...] = ()
  trial: Callable | None = None
  metric: str = "loss"  # of tables and curves, lower is better
  learning_rates: tuple[float, ...] = ()  # tried for each arm, at a seed of their own; () is the config's
  notes: str = ""  # what a reader should know beside the question

  def __post_init__(self):
    for name in ("arms", "comparisons", "measures", "learning_rates"):
      value = getattr(self, name)
      check(isinstance(value, (list, tuple)), f"{name} must be a tuple or a list, got {value!r:.80}")
    check(bool(self.arms), "an ablation needs arms; the first is the baseline")
    for what, found, kind in (("arms", self.arms, Arm), ("comparisons", self.comparisons, Comparison),
                              ("budgets", self.budgets.values(), Budget)):  # fmt: skip
      other = next((one for one in found if not isinstance(one, kind)), None)
      check(other is None, f"{what} must hold {kind.__name__} alone, got {other!r:.80}")
    for name in ("title", "question", "config", "metric", "notes"):
      check(isinstance(getattr(self, name), str), f"{name} must be a text, got {getattr(self, name)!r:.80}")
    check(all(map(_is_number, self.learning_rates)), f"learning_rates must be numbers, got {self.learning_rates!r:.80}")
    for function in self.functions:
      check(inspect.isfunction(function), f"trial and measures must be functions, got {function!r:.80}")
    names = [arm.name for arm in self.arms]
    ids = [c.id for c in self.comparisons]
    for what, found in (("arm", names), ("comparison", ids)):
      twice = next((name for name in found if found.count(name) > 1), None)
      check(twice is None, f"{what} {twice!r} is there twice; give each a name of its own")
    for c in self.comparisons:
      for name in (c.arm, c.baseline or names[0]):
        check(name in names, f"comparison {c.id} names the arm {name!r}, which is not there{nearest(name, names)}")
      same = (c.arm, c.metric) == (c.baseline or names[0], c.baseline_metric or c.metric)
      check(not same, f"comparison {c.id} compares {c.arm} with itself; name another baseline or metric")

  @property
  def baseline(self) -> Arm:
    return self.arms[0]

  @property
  def functions(self) -> list[Callable]:
    """The functions that give the metrics which training does not."""
    return [f for f in (self.trial, *self.measures) if f is not None]


def load_ablation(folder: str | Path) -> Ablation:
  """The ablation of a folder. Raises UserError for a folder without one, or a file that fails."""
  found = execute(Path(folder) / FILE, "get_ablation", flag="llmarch ablate")
  check(isinstance(found, Ablation), f"{Path(folder) / FILE}: get_ablation must return an Ablation, got {found!r:.80}")
  return found


def find_ablations(paths: Sequence[str]) -> list[str]:
  """The folders of ablations among and below the given ones, sorted. Raises UserError where there is none."""
  found = []
  for path in paths:
    here = Path(path)
    below = sorted(str(p.parent) for p in here.glob(f"*/{FILE}")) if here.is_dir() else []
    own = [str(here)] if (here / FILE).is_file() else below
    check(bool(own), f"{path} has no {FILE}, and no folder in it has; give experiments/NAME, or experiments for all")
    found += own
  return list({Path(folder).resolve(): folder for folder in found}.values())


# ------------------------------------------------------------------------------------------------ its trials

TUNING_SEED = 1000  # no arm's result is from the seed that its learning rate was chosen on


@dataclasses.dataclass(frozen=True)
class Trial:
  """One run of one arm: what `key` names, and everything that it takes to run it, as plain data."""

  key: str  # of what is computed: the resolved config and the functions applied to it
  folder: str  # of the ablation
  arm: str
  seed: int
  budget: str
  phase: Literal["tune", "main"]
  overrides: dict  # those of the arm, its matched sizes and its learning rate
  match: dict | None
  config: dict
  limit: float


def trials(
  ablation: Ablation,
  folder: str | Path,
  budget: str,
  *,
  seeds: int | None = None,
  rates: Mapping[str, float] = FrozenDict(),
) -> list[Trial]:
  """All trials of the main phase, those of the noise floor first. rates: the learning rate chosen for each arm.

  Raises UserError for a budget that is not there, an override that the config refuses, or an impossible match,
  naming the arm.
  """
  found = _budget(ablation, folder, budget)
  count = found.seeds if seeds is None else seeds
  check(1 <= count <= TUNING_SEED, f"--seeds must be at least 1 and at most {TUNING_SEED}, got {count}")
  plan = []
  for arm in ablation.arms:
    n = max(count, found.noise_seeds if seeds is None else 0) if arm is ablation.baseline else count
    rate = {"optimizer.learning_rate": rates[arm.name]} if arm.name in rates else {}
    plan += _trials(ablation, folder, budget, arm, "main", range(n), [rate])
  return _distinct(plan)


def too_few_seeds(ablation: Ablation, folder: str | Path, budget: str, seeds: int | None) -> str:
  """A sentence that says that no verdict can come of these seeds; "" where one can, or where nothing is compared."""
  count = _budget(ablation, folder, budget).seeds if seeds is None else seeds
  if count >= MIN_PAIRS or not ablation.comparisons:
    return ""
  return (
    f"{folder}: no verdict can come of {count} seed{'s' * (count > 1)}, and every comparison will be inconclusive;"
    f" a verdict needs --seeds={MIN_PAIRS} or more"
  )


def _distinct(plan: list[Trial]) -> list[Trial]:
  first: dict[str, Trial] = {}
  for trial in plan:
    other = first.setdefault(trial.key, trial)
    same = f"arms {other.arm!r} and {trial.arm!r} are the same config; change what they override, or drop one"
    check(other is trial, f"{trial.folder}: {same}")
  return plan


def tuning(ablation: Ablation, folder: str | Path, budget: str) -> list[Trial]:
  """Makes a trial of each arm and learning rate, at TUNING_SEED."""
  _budget(ablation, folder, budget)
  rates = [{"optimizer.learning_rate": rate} for rate in ablation.learning_rates]
  trials_of = lambda arm: _trials(ablation, folder, budget, arm, "tune", [TUNING_SEED], rates)
  return _distinct([trial for arm in ablation.arms for trial in trials_of(arm)] if rates else [])


def recorded(plan: Iterable[Trial], rows: Mapping[str, Mapping]) -> list[dict]:
  """The records of the plan's trials, by key; arms are called as the file calls them now, and not as it did then."""
  names_of = lambda t: {"arm": t.arm, "seed": t.seed, "phase": t.phase, "overrides": t.overrides}
  return [{**rows[t.key], **names_of(t)} for t in plan if t.key in rows]


def chosen_rates(ablation: Ablation, records: Sequence[Mapping]) -> dict[str, float]:
  """The learning rate of the lowest metric for each arm, from the records of its tuning trials (see `recorded`).

  Raises UserError where no rate of an arm gave a number.
  """
  if not ablation.learning_rates:
    return {}
  best = {}
  for row in records:
    value = row["metrics"].get(ablation.metric) if row["status"] == "ok" else None
    if row["phase"] == "tune" and value is not None:
      candidate = (value, row["overrides"]["optimizer.learning_rate"])
      best[row["arm"]] = min(candidate, best.get(row["arm"], candidate))
  for arm in ablation.arms:
    check(
      arm.name in best, f"no learning rate of {ablation.learning_rates} trained the arm {arm.name!r}; give lower ones"
    )
  return {name: rate for name, (_, rate) in best.items()}


def _budget(ablation: Ablation, folder, name: str) -> Budget:
  check(name in ablation.budgets, f"--budget: {folder} has no budget {name!r}{nearest(name, ablation.budgets)}")
  return ablation.budgets[name]


def _trials(
  ablation, folder, budget: str, arm: Arm, phase: str, seeds: Sequence[int], rates: Sequence[Overrides]
) -> list[Trial]:
  """The trials of one arm, whose config is resolved once."""
  data, overrides, match = resolve(ablation, folder, budget, arm)

  def one(seed: int, rate: Overrides) -> Trial:
    config = _build(assign(data, [("seed", seed), *rate.items()]), folder, arm)
    return Trial(
      key=trial_key(config, ablation.functions),
      folder=str(folder),
      arm=arm.name,
      seed=seed,
      budget=budget,
      phase=phase,
      overrides={**overrides, **rate},
      match=match,
      config=to_dict(config),
      limit=ablation.budgets[budget].limit,
    )

  return [one(seed, rate) for seed in seeds for rate in rates]


def resolve(ablation: Ablation, folder, budget: str, arm: Arm) -> tuple[dict, dict, dict | None]:
  """The plain config of an arm, its overrides (matched sizes included), and how well it matches the baseline."""
  base = base_config(ablation, folder, budget)
  config = _build(_assign(base, arm.overrides, folder, arm), folder, arm)
  if arm.match is None:
    return to_dict(config), dict(arm.overrides), None
  target = _build(_assign(base, ablation.baseline.overrides, folder, ablation.baseline), folder, ablation.baseline)
  try:
    config, sizes, report = matched(arm.match, config, target)
  except UserError as e:
    raise UserError(f"{folder}: arm {arm.name!r}: {e}") from None
  return to_dict(config), {**arm.overrides, **sizes}, report


def base_config(ablation: Ablation, folder, budget: str) -> dict:
  """The config of a budget before any arm, complete."""
  import llmarch.layers.registry  # noqa: F401  the kinds join their families

  data = execute(Path(folder) / ablation.config, "get_config", flag=f"{folder}: config")
  data = data.to_dict() if hasattr(data, "to_dict") else data
  complete = to_dict(build(RunConfig, data, "config"))
  changed = _assign(complete, ablation.budgets[budget].overrides, folder, None)
  return to_dict(build(RunConfig, changed, f"{folder}: the budget {budget!r}: config"))


def _assign(data: dict, overrides: Overrides, folder, arm: Arm | None) -> dict:
  try:
    return assign(data, overrides.items())
  except UserError as e:
    raise UserError(f"{folder}: {f'arm {arm.name!r}' if arm else 'the budget'}: {e}") from None


def _build(data: dict, folder, arm: Arm) -> RunConfig:
  try:
    return build(RunConfig, data, "config")
  except UserError as e:
    raise UserError(f"{folder}: arm {arm.name!r}: {e}") from None


def trial_key(config: RunConfig, functions: Sequence[Callable]) -> str:
  """Names what a trial computes: the config, and the functions applied to it, by their names and code.

  Of the config, what is not a default, so that a new field with a default leaves old records as they are. (A default
  that changes what is computed wants a new records.VERSION.) Of the code, every letter, and not what it calls.
  """
  from llmarch.lab.records import VERSION

  def code(f: Callable) -> str:
    try:
      return hashlib.sha256(textwrap.dedent(inspect.getsource(f)).encode()).hexdigest()[:16]
    except OSError:
      raise UserError(f"the function {f.__name__!r} has no source; define it in a file") from None

  what = {"version": VERSION, "config": _chosen(config), "functions": [f"{f.__name__} {code(f)}" for f in functions]}
  return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def _chosen(value: Any) -> Any:
  """A config as plain data, without the fields that have their default."""
  if dataclasses.is_dataclass(value):
    fields = {f.name: (getattr(value, f.name), f.default) for f in dataclasses.fields(value)}
    return with_kind(value, {name: _chosen(v) for name, (v, default) in fields.items() if v != default})
  if isinstance(value, Mapping):
    return {name: _chosen(v) for name, v in value.items()}
  return [_chosen(v) for v in value] if isinstance(value, (list, tuple)) else value


def config_differences(ablation: Ablation, folder, budget: str) -> dict[str, list[str]]:
  """For each arm, sentences of what differs from the baseline's config."""
  first = resolve(ablation, folder, budget, ablation.baseline)[0]
  return {arm.name: differences(resolve(ablation, folder, budget, arm)[0], first) for arm in ablation.arms[1:]}
