r"""Predicts classes, captions or classes of videos, by what a run is of.

    python -m lookup_vit.predict --workdir=WORKDIR a.jpg photos/ 'more/*.png'

Files are named by themselves, by folders, which are searched with those below
them, or by patterns. They are preprocessed as by the run's evaluator `val` or
else `test`, or by `--pp`. A file that cannot be read is told on stderr; the
others go on, and the exit code is 1 in the end.

    --grid=3x3            compressed grid; the model's own where none is given
    --top=5               classes of each image
    --output=FILE.jsonl   a line of JSON for each file; - is stdout
    --attention=MAPS.png  which lookup tokens compressed tokens read

From Python, `lookup_vit.load(WORKDIR)`: see `predictor.py` and docs/predict.md.
"""

import contextlib
import glob
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from etils import epath

from lookup_vit import cli, config_utils, loops, startup
from lookup_vit.predictor import (
  Predictions,
  Predictor,
  load,
  prepare,
)

__all__ = ["Predictions", "Predictor", "load", "prepare"]

FLAGS = flags.FLAGS

log = logging.getLogger("lookup_vit")


class File(NamedTuple):
  """A file that was named, and what is wrong with it, if anything is."""

  path: str
  error: str | None = None


def find(names: Iterable[str], extensions: Sequence[str]) -> list[File]:
  """Files by names, each of them once.

  Args:
    names: of files, whatever their extension; of folders, for the files in and
      below them with one of the extensions, sorted, but for hidden ones; or
      patterns as a shell has them, where `**` stands for any folders.
    extensions: as ".jpg".

  Returns:
    The files, in the order of the names; of a name that stands for none, the
    name itself and why.
  """
  found = {}
  for name in names:
    for file in _of_name(name, tuple(extensions)):
      found.setdefault(file.path, file)
  return list(found.values())


def _of_name(name, extensions) -> Iterator[File]:
  path = epath.Path(name).expanduser()
  if name and path.is_dir():
    yield from _below(name, path, extensions)
  elif name and _is_file(name, path):
    yield File(name)
  elif glob.has_magic(name):
    matches = sorted(glob.glob(os.fspath(path), recursive=True))
    for match in matches:
      yield from _of_name(match, extensions)
    if not matches:
      yield File(name, "no file matches")
  else:
    yield File(name, "no file" if name and path.exists() else "no such file")


def _is_file(name, path):
  # No pipe, nor a device; a bucket has none.
  return path.exists() if "://" in name else os.path.isfile(path)


def _below(name, folder, extensions) -> Iterator[File]:
  files = list(_walk(folder, extensions))
  if not files:
    yield File(name, f"a folder without files {', '.join(extensions)}")
  yield from files


def _walk(folder, extensions) -> Iterator[File]:
  try:
    paths = sorted(folder.iterdir())
  except OSError as e:
    yield File(os.fspath(folder), e.strerror or str(e))
    return
  for path in paths:
    if path.name.startswith("."):
      continue
    if path.is_dir():
      if not os.path.islink(path):  # They may lead back.
        yield from _walk(path, extensions)
    elif path.name.lower().endswith(extensions):
      yield File(os.fspath(path))


