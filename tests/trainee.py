"""A tiny run that starts quickly, faults to befall it, and a server that forks it: `python tests/trainee.py`.

The server has imported everything and started nothing: what it forks is a fresh process half a second before its
first step. It reads JSON lines: {"run": WORKDIR, "fault": {...}, "cores": n} answers {"pid": n}; {"wait": pid}
answers {"code": n}.
"""

import contextlib
import json
import os
import resource
import signal
import sys
import time

import numpy as np

from llmarch.config import BlockConfig, ModelConfig
from llmarch.errors import UserError
from llmarch.layers.attention import AttentionConfig
from llmarch.layers.ffn import MLPConfig
from llmarch.layers.norm import RMSNorm
from llmarch.layers.position import RoPE
from llmarch.run_config import (
  AdamW,
  CheckpointConfig,
  Cosine,
  EvalConfig,
  OptimizerConfig,
  RunConfig,
  TrainConfig,
)
from llmarch.train import loop

B, T, V = 4, 7, 32


@contextlib.contextmanager
def no_file_above(size):
  """Writing past `size` fails, as on a full disk (EFBIG; Python ignores the signal)."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def block(**mixer):
  mixer = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "position": RoPE()} | mixer
  return BlockConfig(mixer=AttentionConfig(**mixer), ffn=MLPConfig(d_ff=24), norm=RMSNorm(), dropout=0.1)


MODEL = ModelConfig(
  d_model=8, vocab_size=V, max_seq_len=T, stack="2*layer", blocks={"layer": block()}, final_norm=RMSNorm()
)


def experiment(*, every=2, keep=2, eval_every=0, model=MODEL, learning_rate=3e-3, **train) -> RunConfig:
  return RunConfig(
    model=model,
    train=TrainConfig(**({"steps": 20, "batch_size": B, "seq_len": T, "loss_chunk": T, "log_every": 1} | train)),
    optimizer=OptimizerConfig(algorithm=AdamW(), learning_rate=learning_rate, schedule=Cosine(warmup=3)),
    eval=EvalConfig(every=eval_every, batches=2),
    checkpoint=CheckpointConfig(every=every, max_to_keep=keep),
  )


class Data:
  """Batches as a pure function of the index; a rule that is quickly learned, and for `bad` indices noise."""

  bytes_per_token, num_bytes, num_tokens = 2.0, 1, 1

  def __init__(self, bad=(), name="data"):
    self.bad, self.hash, self.read = set(bad), name, []

  def batch(self, index):
    rng = np.random.default_rng(index)
    first = rng.integers(0, V, (B, 1))
    tokens = ((first + np.arange(T + 1)) % V).astype(np.int32)
    targets = rng.integers(0, V, (B, T)).astype(np.int32) if index in self.bad else tokens[:, 1:]
    return {
      "tokens": tokens[:, :-1],
      "targets": targets,
      "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
      "segment_ids": np.zeros((B, T), np.int32),
      "loss_weights": (rng.random((B, T)) < 0.8).astype(np.float32),
    }

  def iterate(self, index):
    while True:
      self.read.append(index)
      yield self.batch(index)
      index += 1


class Faulty(Data):
  """Data, slowly (`pace` seconds a batch), whose reader does something to its process before it gives batch `at`."""

  def __init__(self, what: str, at: int, pace: float = 0.0):
    super().__init__()
    self.what, self.at, self.pace = what, at, pace

  def iterate(self, index):
    for i, batch in enumerate(super().iterate(index), index):
      time.sleep(self.pace)
      if i == self.at:
        fault(self.what)
      yield batch


def fault(what: str) -> None:
  import ctypes

  if what == "stuck":
    time.sleep(1000)
  elif what == "gil":  # PyDLL keeps the lock of the interpreter while it sleeps
    ctypes.PyDLL(None).sleep(1000)
  elif what == "stopped by itself":
    os.kill(os.getpid(), signal.SIGTERM)
  elif what == "error":
    raise RuntimeError("the loader broke")


def run(config, workdir, data=None, eval_data=None, mesh=None):
  data = data or Data()
  return loop.train(
    config, str(workdir), data, eval_data or Data(), mesh=mesh, sample=None, flops_per_token=1.0, peak_flops=None
  )


def serve() -> None:
  for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
      status = os.waitpid(order["wait"], 0)[1]
      answer = {"code": os.waitstatus_to_exitcode(status)}
    else:
      pid = os.fork()
      if not pid:
        os._exit(child(order))
      answer = {"pid": pid}
    print(json.dumps(answer), flush=True)


def child(order: dict) -> int:
  log = os.open(order["run"] + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  os.dup2(log, 1)
  os.dup2(log, 2)
  if "cores" in order:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: order["cores"]])
  loop.BEGAN = time.time()
  config = experiment(**order.get("config", {}))
  data = Faulty(**order["fault"]) if "fault" in order else Data()
  try:
    run(config, order["run"], data)
    return 0
  except UserError as e:
    print(f"llmarch: {e}", flush=True)
    return e.exit_code
  except BaseException:
    import traceback

    traceback.print_exc()
    return 1


if __name__ == "__main__":
  import jax  # noqa: F401  all that the first step will import
  import tensorboardX  # noqa: F401

  serve()
