"""llmarch convert: a model folder from a checkpoint of transformers, and back.

llmarch convert --from=HF_DIR --to=DIR                config.json and safetensors of transformers -> llmarch
llmarch convert --from=DIR --to=HF_DIR --format=hf    a model folder or a run -> transformers
llmarch convert --from=RUN --to=DIR                   a run -> a model folder; adapters are merged with their base
llmarch convert --from=RUN --to=DIR --format=peft     the adapters of a run (train.lora) -> the package peft

Values are kept bit for bit in the dtype they are stored in; one parameter at a time is in memory.
"""

import json
import zlib
from pathlib import Path

from absl import flags

from llmarch.build import build, to_dict
from llmarch.commands.common import parse_flags, short, short_bytes
from llmarch.config import ModelConfig
from llmarch.errors import UserError, check


def main(argv: list[str]) -> int:
  """Raises UserError for bad flags, a damaged or unknown source, and where --to exists; then nothing is written."""
  options = parse_flags(argv, _define, __doc__, words=("from", "to"))
  source, target = (options[name].value for name in ("from", "to"))
  check(bool(source), "--from is missing; name the folder to read")
  check(bool(target), "--to is missing; name the folder to write")
  check(options.shard_gb > 0, f"--shard_gb must be above 0, got {options.shard_gb}")
  check(
    options.format != "llmarch" or options.model_type is None,
    "--model_type is of no use without --format=hf or --format=peft; drop it",
  )
  source = Path(source).expanduser()
  if options.format == "hf":
    report = export(source, target, options.model_type, round(options.shard_gb * 1e9))
  elif options.format == "peft":
    report = export_adapters(source, target, options.model_type)
  elif (source / "checkpoints").is_dir():
    report = export_run(source, target)
  else:
    report = import_hf(source, target)
  print(json.dumps(report) if options.json else "\n".join(f"{k:12} {v}" for k, v in report.items()))
  return 0


def _define(options: flags.FlagValues) -> None:
  flags.DEFINE_string("from", "", "the folder to read", flag_values=options)
  flags.DEFINE_string("to", "", "the folder to write; must not exist", flag_values=options)
  flags.DEFINE_enum("format", "llmarch", ["llmarch", "hf", "peft"], "what to write", flag_values=options)
  which = "with --format=hf or peft: the family to write (else the one it came from, or that suits)"
  flags.DEFINE_string("model_type", None, which, flag_values=options)
  flags.DEFINE_float("shard_gb", 5.0, "with --format=hf: the most bytes in a file, in 1e9", flag_values=options)
  flags.DEFINE_boolean("json", False, "print JSON", flag_values=options)


def import_hf(source: Path, target: str) -> dict:
  """transformers -> a model folder."""
  from llmarch.convert import hf, safetensors
  from llmarch.infer import lm

  with hf.new_folder(target) as new:
    checkpoint = hf.Checkpoint(source)
    carried = checkpoint.carried | {"model_type": checkpoint.family.model_type}
    data = {"format": lm.FORMAT, "model": to_dict(checkpoint.config), "hf": carried}
    (new / lm.CONFIG).write_text(json.dumps(data, indent=1))
    safetensors.write_safetensors(new / lm.WEIGHTS, checkpoint.entries, checkpoint.param, checksums=True)
    hf.carry(source, new)
    hf.carry(checkpoint.folder, new)
  report = _report(target, checkpoint.family.model_type, checkpoint.config, checkpoint.entries)
  return report | checkpoint.notes


def export(source: Path, target: str, model_type: str | None, shard_bytes: int) -> dict:
  """A model folder or a run -> transformers."""
  from llmarch.convert import hf

  with hf.new_folder(target) as new:
    opened = _open_run(source) if (source / "checkpoints").is_dir() else _open(source)
    config, carried, entries, read, tokenizer, beside = opened
    carried = dict(carried)
    origin = carried.pop("model_type", None)
    model_type = model_type or _still_expressible(origin, config)
    family = hf.write_checkpoint(
      new, config, read, model_type=model_type, carried=carried, shard_bytes=shard_bytes
    )
    if tokenizer:
      tokenizer.save(new)
    if beside:
      hf.carry(beside, new)
  return _report(target, family.model_type, config, entries)


def export_run(source: Path, target: str) -> dict:
  """A training run -> a model folder."""
  import llmarch
  from llmarch.convert import hf

  lm = llmarch.load(source)
  with hf.new_folder(target) as new:
    lm.save(new)
    beside = _base_of_run(source)
    if beside:
      hf.carry(beside, new)
      data = json.loads((new / "config.json").read_text()) | {"hf": _carried(beside)}
      (new / "config.json").write_text(json.dumps(data, indent=1))
  entries = {name: (value.dtype, value.shape) for name, value in lm.arrays().items()}
  return _report(target, "llmarch", lm.config, entries)


def export_adapters(source: Path, target: str, model_type: str | None) -> dict:
  """The adapters of a training run -> the format of the package peft."""
  from llmarch.convert import hf, peft
  from llmarch.train.checkpoint import restore_trained

  check((source / "checkpoints").is_dir(), f"--from: {source} is no training run; give one with train.lora")
  config, params, _ = restore_trained(str(source))
  lora, base = config.train.lora, config.train.init_from
  check(lora is not None, f"--from: {source} trained no adapters (train.lora is none); use --format=hf")
  with hf.new_folder(target) as new:
    model_type = model_type or _still_expressible(_origin(Path(base)), config.model)
    written = peft.write_adapters(new, config.model, lora, params, base, model_type)
  entries = {name: (value.dtype, value.shape) for name, value in params.items()}
  return _report(target, written, config.model, entries) | {"base": base}


