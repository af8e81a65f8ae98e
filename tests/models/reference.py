"""ViT, LookupViT and captioner as equations stand, in float64 NumPy.

Independent of the package but for the names in the parameter tree: loops over
heads, patches and output positions instead of reshapes and library calls. HIPS
autograd differentiates it.
"""

import dataclasses
import itertools
import math

import autograd.numpy as np
from autograd.scipy.special import erf


@dataclasses.dataclass(frozen=True)
class Spec:
  """What a model is, apart from its parameters."""

  patch_size: tuple[int, ...] = ()
  num_heads: int = 1
  mhbc_heads: int | None = None
  grid: tuple[int, ...] = ()
  heads: str = "both"
  compressed_init: str = "resize"
  reuse: str = "weights"
  reuse_scale: str = "none"
  positions: str = "learned"
  pool: str = "gap"
  qk_norm: bool = False
  stem: str = "patch"
  gelu: str = "tanh"
  norm_eps: float = 1e-6


# Layers.


def layer_norm(spec, p, x):
  mean = np.mean(x, axis=-1, keepdims=True)
  variance = np.mean((x - mean) ** 2, axis=-1, keepdims=True)
  y = (x - mean) / np.sqrt(variance + spec.norm_eps) * p["scale"]
  return y + p["bias"] if "bias" in p else y


def linear(p, x):
  return np.dot(x, p["kernel"]) + p["bias"]


def softmax(x, axis):
  e = np.exp(x - np.max(x, axis=axis, keepdims=True))
  return e / np.sum(e, axis=axis, keepdims=True)


def gelu(spec, x):
  if spec.gelu == "exact":
    return x * (1 + erf(x / math.sqrt(2))) / 2
  return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def mlp(spec, p, x):
  return linear(p["dense_out"], gelu(spec, linear(p["dense_in"], x)))


def heads_of(x, num_heads):
  """The columns of each head, a list of `[batch, tokens, width / heads]`."""
  d = x.shape[-1] // num_heads
  return [x[:, :, h * d : (h + 1) * d] for h in range(num_heads)]


def transpose(x):
  return np.swapaxes(x, -1, -2)


def attention_logits(spec, p, num_heads, queries, memory):
  """A list over heads of `[batch, m, n]`."""
  q = heads_of(linear(p["query"], queries), num_heads)
  k = heads_of(linear(p["key"], memory), num_heads)
  if spec.qk_norm:
    q = [layer_norm(spec, p["query_norm"], x) for x in q]
    k = [layer_norm(spec, p["key_norm"], x) for x in k]
  return [
    np.matmul(a, transpose(b)) / math.sqrt(a.shape[-1])
    for a, b in zip(q, k, strict=True)
  ]


def weigh(weights, values):
  """Each head's weights times its values, side by side again."""
  v = heads_of(values, len(weights))
  return np.concatenate(
    [np.matmul(a, b) for a, b in zip(weights, v, strict=True)], axis=-1
  )


def attention(spec, p, queries, memory):
  logits = attention_logits(spec, p, spec.num_heads, queries, memory)
  weights = [softmax(x, -1) for x in logits]
  x = linear(p["out"], weigh(weights, linear(p["value"], memory)))
  return x, dict(attention=np.stack(weights, 1), logits=np.stack(logits, 1))


def encoder_block(spec, p, x):
  y = layer_norm(spec, p["norm_attention"], x)
  y, captured = attention(spec, p["attention"], y, y)
  x = x + y
  x = x + mlp(spec, p["mlp"], layer_norm(spec, p["norm_mlp"], x))
  return x, captured


def lookup_block(spec, p, compressed, lookup):
  """One block; returns both kinds of tokens and what attention was."""
  mhbc = p["mhbc"]
  num_heads = spec.mhbc_heads or spec.num_heads

  # Information gathering.
  y = layer_norm(spec, mhbc["norm_lookup"], lookup)
  queries = layer_norm(spec, mhbc["norm_compressed"], compressed)
  logits = attention_logits(spec, mhbc, num_heads, queries, y)
  weights = [softmax(x, -1) for x in logits]
  update = weigh(weights, linear(mhbc["value"], y))
  compressed = compressed + linear(mhbc["out"], update)

  # Representation refinement.
  compressed, refined = encoder_block(spec, p["refinement"], compressed)

  # Global contextualisation.
  if spec.reuse != "none":
    back = weights
    if spec.reuse == "logits":
      back = [softmax(x, -2) for x in logits]
    if spec.reuse_scale == "tokens":
      back = [a * (lookup.shape[1] / compressed.shape[1]) for a in back]
    v = linear(
      mhbc["value_back"], layer_norm(spec, mhbc["norm_refined"], compressed)
    )
    update = weigh([transpose(a) for a in back], v)
    lookup = lookup + linear(mhbc["out_back"], update)
  y = layer_norm(spec, p["norm_lookup_mlp"], lookup)
  lookup = lookup + mlp(spec, p["lookup_mlp"], y)

  largest = max(np.max(np.stack(logits)), np.max(refined["logits"]))
  captured = dict(attention=np.stack(weights, 1), attention_logit_max=largest)
  return compressed, lookup, captured


