"""Work in a process that kills itself before a certain change of files, so that it is stopped anywhere, every time."""

import os
import signal
import sys
import traceback
from pathlib import Path

import torch

_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}


def run_until(point, parent, work, *arguments):
    """Do work in a process of its own that is killed before it changes files below `parent` for the `point`th time.

    Gives how often it changed them; 0 if it was killed. At point 0 it is not.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            count = _watched(point, str(parent))
            work(*arguments)
            os.write(writing, str(count[0]).encode())
        except BaseException:  # noqa: BLE001 - nothing of it may reach the tests' own code
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writing)
    with open(reading) as pipe:  # noqa: PTH123 - a descriptor
        found = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return int(found or 0)


def _watched(point, parent):
    count = [0]

    def watch(event, given):
        opened = event == "open" and given[2] & (os.O_WRONLY | os.O_RDWR)
        if (opened or event in _CHANGES) and isinstance(given[0], str | Path) and str(given[0]).startswith(parent):
            count[0] += 1
            if count[0] == point:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    return count
