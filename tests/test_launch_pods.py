"""Tests of the scripts that launch runs on TPU slices, SLURM and GPUs.

Nothing leaves this machine. A fake gcloud records its calls, keeps slices in a
file, and runs what ssh is asked to run in two directories that stand for the
workers.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Slices: {name: [state, label]}. Plan: what becomes of each attempt in turn; a
# status, or one for each worker, or {"preempt": STATE}, or a name of a call and
# how it ends.
GCLOUD = f"""#!{sys.executable} -IS
import json, os, sys, time
root = os.environ["FAKE"]
args = sys.argv[1:]
with open(root + "/calls", "a") as f:
  f.write(json.dumps(["gcloud", *args]) + "\\n")
assert args[:3] == ["compute", "tpus", "tpu-vm"], args
verb, name = args[3], args[4]
flags = dict(a[2:].partition("=")[::2] for a in args[4:] if a[:2] == "--")
slices = json.load(open(root + "/slices"))
plan = json.load(open(root + "/plan"))
if verb in ("scp", "ssh"):
  import subprocess  # Slow to import.

def save():
  for file, value in (("slices", slices), ("plan", plan)):
    with open(f"{{root}}/{{file}}", "w") as f:
      json.dump(value, f)

def workers(make):
  homes = [root + "/worker0", root + "/worker1"]
  processes = [make(i, home) for i, home in enumerate(homes)]
  return next(filter(None, [p.wait() for p in processes]), 0)

def planned(what):
  if plan and isinstance(plan[0], dict) and what in plan[0]:
    value = plan.pop(0)[what]
    save()
    return value

if verb == "list":
  wanted = flags["filter"].removeprefix("name~/").removesuffix("$")
  if planned("list"):
    sys.exit("ERROR: no network")
  if wanted in slices:
    print(*slices[wanted], sep="\\t")
elif verb == "create":
  fails = planned("create")
  if fails == "another":  # Somebody is quicker.
    slices[name] = ["READY", "other"]
    save()
  if fails == "slow":
    time.sleep(100)
  if fails:
    sys.exit("ERROR: " + fails)
  assert name not in slices
  slices[name] = ["READY", flags["labels"].removeprefix("launch=")]
  save()
elif verb == "delete":
  if planned("delete"):
    sys.exit("ERROR: not now")
  del slices[name]
  save()
else:
  assert flags["worker"] == "all"
  if planned(verb):
    sys.exit("ERROR: no network")
  name = name if verb == "ssh" else args[5].partition(":")[0]
  if slices.get(name, [""])[0] != "READY":
    sys.exit("ERROR: unusable state")
if verb == "scp":
  sys.exit(workers(lambda i, home: subprocess.Popen(
    ["cp", args[4], home + "/" + args[5].partition(":")[2]])))
if verb == "ssh":
  # As gcloud and ssh: split at spaces, joined again, read by a shell.
  command = " ".join(flags["command"].split(" "))
  env = dict(os.environ, PATH=f"{{root}}/worker_bin:/usr/bin:/bin", OUTCOME="0")
  entry = None
  if "tpu_worker.sh run " in command and plan:
    entry = plan.pop(0)
    save()
    outcomes = {{"hang": "hang", "lost": "hang", "reconnect": "slow"}}
    env["OUTCOME"] = (
      str(entry) if isinstance(entry, int | list) else
      "134" if isinstance(entry, dict) else outcomes[entry])
  def connect(*limit):
    return workers(lambda i, home: subprocess.Popen(
      [*limit, "bash", "-c", command], cwd=home,
      env=env | dict(HOME=home, WORKER=str(i))))
  if entry in ("lost", "reconnect"):  # It breaks after a while.
    connect("timeout", "0.7")
  status = 255 if entry == "lost" else connect()
  if isinstance(entry, dict):
    if entry["preempt"] == "gone":
      del slices[name]
    else:
      slices[name][0] = entry["preempt"]
    save()
    status = 255
  sys.exit(status)
