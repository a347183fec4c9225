"""What is found in captions, as a user would expect it."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdlab.curate.keywords.filler import Filler, read_filler
from sdlab.curate.keywords.tagger import Tagger, open_tagger
from sdlab.testing.scenes import COLOURS, SILHOUETTES, TEXTURES

EXPECTED = {
    "two women riding brown horses near a fire hydrant": "woman, horse, brown, fire hydrant",
    "a dog sitting on a couch with a toy": "dog, couch, toy",
    "a woman in a red dress standing in front of a wall": "woman, dress, red, wall",
    "there is a man that is standing in the snow": "man, snow",
    "a close up of a cat with green eyes": "cat, eye, green",
    "close-up of a bee on a sunflower": "bee, sunflower",
    "a black and white photo of a man playing a guitar": "man, guitar",
    "a couple of dogs that are laying down on the grass": "dog, grass",
    "a large group of people standing around a table": "people, table",
    "a fire truck parked on the side of the road": "fire truck, road",
    "a yellow and blue train traveling down train tracks": "train, yellow, blue, train track",
    "a man riding a wave on top of a surfboard": "man, wave, surfboard",
    "a bowl of fruit and a cup of coffee on a wooden table": "bowl, fruit, cup, coffee, table, wooden",
    "a city street with tall buildings and traffic lights": "city street, building, tall, traffic light",
    "a baseball player swinging a bat at a ball": "baseball player, bat, ball",
    "a young boy wearing sunglasses and jeans": "boy, young, sunglasses, jeans",
    "an orange cat sleeping on a chair": "cat, orange, chair",
    "a pink flower with green leaves in the background": "flower, pink, leaf, green",
    "a stop sign on a pole next to a building": "stop sign, pole, building",
    "a woman with long blonde hair wearing a white t - shirt": "woman, hair, long, blonde, t-shirt, white",
    "a man ' s hand holding a cell phone": "man, hand, cell phone",
    "anime girl with long pink hair and blue eyes": "anime girl, hair, long, pink, eye, blue",
    "a kitchen with a stove, refrigerator, and sink": "kitchen, stove, refrigerator, sink",
    "a herd of elephants walking across a dry grass field": "herd, elephant, grass field, dry",
    "a snow covered mountain with trees": "snow, mountain, tree",
    "a snow-covered high-rise building": "high-rise building, snow-covered",
    "a black-and-white cow standing in a field": "cow, black, white, field",
    "the cat is black and white": "cat, black, white",
    "a teddy bear sitting on a bed": "teddy bear, bed",
    "three people skiing down a snowy slope": "people, slope, snowy",
    "a living room with a couch and a television": "living room, couch, television",
    "a grilled chicken salad on a white plate": "chicken salad, grilled, plate, white",
    "a motorcycle parked outdoors near a brick wall": "motorcycle, brick wall",
    "an aerial view of a city at night with lots of lights": "city, night, light",
    "smiling woman in a polka dot dress": "woman, smiling, polka dot dress",
    "two glasses of red wine and a bottle on a table": "glass, wine, red, bottle, table",
    "a man wearing glasses and a suit and tie": "man, glasses, suit, tie",
    "a hot dog on a bun with mustard": "hot dog, bun, mustard",
    "a red double decker bus driving down the street": "double decker bus, red, street",
    "a polar bear swimming in the water": "polar bear, water",
    "a man standing next to a horse grazing": "man, horse",
    "the back side of a train car with graffiti on it": "train car, graffiti",
    "knives, forks and spoons": "knife, fork, spoon",
    "mice and geese and sheep near oxen": "mouse, goose, sheep, ox",
    "a photo of a CAT wearing a Hat": "cat, hat",
    "girl, long_hair, blue_eyes, simple background": "girl, hair, long, eye, blue",
    "a blurry photo of a dark room": "room, dark",
    "several different things on a white background": "",
    "a beautiful beach view": "beach",
    "a cat and a cat and two cats": "cat",
    "MASSIVE WHITE SHIPS": "massive, ship, white",
    "A Woman Walking Her Dogs In The Park": "woman, dog, park",
    "a cat that is black on a white background": "cat, black",
    "a woman in red near a car": "woman, red, car",
    "a man's best friend": "man, friend, best",
    "the biggest dog and a happier cat": "dog, big, cat, happy",
    "a cat.dog": "cat, dog",
    "a red car.a blue house near trees.": "car, red, house, blue, tree",
    "a cat at www.site.org and shutterstock.com": "cat",
    "mr. smith": "mr, smith",
    "a ball:1.2 at http://a.b/c": "",
    "7 x 24": "",
    "": "",
}


@pytest.fixture(scope="module")
def tagger() -> Iterator[Tagger]:
    yield open_tagger(None)


def found(tagger: Tagger, caption: str) -> str:
    return ", ".join(tagger.keywords([caption])[0])


def test_captions_give_the_keywords_a_person_would_name(tagger):
    words = tagger.keywords(list(EXPECTED))
    wrong = {
        caption: ", ".join(given)
        for (caption, wanted), given in zip(EXPECTED.items(), words, strict=True)
        if ", ".join(given) != wanted
    }
    assert not wrong


def test_every_drawn_scene_gives_its_shape_colour_and_texture_and_nothing_of_the_background(tagger):
    rng = random.Random(3)
    scenes = [
        (texture, colour, shape, ground)
        for texture in TEXTURES
        for colour in COLOURS
        for shape in SILHOUETTES
        for ground in COLOURS
        if ground != colour
    ]
    picked = rng.sample(scenes, 400)
    captions = [
        f"a {texture} {colour} {shape} on a {ground} background".replace("plain ", "").replace(
            "a orange", "an orange"
        )
        for texture, colour, shape, ground in picked
    ]
    for caption, scene, words in zip(captions, picked, tagger.keywords(captions), strict=True):
        assert set(words) == {*scene[:3]} - {"plain"}, caption
        assert words[0] == scene[2]


def test_the_result_is_free_of_what_else_is_asked_and_of_its_order(tagger):
    captions = list(EXPECTED)
    together = dict(zip(captions, tagger.keywords(captions), strict=True))
    rng = random.Random(5)
    for num in (1, 7, len(captions)):
        some = rng.sample(captions, num) * 3
        assert tagger.keywords(some) == [together[caption] for caption in some]
    for caption in captions[:15]:
        assert tagger.keywords([caption]) == [together[caption]]


def test_made_up_words_leave_the_rest_as_it_would_be_without_them(tagger):
    for made_up, plain in (
        ("arafed woman in a red dress standing near a lake", "woman in a red dress standing near a lake"),
        ("araffe dog laying on a bed", "dog laying on a bed"),
        ("there are two araffes, standing in the snow", "there are two standing in the snow"),
    ):
        assert found(tagger, made_up) == found(tagger, plain) != ""
        assert tagger._readable(made_up) == plain  # the pipeline never sees them


def test_a_list_of_ones_own_replaces_the_default():
    own = open_tagger(None, Filler(words=frozenset({"horse"}), phrases=frozenset({("fire", "hydrant")})))
    assert found(own, "a photo of two brown horses near a red fire hydrant") == "photo"
    assert found(own, "a wild horse in a big photo") == "photo, big"


def test_a_star_spares_the_sentence_where_the_dictionary_has_the_word():
    own = open_tagger(None, Filler(prefixes=("pho",)))
    assert found(own, "a blurry photo of a dog near phones") == "dog"


def test_parts_of_compounds_are_in_the_singular_only_where_they_end_it(tagger):
    assert found(tagger, "a red sports car near two wine glasses") == "sports car, red, wine glass"


def test_advance_is_told_of_every_caption(tagger):
    told: list[float] = []
    tagger.keywords(["a cat", "a dog", "a cat", "a bird"], advance=told.append)
    assert told == sorted(told) and told[-1] == 4


def test_a_tagger_says_what_it_is(tagger):
    assert tagger.name.startswith("en_core_web_sm") and tagger.version[0].isdigit()


def test_a_language_without_parser_and_dictionary_still_gives_nouns_and_adjectives(tmp_path: Path):
    import spacy

    nlp = spacy.blank("de")
    ruler = nlp.add_pipe("attribute_ruler")
    ruler.add([[{}]], {"POS": "DET", "LEMMA": "-"})
    for word, part, lemma in (("roter", "ADJ", "rot"), ("hund", "NOUN", "Hund"), ("hunde", "NOUN", "Hund")):
        ruler.add([[{"LOWER": word}]], {"POS": part, "LEMMA": lemma})
    nlp.to_disk(tmp_path / "german")
    german = open_tagger(str(tmp_path / "german"), read_filler(None))
    assert german.keywords(["Ein roter Hund", "die Hunde"]) == [("hund", "rot"), ("hund",)]


def test_a_caption_as_long_as_a_book_is_read_at_its_start_only(tagger: Tagger) -> None:
    started = time.process_time()
    assert tagger.keywords(["a red fish " + "and a house " * 50_000]) == [("fish", "red", "house")]
    assert time.process_time() - started < 5
