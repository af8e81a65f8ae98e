"""Tests of lookup_vit/analysis/chips.py."""

import importlib.util

import pytest

from lookup_vit.analysis import chips


def test_parse():
  assert chips.parse("v5e:16x16") == ("v5e", (16, 16))
  assert chips.parse("v5p:4x4x8") == ("v5p", (4, 4, 8))
  assert chips.parse("cpu:8") == ("cpu", (8,))


@pytest.mark.parametrize(
  "topology, message",
  [
    ("", "want CHIP:SIZE"),
    ("v5e", "want CHIP:SIZE"),
    ("v5e:", "want CHIP:SIZE"),
    ("v5e:4x", "want CHIP:SIZE"),
    ("v5e:0x4", "want CHIP:SIZE"),
    ("v9:4x4", "CHIP one of cpu, v4, v5e, v5p, v6e"),
    ("v5e:256", r"v5e wants 2 size\(s\), as v5e:4x4"),
    ("v4:4x4", r"v4 wants 3 size\(s\), as v4:4x4x4"),
    ("cpu:2x4", r"cpu wants 1 size\(s\), as cpu:4"),
    ("v6e:32x16", "512 chips; the largest slice of v6e has 256"),
  ],
)
def test_errors(topology, message):
  with pytest.raises(ValueError, match=f"--topology={topology}: .*{message}"):
    chips.chip(topology)


def test_numbers():
  for kind, size in (("v4", "4x4x4"), ("v5e", "4x4"), ("v5p", "4x4x4")):
    chip = chips.chip(f"{kind}:{size}")
    assert 1e10 < chip.memory < 1.1e11
    assert 1e14 < chip.flops < 1e15
    assert 8e11 < chip.hbm < 3e12
    assert 1e11 < chip.ici < 1e12
    assert "cloud.google.com" in chip.source
  one, eight = chips.chip("cpu:1"), chips.chip("cpu:8")
  assert one.memory == 8 * eight.memory
  assert one.flops is None


def test_without_libtpu(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"v5e:4x4 wants libtpu: pip .*\[tpu\]"):
    chips.devices("v5e:4x4")
