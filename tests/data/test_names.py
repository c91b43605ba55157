from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mae_transfer.data.names import Names, Parts


@given(st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=8), max_size=12), st.data())
def test_names_are_a_list_of_strings(names: list[str], data: st.DataObject) -> None:
    packed = Names(names)
    assert list(packed) == names == list(pickle.loads(pickle.dumps(packed)))  # noqa: S301
    start = data.draw(st.integers(0, len(names)))
    stop = data.draw(st.integers(start, len(names)))
    assert packed[start:stop] == names[start:stop] == list(packed.part(start, stop))
    for outside in (len(names), -len(names) - 1):
        with pytest.raises(IndexError):
            packed[outside]


def test_names_that_are_no_unicode_survive() -> None:
    assert Names(["caf\udce9.jpg"])[-1] == "caf\udce9.jpg"


@given(st.lists(st.integers(0, 4), max_size=6))
def test_parts_number_through(lengths: list[int]) -> None:
    parts = Parts(lengths)
    expected = [(part, place) for part, length in enumerate(lengths) for place in range(length)]
    assert [parts.locate(index) for index in range(len(parts))] == expected
    assert [parts.start(part) for part in range(len(lengths))] == [sum(lengths[:part]) for part in range(len(lengths))]
    for outside in (-1, len(parts)):
        with pytest.raises(IndexError):
            parts.locate(outside)


def test_packed_names_are_small() -> None:
    names = Names(f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(10_000))
    assert names.block.nbytes + names.ends.nbytes < 10_000 * 40
    assert names.ends.dtype == np.int64
