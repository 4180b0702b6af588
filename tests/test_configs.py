"""Every file of configs/ builds on each machine that its docstring names, and says what is so."""

import ast
import dataclasses
import json
import re
import shlex

import pytest
from test_docs import ROOT, commands, name_of

from llmarch.analysis import cost
from llmarch.commands.common import load_config
from llmarch.errors import UserError
from llmarch.presets import shrink
from llmarch.run import check_settings, with_absolute_paths

FILES = sorted((ROOT / "configs").glob("*.py"))
SUITE = ROOT / "experiments/conformance/suite.json"


def doc(path) -> str:
  return ast.get_docstring(ast.parse(path.read_text()))


def arguments(path) -> list[str]:
  """What may stand behind the file's name, by its docstring: "" and, for instance, "h100"."""
  found = re.findall(rf"--config=configs/{path.name}:([^\s,]+)", doc(path))
  return ["", *sorted({a for a in found if not re.fullmatch(r"[A-Z]+", a)})]


def config_of(path, argument: str):
  return load_config(f"{path}:{argument}" if argument else str(path))


CASES = [(path, argument) for path in FILES for argument in arguments(path)]
IDS = [f"{path.stem}:{argument}" for path, argument in CASES]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_config_builds_and_its_docstring_says_what_is_so(path, cases):
  text = doc(path)
  fields = [line.partition(":")[0] for line in text.splitlines() if re.match(r"(Expected|Cost|Memory|Command):", line)]
  assert fields == ["Expected", "Cost", "Memory", "Command"]
  assert re.search("compiled, not executed|planned", text) or re.search(r"^Expected: .*\d", text, re.M)
  for argument in arguments(path):
    config = config_of(path, argument)  # checks the model and the mesh
    check_settings(with_absolute_paths(config))
    assert f"{cost.params(config.model)['total']:,}" in text
    assert config.data.tokenizer != "bytes" or config.model.vocab_size > 256
    assert config.train.steps > getattr(config.optimizer.schedule, "warmup", 0)
  cases("a config on a machine", len(arguments(path)))


def test_every_compilation_that_a_config_names_is_a_cell_of_the_suite_and_fits():
  cells = json.loads(SUITE.read_text())
  record = json.loads(SUITE.with_name("results.json").read_text())
  for path in FILES:
    for line in commands(path):
      _, command, *words = shlex.split(line)
      if command == "compile":
        flags = dict(word.removeprefix("--").split("=", 1) for word in words)
        names = [c["name"] for c in cells if {k: str(v) for k, v in c["flags"].items()} == flags]
        assert names, f"{SUITE} has no cell for {line}"
        if found := record.get(names[0]):
          assert found["fits"] and f"{found['bytes_per_chip'] / 2**30:.1f} GiB" in doc(path), line


def test_the_table_of_configs_has_them_all():
  page = (ROOT / "configs/README.md").read_text()
  assert not [path.name for path in FILES if f"]({path.name})" not in page]


def test_an_unknown_machine_is_refused_with_the_known_ones():
  with pytest.raises(UserError, match=r"no machine 'a100'; did you mean 'h100'"):
    load_config(f"{ROOT}/configs/llama_1b.py:a100")


def small(config, tmp_path):
  """The config with two steps of a toy model on text that is here, on 8 devices at most."""
  model = shrink(config.model, vocab_size=264, max_seq_len=64)
  # As many rows as the mesh's axes of the batch, each of 32 tokens.
  sizes = [min(int(n), 2) for n in re.findall(r"=(\d+)", config.mesh)]
  mesh = ",".join(f"{axis}={n}" for axis, n in zip(re.findall(r"(\w+)=", config.mesh), sizes))
  train = dataclasses.replace(config.train, steps=2, batch_size=8, seq_len=32, grad_accum=2, loss_chunk=32, lora=None,
                              init_from="")  # fmt: skip
  schedule = dataclasses.replace(config.optimizer.schedule, warmup=1)
  from llmarch.run_config import EvalConfig, Stdlib

  return dataclasses.replace(
    config,
    model=dataclasses.replace(model, precision=config.model.precision),
    train=train,
    optimizer=dataclasses.replace(config.optimizer, schedule=schedule),
    data=dataclasses.replace(config.data, source=Stdlib(), tokenizer="bytes"),
    eval=EvalConfig(every=0),
    mesh=mesh,
  )


@pytest.mark.nightly
@pytest.mark.parametrize("path, argument", CASES, ids=IDS)
def test_a_config_at_toy_size_trains_two_steps_on_its_mesh(path, argument, tmp_path):
  from llmarch.run import train_run

  train_run(small(config_of(path, argument), tmp_path), str(tmp_path / "run"))
  rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
  assert rows[-1]["step"] == 2 and 2 < rows[-1]["loss"] < 8
