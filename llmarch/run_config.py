"""The config of a run: the model, its text, its optimizer and its schedule of work.

This module and what it imports need the standard library alone.
"""

from typing import Literal

from llmarch.build import Variant, config_dataclass
from llmarch.config import ModelConfig
from llmarch.errors import check, check_above, check_at_least, check_rate
from llmarch.experiment_checks import check_training

# ------------------------------------------------------------------------------------------------ data


class SourceConfig(Variant):
  """Where documents come from; see data/sources.py."""


@config_dataclass
class Stdlib(SourceConfig, kind="stdlib"):
  """The source code of the running Python's standard library: real text on every machine."""


@config_dataclass
class TextFiles(SourceConfig, kind="text"):
  """Text files. `paths` are globs; a file is one document, or many where `separator` cuts it."""

  paths: tuple[str, ...]
  separator: str = ""  # "\n\n", "<|endoftext|>" ...; "" keeps a file whole

  def __post_init__(self):
    check(bool(self.paths), "paths is empty; name at least one file or glob")


@config_dataclass
class JSONL(SourceConfig, kind="jsonl"):
  """JSON-lines files, a document a line, its text under `field`."""

  paths: tuple[str, ...]
  field: str = "text"

  def __post_init__(self):
    check(bool(self.paths), "paths is empty; name at least one file or glob")


@config_dataclass
class TokenFile(SourceConfig, kind="tokens"):
  """A memory-mapped token file written by `llmarch tokenizer --encode` (data/tokenfile.py)."""

  path: str


@config_dataclass
class HFDataset(SourceConfig, kind="hf"):
  """A Hugging Face dataset (needs the package `datasets`)."""

  path: str
  name: str | None = None
  split: str = "train"
  field: str = "text"


# Synthetic tasks: the exact layout of a row is in data/synthetic.py.


@config_dataclass
class Copy(SourceConfig, kind="copy"):
  """Random symbols, a separator, the same symbols again; the loss counts the second half."""

  length: int = 16
  num_symbols: int = 32

  def __post_init__(self):
    check_at_least(self, 1, "length", "num_symbols")


@config_dataclass
class Recall(SourceConfig, kind="recall"):
  """Multi-query associative recall (2312.04927): key-value pairs, then each key, whose value is asked."""

  num_pairs: int = 8
  num_symbols: int = 32  # keys, and as many values

  def __post_init__(self):
    check_at_least(self, 1, "num_pairs", "num_symbols")
    check(
      self.num_pairs <= self.num_symbols,
      f"num_pairs={self.num_pairs} needs as many different keys; raise num_symbols={self.num_symbols}",
    )


@config_dataclass
class Induction(SourceConfig, kind="induction"):
  """A random sequence repeated until the row is full; the loss counts all but the first copy."""

  period: int = 16
  num_symbols: int = 32

  def __post_init__(self):
    check_at_least(self, 1, "period", "num_symbols")


@config_dataclass
class Needle(SourceConfig, kind="needle"):
  """A marked key and value hidden at a random place in noise, and asked at the end."""

  length: int = 64
  num_symbols: int = 32

  def __post_init__(self):
    check_at_least(self, 1, "length", "num_symbols")


@config_dataclass
class DataConfig:
  """Text to batches. A batch is a pure function of this config, the seed and the step."""

  source: SourceConfig = Stdlib()
  tokenizer: str = "bytes"  # "bytes", or a Hugging Face tokenizer.json (or the directory that holds it)
  packing: Literal["chunks", "documents"] = "chunks"
  validation_fraction: float = 0.05  # of the different documents, chosen by hash of their content
  shuffle: bool = True
  cache_dir: str = ""  # tokenised caches; "" is $LLMARCH_CACHE or ~/.cache/llmarch
  prefetch: int = 2  # batches made ahead

  def __post_init__(self):
    check_rate(self, "validation_fraction")
    check_at_least(self, 0, "prefetch")


# ------------------------------------------------------------------------------------------- optimizer


class AlgorithmConfig(Variant):
  """An optax optimizer; see train/optim.py."""


@config_dataclass
class AdamW(AlgorithmConfig, kind="adamw"):
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8

  def __post_init__(self):
    check_rate(self, "b1", "b2")
    check_above(self, 0, "eps")


