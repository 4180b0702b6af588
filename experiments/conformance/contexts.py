"""The longest context of PaLM-540B that still compiles into the memory of 64 TPU v4 chips, beside Table 1.

  python experiments/conformance/contexts.py

Decode in bf16, weights 2D, found by bisection in steps of 128 tokens. Table 1 of 2211.05102 keeps 30 % of the
memory for keys and values; a compiled program has all that weights and temporaries leave. Writes contexts.md
beside this file. Needs the extra `tpu`. About 6 minutes on one core.
"""

import pathlib

from llmarch.analysis import compile as ahead

VARIANTS = {  # the paper's name: (query heads' width, key-value heads, attention), contexts at batch 128 and 512
  "multihead": ((128, 64, "heads"), (1320, 330)),
  "multiquery, over heads": ((256, 1, "heads"), (660, 165)),
  "multiquery, over batch": ((256, 1, "batch_xyz"), (43000, 10700)),
}


def longest(head_dim: int, kv_heads: int, attention: str, batch: int) -> int:
  from llmarch.commands.common import load_config

  changes = {f"model.precision.{what}": "bfloat16" for what in ("param", "compute", "state")}
  changes |= {"model.blocks.layer.mixer.num_kv_heads": str(kv_heads)}
  changes |= {"model.blocks.layer.mixer.head_dim": str(head_dim), "model.max_seq_len": "1000000"}
  layout = f"ws_2d+{attention}"
  cell = ahead.Cell(
    topology="v4:4x4x4", phase="decode", batch=batch, context=1, prefill_layout=layout, decode_layout=layout
  )
  return ahead.longest_context(load_config("palm_540b_padded", list(changes.items())), cell)[0]


def page(found: dict) -> str:
  lines = [
    *__doc__.splitlines()[0:1],
    "",
    "Made by `python experiments/conformance/contexts.py`: bf16, steps of 128 tokens, compiled and not executed.",
    "The table keeps 30 % of 32 GiB for keys and values; a program has what weights and temporaries leave.",
    "",
    "| attention | batch | compiled | Table 1 |",
    "|---|---|---|---|",
  ]
  lines += [f"| {name} | {batch} | {ours:,} | {table:,} |" for (name, batch), (ours, table) in found.items()]
  return "# " + "\n".join(lines) + "\n"


def main():
  ahead.prepare()
  found = {}
  for i, batch in enumerate((128, 512)):
    for name, (variant, table) in VARIANTS.items():
      found[name, batch] = longest(*variant, batch), table[i]
      print(name, batch, *found[name, batch], flush=True)
  (pathlib.Path(__file__).parent / "contexts.md").write_text(page(found))


if __name__ == "__main__":
  main()
