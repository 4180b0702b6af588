"""Families that transformers has not, with its models' face: PaLM and Grok-1, written in torch after their public code,
and those whose function a class of transformers has under other options and names."""

import json
import pathlib
import types

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F


def turn(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
  """RoPE of x [B, T, N, H], pairs (i, i + H/2)."""
  half = x.shape[-1] // 2
  angle = positions[..., None, None] * theta ** (-torch.arange(half) / half)
  a, b = x[..., :half], x[..., half:]
  return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def attend(q, k, v, real, scale: float, cap: float | None = None) -> torch.Tensor:
  """q [B, T, N, H], k and v [B, T, K, H], real [B, T] -> [B, T, N H]."""
  k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
  scores = torch.einsum("btnh,bsnh->bnts", q, k) * scale
  scores = scores if cap is None else cap * torch.tanh(scores / cap)
  seen = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril() & real[:, None, None, :]
  weights = torch.softmax(scores.masked_fill(~seen, torch.finfo(scores.dtype).min), -1)
  return torch.einsum("bnts,bsnh->btnh", weights, v).flatten(2)


def modules(**parts) -> nn.Module:
  found = nn.Module()
  for name, part in parts.items():
    setattr(found, name, part)
  return found


def linear(into: int, out: int) -> nn.Linear:
  return nn.Linear(into, out, bias=False)


class Peer(nn.Module):
  """A model of the family `model_type`, from the options of its config.json."""

  def __init__(self, **options):
    super().__init__()
    self.options = {"model_type": self.model_type} | self.defaults | options

  def forward(self, input_ids, attention_mask=None, use_cache=False):
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    positions = torch.clamp(real.cumsum(-1) - 1, min=0)
    return types.SimpleNamespace(logits=self.logits(input_ids, positions, real.bool()))

  @torch.no_grad()
  def generate(self, ids, attention_mask, max_new_tokens, **_):
    """Greedy, without a cache."""
    for _ in range(max_new_tokens):
      new = self(ids, attention_mask).logits[:, -1].argmax(-1, keepdim=True)
      ids, attention_mask = torch.cat([ids, new], 1), torch.cat([attention_mask, torch.ones_like(new)], 1)
    return ids

  def save_pretrained(self, folder):
    pathlib.Path(folder).mkdir(exist_ok=True)
    (pathlib.Path(folder) / "config.json").write_text(json.dumps(self.options))
    save_file(self.state_dict(), pathlib.Path(folder) / "model.safetensors", metadata={"format": "pt"})

  @classmethod
  def from_pretrained(cls, folder):
    """Raises for a tensor that is missing or one too many."""
    options = json.loads((pathlib.Path(folder) / "config.json").read_text())
    model = cls(**options)
    model.load_state_dict(load_file(pathlib.Path(folder) / "model.safetensors"))
    return model


class Gamma(nn.Module):
  """LayerNorm without bias; or RMS norm, of a scale about 0 (the authors' inference code)."""

  def __init__(self, options: dict):
    super().__init__()
    self.gamma, self.kind, self.eps = nn.Parameter(torch.ones(options["dim"])), options["norm"], options["norm_eps"]

  def forward(self, x):
    if self.kind == "layernorm":
      return F.layer_norm(x, x.shape[-1:], self.gamma, None, self.eps)
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps) * (1 + self.gamma)


