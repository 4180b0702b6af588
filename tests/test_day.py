"""A researcher's day, docs/a_day.md, is run as it stands: its commands in order, in one folder."""

import importlib.util
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from test_docs import ROOT, fences

from llmarch.__main__ import main

PAGE = ROOT / "docs/a_day.md"
PEERS = ("torch", "transformers", "altair")
ENV = os.environ | {"PYTHONPATH": str(ROOT)}


def interrupted(words: list[str], workdir: pathlib.Path) -> int:
  """Runs a command of llmarch, presses Ctrl-C when the first row of metrics is there, and returns its exit code."""
  process = subprocess.Popen([sys.executable, "-m", "llmarch", *words], env=ENV)
  until = time.time() + 120
  metrics = workdir / "metrics.jsonl"
  while process.poll() is None and not (metrics.exists() and metrics.stat().st_size) and time.time() < until:
    time.sleep(0.01)
  process.send_signal(signal.SIGINT)
  return process.wait(120)


def rows(run: str) -> list[dict]:
  return [json.loads(line) for line in pathlib.Path(run, "metrics.jsonl").read_text().splitlines()]


@pytest.mark.full
@pytest.mark.skipif(
  any(importlib.util.find_spec(name) is None for name in PEERS),
  reason="torch, transformers or altair is absent: docs/a_day.md was not run",
)
def test_a_day_of_a_researcher_runs_as_its_page_says(tmp_path, monkeypatch, capfd):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  (tmp_path / "experiments/day").mkdir(parents=True)
  blocks = fences(PAGE.read_text())
  (ablation,) = (text for language, text in blocks if language == "python")
  (tmp_path / "experiments/day/ablation.py").write_text(ablation)
  lines = [line for language, text in blocks if not language for line in text.splitlines()]
  said = {}
  for line in lines:
    command, _, key = line.partition("  # ")
    words = shlex.split(command)[1:]
    if key == "Ctrl-C":
      assert interrupted(words, tmp_path / "runs/day") == 130, line
      stopped = rows("runs/day")[-1]["step"]
    elif command.startswith("llmarch "):
      assert main(words) == 0, (line, capfd.readouterr())
    else:
      subprocess.run(command, shell=True, check=True, env=ENV | {"PATH": f"{pathlib.Path(sys.executable).parent}:"
                     + os.environ["PATH"]})  # fmt: skip
    said[line] = capfd.readouterr().out
  assert stopped < 60
  of = lambda run: {row["step"]: row["loss"] for row in rows(run) if "loss" in row}
  day, annealed = of("runs/day"), of("runs/annealed")
  assert max(day) == max(annealed) == 90
  assert all((day[step] == annealed[step]) == (step <= 60) for step in day)  # its own rows begin after step 60
  for page in ("compared", "day"):
    assert re.search(r"<html", pathlib.Path(f"runs/{page}.html").read_text(), re.I)
  records = [json.loads(line) for line in pathlib.Path("experiments/day/records.jsonl").read_text().splitlines()]
  assert len(records) == 6 and not [r for r in records if r.get("error")]
  python, talk = (said[line] for line in lines if line.startswith("python") or "--chat" in line)
  import llmarch

  lm = llmarch.load("runs/annealed")
  assert python.strip() == ("def main(" + lm.generate("def main(", max_new_tokens=9)).strip()
  assert talk.strip() == llmarch.load("runs/talks").generate("user: Hello assistant:", max_new_tokens=20).strip()
