"""The training loop: it reads batches, writes metrics, samples and checkpoints, and handles the faults of a run."""

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llmarch.build import to_dict
from llmarch.errors import UserError
from llmarch.run_config import RunConfig
from llmarch.train import distributed
from llmarch.train.branch import Branch, tokens_seen
from llmarch.train.checkpoint import (
  Checkpoints,
  check_base,
  fingerprints,
  flatten_state,
  needs_weights,
  weights_hash,
  without_base,
)
from llmarch.train.faults import Fault, Interrupted, Preempted, StorageFault
from llmarch.train.journal import BEGAN, Journal, batch_index
from llmarch.train.metrics import LiveLine, MetricsWriter, read_rows
from llmarch.train.spikes import Spikes
from llmarch.train.step import TrainStep, make_train_step
from llmarch.train.watch import INTERRUPTED, Preemption, Watchdog, tidy
from llmarch.train.workdir import claim_workdir, only_process

IN_A_ROW = 3  # the run ends after this many skipped updates in a row, or rollbacks without progress


def train(
  config: RunConfig,
  workdir: str,
  train_data,
  eval_data,
  *,
  mesh: Mesh | None,
  sample: Callable[[dict], str] | None,
  flops_per_token: float,
  peak_flops: float | None,
  tokenizer=None,
  weights: Callable[[], dict] | None = None,
  branch: Branch | None = None,
) -> dict:
  """Trains from the newest good checkpoint of `workdir`, or from the start, to config.train.steps.

  train_data and eval_data (unused if eval.every is 0) are as data.pipeline.Pipeline. sample(params) gives text.
  flops_per_token: FLOPs of a train step for each of its tokens. peak_flops: FLOP/s of all devices together; None if
  unknown (mfu is then null). tokenizer: a copy of it is kept in the workdir. weights() gives all parameters of the
  model by name (train.init_from); None: they are drawn. branch: a checkpoint of another run, which the run starts from.
  Returns the last evaluation row ({} if there was none).

  Raises UserError for a workdir that belongs to another run or is in use by another process, or a checkpoint of other
  data; Fault (train/faults.py) for numbers that are not finite and checkpoints that cannot be written or read;
  Preempted after SIGTERM, and Interrupted after Ctrl-C, with the state saved.
  """
  functions = make_train_step(config, mesh)
  needed = needs_weights(config, workdir) and (branch is None or config.train.lora is not None)
  given = weights() if weights and needed else None
  if distributed.is_main():
    claim_workdir(workdir, config, tokenizer)  # last among all refusals, since a corrected config may use the folder
  distributed.barrier("claimed")
  with contextlib.ExitStack() as stack:
    stack.enter_context(only_process(workdir))
    journal = Journal(workdir, writes=distributed.is_main())
    checkpoints = stack.enter_context(Checkpoints(workdir, config.checkpoint, journal))
    c = config.train
    meter = Meter(c.batch_size * c.seq_len, flops_per_token, peak_flops)
    run = _Run(config, workdir, functions, train_data, eval_data, given, branch, sample, meter, journal, checkpoints)
    stack.enter_context(run.line)
    stack.callback(run.close)
    record_stuck = lambda what, seconds: journal.add("stuck", step=run.step, what=what, seconds=seconds)
    if not distributed.several():
      tidy(workdir)  # the lock is held, so no other process uses the folder
    run.watchdog = stack.enter_context(Watchdog(workdir, c.watchdog, on_stuck=record_stuck))
    run.preemption = stack.enter_context(Preemption(several=distributed.several()))
    stack.enter_context(distributed.ends_together())  # entered last, so that it acts before the end of a save waits
    try:
      run.restore()
      run.train()
    except BaseException as e:
      with contextlib.suppress(StorageFault):
        journal.add("preempted" if isinstance(e, Preempted) else "failed", step=run.step, why=str(e)[:500])
      raise
    journal.add("done", step=run.step)
    return run.last_eval


