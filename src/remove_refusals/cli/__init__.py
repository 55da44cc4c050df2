"""The room cli."""

from remove_refusals.cli.main import main

__all__ = [
    "main",
]
