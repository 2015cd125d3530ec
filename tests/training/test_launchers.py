"""Launchers of a sweep: SLURM, this machine, torchrun; and jobs that are killed or fail there."""

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import Forked
from test_studies import SMALL
from tiny import PLAIN, ROOT, only, state

pytestmark = pytest.mark.slow

STUDY = ["-m", *SMALL, "study=table2", "cells=softmax"]
LONG = ["trainer.updates=1000000", "trainer.evaluate_every=1000000", "trainer.log_every=1"]
# A cluster that has one node, and does at once what it is told to.
SBATCH = """#!{python}
import os, re, subprocess, sys
script = open(sys.argv[-1]).read()
open("{folder}/script", "w").write(script)
tasks = re.search(r"--ntasks-per-node=(\\d+)", script)[1]
array = re.search(r"--array=0-(\\d+)", script)
for index in range(int(array[1]) + 1 if array else 1):
    variables = {{"SLURM_JOB_ID": str(7 + index), "SLURM_NTASKS": tasks, "SLURM_NODEID": "0",
                 "SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_PER_TASK": "8"}}
    if array:
        variables |= {{"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(index)}}
    # Not that of submitit, which moves it as soon as it has been told the number.
    subprocess.Popen(["bash", "{folder}/script"], env=os.environ | variables,
                     stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print("Submitted batch job 7")
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do [[ $1 == *=* || $1 == --unbuffered ]] && shift || shift 2; done
echo $SRUN_CPUS_PER_TASK > {folder}/cores
export SLURM_STEP_NUM_TASKS=$SLURM_NTASKS SLURM_STEP_TASKS_PER_NODE=$SLURM_NTASKS
export SLURM_STEP_NODELIST=127.0.0.1
for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" >> {folder}/said.$rank 2>&1 &
    echo $! > {folder}/task.$rank
done
wait
"""
SACCT = """#!/bin/bash
printf 'JobID|State|NodeList\\n7|RUNNING|node\\n7_0|RUNNING|node\\n7_1|RUNNING|node\\n'
"""
SCONTROL = """#!/bin/bash
echo "$@" >> {folder}/queued
unset ${{!SLURM_STEP*}} RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE
SLURM_RESTART_COUNT=1 bash {folder}/script > {folder}/again 2>&1 &
"""


@pytest.fixture
def cluster(tmp_path):
    """A folder of programs that imitate SLURM, and of what they note; the PATH that has them."""
    folder = tmp_path / "bin"
    folder.mkdir()
    texts = {"sbatch": SBATCH, "srun": SRUN, "sacct": SACCT, "scontrol": SCONTROL}
    for name, text in texts.items():
        (folder / name).write_text(text.format(python=sys.executable, folder=folder))
        (folder / name).chmod(stat.S_IRWXU)
    return folder, f"{folder}{os.pathsep}{os.environ['PATH']}"


def wait_for(condition, process):
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.output.read_text()
        assert time.monotonic() < deadline, process.output.read_text()
        time.sleep(0.05)


def updates(folder):
    return sum(path.read_text().count("\n") for path in folder.rglob("metrics.jsonl"))


def test_jobs_of_slurm(train, tmp_path, cluster, monkeypatch):
    folder, path = cluster
    monkeypatch.setenv("PATH", path)
    code, *printed = train(
        *STUDY, f"output_dir={tmp_path}", "seed=0,1", "hydra/launcher=slurm",
        "hydra.launcher.partition=gpu",
    )  # fmt: skip
    printed = "".join(printed)
    assert (code, "sweep of 2 jobs: 2 finished\n" in printed) == (0, True), printed
    script = (folder / "script").read_text()
    for wish in ("partition=gpu", "gpus-per-node=1", "time=1440", "mem=64GB", "job-name=multimax"):
        assert f"#SBATCH --{wish}" in script
    assert (folder / "cores").read_text() == "8\n"


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def test_a_job_of_slurm_that_runs_out_of_time_goes_on(tmp_path, cluster):
    """The signal of submitit comes to one of the two processes of a run, which begins afresh."""
    folder, path = cluster
    sweep = [
        *STUDY, *LONG, "trainer.updates=500", f"output_dir={tmp_path}", "seed=0", "resume=never",
        "hydra/launcher=slurm", "hydra.launcher.tasks_per_node=2",
    ]  # fmt: skip
    with Forked(sweep, tmp_path / "said.txt", PATH=path, MASTER_PORT=free_port()) as process:
        wait_for(lambda: updates(tmp_path) > 5, process)
        os.kill(int((folder / "task.1").read_text()), signal.SIGUSR2)
        code, said = process.finish()
    assert (code, "sweep of 1 jobs: 1 finished\n" in said) == (0, True), said
    assert (folder / "queued").read_text() == "requeue 7\n"
    log = (folder / "said.0").read_text()
    (stopped,) = re.findall(r"stopped by a signal after update (\d+);", log)
    assert f"at update {stopped}\n" in log
    assert log.count("2 x cpu") == 2
    assert state(tmp_path)["position"]["update"] == 500
    assert not list(tmp_path.rglob("previous-*"))
    assert only(tmp_path, "metrics.jsonl").read_text().count('"train/loss"') == 500


