"""Tests of launch/ and .ci/run, with a stub for Python that records calls."""

import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# As `python3`, and in VENV/bin as python, ruff and shellcheck. The check of the
# version is computed by a real interpreter that says it is of STUB_VERSION.
STUB = f"""#!/usr/bin/env bash
echo "$PWD|$0|$*" >> "$STUB_CALLS"
if [ -n "${{STUB_FAILS:-}}" ] && [[ "$*" == *"$STUB_FAILS"* ]]; then exit 3; fi
if [ "$1" = -c ]; then
  exec {sys.executable} -c "import sys; sys.version_info = $STUB_VERSION; $2"
elif [ "$1 $2" = "-m venv" ]; then
  mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
elif [ "$1 $2" = "-m pip" ]; then
  for name in ruff shellcheck; do cp "$0" "$(dirname "$0")/$name"; done
fi
"""


class Launcher:
  """A repository with the scripts alone, and a stub first on PATH."""

  def __init__(self, path):
    self.path = path
    self.repo = path / "a repository"
    self.calls_file = path / "calls"
    for name in ("launch", ".ci"):
      shutil.copytree(ROOT / name, self.repo / name)
    for name in ("setup.py", "requirements.lock"):
      (self.repo / name).write_text("as at first\n")
    (path / "bin").mkdir()
    (path / "tmp").mkdir()
    self.add_stub("python3")

  def add_stub(self, name):
    stub = self.path / "bin" / name
    stub.write_text(STUB)
    stub.chmod(0o755)
    return str(stub)

  def __call__(self, script, *args, cwd=None, **env):
    """Starts a script; returns its outcome and the calls that it made."""
    self.calls_file.write_text("")
    process = subprocess.run(
      ["bash", str(self.repo / script), *map(str, args)],
      cwd=cwd or self.repo,
      env={
        "PATH": f"{self.path}/bin:/usr/bin:/bin",
        "TMPDIR": str(self.path / "tmp"),
        "STUB_CALLS": str(self.calls_file),
        "STUB_VERSION": "(3, 11, 0)",
        **{k: str(v) for k, v in env.items()},
      },
      capture_output=True,
      text=True,
      timeout=60,
    )
    calls = []
    for line in self.calls_file.read_text().splitlines():
      folder, program, arguments = line.split("|")
      # Whatever the caller's directory, the scripts work in the repository.
      assert folder == str(self.repo)
      calls.append((program, arguments))
    return process, calls


@pytest.fixture
def launch(tmp_path):
  return Launcher(tmp_path)


def installed(calls):
  """What pip was asked to install, call by call."""
  lines = [line for _, line in calls if line.startswith("-m pip install ")]
  assert all("--constraint requirements.lock" in line for line in lines)
  return [line.partition("--editable ")[2] for line in lines]


def worked(calls):
  """The calls after the environment was there."""
  setup = ("-c ", "-m venv", "-m pip")
  return [call for call in calls if not call[1].startswith(setup)]


def quickstart_calls(venv, out):
  trainings = [
    f"-m lookup_vit.train --config=configs/digits_{model}.py "
    f"--workdir={out}/digits_{model}"
    for model in ("lookup", "vit")
  ]
  plot = (
    "-m lookup_vit.analysis.accuracy_vs_flops "
    f"--workdirs={out}/digits_lookup,{out}/digits_vit "
    f"--output={out}/accuracy_vs_flops.png"
  )
  return [(f"{venv}/bin/python", c) for c in (*trainings, plot)]


def test_quickstart(launch):
  process, calls = launch("launch/quickstart.sh")
  assert process.returncode == 0, process.stderr
  venv = launch.repo / ".venv"
  assert f"Installing into {venv} " in process.stdout
  assert calls[1] == (f"{launch.path}/bin/python3", f"-m venv {venv}")
  assert calls[2][0] == f"{venv}/bin/python"
  assert installed(calls) == ["."]
  out = launch.repo / "workdirs/quickstart"
  assert worked(calls) == quickstart_calls(venv, out)
  assert f"{out}/digits_lookup/attention_maps.png" in process.stdout


