"""k-nearest neighbours on the digits' pixels: a floor for what a model learns.

    python -m data.digits.knn

It prints the top-1 on the test split, for 1, 3 and 5 neighbours.
"""

from sklearn import neighbors

from lookup_vit import cli, quiet_tensorflow  # noqa: F401

# isort: split
import tensorflow_datasets as tfds

from data.digits import Builder


def accuracy(k: int = 3) -> float:
  """Top-1 on the test split of a vote among `k` training digits."""
  builder = Builder()
  if not builder.info.splits:
    builder.download_and_prepare()
  arrays = {}
  for split in ("train", "test"):
    data = builder.as_dataset(split=split, batch_size=-1)
    images, labels = tfds.as_numpy((data["image"], data["label"]))
    arrays[split] = images[..., 0].reshape(len(images), -1) / 255, labels
  model = neighbors.KNeighborsClassifier(k).fit(*arrays["train"])
  return model.score(*arrays["test"])


def main(argv):
  """Prints the accuracies."""
  del argv
  for k in (1, 3, 5):
    print(f"k={k}: {accuracy(k):.2%}")


if __name__ == "__main__":
  cli.run(main)
