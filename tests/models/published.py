"""ViTs as other projects name and define them, in float64 NumPy.

Independent of the package: each reads its weights by its own names. Sources:
timm's VisionTransformer and AttentionPoolLatent, transformers' ViT and SigLIP,
big_vision's models/vit.py and, for AugReg, google-research/vision_transformer.
"""

import math

import numpy as np
from scipy.special import erf

WIDTH, DEPTH, HEADS, PATCH, SIDE, CLASSES = 24, 2, 3, 4, 3, 5


def _softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def _attend(q, k, v):
  """Attention of each head; `[b, n, D]`."""
  result = np.zeros_like(q)
  size = q.shape[-1] // HEADS
  for h in range(HEADS):
    s = slice(h * size, (h + 1) * size)
    logits = q[..., s] @ np.swapaxes(k[..., s], 1, 2) / math.sqrt(size)
    result[..., s] = _softmax(logits) @ v[..., s]
  return result


def _gelu(x, exact):
  if exact:
    return x * 0.5 * (1 + erf(x / math.sqrt(2)))
  return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _normed(x, scale, bias, eps):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale + bias


def _patches(images):
  """`[b, n, PATCH, PATCH, 3]`, row by row."""
  found = []
  for r in range(0, images.shape[1], PATCH):
    for c in range(0, images.shape[2], PATCH):
      found.append(images[:, r : r + PATCH, c : c + PATCH])
  return np.stack(found, 1)


class Torch:
  """What PyTorch's models share: linear layers `[out, in]`."""

  def __init__(self, weights, exact, eps):
    self.w = {k: np.asarray(x, np.float64) for k, x in weights.items()}
    self.exact, self.eps = exact, eps

  def linear(self, name, x):
    return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

  def norm(self, name, x):
    return _normed(
      x, self.w[f"{name}.weight"], self.w[f"{name}.bias"], self.eps
    )

  def conv(self, name, images):
    kernel = self.w[f"{name}.weight"]  # [out, in, rows, columns]
    x = np.einsum("bnrck,okrc->bno", _patches(images), kernel)
    return x + self.w[f"{name}.bias"]

  def mlp(self, first, second, x):
    return self.linear(second, _gelu(self.linear(first, x), self.exact))


def timm(weights, images, pool="token"):
  """VisionTransformer of timm; pool "token", "avg" (no fc_norm) or "map"."""
  m = Torch(weights, True, 1e-6)
  w = m.w
  x = m.conv("patch_embed.proj", images)
  if "cls_token" in w:
    cls = np.broadcast_to(w["cls_token"], (len(x), 1, WIDTH))
    if w["pos_embed"].shape[1] == x.shape[1]:  # no_embed_class
      x = np.concatenate([cls, x + w["pos_embed"]], 1)
    else:
      x = np.concatenate([cls, x], 1) + w["pos_embed"]
  else:
    x = x + w["pos_embed"]
  for i in range(DEPTH):
    name = f"blocks.{i}"
    y = m.linear(f"{name}.attn.qkv", m.norm(f"{name}.norm1", x))
    y = m.linear(f"{name}.attn.proj", _attend(*np.split(y, 3, -1)))
    x = x + y * w.get(f"{name}.ls1.gamma", 1)
    y = m.norm(f"{name}.norm2", x)
    y = m.mlp(f"{name}.mlp.fc1", f"{name}.mlp.fc2", y)
    x = x + y * w.get(f"{name}.ls2.gamma", 1)
  x = m.norm("norm", x)
  if pool == "map":
    q = np.broadcast_to(w["attn_pool.latent"], (len(x), 1, WIDTH))
    k, v = np.split(m.linear("attn_pool.kv", x), 2, -1)
    y = m.linear("attn_pool.proj", _attend(m.linear("attn_pool.q", q), k, v))
    z = m.mlp(
      "attn_pool.mlp.fc1", "attn_pool.mlp.fc2", m.norm("attn_pool.norm", y)
    )
    x = (y + z)[:, 0]
  else:
    x = x[:, 0] if pool == "token" else x.mean(1)
  return m.linear("head", x)


