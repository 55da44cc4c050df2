"""What each command does: read the options, call the library, print."""
