"""Checkpoints in a work directory, on Orbax.

A work directory holds `config.json` and `checkpoints/STEP/`, each with the
parameters, the optimizer state, the Polyak average where there is one, and
checksums: damage that still decodes is noticed too. A checkpoint appears under
its name only when it is whole.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import orbax.checkpoint as ocp

from lookup_vit import checksums, config_utils, parallel, params_file

_CONFIG = config_utils.CONFIG_FILE
_FOLDER = "checkpoints"
_CLASSES = "classes.json"


class DamagedCheckpointError(ValueError):
  """A checkpoint cannot be read back as it was written."""


def check_workdir(workdir: str, config: Mapping[str, Any]) -> None:
  """Checks that a work directory is new or this config's.

  Raises:
    ValueError: the directory was made by another config; the fields that
      differ are listed.
  """
  workdir = config_utils.workdir_path(workdir)
  if (workdir / _CONFIG).exists():
    saved = config_utils.read_workdir(workdir).to_dict()
    lines = config_utils.differences(saved, config.to_dict())
    if lines:
      raise ValueError(
        f"The work directory {workdir} belongs to another config. Choose "
        "another directory, or change back: " + "; ".join(lines) + "."
      )
  elif (workdir / _FOLDER).exists() and any((workdir / _FOLDER).iterdir()):
    raise ValueError(f"{workdir} has checkpoints but no {_CONFIG}.")


def write_config(workdir: str, config: Mapping[str, Any]) -> None:
  """Writes a resolved config into its work directory."""
  _write_json(workdir, _CONFIG, config.to_dict())


def write_classes(workdir: str, classes: Sequence[str]) -> None:
  """Writes the names of a run's classes into its work directory."""
  _write_json(workdir, _CLASSES, list(classes))


def _write_json(workdir, name, value):
  if jax.process_index() == 0:
    workdir = config_utils.workdir_path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    # Atomic: a run killed here must not leave half a file.
    part = workdir / (name + ".tmp")
    part.write_text(json.dumps(value, indent=2) + "\n")
    part.replace(workdir / name)


def read_classes(workdir: str) -> list[str] | None:
  """The names of a run's classes; None where its work directory has none.

  Raises:
    ValueError: the file holds something else.
  """
  path = config_utils.workdir_path(workdir) / _CLASSES
  if not path.exists():
    return None
  classes = config_utils.read_json(path)
  is_list = isinstance(classes, list)
  if not is_list or not all(isinstance(name, str) for name in classes):
    raise ValueError(f"{path} is damaged: it holds no list of names.")
  return classes


def _parts(state):
  """A train state as the trees that are saved under a name of their own."""
  parts = {"params": state.params, "opt_state": state.opt_state}
  if state.ema is not None:
    parts["ema"] = state.ema
  return parts


