"""One measured number with its chance and its n."""

from math import sqrt
from typing import NamedTuple


class Measure(NamedTuple):
    """One number, what guessing would give, and of how many queries it is the mean.

    Results of different models are matched by `name`, so what differs from model to model, as a spread does, belongs
    to `detail`, which is shown after the name.
    """

    name: str
    value: float
    chance: float
    n: int
    detail: str = ""

    @property
    def label(self) -> str:
        """The name and the detail, to be shown."""
        return f"{self.name} {self.detail}".strip()

    @property
    def times_chance(self) -> float:
        """How many times better than guessing."""
        return self.value / self.chance

    @property
    def margin(self) -> float:
        """Half the width of the 95 % interval of a share of `n` independent trials (Wilson 1927)."""
        z, n, p = 1.96, self.n, self.value
        return z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
