"""Next-token losses, in f32, without [B, T, V] logits ever existing."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def token_losses(logits: jax.Array, targets: jax.Array, *, label_smoothing: float) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy against the (smoothed) target and log Z.  logits f32 [..., V], targets [...] -> [...], [...]."""
  log_z = jax.nn.logsumexp(logits, axis=-1)
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  loss = log_z - picked
  if label_smoothing:
    # mass e spread over all V classes: (1-e) (logZ - l_t) + e (logZ - mean l)
    loss = (1 - label_smoothing) * loss + label_smoothing * (log_z - jnp.mean(logits, axis=-1))
  return loss, log_z


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
  """sum(weights * (loss + z_loss * log Z^2)), and the sums {"loss", "weight", "z", "logit_rms"} it consists of.

  Logits exist for `chunk` tokens of each row at a time, in the backward pass too (jax.checkpoint).
  z-loss: 2204.02311, section 5. The sums divide by sum(weights) where they are reported.
  """
  B, T, D = hidden.shape
  chunk = min(chunk, T)
  pad = -T % chunk
  split = lambda x: jnp.moveaxis(  # noqa: E731  [B, T, ...] -> [chunks, B, chunk, ...]
    jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2)).reshape(B, -1, chunk, *x.shape[2:]), 1, 0
  )

  @jax.checkpoint
  def body(total, piece):
    h, target, weight = piece
    logits = unembed(h)  # f32 [B, chunk, V]
    loss, log_z = token_losses(logits, target, label_smoothing=label_smoothing)
    z = jnp.sum(weight * log_z**2)
    sums = {
      "loss": jnp.sum(weight * loss),
      "weight": jnp.sum(weight),
      "z": z,
      "logit_rms": jnp.sum(weight * jnp.sqrt(jnp.mean(jax.lax.stop_gradient(logits) ** 2, axis=-1))),
    }
    return jax.tree.map(jnp.add, total, (sums["loss"] + z_loss * z, sums)), None

  zero = jnp.zeros((), jnp.float32)
  start = (zero, dict.fromkeys(("loss", "weight", "z", "logit_rms"), zero))
  pieces = (split(hidden), split(targets), split(weights))
  if T <= chunk:
    (total, sums), _ = body(start, jax.tree.map(lambda x: x[0], pieces))
  else:
    (total, sums), _ = jax.lax.scan(body, start, pieces)
  return total, sums