class Checkpoints:
  """Saves and restores the train states of one work directory.

  Args:
    workdir: the work directory.
    keep: how many of the newest checkpoints stay.
    keep_every: checkpoints of steps that this divides stay for ever.
    read_only: nothing is written or removed.
  """

  def __init__(
    self,
    workdir: str,
    keep: int | None = None,
    keep_every: int | None = None,
    read_only: bool = False,
  ):
    self.path = config_utils.workdir_path(workdir).resolve() / _FOLDER
    if read_only and not self.path.exists():
      raise ValueError(f"{workdir} has no checkpoint.")
    handlers = {
      name: ocp.StandardCheckpointHandler()
      for name in ("params", "opt_state", "ema")
    }
    self._manager = ocp.CheckpointManager(
      self.path,
      item_handlers={**handlers, "meta": ocp.JsonCheckpointHandler()},
      options=ocp.CheckpointManagerOptions(
        max_to_keep=None if read_only else keep,
        keep_period=keep_every,
        cleanup_tmp_directories=not read_only,
        read_only=read_only,
      ),
    )

  def steps(self) -> list[int]:
    """Steps of the checkpoints there are, ascending."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, state: Any) -> None:
    """Starts to write a checkpoint; returns once the state may be donated."""
    parts = _parts(state)
    sums = {k: checksums.of(v) for k, v in parts.items()}
    self._manager.save(
      step,
      args=ocp.args.Composite(
        meta=ocp.args.JsonSave({"step": step, "checksums": sums}),
        **{k: ocp.args.StandardSave(v) for k, v in parts.items()},
      ),
    )

  def restore(self, step: int, like: Any, shardings: Any) -> Any:
    """The train state of a step.

    Args:
      step: one of `steps()`.
      like: a train state of shapes.
      shardings: a train state of shardings; what was saved on another mesh is
        laid out anew.

    Raises:
      DamagedCheckpointError: it cannot be read, or not as it was written.
    """
    targets = parallel.placed(_parts(like), _parts(shardings))
    parts = self._read(step, targets)
    count = jax.jit(lambda: jnp.int32(step), out_shardings=shardings.step)()
    return like.replace(step=count, **parts)

  def restore_params(self, step: int, sharding: Any = None) -> Any:
    """The parameters of a step, the Polyak average where there is one.

    Args:
      step: one of `steps()`.
      sharding: of all of them, or a tree of shardings; by default, of the first
        device.

    Raises:
      DamagedCheckpointError: it cannot be read, or not as it was written.
    """
    if sharding is None:
      sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    has_ema = (self.path / str(step) / "ema").exists()
    name = "ema" if has_ema else "params"
    try:
      tree = self._manager.item_metadata(step)[name].tree
      targets = parallel.placed(tree, sharding)
    except (MemoryError, PermissionError):
      raise
    except Exception as e:  # Orbax raises many kinds.
      raise self._damaged(step, e) from e
    return self._read(step, {name: targets})[name]

  def _read(self, step, targets):
    try:
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          meta=ocp.args.JsonRestore(),
          **{k: ocp.args.StandardRestore(v) for k, v in targets.items()},
        ),
      )
      sums = restored["meta"]["checksums"]
    except (MemoryError, PermissionError):
      raise
    except Exception as e:  # Orbax raises many kinds.
      raise self._damaged(step, e) from e
    for name in targets:
      if checksums.of(restored[name]) != sums[name]:
        raise self._damaged(step, f"the checksums of {name} differ")
    return {name: restored[name] for name in targets}

  def _damaged(self, step, why):
    folder = self.path / str(step)
    earlier = [s for s in self.steps() if s < step]
    why = (str(why).strip().splitlines() or [type(why).__name__])[0][:200]
    message = f"The checkpoint {folder} is damaged ({why}). "
    if earlier:
      message += (
        f"There is an earlier one, of step {earlier[-1]}. To use it, move the "
        f"damaged one away and run the same command: mv {folder} "
        f"{self.path.parent / f'damaged-{step}'}"
      )
    else:
      message += "There is no earlier one in this work directory."
    return DamagedCheckpointError(message)

  def wait(self) -> None:
    """Blocks until what was saved is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and ends the manager's threads."""
    self._manager.close()


def check(workdir: str, step: int | None = None) -> None:
  """Raises ValueError where `load_params` has no checkpoint to load."""
  if _is_exported(workdir):
    _load_exported(workdir, step)
    return
  checkpoints = Checkpoints(workdir, read_only=True)
  try:
    _find(workdir, checkpoints, step)
  finally:
    checkpoints.close()


def _find(workdir, checkpoints, step):
  steps = checkpoints.steps()
  if not steps:
    raise ValueError(f"{workdir} has no checkpoint.")
  step = steps[-1] if step is None else step
  if step not in steps:
    raise ValueError(f"{workdir} has no checkpoint {step}, only {steps}.")
  return step


def load_params(
  workdir: str, step: int | None = None, sharding: Any = None
) -> tuple[Any, int, ml_collections.ConfigDict]:
  """Parameters of a work directory's checkpoint (the newest: no step given).

  Also of a directory of `lookup_vit.export --format=safetensors`.

  Returns:
    The parameters (the Polyak average where there is one), the step, and the
    resolved config.

  Raises:
    ValueError: no work directory, no checkpoint, or not that step.
    DamagedCheckpointError: it cannot be read back.
  """
  if _is_exported(workdir):
    params, step, config = _load_exported(workdir, step)
    if sharding is None:
      sharding = jax.local_devices()[0]
    return jax.device_put(params, sharding), step, config
  config = config_utils.read_workdir(workdir)
  checkpoints = Checkpoints(workdir, read_only=True)
  try:
    step = _find(workdir, checkpoints, step)
    return checkpoints.restore_params(step, sharding), step, config
  finally:
    checkpoints.close()


def _is_exported(workdir):
  path = config_utils.workdir_path(workdir)
  exported = (path / params_file.FILE).exists()
  return exported and not (path / _FOLDER).exists()


def _load_exported(workdir, step):
  params, only, config = params_file.load(workdir)
  if step not in (None, only):
    raise ValueError(f"{workdir} has no checkpoint {step}, only {only}.")
  return params, only, config
