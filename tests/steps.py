"""Steps in processes of their own that start at once: forked from a server which has loaded torch but never used it."""

import io
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch", "torchvision", "pandas", "matplotlib.pyplot", "tqdm"])


def work(script, words, log, threads, env):
    """What the process does: one command, its output to the file ``log``."""
    os.environ |= {"TQDM_DISABLE": "1", **env}
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), write_through=True)
    sys.stderr = sys.stdout
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs deaf to Ctrl-C
    import torch
    from conftest import run_cli

    torch.set_num_threads(threads)
    code = run_cli(script, *words)
    sys.stdout.flush()
    os._exit(code)


class Step:
    """A command that runs beside the test: ``code`` once it has ended, ``said``, ``signal``."""

    def __init__(self, script, *words, log, threads=1, env=None):
        self.log = Path(log)
        self.process = context.Process(
            target=work, args=(script, [str(word) for word in words], str(log), threads, env or {})
        )
        self.started = time.perf_counter()
        self.process.start()

    def wait(self, seconds=300):
        """Wait for its end; return the exit code, negative for a signal."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running after {seconds} s: {self.said}"
        self.seconds = time.perf_counter() - self.started
        return self.process.exitcode

    @property
    def said(self):
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(self, text, seconds=120):
        """Wait until it has said ``text``."""
        while text not in self.said:
            assert self.process.is_alive() and time.perf_counter() - self.started < seconds, self.said
            time.sleep(0.01)

    def signal_after(self, number, seconds):
        """Send a signal ``seconds`` after its start, unless it ended before; return the exit code."""
        self.process.join(seconds)
        if self.process.is_alive():
            os.kill(self.process.pid, number)
        return self.wait()


def moments(count, seconds, seed):
    """``count`` moments drawn between 0 and ``seconds``."""
    rng = random.Random(seed)
    return [rng.uniform(0, seconds) for _ in range(count)]
