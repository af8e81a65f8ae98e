"""Multi-head bidirectional cross-attention (MHBC) of LookupViT.

The compressed tokens gather from the lookup tokens, and later, refined, they
write back through the same attention, transposed.

There are two ways to compute it, the same function of the same parameters, to
rounding. With `Y` the normalised lookup tokens, and for each head a slice of
the projections:

              direct, as in the paper    absorbed
  logits      Q (Y W_k)^T                (Q W_k^T) Y^T
  gathered    A (Y W_v)                  (A Y) W_v
  update      (A^T V') W_o'              A^T (V' W_o')

"absorbed" has no keys, values and updates of each lookup token's own: it meets
`M` queries and averages a head with them at their full width instead. Biases
follow: that of the keys moves all logits of a query alike, so that it is added
only where a softmax over queries sees it; that of the values is multiplied by
the sum of a row of `A`, which is one but for attention dropout. A norm of keys
(qk_norm) needs the keys: the logits are then direct, and the rest is absorbed.

"fused" is absorbed too, and in kernels on TPUs (`lookup_stream.py`) that also
have the MLP of the lookup tokens. They have neither qk_norm nor dropout, reuse
the weights, and hold none for `capture`; for all else, and on other platforms,
"fused" is "absorbed". The platform is that of the mesh in use, or JAX's default
where there is none.
"""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lookup_vit.models import attention, layers, lookup_kernels, lookup_stream

IMPLS = ("auto", "direct", "absorbed", "fused")
REUSE = ("weights", "logits", "none")
REUSE_SCALES = ("none", "tokens")

# "auto" is "fused" where the rows of all heads are at most so many widths: the
# lookup tokens' products are then less than twice those of direct MHBC.
_FUSED_ROWS = 2


def absorbs(impl: str, m: int, n: int, heads: int, width: int) -> bool:
  """Whether MHBC is computed in the absorbed way.

  Args:
    impl: one of `IMPLS`. "auto" takes the way of fewer multiply-adds: all
      lookup tokens together need `3 n D^2 + 3 n m D` of them directly, and
      `3 n m h D` absorbed, where the projections of the compressed tokens need
      another `3 m D^2`.
    m: number of compressed tokens.
    n: number of lookup tokens.
    heads: of MHBC.
    width: of a token, `D`.

  Raises:
    ValueError: there is no such implementation.
  """
  if impl not in IMPLS:
    raise ValueError(f"mhbc_impl={impl!r}: want one of {', '.join(IMPLS)}.")
  if impl != "auto":
    return impl != "direct"
  return n * m * heads + m * width < n * (width + m)


class Gathered(NamedTuple):
  """What fused contextualisation wants of gathering: see `lookup_stream.py`."""

  query: Float[Array, "b h r d"]
  sums: Float[Array, "b h r"]
  lookup: Float[Array, "b n D"]


