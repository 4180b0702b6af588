"""What JAX, flax, optax and orbax do in silence, and what is done here instead: a row for each (R14).

A row fails when its guard is taken out: what it expects is a sentence that only the guard writes, or the right value
where the silent behaviour gives another.
"""

import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from trainee import MODEL, B, Data, T, block, experiment, run

from llmarch.build import build, override, to_dict
from llmarch.config import ModelConfig, Precision, parse_stack
from llmarch.data import pipeline, tokenfile, tokenizers
from llmarch.errors import UserError
from llmarch.infer.decoder import make_decoder
from llmarch.infer.lm import LM
from llmarch.layers.param import flatten, unflatten
from llmarch.models.decoder import Decoder
from llmarch.ops import cache, rope
from llmarch.ops.attention import attend
from llmarch.ops.loss import chunked_loss
from llmarch.ops.sampling import Sampling
from llmarch.run_config import DataConfig, RunConfig, TextFiles, TrainConfig
from llmarch.sharding import make_mesh, parse_mesh, spec
from llmarch.train.checkpoint import Checkpoints, flatten_state, load_step
from llmarch.train.faults import Fault, StorageFault
from llmarch.train.step import LAYOUT, make_train_step

ROWS = {}


def row(name):
  def register(f):
    assert name not in ROWS
    ROWS[name] = f
    return f

  return register


def refuses(name, sentence, call, kind=UserError):
  """A row: `call(tmp_path)` is refused with this sentence."""

  @row(name)
  def check(tmp_path):
    with pytest.raises(kind, match=sentence):
      call(tmp_path)


# ------------------------------------------------------------------------------------ ids, labels, counters


def batch_with(tokens=1, targets=1):
  fill = lambda row, index: (row["tokens"].fill(tokens), row["targets"].fill(targets))
  rows = types.SimpleNamespace(fill=fill)
  made = pipeline.Pipeline(rows, "", batch_size=2, seq_len=3, vocab_size=9, prefix=False, prefetch=0)
  return lambda tmp_path: made.batch(0)


OUTSIDE = r"holds the id {}, outside model\.vocab_size=9"
refuses("a token past the vocabulary (E[i] takes the last row, jnp.take NaN)", OUTSIDE.format(9), batch_with(tokens=9))
refuses("a token below 0 (wraps to the end of the table)", OUTSIDE.format(-1), batch_with(tokens=-1))
refuses("a target past the vocabulary (a loss of log Z)", OUTSIDE.format(9), batch_with(targets=9))
refuses("a target of -1 or -100 (the last class, or NaN)", OUTSIDE.format(-100), batch_with(targets=-100))


@row("a target that does not count, whatever it is (NaN under a mask)")
def _(tmp_path):
  hidden = jax.random.normal(jax.random.key(0), (2, 5, 3))
  weights = jnp.ones((2, 5)).at[:, 3:].set(0)
  loss = lambda h, t: chunked_loss(lambda x: x * 2, h, t, weights, chunk=2, label_smoothing=0.1, z_loss=1e-3)[0]
  good = jnp.ones((2, 5), jnp.int32)
  for bad in (-100, -1, 3, 99):
    got, want = (jax.value_and_grad(loss)(hidden, t) for t in (good.at[:, 3:].set(bad), good))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@row("a batch in which nothing counts (0 / 0)")
def _(tmp_path):
  functions = make_train_step(experiment())
  batch = Data().batch(0) | {"loss_weights": np.zeros((B, T), np.float32)}
  _, metrics = functions.step(functions.init(), batch)
  assert metrics["loss"] == 0 and metrics["finite"]["update"] and metrics["finite"]["state"]


@row("weights of another shape than the targets ([B] * [B, T] broadcasts where B == T)")
def _(tmp_path):
  args = jnp.ones((3, 3, 4)), jnp.ones((3, 3), jnp.int32)
  for weights in (jnp.ones(3), jnp.ones((3, 1)), jnp.ones((1, 3))):
    with pytest.raises((ValueError, TypeError)):
      chunked_loss(lambda x: x, *args, weights, chunk=3, label_smoothing=0.0, z_loss=0.0)


def _text(tmp_path):
  (tmp_path / "a.txt").write_text("\n\n".join(f"text {i} and more of it" for i in range(60)))
  return DataConfig(source=TextFiles(paths=(str(tmp_path / "a.txt"),), separator="\n\n"), cache_dir=str(tmp_path))


