"""How far a run has come: its steps, and the returns of its episodes."""

from array import array

import numpy as np
import torch


class Progress:
    """Counts steps and adds up the returns of episodes.

    Attributes:
        global_step: environment transitions so far, all envs together.
        episode_return: (num_envs,) float64, sum of the running episode's rewards.
        episode_length: (num_envs,) int64, its steps.
        finished: global_step and return of one finished episode after the other, in one flat array:
            of 50,000 episodes a list of tuples would take long to save.
    """

    def __init__(self, num_envs: int):
        self.global_step = 0
        self.episode_return = np.zeros(num_envs, np.float64)
        self.episode_length = np.zeros(num_envs, np.int64)
        self.finished = array("d")

    def advance(self, reward: np.ndarray, done: np.ndarray) -> tuple[float, float] | None:
        """Count one step of every env.

        Args:
            reward: (num_envs,).
            done: (num_envs,) bool, true where an episode ended with this step.

        Returns:
            Mean return and mean length of the episodes that ended; None if none did.
        """
        self.global_step += len(done)
        self.episode_return += reward
        self.episode_length += 1
        if not done.any():
            return None
        returns, lengths = self.episode_return[done], self.episode_length[done]
        for ret in returns.tolist():
            self.finished.extend((self.global_step, ret))
        self.restart(done)
        return float(returns.mean()), float(lengths.mean())

    def restart(self, mask: np.ndarray) -> None:
        """Begin a new episode in the envs of mask, (num_envs,) bool."""
        self.episode_return[mask] = 0
        self.episode_length[mask] = 0

    def last_tenth(self) -> float | None:
        """Mean return of the episodes that ended in the last tenth of all steps; None if none."""
        steps, returns = np.array(self.finished).reshape(-1, 2).T
        late = returns[steps > 0.9 * self.global_step]
        return float(late.mean()) if len(late) else None

    def state_dict(self) -> dict:
        return {
            "global_step": self.global_step,
            "episode_return": torch.from_numpy(self.episode_return.copy()),
            "episode_length": torch.from_numpy(self.episode_length.copy()),
            "finished": torch.from_numpy(np.array(self.finished)),
        }

    def load_state_dict(self, saved: dict) -> None:
        self.global_step = saved["global_step"]
        self.episode_return[:] = saved["episode_return"]
        self.episode_length[:] = saved["episode_length"]
        self.finished = array("d", saved["finished"].tolist())
