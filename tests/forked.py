"""`train.py` in processes of their own, forked from one that has imported what it needs.

Their signals, exit codes and output are those of any process. Only the imports, which take longer
than a tiny run, are made once for all; what is about them needs a new interpreter.
"""

import atexit
import multiprocessing
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["hydra.main", "multimax.training.run", "multimax.training.sweep"])


class Forked:
    """A process in a session of its own that runs `train.py`, and is killed when left.

    Args:
        arguments: the command line.
        output: the file into which goes what it prints, errors too.
        environment: variables that are added.
    """

    def __init__(self, arguments, output, **environment):
        self.output = output
        self._process = FORKS.Process(target=_train, args=(arguments, output, environment))
        self._process.start()
        self.pid = self._process.pid

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.join()

    def poll(self):
        """The exit code, minus the number of a signal that ended it; None while it runs."""
        return self._process.exitcode

    def finish(self):
        """The exit code, and what was printed."""
        self._process.join(300)
        return self.poll(), self.output.read_text()


def _train(arguments, output, environment):
    import torch

    multiprocessing.set_start_method("fork", force=True)  # as in any process
    os.setsid()
    os.chdir(ROOT)
    os.environ.update(environment)
    torch.set_num_threads(1)
    with open(output, "w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.argv = ["train.py", *arguments]
    try:
        runpy.run_path("train.py", run_name="__main__")
    finally:  # which a child of multiprocessing leaves out
        atexit._run_exitfuncs()
