"""What a run leaves on disk: a directory, checkpoints that survive a crash, metrics, and where it all came from."""
