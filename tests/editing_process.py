"""What runs in a process of its own, to be killed or to meet a full disk; it imports no more than it needs."""

import os
import resource

import torch

from remove_refusals.baking.disk import bake
from remove_refusals.errors import OutputError
from remove_refusals.settings import DiskSettings

MEMORY = DiskSettings(memory=1 << 16, jobs=2)


def edit_when_told(checkpoint, intervention, output, ready, begin):
    """Edit when told to, which is when all that comes before is done."""
    torch.set_num_threads(1)
    ready.set()
    begin.wait()
    bake(checkpoint, intervention, output, disk=MEMORY)


def edit_within_limit(checkpoint, intervention, output, limit):
    """Edit where no file may be larger than a limit, as on a disk that fills up."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        bake(checkpoint, intervention, output, disk=MEMORY)
    except OutputError as error:
        assert "File too large" in str(error) and f".{output.name}.partial" in str(error)
        os._exit(error.exit_code)
