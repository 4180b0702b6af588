"""Blockwise attention is attention: values and gradients equal those of the plain op, whatever the blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import plain_if

from llmarch.layers.mask import Bidirectional, Causal, Prefix
from llmarch.ops import attention, blockwise
from llmarch.ops.attention import Keys

B, N, K, H, V = 3, 6, 2, 8, 5
KINDS = {
  "causal": {},
  "window": {"window": 9},
  "bidirectional": {"mask": Bidirectional(), "window": 11},
  "prefix": {"mask": Prefix()},
  "softcap": {"softcap": 1.5},
  "sinks": {"sinks": True},
  "all": {"mask": Prefix(), "window": 23, "softcap": 2.0, "sinks": True},
}


def case(T: int, S: int, seed: int = 0):
  """Two documents a row and padding on the right; the last query stands on the last key; a row of padding alone."""
  r = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(r.normal(size=shape), jnp.float32)
  positions = np.tile(np.concatenate([np.arange(S // 3), np.arange(S - S // 3)]), (B, 1))
  segments = np.tile((np.arange(S) >= S // 3).astype(int), (B, 1))
  positions[0, -7:] = -1
  positions[2] = -1
  prefix = (positions >= 0) & (positions < 6)
  keys = Keys(*(jnp.asarray(a) for a in (positions, segments, prefix)))
  queries = jax.tree.map(lambda a: a[:, S - T :], keys)
  q, k, v, sinks = normal(B, T, N, H), normal(B, K, S, H), normal(B, K, S, V), normal(N)
  return q, k, v, sinks, queries, keys, normal(B, T, N, V)


def value_and_gradients(f, weights, *args):
  """f(*args), and the gradients of the sum of f(*args) times `weights` in every argument."""

  def pulled(*args):
    value = f(*args)
    return jnp.sum(value * weights), value

  (_, value), gradients = jax.jit(jax.value_and_grad(pulled, argnums=range(len(args)), has_aux=True))(*args)
  return value, gradients


SHAPES = [(40, 40, 16), (37, 37, 8), (19, 53, 16), (5, 64, 64)]  # queries, keys, keys of a block
# Plain `pytest` has every kind, and every shape twice.
COVERING = [(kind, *SHAPES[i % 4]) for i, kind in enumerate(KINDS)] + [("all", *SHAPES[3])]


@pytest.mark.parametrize(
  "kind, T, S, block", plain_if(COVERING.__contains__, [(kind, *shape) for kind in KINDS for shape in SHAPES])
)
def test_blockwise_attention_is_attention(kind, T, S, block, cases):
  options = {"mask": Causal(), "window": None, "scale": 0.3, "softcap": None} | KINDS[kind]
  q, k, v, sinks, queries, keys, weights = case(T, S)
  args = (q, k, v, sinks) if options.pop("sinks", False) else (q, k, v)

  def plain(q, k, v, sinks=None):
    seen = attention.visible(queries, keys, mask=options["mask"], window=options["window"])
    rest = {name: options[name] for name in ("scale", "softcap")}
    return attention.attend(q, k, v, seen, None, sinks, dropout=0.0, key=None, **rest)[0]

  def by_blocks(q, k, v, sinks=None):
    return blockwise.attend(q, k, v, queries, keys, sinks, block=block, **options)[0]

  (want, want_gradients), (got, gradients) = (value_and_gradients(f, weights, *args) for f in (plain, by_blocks))
  np.testing.assert_allclose(got, want, atol=1e-6)
  assert not jnp.any(got[2]), "a query that sees nothing gets zeros"
  for a, b in zip(want_gradients, gradients, strict=True):
    np.testing.assert_allclose(b, a, atol=2e-6 * float(jnp.abs(a).max()))
  cases("blockwise attention is attention")


def test_keys_in_blocks_that_no_query_sees_are_not_read():
  """NaN there would spread through any arithmetic: 0 times NaN is NaN."""
  q, k, v, _, queries, keys, weights = case(32, 32)
  keys = keys._replace(positions=keys.positions.at[:, :16].set(-1))
  k, v = k.at[:, :, :16].set(jnp.nan), v.at[:, :, :16].set(jnp.nan)
  options = dict(queries=queries, keys=keys, sinks=None, mask=Causal(), window=None, scale=1.0, softcap=None)
  run = lambda q, k, v, block: blockwise.attend(q, k, v, block=block, **options)[0]
  value, gradients = value_and_gradients(functools.partial(run, block=16), weights, q, k, v)
  assert all(jnp.isfinite(a).all() for a in (value, *gradients))
  assert not jnp.isfinite(jax.jit(functools.partial(run, block=32))(q, k, v)).all(), (
    "the control: one block, which is read"
  )


def test_no_array_of_all_scores_is_held():
  T = 64
  q, k, v, _, queries, keys, weights = case(T, T)
  options = dict(mask=Causal(), window=None, scale=1.0, softcap=None)
  f = lambda *a: blockwise.attend(*a, queries, keys, None, block=8, **options)[0]
  text = jax.jit(jax.grad(lambda *a: jnp.sum(f(*a) * weights), argnums=(0, 1, 2))).lower(q, k, v).as_text()
  largest = max(
    int(np.prod([int(n) for n in dims.split("x")[:-1]], dtype=np.int64))
    for dims in __import__("re").findall(r"tensor<((?:\d+x)+[a-z]\w*)>", text)
  )
  assert largest < B * N * T * T / 2


def test_the_survey_of_two_blocks_never_misses_a_key_that_is_seen(cases):
  """may_see is true wherever any pair is visible, over random positions, segments, padding, masks and windows; and it
  says no where two blocks of one document are apart (else nothing would ever be skipped)."""
  r, C = np.random.default_rng(4), 7
  missed = refused = 0

  def block(segments: int) -> Keys:
    positions = r.integers(0, 40) + r.integers(0, 8, (2, C))
    return Keys(
      jnp.asarray(np.where(r.random((2, C)) < 0.3, -1, positions), jnp.int32),
      jnp.asarray(np.sort(r.integers(0, segments, (2, C)))),
      jnp.asarray(r.random((2, C)) < 0.2),
    )

  for _ in range(400):
    segments = r.integers(1, 4)
    queries, keys = block(segments), block(segments)
    how = {"mask": [Causal(), Bidirectional(), Prefix()][r.integers(3)], "window": r.choice([None, 3, 12])}
    seen = bool(jnp.any(attention.visible(queries, keys, **how)))
    may = bool(blockwise.may_see(queries, keys, **how))
    missed += seen and not may
    refused += not may
  assert missed == 0 and refused > 100
  cases("surveys of two blocks", 400)
