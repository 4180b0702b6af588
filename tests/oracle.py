"""The whole decoder in float64, written from the papers' equations with loops over positions and heads.

Independent of llmarch/ops on purpose: RoPE is a complex product that knows only the difference of two
positions, xPos its relative form, T5's logarithm is decided in integers. Slow and plain; for tests.

T tokens of one row, D model, N query heads, K key-value heads, H head dim, V vocabulary.
"""

import cmath
import math

import numpy as np

# --------------------------------------------------------------------------------------------- pointwise


def gelu(x: float) -> float:
  return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))  # x Phi(x) (1606.08415)


def gelu_tanh(x: float) -> float:
  return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def sigmoid(x: float) -> float:
  return 1 / (1 + math.exp(-x))


ACTIVATIONS = {
  "identity": lambda x: x,
  "relu": lambda x: max(x, 0.0),
  "relu2": lambda x: max(x, 0.0) ** 2,
  "gelu": gelu,
  "gelu_tanh": gelu_tanh,
  "silu": lambda x: x * sigmoid(x),
  "sigmoid": sigmoid,
}


def softcap(x: float, cap: float | None) -> float:
  return x if cap is None else cap * math.tanh(x / cap)


# ------------------------------------------------------------------------------------------------- norms


def normalise(norm, params: dict, x: np.ndarray) -> np.ndarray:
  """One vector [D] through RMSNorm (1910.07467), LayerNorm (1607.06450) or ScaleNorm (1910.05895)."""
  scale = params.get("scale", 1.0)
  if norm.kind == "scalenorm":
    return scale[0] * x / math.sqrt(sum(v * v for v in x) + norm.eps)
  if norm.zero_centered:
    scale = 1 + scale
  if norm.kind == "rmsnorm":
    return x / math.sqrt(sum(v * v for v in x) / len(x) + norm.eps) * scale
  mean = sum(x) / len(x)
  variance = sum((v - mean) ** 2 for v in x) / len(x)
  return (x - mean) / math.sqrt(variance + norm.eps) * scale + (params["bias"] if norm.bias else 0.0)


# --------------------------------------------------------------------------------------------- positions


