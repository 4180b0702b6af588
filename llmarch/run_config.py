"""The config of a run: the model, its text, its optimizer and its schedule of work.

This module and what it imports need the standard library alone.
"""

from typing import Literal

from llmarch.build import Variant, config_dataclass
from llmarch.config import ModelConfig
from llmarch.errors import check, check_above, check_at_least, check_rate
from llmarch.mesh_checks import check_training

# ------------------------------------------------------------------------------------------------ data


class SourceConfig(Variant):
  """A source of documents; see data/sources.py."""


@config_dataclass
class Stdlib(SourceConfig, kind="stdlib"):
  """The source code of the running Python's standard library: real text on every machine."""


@config_dataclass
class TextFiles(SourceConfig, kind="text"):
  """Text files. `paths` are globs; a file is one document, or several if `separator` cuts it.

  Line ends are read as "\n", and a byte-order mark is dropped. Files may end in .gz or .zst; the documents of a
  .parquet file are the rows of its column "text".
  """

  paths: tuple[str, ...]  # files or globs
  separator: str = ""  # "\n\n" (also as a shell passes it on: \\n\\n), "<|endoftext|>" ...; "" keeps a file whole

  def __post_init__(self):
    check(bool(self.paths), "paths is empty; name at least one file or glob")


@config_dataclass
class JSONL(SourceConfig, kind="jsonl"):
  """JSON-lines files with one document per line, whose text is the value of `field`; .gz, .zst and .parquet too."""

  paths: tuple[str, ...]  # files or globs
  field: str = "text"  # key whose value is the text

  def __post_init__(self):
    check(bool(self.paths), "paths is empty; name at least one file or glob")


@config_dataclass
class TokenFile(SourceConfig, kind="tokens"):
  """A memory-mapped token file written by `llmarch tokenizer --encode` (data/tokenfile.py)."""

  path: str  # the token file


@config_dataclass
class HFDataset(SourceConfig, kind="hf"):
  """A Hugging Face dataset, for which the package `datasets` is needed."""

  path: str  # name or folder of the dataset
  name: str | None = None  # configuration of the dataset, where it has several
  split: str = "train"  # split of the dataset
  field: str = "text"  # column that holds the text


# Synthetic tasks: data/synthetic.py has the exact layout of a row.


@config_dataclass
class Copy(SourceConfig, kind="copy"):
  """Copying: random symbols, a separator, and the same symbols again; the loss counts the second half."""

  length: int = 16
  num_symbols: int = 32

  def __post_init__(self):
    check_at_least(self, 1, "length", "num_symbols")


@config_dataclass
class Recall(SourceConfig, kind="recall"):
  """Multi-query associative recall (2312.04927): key-value pairs, then each key again, whose value is the answer."""

  num_pairs: int = 8
  num_symbols: int = 32  # number of different keys, and of different values

  def __post_init__(self):
    check_at_least(self, 1, "num_pairs", "num_symbols")
    check(
      self.num_pairs <= self.num_symbols,
      f"num_pairs={self.num_pairs} needs as many different keys; raise num_symbols={self.num_symbols}",
    )


@config_dataclass
class Induction(SourceConfig, kind="induction"):
  """Induction: a random sequence repeated until the row is full; the loss counts all but the first copy."""

  period: int = 16
  num_symbols: int = 32

  def __post_init__(self):
    check_at_least(self, 1, "period", "num_symbols")


@config_dataclass
class Needle(SourceConfig, kind="needle"):
  """Needle in a haystack: a marked key and value at a random place in noise; the key's value is asked at the end."""

  length: int = 64
  num_symbols: int = 32

  def __post_init__(self):
    check_at_least(self, 1, "length", "num_symbols")


@config_dataclass
class DataConfig:
  """The way from text to batches. A batch is a pure function of this config, the seed and the step."""

  source: SourceConfig = Stdlib()
  tokenizer: str = "bytes"  # "bytes", or a Hugging Face tokenizer.json (or the directory that holds one)
  document_end: str = ""  # token that ends each document, such as "<|endoftext|>"; "" leaves it to the tokenizer
  packing: Literal["chunks", "documents"] = "chunks"
  validation_fraction: float = 0.05  # share of the different documents, chosen by a hash of their content
  shuffle: bool = True
  cache_dir: str = ""  # folder for caches of tokens; "" means $LLMARCH_CACHE or ~/.cache/llmarch
  prefetch: int = 2  # number of batches made ahead

  def __post_init__(self):
    check_rate(self, "validation_fraction")
    check_at_least(self, 0, "prefetch")


