"""The contract of a branch: what a new mixer must bring, and that all else then works with it.

tests/running_mean.py is a mixer from outside of the package. It is registered here, in a line each for the module, the
cost and the oracle, and nothing else of llmarch or of the tests knows it.
"""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import running_mean
import spaces
import test_invariants as invariants
import test_train_layouts as meshes
from tiers import three

import llmarch
from llmarch.__main__ import main
from llmarch.adapt.regroup import regroup_config
from llmarch.analysis import cost
from llmarch.branches import BranchConfig, FFNConfig, MixerConfig
from llmarch.build import build, config_dataclass, override, to_dict
from llmarch.commands.presets import row as presets_row
from llmarch.config import ModelConfig
from llmarch.errors import UserError
from llmarch.layers import registry
from llmarch.layers.ffn import MLPConfig
from llmarch.layers.linear import LinearConfig
from llmarch.layers.mask import Heads, MaskConfig, Prefix
from llmarch.layers.moe import ExpertChoice, MoEConfig
from llmarch.layers.position import ALiBi
from llmarch.mesh_checks import check_training
from llmarch.ops import attention, blockwise
from llmarch.ops.attention import Extent, Keys
from llmarch.presets import PRESETS, shrink
from llmarch.residual import Parallel, Post
from llmarch.run_config import RunConfig, TrainConfig
from llmarch.sharding import TRAINING

registry.MODULES[running_mean.RunningMeanConfig] = running_mean.RunningMean
cost.COMPONENTS[running_mean.RunningMeanConfig] = running_mean.cost
oracle.MIXERS["running_mean"] = running_mean.loop

TOY = running_mean.RunningMeanConfig(width=22)
MODELS = {
  "alone": spaces.model(spaces.block(TOY)),
  "beside attention": spaces.model(
    spaces.block(TOY, residual=Parallel()), spaces.block(spaces.attention(window=4), residual=Post()),
    spaces.block(TOY, ffn=None), stack="2*(a b) c",
  ),
}  # fmt: skip
ROOT = Path(llmarch.__file__).parent


def unrecorded(*_) -> None:
  """In place of the fixture `checked`: the page of pairs has no kinds from outside of the package."""


# ------------------------------------------------------------------------------------------------- every equation


@pytest.mark.parametrize("name", MODELS)
def test_a_mixer_from_outside_passes_every_equation(name, cases):
  """Oracle, causality, decoding, padding and packing; layers apart and together; parameters by formula; chunks."""
  toy = invariants.check_one_forward(MODELS[name], 2, 3, 1, cases, unrecorded)
  invariants.check_restack(toy, cases)
  invariants.check_count(toy.config, toy.params, cases)
  invariants.check_decoding(toy, toy.model, invariants.T, 1, 5, "stacked", cases)


def test_its_gradients_are_the_slope_of_its_loop(cases, monkeypatch):
  monkeypatch.setitem(spaces.HAND, "running_mean", MODELS["beside attention"])
  invariants.test_gradients_equal_the_slope_of_the_oracle("running_mean", cases, unrecorded)


def new_mixers() -> dict[str, ModelConfig]:
  block = lambda mixer: spaces.block(mixer, ffn=meshes.MLPConfig(d_ff=40))
  linear = LinearConfig(num_heads=8, head_dim=6, chunk=8)
  mean = dataclasses.replace(TOY, width=24)
  sizes = dict(d_model=24, vocab_size=meshes.V, max_seq_len=meshes.T)
  keeps, reads = meshes.block(4, keep_kv="kv", window=9), meshes.block(4, kv_from="kv", window=5, qk_norm=None)
  return {
    "running_mean": meshes.model(block(mean)),
    "linear": meshes.model(block(linear)),
    "shared keys and values": spaces.model(keeps, reads, stack="2*(a b)", **sizes),
  }


AXES = [axis for axis in TRAINING if axis != "expert"]


FIRST = [("context", "running_mean")]


@pytest.mark.parametrize(
  "axis, name",
  three(
    FIRST.count,
    lambda case: case[1] == "running_mean",
    itertools.product(AXES, new_mixers()),
  ),
)
def test_what_is_new_trains_alike_on_every_mesh_of_one_axis(axis, name, cases, monkeypatch):
  monkeypatch.setitem(meshes.MODELS, name, new_mixers()[name])
  meshes.test_a_train_step_equals_one_device(f"{axis}=2", name, "", cases, unrecorded)


SPLITS = ["stage=2,fsdp=2,context=2", "stage=2,sequence=2,tensor=2"]
CHOOSING = MoEConfig(num_experts=4, expert=MLPConfig(d_ff=16), router=ExpertChoice())
IN_ORDER = {  # branches that compare or sum the tokens of a row
  "linear attention": spaces.block(LinearConfig(num_heads=8, head_dim=6, chunk=8)),
  "experts that choose": meshes.block(4, ffn=CHOOSING),
}