@pytest.mark.parametrize("relative", [False, True])
def test_quickstart_into_a_directory(launch, relative):
  """The argument is a directory, of the caller's, and no extra to install."""
  caller = launch.path / "a caller"
  caller.mkdir()
  argument = "some dir" if relative else launch.path / "some dir"
  process, calls = launch("launch/quickstart.sh", argument, cwd=caller)
  assert process.returncode == 0, process.stderr
  assert installed(calls) == ["."]
  out = (caller if relative else launch.path) / "some dir"
  assert worked(calls) == quickstart_calls(launch.repo / ".venv", out)
  assert not list(caller.iterdir())


def test_quickstart_ends_with_a_failed_training(launch):
  fails = "configs/digits_lookup.py"
  process, calls = launch("launch/quickstart.sh", STUB_FAILS=fails)
  assert process.returncode == 3
  assert len(worked(calls)) == 1


@pytest.mark.parametrize("model", ["lookup", "vit"])
def test_captions(launch, model):
  out = launch.path / "some dir"
  results = out / "decoder" / "captions_test_2x2.json"
  results.parent.mkdir(parents=True)
  results.touch()
  process, calls = launch("launch/captions.sh", model, out, "seed=1,epochs=2")
  assert process.returncode == 0, process.stderr
  assert installed(calls) == [".[captions]"]
  config = f"--config=configs/digit_captions_{model}.py"
  assert worked(calls) == [
    (f"{launch.repo}/.venv/bin/python", f"-m {call}")
    for call in (
      f"lookup_vit.preprocess.train_tokenizer {config} --vocab_size=128 "
      f"--model_type=bpe --normalization=identity --output={out}/digits.model",
      f"lookup_vit.train --workdir={out}/encoder "
      f"{config}:task=classification,seed=1,epochs=2",
      f"lookup_vit.train --workdir={out}/decoder "
      f"{config}:tokenizer={out}/digits.model,encoder={out}/encoder,"
      "seed=1,epochs=2",
      f"data.digit_captions.check --results={results}",
      "lookup_vit.analysis.caption_scores --metrics=CIDEr --leave_one_out "
      f"--results={results} --references={out}/decoder/references_test.json",
    )
  ]
  # Continued, it takes the tokenizer that is there.
  (out / "digits.model").touch()
  process, calls = launch("launch/captions.sh", model, out)
  assert worked(calls)[0][1] == (
    f"-m lookup_vit.train --workdir={out}/encoder {config}:task=classification"
  )


def test_captions_of_an_unknown_model(launch):
  process, calls = launch("launch/captions.sh", "resnet")
  assert process.returncode == 1 and not calls
  assert process.stderr == "error: model resnet: want lookup or vit\n"


def ablation_calls(launch, out, runs, table):
  """Trainings by their work directories and arguments, then the table."""
  calls = [
    f"lookup_vit.train --workdir={out}/{name} "
    f"--config=configs/ablation.py:{arg}"
    for name, arg in runs.items()
  ]
  workdirs = ",".join(f"{out}/{name}" for name in table)
  calls.append(
    f"lookup_vit.analysis.ablations --output={out}/ablations.md "
    f"--workdirs={workdirs}"
  )
  return [(f"{launch.repo}/.venv/bin/python", f"-m {call}") for call in calls]


