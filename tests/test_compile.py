"""Compiling ahead of time for machines that are not here: what fits, what does not, and what is refused before."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tiers import plain_if

from llmarch.__main__ import main
from llmarch.analysis import compile as ahead
from llmarch.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_anew")

ahead.prepare()
needs_tpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
GiB = 2**30
D, N, H, F, V, LAYERS = 1024, 8, 128, 2048, 4096, 2
BATCH, LENGTH = 64, 128
SMALL = [
  "--config=palm_8b",
  f"--config.model.stack={LAYERS}*layer",
  f"--config.model.d_model={D}",
  f"--config.model.vocab_size={V}",
  f"--config.model.blocks.layer.mixer.num_heads={N}",
  f"--config.model.blocks.layer.mixer.head_dim={H}",
  f"--config.model.blocks.layer.ffn.d_ff={F}",
  f"--context={LENGTH}",
  f"--batch={BATCH}",
]
# Multiply-adds a token and layer: what all chips share, and the one key-value head.
SPLIT, KEYS = 2 * D * N * H + 3 * D * F + 2 * N * H * LENGTH, 2 * D * H


def compiled(capsys, *flags) -> dict:
  assert main(["compile", *SMALL, "--json", *flags]) == 0
  return json.loads(capsys.readouterr().out)


def refused(capsys, *flags) -> str:
  assert main(["compile", *SMALL, *flags]) == 2
  (sentence,) = capsys.readouterr().err.strip().splitlines()
  return sentence


# ------------------------------------------------------------------------------------------------- cells


@needs_tpu
@pytest.mark.parametrize("attention", plain_if(lambda name: name == "heads", ["heads", "batch_yz"]))
def test_a_decode_step_on_v4_costs_the_formulas_flops_and_its_arguments(capsys, attention):
  found = compiled(capsys, "--topology=v4:2x2x2", f"--layout.decode=ws_2d+{attention}")
  # The one key-value head is split over x alone.
  assert found["flops"] == pytest.approx(2 * BATCH * ((LAYERS * SPLIT + D * V) / 8 + LAYERS * KEYS / 2), rel=0.02)
  weights = 2 * (LAYERS * (2 * D * N * H + 3 * D * F) + D * V) / 8 + 2 * LAYERS * KEYS / 2
  assert weights < found["bytes_per_chip"] < 8 * weights  # a model this small is mostly temporaries
  assert found["fits"] and found["memory_per_chip"] == int(30.75 * GiB)
  assert found["full_rematerialisations"] == 0 and found["opaque"] == {}
  assert found["open_loops"] == 1  # decoding ends when the rows have ended
  kinds = {(c["kind"], *c["axes"]) for c in found["collectives"]}
  assert (("all-to-all", "y", "z") in kinds) == (attention == "batch_yz")


@needs_tpu
@pytest.mark.full
def test_a_gathered_prefill_moves_each_weight_once_and_no_activations(capsys):
  found = compiled(capsys, "--topology=v4:2x2x2", "--phase=prefill", "--layout.prefill=wg_xyz+batch_xyz")
  gathered = sum(c["bytes"] for c in found["collectives"] if c["kind"] == "all-gather")
  weights = 2 * LAYERS * (2 * D * N * H + 3 * D * F)
  assert gathered > weights  # axis by axis: the last gather's output is the whole matrix
  # A reduced activation is as large as a chip's rows; a scalar or a norm's statistics are not.
  rows = BATCH * LENGTH * D * 2 / 8
  assert not [c for c in found["collectives"] if c["kind"] in ("all-reduce", "reduce-scatter") and c["bytes"] > rows]


@needs_tpu
@pytest.mark.full
def test_a_train_step_costs_four_forwards_with_everything_recomputed(capsys):
  found = compiled(capsys, "--topology=v5e:2x2", "--phase=train", "--mesh=data=2,tensor=2", "--batch=8")
  macs = 4 * LAYERS * (SPLIT / 4 + KEYS / 2) + 3 * D * V / 4  # the key-value head is not split over tensor
  assert found["flops"] == pytest.approx(2 * 8 * LENGTH * macs, rel=0.05)
  assert {tuple(c["axes"]) for c in found["collectives"] if c["kind"] == "all-reduce"} >= {("tensor",), ("data",)}


@needs_tpu
def test_what_does_not_fit_is_a_receipt_with_the_size_it_wanted(capsys):
  found = compiled(capsys, "--topology=v5e:2x2", "--config.model.vocab_size=40000000")
  assert not found["fits"] and found["flops"] is None
  assert "RESOURCE_EXHAUSTED" in found["refusal"]
  assert found["bytes_per_chip"] > found["memory_per_chip"] == pytest.approx(15.75 * GiB, rel=1e-3)


@needs_tpu
@pytest.mark.parametrize(("topology", "chips"), [("v4:2x2x2", 8), ("v5p:2x2x2", 8), ("v5e:2x2", 4), ("v6e:2x2", 4)])
def test_a_device_is_a_chip_and_the_compiler_grants_it_what_the_table_says(topology, chips):
  found = ahead.find_topology(topology)
  assert len(found.devices) == chips
  mesh = jax.make_mesh((chips,), ("x",), axis_types=(AxisType.Auto,), devices=found.devices)
  huge = jax.ShapeDtypeStruct((2**28, 1024), jnp.int8, sharding=NamedSharding(mesh, P()))
  receipt = ahead.receipt(lambda: jax.jit(lambda x: x[:5] * 2).lower(huge), mesh, found.family.memory)
  assert receipt["memory_per_chip"] == pytest.approx(found.family.memory, rel=1e-3) and not receipt["fits"]


@needs_tpu
@pytest.mark.full
def test_an_involuntary_full_rematerialisation_is_seen():
  devices = ahead.find_topology("v5e:2x4").devices
  mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2, devices=devices)
  put = lambda x, *spec: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))

  def awkward(x):
    y = put(jnp.sin(x).reshape(8, 8, 6, 128), None, None, None, ("x", "y"))
    return put(jnp.cos(y), None, "y", "x", None)

  for function, seen in ((awkward, True), (jnp.sin, False)):
    x = jax.ShapeDtypeStruct((64, 24, 32), jnp.float32, sharding=NamedSharding(mesh, P("x", "y")))
    receipt = ahead.receipt(lambda f=function, x=x: jax.jit(f).lower(x), mesh, 16 * GiB)
    assert (receipt["full_rematerialisations"] > 0) == seen


@pytest.mark.skipif(not importlib.util.find_spec("jax_plugins"), reason="the CUDA plugin is not installed")
@pytest.mark.full
def test_eight_h100_are_compiled_for_without_one(capsys):
  found = compiled(capsys, "--topology=h100:8", "--layout.prefill=ws_1d", "--layout.decode=ws_1d")
  assert found["mesh"] == {"x": 1, "y": 8, "z": 1}
  assert found["fits"] and found["memory_per_chip"] == 84942979072
  assert {tuple(c["axes"]) for c in found["collectives"]} == {("y",)}
  assert found["flops"] > 0


# --------------------------------------------------------------------------------------------- bad input


def test_a_machine_that_no_compiler_knows_is_refused_with_those_that_are(capsys):
  said = refused(capsys, "--topology=v9:4x4")
  assert "'v9'" in said and "v4:4x4x4" in said and "h100:8" in said
  assert "is not a shape" in refused(capsys, "--topology=v4:4by4")
  assert "--topology is missing" in refused(capsys)


@needs_tpu
def test_a_shape_that_the_machine_cannot_have_is_refused(capsys):
  assert "--topology=v4:5x5x5: the compiler does not know it" in refused(capsys, "--topology=v4:5x5x5")


@needs_tpu
def test_a_mesh_that_does_not_cover_the_machine_is_refused(capsys):
  assert "covers 4 devices of 8" in refused(capsys, "--topology=v4:2x2x2", "--mesh=x=2,y=2")


@needs_tpu
def test_a_mesh_axis_that_does_not_divide_is_named_with_its_dimension(capsys):
  said = refused(capsys, "--topology=v4:2x2x2", "--config.model.d_model=1023")
  assert "1023" in said and "not divisible" in said


@needs_tpu
def test_a_train_step_on_the_axes_of_inference_is_refused(capsys):
  said = refused(capsys, "--topology=v4:2x2x2", "--phase=train", "--mesh=x=2,y=2,z=2")
  assert "has the axes x, y, z of inference; training has data, stage" in said


def test_what_a_train_step_does_not_read_is_refused(capsys):
  said = refused(capsys, "--topology=v4:2x2x2", "--phase=train", "--weights=int8", "--layout.decode=wg_x")
  assert "--phase=train does not read --weights, --layout.decode;" in said


def test_a_missing_compiler_is_named_with_the_extra_that_has_it(capsys, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  assert "pip install 'llmarch[tpu]'" in refused(capsys, "--topology=v4:2x2x2")
  assert "pip install 'llmarch[cuda13]'" in refused(capsys, "--topology=h100:8")


# ------------------------------------------------------------------------------------------------- suite


@needs_tpu
@pytest.mark.full
def test_the_suite_keeps_a_record_and_a_table_and_tells_what_changed(tmp_path, capsys):
  flags = dict(flag.removeprefix("--").split("=", 1) for flag in SMALL) | {"topology": "v5e:2x2", "phase": "decode"}
  cells = [
    {"name": "small", "fast": True, "flags": flags},
    {"name": "large", "flags": flags | {"config.model.vocab_size": 40_000_000}},
  ]
  suite, record = tmp_path / "suite.json", tmp_path / "results.json"
  suite.write_text(json.dumps(cells))
  assert main(["compile", f"--suite={suite}"]) == 0
  results = json.loads(record.read_text())
  assert results["small"]["fits"] and not results["large"]["fits"]
  page = (tmp_path / "README.md").read_text()
  assert page.count("🟩") == 1 and page.count("🟥") == 1
  results["small"]["fits"] = False
  record.write_text(json.dumps(results))
  capsys.readouterr()
  assert main(["compile", f"--suite={suite}", "--fast"]) == 1
  out, err = capsys.readouterr()
  assert "1 changed" in err and "small" in err and "large" not in out
  assert json.loads(record.read_text()) == results  # a part is no record


@pytest.mark.full
def test_the_longest_context_is_within_two_percent_of_the_limit(monkeypatch):
  tried = []

  def compile_cell(config, cell):
    tried.append(cell.context)
    return {"fits": cell.context <= 43_000}

  monkeypatch.setattr(ahead, "compile_cell", compile_cell)
  cell = ahead.Cell(topology="v4:2x2x2", phase="decode", batch=1, context=1)
  context, found = ahead.longest_context(None, cell)
  assert 43_000 * 0.98 <= context <= 43_000 and found["fits"] and len(tried) < 20
  monkeypatch.setattr(ahead, "compile_cell", lambda config, cell: {"fits": False})
  assert ahead.longest_context(None, cell) == (0, None)


def test_sizes_in_the_compilers_refusals_are_read():
  new = "RESOURCE_EXHAUSTED: the total memory required (40.5G) exceeds available HBM (30.75G). HLO module: m"
  old = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 512.00M of 15.75G hbm."
  assert ahead._refused_bytes(new) == (int(40.5 * GiB), int(30.75 * GiB))
  assert ahead._refused_bytes(old) == (512 * 2**20, int(15.75 * GiB))
  assert ahead._refused_bytes("RESOURCE_EXHAUSTED") == (None, None)


def test_a_failure_of_the_compiler_shows_what_it_said(capfd):
  with pytest.raises(ZeroDivisionError), ahead._messages():
    import os

    os.write(2, b"the compiler's last words\n")
    1 / 0  # noqa: B018
  assert "the compiler's last words" in capfd.readouterr().err
  with pytest.raises(UserError), ahead._messages():
    os.write(2, b"noise\n")
    raise UserError("a sentence")
  assert "noise" not in capfd.readouterr().err
