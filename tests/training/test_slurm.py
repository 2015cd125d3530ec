"""Processes of srun, and the batch script that queues an interrupted run again."""

import os
import stat
import subprocess

import pytest
from tiny import ROOT

from multimax.training.slurm import adopt, first_node, tasks_per_node

STEP = {
    "SLURM_STEP_NUM_TASKS": "11", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_STEP_NODELIST": "gpu[07-08,12]",
    "SLURM_JOB_ID": "123456",
}  # fmt: skip


def test_place_of_a_process_of_srun():
    environment = dict(STEP)
    adopt(environment)
    assert {name: environment[name] for name in environment.keys() - STEP.keys()} == {
        "RANK": "9", "WORLD_SIZE": "11", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "gpu07", "MASTER_PORT": "18456",
    }  # fmt: skip
    given = STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"}
    adopt(given)
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("10.0.0.1", "1")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # the script of a batch job
        STEP | {"SLURM_STEP_NUM_TASKS": "1"},
        STEP | {"RANK": "0"},  # torchrun under srun
    ],
)
def test_other_processes_stay_as_they_are(environment):
    before = dict(environment)
    adopt(environment)
    assert environment == before


def test_what_srun_did_not_say_is_named():
    environment = {name: value for name, value in STEP.items() if name != "SLURM_LOCALID"}
    with pytest.raises(ValueError, match="srun has started 11 processes, but SLURM_LOCALID is not"):
        adopt(environment)
    with pytest.raises(ValueError, match="SLURM_STEP_NODELIST='' names no node"):
        first_node("")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"), ("a,b[1-3]", "a"), ("gpu[007,009-012],x1", "gpu007"),
        ("rack2-gpu[3-4].cluster,z", "rack2-gpu3.cluster"), ("n[01-02]", "n01"),
        ("rack[1-2]-gpu[3-4],z", "rack1-gpu3"), ("a[2,4]b[07]c,d[1]", "a2b07c"),
    ],
)  # fmt: skip
def test_first_of_a_list_of_nodes(nodes, first):
    assert first_node(nodes) == first


def test_counts_of_processes():
    assert tasks_per_node("8") == [8]
    assert tasks_per_node("4(x2),3,2(x3)") == [4, 4, 3, 2, 2, 2]


@pytest.mark.parametrize(("code", "queued"), [(0, ""), (143, "requeue 77\n"), (1, "")])
def test_batch_script_queues_an_interrupted_run_again(tmp_path, code, queued):
    said = tmp_path / "scontrol.said"
    programs = {
        "srun": f'#!/bin/sh\necho $SRUN_CPUS_PER_TASK "$@" > {tmp_path}/srun.said\nexit {code}\n',
        "scontrol": f'#!/bin/sh\necho "$@" >> {said}\n',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(stat.S_IRWXU)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [ROOT / "scripts" / "slurm" / "train.sbatch", "experiment=deit_multimax", "seed=1"],
        env=os.environ
        | {"PATH": path, "SLURM_JOB_ID": "77", "PYTHON": "python3"}
        | {"SLURM_CPUS_PER_TASK": "6"},
    )
    assert done.returncode == code
    started = (tmp_path / "srun.said").read_text()
    assert started == "6 --kill-on-bad-exit=1 python3 train.py experiment=deit_multimax seed=1\n"
    assert (said.read_text() if said.exists() else "") == queued
