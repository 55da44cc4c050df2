"""`python -m remove_refusals`."""

from remove_refusals.cli import main

main()