def rope_table(position, dims: int, length: int) -> tuple[list[float], float]:
  """The angles per position of the pairs, and the factor on queries and on keys, for a context of `length`."""
  scaling, theta = getattr(position, "scaling", None), position.theta
  plain = [theta ** (-2 * i / dims) for i in range(dims // 2)]
  if scaling is None:
    return plain, 1.0
  if scaling.kind == "linear":
    return [t / scaling.factor for t in plain], 1.0
  if scaling.kind == "ntk":
    base = theta * scaling.factor ** (dims / (dims - 2))
    return [base ** (-2 * i / dims) for i in range(dims // 2)], 1.0
  if scaling.kind == "dynamic_ntk":
    s = scaling.factor * length / scaling.original - (scaling.factor - 1) if length > scaling.original else 1.0
    base = theta * s ** (dims / (dims - 2))
    return [base ** (-2 * i / dims) for i in range(dims // 2)], 1.0
  if scaling.kind == "yarn":
    gain = scaling.attention_factor
    if gain is None:
      gain = 0.1 * math.log(scaling.factor) + 1
    # Pair i turns original theta^(-2i/R) / 2 pi times; solved for i.
    turning = lambda turns: dims / 2 * math.log(scaling.original / (2 * math.pi * turns)) / math.log(theta)
    outwards = (math.floor, math.ceil) if scaling.truncate else (float, float)
    low = max(outwards[0](turning(scaling.beta_fast)), 0)
    high = min(outwards[1](turning(scaling.beta_slow)), dims - 1)
    table = []
    for i, t in enumerate(plain):
      ramp = (i - low) / (high - low) if high > low else float(i > low)
      interpolated = min(max(ramp, 0.0), 1.0)
      table.append(interpolated * t / scaling.factor + (1 - interpolated) * t)
    return table, gain
  if scaling.kind == "llama3":
    table = []
    for t in plain:
      wavelength = 2 * math.pi / t
      if wavelength < scaling.original / scaling.high_factor:
        table.append(t)
      elif wavelength > scaling.original / scaling.low_factor:
        table.append(t / scaling.factor)
      else:
        smooth = (scaling.original / wavelength - scaling.low_factor) / (scaling.high_factor - scaling.low_factor)
        table.append((1 - smooth) * t / scaling.factor + smooth * t)
    return table, 1.0
  assert scaling.kind == "longrope", scaling
  divisors = scaling.long_factors if length > scaling.original else scaling.short_factors
  gain = scaling.attention_factor
  if gain is None:
    gain = math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original))
  return [t / d for t, d in zip(plain, divisors, strict=True)], gain


def rotary_score(position, q: np.ndarray, k: np.ndarray, distance: int, length: int) -> float:
  """<R_m q, R_n k> for m - n = distance: the sum over pairs of Re(q_i conj(k_i) e^(i (m-n) theta_i)), 2104.09864
  section 3.2.1, for xPos each times zeta_i^((m-n)/scale_base), 2212.10554; dimensions beyond the R as they are."""
  dims = len(q) if position.dims is None else position.dims
  table, gain = rope_table(position, dims, length)
  score = 0.0
  for i, theta in enumerate(table):
    a, b = (2 * i, 2 * i + 1) if position.interleaved else (i, i + dims // 2)
    product = complex(q[a], q[b]) * complex(k[a], k[b]).conjugate() * gain**2
    if position.kind == "xpos":
      product *= ((2 * i / dims + 0.4) / 1.4) ** (distance / position.scale_base)
    score += (product * cmath.exp(1j * distance * theta)).real
  return score + sum(a * b for a, b in zip(q[dims:], k[dims:], strict=True))


def alibi_slopes(n: int, max_bias: float) -> list[float]:
  """2108.12409, section 3 and the authors' rule for other numbers of heads."""
  if n & (n - 1) == 0:
    return [2 ** (-max_bias * h / n) for h in range(1, n + 1)]
  below = 2 ** (n.bit_length() - 1)
  return alibi_slopes(below, max_bias) + alibi_slopes(2 * below, max_bias)[0::2][: n - below]


def t5_bucket(distance: int, num_buckets: int, max_distance: int, bidirectional: bool) -> int:
  """1910.10683: e + floor(log(d/e) / log(M/e) * (n - e)) for d >= e = n/2; distance = key - query position.

  The floor is decided exactly: it is at least k where (d/e)^(n-e) >= (M/e)^k.
  """
  if bidirectional:
    n = num_buckets // 2
    return (n if distance > 0 else 0) + t5_bucket(-abs(distance), n, max_distance, False)
  d, n, e = max(-distance, 0), num_buckets, num_buckets // 2
  if d < e:
    return d
  k = 0
  while k < n - e - 1 and d ** (n - e) * e ** (k + 1) >= max_distance ** (k + 1) * e ** (n - e):
    k += 1
  return e + k


def sinusoid(position: int, dims: int) -> np.ndarray:
  """1706.03762, section 3.5."""
  angle = [position / 10000 ** (2 * (i // 2) / dims) for i in range(dims)]
  return np.array([math.cos(a) if i % 2 else math.sin(a) for i, a in enumerate(angle)])


# -------------------------------------------------------------------------------------------- the mixer


MASKS = {  # by kind: the query at position m sees the key at n, which may be marked as prefix
  "causal": lambda mask, m, n, marked: n <= m,
  "bidirectional": lambda mask, m, n, marked: True,
  "prefix": lambda mask, m, n, marked: n <= m or marked,
}


def sees(mixer, m: int, n: int, same_segment: bool, key_is_prefix: bool) -> bool:
  """The query at position m sees the key at position n."""
  if m < 0 or n < 0 or not same_segment:
    return False
  if mixer.mask is None:  # no attention: all that came before
    return n <= m
  if mixer.window is not None and abs(m - n) >= mixer.window:
    return False
  return bool(MASKS[mixer.mask.kind](mixer.mask, m, n, key_is_prefix))


def attention(c, p: dict, xs: list[np.ndarray], row, table, kept: dict) -> list[np.ndarray]:
  """Grouped softmax attention (1706.03762, 2305.13245) of one row; `table` is T5's [num_buckets, N], `kept` the keys
  and values that earlier layers left by name (2405.12981)."""
  N, K = c.num_heads, c.num_kv_heads or c.num_heads
  H = p["q"].shape[-1]

  def project(name, x):  # [heads, H]
    w = p[name]
    y = np.array([[x @ w[:, n, h] for h in range(H)] for n in range(w.shape[1])])
    return y + p[f"{name}_bias"] if c.qkv_bias else y

  def norm(name, y):
    if c.qk_norm is None:
      return y
    if c.qk_norm.whole:
      return normalise(c.qk_norm.norm, p.get(name, {}), y.reshape(-1)).reshape(y.shape)
    own = lambda n: {k: v[n] for k, v in p.get(name, {}).items()} if c.qk_norm.per_head else p.get(name, {})
    return np.array([normalise(c.qk_norm.norm, own(n), head) for n, head in enumerate(y)])

  cut = lambda y: y if c.qkv_clip is None else np.array([[min(max(e, -c.qkv_clip), c.qkv_clip) for e in h] for h in y])
  qs = [cut(norm("q_norm", project("q", x))) for x in xs]
  if c.kv_from is None:
    ks, vs = [cut(norm("k_norm", project("k", x))) for x in xs], [cut(project("v", x)) for x in xs]
  else:
    ks, vs = kept[c.kv_from]
  if c.keep_kv is not None:
    kept[c.keep_kv] = ks, vs
  scale = 1 / math.sqrt(H) if c.query_scale is None else c.query_scale
  kind = c.position.kind if c.position else None
  slopes = alibi_slopes(N, c.position.max_bias) if kind == "alibi" else None

  ys = []
  for t, m in enumerate(row.positions):
    y = np.zeros(p["o"].shape[-1])
    for n in range(N):
      group = n // (N // K)
      logits, values = [], []
      for s, k_position in enumerate(row.positions):
        if not sees(c, m, k_position, row.segments[s] == row.segments[t], row.prefix[s]):
          continue
        q, k, distance = qs[t][n], ks[s][group], m - k_position
        score = rotary_score(c.position, q, k, distance, row.length(t)) if kind in ("rope", "xpos") else q @ k
        grown = 1 + c.query_growth * math.log(1 + m // c.growth_every)  # 2501.19399, in the form of Ministral 3
        score = softcap(score * scale * grown, c.softcap)
        if kind == "alibi":
          score -= slopes[n] * abs(distance)
        if kind == "t5_bias":
          position, both = c.position, c.mask.kind == "bidirectional"
          score += table[t5_bucket(-distance, position.num_buckets, position.max_distance, both)][n]
        logits.append(score)
        values.append(vs[s][group])
      sink = [p["sinks"][n]] if c.sinks else []
      if not logits:
        continue
      top = max(logits + sink)
      total = sum(math.exp(logit - top) for logit in logits + sink)
      out = sum(math.exp(logit - top) / total * v for logit, v in zip(logits, values, strict=True))
      y += sum(out[h] * p["o"][n, h] for h in range(H))
    ys.append(y + p["o_bias"] if c.out_bias else y)
  return ys


def mla(c, p: dict, xs: list[np.ndarray], row, table, kept: dict) -> list[np.ndarray]:
  """Multi-head latent attention of one row (2405.04434, equations 9 to 19), every head's keys and values made."""
  N, P = c.num_heads, c.qk_nope_head_dim
  norm = lambda name, y: normalise(c.latent_norm, p.get(name, {}), y)
  heads = lambda name, y: [y @ p[name][:, n] for n in range(N)]
  latents = [norm("kv_norm", x @ p["kv_down"]) for x in xs]
  turning = [x @ p["k_rope"] for x in xs]
  ks, vs = [heads("k", latent) for latent in latents], [heads("v", latent) for latent in latents]
  if c.q_lora_rank is None:
    qs = [heads("q", x) for x in xs]
  else:
    qs = [heads("q_up", norm("q_norm", x @ p["q_down"])) for x in xs]
  scale = 1 / math.sqrt(P + c.qk_rope_head_dim) if c.query_scale is None else c.query_scale
  if c.mscale_all_dim is not None:
    scale *= (0.1 * c.mscale_all_dim * math.log(c.position.scaling.factor) + 1) ** 2

  ys = []
  for t, m in enumerate(row.positions):
    y = np.zeros(p["o"].shape[-1])
    seen = [s for s, n in enumerate(row.positions) if sees(c, m, n, row.segments[s] == row.segments[t], False)]
    for n in range(N) if seen else ():
      logits = []
      for s in seen:
        turned = rotary_score(c.position, qs[t][n][P:], turning[s], m - row.positions[s], row.length(t))
        logits.append(scale * (qs[t][n][:P] @ ks[s][n] + turned))
      weights = [math.exp(logit - max(logits)) for logit in logits]
      y += sum(w * vs[s][n] for w, s in zip(weights, seen, strict=True)) / sum(weights) @ p["o"][n]
    ys.append(y)
  return ys


def linear(c, p: dict, xs: list[np.ndarray], row, table, kept: dict) -> list[np.ndarray]:
  """Causal linear attention of one row: the sums of 2006.16236, equation 9, over the pairs themselves."""
  feature = lambda x: np.array([e + 1 if e > 0 else math.exp(e) for e in x])
  ys = []
  for t, m in enumerate(row.positions):
    y = np.zeros(p["o"].shape[-1])
    before = [s for s in range(t + 1) if row.positions[s] >= 0 and row.segments[s] == row.segments[t]]
    for n in range(c.num_heads) if m >= 0 else ():
      q = feature(xs[t] @ p["q"][:, n])
      weights = [q @ feature(xs[s] @ p["k"][:, n]) for s in before]
      y += sum(w * (xs[s] @ p["v"][:, n]) for w, s in zip(weights, before, strict=True)) / sum(weights) @ p["o"][n]
    ys.append(y)
  return ys


MIXERS = {"attention": attention, "mla": mla, "linear": linear}


def mlp(c, p: dict, x: np.ndarray) -> np.ndarray:
  """2002.05202."""
  linear = lambda name, v: v @ p[name] + (p[f"{name}_bias"] if c.bias else 0.0)
  if c.activation == "swiglu_oss":
    pairs = zip(linear("gate", x), linear("up", x), strict=True)
    gates, ups = zip(*((min(g, 7.0), max(min(u, 7.0), -7.0)) for g, u in pairs), strict=True)
    h = np.array([(u + 1) * g / (1 + math.exp(-1.702 * g)) for g, u in zip(gates, ups, strict=True)])
    return linear("down", h)
  act = lambda v: np.array([ACTIVATIONS[c.activation](e) for e in v])
  h = act(linear("gate", x)) * linear("up", x) if c.gated else act(linear("up", x))
  return linear("down", h)


def largest(values, n: int) -> list[int]:
  """Where the n largest are, the first of equals first."""
  return sorted(range(len(values)), key=lambda i: (-values[i], i))[:n]


def tokens_choose(r, p: dict, xs: list[np.ndarray], row) -> list[dict[int, float]]:
  """{expert: gate} of each token: top-k of scores (2101.03961, 2401.04088, 2405.04434, 2412.19437)."""
  chosen = []
  for x in xs:
    logits = x @ p["router"] + (p["router_bias"] if r.bias else 0.0)
    scores = [1 / (1 + math.exp(-v)) for v in logits]
    if r.scores == "softmax":
      total = sum(math.exp(v - max(logits)) for v in logits)
      scores = [math.exp(v - max(logits)) / total for v in logits]
    choice = list(scores + (p["selection_bias"] if r.balance_rate is not None else np.zeros(len(scores))))
    if r.groups:
      size, counted = len(choice) // r.groups.num, 1 if r.groups.score == "max" else 2
      best = [sorted(choice[g * size : (g + 1) * size])[-counted:] for g in range(r.groups.num)]
      kept = largest([sum(values) for values in best], r.groups.top)
      choice = [v if i // size in kept else -math.inf for i, v in enumerate(choice)]
    experts = largest(choice, r.k)
    total = sum(scores[e] for e in experts) if r.renormalize else 1.0
    chosen.append({e: r.scale * scores[e] / total for e in experts})
  if r.capacity_factor is None:
    return chosen
  real = [t for t, m in enumerate(row.positions) if m >= 0]
  room = [math.ceil(r.capacity_factor * len(real) / len(p["router"].T))] * len(p["router"].T)
  kept = [{} for _ in xs]
  for nth in range(r.k):  # all first choices, then all second ones
    for t in real:
      e = list(chosen[t])[nth]
      if room[e] > 0:
        kept[t][e] = chosen[t][e]
        room[e] -= 1
  return kept


def experts_choose(r, p: dict, xs: list[np.ndarray], row) -> list[dict[int, float]]:
  """2202.09368, of each document alone."""
  chosen, E = [{} for _ in xs], p["router"].shape[1]
  for segment in set(row.segments):
    at = [t for t, m in enumerate(row.positions) if m >= 0 and row.segments[t] == segment]
    scores = [np.exp(xs[t] @ p["router"]) / sum(np.exp(xs[t] @ p["router"])) for t in at]
    for e in range(E):
      for i in largest([s[e] for s in scores], math.floor(r.capacity_factor * len(at) / E)):
        chosen[at[i]][e] = scores[i][e]
  return chosen


def moe(c, p: dict, xs: list[np.ndarray], row) -> list[np.ndarray]:
  """The gated sum of each token's experts, and the shared one."""
  route = tokens_choose if c.router.kind == "top_k" else experts_choose
  names = [n for n in ("up", "gate", "down", "up_bias", "gate_bias", "down_bias") if n in p]
  expert = lambda e, x: mlp(c.expert, {n: p[n][e] for n in names}, x)
  ys = []
  for x, gates in zip(xs, route(c.router, p, xs, row), strict=True):
    y = sum((gate * expert(e, x) for e, gate in gates.items()), np.zeros_like(x))
    if c.shared:
      gate = 1 / (1 + math.exp(-(x @ p["shared_gate"])[0])) if c.shared_gate else 1.0
      y = y + gate * mlp(c.shared, p["shared"], x)
    ys.append(y)
  return ys


FFNS = {"mlp": lambda c, p, xs, row: [mlp(c, p, x) for x in xs], "moe": moe}


# ---------------------------------------------------------------------------------------- blocks and model


def cross_attention(c, p: dict, xs: list[np.ndarray], row, memory: list[np.ndarray]) -> list[np.ndarray]:
  """Softmax attention of one document to all of its source, whose encoded tokens are `memory` (1706.03762)."""
  N, K = c.num_heads, c.num_kv_heads or c.num_heads
  bias = lambda name, n: p[f"{name}_bias"][n] if c.bias else 0.0
  project = lambda name, x: [x @ p[name][:, n] + bias(name, n) for n in range(p[name].shape[1])]
  norm = lambda name, heads: [normalise(c.qk_norm, p.get(name, {}), h) if c.qk_norm else h for h in heads]
  ks, vs = [norm("k_norm", project("k", x)) for x in memory], [project("v", x) for x in memory]
  scale = 1 / math.sqrt(p["q"].shape[-1]) if c.query_scale is None else c.query_scale
  ys = []
  for x in xs:
    y, qs = np.zeros(p["o"].shape[-1]), norm("q_norm", project("q", x))
    for n in range(N):
      logits = [scale * (qs[n] @ k[n // (N // K)]) for k in ks]
      weights = [math.exp(logit - max(logits)) for logit in logits]
      y += sum(w * v[n // (N // K)] for w, v in zip(weights, vs, strict=True)) / sum(weights) @ p["o"][n]
    ys.append(y + p["o_bias"] if c.out_bias else y)
  return ys


def block(c, p: dict, xs: list[np.ndarray], row, table, kept: dict, memory) -> list[np.ndarray]:
  """The residual schemes, by the formulas of residual.py."""
  norms = lambda name, vs: [normalise(c.norm, p.get(name, {}), v) for v in vs]
  add = lambda xs, *ys: [c.skip_scale * x + c.branch_scale * sum(y) for x, *y in zip(xs, *ys, strict=True)]
  branches = {"mixer": lambda vs: MIXERS[c.mixer.kind](c.mixer, p["mixer"], vs, row, table, kept)}
  if c.cross:
    branches["cross"] = lambda vs: cross_attention(c.cross, p["cross"], vs, row, memory)
  if c.ffn:
    branches["ffn"] = lambda vs: FFNS[c.ffn.kind](c.ffn, p["ffn"], vs, row)

  if c.residual.kind == "parallel":
    h = norms("mixer_norm", xs)
    return add(xs, *(f(h) for f in branches.values()))
  if c.residual.kind == "parallel_two_norms":
    return add(xs, *(f(norms(f"{name}_norm", xs)) for name, f in branches.items()))
  for name, f in branches.items():
    if c.residual.kind == "pre":
      xs = add(xs, f(norms(f"{name}_norm", xs)))
    elif c.residual.kind == "post":
      xs = norms(f"{name}_norm", add(xs, f(xs)))
    elif c.residual.kind == "sandwich":
      xs = add(xs, norms(f"{name}_out_norm", f(norms(f"{name}_norm", xs))))
    else:
      assert c.residual.kind == "output"
      xs = add(xs, norms(f"{name}_norm", f(xs)))
  return xs


class Row:
  """What is known of the tokens of one row besides their ids."""

  def __init__(self, positions, segments, prefix, context: int | None):
    self.positions, self.segments, self.prefix, self.context = positions, segments, prefix, context

  def length(self, t: int) -> int:
    """The length of token t's context: as given, else that of its document."""
    if self.context is not None:
      return self.context
    return 1 + max(p for p, s in zip(self.positions, self.segments, strict=True) if s == self.segments[t])


def as_float64(params) -> dict:
  """Nested dicts, with integer or text keys, to float64 numpy at the leaves."""
  if isinstance(params, dict):
    return {str(k): as_float64(v) for k, v in params.items()}
  return np.asarray(params).astype(np.float64)


def logits(
  config, params: dict, tokens, positions=None, segments=None, prefix=None, context=None, source=None
) -> np.ndarray:
  """The logits [T, V] of one row of T tokens. `params`: the nested dict of an unstacked model's parameters.

  `positions` counts up from 0, `segments` is one document and `prefix` is empty where they are not given. `source`:
  the tokens that the encoder reads, if there is one.
  """
  p = as_float64(params)
  memory = hidden(config.encoder, p["encoder"], source) if config.encoder else None
  xs = hidden(config, p, tokens, positions, segments, prefix, context, memory)
  if config.embed.dim is not None:
    xs = [x @ p["embed_out"] for x in xs]
  head = config.head
  table = p["embed"] if head.tied else p["head"]
  raw = [head.scale * (table @ x + (p["head_bias"] if head.bias else 0.0)) for x in xs]
  return np.array([[softcap(v, head.softcap) for v in row] for row in raw])


def hidden(
  c, p: dict, tokens, positions=None, segments=None, prefix=None, context=None, memory=None
) -> list[np.ndarray]:
  """What the head reads, [D] for each of the T tokens of a row; p: float64 parameters."""
  T = len(tokens)
  positions = list(range(T)) if positions is None else [int(p) for p in positions]
  segments = [0] * T if segments is None else [int(s) for s in segments]
  row = Row(positions, segments, [False] * T if prefix is None else list(prefix), context)

  xs = []
  for token, position in zip(tokens, positions, strict=True):
    x = c.embed.scale * (p["embed"][token] if c.embed.dim is None else p["embed"][token] @ p["embed_in"])
    if c.embed.position and c.embed.position.kind == "sinusoidal":
      x = x + sinusoid(position, c.d_model)
    if c.embed.position and c.embed.position.kind == "learned":
      x = x + p["position"][max(position, 0) + c.embed.position.offset]
    xs.append(normalise(c.embed.norm, p.get("embed_norm", {}), x) if c.embed.norm else x)

  segment_params, kept = p["stack"]["segments"], {}
  layers = [segment_params[s]["blocks"][b] for s in sorted(segment_params, key=int)
            for b in sorted(segment_params[s]["blocks"], key=int)]  # fmt: skip
  for name, layer in zip(c.layers, layers, strict=True):
    xs = block(c.blocks[name], layer, xs, row, p["stack"].get("shared", {}).get(name), kept, memory)
  return [normalise(c.final_norm, p.get("final_norm", {}), x) for x in xs] if c.final_norm else xs
