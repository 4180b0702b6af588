"""`llmarch presets`: the published architectures that ship as presets, a row each."""

from absl import flags

from llmarch.commands.common import parse_flags, print_table, short, short_bytes

USAGE = "llmarch presets [--json]"


def _define(values: flags.FlagValues) -> None:
  flags.DEFINE_bool("json", False, "print JSON", flag_values=values)


def main(argv: list[str]) -> int:
  """Runs `llmarch presets`; returns its exit code."""
  args = parse_flags(argv, _define, USAGE)
  from llmarch.presets import PRESETS

  rows = [row(name, make()) for name, make in PRESETS.items()]
  print_table(rows if args.json else [_narrow(r) for r in rows], args.json)
  return 0


def row(name: str, config) -> dict:
  """A preset's line. Sizes are those of its first block; where blocks differ in kind, all kinds are named."""
  from llmarch.analysis import cost

  blocks = list(config.blocks.values())
  mixer = blocks[0].mixer
  mlps = [b.ffn.mlp for b in blocks if b.ffn is not None and b.ffn.mlp is not None]
  experts = [b.ffn.experts for b in blocks if b.ffn is not None and b.ffn.experts]
  at_embedding = [config.embed.position] if config.embed.position else []
  return {
    "name": name,
    "params": cost.params(config)["total"],
    "active_params": cost.active_params(config),
    "layers": len(config.layers),
    "d_model": config.d_model,
    "d_ff": mlps[0].d_ff if mlps else None,
    "experts": _distinct(f"{chosen:g}/{count}" for count, chosen in experts) or None,
    "heads": mixer.heads,
    "kv_heads": mixer.kv_heads,
    "head_dim": mixer.dim(config.d_model),
    "vocab": config.vocab_size,
    "norm": _distinct(b.norm.kind for b in blocks),
    "residual": _distinct(b.residual.kind for b in blocks),
    "activation": _distinct(("gated " if m.gated else "") + m.activation for m in mlps),
    "position": _distinct(map(position, at_embedding or [b.mixer.position for b in blocks])),
    "context": config.max_seq_len,
    "window": next((b.mixer.window for b in blocks if b.mixer.window), None),
    "kv_bytes_per_token": int(cost.kv_bytes_per_token(config, 2)),
  }


def _narrow(r: dict) -> dict:
  """The row for a terminal: large numbers shortened, heads as query/kv."""
  params = short(r["params"]) + (f" ({short(r['active_params'])})" if r["active_params"] < r["params"] else "")
  kept = {k: v for k, v in r.items() if k not in ("active_params", "kv_heads", "residual", "kv_bytes_per_token")}
  return kept | {
    "params": params,
    "heads": None if r["heads"] is None else f"{r['heads']}/{r['kv_heads'] or r['heads']}",
    "norm": f"{r['norm']} {r['residual']}",
    "kv/token": short_bytes(r["kv_bytes_per_token"]),
  }


def position(p) -> str:
  """A position scheme in a word or two: "rope 500000 llama3"."""
  if p is None:
    return "none"
  scaling = getattr(p, "scaling", None)
  theta = f"{p.theta:g}".replace("e+0", "e") if hasattr(p, "theta") else ""
  parts = [p.kind, theta, scaling.kind if scaling else ""]
  return " ".join(filter(None, parts))


def _distinct(words) -> str:
  return ", ".join(dict.fromkeys(words))
