"""What a run needs besides the algorithm: environments, networks, recording, folders, checkpoints."""