# ------------------------------------------------------------------------------------------- optimizer


class AlgorithmConfig(Variant):
  """An optax optimizer; see train/optim.py."""


@config_dataclass
class AdamW(AlgorithmConfig, kind="adamw"):
  """AdamW: Adam with decoupled weight decay (1711.05101)."""

  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8

  def __post_init__(self):
    check_rate(self, "b1", "b2")
    check_above(self, 0, "eps")


@config_dataclass
class Lion(AlgorithmConfig, kind="lion"):
  """Lion, which steps by the sign of an interpolated momentum (2302.06675)."""

  b1: float = 0.9
  b2: float = 0.99

  def __post_init__(self):
    check_rate(self, "b1", "b2")


@config_dataclass
class Adafactor(AlgorithmConfig, kind="adafactor"):
  """Adafactor, whose second moments are factored into rows and columns (1804.04235)."""

  decay_rate: float = 0.8
  min_dim_size_to_factor: int = 128

  def __post_init__(self):
    check_rate(self, "decay_rate")
    check_at_least(self, 1, "min_dim_size_to_factor")


@config_dataclass
class Muon(AlgorithmConfig, kind="muon"):
  """Muon for the matrices inside the blocks, and Adam for embeddings, head, norms and biases."""

  beta: float = 0.95
  ns_steps: int = 5
  adam_b1: float = 0.9
  adam_b2: float = 0.95
  adam_learning_rate_ratio: float = 1.0  # Adam's learning rate divided by Muon's

  def __post_init__(self):
    check_rate(self, "beta", "adam_b1", "adam_b2")
    check_at_least(self, 1, "ns_steps")
    check_at_least(self, 0, "adam_learning_rate_ratio")


@config_dataclass
class SGD(AlgorithmConfig, kind="sgd"):
  """Stochastic gradient descent, with momentum if asked."""

  momentum: float = 0.0

  def __post_init__(self):
    check_rate(self, "momentum")


class ScheduleConfig(Variant):
  """The learning rate over steps, as a fraction of its peak; see train/optim.py."""


@config_dataclass
class Constant(ScheduleConfig, kind="constant"):
  """A constant rate after a linear warm-up."""

  warmup: int = 0

  def __post_init__(self):
    check_at_least(self, 0, "warmup")


@config_dataclass
class Linear(ScheduleConfig, kind="linear"):
  """Linear warm-up, then linear decay to `final`."""

  warmup: int = 0
  final: float = 0.0  # rate at the last step, as a fraction of the peak

  def __post_init__(self):
    check_at_least(self, 0, "warmup", "final")


@config_dataclass
class Cosine(ScheduleConfig, kind="cosine"):
  """Linear warm-up, then a half cosine down to `final`."""

  warmup: int = 0
  final: float = 0.1

  def __post_init__(self):
    check_at_least(self, 0, "warmup", "final")


@config_dataclass
class InverseSqrt(ScheduleConfig, kind="inverse_sqrt"):
  """Linear warm-up, then decay as sqrt(warmup / step) (1706.03762, section 5.3)."""

  warmup: int = 1000

  def __post_init__(self):
    check_at_least(self, 1, "warmup")


@config_dataclass
class WSD(ScheduleConfig, kind="wsd"):
  """Linear warm-up, a constant rate, then linear decay over the last `decay` steps (2404.06395)."""

  warmup: int = 0
  decay: int = 0
  final: float = 0.0

  def __post_init__(self):
    check_at_least(self, 0, "warmup", "decay", "final")


@config_dataclass
class OptimizerConfig:
  """The optimizer: its algorithm, its schedule, and what all algorithms share."""

  algorithm: AlgorithmConfig = AdamW()
  schedule: ScheduleConfig = Cosine()
  learning_rate: float = 1e-3  # rate at the peak of the schedule
  weight_decay: float = 0.1  # decoupled decay of matrices and embeddings; norms and biases do not decay
  clip_norm: float | None = 1.0

  def __post_init__(self):
    check_at_least(self, 0, "learning_rate", "weight_decay")
    check_above(self, 0, "clip_norm")


# ---------------------------------------------------------------------------------------------- the run