class PaLM(Peer):
  """2204.02311, with the parameters of the public implementation in PyTorch (one projection for q, k, v and both
  halves of the feed-forward)."""

  model_type = "palm"
  defaults = dict(
    num_tokens=53, dim=24, depth=2, heads=3, dim_head=10, ff_mult=4, max_seq_len=64, norm="layernorm", norm_eps=1e-5,
    logit_scale=1.0,
  )  # fmt: skip

  def __init__(self, **options):
    super().__init__(**options)
    o = self.options
    D, N, H, inner = o["dim"], o["heads"], o["dim_head"], o.get("ff_inner_dim") or int(o["dim"] * o["ff_mult"])
    self.parts = N * H, H, H, inner, inner
    block = lambda: modules(
      norm=Gamma(o), fused_attn_ff_proj=linear(D, sum(self.parts)), attn_out=linear(N * H, D),
      ff_out=nn.Sequential(nn.Identity(), linear(inner, D)),
    )  # fmt: skip
    self.token_emb, self.norm = nn.Embedding(o["num_tokens"], D), Gamma(o)
    self.layers = nn.ModuleList(modules(fn=block()) for _ in range(o["depth"]))

  def logits(self, ids, positions, real):
    o, x = self.options, self.token_emb(ids)
    for layer in self.layers:
      f = layer.fn
      q, k, v, up, gate = f.fused_attn_ff_proj(f.norm(x)).split(self.parts, -1)
      q, k, v = (y.unflatten(-1, (-1, o["dim_head"])) for y in (q, k, v))
      q, k = turn(q, positions, 1e4), turn(k, positions, 1e4)
      x = x + f.attn_out(attend(q, k, v, real, o["dim_head"] ** -0.5)) + f.ff_out(F.silu(gate) * up)
    return o["logit_scale"] * self.norm(x) @ self.token_emb.weight.T


class Grok1(Peer):
  """xai-org/grok-1."""

  model_type = "grok-1"
  defaults = dict(
    vocab_size=53, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=64, num_local_experts=5, num_experts_per_tok=2, hidden_act="gelu",
    embedding_multiplier_scale=4.9, output_multiplier_scale=0.6, attn_output_multiplier=0.4, rope_theta=10000.0,
  )  # fmt: skip

  def __init__(self, **options):
    super().__init__(**options)
    o = self.options
    D, N, K, inner = (o[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size"))
    H = self.head_dim = D // N
    norms = lambda: {f"norm{i}": nn.RMSNorm(D, eps=1e-5) for i in (1, 2, 3, 4)}
    attention = lambda: modules(
      q_proj=linear(D, N * H), k_proj=linear(D, K * H), v_proj=linear(D, K * H), out_proj=linear(N * H, D)
    )
    expert = lambda: modules(w1=linear(D, inner), v=linear(D, inner), dense=linear(inner, D))
    mlp = lambda: modules(
      gating=modules(router_weights=linear(D, o["num_local_experts"])),
      experts=nn.ModuleList(expert() for _ in range(o["num_local_experts"])),
    )
    self.embedding, self.norm = nn.Embedding(o["vocab_size"], D), nn.RMSNorm(D, eps=1e-5)
    self.layers = nn.ModuleList(
      modules(attention=attention(), mlp=mlp(), **norms()) for _ in range(o["num_hidden_layers"])
    )

  def logits(self, ids, positions, real):
    o, x = self.options, self.embedding(ids) * self.options["embedding_multiplier_scale"]
    for layer in self.layers:
      x = x + layer.norm2(self.attention(layer.attention, layer.norm1(x), positions, real))
      x = x + layer.norm4(self.mixture(layer.mlp, layer.norm3(x)))
    return o["output_multiplier_scale"] * self.norm(x) @ self.embedding.weight.T

  def attention(self, a, x, positions, real):
    o = self.options
    q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (a.q_proj, a.k_proj, a.v_proj))
    q, k = (turn(y, positions, o["rope_theta"]) for y in (q, k))
    return a.out_proj(attend(q, k, v, real, o["attn_output_multiplier"], cap=30.0))

  def mixture(self, mlp, x):
    """Every expert for every token; the gates of those that are not chosen are 0."""
    scores = torch.softmax(mlp.gating.router_weights(x), -1)
    gates, chosen = scores.topk(self.options["num_experts_per_tok"], -1)
    gates = torch.zeros_like(scores).scatter(-1, chosen, gates)
    outputs = [e.dense(F.gelu(e.w1(x), approximate="tanh") * e.v(x)) for e in mlp.experts]
    return sum(gates[..., i : i + 1] * y for i, y in enumerate(outputs))


class Renamed(Peer):
  """A model whose function a class of transformers has. `theirs` and `names` say under which options and names."""

  base: str
  names: dict[str, str] = {}
  defaults = dict(
    vocab_size=53, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
    max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=False,
  )  # fmt: skip

  def __init__(self, **options):
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    super().__init__(**options)
    shared = {k: v for k, v in self.options.items() if k in Renamed.defaults or k in ("rope_theta", "head_dim")}
    ids = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
    config = CONFIG_MAPPING[self.base](**shared, **ids, **self.theirs(self.options))
    self.model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()

  def forward(self, input_ids, attention_mask=None, use_cache=False, position_ids=None):
    return self.model(input_ids, attention_mask=attention_mask, use_cache=use_cache, position_ids=position_ids)

  def state_dict(self, *args, **kwargs):
    state = self.model.state_dict()
    if self.options["tie_word_embeddings"]:
      state.pop("lm_head.weight")
    return {self.renamed(name): value.contiguous() for name, value in self.joined(state).items()}

  @classmethod
  def from_pretrained(cls, folder):
    options = json.loads((pathlib.Path(folder) / "config.json").read_text())
    model, own = cls(**options), load_file(pathlib.Path(folder) / "model.safetensors")
    assert own.keys() == model.state_dict().keys()
    back = {model.renamed(name): name for name in model.joined(model.model.state_dict())}
    model.model.load_state_dict(model.split({back[name]: value for name, value in own.items()}), strict=False)
    model.model.tie_weights()
    return model

  def renamed(self, name: str) -> str:
    for old, new in self.names.items():
      name = name.replace(old, new)
    return name

  def joined(self, state: dict) -> dict:
    return state

  def split(self, state: dict) -> dict:
    return state


class Orion(Renamed):
  model_type, base = "orion", "stablelm"

  def theirs(self, o):
    rope = dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=1.0)
    return dict(layer_norm_eps=o["rms_norm_eps"], rope_parameters=rope, num_key_value_heads=o["num_key_value_heads"])


