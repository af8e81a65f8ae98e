"""Python programs for tests to start, without the seconds that imports take.

Each is a process of its own, forked off one that has imported the libraries.
What a test says of a program's own start, such as what it prints or imports,
wants a real one, of `subprocess`.
"""

import atexit
import multiprocessing
import os
import pathlib
import runpy
import signal
import sys
import tempfile
from collections.abc import Mapping

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
  [
    "lookup_vit.quiet_tensorflow",
    "tensorflow_datasets",
    "jax",
    "flax.linen",
    "optax",
    "orbax.checkpoint",
    "ml_collections.config_flags",
  ]
)


class Program:
  """`python ARGUMENTS`, started; used as `subprocess.Popen`.

  Args:
    *args: `"-c", CODE` or `"-m", MODULE`, and arguments.
    env: its environment; that of the test where it is None.
    stdout: path of a file that its output is added to; None keeps it for
      `communicate`.
    stderr: likewise.
    cwd: where it is started; as the tests if None.
  """

  def __init__(
    self,
    *args: str,
    env: Mapping[str, str] | None = None,
    stdout: str | os.PathLike | None = None,
    stderr: str | os.PathLike | None = None,
    cwd: str | os.PathLike | None = None,
  ):
    self._folder = tempfile.TemporaryDirectory()
    self._paths = [
      os.fspath(path) if path else os.path.join(self._folder.name, name)
      for path, name in ((stdout, "out"), (stderr, "err"))
    ]
    for path in self._paths:
      pathlib.Path(path).touch()
    self._process = _FORKS.Process(
      target=_run,
      args=(list(map(str, args)), dict(os.environ if env is None else env)),
      kwargs=dict(paths=self._paths, cwd=os.fspath(cwd or os.getcwd())),
    )
    self._process.start()
    self.pid = self._process.pid

  @property
  def returncode(self) -> int | None:
    """As `subprocess.Popen`'s: negative after a signal, None while it runs."""
    return self._process.exitcode

  def poll(self) -> int | None:
    """The exit status, or None."""
    return self.returncode

  def wait(self, timeout: float | None = None) -> int:
    """Waits; raises TimeoutError where that takes longer than `timeout`."""
    self._process.join(timeout)
    if self.returncode is None:
      raise TimeoutError(f"It still runs after {timeout} s.")
    return self.returncode

  def send_signal(self, number: int) -> None:
    """Sends a signal, where it still runs."""
    if self.poll() is None:
      os.kill(self.pid, number)

  def communicate(self, timeout: float | None = None) -> tuple[str, str]:
    """Waits; returns what it wrote to stdout and stderr."""
    self.wait(timeout)
    out, err = (pathlib.Path(path).read_text() for path in self._paths)
    return out, err


def _run(args, env, paths, cwd):
  """In the fork: becomes `python ARGS`."""
  for number, path in enumerate(paths, 1):
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, number)
  os.environ.clear()
  os.environ.update(env)
  signal.signal(signal.SIGINT, signal.default_int_handler)
  os.chdir(cwd)
  sys.path.insert(0, cwd)
  kind, what, *rest = args
  try:
    if kind == "-m":
      sys.argv = [what, *rest]
      runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
      sys.argv = [kind, *rest]
      exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
  finally:
    # A fork leaves without what others do at their end.
    atexit._run_exitfuncs()