def _pipeline(tmp_path, **changes):
  settings = dict(batch_size=2, seq_len=6, seed=0, vocab_size=264, split="train") | changes
  return pipeline.make_pipeline(_text(tmp_path), **settings)


refuses(
  "a tokenizer with more ids than the model", "vocab_size=200 is smaller than the 257 ids",
  lambda tmp_path: _pipeline(tmp_path, vocab_size=200),
)  # fmt: skip


@row("ids that 16 bits do not hold (70000 becomes 4464)")
def _(tmp_path):
  class Wide(tokenizers.ByteTokenizer):
    vocab_size, end_id, definition = 70300, 70299, '{"kind": "wide"}'

    def encode_batch(self, texts):
      return [ids.astype(np.int64) + 70000 for ids in super().encode_batch(texts)]

  tokenfile.write_tokens(tmp_path / "a", ["ab"], Wide())
  assert tokenfile.open_tokens(tmp_path / "a").tokens.tolist() == [70097, 70098, 70299]


class _Spells(tokenizers.ByteTokenizer):
  def encode_batch(self, texts):
    return [np.array([int(text)]) for text in texts]


refuses(
  "ids outside the tokenizer's own vocabulary, on their way into a file", "gave an id outside its 257",
  lambda tmp_path: tokenfile.write_tokens(tmp_path / "a", [str(65536 + 7)], _Spells()),
)  # fmt: skip


@row("other data than a checkpoint's (an iterator's state fits any)")
def _(tmp_path):
  hashes = {_pipeline(tmp_path, **change).hash for change in ({}, {"seed": 1}, {"batch_size": 3}, {"seq_len": 5})}
  assert len(hashes) == 4
  run(experiment(steps=3), tmp_path / "run")
  with pytest.raises(UserError, match="trained on other data"):
    run(experiment(steps=3), tmp_path / "run", Data(name="other"))


@row("counters in floats (2^24 + 1 is 2^24), or wrapping")
def _(tmp_path):
  state = make_train_step(experiment()).abstract_state
  counters = [x.dtype for name, x in flatten_state(state).items() if not x.shape]
  assert len(counters) >= 2 and set(counters) == {jnp.dtype("int32")}
  for wrong, sentence in (
    ({"steps": 2**31}, "steps must be below"),
    ({"batch_size": 2**20, "seq_len": 2**11}, "tokens a step"),
  ):
    with pytest.raises(UserError, match=sentence):
      TrainConfig(**wrong)


# -------------------------------------------------------------------------------------- prompts and decoding


def lm(**changes):
  model = dataclasses.replace(MODEL, vocab_size=40, **changes)
  return LM(model, nnx.state(Decoder(model, jax.random.key(0))))


def generates(prompt, **options):
  return lambda tmp_path: lm().generate(prompt, **({"max_new_tokens": 2} | options))


refuses("an empty prompt (index -1 is its last token)", "is empty", generates([]))
refuses("a prompt's id past the vocabulary", "holds the token 40", generates([1, 40]))
refuses("a prompt's id below 0", "holds the token -1", generates([-1]))
refuses(
  "an id past int32 (3e9 becomes -1294967296)", "holds the token 3000000000", generates(np.array([3_000_000_000]))
)
refuses("ids as floats (they are cut off)", "float", generates([1.5]))
refuses(
  "text past the end of the cache (the last slot is written again)",
  "max_seq_len=7",
  generates([1, 2, 3], max_new_tokens=5),
)
refuses("a stop token outside the vocabulary", "stop", generates([1], stop=[40]))
refuses("top_k past the vocabulary", "top_k", generates([1], top_k=41))
refuses("a temperature that is no number", "temperature", generates([1], temperature=math.nan))
refuses("a seed past 32 bits (it is cut off)", "seed", generates([1], seed=2**32))
refuses(
  "a chunk larger than the cache", "chunk=9 must lie between",
  lambda _: make_decoder(MODEL, batch=1, max_len=8, chunk=9, sampling=Sampling()),
)  # fmt: skip


