"""Writes families.json: for each family a config.json, the shapes of its tensors, and the logits that its peer
computes after 13 tokens with the tensors of tests/test_convert.py:drawn.

python tests/golden/make.py [FAMILY ...]     needs torch and transformers; without names, all
"""

import json
import pathlib
import sys
import tempfile

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import test_convert as tests  # noqa: E402
import torch  # noqa: E402

from llmarch.convert import hf  # noqa: E402


def make(family: str) -> dict:
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch)
    tests.peer(family, tests.VARIANTS[family][0]).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("transformers_version", None)
    shapes = {name: tensor.shape for name, tensor in hf.read_header(folder / hf.SINGLE)[0].items()}
    tests.write_drawn(folder, config, shapes)
    with torch.no_grad():
      logits = tests.reopened(folder)(torch.tensor(tests.batch((13,))[0])).logits[0, -1]
  return {"config": config, "shapes": shapes, "logits": [float(f"{x:.8g}") for x in logits.tolist()]}


def main(families: list[str]) -> None:
  golden = dict(tests.GOLDEN)
  for family in families or tests.VARIANTS:
    golden[family] = make(family)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(golden[name])}" for name in tests.VARIANTS if name in golden)
    tests.FILE.write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
  main(sys.argv[1:])