@pytest.mark.full
@pytest.mark.parametrize("mesh, name", list(zip(SPLITS, IN_ORDER, strict=True)))
def test_a_pipeline_may_split_the_batch_and_the_length_of_what_reads_tokens_in_order(mesh, name, cases, monkeypatch):
  """XLA's partitioner aborts there on a gather or scatter along the length."""
  monkeypatch.setitem(meshes.MODELS, name, meshes.model(IN_ORDER[name]))
  meshes.test_a_train_step_equals_one_device(mesh, name, "", cases, unrecorded)


def test_a_mesh_without_experts_to_split_is_refused():
  with pytest.raises(UserError, match="mesh expert=2 has no experts to split"):
    check_training("expert=2", MODELS["alone"], TrainConfig())


# ---------------------------------------------------------------------------------------------------------- masks


@config_dataclass
class Striped(MaskConfig, kind="striped"):
  """Every `stride`-th token before, as a mask from outside of the package: its keys lie together once sorted."""

  stride: int

  def sees(self, q: Keys, k: Keys, which: Heads | None) -> jax.Array:
    return (k.positions <= q.positions) & ((q.positions - k.positions) % self.stride == 0)

  def may_see(self, q: Extent, k: Extent) -> jax.Array:
    return k.low <= q.high

  def mean_keys(self, length: int, window: int | None) -> float:
    far = length if window is None else min(window, length)
    return sum(sum(t - s < far and (t - s) % self.stride == 0 for s in range(t + 1)) for t in range(length)) / length

  def order(self, position: jax.Array) -> jax.Array:
    return position % self.stride * 2**16 + position


@config_dataclass
class ByHead(MaskConfig, kind="by_head"):
  """Head n of layer l sees n + l + 1 tokens."""

  reads = frozenset({"distance", "head", "layer"})

  def sees(self, q: Keys, k: Keys, which: Heads) -> jax.Array:
    far = (which.heads + which.layer + 1)[:, None, None]
    return (k.positions <= q.positions) & (q.positions - k.positions < far)

  def mean_keys(self, length: int, window: int | None) -> float:
    raise NotImplementedError  # nobody asks here


def test_a_mask_from_outside_is_its_predicate(cases, monkeypatch):
  monkeypatch.setitem(oracle.MASKS, "striped", lambda mask, m, n, marked: n <= m and (m - n) % mask.stride == 0)
  striped = spaces.block(spaces.attention(mask=Striped(stride=3)))
  both = spaces.block(spaces.attention(mask=Striped(stride=2), window=7, position=ALiBi()), residual=Post())
  invariants.check_one_forward(spaces.model(striped, both), 4, 3, 1, cases, unrecorded)
  length = 10
  assert Striped(stride=3).mean_keys(length, 7) * length == sum(
    oracle.sees(spaces.attention(mask=Striped(stride=3), window=7), m, n, True, False)
    for m in range(length) for n in range(length)
  )  # fmt: skip


def tokens_and_values(length: int, heads: int):
  draws = np.random.default_rng(3)
  normal = lambda *shape: jnp.asarray(draws.normal(size=shape), jnp.float32)
  positions = np.stack([np.arange(length), np.maximum(np.arange(length) - 9, -1)])
  keys = Keys(jnp.asarray(positions, jnp.int32), jnp.zeros((2, length), jnp.int32), None)
  return normal(2, length, heads, 6), normal(2, 2, length, 6), normal(2, 2, length, 5), keys


@pytest.mark.parametrize("mask", [Striped(stride=5), ByHead()], ids=lambda mask: mask.kind)
def test_blocks_of_a_mask_from_outside_are_dense_attention(mask, cases):
  """Sorted by the mask's own order, and with heads and layer handed on; values and gradients."""
  q, k, v, keys = tokens_and_values(70, 4)
  which = Heads(jnp.arange(4), jnp.int32(2)) if mask.reads & {"head"} else None
  options = dict(scale=0.4, softcap=None)

  def dense(q, k, v):
    seen = attention.visible(keys, keys, mask=mask, window=None, which=which)
    return attention.attend(q, k, v, seen, None, None, dropout=0.0, key=None, **options)[0]

  def blocks(q, k, v):
    how = dict(mask=mask, window=None, block=16, which=which)
    return blockwise.attend(q, k, v, keys, keys, None, **how, **options)[0]

  slopes = lambda f: jax.grad(lambda *arrays: jnp.sum(jnp.sin(f(*arrays))), argnums=(0, 1, 2))(q, k, v)
  np.testing.assert_allclose(blocks(q, k, v), dense(q, k, v), atol=2e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), slopes(blocks), slopes(dense))
  cases("blockwise attention under masks from outside == dense")


