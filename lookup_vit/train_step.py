"""The train state and the compiled update and evaluation steps.

`Program` bundles what a config defines apart from data: train.py and
evaluate.py run the very same steps.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from lookup_vit import optim, parallel

Grid = tuple[int, ...]
Batch = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
  """What training carries from step to step.

  `step` is the number of updates made; `ema` is the Polyak average of the
  parameters, None where `config.ema_decay` is.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  ema: Any = None


def module_of(package: str, name: Any) -> str:
  """The full name of a module that a config names; see `import_part`."""
  own = "." in str(name) and name[0] != "."
  return name if own else f"lookup_vit.{package}.{name}"


def import_part(package: str, name: str, attribute: str, field: str) -> Any:
  """The `attribute` of a module that a config names.

  Args:
    package: of this library, "models", "tasks" or "evaluators".
    name: of a module of the package; with a dot, "my_package.my_model", of any
      module that Python finds, as it stands.
    attribute: of the module.
    field: the config field with the name, for messages.

  Raises:
    ValueError: there is no such module, or it has no such attribute.
  """
  module = module_of(package, name)
  try:
    return getattr(importlib.import_module(module), attribute)
  except (ModuleNotFoundError, AttributeError) as e:
    # What the module itself fails to import, or lacks, is not about its name.
    if e.name != attribute and not f"{module}.".startswith(f"{e.name}."):
      raise
  if module == name:
    raise ValueError(
      f"{field}={name!r}: Python finds no module {name} with {attribute}. It "
      "looks in the directory of the start, in those of PYTHONPATH, and among "
      "what is installed."
    )
  raise ValueError(
    f"{field}={name!r}: there is no {module.replace('.', '/')}.py with "
    f"{attribute}. A module of your own is named with a dot, my_package.{name}."
  )


def build_model(config: ml_collections.ConfigDict) -> Any:
  """The model of a config.

  Raises:
    ValueError: unknown model, variant or field.
  """
  make = import_part("models", config.model_name, "Model", "config.model_name")
  return make(config.num_classes, **config.model.to_dict())


def train_grids(config: ml_collections.ConfigDict, model: Any) -> list[Any]:
  """The compressed grids of a config, or [None] for a model without one.

  Raises:
    ValueError: grids for a model that has none.
  """
  if not hasattr(model, "grid"):
    if config.grids is not None:
      raise ValueError(
        f"config.grids: model {config.model_name!r} has no compressed grid."
      )
    return [None]
  if config.grids is None:
    return [tuple(model.grid)]
  if not config.grids:
    raise ValueError("config.grids is empty.")
  return [tuple(g) for g in config.grids]


def draw_grid(grids: list[Any], seed: int, step: int) -> Any:
  """The grid of an update: uniform, a function of seed and step alone."""
  if len(grids) == 1:
    return grids[0]
  return grids[np.random.default_rng([seed, step]).integers(len(grids))]


