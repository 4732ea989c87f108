"""Attributes of made-up guesthouses, with sentences about them.

    python examples/guesthouses.py    # writes data/guesthouses.csv again

The sentences are this project's own, under its licence. A grammar makes them
from a seed: it has nine plans for a text, and several wordings for each
attribute. The columns are those of the E2E dataset: `mr` has attributes, such
as "name[Heron House], area[lakeside]", and `ref` has a text. Each combination
of attributes has two texts.
"""

import csv
import pathlib
import random

FILE = pathlib.Path(__file__).parent / "data/guesthouses.csv"
MEANINGS = 200
TEXTS = 2

NAMES = [
    "The Salt Lantern",
    "Heron House",
    "Three Chimneys",
    "The Quiet Anchor",
    "Linden Court",
    "The Blue Shutter",
    "The Old Customs House",
    "Mistle Barn",
    "The Copper Kettle",
    "Fern Hollow",
    "The Night Ferry",
    "Orchard Gate",
    "Bell and Feather",
    "The Tin Whistle",
    "Juniper Lodge",
    "The Paper Moon",
    "Stonecrop",
    "The Yellow Door",
    "Gull Cottage",
    "Harrow Farm",
    "The Seventh Step",
    "Willow Bank",
]
KINDS = [
    "hostel",
    "guest house",
    "campsite",
    "inn",
    "farm stay",
    "holiday flat",
]
#: Each area with the words that lead to it.
AREAS = {
    "old harbour": "at the old harbour",
    "market square": "on the market square",
    "upper valley": "in the upper valley",
    "north shore": "on the north shore",
    "university quarter": "in the university quarter",
    "edge of the moor": "on the edge of the moor",
}
LANDMARKS = [
    "the ferry pier",
    "the cable car",
    "the castle ruins",
    "the botanical garden",
    "the railway station",
    "the night market",
]
PRICES = ["£18", "£35", "£50", "£75", "£120"]
BREAKFASTS = [
    "home-made bread",
    "porridge and fruit",
    "eggs and toast",
    "pancakes",
    "no",
]
DOGS = ["yes", "no"]
FEATURES = [
    "a walled garden",
    "a sauna",
    "a roof terrace",
    "a library",
    "free bicycles",
]

#: The wordings of each attribute. Each is a clause of its own.
PRICE_CLAUSES = [
    "a night costs {price}",
    "it charges {price} a night",
    "you pay {price} a night",
]
BREAKFAST_CLAUSES = [
    "it serves {breakfast} in the morning",
    "guests get {breakfast} for breakfast",
    "the day starts with {breakfast}",
]
NO_BREAKFAST_CLAUSES = [
    "breakfast is not served",
    "there is no breakfast",
    "guests bring their own breakfast",
]
FEATURE_CLAUSES = [
    "it has {feature}",
    "there is {feature} for guests",
    "guests have the use of {feature}",
]
DOG_CLAUSES = [
    "dogs are welcome",
    "it takes dogs",
    "you may bring your dog",
]
NO_DOG_CLAUSES = [
    "dogs are not allowed",
    "it does not take dogs",
    "dogs have to stay at home",
]


class _Draws:
    """Draws that are the same in every version of Python."""

    def __init__(self, seed):
        # Python promises it of `random` alone.
        self._random = random.Random(seed).random

    def below(self, count):
        return int(self._random() * count)

    def one(self, values):
        return values[self.below(len(values))]

    def order(self, values):
        rest, result = list(values), []
        while rest:
            result.append(rest.pop(self.below(len(rest))))
        return result


def generate(seed=0, meanings=MEANINGS, texts=TEXTS):
    """Makes attributes and texts about them.

    Args:
        seed: An integer. Another seed gives other rows.
        meanings: The number of different combinations of attributes.
        texts: The number of different texts about each.

    Returns:
        A list of `meanings * texts` pairs of strings.
    """
    draws = _Draws(seed)
    rows = {}
    while len(rows) < meanings:
        attributes = _attributes(draws)
        meaning = ", ".join(f"{k}[{v}]" for k, v in attributes.items())
        if meaning not in rows:
            rows[meaning] = _texts(draws, attributes, texts)
    return [
        (meaning, text) for meaning, found in rows.items() for text in found
    ]


def _attributes(draws):
    """Name, kind and two to four others, always in one order."""
    choices = {
        "area": list(AREAS),
        "near": LANDMARKS,
        "price": PRICES,
        "breakfast": BREAKFASTS,
        "has": FEATURES,
        "dogs": DOGS,
    }
    kept = set(draws.order(choices)[: 2 + draws.below(3)])
    attributes = {"name": draws.one(NAMES), "kind": draws.one(KINDS)}
    for name, values in choices.items():
        if name in kept:
            attributes[name] = draws.one(values)
    return attributes


def _texts(draws, attributes, count):
    found = []
    while len(found) < count:
        text = _text(draws, attributes)
        if text not in found:
            found.append(text)
    return found


def _text(draws, attributes):
    name, kind = attributes["name"], attributes["kind"]
    place = _place(attributes)
    clauses = _clauses(draws, attributes)
    a_kind = f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
    plans = [
        lambda: [f"{name} is {a_kind}{place}"],
        lambda: [f"{name} is {a_kind}{place}", *clauses[:1]],
        lambda: [f"the {kind} {name} lies{place}"] if place else [],
        lambda: [f"the {kind}{place} is called {name}"],
        lambda: [f"there is {a_kind} called {name}{place}"],
        lambda: [f"you find the {kind} {name}{place}"] if place else [],
        lambda: [f"{name},{place}, is {a_kind}"] if place else [],
        lambda: [f"a place to stay{place} is the {kind} {name}"],
        lambda: [f"if you look for {a_kind}{place}, try {name}"],
    ]
    first = []
    while not first:
        first = draws.one(plans)()
    rest = clauses[len(first) - 1 :]
    sentences = [", and ".join(first)]
    while rest:
        size = 1 + draws.below(2)
        sentences.append(" and ".join(rest[:size]))
        rest = rest[size:]
    return " ".join(f"{one[0].upper()}{one[1:]}." for one in sentences)


def _place(attributes):
    words = ""
    if "area" in attributes:
        words += f" {AREAS[attributes['area']]}"
    if "near" in attributes:
        words += f" near {attributes['near']}"
    return words


def _clauses(draws, attributes):
    """A clause for each attribute that is no place, in any order."""
    wordings = []
    if "price" in attributes:
        wordings.append(PRICE_CLAUSES)
    if "breakfast" in attributes:
        none = attributes["breakfast"] == "no"
        wordings.append(NO_BREAKFAST_CLAUSES if none else BREAKFAST_CLAUSES)
    if "has" in attributes:
        wordings.append(FEATURE_CLAUSES)
    if "dogs" in attributes:
        none = attributes["dogs"] == "no"
        wordings.append(NO_DOG_CLAUSES if none else DOG_CLAUSES)
    return [
        draws.one(one).format(
            price=attributes.get("price"),
            breakfast=attributes.get("breakfast"),
            feature=attributes.get("has"),
        )
        for one in draws.order(wordings)
    ]


def main():
    with open(FILE, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([("mr", "ref"), *generate()])


if __name__ == "__main__":
    main()
