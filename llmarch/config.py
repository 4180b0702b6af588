"""The space of architectures: small frozen dataclasses that form the tree of a model's config.

A component's config holds only what that component reads. Norms and position schemes are families (see
`build.Variant`) whose roots are here; those of mixers and feed-forwards are in branches.py. Each member is defined
beside its layer, and joins its family when that layer is imported. build.py turns plain dicts into these dataclasses.
"""

import functools
import math
import re
from typing import Literal

from llmarch.branches import BranchConfig, CrossConfig, FFNConfig, MixerConfig, check_kept
from llmarch.build import FrozenDict, Variant, accept_name, config_dataclass
from llmarch.errors import UserError, check, check_above, check_at_least, check_rate, nearest
from llmarch.residual import Pre, ResidualConfig

# --------------------------------------------------------------------------------------- the families


class NormConfig(Variant):
  """A normalisation; see layers/norm.py."""


class PositionConfig(Variant):
  """A position scheme, inside attention or at the embedding; see layers/position.py."""

  at_embedding = False  # the scheme adds vectors once, at the embedding

  def check_against(self, width: int, max_seq_len: int) -> None:
    """Raises UserError if the scheme does not fit this width (a head's; the model's if at_embedding) or context."""

  def make_shared(self, num_heads: int, make):
    """Makes the parameter that all layers of a block's name share; None if there is none."""
    return None

  def shared_size(self, num_heads: int) -> int:
    """Number of elements of the parameter that `make_shared` makes."""
    return 0


class ScalingConfig(Variant):
  """A context extension of RoPE; see layers/position.py."""


class InitConfig(Variant):
  """A distribution from which weight matrices are drawn. `std(fan_in, fan_out)` is its standard deviation."""


@config_dataclass
class FanIn(InitConfig, kind="fan_in"):
  """A truncated normal of standard deviation gain / sqrt(fan_in)."""

  gain: float = 1.0

  def __post_init__(self):
    check_at_least(self, 0, "gain")

  def std(self, fan_in: int, fan_out: int) -> float:
    return self.gain / math.sqrt(fan_in)


@config_dataclass
class Normal(InitConfig, kind="normal"):
  """A truncated normal with the same standard deviation for every matrix (GPT-2: 0.02)."""

  stddev: float = 0.02

  def __post_init__(self):
    check_at_least(self, 0, "stddev")

  def std(self, fan_in: int, fan_out: int) -> float:
    return self.stddev


@config_dataclass
class Xavier(InitConfig, kind="xavier"):
  """A truncated normal of standard deviation gain * sqrt(2 / (fan_in + fan_out)) (Glorot and Bengio 2010)."""

  gain: float = 1.0

  def __post_init__(self):
    check_at_least(self, 0, "gain")

  def std(self, fan_in: int, fan_out: int) -> float:
    return self.gain * math.sqrt(2 / (fan_in + fan_out))


# ----------------------------------------------------------------------------------- the architecture


@config_dataclass
class BlockConfig:
  """A block of branches on a residual stream: a token mixer, then cross-attention and a feed-forward if given.

  The residual scheme says how branches read the stream and write to it; residual.py has the formulas.
  """

  mixer: MixerConfig
  ffn: FFNConfig | None
  norm: NormConfig
  cross: CrossConfig | None = None  # a branch that reads the output of the model's encoder
  residual: ResidualConfig = Pre()
  skip_scale: float = 1.0  # a in the formulas of residual.py
  branch_scale: float = 1.0  # m in the formulas of residual.py (Granite's residual multiplier)
  dropout: float = 0.0  # dropout rate of each branch's output, before it joins the stream
  init_scale: float = 1.0  # factor on the initial value, output and feed-forward matrices (DeepNorm's beta)
  output_init_scale: float = 1.0  # factor on the initial matrices that write to the stream (GPT-2: 1/sqrt(2L))

  def __post_init__(self):
    check_rate(self, "dropout")
    check_above(self, 0, "init_scale", "output_init_scale")
    accept_name(self, "residual", ResidualConfig)
    self.residual.groups(tuple(self.branches))  # raises UserError for branches that the scheme cannot run

  @functools.cached_property
  def branches(self) -> dict[str, BranchConfig]:
    """The branches that this block has, in the order in which they run."""
    named = {"mixer": self.mixer, "cross": self.cross, "ffn": self.ffn}
    return {name: branch for name, branch in named.items() if branch is not None}

  @property
  def norms(self) -> tuple[str, ...]:
    """Names of the block's norms."""
    return self.residual.norms(tuple(self.branches))