def rows(
  predictor: Predictor, files: Sequence[File], grid: Any = None, top: int = 5
) -> Iterator[tuple[dict[str, Any], np.ndarray | None]]:
  """Reads files, and predicts from those that can be read.

  Files are read ahead, in threads, while the model computes.

  Args:
    predictor: of the run.
    files: of `find`.
    grid: compressed grid; the model's own where none is given.
    top: how many classes, the most probable ones.

  Yields:
    In the order of the files, a row as it is written, and the image as the
    model takes it. A row has `file` and either `error`; or `grid`, as "3x3" or
    None, and `caption` or `classes`, a list of `class` and `probability`.
  """
  read_one = predictor.reader  # Made here, for all threads.

  def read(file):
    if file.error is not None:
      return file.path, file.error
    try:
      return file.path, read_one(file.path)
    except ValueError as e:
      return file.path, str(e).removeprefix(f"{file.path}: ")

  size = max(1, predictor.batch_size // predictor.views)
  count, pending = 0, []
  results = loops.in_threads(read, files)
  for one in loops.progress(results, len(files), "predict", "file", every=5):
    pending.append(one)
    count += not isinstance(one[1], str)
    if count == size:
      yield from _rows_of(predictor, pending, grid, top)
      count, pending = 0, []
  yield from _rows_of(predictor, pending, grid, top)


def _rows_of(predictor, read, grid, top):
  images = [image for _, image in read if not isinstance(image, str)]
  predictions = iter(())
  if images:
    found = predictor.predict(np.stack(images), grid)
    name = None if found.grid is None else config_utils.format_grid(found.grid)
    if found.captions is not None:
      each = [{"caption": caption} for caption in found.captions]
    else:
      each = [
        {"classes": [{"class": c, "probability": p} for c, p in best]}
        for best in found.top(top)
      ]
    predictions = ({"grid": name} | one for one in each)
  for path, image in read:
    if isinstance(image, str):
      yield {"file": path, "error": image}, None
    else:
      yield {"file": path} | next(predictions), image


def as_json(row: Mapping[str, Any]) -> str:
  """A row as a line of JSON."""
  return json.dumps(row)


def as_text(row: Mapping[str, Any], width: int) -> str:
  """A row for people: the file, in so many columns, and what it is."""
  if "caption" in row:
    said = row["caption"]
  else:
    said = "  ".join(
      f"{one['class']} {one['probability']:.1%}" for one in row["classes"]
    )
  return f"{row['file']:<{width}}  {said}"


def check_attention(
  predictor: Predictor, path: str, count: int, grid: Any = None
) -> list[Any]:
  """The grids whose attention is drawn for so many files.

  Raises:
    ValueError: the model has none, there is no such folder, or files are too
      many for a picture.
  """
  from lookup_vit.analysis import attention_maps, cross_attention

  cross_attention.encoder(predictor.program)
  check_file(path)
  grids = predictor.grids if grid is None else [grid]
  if len(predictor.image_size) == 3:
    grids = grids[:1]
    if predictor.views > 1:
      raise ValueError(
        f"{predictor.views} views of a video cannot be drawn: choose an "
        "evaluator with one."
      )
  attention_maps.check_count(count * len(grids), 5)
  return grids


def check_file(path: str) -> None:
  """Raises ValueError unless there is a folder to write the file in."""
  file = epath.Path(path).expanduser()
  if not path or not file.parent.is_dir() or file.is_dir():
    raise ValueError(f"{path!r}: want a file in a directory there is.")


def draw_attention(
  predictor: Predictor, path: str, images: np.ndarray, grids: Sequence[Any]
) -> None:
  """Draws which lookup tokens compressed tokens read, as a PNG.

  Args:
    predictor: of the run.
    path: the PNG to write.
    images: as the model takes them.
    grids: of `check_attention`.
  """
  from lookup_vit.analysis import attention_clips, attention_maps

  path = os.path.expanduser(path)
  program, params = predictor.program, predictor.params
  if len(predictor.image_size) == 3:
    attention_clips.write(path, program, params, images, grids[0])
  else:
    found = attention_maps.token_rows(program, params, images, grids)
    attention_maps.draw(path, found)


def main(argv):
  """Predicts by the flags; exits with 1 where a file could not be read."""
  if len(argv) < 2:
    raise ValueError("Name files, folders or patterns: want at least one.")
  if FLAGS.top < 1:
    raise ValueError(f"--top={FLAGS.top}: want an integer >= 1.")
  with config_utils.at_fault("--output"):
    if FLAGS.output not in ("", "-"):
      check_file(FLAGS.output)
  options = dict(pp=FLAGS.pp, evaluator=FLAGS.evaluator)
  predictor = prepare(
    FLAGS.workdir, FLAGS.step, batch_size=FLAGS.batch_size, **options
  )
  grid = None
  with config_utils.at_fault("--grid"):
    if FLAGS.grid:
      grid = predictor.check_grid(config_utils.parse_grid(FLAGS.grid))
  files = find(argv[1:], predictor.reader.extensions)
  good = [file for file in files if file.error is None]
  with config_utils.at_fault("--attention"):
    if FLAGS.attention:
      drawn = check_attention(predictor, FLAGS.attention, len(good), grid)
  # No larger than is needed, as it is always filled.
  predictor.batch_size = min(
    FLAGS.batch_size, max(1, len(good) * predictor.views)
  )
  if good:
    startup.keep_programs()
    predictor.restore(FLAGS.workdir, FLAGS.step)
    log.info("Step %d of %s.", predictor.step, FLAGS.workdir)
  wrong, images = 0, []
  width = max(len(file.path) for file in files)
  with _output() as lines:
    for row, image in rows(predictor, files, grid, FLAGS.top):
      if lines:
        print(as_json(row), file=lines, flush=True)
      if "error" in row:
        wrong += 1
        print(f"error: {row['file']}: {row['error']}", file=sys.stderr)
      elif FLAGS.output != "-":
        print(as_text(row, width), flush=True)
      if FLAGS.attention and image is not None:
        images.append(image)
  if images:
    draw_attention(predictor, FLAGS.attention, np.stack(images), drawn)
    log.info("Drawn: %s", FLAGS.attention)
  if wrong:
    log.info("%d of %d files could not be read.", wrong, len(files))
    sys.exit(1)


def _output():
  """The file of JSON lines, or None, to be used by `with`."""
  if FLAGS.output in ("", "-"):
    return contextlib.nullcontext(sys.stdout if FLAGS.output else None)
  return epath.Path(FLAGS.output).expanduser().open("w")


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "Of a training run.", required=True)
  flags.DEFINE_string("grid", "", "Compressed grid, as 3x3; the model's own.")
  flags.DEFINE_integer("top", 5, "Classes of an image, the most probable.")
  flags.DEFINE_integer("batch_size", 8, "Images computed at once.")
  flags.DEFINE_string("output", "", "File of JSON lines to write; - is stdout.")
  flags.DEFINE_string("attention", "", "PNG to draw attention maps into.")
  flags.DEFINE_string("pp", None, "Op-string; the evaluator's if not set.")
  flags.DEFINE_string(
    "evaluator", None, "Whose preprocessing; val or else test, if not set."
  )
  flags.DEFINE_integer("step", None, "Checkpoint; the newest if not set.")
  FLAGS.set_gnu_getopt()  # Flags may stand behind files.
  cli.run(main, takes_command=True)
