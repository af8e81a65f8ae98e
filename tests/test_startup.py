"""Tests of lookup_vit/startup.py."""

import logging
import os
import re

import jax
import jax.numpy as jnp
import pytest

from lookup_vit import startup


@pytest.fixture(autouse=True)
def as_it_was():
  before = jax.config.jax_compilation_cache_dir
  yield
  jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def lines(monkeypatch):
  """What is logged."""
  found = []
  monkeypatch.setattr(
    startup.log, "info", lambda text, *args: found.append(text % args)
  )
  return found


@pytest.mark.parametrize("variable", ["HOME", "XDG_CACHE_HOME"])
def test_programs_are_kept_by_default(variable, monkeypatch, tmp_path, lines):
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
  monkeypatch.setenv(variable, str(tmp_path))
  parts = [".cache"] if variable == "HOME" else []
  want = os.path.join(tmp_path, *parts, "lookup_vit", "jax")
  assert startup.keep_programs() == want and os.path.isdir(want)
  assert jax.config.jax_compilation_cache_dir == want
  assert lines == [f"Compiled programs are kept in {want}."]


def test_programs_are_kept_where_one_says(monkeypatch, lines):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/programs")
  assert startup.keep_programs() == "gs://bucket/programs"
  assert jax.config.jax_compilation_cache_dir == "gs://bucket/programs"
  assert "gs://bucket/programs" in lines[0]


def test_no_programs_are_kept(monkeypatch, lines):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
  assert startup.keep_programs() is None
  assert jax.config.jax_compilation_cache_dir is None and not lines


def test_a_user_s_directory(monkeypatch, tmp_path, lines):
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "~/programs")
  assert startup.keep_programs() == str(tmp_path / "programs")
  assert (tmp_path / "programs").is_dir()


@pytest.mark.parametrize(
  "variable", ["JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"]
)
def test_a_directory_that_cannot_be(variable, monkeypatch, tmp_path, lines):
  (tmp_path / "file").touch()
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
  monkeypatch.setenv(variable, str(tmp_path / "file"))
  assert startup.keep_programs() is None
  assert len(lines) == 1
  assert re.fullmatch("Compiled programs are not kept: .*file.*", lines[0])


def test_clock(monkeypatch, lines):
  monkeypatch.setattr(startup.lookup_vit, "START", 0.0)
  monkeypatch.setattr(startup.time, "monotonic", lambda: 12.34)
  clock = startup.Clock()
  assert clock.seconds == 0
  jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((5, 5)))
  assert 0 < clock.seconds < 60
  later = startup.Clock()
  assert later.seconds == 0
  clock.report()
  want = (
    "First step done 12.3 s after the program began, "
    f"{clock.seconds:.1f} s of them compiling."
  )
  assert lines == [want]


def test_clock_counts_what_was_kept(monkeypatch, tmp_path, lines):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
  startup.keep_programs()
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  try:
    x = jnp.ones((7, 7))
    for want in (0, 1):
      clock = startup.Clock()
      jax.jit(lambda x: jnp.tanh(x) @ x + 17)(x)
      assert clock.read == want
      clock.report()
  finally:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
  assert "of the programs were kept" in lines[-1]


def test_log_is_that_of_the_package():
  assert startup.log is logging.getLogger("lookup_vit")