def test_head_and_layer_reach_a_mask(cases):
  """In layer l, head n of a model sees n + l + 1 tokens: what a change of the first token reaches says so."""
  config = spaces.model(spaces.block(spaces.attention(num_heads=2, num_kv_heads=1, mask=ByHead())), stack="3*a")
  toy = invariants.Toy(config, 3, 3)
  tokens = np.tile(toy.batch.tokens[:1], (2, 1))
  tokens[1, 0] = (tokens[1, 0] + 1) % config.vocab_size
  rest = np.tile(np.arange(invariants.T, dtype=np.int32), (2, 1)), np.zeros_like(tokens), np.zeros_like(tokens, bool)
  for model in (toy.model, toy.unstacked):
    logits = invariants.forward(model)(tokens, *rest)
    moved = np.flatnonzero(np.any(logits[0] != logits[1], axis=-1))
    assert moved.max() == sum(layer + 1 for layer in range(3)), moved  # the last head reaches layer + 1 tokens back
  cases("layers and heads reach a mask, scanned and apart")


# ------------------------------------------------------------------------------------------------------- commands


def test_it_is_described_listed_shrunk_trained_and_sampled_by_the_commands(tmp_path, capsys):
  assert "running_mean" in str(to_dict(shrink(MODELS["alone"])))
  row = presets_row("toy", MODELS["alone"])
  assert row["heads"] is None and row["window"] is None and row["params"] == cost.params(MODELS["alone"])["total"]
  config = tmp_path / "config.py"
  config.write_text(
    "import runpy\n"
    f"base = runpy.run_path({str(ROOT.parent / 'configs' / 'tiny.py')!r})\n"
    "def get_config():\n"
    "  c = base['get_config']()\n"
    "  c.model.blocks.layer.mixer = {'kind': 'running_mean', 'width': 32}\n"
    "  return c\n"
  )
  keys = ("train.steps=2", "train.batch_size=2", "train.seq_len=32", "eval.every=0", "optimizer.schedule.warmup=1")
  small = [f"--config.{key}" for key in keys]
  assert main(["describe", f"--config={config}"]) == 0
  said = capsys.readouterr().out
  assert "mixer: running_mean(width=32)" in said and re.search(r"running_mean +\d", said)
  run = str(tmp_path / "run")
  assert main(["train", f"--config={config}", f"--workdir={run}", *small]) == 0
  assert main(["generate", f"--from={run}", "--prompt=def ", "--max_new_tokens=5"]) == 0


def test_a_switch_of_the_mixer_is_one_flag():
  plain = to_dict(PRESETS["llama_3_2_1b"]())
  changed = override(plain, [("blocks.layer.mixer", '{"kind": "running_mean", "width": 64}')])
  assert build(ModelConfig, changed, "model").blocks["layer"].mixer == running_mean.RunningMeanConfig(width=64)


# ------------------------------------------------------------------------------------------------- refused, by name


@config_dataclass
class Bare(MixerConfig, kind="bare"):
  """A mixer that answers nothing."""


@config_dataclass
class Reader(FFNConfig, kind="reader"):
  """Reads, and perhaps keeps, a value."""

  reads_kept: tuple[str, ...] = ()
  keeps: tuple[str, ...] = ()


def test_a_missing_row_is_a_sentence_that_names_it():
  config = spaces.model(spaces.block(Bare()))
  with pytest.raises(UserError, match=r"bare: the cost of Bare is not known; add a row to cost\.COMPONENTS"):
    cost.params(config)
  with pytest.raises(UserError, match=r"bare: no module is registered for Bare; add it to registry\.MODULES"):
    registry.module_of(Bare())


def test_what_has_no_heads_is_not_regrouped():
  for mixer in (TOY, spaces.mla(), LinearConfig(num_heads=3, head_dim=4)):
    with pytest.raises(UserError, match="no block has key-value heads"):
      regroup_config(spaces.model(spaces.block(mixer)), 1)


