"""benchmarks/decoding.py: a tiny run, for what it reports and not for speed."""

import statistics

import pytest

from benchmarks import decoding as benchmark
from lookup_vit.models import captioner

NUMBERS = dict(batch=3, length=4, beams=2, rounds=3)


@pytest.fixture(scope="module")
def model():
  encoder = dict(variant="mu/8", depth=1, grid=(2, 2))
  return captioner.Model(11, None, encoder, depth=1, max_length=6)


def test_results(model):
  result = benchmark.benchmark(model, (24, 16), **NUMBERS)
  ways = [
    *("greedy, cached", "greedy, padded", "greedy, prefix"),
    *("beams, cached", "beams, padded"),
  ]
  assert list(result["seconds"]) == ["encode", *ways]
  assert result["equal"] == dict.fromkeys(ways, 1.0)
  for name in ways:
    least = result["seconds"][f"{name.split(',')[0]}, cached"]
    ratios = [
      a / b for a, b in zip(result["seconds"][name], least, strict=True)
    ]
    assert result["ratios"][name] == pytest.approx(ratios)
  assert all(len(s) == 3 and min(s) > 0 for s in result["seconds"].values())
  lines = benchmark.table(result).splitlines()
  assert lines[0].startswith("3 captions of 4 ids, 2 beams; median of 3")
  middle = statistics.median(result["ratios"]["beams, padded"])
  assert f"| {middle:.2f} (" in lines[-1]
  assert lines[-1].endswith("| 100% |")


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_do_not_work(model, name):
  with pytest.raises(ValueError, match=f"{name}=0: want at least 1"):
    benchmark.benchmark(model, (24, 16), **{**NUMBERS, name: 0})


def test_captions_longer_than_the_decoder_has(model):
  with pytest.raises(ValueError, match="7 ids for a decoder of max_length=6"):
    benchmark.benchmark(model, (24, 16), **{**NUMBERS, "length": 7})