"""

# python3 of a worker, and the python of its environment. The program that is
# run leaves its arguments, and ends as the plan says.
PYTHON = """#!/usr/bin/env bash
echo "$*" >> "$HOME/python_calls"
if [ "$1 $2" = "-m venv" ]; then
  mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
elif [ "$1 $2" = "-m pip" ]; then
  exit "${PIP_STATUS:-0}"
elif [ "$1 $2" = "-m lookup_vit.train" ]; then
  printf '%s\\0' "$@" > "$HOME/arguments"
  echo "worker $WORKER trains"
  case "$OUTCOME" in
    hang)
      trap 'echo "worker $WORKER saved"; exit 75' TERM
      touch "$HOME/hangs"
      for _ in {1..300}; do sleep 0.1; done
      ;;
    slow) sleep 1.5; echo "worker $WORKER is done" ;;
    "["*)
      [ "$WORKER" -gt 0 ] || echo "10:00:00  step 7/20  loss 1" >&2
      read -ra each <<< "${OUTCOME//[^0-9]/ }"
      exit "${each[$WORKER]}"
      ;;
    *) exit "$OUTCOME" ;;
  esac
fi
"""

CURL = '#!/bin/sh\nprintf %s "$WORKER"\n'

# As sbatch, srun, scontrol, nvidia-smi and python of a machine with GPUs.
RECORDER = f"""#!{sys.executable} -IS
import json, os, sys
name = os.path.basename(sys.argv[0])
devices = os.environ.get("JAX_LOCAL_DEVICE_IDS")
with open(os.environ["FAKE"] + "/calls", "a") as f:
  f.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
if name == "srun":
  print("devices", devices)
  now, *later = os.environ["OUTCOME"].split(",")
  left = os.environ["FAKE"] + "/later"
  if os.path.exists(left):
    now, *later = open(left).read().split(",")
  else:
    with open("workdirs/slurm-77.log", "w") as f:
      print("10:00:00  step 7/20  loss 1", file=f)
  if later:
    open(left, "w").write(",".join(later))
  sys.exit(int(now))
if name == "scontrol":
  sys.exit(int(os.environ.get("SCONTROL", 0)))
if name == "nvidia-smi":
  if os.environ["GPUS"] == "0":
    sys.exit("No devices were found")
  print("GPU 0: NVIDIA H100 (UUID: GPU-1)")
if name == "sbatch":  # The job at once, here, as under SLURM.
  args = sys.argv[1:]
  while args[0][:2] == "--":
    args.pop(0)
  env = dict(os.environ, SLURM_JOB_ID="77")
  os.execvpe("bash", ["bash", *args], env)
if name == "python" and sys.argv[1:3] == ["-m", "lookup_vit.supervise"]:
  sys.exit(int(os.environ["OUTCOME"]))
