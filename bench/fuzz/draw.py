"""Where the choices of a case come from: a seed in campaigns, Hypothesis in the tests, a list when a case is repeated or shrunk.

A case is made by a function of a `Draw`. The smallest choices, zeros, must make the simplest case: that is where shrinking leads.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st


class Draw:
    """Choices, each a whole number from 0; `taken` holds those made so far."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def below(self, count: int) -> int:
        """A whole number from 0 to count - 1."""
        self.taken.append(self._below(count))
        return self.taken[-1]

    def integer(self, low: int, high: int) -> int:
        """A whole number from low to high."""
        return low + self.below(high - low + 1)

    def choice(self, values: Sequence[Any]) -> Any:
        """One of the values, the simplest first."""
        return values[self.below(len(values))]

    def chance(self, one_in: int) -> bool:
        """True with a probability of one in the given number."""
        return self.below(one_in) == one_in - 1

    def some(self, values: Sequence[Any], least: int, most: int) -> list[Any]:
        """Between least and most of the values, each at most once, in their order."""
        count, left = self.integer(least, min(most, len(values))), list(range(len(values)))
        return [values[i] for i in sorted(left.pop(self.below(len(left))) for _ in range(count))]

    def _below(self, count: int) -> int:
        raise NotImplementedError


class Seeded(Draw):
    """Choices from a seed."""

    def __init__(self, *seed: Any) -> None:
        super().__init__()
        self._below = random.Random(repr(seed)).randrange  # type: ignore[method-assign]


class Given(Draw):
    """Choices from a list, each as near as the case allows; zeros after its end."""

    def __init__(self, choices: Sequence[int]) -> None:
        super().__init__()
        self.left = list(reversed(choices))

    def _below(self, count: int) -> int:
        return min(self.left.pop(), count - 1) if self.left else 0


class _Hypothesis(Draw):
    def __init__(self, draw: Callable) -> None:
        super().__init__()
        self.draw = draw

    def _below(self, count: int) -> int:
        return self.draw(st.integers(0, count - 1))


def strategy(make: Callable[[Draw], Any]) -> st.SearchStrategy[Any]:
    """What `make` makes, for Hypothesis to choose and to shrink."""

    @st.composite
    def made(draw: Callable) -> Any:
        return make(_Hypothesis(draw))

    return made()