def hugging_face(weights, images):
  """ViTForImageClassification."""
  m = Torch(weights, True, 1e-12)
  x = m.conv("vit.embeddings.patch_embeddings.projection", images)
  cls = np.broadcast_to(m.w["vit.embeddings.cls_token"], (len(x), 1, WIDTH))
  x = np.concatenate([cls, x], 1) + m.w["vit.embeddings.position_embeddings"]
  for i in range(DEPTH):
    name = f"vit.encoder.layer.{i}"
    y = m.norm(f"{name}.layernorm_before", x)
    of = f"{name}.attention.attention"
    y = _attend(*(m.linear(f"{of}.{n}", y) for n in ("query", "key", "value")))
    x = x + m.linear(f"{name}.attention.output.dense", y)
    y = m.norm(f"{name}.layernorm_after", x)
    x = x + m.mlp(f"{name}.intermediate.dense", f"{name}.output.dense", y)
  return m.linear("classifier", m.norm("vit.layernorm", x)[:, 0])


def siglip(weights, images, pooled=True):
  """The pooled output of SigLIP's image tower, or its last tokens."""
  m = Torch(weights, False, 1e-6)
  name = "vision_model.embeddings"
  x = m.conv(f"{name}.patch_embedding", images)
  x = x + m.w[f"{name}.position_embedding.weight"]
  for i in range(DEPTH):
    name = f"vision_model.encoder.layers.{i}"
    y = m.norm(f"{name}.layer_norm1", x)
    of = f"{name}.self_attn"
    y = _attend(*(m.linear(f"{of}.{n}_proj", y) for n in "qkv"))
    x = x + m.linear(f"{of}.out_proj", y)
    y = m.norm(f"{name}.layer_norm2", x)
    x = x + m.mlp(f"{name}.mlp.fc1", f"{name}.mlp.fc2", y)
  x = m.norm("vision_model.post_layernorm", x)
  if not pooled:
    return x
  # torch.nn.MultiheadAttention.
  name = "vision_model.head"
  kernels = np.split(m.w[f"{name}.attention.in_proj_weight"], 3)
  biases = np.split(m.w[f"{name}.attention.in_proj_bias"], 3)
  probe = np.broadcast_to(m.w[f"{name}.probe"], (len(x), 1, WIDTH))
  q, k, v = (
    y @ kernel.T + bias
    for y, kernel, bias in zip((probe, x, x), kernels, biases, strict=True)
  )
  x = m.linear(f"{name}.attention.out_proj", _attend(q, k, v))
  y = m.norm(f"{name}.layernorm", x)
  return (x + m.mlp(f"{name}.mlp.fc1", f"{name}.mlp.fc2", y))[:, 0]


def flax(weights, images, prefix="", places=(0, 1, 0, 0)):
  """big_vision's ViT; AugReg's with its numbers of modules in a block.

  Args:
    weights: by name.
    images: `[b, rows, columns, 3]`.
    prefix: of the names.
    places: numbers of the LayerNorms, attention and MLP of a block.
  """
  w = {
    k.removeprefix(prefix): np.asarray(x, np.float64)
    for k, x in weights.items()
    if k.startswith(prefix)
  }
  norm_0, norm_1, attention, mlp = places

  def dense(name, x):
    return x @ w[f"{name}/kernel"] + w[f"{name}/bias"]

  def norm(name, x):
    return _normed(x, w[f"{name}/scale"], w[f"{name}/bias"], 1e-6)

  def attend(name, queries, memory):
    parts = []
    for part, x in (("query", queries), ("key", memory), ("value", memory)):
      x = np.einsum("bnD,Dhd->bnhd", x, w[f"{name}/{part}/kernel"])
      x = x + w[f"{name}/{part}/bias"]
      parts.append(x.reshape(*x.shape[:2], -1))
    x = _attend(*parts)
    x = x.reshape(*x.shape[:2], HEADS, -1)
    out = w[f"{name}/out/kernel"]
    return np.einsum("bnhd,hdD->bnD", x, out) + w[f"{name}/out/bias"]

  def feed(name, x):
    return dense(f"{name}/Dense_1", _gelu(dense(f"{name}/Dense_0", x), False))

  kernel = w["embedding/kernel"]
  x = np.einsum("bnrck,rcko->bno", _patches(images), kernel)
  x = x + w["embedding/bias"]
  old = "Transformer/posembed_input/pos_embedding"
  if old not in w:
    x = x + w["pos_embedding"]
  if "cls" in w:
    cls = np.broadcast_to(w["cls"], (len(x), 1, WIDTH))
    x = np.concatenate([cls, x], 1)
  if old in w:
    x = x + w[old]
  for i in range(DEPTH):
    name = f"Transformer/encoderblock_{i}"
    y = norm(f"{name}/LayerNorm_{norm_0}", x)
    x = x + attend(f"{name}/MultiHeadDotProductAttention_{attention}", y, y)
    y = norm(f"{name}/LayerNorm_{norm_1}", x)
    x = x + feed(f"{name}/MlpBlock_{mlp}", y)
  x = norm("Transformer/encoder_norm", x)
  if "MAPHead_0/probe" in w:
    probe = np.broadcast_to(w["MAPHead_0/probe"], (len(x), 1, WIDTH))
    x = attend("MAPHead_0/MultiHeadDotProductAttention_0", probe, x)
    x = x + feed("MAPHead_0/MlpBlock_0", norm("MAPHead_0/LayerNorm_0", x))
    x = x[:, 0]
  else:
    x = x[:, 0] if "cls" in w else x.mean(1)
  return dense("head", x)


