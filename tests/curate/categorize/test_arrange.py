"""Which folder a picture goes to."""

from __future__ import annotations

import random

from sdlab.curate.categorize.arrange import OTHER, arrange, counts
from sdlab.curate.names import folder_name

KEYWORDS = {
    "1": ("dog", "brown", "grass"),
    "2": ("dog", "white"),
    "3": ("cat", "white", "sofa"),
    "4": ("cat", "fire truck"),
    "5": ("dog", "fire truck", "brown"),
    "6": (),
    "7": ("sofa bed",),
}


def random_keywords(rng: random.Random) -> dict[str, tuple[str, ...]]:
    words = ["dog", "cat", "fire truck", "t shirt", "t_shirt", "Éa", "...", "con", "red", "blue"]
    return {str(i): tuple(rng.sample(words, rng.randint(0, 5))) for i in range(rng.randint(0, 40))}


def test_the_most_frequent_keyword_makes_the_folder_and_the_next_one_below_it():
    assert arrange(KEYWORDS, min_count=2, depth=2) == {
        "1": ("dog", "brown"),
        "2": ("dog", "white"),
        "3": ("cat", "white"),
        "4": ("cat", "fire_truck"),
        "5": ("dog", "brown"),  # as often as "fire truck": the alphabet decides
        "6": ("_other",),
        "7": ("_other",),
    }


def test_depth_is_the_most_folders_below_each_other():
    assert arrange(KEYWORDS, min_count=2, depth=1)["1"] == ("dog",)
    assert arrange(KEYWORDS, min_count=2, depth=9)["5"] == ("dog", "brown", "fire_truck")


def test_min_count_counts_pictures_not_mentions():
    twice = {"1": ("dog", "dog"), "2": ("cat",), "3": ("cat",)}
    assert counts(twice) == [("cat", 2), ("dog", 1)]
    assert arrange(twice, min_count=2, depth=2)["1"] == (OTHER,)


def test_counts_are_by_number_and_then_by_the_alphabet():
    assert counts(KEYWORDS)[:6] == [
        ("dog", 3), ("brown", 2), ("cat", 2), ("fire truck", 2), ("white", 2), ("grass", 1),
    ]  # fmt: skip


def test_keywords_with_one_folder_name_make_one_folder():
    same = {"1": ("t shirt", "t_shirt"), "2": ("t shirt", "t_shirt")}
    assert arrange(same, min_count=1, depth=2) == {"1": ("t_shirt",), "2": ("t_shirt",)}


def test_a_keyword_that_no_folder_can_be_called_makes_none():
    assert arrange({"1": ("...", "dog")}, min_count=1, depth=2) == {"1": ("dog",)}
    assert arrange({"1": ("...",)}, min_count=1, depth=2) == {"1": (OTHER,)}


def test_the_result_is_free_of_the_order_of_pictures_and_of_keywords():
    rng = random.Random(1)
    for _ in range(100):
        keywords = random_keywords(rng)
        shuffled = {
            id: tuple(rng.sample(keywords[id], len(keywords[id])))
            for id in rng.sample([*keywords], len(keywords))
        }
        for min_count, depth in ((1, 1), (2, 2), (3, 4)):
            assert arrange(keywords, min_count=min_count, depth=depth) == arrange(
                shuffled, min_count=min_count, depth=depth
            )
            assert counts(keywords) == counts(shuffled)


def test_every_picture_has_a_place_that_its_own_frequent_keywords_name():
    rng = random.Random(2)
    for _ in range(200):
        keywords, min_count, depth = random_keywords(rng), rng.randint(1, 4), rng.randint(1, 4)
        number = dict(counts(keywords))
        folders = arrange(keywords, min_count=min_count, depth=depth)
        assert folders.keys() == keywords.keys()
        for id, path in folders.items():
            allowed = {folder_name(word) for word in keywords[id] if number[word] >= min_count} - {""}
            assert 1 <= len(path) <= depth and len(set(path)) == len(path)
            assert set(path) <= allowed if allowed else path == (OTHER,)
            assert len(path) == min(depth, len(allowed) or 1)
