"""Loads TensorFlow without GPUs, without its notes, with small reads of gs://.

Import this before TensorFlow. The notes come from C++ before any setting is
read, so what goes to stderr meanwhile is kept back, and shown only where the
import fails.
"""

import contextlib
import os
import sys
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# oneDNN has little for images, and says so on every start.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
# Of a file on gs://, TensorFlow would read 64 MB wherever it is entered, and
# hold them for each file that is open. It looks at this when it is loaded.
os.environ.setdefault("GCS_READAHEAD_BUFFER_SIZE_BYTES", str(4 << 20))


@contextlib.contextmanager
def _stderr_kept_back():
  sys.stderr.flush()
  stderr = os.dup(2)
  with tempfile.TemporaryFile() as notes:
    os.dup2(notes.fileno(), 2)
    try:
      yield
    except BaseException:
      notes.seek(0)
      os.write(stderr, notes.read())
      raise
    finally:
      os.dup2(stderr, 2)
      os.close(stderr)


with _stderr_kept_back():
  import tensorflow as tf

  # TensorFlow would take all memory of the GPUs that JAX computes on. It raises
  # if it has started already, and then it is too late.
  with contextlib.suppress(RuntimeError):
    tf.config.set_visible_devices([], "GPU")
