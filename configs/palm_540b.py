"""PaLM 540B for inference on 64 TPU v4 chips, in the layouts of "Efficiently Scaling Transformer Inference".

The heads are padded from 48 to 64, as the paper does (2211.05102): 558,173,878,272 parameters in bfloat16. A layout is
a flag, because a prefill and a decode over the same stored weights take different ones (docs/serve_and_quantise.md):

  low latency       64 rows, int8     decode   ws_2d+batch_xyz
  high throughput   512 rows, bf16    prefill  wg_xyz+batch_xyz

Expected: the paper's 28.5 ms a decode step of 64 rows in int8; compiled here, not executed.
Cost: 1.17 TFLOP a chip in a decode step of 64 rows, 4,599 in a prefill of 512 x 512 tokens (compiled).
Memory: 9.1 GiB of 30.8 in this decode, and 29.7 GiB in this prefill (compiled).
Command: llmarch compile --config=configs/palm_540b.py --topology=v4:4x4x4 --phase=decode --weights=int8 --layout.decode=ws_2d+batch_xyz
         llmarch compile --config=configs/palm_540b.py --topology=v4:4x4x4 --phase=prefill --batch=512 --chunk=512 --layout.prefill=wg_xyz+batch_xyz
         llmarch plan --model=palm_540b_padded --hardware=tpu_v4 --chips=64 --batch=64 --weights=int8
"""  # noqa: E501

from ml_collections import ConfigDict

from llmarch.build import to_dict
from llmarch.presets import PRESETS


def get_config() -> ConfigDict:
  model = to_dict(PRESETS["palm_540b_padded"]())
  model["precision"] |= {"param": "bfloat16", "compute": "bfloat16", "state": "bfloat16"}
  return ConfigDict({"model": model})
