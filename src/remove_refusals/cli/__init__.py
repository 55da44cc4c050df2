"""What a person types and sees: options made from the settings, commands, terminal chat, web page."""

from remove_refusals.cli.main import app, main

__all__ = ["app", "main"]
