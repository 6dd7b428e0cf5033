from __future__ import annotations

import numpy as np
import pytest

from fppmo_ray.training import Splits, splits_from_files, stratified_splits

LABELS = np.repeat([0, 1, 2], [50, 30, 20])


def rows(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def written(folder, **splits):
    for name, values in splits.items():
        np.save(folder / f"{name}.npy", np.array(values))
    return {name: folder / f"{name}.npy" for name in splits}


def test_every_class_has_its_share_and_no_row_is_lost_or_used_twice():
    splits = stratified_splits(LABELS, search_val=20, choose_val=0.1, seed=0)
    assert np.bincount(LABELS[splits.search_train]).tolist() == [35, 21, 14]
    assert np.bincount(LABELS[splits.search_val]).tolist() == [10, 6, 4]
    assert np.bincount(LABELS[splits.choose_val]).tolist() == [5, 3, 2]
    together = np.concatenate([splits.search_train, splits.search_val, splits.choose_val])
    assert np.sort(together).tolist() == list(range(100))


def test_sizes_are_met_exactly_where_class_shares_are_fractions():
    splits = stratified_splits(LABELS, search_val=7, choose_val=3, seed=0)
    assert np.bincount(LABELS[splits.search_val]).tolist() == [4, 2, 1]
    assert np.bincount(LABELS[splits.choose_val]).tolist() == [1, 1, 1]


def test_equal_seeds_give_equal_splits_and_others_do_not():
    first, second, other = (
        stratified_splits(LABELS, search_val=20, choose_val=10, seed=seed) for seed in (3, 3, 4)
    )
    assert first.search_val.tolist() == second.search_val.tolist()
    assert first.choose_val.tolist() == second.choose_val.tolist()
    assert first.search_val.tolist() != other.search_val.tolist()


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ({"search_val": 1.5, "choose_val": 10}, r"search_val as a share must be in \(0, 1\)"),
        ({"search_val": 0, "choose_val": 10}, "search_val must take 1 to 99 images, got 0"),
        ({"search_val": 10, "choose_val": 100}, "choose_val must take 1 to 99 images, got 100"),
        ({"search_val": 60, "choose_val": 40}, "leave none for search-train"),
    ],
)
def test_sizes_out_of_range_are_refused(sizes, complaint):
    with pytest.raises(ValueError, match=complaint):
        stratified_splits(LABELS, **sizes, seed=0)


@pytest.mark.parametrize(
    ("splits", "complaint"),
    [
        (([0, 1], [1, 2], [3]), "1 rows in both search_train and search_val, the first is 1"),
        (([0], [1, 2], [2]), "in both search_val and choose_val, the first is 2"),
        (([0], [1, 1], [2]), "search_val names row 1 more than once"),
        (([0], [1], []), "choose_val is empty"),
    ],
)
def test_overlapping_repeated_and_empty_splits_are_refused(splits, complaint):
    train, val, choose = (rows(*values) for values in splits)
    with pytest.raises(ValueError, match=complaint):
        Splits(search_train=train, search_val=val, choose_val=choose)


def test_rows_from_files_are_taken_as_they_are_and_the_rest_trains(tmp_path):
    paths = written(tmp_path, search_val=[5, 3], choose_val=[60, 61])
    splits = splits_from_files(LABELS, **paths)
    assert splits.search_val.tolist() == [3, 5]
    assert splits.choose_val.tolist() == [60, 61]
    assert splits.search_train.tolist() == [i for i in range(100) if i not in (3, 5, 60, 61)]


def test_choose_val_is_carved_out_of_search_val_class_by_class(tmp_path):
    held_out = [*range(0, 10), *range(50, 60)]
    splits = splits_from_files(LABELS, **written(tmp_path, search_val=held_out), seed=1)
    assert np.bincount(LABELS[splits.choose_val]).tolist() == [4, 4]
    assert sorted([*splits.search_val, *splits.choose_val]) == held_out
    assert len(splits.search_train) == 80


def test_search_train_may_be_given_too(tmp_path):
    paths = written(tmp_path, search_val=[1], choose_val=[2], search_train=[9, 8])
    assert splits_from_files(LABELS, **paths).search_train.tolist() == [8, 9]
    paths = written(tmp_path, search_val=[1], choose_val=[2], search_train=[2, 8])
    with pytest.raises(ValueError, match="1 rows in both search_train and choose_val"):
        splits_from_files(LABELS, **paths)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ([1, 100], "names row 100, but the training set's rows are 0 to 99"),
        ([-1], "names row -1"),
        ([1, 1, 2], "names row 1 more than once"),
        ([0.5], "must hold one array of integers"),
        ([[1, 2]], "must hold one array of integers"),
    ],
)
def test_files_of_wrong_rows_are_refused(tmp_path, values, complaint):
    with pytest.raises(ValueError, match=complaint):
        splits_from_files(LABELS, **written(tmp_path, search_val=values))


def test_missing_and_corrupt_files_are_refused(tmp_path):
    path = tmp_path / "rows.npy"
    with pytest.raises(ValueError, match="there is no file of row numbers"):
        splits_from_files(LABELS, search_val=path)
    np.save(path, np.arange(50))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"rows\.npy is no readable \.npy file"):
        splits_from_files(LABELS, search_val=path)
    np.save(path, np.array([object()]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"rows\.npy is no readable \.npy file"):
        splits_from_files(LABELS, search_val=path)