def _origin(folder: Path) -> str | None:
  """The model_type of a checkpoint of transformers, or of the one that a model folder came from."""
  try:
    data = json.loads((folder / "config.json").read_text())
  except (OSError, ValueError, RecursionError):
    return None
  return data.get("model_type", data.get("hf", {}).get("model_type"))


def _still_expressible(model_type: str | None, config: ModelConfig) -> str | None:
  """The model_type that a model came from, unless it can no longer say what the model computes."""
  from llmarch.convert import hf

  try:
    return model_type and hf.express(config, model_type)[0].model_type
  except UserError:  # it was changed since
    return None


def _open(source: Path):
  """Opens a model folder: config, carried entries, {path: (dtype, shape)}, a reader, the tokenizer to write (none: the
  folder has it), the folder whose files are carried along."""
  import llmarch.layers.registry  # noqa: F401
  from llmarch.convert import safetensors
  from llmarch.infer import lm

  try:
    data = json.loads((source / lm.CONFIG).read_text())
  except (OSError, ValueError, RecursionError) as e:
    why = getattr(e, "strerror", None) or "not JSON"
    raise UserError(f"--from: cannot read {source / lm.CONFIG} ({why}); give a model folder or a run") from None
  check(
    isinstance(data, dict) and data.get("format") == lm.FORMAT,
    f"--from: {source / lm.CONFIG} is not of a model of format {lm.FORMAT}; give a model folder or a run",
  )
  config = build(ModelConfig, data.get("model"), "model")
  tensors, metadata = safetensors.read_header(source / lm.WEIGHTS)
  _check_fit(source / lm.WEIGHTS, config, tensors, metadata)

  carried = data.get("hf", {})
  check(isinstance(carried, dict), f"--from: {source / lm.CONFIG}: hf must be a dict")
  entries = {path: (safetensors.DTYPES[t.dtype], t.shape) for path, t in tensors.items()}
  return config, carried, entries, lambda path, index: tensors[path].read(*index), None, source


def _check_fit(path: Path, config: ModelConfig, tensors: dict, metadata: dict) -> None:
  """Raises UserError unless the tensors are those of the config, undamaged."""
  from flax import nnx

  from llmarch.convert import safetensors
  from llmarch.layers.param import flatten
  from llmarch.models.decoder import abstract

  wanted = {name: (safetensors.NAMES[a.dtype], a.shape) for name, a in flatten(nnx.state(abstract(config))).items()}
  found = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
  for name in sorted(name for name in wanted | found if wanted.get(name) != found.get(name)):
    raise UserError(f"{path} does not fit its config.json: {name} is {found.get(name)}, not {wanted.get(name)}")
  sums = json.loads(metadata.get("crc32", "{}"))
  for name, tensor in tensors.items():
    crc = 0
    for layer in range(tensor.shape[0]) if name.startswith("stack/segments/") else [None]:
      values = tensor.read() if layer is None else tensor.read(layer)
      crc = zlib.crc32(values.reshape(-1).view("uint8"), crc)
    check(crc == sums.get(name), f"{path}: {name} is damaged; restore the file")


def _open_run(source: Path):
  """Opens a training run's newest checkpoint, with the results of `_open`."""

  import llmarch

  lm = llmarch.load(source)
  config = lm.config
  flat = lm.arrays()
  read = lambda path, index: flat[path][index]
  entries = {name: (value.dtype, value.shape) for name, value in flat.items()}
  beside = _base_of_run(source)
  return config, _carried(beside) if beside else {}, entries, read, lm.tokenizer, beside


def _base_of_run(run: Path) -> Path | None:
  """The folder from which a run began, if it is still there and has the run's tokenizer."""
  from llmarch.convert import hf

  try:
    base = json.loads((run / "config.json").read_text())["train"]["init_from"]
    folder = hf.base_folder(base) if base and Path(base).is_dir() else None
    same = folder and (folder / hf.TOKENIZER).read_bytes() == (run / hf.TOKENIZER).read_bytes()
  except (OSError, ValueError, KeyError, TypeError, RecursionError):  # it began from nothing, or is gone
    return None
  return folder if same else None


def _carried(folder: Path) -> dict:
  """The entries of a folder's config.json that are written back, with its model_type."""
  from llmarch.convert import hf

  if hf.is_checkpoint(folder):
    said = hf.Described.of(folder)
    return said.carried | {"model_type": said.family.model_type}
  carried = json.loads((folder / "config.json").read_text()).get("hf", {})
  return carried if isinstance(carried, dict) else {}


def _report(target, model_type: str, config: ModelConfig, entries: dict) -> dict:
  import math

  sizes = {name: math.prod(shape) for name, (_, shape) in entries.items()}
  num_bytes = sum(n * entries[name][0].itemsize for name, n in sizes.items())
  return {
    "path": str(target),
    "model_type": model_type,
    "dtype": config.precision.param,
    "stack": config.stack,
    "parameters": short(sum(sizes.values())),
    "size": short_bytes(num_bytes),
  }