class MHBC(nn.Module):
  """Both directions of the cross-attention, with one set of parameters.

  `gather` is called first; the attention it returns is what `contextualise`
  reuses. With `M` compressed and `N` lookup tokens:

    A = softmax_N(Q K^T / sqrt(d))
    gather:         (A V) W_o
    contextualise:  (B V') W_o',  B = A^T            for reuse="weights"
                                  B = softmax_M of the same logits, transposed,
                                                     for reuse="logits"
                                  no update          for reuse="none"

  With reuse_scale="tokens", B = A^T N / M. Rows of A add up to one, so rows of
  A^T to M / N on average, which is another number at every grid; the factor
  makes it one, which it is of reuse="logits" as it stands.
  """

  cfg: layers.LayerConfig
  width: int
  reuse: str = "weights"
  reuse_scale: str = "none"
  impl: str = "auto"

  def setup(self) -> None:
    """Makes the layers; raises ValueError for fields that do not fit."""
    cfg, width = self.cfg, self.width
    if self.reuse not in REUSE:
      raise ValueError(f"reuse={self.reuse!r}: want one of {', '.join(REUSE)}.")
    if self.reuse_scale not in REUSE_SCALES:
      raise ValueError(
        f"reuse_scale={self.reuse_scale!r}: want one of "
        f"{', '.join(REUSE_SCALES)}."
      )
    if self.reuse_scale != "none" and self.reuse != "weights":
      raise ValueError(
        f"reuse_scale={self.reuse_scale!r} is of reuse='weights', not of "
        f"reuse={self.reuse!r}."
      )
    layers.check_width(width, cfg.num_heads)
    self.norm_compressed = layers.layer_norm(cfg)
    self.norm_lookup = layers.layer_norm(cfg)
    self.query = layers.dense(cfg, width)
    self.key = layers.dense(cfg, width)
    self.value = layers.dense(cfg, width)
    self.out = layers.dense(cfg, width)
    if cfg.qk_norm:
      self.query_norm = layers.head_norm(cfg)
      self.key_norm = layers.head_norm(cfg)
    if self.reuse != "none":
      self.norm_refined = layers.layer_norm(cfg)
      self.value_back = layers.dense(cfg, width)
      self.out_back = layers.dense(cfg, width)

  def fuses(
    self,
    compressed: Float[Array, "b m D"],
    lookup: Float[Array, "b n D"],
    hidden: int,
  ) -> bool:
    """Whether `fused_gather` and `fused_contextualise` are to be called.

    Args:
      compressed: compressed tokens.
      lookup: lookup tokens.
      hidden: units of the lookup tokens' MLP.
    """
    cfg, m = self.cfg, compressed.shape[1]
    if self.is_initializing() or self.reuse != "weights" or cfg.qk_norm:
      return False
    if cfg.train and (cfg.dropout or cfg.attention_dropout):
      return False
    if "attention" in cfg.capture or self.impl not in ("auto", "fused"):
      return False
    rows = cfg.num_heads * lookup_stream.rows(m, lookup.dtype)
    if self.impl == "auto" and rows > _FUSED_ROWS * self.width:
      return False
    return lookup_stream.serves(lookup, m, cfg.num_heads, hidden)

  def gather(
    self, compressed: Float[Array, "b m D"], lookup: Float[Array, "b n D"]
  ) -> tuple[
    Float[Array, "b m D"], Float[Array, "b h m n"] | None, dict[str, Array]
  ]:
    """Lookup to compressed tokens.

    Returns:
      The update of the compressed tokens, the attention for `contextualise`
      (None where nothing is written back), and what `cfg.capture` asks for.
    """
    cfg = self.cfg
    q = self._query(compressed)
    absorbed = self._absorbs(compressed.shape[1], lookup.shape[1])
    y = self.norm_lookup(lookup)
    if cfg.qk_norm:
      q = self.query_norm(q)
    if absorbed and not cfg.qk_norm:
      logits, shift = self._absorbed_logits(q, y)
    else:
      k = layers.split_heads(self.key(y), cfg.num_heads)
      k = self.key_norm(k) if cfg.qk_norm else k
      logits, shift = attention.logits(q, k), 0
    weights = jax.nn.softmax(logits)
    captured = layers.captured_attention(cfg, logits + shift, weights)
    weights = layers.attention_dropout(cfg, self, weights).astype(y.dtype)
    if self.reuse == "weights":
      reused = weights
    elif self.reuse == "logits":
      reused = jax.nn.softmax(logits + shift, axis=-2)
      reused = layers.attention_dropout(cfg, self, reused).astype(y.dtype)
    else:
      reused = None
    if absorbed:
      x = self._absorbed_average(weights, y)
    else:
      v = layers.split_heads(self.value(y), cfg.num_heads)
      x = layers.merge_heads(jnp.einsum("bhmn,bnhd->bmhd", weights, v))
    return self.out(x), reused, captured

  def contextualise(
    self, compressed: Float[Array, "b m D"], reused: Float[Array, "b h m n"]
  ) -> Float[Array, "b n D"]:
    """Compressed to lookup tokens; returns the update of the lookup tokens."""
    v = self._value_back(compressed, reused.shape[-1])
    if self._absorbs(*reused.shape[-2:]):
      kernel, bias = self._parameters(self.out_back)
      return jnp.einsum("bhmn,bhmD->bnD", reused, _widen(v, kernel)) + bias
    x = layers.merge_heads(jnp.einsum("bhmn,bmhd->bnhd", reused, v))
    return self.out_back(x)

  def fused_gather(
    self, compressed: Float[Array, "b m D"], lookup: Float[Array, "b n D"]
  ) -> tuple[Float[Array, "b m D"], "Gathered", dict[str, Array]]:
    """As `gather`, with a kernel; its second result is for the other one."""
    cfg, m = self.cfg, compressed.shape[1]
    q = self._query(compressed)
    q = q / math.sqrt(q.shape[-1])
    rows = self._rows(q, lookup)
    kernel, bias = self._parameters(self.value)
    params = dict(self._stream(), value=self._of_heads(kernel.T))
    call = functools.partial(lookup_stream.gather, self._spec())
    x, sums, top, lookup = lookup_stream.per_device(
      call, lookup, rows, params=_as_rows(params)
    )
    x = layers.merge_heads(x[:, :, :m].swapaxes(1, 2)) + bias
    _, key_bias = self._parameters(self.key)
    captured = {}
    if "attention_logit_max" in cfg.capture:
      shift = jnp.einsum("bmhd,hd->bhm", q, key_bias.reshape(q.shape[-2:]))
      captured["attention_logit_max"] = jnp.max(top[:, :, :m] + shift)
    return self.out(x), Gathered(rows, sums, lookup), captured

  def fused_contextualise(
    self,
    compressed: Float[Array, "b m D"],
    gathered: "Gathered",
    keep: Float[Array, "b 2"],
    norm: Mapping[str, Array],
    mlp: Mapping[str, Mapping[str, Array]],
  ) -> Float[Array, "b n D"]:
    """The lookup tokens after the update and after their MLP.

    Args:
      compressed: compressed tokens, refined.
      gathered: of `fused_gather`.
      keep: by what to multiply the update, and that of the MLP.
      norm: parameters of the LayerNorm before the MLP.
      mlp: those of `layers.Mlp`.
    """
    query, sums, lookup = gathered
    v = self._value_back(compressed, lookup.shape[1])
    kernel, bias = self._parameters(self.out_back)
    params = dict(self._stream(), out=self._of_heads(kernel))
    params |= dict(
      out_bias=bias, mlp_scale=norm["scale"], mlp_bias=norm["bias"]
    )
    for name in ("in", "out"):
      dense = mlp[f"dense_{name}"]
      params[f"kernel_{name}"] = dense["kernel"].astype(self.cfg.dtype)
      params[f"bias_{name}"] = dense["bias"]
    call = functools.partial(lookup_stream.contextualise, self._spec())
    return lookup_stream.per_device(
      *(call, lookup, query, sums, self._rows(v, lookup), keep),
      params=_as_rows(params),
    )

  def _query(self, compressed):
    x = self.query(self.norm_compressed(compressed))
    return layers.split_heads(x, self.cfg.num_heads)

  def _value_back(self, compressed, n):
    v = self.value_back(self.norm_refined(compressed))
    if self.reuse_scale == "tokens":
      v = v * (n / compressed.shape[1])
    return layers.split_heads(v, self.cfg.num_heads)

  def _spec(self):
    return lookup_kernels.Spec(
      eps=self.cfg.norm_eps, approximate=self.cfg.gelu == "tanh"
    )

  def _stream(self):
    """Parameters of the lookup stream that both directions have."""
    norm = self.norm_lookup.variables["params"]
    kernel, _ = self._parameters(self.key)
    return dict(
      norm_scale=norm["scale"],
      norm_bias=norm["bias"],
      key=self._of_heads(kernel.T),
    )

  def _of_heads(self, kernel):
    return kernel.reshape(self.cfg.num_heads, -1, self.width)

  def _rows(self, x, lookup):
    """`[b, m, h, d]` as `[b, h, rows, d]`."""
    x = x.swapaxes(1, 2).astype(lookup.dtype)
    rows = lookup_stream.rows(x.shape[2], x.dtype)
    return jnp.pad(x, [(0, 0), (0, 0), (0, rows - x.shape[2]), (0, 0)])

  def _absorbs(self, m, n):
    return absorbs(self.impl, m, n, self.cfg.num_heads, self.width)

  def _parameters(self, dense):
    """Kernel `[D, D]` and bias `[D]` of a layer, in the compute dtype."""
    if self.is_initializing():
      dense(jnp.zeros((1, self.width)))
    params = dense.variables["params"]
    return (params[name].astype(self.cfg.dtype) for name in ("kernel", "bias"))

  def _absorbed_logits(self, query, y):
    """Logits without the bias of keys, and what that adds to a query's."""
    query = query / math.sqrt(query.shape[-1])
    kernel, bias = self._parameters(self.key)
    logits = jnp.einsum(
      *("bhmD,bnD->bhmn", _widen(query, kernel.T), y),
      preferred_element_type=jnp.float32,
    )
    bias = bias.reshape(query.shape[-2:])
    shift = jnp.einsum(
      "bmhd,hd->bhm", query, bias, preferred_element_type=jnp.float32
    )
    return logits, shift[..., None]

  def _absorbed_average(self, weights, y):
    """Values averaged with weights, of all heads together."""
    kernel, bias = self._parameters(self.value)
    x = _narrow(jnp.einsum("bhmn,bnD->bhmD", weights, y), kernel)
    if self.cfg.train and self.cfg.attention_dropout:
      sums = jnp.sum(weights, axis=-1, dtype=jnp.float32).swapaxes(1, 2)
      bias = bias.reshape(self.cfg.num_heads, -1) * sums[..., None]
      bias = layers.merge_heads(bias).astype(x.dtype)
    return x + bias