@config_dataclass
class Lion(AlgorithmConfig, kind="lion"):
  b1: float = 0.9
  b2: float = 0.99

  def __post_init__(self):
    check_rate(self, "b1", "b2")


@config_dataclass
class Adafactor(AlgorithmConfig, kind="adafactor"):
  decay_rate: float = 0.8
  min_dim_size_to_factor: int = 128

  def __post_init__(self):
    check_rate(self, "decay_rate")
    check_at_least(self, 1, "min_dim_size_to_factor")


@config_dataclass
class Muon(AlgorithmConfig, kind="muon"):
  """Muon for matrices inside the blocks; Adam for embeddings, head, norms and biases."""

  beta: float = 0.95
  ns_steps: int = 5
  adam_b1: float = 0.9
  adam_b2: float = 0.95
  adam_learning_rate_ratio: float = 1.0  # Adam's rate over Muon's

  def __post_init__(self):
    check_rate(self, "beta", "adam_b1", "adam_b2")
    check_at_least(self, 1, "ns_steps")
    check_at_least(self, 0, "adam_learning_rate_ratio")


@config_dataclass
class SGD(AlgorithmConfig, kind="sgd"):
  momentum: float = 0.0

  def __post_init__(self):
    check_rate(self, "momentum")


class ScheduleConfig(Variant):
  """Learning rate over steps, as a fraction of the peak; see train/optim.py."""


@config_dataclass
class Constant(ScheduleConfig, kind="constant"):
  warmup: int = 0

  def __post_init__(self):
    check_at_least(self, 0, "warmup")


@config_dataclass
class Linear(ScheduleConfig, kind="linear"):
  warmup: int = 0
  final: float = 0.0  # fraction of the peak at the last step

  def __post_init__(self):
    check_at_least(self, 0, "warmup", "final")


@config_dataclass
class Cosine(ScheduleConfig, kind="cosine"):
  warmup: int = 0
  final: float = 0.1

  def __post_init__(self):
    check_at_least(self, 0, "warmup", "final")


@config_dataclass
class InverseSqrt(ScheduleConfig, kind="inverse_sqrt"):
  """Linear warm-up, then sqrt(warmup / step) (1706.03762, section 5.3)."""

  warmup: int = 1000

  def __post_init__(self):
    check_at_least(self, 1, "warmup")


@config_dataclass
class WSD(ScheduleConfig, kind="wsd"):
  """Warm-up, stable, linear decay over the last `decay` steps (2404.06395)."""

  warmup: int = 0
  decay: int = 0
  final: float = 0.0

  def __post_init__(self):
    check_at_least(self, 0, "warmup", "decay", "final")


@config_dataclass
class OptimizerConfig:
  algorithm: AlgorithmConfig = AdamW()
  schedule: ScheduleConfig = Cosine()
  learning_rate: float = 1e-3  # at the peak
  weight_decay: float = 0.1  # decoupled; on matrices and embeddings, not on norms and biases
  clip_norm: float | None = 1.0

  def __post_init__(self):
    check_at_least(self, 0, "learning_rate", "weight_decay")
    check_above(self, 0, "clip_norm")


# ---------------------------------------------------------------------------------------------- the run


@config_dataclass
class SpikeConfig:
  """A loss `sigma` deviations above the mean of the last `window` takes the run back to a checkpoint at least `back`
  steps before it, and past the next `skip` batches, those up to the spike at least (PaLM, 2204.02311, section 5.1:
  100 steps, 200 to 500 batches)."""

  window: int = 128
  sigma: float = 6.0
  back: int = 100
  skip: int = 200

  def __post_init__(self):
    check_at_least(self, 2, "window")
    check_above(self, 0, "sigma")
    check_at_least(self, 1, "back", "skip")


@config_dataclass
class LoRAConfig:
  """Low-rank adapters on frozen weights (2106.09685); see adapt/lora.py."""

  rank: int = 8
  alpha: float = 16.0  # the adapter is times alpha / rank
  targets: tuple[str, ...] = ("mixer/*", "ffn/*")  # patterns of the ends of names: "mixer/q", "blocks/0/ffn/*"
  weights: Literal["int8", "fp8", "int4", "int4_32", "int4_128", "nf4"] | None = None  # of frozen matrices; QLoRA: nf4

  def __post_init__(self):
    check_at_least(self, 1, "rank")
    check_above(self, 0, "alpha")
    check(bool(self.targets), "targets is empty; name at least one matrix, such as 'mixer/q'")


