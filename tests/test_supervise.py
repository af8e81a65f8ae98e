"""Tests of lookup_vit/supervise.py, on programs of a line or two."""

import os
import signal
import subprocess
import sys
import time

import pytest

# It has the arguments of `distributed.define_flags` where it is one of several.
HEAD = """
import os, signal, sys, time
flags = dict(a[2:].split("=") for a in sys.argv[1:] if a.startswith("--"))
me = int(flags.get("process_id", 0))
starts = "starts_%d" % me
with open(starts, "a") as file:
  file.write("x")
start = os.path.getsize(starts)
def say(text):
  print(text, file=sys.stderr, flush=True)
"""


def start(path, program, *arguments):
  return subprocess.Popen(
    [sys.executable, "-m", "lookup_vit.supervise", *arguments, "--"]
    + [sys.executable, "-c", HEAD + program],
    cwd=path,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=dict(os.environ, PYTHONPATH=os.getcwd()),
  )


def run(path, program, *arguments):
  process = start(path, program, *arguments)
  out, err = process.communicate(timeout=60)
  return process.returncode, out, err


def starts(path, process=0):
  return (path / f"starts_{process}").stat().st_size


def test_status_and_output_are_those_of_the_program(tmp_path):
  program = "print('out'); say('12:00:01 step 3/9 (33%%)'); sys.exit(%d)"
  for status in (0, 1, 2):
    got, out, err = run(tmp_path, program % status, "--restarts=5")
    assert got == status
    assert out == "out\n" and err == "12:00:01 step 3/9 (33%)\n"
  assert starts(tmp_path) == 3


def test_a_crash_is_named_and_starts_again(tmp_path):
  program = """
say("12:00:01 step 7/9 (77%)  loss 1.0")
if start < 3: os.kill(os.getpid(), signal.SIGKILL)
say("done")
"""
  status, _, err = run(tmp_path, program, "--restarts=2")
  assert status == 0 and starts(tmp_path) == 3
  assert err.count("Process 0 of 1, on") == 2
  assert err.count("was lost after step 7: it ended by SIGKILL") == 2
  assert "1 more restart" in err and "0 more restart" in err


def test_no_more_restarts_than_told(tmp_path):
  status, _, err = run(tmp_path, "sys.exit(42)", "--restarts=1")
  assert status == 42 and starts(tmp_path) == 2
  assert "was lost before the first step: it ended with status 42" in err


def test_preemption_starts_again_without_counting(tmp_path):
  status, _, err = run(tmp_path, "sys.exit(0 if start == 4 else 75)")
  assert status == 0 and starts(tmp_path) == 4
  assert err.count("saved its state; starting again") == 3


def test_lost_process_ends_the_others(tmp_path):
  """The one that was lost is named, not the one that is aborted for it."""
  program = """
say("12:00:01 step %d/90 (3%%)  loss 1.0" % (30 + me))
if me == 1:
  time.sleep(1)
  say("the last line of process 1")
  os.kill(os.getpid(), signal.SIGKILL)
elif me == 2:
  time.sleep(1.02)
  os.abort()
time.sleep(1000)
"""
  clock = time.monotonic()
  arguments = ["--num_processes=3", "--grace=2"]
  status, _, err = run(tmp_path, program, *arguments)
  assert time.monotonic() - clock < 30
  assert status == 128 + signal.SIGKILL
  assert "Process 1 of 3" in err and "it ended by SIGKILL" in err
  assert "after step 3" in err
  assert "process 1: the last line of process 1" in err
  assert err.count("step 31/90") == 1  # Of its last lines.


def test_several_get_flags_and_process_zero_is_shown(tmp_path):
  program = "say('%s' % sorted(flags.items())); print('out')"
  arguments = ["--num_processes=2", "--heartbeat_timeout=7"]
  status, out, err = run(tmp_path, program, *arguments)
  assert status == 0 and out == "out\n"
  assert err.count("coordinator_address") == 1
  for item in (
    "('process_id', '0')",
    "('num_processes', '2')",
    "('heartbeat_timeout', '7')",
    "('coordinator_address', '127.0.0.1:",
  ):
    assert item in err


@pytest.mark.parametrize("answer, want", [("75", 75), ("0", 0), ("3", 3)])
def test_told_to_stop(answer, want, tmp_path):
  """It tells the program, and does not start it again."""
  program = f"""
signal.signal(signal.SIGTERM, lambda *_: sys.exit({answer}))
say("ready")
time.sleep(1000)
"""
  process = start(tmp_path, program, "--num_processes=2", "--restarts=9")
  assert process.stderr.readline() == "ready\n"
  time.sleep(0.5)  # The other one too.
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=30)
  assert process.returncode == want
  assert starts(tmp_path, 0) == starts(tmp_path, 1) == 1


def test_bad_arguments(tmp_path):
  for arguments, words in (
    (["--num_processes=0"], "--num_processes=0"),
    (["--restarts=-1"], "--restarts=-1"),
  ):
    status, _, err = run(tmp_path, "", *arguments)
    assert status == 1 and words in err and err.startswith("error: ")
  command = [sys.executable, "-m", "lookup_vit.supervise"]
  for arguments, words in (
    ([], "no command"),
    (["--", "no-such-program"], "no-such-program"),
  ):
    done = subprocess.run(command + arguments, capture_output=True, text=True)
    assert done.returncode == 1 and words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_what_a_wrapper_started_is_told_too(tmp_path):
  program = """
import subprocess
child = subprocess.Popen(["sleep", "1000"])
with open("child", "w") as file: file.write(str(child.pid))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
say("ready")
child.wait()
"""
  process = start(tmp_path, program)
  assert process.stderr.readline() == "ready\n"
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=30)
  child = int((tmp_path / "child").read_text())
  with pytest.raises(ProcessLookupError):
    for _ in range(100):  # Until it is reaped.
      os.kill(child, 0)
      time.sleep(0.1)


def test_who_does_not_stop_is_killed(tmp_path):
  program = "signal.signal(signal.SIGTERM, lambda *_: 0); say('ready')\n"
  program += "while True: time.sleep(1)"
  process = start(tmp_path, program, "--stop_timeout=1", "--restarts=3")
  assert process.stderr.readline() == "ready\n"
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=30)
  assert process.returncode == 128 + signal.SIGKILL
  assert (
    "Killed, as they did not end: process 0." in err and "was lost" not in err
  )


def test_it_goes_on_when_nobody_reads_its_errors(tmp_path):
  program = "for _ in range(20_000): say('a line of some length')"
  process = start(tmp_path, program)
  process.stderr.readline()
  process.stderr.close()
  assert process.wait(timeout=60) == 0
