"""Tests of lookup_vit/analysis/caption_files.py."""

import json

import pytest
from pycocotools.coco import COCO

from lookup_vit.analysis import caption_files

REFERENCES = {7: ["A dog.", "two\ndogs"], 3: ["café"], 12: []}


def test_results(tmp_path):
  path = tmp_path / "results.json"
  captions = {7: "a dog", 3: "", 2**40: 'the "café"'}
  caption_files.write_results(str(path), captions)
  assert caption_files.read_results(str(path)) == captions
  rows = json.loads(path.read_text())
  assert [r["image_id"] for r in rows] == sorted(captions)
  assert all(set(r) == {"image_id", "caption"} for r in rows)


def test_references(tmp_path):
  """As pycocotools reads them."""
  path = tmp_path / "references.json"
  rows = [
    dict(image_id=i, caption=caption)
    for i, sentences in REFERENCES.items()
    for caption in sentences
  ]
  images = [dict(id=i, file_name=f"{i}.png") for i in REFERENCES]
  annotations = [dict(row, id=n) for n, row in enumerate(rows)]
  path.write_text(json.dumps(dict(images=images, annotations=annotations)))
  assert caption_files.read_references(str(path)) == REFERENCES
  assert list(caption_files.read_images(str(path)).values()) == images
  coco = COCO(str(path))
  for i, sentences in REFERENCES.items():
    assert [row["caption"] for row in coco.imgToAnns[i]] == sentences


def as_bytes(data):
  return data if isinstance(data, bytes) else json.dumps(data).encode()


def test_references_written(tmp_path):
  path = tmp_path / "references.json"
  caption_files.write_references(path, REFERENCES)
  assert caption_files.read_references(path) == REFERENCES
  coco = COCO(str(path))
  assert sorted(coco.getImgIds()) == sorted(REFERENCES)
  for i, sentences in REFERENCES.items():
    found = coco.loadAnns(coco.getAnnIds(imgIds=[i]))
    assert [row["caption"] for row in found] == sentences


ONE = dict(image_id=1, caption="a dog", id=1)


@pytest.mark.parametrize(
  ("data", "match"),
  [
    (b"{", "is no JSON"),
    (b"\xff\xfe[", "is no JSON"),
    (b"[" * 100_000, "is no JSON"),
    (b"3", "want COCO's results, a list"),
    ({"a": 1}, "want COCO's results, a list"),
    ([1], "1: want an integer image_id and a caption"),
    ([dict(image_id="1", caption="a")], "want an integer image_id"),
    ([dict(image_id=True, caption="a")], "want an integer image_id"),
    ([dict(image_id=1, caption=None)], "want an integer image_id"),
    ([ONE, ONE], "two captions for image 1"),
  ],
)
def test_no_results(data, match, tmp_path):
  path = tmp_path / "data.json"
  path.write_bytes(
    data if isinstance(data, bytes) else json.dumps(data).encode()
  )
  with pytest.raises(ValueError, match=match) as e:
    caption_files.read_results(str(path))
  assert str(path) in str(e.value)
  assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize(
  ("data", "match"),
  [
    (b"\0", "is no JSON"),
    ([ONE], "with a list `images`"),
    (dict(images=[dict(id=1)]), "with a list `annotations`"),
    (dict(images=[dict(id="1")], annotations=[]), "want an integer id"),
    (dict(images=[dict(id=2)], annotations=[ONE]), "image 1, which it lacks"),
    (
      dict(images=[dict(id=2)], annotations=[dict(image_id=2, bbox=[0] * 99)]),
      r"\.\.\.: want an integer image_id and a caption",
    ),
  ],
)
def test_no_references(data, match, tmp_path):
  path = tmp_path / "data.json"
  path.write_bytes(
    data if isinstance(data, bytes) else json.dumps(data).encode()
  )
  with pytest.raises(ValueError, match=match) as e:
    caption_files.read_references(str(path))
  assert str(path) in str(e.value)
  assert len(str(e.value).splitlines()) == 1