def test_ablations(launch):
  """What is done, or diverged, is not repeated; the table has all there are."""
  out = launch.path / "some dir"
  for name in ("heads_lookup_3", "default_3", "heads_compressed_1", "other"):
    (out / name).mkdir(parents=True)
    (out / name / "config.json").touch()
  (out / "default_3" / "results.json").touch()
  diverged = '{"step": 3, "train/diverged": "loss nan"}\n'
  (out / "heads_compressed_1" / "metrics.jsonl").write_text(diverged)
  (out / "heads_lookup_3" / "metrics.jsonl").write_text('{"step": 3}\n')
  process, calls = launch(
    "launch/ablations.sh", "heads", out, "epochs=2", SEEDS="1 3"
  )
  assert process.returncode == 0, process.stderr
  assert installed(calls) == ["."]
  runs = {
    "default_1": "name=default,seed=1,epochs=2",
    "heads_compressed_3": "name=heads_compressed,seed=3,epochs=2",
    "heads_lookup_1": "name=heads_lookup,seed=1,epochs=2",
    "heads_lookup_3": "name=heads_lookup,seed=3,epochs=2",
  }
  table = ["default_3", "heads_compressed_1", "heads_lookup_3", "other"]
  assert worked(calls) == ablation_calls(launch, out, runs, table)


def test_a_run_that_diverges_does_not_stop_the_others(launch):
  """The stub fails where the run of seed 0 is; what it left says why."""
  out = launch.path / "out"
  broken = out / "init_average_0"
  broken.mkdir(parents=True)
  fails = "name=init_average,seed=0"
  process, calls = launch("launch/ablations.sh", "init", out, STUB_FAILS=fails)
  assert process.returncode == 3
  assert len(worked(calls)) == 4  # Three of the default before.
  # It writes so while it runs: a stub in its place.
  stub = launch.repo / ".venv/bin/python"
  stub.write_text(
    stub.read_text().replace(
      "then exit 3", f"then {DIVERGES.format(broken)}; exit 1"
    )
  )
  process, calls = launch("launch/ablations.sh", "init", out, STUB_FAILS=fails)
  assert process.returncode == 0, process.stderr
  assert len(worked(calls)) == 3 * 3 + 1
  process, calls = launch("launch/ablations.sh", "init", out, STUB_FAILS=fails)
  assert process.returncode == 0, process.stderr
  assert len(worked(calls)) == 3 * 3


DIVERGES = """echo '{{"train/diverged": "loss nan"}}' > '{}/metrics.jsonl'"""


def test_stability_is_over_sizes_rates_norms_and_clipping(launch):
  out = launch.repo / "workdirs/ablations"
  process, calls = launch("launch/ablations.sh", "stability", SEEDS="2")
  assert process.returncode == 0, process.stderr
  *runs, _ = worked(calls)
  assert len(runs) == 2 * 2 * 2 * 5
  arguments = "size=large,qk_norm=true,clip=0,lr=0.01,seed=2"
  name = "size-large_qk_norm-true_clip-0_lr-0.01_2"
  want = ablation_calls(launch, out, {name: arguments}, [])
  assert want[0] in runs and want[1] == worked(calls)[-1]


def test_ablations_of_an_unknown_set(launch):
  process, calls = launch("launch/ablations.sh", "everything")
  assert process.returncode == 2 and not calls
  assert process.stderr.startswith("error: SET everything: want grid, reuse,")


def test_installs_once(launch):
  launch("launch/quickstart.sh")
  process, calls = launch("launch/quickstart.sh")
  assert process.returncode == 0, process.stderr
  assert not installed(calls)
  assert "Installing" not in process.stdout
  assert len(worked(calls)) == 3


@pytest.mark.parametrize("name", ["requirements.lock", "setup.py"])
def test_installs_again_after_a_change(launch, name):
  launch("launch/quickstart.sh")
  (launch.repo / name).write_text("changed\n")
  _, calls = launch("launch/quickstart.sh")
  assert installed(calls) == ["."]
  _, calls = launch("launch/quickstart.sh")
  assert not installed(calls)


def test_another_extra_is_installed(launch):
  launch("launch/quickstart.sh")
  _, calls = launch("launch/test.sh")
  assert installed(calls) == [".[test]"]