# Grids.


def resize_weights(source, target):
  """Linear antialiased resize of one axis, as a matrix `[target, source]`.

  A triangle of half-width 1, in units of the coarser of the two spacings,
  around the centre of each output position, normalised.
  """
  spacing = max(source / target, 1)
  weights = []
  for i in range(target):
    centre = (i + 0.5) * source / target - 0.5
    row = [max(0, 1 - abs(centre - j) / spacing) for j in range(source)]
    weights.append([w / sum(row) for w in row])
  return np.array(weights)


def resize(x, source, target):
  """`T(x, g)` for `x [batch, tokens, width]`."""
  batch, _, width = x.shape
  x = np.reshape(x, (batch, *source, width))
  for axis, (n, m) in enumerate(zip(source, target, strict=True), 1):
    x = np.moveaxis(
      np.tensordot(resize_weights(n, m), x, axes=(1, axis)), 0, axis
    )
  return np.reshape(x, (batch, -1, width))


def pool(x, source, target):
  """The mean over each cell of the target, as adaptive average pooling."""
  batch, _, width = x.shape
  x = np.reshape(x, (batch, *source, width))
  cells = []
  for index in itertools.product(*map(range, target)):
    window = tuple(
      slice(math.floor(i * n / m), math.ceil((i + 1) * n / m))
      for i, n, m in zip(index, source, target, strict=True)
    )
    axes = tuple(range(1, 1 + len(source)))
    cells.append(np.mean(x[(slice(None), *window)], axis=axes))
  return np.stack(cells, axis=1)


def first_compressed(spec, params, lookup, pos, grid):
  """The compressed tokens before the first block."""
  if spec.compressed_init == "learned":
    queries = params["compressed_queries"]
    own, width = queries.shape[:-1], queries.shape[-1]
    queries = resize(np.reshape(queries, (1, -1, width)), own, spec.grid)
    return queries + np.zeros((len(lookup), 1, 1))
  fit = pool if spec.compressed_init == "average" else resize
  return fit(lookup, grid, spec.grid) + fit(pos, grid, spec.grid)


