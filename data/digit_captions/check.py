r"""The share of captions that are true: of a model's, by the rules alone.

    python -m data.digit_captions.check --results=workdirs/RUN/captions.json

The file is one of COCO's results: a JSON list of {"image_id": 36000,
"caption": "a small three in the top left"}, one for each image of the split.
Of several, `--results=A,B`, the table has a row of each, over all scenes, and
their mean.
"""

import statistics
from collections.abc import Mapping

from absl import flags

from lookup_vit import cli, config_utils, quiet_tensorflow  # noqa: F401
from lookup_vit.analysis import caption_files

# isort: split
from data.digit_captions import digit_captions_dataset_builder as scenes
from data.digit_captions import grammar

FLAGS = flags.FLAGS


def shares(
  captions: Mapping[int, str], split: str = "test"
) -> dict[str, dict[str, float]]:
  """How many captions have what right.

  Args:
    captions: by image, one for each of the split.
    split: `train` or `test`.

  Returns:
    For "all" scenes, and for those of "1" and "2" digits, the number of
    `scenes` and, for each of `grammar.KEYS`, the share of them in which
    it is right.

  Raises:
    ValueError: the images are not those of the split.
  """
  truth = {}
  for index in range(scenes.SPLITS[split]):
    example = scenes.example(split, index)
    digits = [grammar.Digit(**d) for d in example["digits"]]
    truth[example["image/id"]] = digits
  problems = {
    "without a caption": [i for i in truth if i not in captions],
    "not of the split": [i for i in captions if i not in truth],
  }
  if any(problems.values()):
    raise ValueError(
      f"want one caption for each of the {len(truth)} images of {split}; "
      + "; ".join(
        f"{len(ids)} {what}: {_some(ids)}"
        for what, ids in problems.items()
        if ids
      )
      + "."
    )
  groups: dict[str, list[dict[str, bool]]] = {"all": []}
  groups |= {str(n): [] for n in sorted({len(d) for d in truth.values()})}
  for i, digits in truth.items():
    right = grammar.check(captions[i], digits)
    for group in ("all", str(len(digits))):
      groups[group].append(right)
  return {
    group: {
      "scenes": len(rights),
      **{k: sum(r[k] for r in rights) / len(rights) for k in grammar.KEYS},
    }
    for group, rights in groups.items()
  }


def _some(ids):
  """The first few, as text."""
  return ", ".join(map(str, ids[:5])) + ", ..." * (len(ids) > 5)


def table(rows: Mapping[str, Mapping[str, float]], what: str = "digits") -> str:
  """What `shares` returns as a table, in Markdown and in percent."""
  lines = [
    f"| {what} | scenes | {' | '.join(grammar.KEYS)} |",
    "|---" * (len(grammar.KEYS) + 2) + "|",
  ]
  for group, row in rows.items():
    cells = [f"{100 * row[key]:.1f}" for key in grammar.KEYS]
    lines.append(f"| {group} | {row['scenes']:.0f} | {' | '.join(cells)} |")
  return "\n".join(lines)


def main(argv):
  """Prints the table of files of results."""
  del argv
  found = {}
  for path in FLAGS.results:
    captions = caption_files.read_results(path)
    with config_utils.at_fault(path):
      found[path] = shares(captions, FLAGS.split)
  if len(found) == 1:
    (rows,) = found.values()
    print(table(rows))
    return
  rows = {path: groups["all"] for path, groups in found.items()}
  names = ("scenes", *grammar.KEYS)
  rows["mean"] = {
    name: statistics.fmean(row[name] for row in rows.values()) for name in names
  }
  print(table(rows, "results"))


if __name__ == "__main__":
  flags.DEFINE_list("results", None, "COCO results.", required=True)
  flags.DEFINE_enum("split", "test", list(scenes.SPLITS), "Of which images.")
  cli.run(main)
