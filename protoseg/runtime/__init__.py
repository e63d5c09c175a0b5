"""What every command stands on: ranks, errors, files, console, signals."""
