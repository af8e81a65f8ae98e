"""The time to the first step, which kept compiled programs shorten."""

import functools
import logging
import os
import time

import jax

import lookup_vit

log = logging.getLogger("lookup_vit")

# What JAX calls the parts of compiling a function.
_PARTS = (
  "/jax/core/compile/jaxpr_to_mlir_module_duration",
  "/jax/core/compile/backend_compile_duration",
)
_HIT = "/jax/compilation_cache/cache_hits"


def keep_programs() -> str | None:
  """Has JAX keep compiled programs on disk, for the next start to read.

  They are in `$JAX_COMPILATION_CACHE_DIR` or, where that is not set, in
  `lookup_vit/jax` of the user's cache directory (`$XDG_CACHE_HOME`, or
  `~/.cache`). Set to nothing, none are kept.

  Returns:
    The directory; None where nothing is kept.
  """
  folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
  if folder is None:
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = os.path.join(caches, "lookup_vit", "jax")
  if folder and "://" not in folder:
    folder = os.path.expanduser(folder)
    try:
      os.makedirs(folder, exist_ok=True)
    except OSError as e:
      log.info("Compiled programs are not kept: %s.", e)
      folder = ""
  jax.config.update("jax_compilation_cache_dir", folder or None)
  if not folder:
    return None
  log.info("Compiled programs are kept in %s.", folder)
  return folder


class Clock:
  """Tells what compiling has taken since its making."""

  def __init__(self):
    self._before = dict(_listen())

  @property
  def seconds(self) -> float:
    """Of compiling, tracing left out."""
    return _listen()["seconds"] - self._before["seconds"]

  @property
  def read(self) -> int:
    """Programs that were kept, and not compiled."""
    return _listen()["read"] - self._before["read"]

  def report(self) -> None:
    """Logs how long ago the program began."""
    kept = f", {self.read} of the programs were kept" if self.read else ""
    log.info(
      "First step done %.1f s after the program began, %.1f s of them "
      "compiling%s.",
      *(time.monotonic() - lookup_vit.START, self.seconds, kept),
    )


@functools.cache
def _listen() -> dict[str, float]:
  """Sums of this process, from the first call on."""
  sums = {"seconds": 0.0, "read": 0}

  def duration(event, seconds, **kwargs):
    del kwargs
    if event in _PARTS:
      sums["seconds"] += seconds

  def count(event, **kwargs):
    del kwargs
    sums["read"] += event == _HIT

  jax.monitoring.register_event_duration_secs_listener(duration)
  jax.monitoring.register_event_listener(count)
  return sums