class Spike(Exception):
  """A loss that leaps, at a step."""


@dataclasses.dataclass
class _Run:
  """A run in progress: its state after `step` steps, and everything that it needs to go on.

  The numbers of a step are checked while the next one runs (`pending`), or at once if a save or an evaluation is due,
  which must not happen with bad numbers. A bad update never enters the state: the step itself leaves it out.
  """

  config: RunConfig
  workdir: str
  functions: TrainStep
  train_data: object
  eval_data: object
  given: dict | None
  branch: Branch | None
  sample: Callable | None
  meter: "Meter"
  journal: Journal
  checkpoints: Checkpoints
  watchdog: Watchdog | None = None
  preemption: Preemption | None = None
  step: int = 0
  last_eval: dict = dataclasses.field(default_factory=dict)
  writer: MetricsWriter | None = None
  batches: Iterator | None = None

  def __post_init__(self):
    c = self.config.train
    self.line = LiveLine(c.steps)
    self.compiled = set()  # kinds of work that this process has done before
    shape = c.batch_size, c.seq_len
    self.rows = distributed.local_rows(self.functions.batch_sharding, shape) if distributed.several() else None
    self.meta = {"config": to_dict(self.config), "pipeline_hash": self.train_data.hash}
    self.meta |= {"base_hash": weights_hash(self.given)} if c.lora else {}

  # ---------------------------------------------------------------------------------------- where it stands

  def restore(self, before: int | None = None) -> None:
    """Restores the newest good checkpoint (of those before the step `before`, if given), or starts anew."""
    found = self.checkpoints.latest_good(without_base(self.functions.abstract_state), before=before, say=self.say)
    if found is None and before is None and self.journal.saved():
      raise Fault(
        f"the journal of {self.workdir} names the checkpoint of step {max(self.journal.saved())}, but there is none;"
        " put the folder checkpoints back, or give another --workdir"
      )
    if found is None and self.branch:
      self.branch_off()
      return
    begun = self.journal.branched()
    if found is None and begun:
      source = "@".join(map(str, begun["source"]))
      raise UserError(f"{self.workdir} is a branch that has saved nothing yet; give --from={source} again")
    self.start_from(found)
    if self.step >= self.config.train.steps:
      self.say(
        f"{self.workdir} is finished, with {self.step} steps; to go on, give more --config.train.steps, or start a"
        f" branch: llmarch train --from={self.workdir} --workdir=NEW"
      )

  def branch_off(self) -> None:
    """Starts from a checkpoint of another run, and saves it as the first one of this run."""
    fresh = lambda: self.functions.init() if self.given is None else self.functions.init(self.given)
    at, state, old = self.branch.restore(self.config, self.functions.abstract_state, fresh)
    anew = "step" in self.branch.reset
    step, skips = (0, []) if anew else (at, [tuple(s) for s in old.get("skips", ())])
    first, sentence = self.branch.first_batch(old, self.config, self.train_data)
    skip = [step, first - batch_index(step, skips)]
    source = [self.branch.workdir, at]
    self.journal.add("branched", step=step, source=source, reset=list(self.branch.reset), skip=skip)
    record = {"pipeline_hash": self.train_data.hash, "skips": skips, "base_hash": old.get("base_hash")}
    if not anew:
      record |= {"tokens": tokens_seen(old), **{name: old[name] for name in ("losses", "left_out") if name in old}}
    self.say("; ".join(filter(None, (self.branch.describe(self.config, at), sentence))))
    self.start_from((step, state, record))
    if self.writer and not anew:  # the curves of a run have their beginning
      for row in read_rows(self.branch.workdir, at):
        self.writer.write(row)
    self.save()

  def start_from(self, found: tuple[int, dict, dict] | None) -> None:
    """Continues from (step, state, record), or from the beginning if `found` is None."""
    given, self.state = self.given, None
    if found:
      self.step, state, record = found
      if record["pipeline_hash"] != self.train_data.hash:
        raise UserError(
          f"{self.workdir} was trained on other data (its corpus, tokenizer or batch shape has changed); give another"
          " --workdir, or restore the corpus"
        )
      if self.config.train.lora:
        check_base(record, given, self.workdir, self.config.train.init_from)
        state["base"] = self.functions.init(given)["base"]
      if self.step < self.config.train.steps:
        self.say(f"resuming {self.workdir} after step {self.step}")
    else:
      self.step, record = 0, {"tokens": 0}
      state = self.functions.init() if given is None else self.functions.init(given)
    self.state, self.pending, self.first = state, None, True
    # The skips in the record count too, in case the journal has lost a line.
    known, lost = self.journal.skips(), [tuple(s) for s in record.get("skips", ())]
    self.skips = known + list((collections.Counter(lost) - collections.Counter(known)).elements())
    self.spikes = Spikes(self.config.train.spike, record.get("losses", ()))
    self.left_out = record.get("left_out", 0)
    self.tokens = record["tokens"] if "tokens" in record else tokens_seen({"step": self.step} | self.meta)
    self.close()
    self.batches = self.read_batches()
    self.line.begin(self.step)
    if distributed.is_main():
      self.writer = MetricsWriter(self.workdir, self.step, self.config.log, config=self.meta["config"], say=self.say)
      self.last_eval = {name: value for name, value in self.writer.last_eval.items() if name != "seconds"}
    self.journal.add("start", step=self.step, began=BEGAN)

  def close(self) -> None:
    for one in (self.batches, self.writer):
      if one is not None:
        one.close()
    self.batches = self.writer = None

  def say(self, text: str) -> None:
    if distributed.is_main():
      self.line.say(text)

  def status(self, text: str) -> None:
    if distributed.is_main():
      self.line.status(text)

  def read_batches(self) -> Iterator[dict]:
    """Yields the batches of the steps from here on, on the devices, without those that are skipped."""
    step = self.step
    while True:
      until = min((s for s, _ in self.skips if s > step), default=math.inf)
      index = batch_index(step, self.skips)
      with contextlib.closing(
        self.train_data.iterate(index) if self.rows is None else self.train_data.iterate(index, self.rows)
      ) as batches:
        while step < until:
          yield self.place(next(batches))
          step += 1

  def place(self, batch: dict) -> dict:
    if self.rows is None:
      return jax.device_put(batch, self.functions.batch_sharding)
    return distributed.place(batch, self.rows, self.functions.batch_sharding, self.config.train.batch_size)

  # ----------------------------------------------------------------------------------------------- the work

  def train(self) -> None:
    while True:
      try:
        while self.step < self.config.train.steps:
          self.advance()
        break
      except Spike as e:
        self.roll_back(*e.args)
    self.settle()

  def advance(self) -> None:
    """Runs one step, and what is due after it."""
    c, step = self.config.train, self.step + 1
    last = step == c.steps
    is_due = lambda every: every and step % every == 0
    telemetry, replay = bool(is_due(c.telemetry_every)), is_due(c.replay_every)
    self.watchdog.begin(f"step{' with telemetry' * telemetry}{' and its replay' * bool(replay)}")
    batch, first = next(self.batches), not self.compiled
    before = jax.tree.map(jnp.copy, self.state) if replay else None
    metrics = self.run_step(batch, telemetry)
    self.step = step
    self.tokens += self.meter.tokens
    if replay:
      self.replay(before, batch, telemetry)
    self.judge()
    self.pending = step, {name: metrics[name] for name in ("loss", "grad_norm", "finite")}
    self.checkpoints.check()
    if is_due(c.log_every) or telemetry or last:
      self.judge()
      self.log(metrics)
    elif first:
      self.show_first(metrics)
    if self.config.eval.every and (is_due(self.config.eval.every) or last):
      self.judge()
      with self.first_time("evaluation"), self.meter.paused():
        self.evaluate()
    stop = distributed.preempted(step) if distributed.several() else self.preemption.asked
    if is_due(self.config.checkpoint.every) or last or stop:
      with self.first_time("save"), self.meter.paused():
        self.save()
    if stop and not last:
      self.settle()
      kind, what = (Preempted, "told to stop") if self.preemption.code != INTERRUPTED else (Interrupted, "interrupted")
      raise kind(f"{what}: step {step} is saved in {self.workdir}; start it again to go on")

  def run_step(self, batch: dict, telemetry: bool) -> dict:
    """Runs the jitted step -> its metrics. The first of a kind is compiled, and measured, apart from all others."""
    if ("step", telemetry) in self.compiled:
      self.state, metrics = self.functions.step(self.state, batch, telemetry=telemetry)
      self.meter.step()
      return metrics
    jax.block_until_ready(self.state)
    first = not self.compiled
    with self.first_time(("step", telemetry)), self.meter.paused():
      self.status(f"compiling the step{' with telemetry' * telemetry}")
      self.functions.compile(self.state, batch, telemetry=telemetry)
      began = time.monotonic()
      self.state, metrics = jax.block_until_ready(self.functions.step(self.state, batch, telemetry=telemetry))
      self.meter.first_step(time.monotonic() - began)
    if first:  # the clocks begin here: to draw or restore the state and to start the data takes time only once
      self.line.begin(self.step + 1)
      self.meter.begin()
    else:
      self.line.leave_out(0, steps=1)
    return metrics

  def show_first(self, metrics: dict) -> None:
    """Shows the metrics of the first step of this process, which `log` may be far from showing, and writes no row."""
    row = self.row_of(metrics)
    if row.pop("finite")["update"] and distributed.is_main():
      self.line.show(row | self.meter.rate_of_first())

  @contextlib.contextmanager
  def first_time(self, what):
    """Leaves the block out of the time left if it is the first work of its kind in this process, which compiles."""
    began = time.monotonic()
    yield
    if what not in self.compiled:
      self.compiled.add(what)
      self.line.leave_out(time.monotonic() - began)

  def judge(self) -> None:
    """Checks the numbers of the pending step. Raises Fault if the run cannot continue, Spike if it must go back."""
    if self.pending is None:
      return
    (step, metrics), self.pending = self.pending, None
    metrics = jax.device_get(metrics)
    if self.first:
      self.first = False
      self.journal.add("stepping", step=step)
    if not metrics["finite"]["state"]:
      leaf = next((n for n, (_, ok) in jax.device_get(fingerprints(flatten_state(self.state))).items() if not ok), "")
      raise Fault(f"the state ({leaf}) is not finite at step {step} in {self.workdir}; {self.mend()}")
    if metrics["finite"]["update"]:
      self.left_out = 0
      if self.spikes.leaps(float(metrics["loss"])):
        raise Spike(step, float(metrics["loss"]))
      return
    name = next((n for n in ("loss", "grad_norm") if not np.isfinite(metrics[n])), "loss")
    text = f"the {name} is {metrics[name]} at step {step}"
    self.left_out += 1
    if self.config.train.on_nonfinite == "stop":
      raise Fault(f"{text} in {self.workdir}; {self.mend()}")
    if self.left_out == IN_A_ROW:
      raise Fault(f"{text} in {self.workdir}, as at the {IN_A_ROW - 1} before; {self.mend()}")
    self.journal.add("skipped", step=step, **{name: str(metrics[name])})
    self.say(f"{text}: its update is left out")

  def mend(self) -> str:
    self.checkpoints.join()
    steps = self.checkpoints.steps()
    back = f"the checkpoint of step {steps[-1]} is kept" if steps else "nothing was saved"
    return f"lower optimizer.learning_rate or clip gradients ({back})"

  def row_of(self, metrics: dict) -> dict:
    row = {"step": self.step, **jax.tree.map(lambda x: x.tolist(), jax.device_get(metrics))}
    return row | {"bits_per_byte": _bits_per_byte(row["loss"], self.train_data), "tokens": self.tokens}

  def log(self, metrics: dict) -> None:
    row = self.row_of(metrics)
    sound = row.pop("finite")["update"]
    row |= self.meter.read()
    if self.writer:
      self.writer.write(row if sound else {k: v for k, v in row.items() if k in ("step", "tokens", "learning_rate")})
      if sound:
        self.line.show(row)

  def evaluate(self) -> None:
    self.watchdog.begin("evaluation", slow=True)
    if "evaluation" not in self.compiled:
      self.status("compiling the evaluation")
    batches = self.config.eval.batches
    found = validation_metrics(self.functions.evaluate, self.state, self.eval_data, batches, self.eval_place)
    self.last_eval = {"step": self.step, **found, "tokens": self.tokens}
    loss = self.last_eval["eval/loss"]
    if not math.isfinite(loss):
      raise Fault(f"the eval/loss is {loss} at step {self.step} in {self.workdir}; {self.mend()}")
    if self.writer:
      self.writer.write(self.last_eval)
    self.say(f"step {self.step}  eval loss {loss:.4f}  {self.last_eval['eval/bits_per_byte']:.3f} bits/byte")
    if self.sample:
      self.watchdog.begin("sample", slow=True)
      params = self.functions.export(self.state)
      params = distributed.gather(params) if distributed.several() else params
      if distributed.is_main():
        self.say(f"--- sample after step {self.step} ---\n{self.sample(params)}\n---")
      distributed.barrier("sampled")

  def eval_place(self, index: int) -> dict:
    return self.place(self.eval_data.batch(index) if self.rows is None else self.eval_data.batch(index, self.rows))

  # --------------------------------------------------------------------------------------------- its faults

  def settle(self) -> None:
    """Waits until the last save is on the disk and in the journal, which the main process writes."""
    self.watchdog.begin("save", slow=True)
    self.checkpoints.wait()
    distributed.barrier("saved")

  def save(self) -> None:
    began = time.monotonic()
    self.watchdog.begin("save", slow=True)
    self.judge()
    if self.writer:
      self.writer.sync()
    known = {k: v for k, v in self.last_eval.items() if k.startswith("eval/")}
    known = known if self.last_eval.get("step") == self.step else None
    meta = self.meta | {
      "skips": [s for s in self.skips if s[0] < self.step],
      "losses": list(self.spikes.losses),
      "left_out": self.left_out,
      "tokens": self.tokens,
    }
    self.checkpoints.save(self.step, without_base(self.state), meta, known, began=began)

  def roll_back(self, step: int, loss: float) -> None:
    """Restores the last good checkpoint before a spike, and skips the batches that come next.

    The journal has the decision before anything is done about it. If the process is killed after that line, the next
    one finds there that later checkpoints were taken back (`Checkpoints.latest_good`), and which batches to skip.
    """
    self.watchdog.begin("rollback", slow=True)
    self.checkpoints.wait()
    before = max(step - self.config.train.spike.back, 0) + 1
    found = self.checkpoints.latest_good(without_base(self.functions.abstract_state), before=before, say=self.say)
    if found is None and self.journal.branched():
      raise Fault(f"the loss is {loss:.4g} at step {step} in {self.workdir}, a spike, and no checkpoint lies before it")
    to = found[0] if found else 0
    if sum(row["event"] == "rollback" and row["step"] >= step for row in self.journal.events) == IN_A_ROW:
      raise Fault(
        f"the loss is {loss:.4g} at step {step} in {self.workdir}, a spike, as at {IN_A_ROW} tries before;"
        f" {self.mend()}"
      )
    count = max(self.config.train.spike.skip, step - to)
    self.journal.add("rollback", step=step, loss=loss, to=to, skip=[to, count])
    for later in [s for s in self.checkpoints.steps() if s > to]:
      self.checkpoints.quarantine(later, f"the loss of step {step} was a spike, and the run went back to step {to}")
    self.say(f"the loss is {loss:.4g} at step {step}, a spike: back to step {to}, and past {count} batches")
    self.start_from(found)

  def replay(self, before: dict, batch: dict, telemetry: bool) -> None:
    """Repeats a step from the same state and batch.

    Raises Fault unless every bit is the same, on every device that has a copy of it.
    """
    again, _ = self.functions.step(before, batch, telemetry=telemetry)
    first, second = (jax.device_get(fingerprints(flatten_state(without_base(s)))) for s in (self.state, again))
    differ = [name for name in first if first[name][0] != second[name][0]]
    differ = differ or diverging(flatten_state(without_base(self.state)))
    if differ:
      more = f" and {len(differ) - 1} more" if len(differ) > 1 else ""
      raise Fault(
        f"step {self.step}, done twice, gave other bits in {differ[0]}{more}"
        f" ({jax.devices()[0].device_kind}): a device computes wrongly, or not the same way twice; {self.mend()}"
      )


