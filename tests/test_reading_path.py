"""How much code lies between `llmarch generate` and logits, counted as a reader would meet it."""

import ast
import dataclasses
import sys
from collections import defaultdict
from inspect import getsourcelines
from pathlib import Path

import jax
import spaces
from flax import nnx

import llmarch
from llmarch.__main__ import main
from llmarch.data.tokenizers import load_tokenizer
from llmarch.infer.lm import LM
from llmarch.models.decoder import Decoder

ROOT = Path(llmarch.__file__).parent
MOST = 1200


def words_of(path: str) -> set[int]:
  """The lines of a file that are no code: docstrings, comments, and empty ones."""
  text = Path(path).read_text()
  found = {i for i, line in enumerate(text.splitlines(), 1) if not line.strip() or line.strip().startswith("#")}
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
      found |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
  return found


def test_from_the_command_to_logits_is_at_most_1200_lines(tmp_path, monkeypatch, capsys):
  """The functions of llmarch that run while one prompt is continued on one device, from the command's own to the last
  op, tracing included, each counted once, without docstrings and comments. Loading the model from its folder is apart.

  README names the files in the order in which one reads them: all that hold more than 40 of these lines.
  """
  config = dataclasses.replace(spaces.HAND["llama"], vocab_size=512, max_seq_len=64)
  folder = str(tmp_path / "model")
  LM(config, nnx.state(Decoder(config, jax.random.key(0))), load_tokenizer("bytes")).save(folder)
  lines = defaultdict(set)

  def note(frame, event, _):
    code = frame.f_code
    if event == "call" and code.co_filename.startswith(str(ROOT)) and code.co_name != "<module>":
      source, first = getsourcelines(code)
      lines[code.co_filename] |= set(range(first, first + len(source)))

  generate = LM.generate

  def noted(self, *args, **options):
    sys.setprofile(note)
    try:
      return generate(self, *args, **options)
    finally:
      sys.setprofile(None)

  monkeypatch.setattr(LM, "generate", noted)
  assert main(["generate", f"--from={folder}", "--prompt=def", "--max_new_tokens=2"]) == 0
  from llmarch.commands import generate as command

  source, first = getsourcelines(command.main)
  lines[command.__file__] = set(range(first, first + len(source)))
  counted = {str(Path(path).relative_to(ROOT)): len(found - words_of(path)) for path, found in lines.items()}
  assert {"models/decoder.py", "layers/attention.py", "ops/attention.py"} <= counted.keys()
  assert sum(counted.values()) <= MOST, counted
  readme = (ROOT.parent / "README.md").read_text()
  unnamed = [path for path, n in counted.items() if n > 40 and f"{path}`" not in readme and path not in ("build.py",)]
  assert not unnamed, unnamed
