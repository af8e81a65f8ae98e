r"""The share of captions that are true: of a model's, by the rules alone.

python -m data.digit_captions.check --results=workdirs/RUN/captions.json

The file is one of COCO's results: a JSON list of {"image_id": 12000,
"caption": "a small three in the top left"}, one for each image of the split.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from etils import epath

from lookup_vit import cli, quiet_tensorflow  # noqa: F401

# isort: split
from data.digit_captions import digit_captions_dataset_builder as scenes
from data.digit_captions import grammar

FLAGS = flags.FLAGS


def read(path: str) -> list[Mapping[str, Any]]:
  """The results in a file.

  Raises:
    ValueError: it is no JSON list of `{"image_id": int, "caption": str}`.
  """
  try:
    results = json.loads(epath.Path(path).read_text())
  except (ValueError, RecursionError) as e:
    raise ValueError(f"{path} is no JSON: {e}") from None
  wanted = f'{path}: want a list of {{"image_id": int, "caption": str}}, got'
  if not isinstance(results, list):
    raise ValueError(f"{wanted} {str(results)[:80]}.")
  for i, entry in enumerate(results):
    fields = entry if isinstance(entry, dict) else {}
    types = [type(fields.get(name)) for name in ("image_id", "caption")]
    if types != [int, str]:
      raise ValueError(f"{wanted} {str(entry)[:80]} at {i}.")
  return results


def shares(
  results: Sequence[Mapping[str, Any]], split: str = "test"
) -> dict[str, dict[str, float]]:
  """How many captions have what right.

  Args:
    results: as `read` returns them, one for each image of the split.
    split: `train` or `test`.

  Returns:
    For "all" scenes, and for those of "1", "2" and "3" digits, the number of
    `scenes` and, for each of `grammar.KEYS`, the share of them in which
    it is right.

  Raises:
    ValueError: the images are not those of the split, each once.
  """
  truth = {}
  for index in range(scenes.SPLITS[split]):
    example = scenes.example(split, index)
    digits = [grammar.Digit(**d) for d in example["digits"]]
    truth[example["image/id"]] = digits
  captions = {r["image_id"]: r["caption"] for r in results}
  problems = {
    "without a caption": [i for i in truth if i not in captions],
    "not of the split": [i for i in captions if i not in truth],
  }
  if len(captions) < len(results):
    seen: set[int] = set()
    again = [i for r in results if (i := r["image_id"]) in seen or seen.add(i)]
    problems["with several captions"] = list(dict.fromkeys(again))
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


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
  """What `shares` returns as a table, in Markdown and in percent."""
  lines = [
    f"| digits | scenes | {' | '.join(grammar.KEYS)} |",
    "|---" * (len(grammar.KEYS) + 2) + "|",
  ]
  for group, row in rows.items():
    cells = [f"{100 * row[key]:.1f}" for key in grammar.KEYS]
    lines.append(f"| {group} | {row['scenes']} | {' | '.join(cells)} |")
  return "\n".join(lines)


def main(argv):
  """Prints the table of a file of results."""
  del argv
  results = read(FLAGS.results)
  try:
    rows = shares(results, FLAGS.split)
  except ValueError as e:
    raise ValueError(f"{FLAGS.results}: {e}") from None
  print(table(rows))


if __name__ == "__main__":
  flags.DEFINE_string("results", None, "The COCO results.", required=True)
  flags.DEFINE_enum("split", "test", list(scenes.SPLITS), "Of which images.")
  cli.run(main)