@config_dataclass
class EmbedConfig:
  """The embedding of tokens: dropout(norm(scale * table[tokens] + position)).

  With `dim`, the table has that width; one matrix maps it to d_model, and another maps back before the head (OPT-350M).
  """

  scale: float = 1.0  # factor on the table's rows (Gemma and the original Transformer: sqrt(d_model))
  norm: NormConfig | None = None  # norm of the embedding (BLOOM); None: no norm
  position: PositionConfig | None = None  # Sinusoidal or Learned positions, which are added here once
  dropout: float = 0.0
  dim: int | None = None  # width of the table; None: d_model

  def __post_init__(self):
    check_rate(self, "dropout")
    check_at_least(self, 1, "dim")


@config_dataclass
class HeadConfig:
  """The head, which maps the residual stream to logits: softcap(scale * (x @ table + bias))."""

  tied: bool = True  # the head uses the embedding table, transposed
  bias: bool = False  # the logits have a bias (GPT-J)
  scale: float = 1.0  # factor on the logits (Granite: 1 / logits_scaling)
  softcap: float | None = None  # c in the cap c tanh(logits / c) (Gemma 2: 30); None: no cap

  def __post_init__(self):
    check_above(self, 0, "softcap")


DType = Literal["float32", "bfloat16", "float16"]
StateDType = Literal["float32", "bfloat16", "float16", "int8", "fp8", "int8_channel", "fp8_channel"]


@config_dataclass
class Precision:
  """dtypes: `param` of parameters at rest, `compute` of residual stream and matmuls, `state` of the decoding state.

  With state "int8" or "fp8" (e4m3), keys and values are codes with one scale for each token and head. With the suffix
  "_channel", keys have one scale for each channel, and the newest 32 tokens stay in bfloat16 (ops/kivi.py).
  """

  param: DType = "float32"
  compute: DType = "float32"
  state: StateDType = "float32"


