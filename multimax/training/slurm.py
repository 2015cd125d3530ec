"""The place of a process among those that `srun` started, under the names that PyTorch reads."""

import re
from collections.abc import Mapping, MutableMapping

FIRST_PORT, PORTS = 15_000, 10_000


def adopt(environment: MutableMapping[str, str]) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Does nothing where they are given, as by torchrun, and where `srun` has started one process or
    none. The processes must be distributed in blocks, SLURM's default: process 0 is then on the
    first node.

    Args:
        environment: such as `os.environ`.

    Raises:
        ValueError: a variable of SLURM is missing.
    """
    # Not SLURM_NTASKS, which the script of a batch job has too.
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks == 1 or "RANK" in environment:
        return
    needed = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID")
    needed += ("SLURM_STEP_NODELIST", "SLURM_JOB_ID")
    missing = [name for name in needed if name not in environment]
    if missing:
        raise ValueError(
            f"srun has started {tasks} processes, but {', '.join(missing)} is not set: start them "
            "with torchrun, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
        )
    here = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    port = FIRST_PORT + int(environment["SLURM_JOB_ID"]) % PORTS
    defaults = {
        "MASTER_ADDR": first_node(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(port),  # another job on the first node has another one
    }
    environment.update(
        RANK=environment["SLURM_PROCID"],
        WORLD_SIZE=str(tasks),
        LOCAL_RANK=environment["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=str(here[int(environment["SLURM_NODEID"])]),
        **{name: environment.get(name, value) for name, value in defaults.items()},
    )


def requeued(environment: Mapping[str, str]) -> bool:
    """Whether this job has been queued again, so that it goes on with what it began."""
    return int(environment.get("SLURM_RESTART_COUNT") or 0) > 0


def first_node(nodes: str) -> str:
    """The first of a list of nodes as SLURM writes it, such as "gpu[07-09,12],login1"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise ValueError(f"SLURM_STEP_NODELIST={nodes!r} names no node: set MASTER_ADDR")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0])


def tasks_per_node(counts: str) -> list[int]:
    """The processes of each node from what SLURM writes, such as "4(x2),3" for 4, 4 and 3."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(count) for count, times in found for _ in range(int(times or 1))]
