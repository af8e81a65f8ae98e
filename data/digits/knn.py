"""k-nearest neighbours on the digits' pixels: a floor for what a model learns.

python -m data.digits.knn
"""

from sklearn import neighbors

from lookup_vit import quiet_tensorflow  # noqa: F401

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


if __name__ == "__main__":
  for k in (1, 3, 5):
    print(f"k={k}: {accuracy(k):.2%}")