@config_dataclass
class ModelConfig:
  """A decoder. `stack` gives the order of its named blocks, as in "3*dense 2*(5*local global)" (see parse_stack)."""

  d_model: int  # width of the residual stream
  vocab_size: int  # number of token ids
  max_seq_len: int  # most tokens of a text, prompt included
  stack: str  # order of the blocks, such as "32*layer"
  blocks: dict[str, BlockConfig]
  embed: EmbedConfig = EmbedConfig()
  head: HeadConfig = HeadConfig()
  final_norm: NormConfig | None = None  # norm before the head; None: none
  init: InitConfig = FanIn()
  embed_init: InitConfig = Normal(stddev=0.02)  # its fan_in is d_model, so FanIn gives the deviation 1/sqrt(d_model)
  precision: Precision = Precision()
  encoder: "ModelConfig | None" = None  # a model whose output the `cross` branches read; its head is not used

  def __post_init__(self):
    object.__setattr__(self, "blocks", FrozenDict(self.blocks))
    check_at_least(self, 1, "d_model", "vocab_size", "max_seq_len")
    used = set(self.layers)
    for name in used - set(self.blocks):
      raise UserError(f"stack names the block {name!r}, which is not in blocks{nearest(name, self.blocks)}")
    for name in set(self.blocks) - used:
      raise UserError(f"blocks.{name} is not used by stack={self.stack!r}; add it there or drop it")
    at_embedding = self.embed.position
    check(
      at_embedding is None or at_embedding.at_embedding,
      f"embed.position must be sinusoidal or learned, got {at_embedding and at_embedding.kind!r}; give the"
      " others to a block's mixer",
    )
    if at_embedding is not None:
      at_embedding.check_against(self.d_model, self.max_seq_len)
    for name, block in self.blocks.items():
      for part, branch in block.branches.items():
        check(
          self.encoder is not None or not branch.reads_memory,
          f"blocks.{name}.{part} reads the output of an encoder, and there is none; give model.encoder, or leave"
          f" {part} out",
        )
        try:
          if branch.reads_memory:
            branch.check_memory(self.encoder.d_model)
          branch.check_against(self.d_model, self.max_seq_len)
          branch.check_state(self.precision.state)
        except UserError as e:
          raise UserError(f"blocks.{name}.{part}.{e}") from None
    check_kept({name: block.branches for name, block in self.blocks.items()}, self.segments)

  @functools.cached_property
  def segments(self) -> tuple[tuple[tuple[str, ...], int], ...]:
    """The stack as ((pattern of block names, repeats), ...)."""
    return parse_stack(self.stack)

  @functools.cached_property
  def handed_on(self) -> tuple[frozenset[str], ...]:
    """For each segment, the names of the kept values that a later segment reads from it."""
    branches = lambda pattern: [branch for name in pattern for branch in self.blocks[name].branches.values()]
    kept = [{value for branch in branches(pattern) for value in branch.keeps} for pattern, _ in self.segments]
    read = [{value for branch in branches(pattern) for value in branch.reads_kept} for pattern, _ in self.segments]
    return tuple(frozenset(values & set().union(*read[i + 1 :])) for i, values in enumerate(kept))

  @functools.cached_property
  def layers(self) -> tuple[str, ...]:
    """Block names from the bottom to the top."""
    return tuple(name for pattern, repeat in self.segments for name in pattern * repeat)


MAX_LAYERS = 100_000  # limit on the length of a stack, so that a mistyped count cannot fill the memory


def parse_stack(text: str) -> tuple[tuple[tuple[str, ...], int], ...]:
  """Parses the order of layers to ((pattern of block names, repeats), ...); each term becomes one scan.

  >>> parse_stack("3*dense 2*(2*local global)")
  ((('dense',), 3), (('local', 'local', 'global'), 2))

  Raises UserError for text that is not `term term ...` with term = [count*](name | "(" stack ")").
  """
  tokens = re.findall(r"\d{1,9}\s*\*|[()]|[A-Za-z_]\w*|\S", text, re.ASCII)
  position = 0

  def fail(problem):
    raise UserError(f"stack={text!r}: {problem}; write it as '13*(local global)' or '3*dense 58*moe'")

  def terms(depth):
    nonlocal position
    if depth > 50:
      fail("its parentheses go more than 50 deep")
    found = []
    while position < len(tokens) and tokens[position] != ")":
      count = 1
      if re.fullmatch(r"\d+\s*\*", tokens[position]):
        count = int(tokens[position][:-1])
        position += 1
      if position == len(tokens):
        fail("it ends after a count")
      if count < 1:
        fail("a count must be at least 1")
      token = tokens[position]
      position += 1
      if token == "(":
        inner = terms(depth + 1)
        if position == len(tokens):
          fail("a '(' is never closed")
        position += 1
        pattern = tuple(name for names, n in inner for name in names * n)
      elif re.fullmatch(r"[A-Za-z_]\w*", token):
        pattern = (token,)
      else:
        fail(f"{token!r} is out of place")
      if len(pattern) * count > MAX_LAYERS:
        fail(f"it has more than {MAX_LAYERS} layers")
      found.append((pattern, count))
    if depth == 0 and position < len(tokens):
      fail("a ')' has no '('")
    if not found:
      fail("it names no block")
    return found

  return tuple(terms(0))