KEPT = {
  "nobody keeps it": (
    lambda: spaces.model(spaces.block(ffn=Reader(reads_kept=("x",)))),
    "blocks.a.ffn reads 'x', which no block keeps; let one keep it",
  ),
  "kept later": (
    lambda: spaces.model(spaces.block(ffn=Reader(reads_kept=("x",))), spaces.block(ffn=Reader(keeps=("x",)))),
    "blocks.a.ffn reads 'x' before blocks.b.ffn keeps it; put that block before this one",
  ),
  "nearer in the second turn": (
    lambda: spaces.model(
      spaces.block(ffn=Reader(reads_kept=("x",))), spaces.block(ffn=Reader(keeps=("x",))), stack="b 2*(a b)"
    ),
    "blocks.a.ffn reads 'x' before blocks.b.ffn keeps it",
  ),
  "two of one name": (
    lambda: spaces.model(spaces.block(ffn=Reader(keeps=("x",))), spaces.block(ffn=Reader(keeps=("x",)))),
    "blocks.b.ffn keeps 'x', and so does blocks.a.ffn; give one another name",
  ),
  "other positions": (
    lambda: spaces.model(
      spaces.block(spaces.attention(keep_kv="low")), spaces.block(spaces.attention(kv_from="low", position=None))
    ),
    "kv_from='low': position is None here and RoPE",
  ),
  "a narrower window there": (
    lambda: spaces.model(
      spaces.block(spaces.attention(keep_kv="low", window=3)), spaces.block(spaces.attention(kv_from="low", window=5))
    ),
    "kv_from='low': the window there, 3, must not be below the one here, 5",
  ),
  "a cross-attention without an encoder": (
    lambda: dataclasses.replace(spaces.HAND["encoder_decoder"], encoder=None),
    "blocks.a.cross reads the output of an encoder, and there is none; give model.encoder, or leave cross out",
  ),
  "an encoder of another width": (
    lambda: dataclasses.replace(
      spaces.HAND["encoder_decoder"], encoder=dataclasses.replace(spaces.encoder(), d_model=16)
    ),
    "blocks.a.cross.memory_dim=14 is not the encoder's d_model=16; set it to that",
  ),
}


@pytest.mark.parametrize("case", KEPT)
def test_values_that_cannot_be_kept_or_read_are_refused_when_the_config_is_built(case):
  make, sentence = KEPT[case]
  with pytest.raises(UserError, match=re.escape(sentence)):
    make()


def test_a_pipeline_refuses_what_it_cannot_carry():
  shared = spaces.HAND["shared_kv"]
  train = TrainConfig(batch_size=8, seq_len=8)
  with pytest.raises(UserError, match="mesh stage=2: high, low is kept in one term of model.stack and read in another"):
    check_training("stage=2", dataclasses.replace(shared, stack="2*(a b) 2*c 2*(d b)"), train)
  with pytest.raises(UserError, match=r"a pipeline has no place for model\.encoder"):
    check_training("stage=2", dataclasses.replace(spaces.HAND["encoder_decoder"], stack="2*(a b) 2*c"), train)


def test_training_says_that_it_has_no_sources_for_an_encoder():
  with pytest.raises(UserError, match=r"model\.encoder: training has no sources"):
    RunConfig(model=spaces.HAND["encoder_decoder"], train=TrainConfig(seq_len=8))


# --------------------------------------------------------------------------------------- nobody guesses what it is


def test_nothing_outside_of_layers_asks_what_a_branch_is():
  """By hasattr, getattr, isinstance, type() or .kind; the answers are facts of branches.py. Words for a person (a kind
  in a message or a table) are no questions, and a table of formulas is looked up by type in one place each."""
  branch = r"[\w.\[\]\"']*\b(mixer|ffn|cross|branch)"
  compared = rf"{branch}\.kind (==|!=|in|not in) "
  asks = re.compile(rf"\b(hasattr|getattr|isinstance)\({branch}[,)]|[^{{]type\({branch}\)|{compared}")
  rows = {"analysis/cost.py": "COMPONENTS.get(type(branch))", "analysis/comm.py": "type(branch) in KNOWN"}
  found = []
  for path in sorted(ROOT.rglob("*.py")):
    name = str(path.relative_to(ROOT))
    if name.startswith(("layers/", "convert/")) or name == "presets.py":
      continue
    for number, line in enumerate(path.read_text().splitlines(), 1):
      if asks.search(line) and rows.get(name, "no such line") not in line:
        found.append(f"{name}:{number}: {line.strip()}")
  assert not found, "\n".join(found)


def test_the_facts_of_a_branch_are_documented():
  """docs/add_a_mixer.md names every fact and method of a mixer's config."""
  text = (ROOT.parent / "docs" / "add_a_mixer.md").read_text()
  public = {n for c in (BranchConfig, MixerConfig) for n in vars(c) if not n.startswith("_")} - {"kind", "variants"}
  assert {n for n in public if f"`{n}" not in text} == set()


def test_records_of_old_spellings_are_those_of_the_new():
  """Masks and residual schemes were words, and are read and written as words still."""
  assert spaces.block(spaces.attention(mask="prefix"), residual="post") == spaces.block(
    spaces.attention(mask=Prefix()), residual=Post()
  )
  with pytest.raises(UserError, match=r"residual\.kind: unknown kind 'paralell'; did you mean 'parallel'"):
    spaces.block(residual="paralell")
  data = to_dict(MODELS["beside attention"])
  assert data["blocks"]["b"]["mixer"]["mask"] == "causal" and data["blocks"]["b"]["residual"] == "post"
  assert build(ModelConfig, json.loads(json.dumps(data)), "model") == MODELS["beside attention"]