@config_dataclass
class TrainConfig:
  steps: int = 1000
  batch_size: int = 16  # sequences a step, over all devices and micro-batches
  seq_len: int = 256
  log_every: int = 10
  grad_accum: int = 1  # micro-batches a step; gradients are summed in f32
  microbatches: int | None = None  # of those, in a pipeline over `stage`; None: up to four times the stages
  circuits: int = 1  # that they make round the stages: more have a smaller bubble, and more to send
  remat: Literal["none", "full", "dots", "dots_no_batch", "offload"] = "none"  # layers/stack.py
  loss: Literal["causal", "prefix"] = "causal"
  loss_chunk: int = 128  # tokens a row whose logits exist at a time
  z_loss: float = 0.0  # PaLM: 1e-4
  label_smoothing: float = 0.0
  init_from: str = ""  # a saved model, a run or a checkpoint of transformers to start from; "" draws the parameters
  lora: LoRAConfig | None = None  # train adapters of init_from's weights, and nothing else
  ema: float | None = None  # decay of an exponential moving average of the parameters
  telemetry_every: int = 0  # steps between rows of per-layer statistics; 0 is never
  on_nonfinite: Literal["stop", "skip"] = "stop"  # a loss or gradient that is not finite; 3 in a row always stop
  spike: SpikeConfig | None = None
  replay_every: int = 0  # steps between checks that a step, done again, gives the same bits; 0 is never
  watchdog: float | None = None  # seconds that a step may take; None: 20 times the median, at least 60

  def __post_init__(self):
    check_at_least(self, 1, "steps", "batch_size", "seq_len", "log_every", "grad_accum", "loss_chunk")
    check_at_least(self, 1, "microbatches", "circuits")
    check_at_least(self, 0, "z_loss", "telemetry_every", "replay_every")
    check_above(self, 0, "watchdog")
    check(self.steps < 2**31, f"steps must be below 2^31, got {self.steps}")
    check(
      self.lora is None or self.init_from,
      "lora adapts given weights; set init_from to the folder of a model",
    )
    tokens = self.batch_size * self.seq_len
    check(tokens < 2**31, f"batch_size and seq_len make {tokens} tokens a step; they must be below 2^31")
    check_rate(self, "label_smoothing")
    check(self.ema is None or 0 < self.ema < 1, f"ema must lie between 0 and 1, got {self.ema}")
    check(
      self.batch_size % self.grad_accum == 0,
      f"batch_size={self.batch_size} must be a multiple of grad_accum={self.grad_accum}",
    )


@config_dataclass
class EvalConfig:
  every: int = 100  # steps; 0 is never
  batches: int = 8
  sample_tokens: int = 128  # length of the sample of text; 0 is none
  sample_prompt: str = "def "
  temperature: float = 0.8

  def __post_init__(self):
    check_at_least(self, 0, "every", "sample_tokens", "temperature")
    check_at_least(self, 1, "batches")


@config_dataclass
class CheckpointConfig:
  every: int = 500  # steps; 0 saves the last step only
  max_to_keep: int = 2
  keep_best: int = 0  # and this many more, by eval/loss

  def __post_init__(self):
    check_at_least(self, 0, "every", "keep_best")
    check_at_least(self, 1, "max_to_keep")


@config_dataclass
class RunConfig:
  """Everything that decides a run; it is written to the run's workdir as config.json."""

  model: ModelConfig
  seed: int = 0
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  train: TrainConfig = TrainConfig()
  eval: EvalConfig = EvalConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  mesh: str = ""  # sizes of the axes of sharding.TRAINING, such as "fsdp=2,tensor=4"; "" is one device

  def __post_init__(self):
    check_at_least(self, 0, "seed")
    check(self.seed < 2**32, f"seed must be below 2^32, got {self.seed}")
    check(
      self.train.seq_len <= self.model.max_seq_len,
      f"train.seq_len={self.train.seq_len} is longer than model.max_seq_len={self.model.max_seq_len};"
      " lower the one or raise the other",
    )
    check(self.model.encoder is None, "model.encoder: training has no sources for an encoder to read; leave it out")
    check_training(self.mesh, self.model, self.train)
