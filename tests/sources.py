"""Small data sets on disk, and damage to them, for the tests of the input."""

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from data.digits import Builder


def build_digits(path):
  """Prepares the digits in a directory and describes 37, a prime, of them."""
  Builder(data_dir=str(path)).download_and_prepare()
  return {"module": "data.digits", "split": "train[:37]", "data_dir": str(path)}


def write_folder(root):
  """Writes and describes 20 images of two classes.

  Image i has the value i on top, which names it after decoding.
  """
  for i in range(20):
    name = f"{i}.png" if i % 2 else f"{i}.jpg"
    _write_image(root / "train" / ("cat", "dog")[i // 10] / name, i)
  for i in range(3):
    _write_image(root / "test" / "dog" / f"{i}.PNG", i)
  return {"folder": str(root), "split": "train"}


def _write_image(path, value):
  path.parent.mkdir(parents=True, exist_ok=True)
  pixels = np.random.default_rng(value).integers(0, 9, (40, 40, 3), np.uint8)
  pixels[:8] = value
  Image.fromarray(pixels).save(path)


def find(folder, name):
  """The path of an image of a folder's split `train`."""
  [path] = tf.io.gfile.glob(f"{folder['folder']}/train/*/{name}")
  return path


def cut(path, size):
  """Leaves the first bytes of a file."""
  with open(path, "r+b") as file:
    file.truncate(size)


def break_four(folder):
  """Breaks the images 0, 3, 12 and 15, each in another way."""
  cut(find(folder, "0.jpg"), 600)
  cut(find(folder, "3.png"), 600)
  cut(find(folder, "12.jpg"), 0)
  with open(find(folder, "15.png"), "w") as file:
    file.write("<html>not an image</html>")


def build_numbers(path, count, shards, file_format=None, broken=None, size=64):
  """Prepares and describes `count` JPEGs of noise with ids.

  They are about 9 KB each, with `size=1` less than 1 KB.

  In TFDS's files, of `shards` shards, in an order that TFDS draws. The image
  of the id `broken` ends too early.
  """
  rng = np.random.default_rng(0)

  with tfds.core.registered.skip_registration():

    class Numbers(tfds.core.GeneratorBasedBuilder):
      VERSION = tfds.core.Version("1.0.0")
      name = "numbers"

      def _info(self):
        return tfds.core.DatasetInfo(
          builder=self,
          features=tfds.features.FeaturesDict(
            {
              "image": tfds.features.Image(encoding_format="jpeg"),
              "label": tfds.features.ClassLabel(num_classes=10),
              "id": np.int64,
            }
          ),
        )

      def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

      def _generate_examples(self):
        for i in range(count):
          image = rng.integers(0, 256, (size + i % 7, size + 6, 3), np.uint8)
          content = tf.io.encode_jpeg(image, quality=95).numpy()
          if i == broken:
            content = content[:1000]
          yield i, {"image": content, "label": i % 10, "id": i}

  config = tfds.download.DownloadConfig(num_shards=shards)
  builder = Numbers(data_dir=str(path), file_format=file_format)
  builder.download_and_prepare(download_config=config)
  return {"name": "numbers", "split": "train", "data_dir": str(path)}


def shard_paths(numbers):
  """The files of such a set."""
  return sorted(tf.io.gfile.glob(f"{numbers['data_dir']}/numbers/1.0.0/*-of-*"))
