"""Releases whose weights are codes: folders packed here from each format's definition are read as their numbers.

The packers of this file share nothing with the decoders; transformers and compressed-tensors decode the same folders
where they are installed.
"""

import importlib.util
import json
import math
import pathlib
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from test_checkpoints import DEEPSEEK, assert_same, params_of, put, written
from test_convert import TINY, needs_peer
from tiers import plain_if

import llmarch
from llmarch.__main__ import main
from llmarch.convert import hf
from llmarch.convert import packed as packed_module
from llmarch.convert.packed import Coding, Packed
from llmarch.errors import UserError

FP8, E8M0, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu, ml_dtypes.bfloat16
NAMES = {
  np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(BF16): "BF16", np.dtype(FP8): "F8_E4M3",
  np.dtype(E8M0): "F8_E8M0", np.dtype(np.uint8): "U8", np.dtype(np.int8): "I8", np.dtype(np.int32): "I32",
  np.dtype(np.int64): "I64",
}  # fmt: skip
# All sides of its matrices differ, and groups of 32 do not divide the 80 columns of down_proj.
LLAMA = TINY | dict(hidden_size=64, intermediate_size=80, head_dim=16, num_hidden_layers=2)


def save(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
  """Writes safetensors: the length of the header, the header, the values."""
  header, end = {}, 0
  for name, value in tensors.items():
    header[name] = {"dtype": NAMES[value.dtype], "shape": value.shape, "data_offsets": [end, end + value.nbytes]}
    end += value.nbytes
  text = json.dumps(header).encode()
  values = b"".join(np.ascontiguousarray(value).tobytes() for value in tensors.values())
  path.write_bytes(len(text).to_bytes(8, "little") + text + values)


def rng(name: str) -> np.random.Generator:
  return np.random.default_rng(list(name.encode()))


def words(codes: np.ndarray, bits: int) -> np.ndarray:
  """Packs each row of codes [R, C] into 32-bit words, code after code from the lowest bit on."""
  packed = np.zeros((len(codes), -(-codes.shape[1] * bits // 32)), np.uint32)
  for i in range(codes.shape[1]):
    packed[:, i * bits // 32] |= codes[:, i].astype(np.uint32) << np.uint32(i * bits % 32)
  return packed.view(np.int32)


# --------------------------------------------------------------------------------------------- packers of each form


def fp8_blocks(name: str, weight: np.ndarray, rows=128, columns=128, ending="_scale_inv", kind=np.float32):
  """DeepSeek: one scale a block, also for the smaller blocks at the ends."""
  grid = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
  codes, scale, values = np.empty(weight.shape, FP8), np.empty(grid, np.float32), np.empty_like(weight)
  for r in range(grid[0]):
    for c in range(grid[1]):
      block = slice(r * rows, (r + 1) * rows), slice(c * columns, (c + 1) * columns)
      scale[r, c] = np.abs(weight[block]).max() / 448
      if kind is E8M0:
        scale[r, c] = 2.0 ** math.ceil(math.log2(scale[r, c]))
      codes[block] = (weight[block] / scale[r, c]).astype(FP8)
      values[block] = codes[block].astype(np.float32) * scale[r, c]
  return {name: codes, name + ending: scale.astype(kind)}, values


def fp8_tensor(name: str, weight: np.ndarray, ending: str = "_scale_inv"):
  scale = np.float32(np.abs(weight).max() / 448)
  codes = (weight / scale).astype(FP8)
  unused = {name.removesuffix("weight") + "activation_scale": np.ones((), np.float32)}
  unused |= {name.removesuffix("weight") + "k_scale": np.ones(1, np.float32)}
  return {name: codes, name + ending: np.array(scale).astype(BF16)} | unused, codes.astype(np.float32) * np.float32(
    scale.astype(BF16)
  )


def e2m1(code: int) -> float:
  """The number of 4 bits: sign, two bits of exponent, one of mantissa; without an exponent, it is subnormal."""
  sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
  return (-1) ** sign * (mantissa / 2 if exponent == 0 else 2 ** (exponent - 1) * (1 + mantissa / 2))


def mxfp4_codes(weight: np.ndarray):
  """Codes and exponents of rows in groups of 32, and their values."""
  table = np.array([e2m1(code) for code in range(16)])
  groups = weight.reshape(*weight.shape[:-1], -1, 32)
  exponent = np.floor(np.log2(np.abs(groups).max(-1, keepdims=True))) - 2
  codes = np.abs(groups[..., None] / 2**exponent[..., None] - table).argmin(-1)
  values = (table[codes] * 2**exponent).astype(np.float32).reshape(weight.shape)
  return (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8), (exponent[..., 0] + 127).astype(np.uint8), values


def mxfp4(name: str, weight: np.ndarray):
  """gpt-oss: of the weight [E, in, out], blocks [E, out, in / 32, 16] and scales [E, out, in / 32]."""
  codes, exponents, values = mxfp4_codes(weight.swapaxes(1, 2))
  return {f"{name}_blocks": codes, f"{name}_scales": exponents}, values.swapaxes(1, 2)


def gptq(name: str, weight: np.ndarray, bits=4, group=32, version=1, order=False, given=True):
  out, size = weight.shape
  r, module = rng(name), name.removesuffix("weight")
  groups = np.arange(size) // (group or size)
  groups = r.permutation(groups) if order else groups
  codes, scale = r.integers(0, 2**bits, (out, size)), r.uniform(0.01, 0.1, (groups.max() + 1, out)).astype(np.float16)
  zeros = r.integers(0, 2**bits, scale.shape)
  stored = (zeros - 1) % 2**bits if version == 1 else zeros
  tensors = {"qweight": words(codes, bits).T, "qzeros": words(stored, bits), "scales": scale}
  tensors |= {"g_idx": groups.astype(np.int32)} if given else {}
  if "gate_proj" in name:
    tensors["bias"] = np.zeros(out, np.float16)  # as early releases have it, where the model has no bias
  values = (codes - zeros.T[:, groups]) * scale.T[:, groups].astype(np.float32)
  return {module + key: value for key, value in tensors.items()}, values.astype(np.float32)


def awq(name: str, weight: np.ndarray, group=16):
  """Eight columns share a word, whose nibbles hold columns 0, 2, 4, 6, 1, 3, 5, 7."""
  out, size = weight.shape
  r, module = rng(name), name.removesuffix("weight")
  groups = np.arange(size) // (group or size)
  codes, scale = r.integers(0, 16, (size, out)), r.uniform(0.01, 0.1, (groups.max() + 1, out)).astype(np.float16)
  zeros = r.integers(0, 16, scale.shape)
  mixed = lambda a: a.reshape(len(a), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(a.shape)
  tensors = {"qweight": words(mixed(codes), 4), "qzeros": words(mixed(zeros), 4), "scales": scale}
  values = (codes - zeros[groups]) * scale[groups].astype(np.float32)
  return {module + key: value for key, value in tensors.items()}, values.T.astype(np.float32)


def int8(name: str, weight: np.ndarray, zeros=False):
  r, out = rng(name), len(weight)
  codes, scale = r.integers(-128, 128, weight.shape).astype(np.int8), r.uniform(0.001, 0.01, (out, 1)).astype(BF16)
  zero = r.integers(-128, 128, (out, 1)).astype(np.int8) if zeros else np.zeros((out, 1), np.int8)
  tensors = {name: codes, f"{name}_scale": scale} | ({f"{name}_zero_point": zero} if zeros else {})
  return tensors, (codes.astype(np.float32) - zero) * scale.astype(np.float32)


def fp8_rows(name: str, weight: np.ndarray):
  return fp8_blocks(name, weight, 1, weight.shape[1], "_scale")


def packed(name: str, weight: np.ndarray, bits=4, group=16, zeros=False, order=False):
  """compressed-tensors: numbers from -2^(bits - 1) on are stored plus 2^(bits - 1); zero points, along the rows."""
  out, size = weight.shape
  r, half = rng(name), 2 ** (bits - 1)
  groups = np.arange(size) // (group or size)
  groups = r.permutation(groups) if order else groups
  codes, scale = r.integers(-half, half, (out, size)), r.uniform(0.01, 0.1, (out, groups.max() + 1)).astype(BF16)
  zero = r.integers(-half, half, scale.shape) if zeros else np.zeros(scale.shape, int)
  tensors = {"packed": words(codes + half, bits), "scale": scale, "shape": np.array(weight.shape, np.int64)}
  tensors |= {"zero_point": words((zero + half).T, bits).T} if zeros else {}
  tensors |= {"g_idx": groups.astype(np.int32)} if order else {}
  values = (codes - zero[:, groups]) * scale[:, groups].astype(np.float32)
  return {f"{name}_{key}": value for key, value in tensors.items()}, values.astype(np.float32)


def mxfp4_packed(name: str, weight: np.ndarray):
  codes, exponents, values = mxfp4_codes(weight)
  return {f"{name}_packed": codes.reshape(len(weight), -1), f"{name}_scale": exponents}, values


def compressed(format: str, targets=("Linear",), inputs=None, **weights) -> dict:
  weights = {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False} | weights
  group = {"weights": weights, "input_activations": inputs, "output_activations": None, "targets": list(targets)}
  whole = {"quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed"}
  return whole | {"config_groups": {"group_0": group}, "ignore": [r"re:.*layers\.0\.mlp\.down_proj"]}


LISTED = {"modules_to_not_convert": ["layers.0.mlp.down_proj", "model.layers.*.input_layernorm"]}
FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
GPTQ_CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
W8 = {"num_bits": 8, "strategy": "channel"}
GROUPS = {"strategy": "group", "group_size": 16}
EIGHT = {"num_bits": 8, "type": "int", "dynamic": True}

FORMS = {  # (quantization_config, the packer, how a report calls the form)
  "fp8 in uneven blocks": (
    FP8_CONFIG | LISTED | {"weight_block_size": [24, 40]},
    lambda name, w: fp8_blocks(name, w, 24, 40),
    "fp8 (blocks of 24 x 40)",
  ),
  "fp8 with scales of E8M0": (
    FP8_CONFIG | LISTED | {"scale_fmt": "ue8m0"},
    lambda name, w: fp8_blocks(name, w, kind=E8M0),
    "fp8 (blocks of 128 x 128)",
  ),
  "fp8 with one scale": (
    FP8_CONFIG | LISTED | {"weight_block_size": None, "activation_scheme": "static"},
    fp8_tensor,
    "fp8 (a scale for each matrix)",
  ),
  "modelopt": (
    {"quant_algo": "FP8", "producer": {"name": "modelopt"}, "ignore": ["model.layers.0.mlp*"]},
    lambda name, w: fp8_tensor(name, w, "_scale"),
    "fp8 (a scale for each matrix)",
    "layers.0.mlp",
  ),
  "gptq": (GPTQ_CONFIG, gptq, "4-bit gptq (groups of 32)"),
  "gptq in the order of activations, 8 bits, v2": (
    GPTQ_CONFIG | {"bits": 8, "group_size": 16, "desc_act": True, "checkpoint_format": "gptq_v2"},
    lambda name, w: gptq(name, w, 8, 16, 2, order=True),
    "8-bit gptq (groups of 16)",
  ),
  "gptq without groups, 2 bits": (
    GPTQ_CONFIG | {"bits": 2, "group_size": -1},
    lambda name, w: gptq(name, w, 2, 0, given=False),
    "2-bit gptq (a scale for each row)",
  ),
  "awq": (AWQ_CONFIG | LISTED, awq, "4-bit awq (groups of 16)"),
  "w8a8 int8": (compressed("int-quantized", inputs=EIGHT, **W8), int8, "int8 (a scale for each row)"),
  "w8a8 int8 with zero points": (
    compressed("int-quantized", symmetric=False, **W8),
    lambda name, w: int8(name, w, True),
    "int8 (a scale for each row)",
  ),
  "w8a8 fp8": (
    compressed("naive-quantized", inputs=EIGHT | {"type": "float"}, **W8 | {"type": "float"}),
    fp8_rows,
    "fp8 (a scale for each row)",
  ),
  "w4a16": (compressed("pack-quantized", **GROUPS), packed, "packed int4 (groups of 16)"),
  "w4a16 with zero points, in the order of activations": (
    compressed("pack-quantized", ["re:.*_proj"], symmetric=False, actorder="group", **GROUPS),
    lambda name, w: packed(name, w, zeros=True, order=True),
    "packed int4 (groups of 16)",
  ),
  "w8a16 by rows": (
    compressed("pack-quantized", **W8), lambda name, w: packed(name, w, 8, 0), "packed int8 (a scale for each row)"
  ),
  "mxfp4 of compressed-tensors": (
    compressed("mxfp4-pack-quantized", type="float", **GROUPS | {"group_size": 32}),
    mxfp4_packed, "mxfp4 (groups of 32)", "down_proj",
  ),
}  # fmt: skip


def make(folder: pathlib.Path, options: dict, config: dict, pack, *, coded, dtype="bfloat16", more=None):
  """Writes `packed` with its matrices of codes, and `plain` with the numbers that they stand for.

  coded(name): true for a matrix of codes. more: further tensors of the packed folder, which are packed alike. Returns
  the packed folder and the number of matrices of the decoder that are codes.
  """
  folder.mkdir(exist_ok=True)
  theirs = written(folder / "plain", options)
  cast = lambda name, value: value if name.endswith("score_correction_bias") else value.astype(TO[dtype])
  numbers, packed = {}, {}
  for name, value in (theirs | (more or {})).items():
    tensors, values = pack(name, value) if coded(name) else ({name: cast(name, value)}, value)
    packed |= tensors
    numbers |= {name: cast(name, values)} if name in theirs else {}
  put(folder / "plain" / hf.SINGLE, numbers)
  (folder / "packed").mkdir()
  (folder / "packed" / "config.json").write_text(json.dumps(options | {"dtype": dtype, "quantization_config": config}))
  save(folder / "packed" / hf.SINGLE, packed)
  return folder / "packed", sum(map(coded, theirs))


TO = {"bfloat16": BF16, "float32": np.float32}


def projections(*plain: str):
  """True for the matrices whose name has none of these words."""
  return lambda name: name.endswith("_proj.weight") and not any(word in name for word in plain)


IN_PLAIN = ("fp8 in uneven blocks", "gptq", "awq", "w8a8 int8 with zero points")


@pytest.mark.parametrize("form", plain_if(IN_PLAIN.__contains__, FORMS))
def test_a_folder_of_codes_is_read_as_its_numbers(form, tmp_path):
  config, pack, said, *plain = FORMS[form]
  folder, count = make(tmp_path, LLAMA, config, pack, coded=projections(*plain or ["layers.0.mlp.down_proj"]))
  assert_same(params_of(folder), params_of(tmp_path / "plain"))
  notes = hf.Checkpoint(folder).notes
  assert notes["decoded"] == f"{count} x {said}, to bfloat16"
  activations = config.get("activation_scheme") or "producer" in config or "'input_activations': {" in str(config)
  assert ("activations" in notes) == bool(activations)


# ------------------------------------------------------------------------------------------------- whole releases


SPARSE = DEEPSEEK | dict(
  hidden_size=136, intermediate_size=200, moe_intermediate_size=132, q_lora_rank=130, kv_lora_rank=144,
  num_hidden_layers=2, num_nextn_predict_layers=1,
)  # fmt: skip
OSS = TINY | dict(
  model_type="gpt_oss", hidden_size=64, intermediate_size=96, num_local_experts=3, num_experts_per_tok=2, head_dim=8,
  num_hidden_layers=2, sliding_window=5,
)  # fmt: skip
OSS_PLAIN = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
OSS_CONFIG = {"quant_method": "mxfp4", "modules_to_not_convert": OSS_PLAIN}


def logits_of(folder: pathlib.Path, ids: list[int]) -> np.ndarray:
  """The logits [T, V] of transformers, which decodes codes itself, in f32."""
  import torch
  from transformers import AutoModelForCausalLM

  torch.set_num_threads(1)
  model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
  with torch.no_grad():
    return model(torch.tensor([ids]), use_cache=False).logits[0].float().numpy()


def assert_same_logits(folder: pathlib.Path, peer: pathlib.Path) -> None:
  """llmarch on one folder, transformers on another."""
  ids = list(map(int, rng("ids").integers(0, 31, 17)))
  got, want = np.asarray(llmarch.load(folder).logits([ids]))[0], logits_of(peer, ids)
  assert np.abs(got - want).max() <= 1e-5 * np.std(want)


@needs_peer
@pytest.mark.full
def test_deepseek_v3_in_fp8_has_the_logits_of_its_numbers(tmp_path):
  """Blocks are cut off at both ends of each matrix, and a layer that predicts further ahead is left out."""
  coded = projections()
  last = "model.layers.2"
  more = {f"{last}.eh_proj.weight": np.ones((136, 272), np.float32), f"{last}.enorm.weight": np.ones(136, np.float32)}
  more |= {f"{last}.mlp.experts.0.up_proj.weight": np.ones((132, 136), np.float32)}
  folder, count = make(tmp_path, SPARSE, FP8_CONFIG, fp8_blocks, coded=coded, dtype="float32", more=more)
  assert hf.Checkpoint(folder).notes == {
    "decoded": f"{count} x fp8 (blocks of 128 x 128), to float32",
    "activations": "are not rounded here; the release rounds them (fp8, dynamic)",
    "left out": "layers.2",
  }
  assert_same_logits(folder, tmp_path / "plain")


@needs_peer
@pytest.mark.full
def test_fp8_and_mxfp4_are_decoded_as_transformers_decodes_them(tmp_path):
  """transformers reads the very folders of codes; its blocks must divide each matrix."""
  import torch
  from transformers.integrations.finegrained_fp8 import Fp8Dequantize
  from transformers.integrations.mxfp4 import convert_moe_packed_tensors

  sizes = {"kv_lora_rank": 16, "hidden_size": 24}
  small = SPARSE | sizes | dict(q_lora_rank=12, intermediate_size=40, moe_intermediate_size=20)
  config = FP8_CONFIG | {"weight_block_size": [2, 4]}
  pack = lambda name, w: fp8_blocks(name, w, 2, 4)
  cases = {
    "deepseek": (small | {"num_nextn_predict_layers": 0}, config, pack, projections()),
    "gpt-oss": (OSS, OSS_CONFIG, mxfp4, lambda name: name.endswith(("up_proj", "down_proj"))),
  }
  for case, (options, config, pack, coded) in cases.items():
    folder, _ = make(tmp_path / case, options, config, pack, coded=coded, dtype="float32")
    assert_same_logits(folder, folder)
    decoded = {name: t for name, t in hf.Checkpoint(folder).tensors.items() if isinstance(t, Packed)}
    for tensor in decoded.values():
      codes, scale = (torch.from_numpy(tensor.parts[role].read().view(np.uint8)) for role in ("codes", "scale"))
      if case == "gpt-oss":
        want = convert_moe_packed_tensors(codes, scale, dtype=torch.float32)
      else:
        scale = torch.from_numpy(tensor.parts["scale"].read())
        want = Fp8Dequantize(None)._dequantize_one(codes.view(torch.float8_e4m3fn), scale, torch.float32)
      np.testing.assert_array_equal(tensor.read(), want.numpy())


@pytest.mark.skipif(
  importlib.util.find_spec("compressed_tensors") is None or importlib.util.find_spec("torch") is None,
  reason="compressed-tensors is absent: its own packer was not compared",
)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("format", ["pack-quantized", "int-quantized", "float-quantized"])
def test_the_packer_of_compressed_tensors_is_read_as_it_reads_itself(format, symmetric, tmp_path):
  import torch
  from compressed_tensors.compressors import BaseCompressor
  from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

  number = "float" if format.startswith("float") else "int"
  if number == "float" and not symmetric:
    pytest.skip("fp8 has no zero points")
  bits, group = (4, {"strategy": "group", "group_size": 16}) if "pack" in format else (8, {"strategy": "channel"})
  args = QuantizationArgs(num_bits=bits, type=number, symmetric=symmetric, **group)
  torch.manual_seed(0)
  weight = torch.randn(40, 48)
  groups = weight.reshape(40, -1, 16 if "pack" in format else 48)
  low, high = groups.amin(-1), groups.amax(-1)
  top = 448 if number == "float" else 2 ** (bits - 1) - 1
  scale = ((high - low) / (2**bits - 1) if not symmetric else groups.abs().amax(-1) / top).to(torch.bfloat16)
  state = {"weight": weight.to(torch.bfloat16), "weight_scale": scale}
  zero = torch.clamp(torch.round(-(2 ** (bits - 1)) - low / scale.float()), -(2 ** (bits - 1)), top)
  state |= {} if symmetric else {"weight_zero_point": zero.to(torch.int8)}
  packer, scheme = BaseCompressor.get_value_from_registry(format), QuantizationScheme(targets=["Linear"], weights=args)
  stored = packer.compress(state, scheme)
  want = packer.decompress(stored, scheme)["weight"].to(torch.bfloat16)
  as_numpy = lambda t: t.view(torch.uint16).numpy().view(BF16) if t.dtype == torch.bfloat16 else (
    t.view(torch.uint8).numpy().view(FP8) if t.dtype == torch.float8_e4m3fn else t.numpy())  # fmt: skip
  save(tmp_path / hf.SINGLE, {f"mlp.{name}": as_numpy(value) for name, value in stored.items()})
  coding = Coding.of(compressed(format, **json.loads(args.model_dump_json(exclude_none=True))))
  (tensor,) = coding.decoded(hf.read_header(tmp_path / hf.SINGLE)[0], "bfloat16").values()
  assert tensor.name == "mlp.weight"
  np.testing.assert_array_equal(tensor.read().astype(np.float32), want.float().numpy())


# --------------------------------------------------------------------------------------- what is refused, and how much


Q = "model.layers.1.self_attn.q_proj"
DAMAGES = {  # (form, what is changed in the tensors, the sentence)
  "a missing scale": (
    "fp8 in uneven blocks", {f"{Q}.weight_scale_inv": None}, "needs .*q_proj.weight_scale_inv, which is missing"),
  "missing codes": ("w8a8 int8", {f"{Q}.weight": None}, "needs .*q_proj.weight, which is missing"),
  "a missing word": ("w4a16", {f"{Q}.weight_shape": None}, "needs .*weight_shape, which is missing"),
  "missing zero points": (
    "w8a8 int8 with zero points", {f"{Q}.weight_zero_point": None}, "needs .*weight_zero_point, which is missing"),
  "a missing order": (
    "gptq in the order of activations, 8 bits, v2", {f"{Q}.g_idx": None}, "needs .*g_idx, which is missing"),
  "a scale of a wrong shape": (
    "fp8 in uneven blocks", {f"{Q}.weight_scale_inv": np.ones((2, 4), np.float32)},
    r"weight_scale_inv has the shape \[2, 4\].*needs \[4, 2\]"),
  "a scale of a wrong dtype": (
    "awq", {f"{Q}.scales": np.ones((4, 96), np.int32)}, "scales has the dtype I32, which must be F32"),
  "codes of a wrong dtype": (
    "fp8 in uneven blocks", {f"{Q}.weight": np.ones((96, 64), np.int8)}, "dtype I8, which must be F8_E4M3"),
  "a scale that is not finite": (
    "fp8 in uneven blocks", {f"{Q}.weight_scale_inv": np.full((4, 2), np.inf, np.float32)}, "_inv holds .*not finite"),
  "numbers beyond the dtype": (
    "w8a8 int8", {f"{Q}.weight_scale": np.full((96, 1), 3e38, np.float32)}, "q_proj.weight decodes to values that"),
  "a group that is none": (
    "gptq", {f"{Q}.g_idx": np.full(64, 7, np.int32)}, "names groups from 7 to 7, where there are 2"),
  "a shape that the words cannot hold": (
    "w4a16", {f"{Q}.weight_shape": np.array([96, 80])}, r"weight_shape says \[96, 80\]"),
  "codes beside numbers": ("gptq", {f"{Q}.weight": np.ones((96, 64), BF16)}, "which is there as well"),
  "codes of a module that is not converted": (
    "awq", {"model.layers.0.mlp.down_proj.qweight": np.zeros((80, 8), np.int32),
            "model.layers.0.mlp.down_proj.qzeros": np.zeros((5, 8), np.int32),
            "model.layers.0.mlp.down_proj.scales": np.zeros((5, 64), np.float16),
            "model.layers.0.mlp.down_proj.weight": None}, "are said not to be converted"),
  "codes of no rank": ("w4a16", {f"{Q}.weight_packed": np.zeros(8, np.int32)}, "which is none of packed int4"),
  "another matrix": (
    "awq", {f"{Q}.qweight": np.zeros((64, 8), np.int32), f"{Q}.qzeros": np.zeros((4, 8), np.int32),
            f"{Q}.scales": np.zeros((4, 64), np.float16)}, r"has the shape \[64, 64\], not \[96, 64\]"),
}  # fmt: skip


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory):
  """The tensors of a folder in a form, and its config.json."""
  made = {}

  def of(form: str):
    if form not in made:
      config, pack, _ = FORMS[form]
      folder = tmp_path_factory.mktemp("form")
      folder, _ = make(folder, LLAMA, config, pack, coded=projections("layers.0.mlp.down_proj"))
      tensors = {name: t.read() for name, t in hf.read_header(folder / hf.SINGLE)[0].items()}
      made[form] = tensors, (folder / "config.json").read_text()
    return made[form]

  return of


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_of_codes_is_refused_in_a_sentence(damage, packed_folder, tmp_path):
  form, changes, said = DAMAGES[damage]
  tensors, config = packed_folder(form)
  (tmp_path / "config.json").write_text(config)
  save(tmp_path / hf.SINGLE, {n: v for n, v in (tensors | changes).items() if v is not None})
  with pytest.raises(UserError, match=said) as e:
    params_of(tmp_path)
  assert "\n" not in str(e.value)


REFUSED = {
  "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method='bitsandbytes' is not among"),
  "no dict": ("int4", "'int4' must be a dict"),
  "modelopt in nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo='NVFP4' of .*modelopt"),
  "nvfp4": (compressed("nvfp4-pack-quantized", type="float"), "format='nvfp4-pack-quantized' of"),
  "3 bits": (GPTQ_CONFIG | {"bits": 3}, "bits=3 of .* is known with 4, 2, 8"),
  "marlin": (GPTQ_CONFIG | {"checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
  "bits by module": (GPTQ_CONFIG | {"dynamic": {"+:q": {"bits": 8}}}, "dynamic={'[+]:q'.* is not known"),
  "awq for another kernel": (AWQ_CONFIG | {"version": "gemv"}, "version='gemv'"),
  "awq without zero points": (AWQ_CONFIG | {"zero_point": False}, "zero_point=False"),
  "e5m2": (FP8_CONFIG | {"fmt": "e5m2"}, "fmt='e5m2'"),
  "blocks of a number": (FP8_CONFIG | {"weight_block_size": 128}, "weight_block_size=128 .* two whole numbers"),
  "a rotation": (compressed("int-quantized", **W8) | {"transform_config": {"R1": {}}}, "transform_config=.* not known"),
  "sparse": (compressed("int-quantized", **W8) | {"sparsity_config": {"format": "24"}}, "sparsity_config=.* not known"),
  "no group": (compressed("int-quantized", **W8) | {"config_groups": {}}, "must have a group"),
  "a pattern that is none": (compressed("int-quantized", **W8) | {"ignore": ["re:("]}, "which is none"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_form_that_is_not_in_the_table_is_refused_before_a_weight_is_opened(case, tmp_path, capsys):
  config, said = REFUSED[case]
  (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"quantization_config": config}))
  (tmp_path / hf.SINGLE).write_bytes(b"\xff" * 64)
  with pytest.raises(UserError, match=said) as e:
    hf.Checkpoint(tmp_path)
  assert "config.json: quantization_config: " in str(e.value) and "\n" not in str(e.value)


def test_groups_must_divide_the_columns_of_compressed_tensors(tmp_path):
  config = compressed("pack-quantized", **GROUPS | {"group_size": 32})
  folder, _ = make(tmp_path, LLAMA, config, lambda n, w: packed(n, w, group=32), coded=projections("layers.0.mlp.down"))
  with pytest.raises(UserError, match="down_proj.* has 80 columns, no whole number of groups of 32"):
    hf.Checkpoint(folder)


def test_convert_says_what_it_decoded_and_the_way_back_has_no_codes(tmp_path, capsys):
  folder, _ = make(tmp_path, LLAMA, GPTQ_CONFIG, gptq, coded=projections("layers.0.mlp.down_proj"))
  assert main(["convert", f"--from={folder}", f"--to={tmp_path / 'ours'}", "--json"]) == 0
  said = json.loads(capsys.readouterr().out)
  assert (said["dtype"], said["decoded"]) == ("bfloat16", "13 x 4-bit gptq (groups of 32), to bfloat16")
  assert main(["convert", f"--from={tmp_path / 'ours'}", f"--to={tmp_path / 'back'}", "--format=hf"]) == 0
  assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
  assert_same(params_of(tmp_path / "back"), params_of(tmp_path / "plain"))


@pytest.mark.parametrize("form", plain_if(["gptq"].__contains__, ["fp8 with one scale", "gptq", "awq", "w4a16"]))
def test_decoding_holds_one_parameter_and_some_rows(form, tmp_path, monkeypatch):
  """Above the parameter of all layers, at most the codes of one matrix, its numbers, and those that are moved."""
  config, pack, _ = FORMS[form]
  options = LLAMA | dict(hidden_size=512, intermediate_size=1024)
  folder, _ = make(tmp_path, options, config, pack, coded=lambda n: "mlp" in n and "layers.0.mlp.down" not in n)
  monkeypatch.setattr(packed_module, "CHUNK", 1 << 12)
  checkpoint, matrix = hf.Checkpoint(folder), 2 * 512 * 1024
  checkpoint.param("stack/segments/0/blocks/0/ffn/up")
  tracemalloc.start()
  try:
    checkpoint.param("stack/segments/0/blocks/0/ffn/up")
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert peak <= 2 * matrix + 2.1 * matrix, peak / matrix
