"""A function in two processes, or more, that know of each other."""

import os
import socket
from multiprocessing import get_context

import pytest
import torch
from accelerate.state import AcceleratorState

# Forked, as a new process imports for seconds; torch refuses that once a GPU has worked.
needs_fork = pytest.mark.skipif(torch.cuda.is_available(), reason="forks, beside a GPU")


def in_processes(number, function, seconds=60):
    """What `function()` returns in each of them, with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    context = get_context("fork")
    processes, results = [], []
    for rank in range(number):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(function, there, rank, number, port))
        process.start()
        processes.append((process, here))
    for process, here in processes:
        assert here.poll(seconds), "a process waits for the other, or has failed"
        results.append(here.recv())
        process.join(seconds)
    return results


def in_two_processes(function, seconds=60):
    """The same in two."""
    return in_processes(2, function, seconds)


def _work(function, pipe, rank, number, port):
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
    AcceleratorState._reset_state(reset_partial_state=True)  # of what the tests before have made
    os.environ |= place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    pipe.send(function())
    torch.distributed.destroy_process_group()