# Random weights.


class _Draw:
  def __init__(self, seed):
    self.rng = np.random.default_rng(seed)
    self.w = {}

  def array(self, name, *shape):
    std = 1 / math.sqrt(WIDTH) if len(shape) > 1 else 0.3
    x = self.rng.normal(0, std, shape)
    is_scale = name.endswith("scale") or (
      name.endswith("weight") and len(shape) == 1
    )
    self.w[name] = (x + is_scale).astype(np.float32)

  def linear(self, name, of, to):
    self.array(f"{name}.weight", to, of)
    self.array(f"{name}.bias", to)

  def norm(self, name):
    self.array(f"{name}.weight", WIDTH)
    self.array(f"{name}.bias", WIDTH)

  def conv(self, name):
    self.array(f"{name}.weight", WIDTH, 3, PATCH, PATCH)
    self.array(f"{name}.bias", WIDTH)

  def dense(self, name, of, to):
    self.array(f"{name}/kernel", of, to)
    self.array(f"{name}/bias", to)

  def flax_norm(self, name):
    self.array(f"{name}/scale", WIDTH)
    self.array(f"{name}/bias", WIDTH)

  def flax_attention(self, name):
    size = WIDTH // HEADS
    for part in ("query", "key", "value"):
      self.array(f"{name}/{part}/kernel", WIDTH, HEADS, size)
      self.array(f"{name}/{part}/bias", HEADS, size)
    self.array(f"{name}/out/kernel", HEADS, size, WIDTH)
    self.array(f"{name}/out/bias", WIDTH)


def draw_timm(seed=0, pool="token", positions=None, scales=False, prefix=""):
  """Weights by timm's names; `positions`, SIDE**2 or one more."""
  d = _Draw(seed)
  d.conv("patch_embed.proj")
  if pool == "token":
    d.array("cls_token", 1, 1, WIDTH)
  count = SIDE**2 + (pool == "token") if positions is None else positions
  d.array("pos_embed", 1, count, WIDTH)
  for i in range(DEPTH):
    name = f"blocks.{i}"
    for j in "12":
      d.norm(f"{name}.norm{j}")
      if scales:
        d.array(f"{name}.ls{j}.gamma", WIDTH)
    d.linear(f"{name}.attn.qkv", WIDTH, 3 * WIDTH)
    d.linear(f"{name}.attn.proj", WIDTH, WIDTH)
    d.linear(f"{name}.mlp.fc1", WIDTH, 4 * WIDTH)
    d.linear(f"{name}.mlp.fc2", 4 * WIDTH, WIDTH)
  d.norm("norm")
  if pool == "map":
    d.array("attn_pool.latent", 1, 1, WIDTH)
    d.linear("attn_pool.q", WIDTH, WIDTH)
    d.linear("attn_pool.kv", WIDTH, 2 * WIDTH)
    d.linear("attn_pool.proj", WIDTH, WIDTH)
    d.norm("attn_pool.norm")
    d.linear("attn_pool.mlp.fc1", WIDTH, 4 * WIDTH)
    d.linear("attn_pool.mlp.fc2", 4 * WIDTH, WIDTH)
  d.linear("head", WIDTH, CLASSES)
  return {prefix + k: x for k, x in d.w.items()}


