"""Files of safetensors and of JSON, read with checks: what is damaged is a sentence that names the file."""

import dataclasses
import json
import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from llmarch.errors import UserError, check

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The dtypes of codes, and of what stands beside them, can be read but are not those of parameters.
OF_CODES = {"U8": np.dtype(np.uint8), "I8": np.dtype(np.int8), "I32": np.dtype(np.int32), "I64": np.dtype(np.int64)}
OF_CODES |= {"F8_E4M3": np.dtype(jnp.float8_e4m3fn), "F8_E8M0": np.dtype(jnp.float8_e8m0fnu)}
ITEM_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "U16": 16, "I16": 16, "F16": 16}
ITEM_BITS |= {"BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64}
MAX_HEADER = 100 << 20  # bytes; safetensors has the same limit


@dataclasses.dataclass(frozen=True)
class Tensor:
  """The place of a tensor in a file, with its dtype and shape."""

  file: Path
  name: str
  dtype: str  # one of safetensors' names
  shape: tuple[int, ...]
  start: int  # the tensor's first byte in the file

  def __str__(self) -> str:
    return f"{self.file}: {self.name}"

  def read(self, *index: int) -> np.ndarray:
    """Reads the tensor, or its part at an index of leading dimensions. Raises UserError if a value is not finite."""
    values = np.empty(self.shape[len(index) :], (DTYPES | OF_CODES)[self.dtype])
    before = int(np.ravel_multi_index(index, self.shape[: len(index)])) if index else 0
    with open(self.file, "rb") as f:
      f.seek(self.start + before * values.nbytes)
      got = f.readinto(values.reshape(-1).view(np.uint8))
    check(got == values.nbytes, f"{self} is cut off; restore the file")
    check(np.isfinite(values).all(), f"{self} holds values that are not finite; restore the file")
    return values


def read_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
  """Reads the tensors of a safetensors file and its metadata. Raises UserError unless the file is sound to its end."""
  try:
    with open(path, "rb") as f:
      size = os.fstat(f.fileno()).st_size
      length = int.from_bytes(f.read(8), "little")
      check(8 <= size and length <= min(size - 8, MAX_HEADER), f"{path} is cut off or no safetensors; restore it")
      header = json.loads(f.read(length), object_pairs_hook=_no_twins)
  except OSError as e:
    raise UserError(f"cannot read {path} ({e.strerror}); restore it") from None
  except (ValueError, RecursionError) as e:
    reason = str(e) if isinstance(e, _Twins) else "its header is not JSON"
    raise UserError(f"{path} is damaged: {reason}; restore it") from None
  check(isinstance(header, dict), f"{path} is damaged: its header is no dict; restore it")
  metadata = header.pop("__metadata__", {})
  check(isinstance(metadata, dict), f"{path} is damaged: its metadata is no dict; restore it")
  tensors, spans = {}, []
  for name, entry in header.items():
    tensors[name], span = _tensor(path, name, entry, 8 + length)
    spans.append((*span, name))
  end = 0
  for start, stop, name in sorted(spans):
    check(start == end, f"{path}: {name} does not begin where the tensor before it ends; restore the file")
    end = stop
  check(end == size - 8 - length, f"{path} is cut off or has bytes to spare: {end} of tensors, not"
        f" {size - 8 - length}; restore it")  # fmt: skip
  return tensors, metadata


def _tensor(path: Path, name: str, entry, base: int) -> tuple[Tensor, tuple[int, int]]:
  fault = f"{path}: {name} has a damaged entry in the header; restore the file"
  check(isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}, fault)
  dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
  check(isinstance(shape, list) and isinstance(span, list) and len(span) == 2, fault)
  check(all(type(n) is int and n >= 0 for n in shape + span), fault)
  check(isinstance(dtype, str) and dtype in ITEM_BITS, f"{path}: {name} has the dtype {dtype!r}, which is unknown")
  size = math.prod(shape) * ITEM_BITS[dtype] // 8
  check(span[1] - span[0] == size, f"{path}: {name} of {dtype} {shape} has {span[1] - span[0]} bytes, not {size}")
  return Tensor(path, name, dtype, tuple(shape), base + span[0]), (span[0], span[1])


class _Twins(ValueError):
  pass


def _no_twins(pairs: list[tuple]) -> dict:
  found = {}
  for name, value in pairs:
    if name in found:
      raise _Twins(f"{name!r} is there twice")
    found[name] = value
  return found


def write_safetensors(
  path: Path,
  entries: dict[str, tuple[np.dtype, tuple[int, ...]]],
  array: Callable[[str], np.ndarray],
  *,
  metadata: dict[str, str] | None = None,
  checksums: bool = False,
) -> None:
  """Writes the tensors one after another; `array(name)` gives each in turn, and only one is held at a time.

  checksums: puts the crc32 of each tensor into the metadata, as LM.save does. They are known only at the end, so the
  header is written twice, with the same length.
  """
  header, end = {}, 0
  for name, (dtype, shape) in entries.items():
    start, end = end, end + math.prod(shape) * dtype.itemsize
    header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
  sums = dict.fromkeys(entries, 2**32 - 1)  # the longest number, as a placeholder

  def header_text() -> bytes:
    crc = {"crc32": json.dumps(sums)} if checksums else {}
    return json.dumps({"__metadata__": (metadata or {}) | crc} | header).encode()

  length = -(-len(header_text()) // 8) * 8
  with open(path, "wb") as f:
    f.write(length.to_bytes(8, "little") + header_text().ljust(length))
    for name, (dtype, shape) in entries.items():
      values = np.ascontiguousarray(array(name))
      assert (values.dtype, values.shape) == (dtype, shape), name
      data = values.reshape(-1).view(np.uint8)
      f.write(data)
      sums[name] = zlib.crc32(data)
    if checksums:
      f.seek(8)
      f.write(header_text().ljust(length))


def read_json(path: Path) -> dict:
  """Reads a JSON file that holds a dict without a key twice. Raises UserError if it is anything else."""
  check(path.is_file() or not path.exists(), f"{path} is no file; restore it")  # reading a pipe would never end
  try:
    data = json.loads(path.read_text(), object_pairs_hook=_no_twins)
  except OSError as e:
    raise UserError(f"cannot read {path} ({e.strerror}); give a folder of transformers") from None
  except (ValueError, RecursionError) as e:
    raise UserError(f"{path} is not JSON ({e}); restore it") from None
  check(isinstance(data, dict), f"{path} must hold a dict")
  return data