def _as_rows(params):
  """Vectors of width `D` as `[1, D]` in float32."""
  return {
    name: x[None].astype(jnp.float32) if x.ndim == 1 else x
    for name, x in params.items()
  }


# Heads come first, as the batch of a product: otherwise XLA takes up to twice
# as long on CPUs.


def _widen(
  x: Float[Array, "b m h d"], kernel: Float[Array, "h*d D"]
) -> Float[Array, "b h m D"]:
  """Each head projected to the full width, with its rows of a kernel."""
  heads = x.shape[2]
  kernel = kernel.reshape(heads, -1, kernel.shape[-1])
  x = jnp.einsum("hbmd,hdD->hbmD", jnp.moveaxis(x, 2, 0), kernel)
  return layers.constrain(x.swapaxes(0, 1), "batch", "heads", None, None)


def _narrow(
  x: Float[Array, "b h m D"], kernel: Float[Array, "D h*d"]
) -> Float[Array, "b m h*d"]:
  """Each head projected from the full width, with its columns of a kernel."""
  x = layers.constrain(x, "batch", "heads", None, None)
  kernel = kernel.reshape(kernel.shape[0], x.shape[1], -1).swapaxes(0, 1)
  x = jnp.einsum("hbmD,hDd->hbmd", x.swapaxes(0, 1), kernel)
  return layers.merge_heads(jnp.moveaxis(x, 0, 2))