def draw_hugging_face(seed=0):
  """Weights by the names of ViTForImageClassification."""
  d = _Draw(seed)
  d.array("vit.embeddings.cls_token", 1, 1, WIDTH)
  d.array("vit.embeddings.position_embeddings", 1, SIDE**2 + 1, WIDTH)
  d.conv("vit.embeddings.patch_embeddings.projection")
  for i in range(DEPTH):
    name = f"vit.encoder.layer.{i}"
    for part in ("query", "key", "value"):
      d.linear(f"{name}.attention.attention.{part}", WIDTH, WIDTH)
    d.linear(f"{name}.attention.output.dense", WIDTH, WIDTH)
    d.linear(f"{name}.intermediate.dense", WIDTH, 4 * WIDTH)
    d.linear(f"{name}.output.dense", 4 * WIDTH, WIDTH)
    d.norm(f"{name}.layernorm_before")
    d.norm(f"{name}.layernorm_after")
  d.norm("vit.layernorm")
  d.linear("classifier", WIDTH, CLASSES)
  return d.w


def draw_siglip(seed=0):
  """Weights by the names of SiglipModel, with some of its other tower."""
  d = _Draw(seed)
  name = "vision_model.embeddings"
  d.conv(f"{name}.patch_embedding")
  d.array(f"{name}.position_embedding.weight", SIDE**2, WIDTH)
  for i in range(DEPTH):
    name = f"vision_model.encoder.layers.{i}"
    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
      d.linear(f"{name}.self_attn.{part}", WIDTH, WIDTH)
    d.norm(f"{name}.layer_norm1")
    d.norm(f"{name}.layer_norm2")
    d.linear(f"{name}.mlp.fc1", WIDTH, 4 * WIDTH)
    d.linear(f"{name}.mlp.fc2", 4 * WIDTH, WIDTH)
  d.norm("vision_model.post_layernorm")
  name = "vision_model.head"
  d.array(f"{name}.probe", 1, 1, WIDTH)
  d.array(f"{name}.attention.in_proj_weight", 3 * WIDTH, WIDTH)
  d.array(f"{name}.attention.in_proj_bias", 3 * WIDTH)
  d.linear(f"{name}.attention.out_proj", WIDTH, WIDTH)
  d.norm(f"{name}.layernorm")
  d.linear(f"{name}.mlp.fc1", WIDTH, 4 * WIDTH)
  d.linear(f"{name}.mlp.fc2", 4 * WIDTH, WIDTH)
  d.linear("text_model.encoder.layers.0.mlp.fc1", WIDTH, WIDTH)
  d.array("logit_scale", 1)
  return d.w


def draw_flax(seed=0, pool="gap", places=(0, 1, 0, 0), old=False):
  """Weights by big_vision's names; `old`, AugReg's positions."""
  d = _Draw(seed)
  norm_0, norm_1, attention, mlp = places
  d.array("embedding/kernel", PATCH, PATCH, 3, WIDTH)
  d.array("embedding/bias", WIDTH)
  if pool == "tok":
    d.array("cls", 1, 1, WIDTH)
  if old:
    name = "Transformer/posembed_input/pos_embedding"
    d.array(name, 1, SIDE**2 + (pool == "tok"), WIDTH)
  else:
    d.array("pos_embedding", 1, SIDE**2, WIDTH)
  for i in range(DEPTH):
    name = f"Transformer/encoderblock_{i}"
    d.flax_norm(f"{name}/LayerNorm_{norm_0}")
    d.flax_norm(f"{name}/LayerNorm_{norm_1}")
    d.flax_attention(f"{name}/MultiHeadDotProductAttention_{attention}")
    d.dense(f"{name}/MlpBlock_{mlp}/Dense_0", WIDTH, 4 * WIDTH)
    d.dense(f"{name}/MlpBlock_{mlp}/Dense_1", 4 * WIDTH, WIDTH)
  d.flax_norm("Transformer/encoder_norm")
  if pool == "map":
    d.array("MAPHead_0/probe", 1, 1, WIDTH)
    d.flax_attention("MAPHead_0/MultiHeadDotProductAttention_0")
    d.flax_norm("MAPHead_0/LayerNorm_0")
    d.dense("MAPHead_0/MlpBlock_0/Dense_0", WIDTH, 4 * WIDTH)
    d.dense("MAPHead_0/MlpBlock_0/Dense_1", 4 * WIDTH, WIDTH)
  d.dense("head", WIDTH, CLASSES)
  return d.w
