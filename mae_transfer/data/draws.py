"""Random draws from a counter, so that a draw depends on what it is for and on nothing else.

A draw is addressed by (seed, purpose, epoch, sample index, view). It is the same whichever process or worker asks, in
whatever order, before or after a restart. Only the raw words of the Philox 4x64 bit generator are used: numpy
guarantees that stream across versions, which it does not for its distributions.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

_WORD = (1 << 64) - 1


class Purpose(IntEnum):
    """What a draw is for; each has a stream of its own. The numbers are part of what a seed means: never reuse one."""

    ORDER = 1
    CROP = 2
    MASK = 3
    REPLACEMENT = 4
    EVALUATION_MASK = 5
    EVALUATION_CHOICE = 6
    STEP = 7  # whatever a training step of detection draws
    AUGMENT = 8  # colours and geometry of a sample of classification
    ERASE = 9
    MIXUP = 10  # of a micro-batch, named by its first sample


class Draws:
    """The stream of one (seed, purpose, epoch, index, view).

    The seed and the purpose are Philox's key; epoch, index and view are the three high words of its counter, so streams
    never overlap (a stream would have to draw 2**66 words to reach its neighbour). ``view`` counts the crops of one
    image that go into a batch.
    """

    def __init__(self, *, seed: int, purpose: Purpose, epoch: int = 0, index: int = 0, view: int = 0) -> None:
        key = [seed & _WORD, int(purpose)]
        self._bits = np.random.Philox(key=key, counter=[0, view & _WORD, index & _WORD, epoch & _WORD])

    def words(self, count: int) -> np.ndarray:
        """``count`` unsigned 64-bit words."""
        return self._bits.random_raw(count)

    def uniform(self, count: int) -> np.ndarray:
        """``count`` float64 values, uniform on [0, 1): the upper 53 bits of a word each."""
        return (self.words(count) >> np.uint64(11)) * 2.0**-53

    def generator(self) -> np.random.Generator:
        """The stream as a numpy generator."""
        return np.random.Generator(self._bits)


def permutation(*, seed: int, epoch: int, length: int) -> np.ndarray:
    """The order of ``length`` samples in an epoch, (length,) int64: the argsort of one random word each."""
    words = Draws(seed=seed, purpose=Purpose.ORDER, epoch=epoch).words(length)
    return np.argsort(words, kind="stable")