class MiniCPM(Renamed):
  model_type, base = "minicpm", "granite"

  def theirs(self, o):
    head_dim = o["hidden_size"] // o["num_attention_heads"]
    return dict(
      embedding_multiplier=o["scale_emb"], residual_multiplier=o["scale_depth"] / o["num_hidden_layers"] ** 0.5,
      logits_scaling=o["hidden_size"] / o["dim_model_base"], attention_multiplier=head_dim**-0.5,
      num_key_value_heads=o["num_key_value_heads"],
    )  # fmt: skip


class InternLM(Renamed):
  model_type, base = "internlm", "llama"

  def theirs(self, o):
    return dict(attention_bias=o["bias"])


class InternLM2(Renamed):
  model_type, base = "internlm2", "llama"
  names = {
    "embed_tokens": "tok_embeddings", "self_attn.o_proj": "attention.wo", "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2", "self_attn.wqkv": "attention.wqkv", "lm_head": "output",
  }  # fmt: skip

  def theirs(self, o):
    return dict(num_key_value_heads=o["num_key_value_heads"])

  def joined(self, state):
    """The queries of a key-value head, its key, its value; then the next."""
    heads, out = self.options["num_key_value_heads"], {}
    for name, value in state.items():
      if "q_proj" in name:
        parts = [state[name.replace("q_proj", f"{part}_proj")].unflatten(0, (heads, -1)) for part in "qkv"]
        out[name.replace("q_proj", "wqkv")] = torch.cat(parts, 1).flatten(0, 1)
      elif "k_proj" not in name and "v_proj" not in name:
        out[name] = value
    return out

  def split(self, state):
    o, out = self.options, {}
    H, K = o["hidden_size"] // o["num_attention_heads"], o["num_key_value_heads"]
    group = o["num_attention_heads"] // K
    for name, value in state.items():
      if "wqkv" in name:
        parts = value.unflatten(0, (K, -1)).split((group * H, H, H), 1)
        out |= {name.replace("wqkv", f"{part}_proj"): y.flatten(0, 1) for part, y in zip("qkv", parts)}
      else:
        out[name] = value
    return out


MODELS = {model.model_type: model for model in (PaLM, Grok1, Orion, MiniCPM, InternLM, InternLM2)}
