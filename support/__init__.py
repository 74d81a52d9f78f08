"""What a run needs besides the algorithm: environments, networks, recordings, checkpoints, logs."""
