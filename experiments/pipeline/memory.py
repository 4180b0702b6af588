"""What a pipeline keeps for its backward pass, against its microbatches, from compiled train steps.

  python experiments/pipeline/memory.py

Compiles train steps of one small model for four stages (fake devices on the CPU), executes nothing, and writes
README.md beside this file. About 3 minutes on one core.
"""

import pathlib

from llmarch.config import BlockConfig, ModelConfig
from llmarch.layers.attention import AttentionConfig
from llmarch.layers.ffn import MLPConfig
from llmarch.layers.norm import RMSNorm
from llmarch.layers.position import RoPE
from llmarch.run_config import RunConfig, TrainConfig

HERE = pathlib.Path(__file__).parent
STAGES, ROWS, LENGTH = 4, 32, 256
FORMS = [(circuits, remat) for circuits in (1, 2) for remat in ("none", "full")]
BLOCK = BlockConfig(
  mixer=AttentionConfig(num_heads=8, num_kv_heads=4, position=RoPE()), ffn=MLPConfig(d_ff=640), norm=RMSNorm()
)
MODEL = ModelConfig(
  d_model=256, vocab_size=512, max_seq_len=LENGTH, stack="16*layer", blocks={"layer": BLOCK}, final_norm=RMSNorm()
)


def temporaries(mesh: str, **train) -> float:
  """MiB of one device that a train step holds at its worst moment, besides its state and batch."""
  import jax

  from llmarch.sharding import device_mesh
  from llmarch.train.step import make_train_step

  config = RunConfig(model=MODEL, mesh=mesh, train=TrainConfig(batch_size=ROWS, seq_len=LENGTH, **train))
  functions = make_train_step(config, device_mesh(mesh))
  rows = lambda dtype: jax.ShapeDtypeStruct((ROWS, LENGTH), dtype, sharding=functions.batch_sharding)
  batch = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), rows("int32"))
  step = functions.step.lower(functions.abstract_state, {**batch, "loss_weights": rows("float32")}).compile()
  return step.memory_analysis().temp_size_in_bytes / 2**20


def page(table: list[tuple]) -> str:
  names = [f"{'GPipe' if V == 1 else f'circular, V={V}'}, remat {remat}" for V, remat in FORMS]
  lines = [
    "# What a pipeline keeps, against its microbatches",
    "",
    "Made by `python experiments/pipeline/memory.py`; nothing was executed. MiB of temporaries on one device, as XLA's",
    f"CPU backend lays out a train step of {ROWS} rows of {LENGTH} tokens, in f32, through {MODEL.stack} of width"
    f" {MODEL.d_model} over {STAGES}",
    "stages. The bubble is (S - 1) / (V M + S - 1) of the ticks. With data=4 instead of the stages, a step holds",
    f"{table[0][0]:.0f} MiB without remat and {table[0][1]:.0f} with.",
    "",
    "| microbatches | rows of each | " + " | ".join(names) + " | bubble, V=1 | V=2 |",
    "|" + "---:|" * (4 + len(names)),
  ]
  for M, *numbers in table[1:]:
    bubbles = [(STAGES - 1) / (V * M + STAGES - 1) for V in (1, 2)]
    cells = [str(M), str(ROWS // M), *(f"{n:.0f}" for n in numbers), *(f"{b:.0%}" for b in bubbles)]
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines) + "\n"


def main():
  table = [tuple(temporaries(f"data={STAGES}", remat=remat) for remat in ("none", "full"))]
  for M in (4, 8, 16, 32):
    each = (temporaries(f"stage={STAGES}", microbatches=M, circuits=V, remat=remat) for V, remat in FORMS)
    table.append((M, *each))
  (HERE / "README.md").write_text(page(table))
  print(page(table))


if __name__ == "__main__":
  main()
