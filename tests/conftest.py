"""What all tests share: data and compiled functions of their own.

Set before anything is imported, and inherited by the programs that tests start.
"""

import atexit
import gc
import os
import shutil
import tempfile

_FOLDER = tempfile.mkdtemp(prefix="lookup_vit_tests_")
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)

# No test may find, or leave, a data set in the user's directory.
os.environ["TFDS_DATA_DIR"] = os.path.join(_FOLDER, "tensorflow_datasets")
# Many tests start the same small programs: they are compiled once, also where
# several processes run the tests.
if "PYTEST_XDIST_WORKER" not in os.environ:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(_FOLDER, "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling takes longer than the tiny programs gain from it.
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
  ]
)

# Searching all that JAX has traced for garbage is a tenth of the tests' time.
gc.set_threshold(200_000, 50, 50)

# Files that take long come first, so that both workers end together.
_LONG = ("programs", "train", "resume", "checkpoints", "dryrun")


def pytest_addoption(parser):
  """Adds `--full`."""
  parser.addoption(
    "--full",
    action="store_true",
    help="the tests marked `full`, alone",
  )


def pytest_collection_modifyitems(config, items):
  """Selects by `--full`; sorts files, and leaves the order within a file."""
  full = config.getoption("--full")

  def is_chosen(item):
    return full == (item.get_closest_marker("full") is not None)

  config.hook.pytest_deselected(items=[i for i in items if not is_chosen(i)])
  items[:] = filter(is_chosen, items)
  names = [f"test_{name}.py" for name in _LONG]

  def place(item):
    name = item.path.name
    return names.index(name) if name in names else len(names)

  items.sort(key=place)