class Program:
  """Model, task, optimizer and mesh of a config, and the steps over them.

  Args:
    config: a resolved config.
    total_steps: length of the training, for the schedule.
    devices: to make the mesh over; all there are by default.

  Attributes:
    mesh: of the devices.
    state_shapes: the train state, by shapes.
    state_shardings: how it lies on the mesh, a tree of shardings.

  Raises:
    ValueError: anything in the config that cannot work: this is checked by
      shapes, without computing.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    total_steps: int,
    devices: Sequence[jax.Device] | None = None,
  ):
    self.config = config
    self.mesh = parallel.make_mesh(config.mesh, devices)
    parallel.rules(config.sharding)
    self.model = build_model(config)
    self.grids = train_grids(config, self.model)
    self.task = import_part("tasks", config.task, "Task", "config.task")(config)
    parallel.check_batch(
      "config.input.batch_size",
      config.input.batch_size,
      self.mesh,
      config.grad_accum_steps,
      self.task.group,
    )
    self._check_tensor()
    for grid in self.grids:
      shapes = jax.eval_shape(functools.partial(self._init_params, grid=grid))
    frozen = getattr(self.model, "frozen_params", ())
    self.tx, self.learning_rate = optim.make(
      config, shapes, total_steps, frozen
    )
    self.trainable = optim.trainable(config, shapes, frozen)
    self.state_shapes = jax.eval_shape(self._init_state, shapes)
    self.state_shardings = parallel.state_shardings(
      self.state_shapes, self.mesh, config.sharding
    )
    try:
      self._trace()
    except TypeError as e:
      raise ValueError(f"The config does not work: {e}") from e

  def _check_tensor(self):
    models = {"": self.model}
    if hasattr(self.model, "encoder"):
      models = {" of the encoder": self.model.encoder}
      if hasattr(self.model, "width"):  # A probe has no more than the encoder.
        models[""] = self.model
    sizes = {}
    for whose, model in models.items():
      if not hasattr(model, "num_heads"):
        continue  # A model of one's own, of which nothing is split.
      sizes[f"heads{whose}"] = model.num_heads
      hidden = round(model.width * model.mlp_ratio)
      sizes[f"hidden units of the MLP{whose}"] = hidden
      if hasattr(model, "lookup_mlp_ratio"):
        hidden = round(model.width * model.lookup_mlp_ratio)
        sizes["heads of MHBC"] = model.mhbc_heads or model.num_heads
        sizes["hidden units of the lookup MLP"] = hidden
    parallel.check_tensor(self.mesh, self.config.sharding, sizes)

  def compile(
    self, function: Callable, out_shardings: Any, **kwargs: Any
  ) -> parallel.Compiled:
    """As `jax.jit`, with the constraints on activations active."""
    jitted = jax.jit(function, out_shardings=out_shardings, **kwargs)
    return parallel.Compiled(jitted, self.mesh, self.config.sharding)

  def _trace(self):
    """Update and evaluation by shapes, to find what cannot work."""
    size = self.config.input.batch_size
    batch = self.task.batch_shapes(size)
    grid = self.grids[0]
    # With the shardings of the training, which then need not trace it again.
    placed = parallel.placed(
      (self.state_shapes, batch),
      (self.state_shardings, parallel.batch_sharding(self.mesh)),
    )
    self.update_step.trace(*placed, grid)
    batch["_mask"] = jax.ShapeDtypeStruct((size,), jnp.float32)
    evaluate = functools.partial(self.evaluate, grid=grid)
    jax.eval_shape(evaluate, self.state_shapes.params, batch)

  def _init_params(self, grid=None):
    rng = jax.random.fold_in(jax.random.key(self.config.seed), 0)
    batch = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), self.task.batch_shapes(1)
    )
    fields = {} if grid is None else {"grid": grid}
    return self.model.init(rng, *self.task.inputs(batch), **fields)["params"]

  def _init_state(self, params=None):
    if params is None:
      params = self._init_params()
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      opt_state=self.tx.init(params),
      # A copy: state is donated, and no buffer may be donated twice.
      ema=None
      if self.config.ema_decay is None
      else jax.tree.map(jnp.copy, params),
    )

  def init_state(self, params: Any = None) -> TrainState:
    """The state before step 0, of given or freshly drawn parameters."""
    return self.compile(self._init_state, self.state_shardings)(params)

  def check_input(
    self, spec: Any, field: str, views: tuple[str, int] | None = None
  ) -> None:
    """Raises ValueError unless batches of a data set fit model and task.

    Args:
      spec: shapes of a batch by name (TensorSpecs or arrays).
      field: the config field that made them.
      views: where an example has several, the field that says so, and how many.
    """
    self.task.check_input(spec, field)
    self.check_images(spec, field, views)

  def check_images(
    self, spec: Any, field: str, views: tuple[str, int] | None = None
  ) -> None:
    """As `check_input`, of the images alone."""
    want = (*self.config.input.image_size, 3)
    also = ""
    if views:
      want, also = (views[1], *want), f" with {views[0]}={views[1]}"
    if "image" not in spec:
      raise ValueError(f"{field}: a batch has {sorted(spec)}; want 'image'.")
    got = tuple(spec["image"].shape[1:])
    if got != want:
      raise ValueError(
        f"{field} makes images of shape {got}, config.input.image_size{also} "
        f"wants {want}."
      )
    if spec["image"].dtype != "float32":
      raise ValueError(
        f"{field} makes images of {spec['image'].dtype.name}; want float32 in "
        "[-1, 1]: add value_range(-1,1)."
      )

  def apply(
    self, params: Any, batch: Batch, grid: Grid | None, **kwargs: Any
  ) -> tuple[jax.Array, dict[str, Any]]:
    """The model's `(logits, out)` for a batch."""
    if grid is not None:
      kwargs["grid"] = grid
    inputs = self.task.inputs(batch)
    return self.model.apply({"params": params}, *inputs, **kwargs)

  def _gradients(self, params, batch, rng, grid):
    capture = ()
    if self.config.log_attention_logit:
      capture = ("attention_logit_max",)

    def loss_fn(params, batch, rng):
      # What is frozen needs no gradient, so none is computed.
      params = jax.tree.map(
        lambda p, t: p if t else jax.lax.stop_gradient(p),
        params,
        self.trainable,
      )
      logits, out = self.apply(
        params, batch, grid, train=True, rngs={"dropout": rng}, capture=capture
      )
      loss, scalars = self.task.loss(logits, out, batch)
      if capture:
        scalars["attention_logit_max"] = jnp.max(out["attention_logit_max"])
      return loss, {"loss": loss, **scalars}

    grad_fn = jax.grad(loss_fn, has_aux=True)
    accum = self.config.grad_accum_steps
    if accum == 1:
      return grad_fn(params, batch, rng)

    # Example i goes to micro-batch i mod accum: each device keeps its share.
    micro = jax.tree.map(
      lambda x: x.reshape(-1, accum, *x.shape[1:]).swapaxes(0, 1), batch
    )

    def body(total, xs):
      index, part = xs
      grads = grad_fn(params, part, jax.random.fold_in(rng, index))
      return jax.tree.map(jnp.add, total, grads), grads[1]

    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype),
      jax.eval_shape(grad_fn, params, jax.tree.map(lambda x: x[0], micro), rng),
    )
    total, each = jax.lax.scan(body, zeros, (jnp.arange(accum), micro))
    grads, scalars = jax.tree.map(lambda x: x / accum, total)
    if capture:
      scalars["attention_logit_max"] = jnp.max(each["attention_logit_max"])
    return grads, scalars

  def update(
    self, state: TrainState, batch: Batch, grid: Grid | None
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step, not compiled; see `update_step`."""
    rng = jax.random.fold_in(jax.random.key(self.config.seed), 1)
    rng = jax.random.fold_in(rng, state.step)
    mix_rng, dropout_rng = jax.random.split(rng)
    augment = parallel.per_device(self.task.augment, self.mesh)
    batch = augment(batch, mix_rng)
    grads, scalars = self._gradients(state.params, batch, dropout_rng, grid)
    return self.apply_gradients(state, grads, scalars)

  def apply_gradients(
    self, state: TrainState, grads: Any, scalars: dict[str, jax.Array]
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    """The part of `update` behind the gradients; `scalars` has the loss."""
    updates, opt_state = self.tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
      average = optax.incremental_update(params, ema, 1 - self.config.ema_decay)
      # Not of what is frozen: its average would differ by rounding.
      ema = jax.tree.map(
        lambda p, a, t: a if t else p, params, average, self.trainable
      )
    scalars["grad_norm"] = optax.tree.norm(grads)
    scalars["update_norm"] = optax.tree.norm(updates)
    scalars["param_norm"] = optax.tree.norm(params)
    scalars["lr"] = self.learning_rate(state.step)
    # A finite state followed by a finite update is a finite state.
    scalars["finite"] = (
      jnp.isfinite(scalars["loss"])
      & jnp.isfinite(scalars["grad_norm"])
      & jnp.isfinite(scalars["update_norm"])
    )
    return TrainState(state.step + 1, params, opt_state, ema), scalars

  @functools.cached_property
  def update_step(self) -> parallel.Compiled:
    """Compiled `(state, batch, grid) -> (state, scalars)`; donates the state.

    `batch` is as the task takes it, split over the devices. The scalars: loss
    and each head's, `grad_norm`, `update_norm`, `param_norm`, `lr`, `finite`,
    and `attention_logit_max` where the config asks for it.
    """
    return self.compile(
      self.update,
      (self.state_shardings, parallel.replicated(self.mesh)),
      static_argnums=2,
      donate_argnums=0,
    )

  def _apply_to_views(self, params, batch, grid):
    """As `apply`, with all logits averaged over the views of an example."""
    images = batch["image"]

    def of_view(i):
      view = jax.lax.dynamic_index_in_dim(images, i, axis=1, keepdims=False)
      logits, out = self.apply(params, {**batch, "image": view}, grid)
      return logits, {k: v for k, v in out.items() if k.startswith("logits_")}

    # One after another, so that the activations of one are held.
    each = jax.lax.map(of_view, jnp.arange(images.shape[1]))
    return jax.tree.map(functools.partial(jnp.mean, axis=0), each)

  def evaluate(
    self,
    params: Any,
    batch: Batch,
    grid: Grid | None,
    classes: tuple[int, ...] | None = None,
  ) -> dict[str, jax.Array]:
    """Sums of the task's metrics over a batch; see `evaluation_step`."""
    has_views = batch["image"].ndim > 2 + len(self.config.input.image_size)
    apply = self._apply_to_views if has_views else self.apply
    logits, out = apply(params, batch, grid)
    fields = {} if classes is None else {"classes": classes}
    metrics, weights = self.task.metrics(logits, out, batch, **fields)
    sums = {name: jnp.sum(x * weights) for name, x in metrics.items()}
    sums["examples"] = jnp.sum(weights)
    sums["seen"] = jnp.sum(batch["_mask"])
    return sums

  @functools.cached_property
  def evaluation_step(self) -> parallel.Compiled:
    """Compiled `(params, batch, grid, classes=None) -> sums`.

    Where the images of a batch are `[batch, views, *image_size, 3]`, the logits
    are averaged over the views. `classes`, a tuple, are those of a classifier
    that count, all by default.

    The sums: each of the task's metrics over the examples that count,
    `examples` (how many count) and `seen` (how many are no padding).
    """
    return self.compile(
      self.evaluate, parallel.replicated(self.mesh), static_argnums=(2, 3)
    )
