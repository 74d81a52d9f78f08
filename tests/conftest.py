import signal

import pytest
import torch

torch.set_num_threads(1)  # the networks here are tiny; more threads only wait for each other
# A shell has background jobs ignore Ctrl-C, and their children inherit that: here they do not.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def no_folders_of_stable_baselines3(tmp_path_factory):
    """Each of its agents else makes one of its own in /tmp, and leaves it there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SB3_LOGDIR", str(tmp_path_factory.mktemp("sb3")))
        yield