@row("a write past the end of a buffer (it lands on the last slots)")
def _(tmp_path):
  for buffer, values in ((jnp.zeros((1, 4)), jnp.ones((1, 2))), (jnp.zeros((1, 2, 4, 3)), jnp.ones((1, 2, 2, 3)))):
    got = np.asarray(cache.write(buffer, jnp.array([[3, 4]]), values))
    inside = got[:, 3] if got.ndim == 2 else got[:, :, 3]
    assert (inside == 1).all() and got.sum() == inside.size
    assert not np.asarray(cache.write(buffer, jnp.array([[4, 900]]), values)).any()


@row("a position past any table (its last row is used again)")
def _(tmp_path):
  freqs = np.array([1.0, 0.01])
  for position in (7, 10**6, 2**30):
    angle = np.asarray(rope.phases(jnp.array([[position]], jnp.int32), freqs))[0, 0].astype(float)
    np.testing.assert_allclose(np.cos(angle), np.cos(np.longdouble(position) * freqs), atol=1e-5)


@row("a query that sees nothing (NaN, or the mean of all values)")
def _(tmp_path):
  q, kv = jnp.ones((1, 2, 2, 3)), jax.random.normal(jax.random.key(0), (1, 2, 4, 3))
  seen = jnp.zeros((1, 2, 4), bool).at[0, 1, 2].set(True)
  out, _ = attend(q, kv, kv, seen, None, None, scale=1.0, softcap=None, dropout=0.0, key=None)
  assert not np.asarray(out[:, 0]).any()
  np.testing.assert_allclose(out[0, 1], kv[0, :, 2], rtol=1e-6)


@row("logits that are NaN (argmax and a draw give token 0)")
def _(tmp_path):
  one = lm()
  params = jax.tree.map(lambda p: p * jnp.nan, one.params)
  for temperature in (0.0, 1.0):
    with pytest.raises(UserError, match=r"prompts\[0\] are not finite"):
      LM(one.config, params).generate([1], max_new_tokens=2, temperature=temperature)


@row("a temperature of 0 (division gives NaN, and token 0)")
def _(tmp_path):
  one = lm()
  (token,) = one.generate([3, 7], max_new_tokens=1, temperature=0.0)
  assert token == int(np.argmax(one.logits([[3, 7]])[0, -1])) != 0


# --------------------------------------------------------------------------------------- devices and layouts


refuses("a mesh that leaves devices idle", "covers 6 devices of 8", lambda _: make_mesh({"data": 3, "tensor": 2}))
refuses("an axis that no mesh has", "names the axis 'tenser'", lambda _: parse_mesh("tenser=2"))


def spec_of(axes, shape, **mesh):
  mesh = parse_mesh(",".join(f"{name}={size}" for name, size in mesh.items()))
  return lambda _: spec(axes, shape, LAYOUT, make_mesh(mesh, jax.devices()[: math.prod(mesh.values())]))


refuses(
  "a dimension that a mesh axis does not divide (a constraint is dropped)", "heads", spec_of(("heads",), (3,), tensor=2)
)
refuses("a batch that the data axis does not divide", "batch", spec_of(("batch", "length"), (3, 4), data=2))


@row("one mesh axis for two dimensions")
def _(tmp_path):
  with pytest.raises(UserError, match="would shard both"):
    spec(("heads", "heads"), (4, 4), LAYOUT, make_mesh(parse_mesh("tensor=2"), jax.devices()[:2]))


@row("a parameter that was forgotten and lies whole on every device")
def _(tmp_path):
  mesh = make_mesh(parse_mesh("fsdp=2"), jax.devices()[:2])
  functions = make_train_step(experiment(), mesh)
  state = functions.init()
  for name, x in flatten_state(state).items():
    want = flatten_state(functions.abstract_state)[name].sharding
    assert x.sharding.is_equivalent_to(want, x.ndim), name
    assert x.ndim < 2 or name.endswith("scale") or 2 * x.addressable_shards[0].data.size == x.size, name


# -------------------------------------------------------------------------------- parameters and checkpoints


def _params():
  state = nnx.state(Decoder(MODEL, jax.random.key(0)))
  return state, flatten(state)


def loads(change):
  def call(tmp_path):
    state, flat = _params()
    name = next(iter(flat))
    return unflatten(state, change(flat, name))

  return call


refuses(
  "a parameter that is missing (the initial weights stay)",
  "is missing",
  loads(lambda f, n: {k: v for k, v in f.items() if k != n}),
)
refuses("a parameter of another shape", r"is .*, not", loads(lambda f, n: f | {n: f[n][:1]}))
refuses("a parameter that the model has not", "is unknown", loads(lambda f, n: f | {"more": f[n]}))