"""

NASTY = (
  "--config=configs/x.py:variant=L/16,res=384",
  "a  b",
  "",
  "$HOME `id` $(id)",
  'it\'s "so"',
  "(*) [a-z]? {1,2} ~ ! # ; | & < > \\ \\n",
  "two\nlines\tand a tab",
  "--flag=",
  "é",
)
TRAIN = ("python", "-m", "lookup_vit.train")
POD = ("--name=my-pod", "--zone=us-east5-a", "--type=v5litepod-256")


def _heed_signals():
  """Also where the tests themselves run in the background, and ignore them."""
  for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)


class Machine:
  """A repository of the scripts, programs that are fake, and two workers."""

  def __init__(self, path):
    self.path = path
    self.repo = path / "a repository"
    shutil.copytree(ROOT / "launch", self.repo / "launch")
    for name in ("setup.py", "requirements.lock"):
      (self.repo / name).write_text("")
    (self.repo / ".gitignore").write_text(".venv/\nbuild/\nworkdirs/\n")
    for name in ("bin", "worker_bin", "worker0", "worker1"):
      (path / name).mkdir()
    self.add("worker_bin/python3", PYTHON)
    self.add("worker_bin/curl", CURL)
    self.git("init", "--quiet")
    self.git("add", "--all")
    self.git("commit", "--quiet", "--message=All")
    (path / "slices").write_text("{}")
    (path / "plan").write_text("[]")

  def git(self, *args):
    who = ("-c", "user.name=A", "-c", "user.email=a@example.com")
    subprocess.run(["git", *who, *args], cwd=self.repo, check=True)

  def add(self, name, text):
    (self.path / name).write_text(text)
    (self.path / name).chmod(0o755)

  def start(self, script, *args, **env):
    (self.path / "calls").write_text("")
    return subprocess.Popen(
      ["bash", str(self.repo / "launch" / script), *args],
      cwd=self.path,
      env={
        # Without /usr/bin, where a real gcloud or nvidia-smi may be.
        "PATH": f"{self.path}/bin:{self.tools()}",
        "HOME": str(self.path),
        "FAKE": str(self.path),
        "POLL": "0.02",
        **env,
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
      preexec_fn=_heed_signals,
    )

  def tools(self):
    tools = self.path / "tools"
    if not tools.exists():
      tools.mkdir()
      names = "awk bash cat cksum cp date dirname git gzip mkdir rm seq setsid"
      for name in (*names.split(), "sleep", "tar", "timeout", "env"):
        (tools / name).symlink_to(shutil.which(name))
    return tools

  def finish(self, process):
    out, err = process.communicate(timeout=40)
    return subprocess.CompletedProcess(None, process.returncode, out, err)

  def __call__(self, script, *args, **env):
    return self.finish(self.start(script, *args, **env))

  def calls(self, program=None):
    lines = (self.path / "calls").read_text().splitlines()
    calls = [json.loads(line) for line in lines]
    return [c for c in calls if program in (None, c[0])]

  def slices(self, slices=None):
    if slices is not None:
      (self.path / "slices").write_text(json.dumps(slices))
    return json.loads((self.path / "slices").read_text())

  def hangs(self):
    """Whether the run is going on, on all workers."""
    return all((self.path / f"worker{i}/hangs").exists() for i in range(2))

  def steps(self):
    """What gcloud was asked for, without the looks at the slice."""
    steps = []
    for call in self.calls("gcloud"):
      verb = call[4]
      for action in ("install", "run", "stop"):
        if any(f"tpu_worker.sh {action}" in a for a in call):
          verb = action
      steps.append(verb)
    return [s for s in steps if s != "list"]


@pytest.fixture
def machine(tmp_path):
  return Machine(tmp_path)


@pytest.fixture
def pod(machine):
  """Starts tpu_pod.sh; the attempts end as planned."""
  machine.add("bin/gcloud", GCLOUD)

  def launch(*flags, plan=(), command=TRAIN, start=False, **env):
    (machine.path / "plan").write_text(json.dumps(plan))
    args = ("tpu_pod.sh", *POD, *flags, "--", *command)
    return machine.start(*args, **env) if start else machine(*args, **env)

  return launch


ATTEMPT = ["scp", "install", "run"]


def worker_arguments(machine, worker):
  text = (machine.path / f"worker{worker}/arguments").read_text()
  return tuple(text.removesuffix("\0").split("\0"))


def until(condition):
  for _ in range(1000):
    if condition():
      return
    time.sleep(0.02)
  raise AssertionError("it took too long")


def test_scripts_are_clean():
  shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
  scripts = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci/run"]
  assert len(scripts) > 8
  process = subprocess.run(
    [shellcheck, *scripts], cwd=ROOT, capture_output=True, text=True
  )
  assert process.returncode == 0, process.stdout + process.stderr


def test_pod(machine, pod):
  """Created, installed, run with the arguments as they are, and deleted."""
  command = (*TRAIN, *NASTY)
  result = pod("--spot", "--project=p", command=command)
  assert result.returncode == 0, result.stderr
  assert machine.steps() == ["create", *ATTEMPT, "delete"]
  assert machine.slices() == {}
  for worker in range(2):
    assert worker_arguments(machine, worker) == command[1:]
    home = machine.path / f"worker{worker}"
    installs = (home / "python_calls").read_text()
    assert "--constraint requirements.lock --editable .[tpu]" in installs
    assert f"worker {worker} trains" in (
      (home / "lookup_vit_run/log").read_text()
    )
  # Worker 0 is streamed, and only it; nothing else is on stdout.
  assert result.stdout == "worker 0 trains\n"
  create = next(c for c in machine.calls("gcloud") if c[4] == "create")
  for flag in (
    "my-pod",
    "--zone=us-east5-a",
    "--project=p",
    "--accelerator-type=v5litepod-256",
    "--version=v2-alpha-tpuv5-lite",
    "--spot",
    "--quiet",
  ):
    assert flag in create
  assert all("--project=p" in c for c in machine.calls("gcloud"))


def test_pod_dry_run(machine, pod):
  """The commands of a real run, for a shell to read; none of them is run."""
  command = (*TRAIN, *NASTY)
  dry = pod("--dry-run", "--spot", command=command)
  assert dry.returncode == 0, dry.stderr
  assert dry.stderr == "" and machine.calls() == []
  assert not (machine.repo / "build").exists()
  pod("--spot", command=command)
  real = machine.calls("gcloud")
  lines = dry.stdout.splitlines()
  # The shell itself: a fake gcloud that says what it was given.
  script = "gcloud() { printf '%s\\0' gcloud \"$@\"; printf '\\1'; }\n"
  out = subprocess.run(
    ["bash", "-euc", script + "\n".join(lines)],
    capture_output=True,
    text=True,
    check=True,
    cwd="/",
  ).stdout
  printed = [c.removesuffix("\0").split("\0") for c in out.split("\1")[:-1]]
  launch = re.compile(r"lookup-vit-\d{8}-\d{6}-\d+")

  def plain(calls):
    return [[launch.sub("LAUNCH", a) for a in call] for call in calls]

  # A real run looks once more after the run, in case it was a preemption.
  assert plain(printed) == plain(real)
  assert len(lines) == len(real) + 3
  assert (machine.repo / "build/launch/my-pod.tar.gz").exists()


def test_pod_dry_run_needs_no_gcloud(machine):
  result = machine("tpu_pod.sh", *POD, "--dry-run", "--", *TRAIN)
  assert result.returncode == 0, result.stderr
  assert "tpu-vm create my-pod" in result.stdout


def test_pod_that_is_there_stays(machine, pod):
  machine.slices({"my-pod": ["READY", ""], "my-pod-2": ["READY", ""]})
  before = machine.slices()
  result = pod()
  assert result.returncode == 0, result.stderr
  assert machine.steps() == ATTEMPT
  assert machine.slices() == before


@pytest.mark.parametrize("state", ["PREEMPTED", "STOPPED"])
def test_pod_that_is_there_but_unusable(machine, pod, state):
  machine.slices({"my-pod": [state, "another-launch"]})
  result = pod()
  assert result.returncode == 2
  assert f"my-pod is {state}" in result.stderr
  assert machine.steps() == []


def test_pod_is_waited_for(machine, pod):
  machine.slices({"my-pod": ["CREATING", ""]})
  process = pod(start=True)
  until(lambda: len(machine.calls("gcloud")) > 2)
  assert machine.steps() == []
  machine.slices({"my-pod": ["READY", ""]})
  result = machine.finish(process)
  assert result.returncode == 0, result.stderr
  assert machine.steps() == ATTEMPT


def test_pod_is_kept(machine, pod):
  assert pod("--keep").returncode == 0
  assert machine.steps() == ["create", *ATTEMPT]
  assert list(machine.slices()) == ["my-pod"]
  # The next launch uses it, and did not make it.
  assert pod().returncode == 0
  assert machine.steps() == ATTEMPT
  assert list(machine.slices()) == ["my-pod"]


def test_pod_cannot_be_created(machine, pod):
  result = pod(plan=[{"create": "no capacity"}])
  assert result.returncode == 1
  assert "no capacity" in result.stderr
  assert [c[4] for c in machine.calls()] == ["list", "create", "list"]


def test_pod_of_somebody_quicker_stays(machine, pod):
  result = pod(plan=[{"create": "another"}])
  assert result.returncode == 1
  assert machine.steps() == ["create"]
  assert machine.slices() == {"my-pod": ["READY", "other"]}


@pytest.mark.parametrize("state", ["PREEMPTED", "gone"])
def test_pod_is_preempted(machine, pod, state):
  """It is made again, where capacity is not back at once too."""
  plan = [{"preempt": state}, {"create": "no capacity"}, 0]
  result = pod(plan=plan)
  assert result.returncode == 0, result.stderr
  delete = [] if state == "gone" else ["delete"]
  again = [*delete, "create", "create", *ATTEMPT, "delete"]
  assert machine.steps() == ["create", *ATTEMPT, *again]
  assert "restart 2 of 10" in result.stderr
  assert machine.slices() == {}


def test_pod_that_is_not_ours_is_preempted(machine, pod):
  machine.slices({"my-pod": ["READY", ""]})
  result = pod(plan=[{"preempt": "PREEMPTED"}])
  assert result.returncode == 75
  assert "not made by this launch" in result.stderr
  assert machine.slices() == {"my-pod": ["PREEMPTED", ""]}


def test_pod_runs_again(machine, pod):
  """After status 75, and after a crash, on the slice that is there."""
  result = pod(plan=[75, 134, 0])
  assert result.returncode == 0, result.stderr
  assert machine.steps() == ["create", *ATTEMPT * 3, "delete"]
  assert result.stdout == "worker 0 trains\n" * 3


def test_pod_says_which_worker_was_lost(machine, pod):
  """And at which step; not at that of an earlier attempt."""
  result = pod(plan=[[134, 137], 131, 0])
  assert result.returncode == 0, result.stderr
  lost = [f"worker {i}, on {os.uname().nodename}, was lost" for i in range(2)]
  for line in (
    f"{lost[0]} after step 7/20: it ended by SIGABRT",
    f"{lost[1]}: it ended by SIGKILL",
    f"{lost[0]}: it ended by SIGQUIT",
  ):
    assert result.stderr.count(line + "\n") == 1


@pytest.mark.parametrize(
  "plan, status",
  [([75, 134, 0], 134), ([134, {"preempt": "PREEMPTED"}, 0], 75)],
)
def test_pod_restarts_are_limited(machine, pod, plan, status):
  result = pod("--restarts=1", plan=plan)
  assert result.returncode == status
  assert machine.steps().count("run") == 2
  assert machine.steps()[-1] == "delete"
  assert machine.slices() == {}


@pytest.mark.parametrize("status", [1, 127])
def test_pod_errors_are_not_repeated(machine, pod, status):
  result = pod(plan=[status])
  assert result.returncode == status
  assert machine.steps() == ["create", *ATTEMPT, "delete"]


def test_pod_cannot_be_installed(machine, pod):
  result = pod(PIP_STATUS="1")
  assert result.returncode == 1
  assert machine.steps() == ["create", "scp", "install", "delete"]
  assert machine.slices() == {}


def test_pod_is_deleted_at_the_second_attempt(machine, pod):
  result = pod(plan=[0, {"delete": True}])
  assert result.returncode == 0, result.stderr
  assert machine.steps()[-2:] == ["delete", "delete"]
  assert machine.slices() == {}


def test_pod_that_cannot_be_deleted_is_named(machine, pod):
  result = pod(plan=[0, *[{"delete": True}] * 10])
  assert "error: my-pod may still be there" in result.stderr
  assert (
    "\ngcloud compute tpus tpu-vm delete my-pod --zone=us-east5-a --quiet\n"
  ) in result.stderr


@pytest.mark.parametrize("name, keep", [("SIGINT", False), ("SIGTERM", True)])
def test_pod_is_interrupted(machine, pod, name, keep):
  """The run is stopped and saves; the slice goes, unless it is to be kept."""
  flags = ["--keep"] if keep else []
  process = pod(*flags, plan=["hang"], start=True)
  until(machine.hangs)
  os.killpg(process.pid, getattr(signal, name))
  # Impatience does not leave a slice behind.
  until(lambda: "stop" in machine.steps())
  os.killpg(process.pid, signal.SIGINT)
  result = machine.finish(process)
  assert result.returncode == 128 + getattr(signal, name)
  ends = ["stop"] if keep else ["stop", "delete"]
  assert machine.steps() == ["create", *ATTEMPT, *ends]
  assert list(machine.slices()) == (["my-pod"] if keep else [])
  for worker in range(2):
    log = machine.path / f"worker{worker}/lookup_vit_run/log"
    assert f"worker {worker} saved" in log.read_text()


def test_pod_of_a_terminal_that_closes(machine, pod):
  """Nothing can be written any more; the slice is deleted all the same."""
  process = pod(plan=["hang"], start=True)
  until(machine.hangs)
  process.stdout.close()
  process.stderr.close()
  os.killpg(process.pid, signal.SIGHUP)
  # Which of the hang-up and the broken pipe is first, is chance.
  assert process.wait(timeout=60) in (129, 141)
  assert machine.steps() == ["create", *ATTEMPT, "stop", "delete"]
  assert machine.slices() == {}
  log = machine.repo / "build/launch/my-pod.log"
  assert "deleting my-pod" in log.read_text()


def test_pod_network_fails(machine, pod):
  """Failures of gcloud itself, at any step, are no failures of the command."""
  machine.slices({"my-pod": ["READY", ""]})
  result = pod(plan=[{"scp": True}, {"list": True}, {"ssh": True}, 0])
  assert result.returncode == 0, result.stderr
  assert result.stderr.count("it ended with status 1\n") == 2
  assert machine.steps() == ["scp", "scp", "install", *ATTEMPT]
  # Where there is no network from the start, there is nothing to wait for.
  result = pod(plan=[{"list": True}])
  assert result.returncode == 1
  assert machine.steps() == []


def test_pod_is_interrupted_while_it_is_created(machine, pod):
  """Google creates it all the same, a little later."""
  process = pod(plan=[{"create": "slow"}], start=True)
  until(lambda: "create" in machine.steps())
  create = next(c for c in machine.calls("gcloud") if c[4] == "create")
  label = next(a for a in create if "--labels=" in a).rpartition("=")[2]
  os.killpg(process.pid, signal.SIGINT)
  count = len(machine.calls("gcloud"))
  until(lambda: len(machine.calls("gcloud")) > count)
  machine.slices({"my-pod": ["CREATING", label]})
  result = machine.finish(process)
  assert result.returncode == 130
  assert machine.steps() == ["create", "delete"]
  assert machine.slices() == {}


def test_pod_connection_breaks(machine, pod):
  """The run goes on meanwhile, is followed to its end, and is one run."""
  result = pod(plan=["reconnect"])
  assert result.returncode == 0, result.stderr
  assert result.stdout == "worker 0 trains\nworker 0 is done\n"
  for worker in range(2):
    log = (machine.path / f"worker{worker}/lookup_vit_run/log").read_text()
    assert log.count("trains") == 1


def test_pod_connection_is_lost(machine, pod):
  """The next attempt ends what the one before has left running."""
  result = pod(plan=["lost", 0])
  assert result.returncode == 0, result.stderr
  assert machine.steps() == ["create", *ATTEMPT * 2, "delete"]
  for worker in range(2):
    log = (machine.path / f"worker{worker}/lookup_vit_run/log").read_text()
    assert re.findall("saved|trains", log) == ["trains", "saved", "trains"]


def test_pod_is_busy(machine, pod):
  """The run of another launch on the same slice is not ended."""
  machine.slices({"my-pod": ["READY", ""]})
  first = pod(plan=["hang"], start=True)
  until(machine.hangs)
  second = pod(plan=[0])
  assert second.returncode == 2
  assert second.stderr.count("of another launch") == 1
  os.killpg(first.pid, signal.SIGTERM)
  assert machine.finish(first).returncode == 143


def test_pod_changes_and_what_stays(machine, pod):
  """HEAD is sent, not what is uncommitted; data of a run there stay."""
  machine.slices({"my-pod": ["READY", ""]})
  (machine.repo / "old.txt").write_text("1")
  machine.git("add", "old.txt")
  machine.git("commit", "--quiet", "--message=Old")
  assert "uncommitted" not in pod().stderr
  sent = [machine.path / f"worker{i}/lookup_vit" for i in range(2)]
  for folder in sent:
    assert (folder / "old.txt").exists()
    (folder / "workdirs").mkdir()
  machine.git("rm", "--quiet", "old.txt")
  machine.git("commit", "--quiet", "--message=New")
  (machine.repo / "new.txt").write_text("1")
  result = pod()
  assert result.returncode == 0, result.stderr
  assert result.stderr.count("uncommitted changes are not sent") == 1
  for folder in sent:
    names = {path.name for path in folder.iterdir()}
    assert {"workdirs", ".venv", "launch"} <= names
    assert not names & {"old.txt", "new.txt"}
  # The environment is made once.
  calls = (machine.path / "worker0/python_calls").read_text()
  assert calls.count("-m venv") == 1


WRONG = [
  ("tpu_pod.sh", (*POD, "--fast", "--", *TRAIN), "--fast"),
  ("tpu_pod.sh", (*POD, *TRAIN), "unknown argument python"),
  ("tpu_pod.sh", (*POD[1:], "--", *TRAIN), "--name="),
  ("tpu_pod.sh", (POD[0], POD[2], "--", *TRAIN), "--zone="),
  ("tpu_pod.sh", (*POD[:2], "--", *TRAIN), "--type="),
  ("tpu_pod.sh", POD, "want a command after --"),
  ("tpu_pod.sh", (*POD, "--"), "want a command after --"),
  ("tpu_pod.sh", (*POD, "--restarts=x", "--", *TRAIN), "--restarts"),
  ("tpu_pod.sh", (*POD[:2], "--type=v9-8", "--", *TRAIN), "--version"),
  *[
    ("tpu_pod.sh", (f"--name={name}", *POD[1:], "--", *TRAIN), "--name=")
    for name in ("My-Pod", "1pod", "pod-", "a_b", "a b", "a" * 64, "a/b")
  ],
  ("tpu_pod.sh", (*POD, "--", *TRAIN), "no gcloud"),
  ("slurm.sh", ("--nodes=0", "--", *TRAIN), "--nodes"),
  ("slurm.sh", ("--gpus-per-node=x", "--", *TRAIN), "--gpus-per-node"),
  ("slurm.sh", ("--restarts=x", "--", *TRAIN), "--restarts"),
  ("slurm.sh", ("--fast", "--", *TRAIN), "--fast"),
  ("slurm.sh", ("--nodes=2",), "want a command after --"),
  ("slurm.sh", ("--", *TRAIN), "no sbatch"),
  ("gpu.sh", ("--fast", "--", *TRAIN), "--fast"),
  ("gpu.sh", ("--restarts=-1", "--", *TRAIN), "--restarts"),
  ("gpu.sh", (), "want a command after --"),
  ("gpu.sh", ("--", *TRAIN), "no nvidia-smi"),
]


@pytest.mark.parametrize("script, args, said", WRONG)
def test_wrong_input(machine, script, args, said):
  """One line, status 2, and nothing was called."""
  if not said.startswith("no "):
    for name in ("gcloud", "sbatch", "nvidia-smi", "python", "python3"):
      machine.add(f"bin/{name}", RECORDER)
  result = machine(script, *args, GPUS="1", OUTCOME="0")
  assert result.returncode == 2
  assert result.stderr.startswith("error: ")
  assert result.stderr.count("\n") == 1
  assert said in result.stderr
  assert machine.calls() == [] and result.stdout == ""


@pytest.fixture
def gpus(machine):
  """A machine with GPUs and SLURM, the environment made already."""
  for name in ("nvidia-smi", "sbatch", "srun", "scontrol", "python3"):
    machine.add(f"bin/{name}", RECORDER)
  (machine.repo / ".venv/bin").mkdir(parents=True)
  machine.add("a repository/.venv/bin/python", RECORDER)
  return machine


def supervise(*command, restarts=3):
  return ["python", "-m", "lookup_vit.supervise", f"--restarts={restarts}"] + [
    "--",
    *command,
  ]


@pytest.mark.parametrize("status", [0, 1, 75])
def test_gpu(gpus, status):
  result = gpus(
    "gpu.sh",
    "--restarts=5",
    "--",
    *TRAIN,
    *NASTY,
    GPUS="1",
    OUTCOME=str(status),
  )
  assert result.returncode == status, result.stderr
  install, run = gpus.calls("python")[-2:]
  assert install[-1] == ".[cuda]"
  assert run == supervise(*TRAIN, *NASTY, restarts=5)


def test_no_gpu(gpus):
  result = gpus("gpu.sh", "--", *TRAIN, GPUS="0", OUTCOME="0")
  assert result.returncode == 2
  assert "error: nvidia-smi finds no GPU" in result.stderr
  assert not gpus.calls("python")


@pytest.mark.parametrize("script", ["gpu.sh", "slurm.sh"])
def test_dry_run_prints_the_commands(gpus, script):
  """As read by a shell; on a machine without GPUs, and without SLURM."""
  command = (*TRAIN, *NASTY)
  dry = gpus(script, "--dry-run", "--", *command, GPUS="0")
  assert dry.returncode == 0, dry.stderr
  assert gpus.calls() == []
  gpus(script, "--", *command, GPUS="1", OUTCOME="0")
  program = "python" if script == "gpu.sh" else "sbatch"
  real = gpus.calls(program)[-1]
  (gpus.path / "calls").write_text("")
  subprocess.run(
    ["bash", "-euc", dry.stdout],
    check=True,
    cwd="/",
    env={
      "PATH": f"{gpus.path}/bin:{gpus.tools()}",
      "FAKE": str(gpus.path),
      "OUTCOME": "0",
    },
  )
  assert gpus.calls(program)[-1] == real


def test_slurm(gpus):
  flags = ("--nodes=2", "--gpus-per-node=4", "--time=1:00:00", "--partition=p")
  result = gpus("slurm.sh", *flags, "--", *TRAIN, *NASTY, OUTCOME="0")
  assert result.returncode == 0, result.stderr
  (sbatch,) = gpus.calls("sbatch")
  for flag in (
    *flags,
    "--ntasks-per-node=1",
    "--signal=TERM@120",
    "--requeue",
    "--open-mode=append",
  ):
    assert flag in sbatch
  (srun,) = gpus.calls("srun")
  assert srun[-len(TRAIN + NASTY) :] == [*TRAIN, *NASTY]
  assert "devices 0,1,2,3" in result.stdout
  assert not gpus.calls("scontrol")
  # The environment is made before the job, which finds it.
  assert gpus.calls("python")[-1][-1] == ".[cuda]"
  assert gpus.calls()[-1] == srun


@pytest.mark.parametrize("status", [0, 1, 75, 137])
def test_slurm_requeues_after_preemption_only(gpus, status):
  result = gpus("slurm.sh", "--restarts=0", "--", *TRAIN, OUTCOME=str(status))
  requeued = [["scontrol", "requeue", "77"]] if status == 75 else []
  assert gpus.calls("scontrol") == requeued
  assert result.returncode == (0 if status == 75 else status)


def test_slurm_runs_again(gpus):
  """After a crash, of which it says the step; as often as allowed."""
  result = gpus("slurm.sh", "--restarts=1", "--", *TRAIN, OUTCOME="137,134,0")
  assert result.returncode == 134
  assert len(gpus.calls("srun")) == 2
  assert not gpus.calls("scontrol")
  assert "The run was lost after step 7/20: it ended by SIGKILL" in (
    result.stderr
  )
  (gpus.path / "later").unlink()
  result = gpus("slurm.sh", "--", *TRAIN, OUTCOME="137,75")
  assert result.returncode == 0, result.stderr
  assert len(gpus.calls("srun")) == 2
  assert len(gpus.calls("scontrol")) == 1


def test_slurm_cannot_requeue(gpus):
  result = gpus("slurm.sh", "--", *TRAIN, OUTCOME="75", SCONTROL="1")
  assert result.returncode == 75