def test_slurm_where_there_is_none(train, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    said, *_ = train(*STUDY, f"output_dir={tmp_path}", "seed=0", "hydra/launcher=slurm")
    assert said == 'error: Could not detect "srun", are you indeed on a slurm cluster?'


def worker_of(folder):
    """The process that holds a run folder."""
    lock = str(only(folder, ".lock"))
    for file in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(file) == lock:
                return int(file.parts[2])
        except OSError:  # of a process that has just ended
            continue
    raise LookupError(lock)


def _has_failed(folder):
    (record,) = folder.glob("sweeps/*/jobs.jsonl")
    return '"failed"' in record.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_job_that_is_killed_leaves_the_sweep_its_summary(tmp_path):
    sweep = [*STUDY, *LONG, f"output_dir={tmp_path}", "seed=0", "optimizer.lr=-1,1e-3",
             "hydra/launcher=workstation"]  # fmt: skip
    with Forked(sweep, tmp_path / "said.txt") as process:
        wait_for(lambda: updates(tmp_path) > 0 and _has_failed(tmp_path), process)
        os.kill(worker_of(tmp_path), signal.SIGKILL)
        code, said = process.finish()
    assert code == 1
    assert "sweep of 2 jobs: 1 failed, 1 launched\n" in said
    assert re.search(r"lr=0.001 +launched +killed, still running, or not begun\n", said)
    assert "A worker process managed by the executor was unexpectedly terminated" in said
    assert said.count("sweep of") == 1


def test_tasks_of_ray(tmp_path):
    """On a cluster of this machine, where its plug-in is."""
    pytest.importorskip("hydra_plugins.hydra_ray_launcher")
    done = subprocess.run(
        [sys.executable, "train.py", *STUDY, "seed=0,1", f"output_dir={tmp_path}",
         "hydra/launcher=ray_cluster", "hydra.launcher.ray.init.address=null",
         "hydra.launcher.ray.remote={num_cpus:1,num_gpus:0}"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "sweep of 2 jobs: 2 finished\n" in done.stdout


def recorded(folder):
    """The jobs of a sweep, which has one folder, whatever the number of its processes."""
    (record,) = folder.glob("sweeps/*/jobs.jsonl")
    assert [path.name for path in folder.glob("sweeps/*")] == [record.parent.name]
    return [json.loads(line) for line in record.read_text().splitlines()]


def test_each_run_of_a_table_on_all_devices(tmp_path):
    """GPUS=2 of the script, on CPUs: one that diverges does so in both, and ends no other."""
    python, written = tmp_path / "python", tmp_path / "commands"
    drawn = f'case $2 in experiments.*) echo "$2" >> {written} ;; *) exec {sys.executable} "$@" ;;'
    python.write_text(f"#!/bin/sh\n{drawn} esac\n")
    python.chmod(stat.S_IRWXU)
    done = subprocess.run(
        [ROOT / "scripts" / "table2.sh", *SMALL, "cells=softmax", "seed=0",
         "optimizer.lr=1e30,1e-3", f"output_dir={tmp_path}"],
        env=os.environ | {"PYTHON": str(python), "GPUS": "2", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    assert done.stdout.count("sweep of 2 jobs: 1 failed, 1 finished\n") == 1, done.stdout
    assert done.stdout.count("2 x cpu") == 2
    states = [job["state"] for job in recorded(tmp_path)]
    assert states == ["launched", "launched", "failed", "finished"]
    assert written.read_text().split() == ["experiments.results", "experiments.tables"]


def test_a_process_that_fails_alone_ends_the_sweep(tmp_path):
    """The other is still in this job, and must not meet it in the next."""
    sweep = ["-m", "experiment=deit_softmax", *PLAIN, *LONG, f"output_dir={tmp_path}", "seed=0,1"]
    step = {
        "SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NODEID": "0", "MASTER_PORT": free_port(),
    }  # fmt: skip
    first = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    other = {"SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
    with (
        Forked(sweep, tmp_path / "first.txt", **step, **first) as main,
        Forked([*sweep, "weights=/nowhere"], tmp_path / "other.txt", **step, **other) as process,
    ):
        code, said = process.finish()
        assert (code, "error: weights=/nowhere must be a checkpoint file" in said) == (1, True)
        code, said = main.finish()
    assert code == 1
    assert "sweep of 2 jobs: 2 failed\n" in said
    jobs = recorded(tmp_path)
    assert {job["settings"][-1] for job in jobs} == {"seed=0", "weights=/nowhere"}
    assert all("seed=0" in job["settings"] for job in jobs)
