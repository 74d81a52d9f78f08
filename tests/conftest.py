import signal

import torch

torch.set_num_threads(1)  # the networks here are tiny; more threads only wait for each other
# A shell has background jobs ignore Ctrl-C, and their children inherit that: here they do not.
signal.signal(signal.SIGINT, signal.default_int_handler)