@config_dataclass
class SpikeConfig:
  """Rewinds the run when its loss spikes (PaLM, 2204.02311, section 5.1: 100 steps, 200 to 500 batches).

  A spike is a loss `sigma` deviations above the mean of the last `window` losses. The run returns to a checkpoint at
  least `back` steps before it, and leaves out the next `skip` batches, or more until the spike is passed.
  """

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
  alpha: float = 16.0  # the adapter's product is scaled by alpha / rank
  targets: tuple[str, ...] = ("mixer/*", "ffn/*")  # patterns for the ends of names, as "mixer/q", "blocks/0/ffn/*"
  # Format of the frozen matrices (QLoRA: nf4); None: they stay as they are.
  weights: Literal["int8", "fp8", "int4", "int4_32", "int4_128", "nf4"] | None = None

  def __post_init__(self):
    check_at_least(self, 1, "rank")
    check_above(self, 0, "alpha")
    check(bool(self.targets), "targets is empty; name at least one matrix, such as 'mixer/q'")


@config_dataclass
class TrainConfig:
  """The work of a training run: its steps, its batches, its loss, and its reaction to a step that goes wrong."""

  steps: int = 1000  # optimizer steps of the run
  batch_size: int = 16  # sequences per step, over all devices and micro-batches
  seq_len: int = 256  # tokens of a row
  log_every: int = 10  # steps between rows of metrics
  grad_accum: int = 1  # micro-batches per step; their gradients are summed in f32
  microbatches: int | None = None  # pipeline microbatches in each micro-batch; None: 4, 3 or 2 per stage, as divides
  circuits: int = 1  # times a microbatch passes through all stages; more: smaller bubble, more traffic
  remat: Literal["none", "full", "dots", "dots_no_batch", "offload"] = "none"  # what is recomputed (layers/stack.py)
  loss: Literal["causal", "prefix"] = "causal"  # prefix: each row has a prefix that is not counted
  loss_chunk: int = 128  # tokens of a row whose logits exist at the same time
  z_loss: float = 0.0  # coefficient of log Z^2 (PaLM: 1e-4)
  label_smoothing: float = 0.0  # probability that is spread over all tokens
  init_from: str = ""  # folder of a saved model, a run or a checkpoint of transformers; "" draws the parameters
  lora: LoRAConfig | None = None  # trains only adapters of init_from's weights
  ema: float | None = None  # decay of an exponential moving average of the parameters; None: no average
  telemetry_every: int = 0  # steps between rows of per-layer statistics; 0: never
  on_nonfinite: Literal["stop", "skip"] = "stop"  # reaction to a loss or gradient of inf or nan; 3 in a row always stop
  spike: SpikeConfig | None = None  # what to do about a spike of the loss; None: nothing
  replay_every: int = 0  # steps between checks that a repeated step gives the same bits; 0: never
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
  """Evaluation on the validation split, with a sample of text."""

  every: int = 100  # steps between evaluations; 0: never
  batches: int = 8  # batches of the validation split in an evaluation
  sample_tokens: int = 128  # length of the sample of text; 0: no sample
  sample_prompt: str = "def "  # text that the sample continues
  temperature: float = 0.8  # temperature of the sample; 0 takes the most likely token

  def __post_init__(self):
    check_at_least(self, 0, "every", "sample_tokens", "temperature")
    check_at_least(self, 1, "batches")


@config_dataclass
class CheckpointConfig:
  """The checkpoints that a run saves and keeps."""

  every: int = 500  # steps between checkpoints; 0: only the last step is saved
  max_to_keep: int = 2  # newest checkpoints that are kept
  keep_best: int = 0  # number of further checkpoints to keep, those with the lowest eval/loss

  def __post_init__(self):
    check_at_least(self, 0, "every", "keep_best")
    check_at_least(self, 1, "max_to_keep")


@config_dataclass
class LogConfig:
  """Says what is told of a run, and to whom, beside metrics.jsonl. None of it changes a number."""

  name: str = ""  # name of the run; "" means that of its workdir
  notes: str = ""
  tags: tuple[str, ...] = ()
  tensorboard: bool = True  # events of TensorBoard in the workdir
  wandb: str = ""  # project of Weights & Biases (pip install 'llmarch[wandb]'); "" means that nothing is sent there
  wandb_mode: Literal["online", "offline"] = "online"  # offline: files in WORKDIR/wandb, which `wandb sync` sends


@config_dataclass
class RunConfig:
  """Everything that determines a run; it is written to the run's workdir as config.json."""

  model: ModelConfig
  seed: int = 0  # decides the parameters drawn, the order of the data and dropout
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  train: TrainConfig = TrainConfig()
  eval: EvalConfig = EvalConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  log: LogConfig = LogConfig()
  mesh: str = ""  # sizes of the axes of sharding.TRAINING, such as "fsdp=2,tensor=4"; "" means one device

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
