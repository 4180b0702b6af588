"""Next-token losses in f32, computed in chunks so that logits [B, T, V] never exist as a whole."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def token_losses(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy and log Z of each token: logits f32 [..., V], targets int32 [...] -> f32 [...], f32 [...]."""
  log_z = jax.nn.logsumexp(logits, axis=-1)
  # A masked sum takes the place of a gather: its gradient is a select, not a scatter, and a sharded V stays sharded.
  is_target = targets[..., None] == jnp.arange(logits.shape[-1])
  return log_z - jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1), log_z


def chunked_loss(
  unembed: Callable[[jax.Array], jax.Array],
  hidden: jax.Array,  # [B, T, D]
  targets: jax.Array,  # int32 [B, T]
  weights: jax.Array,  # f32 [B, T]
  *,
  chunk: int,
  label_smoothing: float,
  z_loss: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """sum(weights * (loss + z_loss * log Z^2)), and the weighted sums of token values.

  The sums are {"loss", "plain_loss" (unsmoothed), "weight", "z" (log Z^2), "logit_rms"}. Logits exist for `chunk`
  tokens of each row at a time, in the backward pass too (jax.checkpoint). The z-loss is that of 2204.02311, section 5;
  label smoothing with e spreads e of the target's mass over all V classes (1512.00567, section 7).
  """
  B, T = targets.shape
  chunk = min(chunk, T)
  pad = -T % chunk
  # A chunk takes every n-th token, so that each device has a part of it if the length is split over devices.
  split_in_chunks = lambda x: jnp.moveaxis(
    jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2)).reshape(B, chunk, -1, *x.shape[2:]), 2, 0
  )

  @jax.checkpoint
  def body(total, piece):
    h, target, weight = piece
    logits = unembed(h)  # f32 [B, chunk, V]
    plain, log_z = token_losses(logits, target)
    loss = plain
    if label_smoothing:
      loss = (1 - label_smoothing) * plain + label_smoothing * (log_z - jnp.mean(logits, axis=-1))
    sums = {
      "loss": jnp.sum(weight * loss),
      "plain_loss": jnp.sum(weight * plain),
      "weight": jnp.sum(weight),
      "z": jnp.sum(weight * log_z**2),
      "logit_rms": jnp.sum(weight * jnp.sqrt(jnp.mean(jax.lax.stop_gradient(logits) ** 2, axis=-1))),
    }
    return jax.tree.map(jnp.add, total, (sums["loss"] + z_loss * sums["z"], sums)), None

  zero = jnp.zeros((), jnp.float32)
  start = (zero, dict.fromkeys(("loss", "plain_loss", "weight", "z", "logit_rms"), zero))
  pieces = tuple(map(split_in_chunks, (hidden, targets, weights)))
  if T <= chunk:
    (total, sums), _ = body(start, jax.tree.map(lambda x: x[0], pieces))
  else:
    (total, sums), _ = jax.lax.scan(body, start, pieces)
  return total, sums
