"""Runs that are made up, for the tests of reports."""

import pytest

from lookup_vit.analysis import runs
from tests.analysis import made_up_runs


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
  """Work directories by what they are."""
  return made_up_runs.write_all(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def found(workdirs):
  """What they hold."""
  return [runs.read(workdir) for workdir in workdirs.values()]