def diverging(arrays: dict) -> list[str]:
  """Names of the arrays of which two devices of this process hold different copies."""
  found = []
  for name, x in arrays.items():
    copies = collections.defaultdict(list)
    for shard in x.addressable_shards:
      copies[str(shard.index)].append(shard.data)
    for same in copies.values():
      if len(same) > 1 and len({int(fingerprints({"": one})[""][0]) for one in same}) > 1:
        found.append(name)
        break
  return found


def validation_metrics(evaluate_step, state: dict, data, batches: int, batch: Callable[[int], dict]) -> dict:
  """The mean loss over the first `batches` batches of the validation split, which are the same each time."""
  sums = [jax.device_get(evaluate_step(state, batch(i))) for i in range(batches)]
  loss = float(sum(s["loss"] for s in sums) / max(sum(s["weight"] for s in sums), 1.0))
  return {"eval/loss": loss, "eval/bits_per_byte": _bits_per_byte(loss, data)}


def _bits_per_byte(loss: float, data) -> float:
  """Converts nats per token to bits per byte of text."""
  return loss / math.log(2) / data.bytes_per_token


class Meter:
  """Measures tokens per second and MFU since the last reading, without pauses and the first step, which compiles.

  MFU = tokens/s * FLOPs per token of a train step (forward and backward, no recomputation) / peak FLOP/s.
  """

  def __init__(self, tokens_per_step: int, flops_per_token: float, peak_flops: float | None):
    self.tokens, self.flops, self.peak = tokens_per_step, flops_per_token, peak_flops
    self.first = None
    self.begin()

  def begin(self) -> None:
    """Starts the clock of the next reading."""
    self.began, self.steps = time.monotonic(), 0

  def step(self) -> None:
    self.steps += 1

  def first_step(self, seconds: float) -> None:
    """Notes a step that began once it was compiled; it counts only where no other one was measured."""
    self.first = seconds

  def read(self) -> dict:
    """The rates since the last reading: tokens_per_second, and mfu."""
    now = time.monotonic()
    seconds, steps = (now - self.began, self.steps) if self.steps or not self.first else (self.first, 1)
    self.first = None
    self.begin()
    return self._rates(seconds, steps)

  def rate_of_first(self) -> dict:
    """The rates of the first step alone; no reading is taken."""
    return self._rates(self.first, 1)

  def _rates(self, seconds: float, steps: int) -> dict:
    rate = steps * self.tokens / max(seconds, 1e-9)
    return {"tokens_per_second": rate, "mfu": None if self.peak is None else rate * self.flops / self.peak}

  @contextlib.contextmanager
  def paused(self):
    began = time.monotonic()
    yield
    self.began += time.monotonic() - began
