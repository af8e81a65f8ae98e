"""Small data sets on disk, and damage to them, for the tests of the input."""

import numpy as np
import tensorflow as tf
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