def _saved(tmp_path, state=None):
  functions = make_train_step(experiment())
  with Checkpoints(str(tmp_path / "run"), experiment().checkpoint) as saved:
    saved.save(1, state or functions.init(), {}, None)
    saved.wait()
    return functions, saved


@row("another dtype than a checkpoint's (orbax casts, even to int)")
def _(tmp_path):
  functions, saved = _saved(tmp_path)
  want = {
    name: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for name, x in flatten_state(functions.abstract_state).items()
  }
  with pytest.raises(UserError, match="holds other arrays"):
    load_step(saved.folder, 1, want)


@row("a save of a step that is there (orbax returns False)")
def _(tmp_path):
  functions, saved = _saved(tmp_path)
  with pytest.raises(StorageFault, match="cannot save step 1"):
    saved.save(1, functions.init(), {}, None)


@row("a state that is not finite (it is saved, and drives the good ones out)")
def _(tmp_path):
  state = make_train_step(experiment()).init()
  for part in ("params", "opt_state"):
    bad = state | {part: jax.tree.map(lambda x: x * jnp.nan if x.ndim else x, state[part])}
    with pytest.raises(Fault, match=f"{part}.* is not finite after step 1"):
      _saved(tmp_path, bad)
  assert not list((tmp_path / "run" / "checkpoints").iterdir())


# ------------------------------------------------------------------------------------------ steps and configs


@row("a gradient that is NaN (clipping passes it on; optax.apply_if_finite applies the fourth)")
def _(tmp_path):
  config = experiment()
  functions = make_train_step(config)
  state = functions.init()
  old = jax.device_get(state["params"])
  bad = Data().batch(0)
  for _ in range(6):
    state, metrics = functions.step(state, bad | {"loss_weights": bad["loss_weights"] * np.nan})
    assert not metrics["finite"]["update"] and metrics["finite"]["state"]
  jax.tree.map(np.testing.assert_array_equal, old, jax.device_get(state["params"]))
  assert state["step"] == 6


@row("a key that is used twice")
def _(tmp_path):
  with jax.debug_key_reuse(True):
    model = dataclasses.replace(MODEL, stack="3*layer")
    for accum in (1, 2):
      functions = make_train_step(experiment(model=model, grad_accum=accum))
      functions.step(functions.init(), Data().batch(0))
  # No two layers and no two steps drop the same units: with equal inputs, their outputs differ.
  functions = make_train_step(experiment(learning_rate=0.0))
  state, losses = functions.init(), set()
  for _ in range(3):
    state, metrics = functions.step(state, Data().batch(0))
    losses.add(float(metrics["loss"]))
  assert len(losses) == 3


def config_with(key, value):
  data = to_dict(experiment())
  return lambda _: build(RunConfig, override(data, [(key, value)]))


refuses("a key that is misspelt", "no such key.*learning_rate", config_with("optimizer.learning_rat", "1"))
refuses("a learning rate of nan", "finite", config_with("optimizer.learning_rate", "nan"))
refuses("a count below 0", "steps", config_with("train.steps", "-1"))
refuses("a count of 1.5", "steps", config_with("train.steps", "1.5"))
refuses("heads that the key-value heads do not divide", "num_kv_heads", lambda _: block(num_heads=4, num_kv_heads=3))
refuses("float64 (it becomes float32)", "float64", lambda _: build(Precision, {"param": "float64"}))
refuses("micro-batches of unequal size", "multiple of grad_accum", config_with("train.grad_accum", "3"))
refuses("a context longer than the model's", "longer than model.max_seq_len", config_with("train.seq_len", "8"))
refuses(
  "a stack of a block that is not there", "stack", lambda _: build(ModelConfig, to_dict(MODEL) | {"stack": "2*layr"})
)
refuses("a stack without layers", "stack", lambda _: parse_stack("0*layer"))


@pytest.mark.parametrize("name", ROWS)
def test_r14_what_is_silent_elsewhere_is_refused_or_right(name, tmp_path, cases):
  ROWS[name](tmp_path)
  cases("R14 silent behaviours guarded")


def test_r14_there_are_rows():
  assert len(ROWS) >= 25
