"""Training: bit-reproducible, resumable after any step, the same on every mesh, and faithful to optax's formulas."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiers import plain_if, three

import llmarch
from llmarch.build import build, override, to_dict
from llmarch.config import BlockConfig, ModelConfig
from llmarch.data import sources
from llmarch.data.tokenizers import load_tokenizer, train_bpe
from llmarch.errors import UserError
from llmarch.layers.attention import AttentionConfig
from llmarch.layers.ffn import MLPConfig
from llmarch.layers.norm import LayerNorm, RMSNorm
from llmarch.layers.position import RoPE, T5Bias
from llmarch.run import train_run as train_command
from llmarch.run_config import (
  SGD,
  WSD,
  Adafactor,
  AdamW,
  CheckpointConfig,
  Constant,
  Cosine,
  DataConfig,
  EvalConfig,
  InverseSqrt,
  Linear,
  Lion,
  Muon,
  OptimizerConfig,
  RunConfig,
  TextFiles,
  TrainConfig,
)
from llmarch.sharding import make_mesh
from llmarch.train import checkpoint
from llmarch.train.faults import Fault
from llmarch.train.loop import train
from llmarch.train.metrics import MetricsWriter
from llmarch.train.optim import make_schedule
from llmarch.train.step import make_train_step
from llmarch.train.workdir import only_process

B, T, V = 8, 13, 32

make_train_step = functools.lru_cache(make_train_step)  # a config compiles once for all tests


def _block(**mixer):
  mixer = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "position": RoPE(), "dropout": 0.1} | mixer
  return BlockConfig(mixer=AttentionConfig(**mixer), ffn=MLPConfig(d_ff=40), norm=RMSNorm(), dropout=0.1)


MODEL = ModelConfig(
  d_model=16,
  vocab_size=V,
  max_seq_len=T,
  stack="2*(local full)",
  blocks={
    "local": _block(window=5),
    "full": dataclasses.replace(
      _block(position=T5Bias(num_buckets=8, max_distance=9), num_kv_heads=4),
      norm=LayerNorm(),
      ffn=MLPConfig(d_ff=24, activation="gelu", gated=False, bias=True),
    ),
  },
  final_norm=RMSNorm(),
)


def experiment(*, optimizer=None, model=MODEL, **train):
  return RunConfig(
    model=model,
    train=TrainConfig(**({"steps": 12, "batch_size": B, "seq_len": T, "loss_chunk": 5, "log_every": 1} | train)),
    optimizer=optimizer or OptimizerConfig(learning_rate=3e-3, schedule=Cosine(warmup=3)),
    eval=EvalConfig(every=4, batches=2),
    checkpoint=CheckpointConfig(every=3, max_to_keep=100),
  )


class Data:
  """Batches as a pure function of the step."""

  hash, bytes_per_token, num_bytes, num_tokens = "data", 2.0, 1, 1

  def __init__(self, name="data"):
    self.hash = name

  def batch(self, step):
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, 9, (B, T + 1)).astype(np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    return {
      "tokens": tokens[:, :-1],
      "targets": tokens[:, 1:],
      "positions": positions,
      "segment_ids": np.zeros((B, T), np.int32),
      "loss_weights": (rng.random((B, T)) < 0.8).astype(np.float32),
    }

  def iterate(self, step):
    while True:
      yield self.batch(step)
      step += 1


def run(config, workdir, data=None):
  data = data or Data()
  return train(config, str(workdir), data, data, mesh=None, sample=None, flops_per_token=1.0, peak_flops=None)


def rows(workdir):
  """The metrics, without what depends on the clock."""
  clock = ("tokens_per_second", "mfu", "seconds")
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def saved_state(config, workdir, step):
  with checkpoint.Checkpoints(str(workdir), config.checkpoint) as saved:
    return jax.device_get(saved.restore(make_train_step(config).abstract_state, step=step)[0])


def assert_bitwise(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
  """An uninterrupted run with everything that could go wrong on resume: dropout, EMA, micro-batches, schedule."""
  config = experiment(ema=0.9, grad_accum=2)
  workdir = tmp_path_factory.mktemp("runs") / "reference"
  run(config, workdir)
  return config, workdir


def test_training_is_bit_reproducible(reference, tmp_path):
  config, workdir = reference
  run(config, tmp_path / "again")
  assert rows(tmp_path / "again") == rows(workdir)
  assert_bitwise(saved_state(config, tmp_path / "again", 12), saved_state(config, workdir, 12))


@pytest.mark.parametrize("stopped_at", plain_if(lambda step: step == 6, [3, 6, 9]))
def test_resume_equals_the_uninterrupted_run_bit_for_bit(reference, tmp_path, stopped_at):
  config, workdir = reference
  shutil.copytree(workdir, tmp_path / "run")
  for folder in (tmp_path / "run" / "checkpoints").iterdir():
    if int(folder.name) > stopped_at:
      shutil.rmtree(folder)
  run(config, tmp_path / "run")
  assert rows(tmp_path / "run") == rows(workdir)
  assert_bitwise(saved_state(config, tmp_path / "run", 12), saved_state(config, workdir, 12))


@pytest.mark.full
@pytest.mark.parametrize("lost", plain_if(["opt_state"].count, ["opt_state", "step", "ema"]))
def test_resume_without_any_one_item_does_not_equal_the_uninterrupted_run(reference, lost):
  """The negative control of the test above: each part of the state is needed."""
  config, workdir = reference
  functions = make_train_step(config)
  state = saved_state(config, workdir, 9)
  whole, _ = functions.step(jax.device_put(state), Data().batch(9))
  whole = jax.device_get(whole)
  damaged = state | {lost: jax.device_get(functions.init()[lost])}
  other, _ = functions.step(jax.device_put(damaged), Data().batch(9))
  with pytest.raises(AssertionError):
    assert_bitwise(whole, jax.device_get(other))


@pytest.mark.full
def test_saved_arrays_are_those_of_the_step_though_the_state_is_donated(tmp_path):
  config = experiment()
  functions = make_train_step(config)
  state, kept = functions.init(), {}
  with checkpoint.Checkpoints(str(tmp_path), config.checkpoint) as saved:
    for step in range(1, 6):
      state, _ = functions.step(state, Data().batch(step))
      kept[step] = jax.tree.map(np.array, state)
      saved.save(step, state, {}, None)
  for step, state in kept.items():
    assert_bitwise(saved_state(config, tmp_path, step), state)


def test_another_config_in_a_workdir_is_refused_naming_the_keys_and_nothing_changes(reference, tmp_path):
  config, workdir = reference
  shutil.copytree(workdir, tmp_path / "run")
  before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
  other = dataclasses.replace(config, seed=7, train=dataclasses.replace(config.train, z_loss=1e-4))
  with pytest.raises(UserError, match=r"config\.seed: 7 here, 0 there.*config\.train\.z_loss"):
    run(other, tmp_path / "run")
  assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_other_data_in_a_workdir_is_refused(reference, tmp_path):
  config, workdir = reference
  shutil.copytree(workdir, tmp_path / "run")
  with pytest.raises(UserError, match="other data"):
    run(config, tmp_path / "run", Data("another"))


def test_a_folder_of_other_files_is_refused(tmp_path):
  (tmp_path / "thesis.txt").write_text("mine")
  with pytest.raises(UserError, match="not empty"):
    run(experiment(), tmp_path)
  assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_changed_bit_of_a_checkpoint_is_refused_or_changes_nothing(reference, tmp_path):
  """Compressed floats are mostly stored as they are, so that the file format itself notices half of all changes."""
  config, workdir = reference
  shutil.copytree(workdir, tmp_path / "run")
  files = [p for p in (tmp_path / "run" / "checkpoints" / "12" / "state").rglob("*") if p.is_file()]
  largest = max(files, key=lambda p: p.stat().st_size)
  whole, sound = largest.read_bytes(), saved_state(config, workdir, 12)
  by_checksum = 0
  for at in np.linspace(1000, len(whole) - 1, 16).astype(int):
    changed = bytearray(whole)
    changed[at] ^= 8
    largest.write_bytes(changed)
    try:
      assert_bitwise(saved_state(config, tmp_path / "run", 12), sound)
    except checkpoint.Damaged as e:
      by_checksum += "fails its checksum" in str(e)
  assert by_checksum


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(tmp_path):
  config = experiment(optimizer=OptimizerConfig(algorithm=SGD(), learning_rate=1e30, clip_norm=None))
  with pytest.raises(UserError, match="the (loss|grad_norm) is (nan|inf)"):
    run(config, tmp_path / "run")
  assert checkpoint.steps_of(tmp_path / "run" / "checkpoints") == []
  assert all(np.isfinite(value) for row in rows(tmp_path / "run") for value in row.values())


@pytest.mark.full
def test_parameters_that_are_not_finite_are_not_saved_though_the_loss_before_them_is(tmp_path):
  overflows = OptimizerConfig(
    algorithm=SGD(), learning_rate=3e38, weight_decay=1e3, clip_norm=None, schedule=Constant()
  )
  config = dataclasses.replace(experiment(optimizer=overflows, steps=1), eval=EvalConfig(every=0))
  with pytest.raises(Fault, match="is not finite after step 1 .*nothing was saved"):
    run(config, tmp_path / "run")
  assert checkpoint.steps_of(tmp_path / "run" / "checkpoints") == []


def test_a_run_that_is_refused_leaves_its_workdir_to_the_mended_config(tmp_path, monkeypatch):
  survey = sources.survey
  """Everything that can be refused is refused before the folder belongs to a config, and before anything compiles."""
  (tmp_path / "a.txt").write_text("\n\n".join(f"text {i}, and some more of it" for i in range(100)))
  good = {
    "model": to_dict(dataclasses.replace(MODEL, vocab_size=264, max_seq_len=20)),
    "data": {
      "source": {"kind": "text", "paths": [str(tmp_path / "*.txt")], "separator": "\n\n"},
      "cache_dir": str(tmp_path / "cache"),
    },
    "train": {"steps": 12, "batch_size": B, "seq_len": T},
  }
  for overrides, sentence in (
    (["model.vocab_size=100"], "vocab_size=100 is smaller"),
    (["data.source.paths=['/none/*']"], "no file matches"),
    (["optimizer.schedule.warmup=13"], "do not fit into train.steps=12"),
    (["train.batch_size=4000"], "fewer than train.batch_size"),
    (["eval.sample_prompt="], "eval.sample_prompt is empty"),
    (["eval.sample_prompt=01234567890123456789"], "eval.sample_prompt has 20 tokens of model.max_seq_len=20"),
    (["model.blocks.full.mixer.mask=bidirectional"], "bidirectional"),
    (["train.init_from=/none"], "train.init_from: there is no /none"),
    (["data.document_end=<end>"], "documents of bytes end with '<|endoftext|>'"),
  ):
    reads = any(word in sentence for word in ("no file", "fewer than"))
    monkeypatch.setattr(sources, "survey", survey if reads else None)  # the text is not read before the cheap checks
    config = build(RunConfig, good)
    config = build(RunConfig, override(to_dict(config), [o.split("=", 1) for o in overrides]))
    with pytest.raises(UserError, match=sentence):
      train_command(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists(), sentence


@pytest.mark.full
def test_a_run_keeps_its_tokenizer_whatever_becomes_of_the_file_it_was_read_from(tmp_path):
  texts = [f"text {i}, and some more of it" for i in range(100)]
  (tmp_path / "a.txt").write_text("\n\n".join(texts))
  train_bpe(texts, 270).save(tmp_path / "bpe")
  mine = load_tokenizer(str(tmp_path / "bpe")).fingerprint
  source = TextFiles(paths=(str(tmp_path / "a.txt"),), separator="\n\n")
  data = DataConfig(source=source, tokenizer=str(tmp_path / "bpe"), cache_dir=str(tmp_path / "cache"))
  config = experiment(model=dataclasses.replace(MODEL, vocab_size=270), steps=3)
  train_command(dataclasses.replace(config, data=data, eval=EvalConfig(every=0)), str(tmp_path / "run"))
  train_bpe(["other words"], 265).save(tmp_path / "bpe")
  assert llmarch.load(tmp_path / "run").tokenizer.fingerprint == mine
  shutil.rmtree(tmp_path / "bpe")
  assert llmarch.load(tmp_path / "run").tokenizer.fingerprint == mine


def test_one_process_at_a_time_trains_in_a_workdir(reference):
  config, workdir = reference
  with only_process(str(workdir)):
    with pytest.raises(UserError, match="another process is training"):
      run(config, workdir)
  run(config, workdir)


def test_a_config_of_a_workdir_that_is_damaged_is_a_sentence(reference, tmp_path):
  config, _ = reference
  for text in ("", "[]", "{", "[" * 100_000):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json is damaged"):
      run(config, tmp_path)


@pytest.mark.full
def test_garbled_metrics_do_not_stop_a_resumed_run(tmp_path):
  (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe\x00\n{"step": 2}\n{"step": 3')
  MetricsWriter(str(tmp_path), 2).close()
  assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.full
def test_best_checkpoints_are_kept_by_eval_loss(tmp_path):
  losses = [5.0, 1.0, 4.0, 2.0, 3.0]
  config = experiment()
  state = make_train_step(config).init()
  with checkpoint.Checkpoints(str(tmp_path), CheckpointConfig(every=1, max_to_keep=1, keep_best=2)) as saved:
    for step, loss in enumerate(losses, 1):
      saved.save(step, state, {}, {"eval/loss": loss})
  assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == [2, 4, 5]


def test_micro_batches_give_the_gradients_of_the_whole_batch():
  model = _without_dropout(MODEL)
  one, four = (make_train_step(experiment(model=model, grad_accum=n)) for n in (1, 4))
  a, ma = one.step(one.init(), Data().batch(0))
  b, mb = four.step(four.init(), Data().batch(0))
  np.testing.assert_allclose(ma["grad_norm"], mb["grad_norm"], rtol=1e-5)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), a["params"], b["params"])


@pytest.mark.full
@pytest.mark.parametrize("data, fsdp", plain_if([(2, 4)].count, [(2, 4), (8, 1), (4, 2), (1, 8)], "nightly"))
def test_a_train_step_on_a_mesh_equals_one_device(data, fsdp):
  model = _without_dropout(MODEL)
  wide = lambda b: dataclasses.replace(b, mixer=dataclasses.replace(b.mixer, num_heads=8, num_kv_heads=2))
  model = dataclasses.replace(model, blocks={name: wide(b) for name, b in model.blocks.items()})
  config = experiment(model=model, ema=0.9)
  mesh = make_mesh({"data": data, "fsdp": fsdp})
  one, many = make_train_step(config), make_train_step(config, mesh)
  start = many.init()
  assert_bitwise(jax.device_get(start["params"]), jax.device_get(one.init()["params"]))
  a, ma = one.step(one.init(), Data().batch(0))
  b, mb = many.step(start, jax.device_put(Data().batch(0), many.batch_sharding))
  np.testing.assert_allclose(ma["loss"], mb["loss"], rtol=1e-5)
  np.testing.assert_allclose(ma["grad_norm"], mb["grad_norm"], rtol=1e-5)
  # Adam's first update is +-learning_rate whatever the gradient's size, so the moments carry the comparison.
  compare = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * max(np.abs(x).max(), 1e-9))
  jax.tree.map(compare, jax.device_get(a["opt_state"]), jax.device_get(b["opt_state"]))
  jax.tree.map(lambda x, want: _same_sharding(x, want.sharding), b, many.abstract_state)


def _same_sharding(x, want):
  assert x.sharding.is_equivalent_to(want, x.ndim), (x.sharding, want)


@pytest.mark.full
def test_a_checkpoint_restores_onto_another_mesh(tmp_path):
  config = experiment()
  four, one = make_train_step(config, make_mesh({"data": 2, "tensor": 2}, jax.devices()[:4])), make_train_step(config)
  state = four.init()
  with checkpoint.Checkpoints(str(tmp_path), config.checkpoint) as saved:
    saved.save(1, state, {}, None)
    saved.wait()
    restored, _ = saved.restore(one.abstract_state, 1)
  assert_bitwise(jax.device_get(restored), jax.device_get(state))


def _without_dropout(model):
  blocks = {
    name: dataclasses.replace(b, dropout=0.0, mixer=dataclasses.replace(b.mixer, dropout=0.0))
    for name, b in model.blocks.items()
  }
  return dataclasses.replace(model, blocks=blocks)


# ------------------------------------------------------------------------------------------- optimizers


ALGORITHMS = [AdamW(), Lion(), Adafactor(min_dim_size_to_factor=8), Muon(), SGD(momentum=0.9)]


@pytest.mark.full
@pytest.mark.parametrize("algorithm", three(ALGORITHMS[3:4].count, ALGORITHMS[2:3].count, ALGORITHMS))
def test_every_optimizer_lowers_the_loss_of_one_batch(algorithm):
  rate = {"lion": 1e-3, "sgd": 0.1, "muon": 5e-3}.get(algorithm.kind, 3e-3)
  optimizer = OptimizerConfig(algorithm=algorithm, learning_rate=rate, schedule=Constant())
  functions = make_train_step(experiment(optimizer=optimizer, model=_without_dropout(MODEL)))
  state, first = functions.step(functions.init(), Data().batch(0))
  for _ in range(30):
    state, last = functions.step(state, Data().batch(0))
  assert last["loss"] < 0.9 * first["loss"]


@pytest.mark.full
def test_decay_touches_matrices_and_embeddings_but_neither_norms_nor_biases():
  """With no gradient, only decay moves a parameter: p <- p (1 - rate * decay)."""
  optimizer = OptimizerConfig(algorithm=SGD(), learning_rate=0.1, weight_decay=0.5, schedule=Constant())
  functions = make_train_step(experiment(optimizer=optimizer))
  batch = Data().batch(0)
  before = functions.init()
  old = jax.device_get(before["params"])
  after, _ = functions.step(before, batch | {"loss_weights": np.zeros((B, T), np.float32)})
  for name, value in jax.device_get(after["params"]).items():
    constant = name.endswith(("scale", "bias"))
    np.testing.assert_allclose(value, old[name] * (1.0 if constant else 0.95), rtol=1e-6, err_msg=name)


@pytest.mark.full
def test_adamw_equals_optax_adamw_with_a_mask():
  config = experiment(model=_without_dropout(MODEL))
  functions = make_train_step(config)
  start = functions.init()
  params = jax.tree.map(jnp.array, start["params"])
  mask = {name: not name.endswith(("scale", "bias")) for name in params}
  schedule = make_schedule(config.optimizer.schedule, 3e-3, 12)
  peer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, 0.9, 0.95, weight_decay=0.1, mask=mask))
  # One step of SGD with rate 1 and no clipping gives the gradient itself.
  plain = OptimizerConfig(algorithm=SGD(), learning_rate=1.0, weight_decay=0.0, clip_norm=None, schedule=Constant())
  gradient = make_train_step(experiment(model=_without_dropout(MODEL), optimizer=plain))
  moved, _ = gradient.step(gradient.init(), Data().batch(0))
  grads = jax.tree.map(lambda p, q: p - q, params, moved["params"])
  updates, _ = peer.update(grads, peer.init(params), params)
  want = optax.apply_updates(params, updates)
  got, _ = functions.step(start, Data().batch(0))
  # A first Adam step is rate * sign(g): entries whose gradient is lost in rounding may differ.
  close = [np.isclose(got["params"][n], want[n], atol=1e-6).mean() for n in params if "k_bias" not in n]
  assert min(close) > 0.99


def test_ema_is_the_recurrence_of_its_definition():
  config = experiment(ema=0.7, model=_without_dropout(MODEL))
  functions = make_train_step(config)
  state = functions.init()
  ema = jax.device_get(state["params"])
  for step in range(4):
    state, _ = functions.step(state, Data().batch(step))
    params = jax.device_get(state["params"])
    ema = {name: 0.7 * ema[name] + 0.3 * params[name] for name in ema}
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6), ema, jax.device_get(state["ema"]))


def test_schedules_equal_their_formulas():
  peak, steps, w = 2.0, 100, 10
  s = np.arange(w, steps)
  warm = peak * (np.arange(w) + 1) / (w + 1)
  curves = {
    Constant(warmup=w): np.full(steps - w, peak),
    Linear(warmup=w, final=0.2): peak + (s - w) / (steps - 1 - w) * (0.2 - 1) * peak,
    Cosine(warmup=w, final=0.1): peak * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * (s - w) / (steps - 1 - w)))),
    InverseSqrt(warmup=w): peak * np.sqrt(w / s),
    WSD(warmup=w, decay=20, final=0.0): peak * np.minimum(1, (steps - 1 - s) / 20),
  }
  for config, curve in curves.items():
    schedule = make_schedule(config, peak, steps)
    got = np.array([schedule(i) for i in range(steps)])
    np.testing.assert_allclose(got, np.concatenate([warm, curve]), rtol=1e-5, atol=1e-7, err_msg=config.kind)


@pytest.mark.parametrize("schedule", [Linear(final=0.25), Cosine(warmup=2, final=0.25), WSD(decay=4, final=0.25)])
def test_a_decay_reaches_its_end_at_the_last_step(schedule):
  assert float(make_schedule(schedule, 2.0, 10)(9)) == pytest.approx(0.5)
  assert float(make_schedule(schedule, 2.0, 10)(8)) > 0.51


def test_a_schedule_longer_than_the_run_is_refused():
  with pytest.raises(UserError, match="do not fit"):
    make_schedule(WSD(warmup=60, decay=60), 1.0, 100)


@pytest.mark.full
def test_bf16_parameters_keep_f32_moments():
  precision = dataclasses.replace(MODEL.precision, param="bfloat16", compute="bfloat16")
  functions = make_train_step(experiment(model=dataclasses.replace(MODEL, precision=precision)))
  state, metrics = functions.step(functions.init(), Data().batch(0))
  assert {str(p.dtype) for p in state["params"].values()} == {"bfloat16"}
  moments = [x for x in jax.tree.leaves(state["opt_state"]) if x.ndim]
  assert {str(m.dtype) for m in moments} == {"float32"} and np.isfinite(metrics["loss"])


def test_telemetry_gives_a_number_for_every_layer_and_parameter():
  functions = make_train_step(experiment())
  _, metrics = functions.step(functions.init(), Data().batch(0), telemetry=True)
  t = metrics["telemetry"]
  assert t["residual_rms"].shape == t["attention_entropy"].shape == (4,)
  # Uniform attention over at most 13 keys has entropy ln 13; at initialisation it is nearly uniform.
  assert np.all(t["attention_entropy"] > 0) and np.all(t["attention_entropy"] <= np.log(13))
  assert set(t["update_ratio"]) == set(functions.abstract_state["params"])
