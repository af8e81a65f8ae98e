"""Loads TensorFlow without the page of notes that it prints on every start.

Import this before TensorFlow. The notes come from C++ before any setting is
read, so what goes to stderr during the import is kept back, and shown only
where the import fails.
"""

import os
import sys
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def _load():
  if "tensorflow" in sys.modules:
    return
  sys.stderr.flush()
  stderr = os.dup(2)
  with tempfile.TemporaryFile() as notes:
    os.dup2(notes.fileno(), 2)
    try:
      import tensorflow  # noqa: F401
    except BaseException:
      notes.seek(0)
      os.write(stderr, notes.read())
      raise
    finally:
      os.dup2(stderr, 2)
      os.close(stderr)


_load()
