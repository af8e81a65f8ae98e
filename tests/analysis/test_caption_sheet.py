"""Tests of lookup_vit/analysis/caption_sheet.py."""

import base64
import html.parser
import io

import numpy as np
import pytest
from etils import epath
from PIL import Image

from lookup_vit.analysis import caption_sheet


class Page(html.parser.HTMLParser):
  """What a browser makes of it."""

  def __init__(self, path):
    super().__init__()
    self.tags, self.images, self.lists, self.text = [], [], [], []
    self.feed(path.read_text(encoding="utf-8"))

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    attrs = dict(attrs)
    assert "href" not in attrs and not any(a.startswith("on") for a in attrs)
    if tag == "img":
      head, data = attrs["src"].split(",")
      assert head == "data:image/png;base64"
      file = io.BytesIO(base64.b64decode(data))
      self.images.append(np.asarray(Image.open(file)))
    if tag == "ul":
      self.lists.append([])

  def handle_data(self, data):
    self.text.append(data)
    if self.tags[-1:] == ["li"] and data.strip():
      self.lists[-1].append(data)


def pixels(*shape):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", [str, epath.Path])
def test_write(kind, tmp_path):
  image = pixels(8, 12)
  as_floats = image.astype(np.float32) / 127.5 - 1
  rows = [
    caption_sheet.Row(image, 3, "a dog", ["one dog", "dogs"], {"CIDEr": 1.234}),
    caption_sheet.Row(as_floats, 1, "", [], {"METEOR": 0.5}),
    caption_sheet.Row(np.full((8, 5, 3), 1.01), 2, "café 😀 {x} %s", ["1"]),
  ]
  path = tmp_path / "sheet.html"
  caption_sheet.write(kind(path), rows)
  page = Page(path)
  assert len(page.images) == page.tags.count("figure") == 3
  np.testing.assert_array_equal(page.images[0], image)
  np.testing.assert_array_equal(page.images[1], image)
  np.testing.assert_array_equal(page.images[2], np.full((8, 5, 3), 255))
  assert page.lists == [["one dog", "dogs"], [], ["1"]]
  text = "".join(page.text)
  assert "café 😀 {x} %s" in text
  assert text.count("CIDEr") == 1 and "3 · CIDEr 123.4" in text


def test_text_is_no_markup(tmp_path):
  bad = "</p><script>alert('1')</script> & \"q\" \ud800"
  row = caption_sheet.Row(pixels(2, 2), '"><b>', bad, [bad, "<li>"], None)
  path = tmp_path / "sheet.html"
  caption_sheet.write(str(path), [row])
  page = Page(path)
  assert not {"script", "b"} & set(page.tags)
  assert page.tags.count("p") == 1 and page.tags.count("li") == 2
  assert len(page.images) == 1
  shown = bad.replace("\ud800", "?")
  assert page.lists == [[shown, "<li>"]]
  assert "".join(page.text).count(shown) == 2


@pytest.mark.parametrize(
  "image",
  [
    np.zeros((4, 4), np.uint8),
    np.zeros((4, 4, 1), np.float32),
    np.zeros((4, 4, 3), np.int32),
  ],
)
def test_no_images(image, tmp_path):
  path = tmp_path / "sheet.html"
  row = caption_sheet.Row(image, 42, "a dog", [])
  with pytest.raises(ValueError, match="image 42 is .*: want"):
    caption_sheet.write(str(path), [row])
  assert not path.exists()
