from pathlib import Path

import numpy as np

from sparsegraph.shelf import Shelf


def test_beyond_the_limit_arrays_are_mapped_and_equal() -> None:
    shelf = Shelf([{"x": np.ones(3)}, {}], limit=100)
    arrays = {name: np.random.default_rng(i).random(10) for i, name in enumerate("abc")}
    for name, array in arrays.items():
        shelf.put(1, name, array)
    assert shelf.in_memory == 80
    assert [isinstance(shelf[1][name], np.memmap) for name in "abc"] == [False, True, True]
    for name, array in arrays.items():
        np.testing.assert_array_equal(shelf[1][name], array)
    np.testing.assert_array_equal(shelf[0]["x"], np.ones(3))


def test_dropping_frees_memory_and_files() -> None:
    shelf = Shelf([{}], limit=100)
    shelf.put(0, "a", np.zeros(10))
    shelf.put(0, "b", np.zeros(10))
    path = Path(shelf[0]["b"].filename)
    assert path.exists()
    shelf.drop(0, "a")
    shelf.drop(0, "b")
    assert (shelf.in_memory, path.exists(), dict(shelf[0])) == (0, False, {})
    shelf.put(0, "c", np.zeros(12))
    assert not isinstance(shelf[0]["c"], np.memmap)


def test_the_files_of_feeds_are_left_alone(tmp_path: Path) -> None:
    mine = np.memmap(tmp_path / "mine", dtype=np.float32, mode="w+", shape=(4,))
    shelf = Shelf([{"x": mine}], limit=0)
    shelf.put(0, "y", np.zeros(3))
    shelf.drop(0, "x")
    assert (tmp_path / "mine").exists()


def test_replacing_counts_once() -> None:
    shelf = Shelf([{}], limit=100)
    for _ in range(5):
        shelf.put(0, "a", np.zeros(10))
    assert shelf.in_memory == 80