def tokenise(spec, params, images):
  """The tokens of the patches, in row-major order, and their grid."""
  patch, p, i = spec.patch_size, params["embedding"], 0
  while f"stem_{i}" in params:
    stride = 1 if spec.stem == "deep_conv" and i % 2 == 0 else 2
    images = convolve(params[f"stem_{i}"]["kernel"], images, stride)
    images = gelu(spec, layer_norm(spec, params[f"stem_norm_{i}"], images))
    patch, i = (1, 1), i + 1
  grid = tuple(n // k for n, k in zip(images.shape[1:-1], patch, strict=True))
  kernel = np.reshape(p["kernel"], (-1, p["kernel"].shape[-1]))
  tokens = []
  for index in itertools.product(*map(range, grid)):
    window = tuple(
      slice(i * k, (i + 1) * k) for i, k in zip(index, patch, strict=True)
    )
    pixels = np.reshape(images[(slice(None), *window)], (len(images), -1))
    tokens.append(np.dot(pixels, kernel) + p["bias"])
  return np.stack(tokens, axis=1), grid


def convolve(kernel, images, stride):
  """3x3 convolution of images with a border of zeros."""
  border = 0 * images[:, :1]
  padded = np.concatenate([border, images, border], axis=1)
  border = 0 * padded[:, :, :1]
  padded = np.concatenate([border, padded, border], axis=2)
  kernel = np.reshape(kernel, (-1, kernel.shape[-1]))
  rows = []
  for y in range(0, images.shape[1], stride):
    row = []
    for x in range(0, images.shape[2], stride):
      window = padded[:, y : y + 3, x : x + 3]
      row.append(np.dot(np.reshape(window, (len(images), -1)), kernel))
    rows.append(np.stack(row, axis=1))
  return np.stack(rows, axis=1)


def sincos(grid, width):
  """big_vision's sine-cosine positions, for any rank: `[tokens, width]`."""
  count = width // (2 * len(grid))
  table = []
  for index in itertools.product(*map(range, grid)):
    row = []
    for position in reversed(index):
      angles = [position / 10_000 ** (k / (count - 1)) for k in range(count)]
      row += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    table.append(row + [0.0] * (width - len(row)))
  return np.array(table)


def positions(spec, p, grid, width):
  if spec.positions == "sincos":
    return sincos(grid, width)[None]
  return np.reshape(p["pos_embedding"], (1, -1, width))


# Models.


def cross_entropy(logits, labels):
  """Mean over the batch; `labels [batch, classes]` sum to one."""
  top = np.max(logits, axis=-1, keepdims=True)
  normaliser = np.log(np.sum(np.exp(logits - top), axis=-1, keepdims=True))
  return -np.mean(np.sum(labels * (logits - top - normaliser), axis=-1))


def depth_of(params):
  return sum(name.startswith("encoderblock_") for name in params)


def lookup_vit(spec, params, images):
  """All that the model can return, whatever is asked for."""
  lookup, grid = tokenise(spec, params, images)
  return lookup_heads(spec, params, lookup_encoder(spec, params, lookup, grid))


def lookup_encoder(spec, params, lookup, grid):
  """From the patches' tokens to the pre-logits."""
  pos = positions(spec, params, grid, lookup.shape[-1])
  compressed = first_compressed(spec, params, lookup, pos, grid)
  lookup = lookup + pos
  blocks = []
  for i in range(depth_of(params)):
    compressed, lookup, captured = lookup_block(
      spec, params[f"encoderblock_{i}"], compressed, lookup
    )
    captured["block_compressed_tokens"] = compressed
    captured["block_lookup_tokens"] = lookup
    blocks.append(captured)
  out = {k: np.stack([b[k] for b in blocks]) for k in blocks[0]}
  for name, x in (("compressed", compressed), ("lookup", lookup)):
    x = layer_norm(spec, params[f"norm_{name}"], x)
    out[f"{name}_tokens"] = x
    out[f"pre_logits_{name}"] = np.mean(x, axis=1)
  return out


def lookup_heads(spec, params, out):
  """The logits beside the pre-logits, where the model has classes."""
  heads = ["compressed", "lookup"] if spec.heads == "both" else [spec.heads]
  if f"head_{heads[0]}" in params:
    logits = [
      linear(params[f"head_{name}"], out[f"pre_logits_{name}"])
      for name in heads
    ]
    for name, x in zip(heads, logits, strict=True):
      out[f"logits_{name}"] = x
    out["logits"] = sum(logits) / len(heads)
  return out


def lookup_vit_loss(spec, params, images, labels):
  out = lookup_vit(spec, params, images)
  losses = [
    cross_entropy(x, labels)
    for name, x in out.items()
    if name.startswith("logits_")
  ]
  return sum(losses) / len(losses)


def vit(spec, params, images):
  """All that the model can return, whatever is asked for."""
  x, grid = tokenise(spec, params, images)
  return vit_head(params, vit_encoder(spec, params, x, grid))


def vit_encoder(spec, params, x, grid):
  """From the patches' tokens to the pre-logits."""
  x = x + positions(spec, params, grid, x.shape[-1])
  if spec.pool == "tok":
    cls = params["cls"] + np.zeros((len(x), 1, 1))
    x = np.concatenate([cls, x], axis=1)
  blocks = []
  for i in range(depth_of(params)):
    x, captured = encoder_block(spec, params[f"encoderblock_{i}"], x)
    blocks.append(
      dict(
        block_tokens=x,
        attention=captured["attention"],
        attention_logit_max=np.max(captured["logits"]),
      )
    )
  out = {k: np.stack([b[k] for b in blocks]) for k in blocks[0]}
  x = layer_norm(spec, params["encoder_norm"], x)
  out["tokens"] = x
  if spec.pool == "gap":
    x = np.mean(x, axis=1)
  elif spec.pool == "tok":
    x = x[:, 0]
  else:
    p = params["map_head"]
    probe = p["probe"] + np.zeros((len(x), 1, 1))
    # The probe attends to the tokens without a norm or residual of its own.
    x, _ = attention(spec, p["attention"], probe, x)
    x = x + mlp(spec, p["mlp"], layer_norm(spec, p["norm_mlp"], x))
    x = x[:, 0]
  out["pre_logits"] = x
  return out


def vit_head(params, out):
  """The logits beside the pre-logits, where the model has classes."""
  if "head" in params:
    out["logits"] = linear(params["head"], out["pre_logits"])
  return out


def vit_loss(spec, params, images, labels):
  return cross_entropy(vit(spec, params, images)["logits"], labels)


def factorised(spec, params, videos):
  """All that a factorised encoder can return: by slices, then over time."""
  p = params["spatial"]
  x, (time, *space) = tokenise(spec, p, videos)
  n = math.prod(space)
  encode = vit_encoder if "temporal" in params else lookup_encoder
  slices = [
    encode(spec, p, x[:, i * n : (i + 1) * n], tuple(space))
    for i in range(time)
  ]
  out = {}
  for name in slices[0]:
    each = [s[name] for s in slices]
    if name == "attention_logit_max":
      out[name] = np.max(np.stack(each), axis=0)
    else:
      blocks = name == "attention" or name.startswith("block_")
      out[name] = np.stack(each, axis=2 if blocks else 1)
  for name in params:
    if name.startswith("temporal"):
      suffix = name.removeprefix("temporal")
      vectors = out.pop(f"pre_logits{suffix}")
      over_time = dataclasses.replace(spec, pool="gap")
      found = vit_encoder(over_time, params[name], vectors, (time,))
      out[f"pre_logits{suffix}"] = found.pop("pre_logits")
      largest = out["attention_logit_max"], found.pop("attention_logit_max")
      out["attention_logit_max"] = np.concatenate(largest)
      for k, v in found.items():
        out[f"temporal_{k}{suffix}"] = v
  if "temporal" in params:
    return vit_head(params, out)
  return lookup_heads(spec, params, out)


def factorised_loss(spec, params, videos, labels):
  out = factorised(spec, params, videos)
  heads = [v for k, v in out.items() if k.startswith("logits_")]
  losses = [cross_entropy(x, labels) for x in heads or [out["logits"]]]
  return sum(losses) / len(losses)


def decoder_block(spec, p, x, memory):
  """One block of a decoder; returns the tokens and what attention was."""
  y = layer_norm(spec, p["norm_self_attention"], x)
  update, largest = [], []
  # A token attends to those before it and to itself.
  for i in range(y.shape[1]):
    one, own = attention(
      spec, p["self_attention"], y[:, i : i + 1], y[:, : i + 1]
    )
    update.append(one)
    largest.append(np.max(own["logits"]))
  x = x + np.concatenate(update, axis=1)
  y = layer_norm(spec, p["norm_cross_attention"], x)
  y, read = attention(spec, p["cross_attention"], y, memory)
  x = x + y
  x = x + mlp(spec, p["mlp"], layer_norm(spec, p["norm_mlp"], x))
  largest = np.max(np.stack([*largest, np.max(read["logits"])]))
  return x, dict(attention=read["attention"], attention_logit_max=largest)


def decoder(spec, params, inputs, memory):
  """Logits of the ids that come next, and what attention was."""
  table = params["embedding"]["embedding"]
  x = np.stack([np.stack([table[i] for i in ids]) for ids in inputs])
  x = x + params["pos_embedding"][: x.shape[1]]
  blocks = []
  for i in range(sum(name.startswith("decoderblock_") for name in params)):
    x, captured = decoder_block(spec, params[f"decoderblock_{i}"], x, memory)
    blocks.append(captured)
  out = {k: np.stack([b[k] for b in blocks]) for k in blocks[0]}
  x = layer_norm(spec, params["norm"], x)
  if "head" in params:
    out["logits"] = linear(params["head"], x)
  else:
    out["logits"] = np.dot(x, transpose(table))
  return out


def captioner(spec, encoder, params, images, inputs):
  """All that a captioner can return; `encoder` is its encoder's `Spec`."""
  if "norm_compressed" in params["encoder"]:
    encoded = lookup_vit(encoder, params["encoder"], images)
    memory = encoded["compressed_tokens"]
  else:
    encoded = vit(encoder, params["encoder"], images)
    memory = encoded["tokens"]
  out = decoder(spec, params["decoder"], inputs, memory)
  largest = encoded["attention_logit_max"], out["attention_logit_max"]
  out["attention_logit_max"] = np.concatenate(largest)
  return dict(out, memory=memory)