@pytest.mark.parametrize("version", ["(3, 10, 14)", "(2, 7, 18)"])
def test_refuses_an_old_python(launch, version):
  process, calls = launch("launch/quickstart.sh", STUB_VERSION=version)
  assert process.returncode == 1
  assert process.stderr.count("\n") == 1
  assert "error: want Python 3.11 or newer; set PYTHON=" in process.stderr
  assert len(calls) == 1
  assert not (launch.repo / ".venv").exists()


def test_python_is_chosen(launch):
  (launch.path / "bin/python3").unlink()
  python = launch.add_stub("python3.12")
  process, calls = launch("launch/quickstart.sh", PYTHON=python)
  assert process.returncode == 0, process.stderr
  assert [c[0] for c in calls[:2]] == [python] * 2


@pytest.mark.parametrize("fails", ["-m venv", "-m pip"])
@pytest.mark.parametrize("script", ["launch/quickstart.sh", "launch/test.sh"])
def test_failed_install_is_tried_again(launch, script, fails):
  process, calls = launch(script, STUB_FAILS=fails)
  assert process.returncode != 0
  assert not worked(calls)
  assert not list(launch.repo.glob(".venv/installed-*"))
  if fails == "-m venv":
    assert "apt-get install python3-venv" in process.stderr
  process, calls = launch(script)
  assert process.returncode == 0, process.stderr
  assert len(installed(calls)) == 1


def test_lint_and_tests(launch):
  """The arguments are passed on as they are: of two spaces none is lost."""
  caller = launch.path / "bin"
  process, calls = launch(
    "launch/test.sh", "tests/models", "-x", "-k", "a  or b", cwd=caller
  )
  assert process.returncode == 0, process.stderr
  assert installed(calls) == [".[test]"]
  venv = launch.repo / ".venv"
  *lint, (python, tests) = worked(calls)
  paths = sorted((ROOT / "launch").glob("*.sh"))
  scripts = " ".join([*(f"launch/{p.name}" for p in paths), ".ci/run"])
  assert lint == [
    (f"{venv}/bin/ruff", "check ."),
    (f"{venv}/bin/ruff", "format --check ."),
    (f"{venv}/bin/shellcheck", scripts),
  ]
  assert python == f"{venv}/bin/python"
  assert tests.startswith("-m pytest ")
  assert tests.endswith(" tests/models -x -k a  or b")


@pytest.mark.parametrize(
  "fails", ["check .", "format --check .", "launch/", "-m pytest"]
)
def test_lint_or_tests_fail(launch, fails):
  process, calls = launch("launch/test.sh", STUB_FAILS=fails)
  assert process.returncode == 3
  assert worked(calls)[-1][1].startswith(fails)


@pytest.mark.parametrize("script", ["launch/quickstart.sh", "launch/test.sh"])
def test_venv_is_chosen(launch, script):
  venv = launch.path / "an environment"
  process, calls = launch(script, VENV=venv)
  assert process.returncode == 0, process.stderr
  assert calls[1][1] == f"-m venv {venv}"
  assert all(program.startswith(f"{venv}/bin/") for program, _ in worked(calls))
  assert not (launch.repo / ".venv").exists()
  _, calls = launch(script, VENV=venv)
  assert not installed(calls)


@pytest.mark.parametrize("fails", ["", "-m pytest"])
def test_continuous_integration(launch, fails):
  """It tests in an environment of its own, of which nothing is left."""
  process, calls = launch(".ci/run", cwd=launch.path / "bin", STUB_FAILS=fails)
  assert process.returncode == (3 if fails else 0)
  assert installed(calls) == [".[test]"]
  work = worked(calls)
  # The second time, what takes long.
  tested = [args for _, args in work if args.startswith("-m pytest")]
  assert len(tested) == (1 if fails else 2) and len(work) == 3 + len(tested)
  assert fails or tested[1].startswith("-m pytest --full -n 2 ")
  assert all(p.startswith(f"{launch.path}/tmp/") for p, _ in work)
  assert not list((launch.path / "tmp").iterdir())
  assert not (launch.repo / ".venv").exists()
