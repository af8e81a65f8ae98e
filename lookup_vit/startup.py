"""The time to the first step, which kept compiled programs shorten."""

import logging
import os
import time
from typing import Any

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
    folder = os.path.join(os.path.expanduser(caches), "lookup_vit", "jax")
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
  """Sums up what compiling takes, from its making on."""

  def __init__(self):
    self.seconds, self.read = 0.0, 0
    jax.monitoring.register_event_duration_secs_listener(self._duration)
    jax.monitoring.register_event_listener(self._event)

  def report(self) -> None:
    """Logs how long ago the program began, and listens no more."""
    jax.monitoring.unregister_event_duration_listener(self._duration)
    jax.monitoring.unregister_event_listener(self._event)
    kept = f", {self.read} of the programs were kept" if self.read else ""
    log.info(
      "First step done %.1f s after the program began, %.1f s of them "
      "compiling%s.",
      *(time.monotonic() - lookup_vit.START, self.seconds, kept),
    )

  def _duration(self, event: str, seconds: float, **kwargs: Any) -> None:
    del kwargs
    if event in _PARTS:
      self.seconds += seconds

  def _event(self, event: str, **kwargs: Any) -> None:
    del kwargs
    self.read += event == _HIT
