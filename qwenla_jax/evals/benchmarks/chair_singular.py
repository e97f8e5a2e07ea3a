"""The singular of a noun as CHAIR's official scorer gets it, mistakes included.

That scorer asks the library `pattern` (clips), whose rules work on the end of a word and know no dictionary: "bus"
turns into "bu", "glass" into "glas", "ties" into "ty", "canoes" into "cano" and "collies" stays. Figures are comparable
only where these words come out the same, so the mistakes are kept. The rules stand here as endings.
"""

from __future__ import annotations

import functools

# These stay, though some end like a plural; so does a word that is the end of one of them ("is" of "debris").
_UNCHANGED = (
    "bison bream breeches britches carp chassis christmas clippers cod contretemps corps debris diabetes djinn "
    "eland elk flounder gallows georgia graffiti headquarters herpes high-jinks homework innings jackanapes "
    "mackerel measles mews mumps news pincers pliers proceedings rabies salmon scissors series shears species "
    "swine swiss trout tuna whiting wildebeest advice bread butter cheese electricity equipment fruit "
    "furniture garbage gravel happiness information ketchup knowledge love luggage mathematics mayonnaise meat "
    "mustard progress research rice sand software understanding water"
).split()
# Their plurals are recognised and then left as they are.
_KEEPS_PLURAL = tuple(
    f"{word}s"
    for word in (
        "alergie auntie beanie birdie bogie bombie collie cookie cutie doggie eyrie freebie goonie groupie hankie "
        "hippie hoagie hottie indie junkie laddie laramie lingerie meanie newbie nightie oldie pixie quickie reverie "
        "rookie softie sortie stoolie sweetie techie toughie valkyrie veggie weenie yuppie zombie"
    ).split()
)
# Any word with such an end: "policemen" as "men".
_IRREGULAR = tuple(
    pair.split(":")
    for pair in (
        "atlantes:atlas atlases:atlas axes:axe beeves:beef brethren:brother children:child datasets:dataset "
        "corpuses:dataset feet:foot ganglia:ganglion geese:goose genera:genus genii:genie helves:helve kine:cow "
        "leaves:leaf loaves:loaf men:man mongooses:mongoose monies:money moves:move mythoi:mythos octopodes:octopus "
        "opera:opus opuses:opus our:my oxen:ox people:person sexes:sex soliloquies:soliloquy teeth:tooth "
        "testes:testis penises:penis penes:penis trilbys:trilby turves:turf zoa:zoon numena:numen occipita:occiput "
        "ephemerides:ephemeris"
    ).split()
)
# (ends, letters to cut, what to add); the first that fits counts.
_ENDS: tuple[tuple[tuple[str, ...], int, str], ...] = (
    (("itis",), 0, ""),
    (("eaux",), 1, ""),
    (("quizzes",), 3, ""),
    (("matrices",), 4, "ix"),
    (("apices", "vertices", "indices"), 4, "ex"),
    (("aliases", "statuses"), 2, ""),
    (("oi", "ci", "ti", "pi", "vi", "ii", "ri"), 1, "us"),
    (("crises",), 2, "is"),
    (("shoes",), 1, ""),
    (("oes", "buses"), 2, ""),
    (("mice", "lice"), 3, "ouse"),
    (("xes", "ches", "sses", "shes"), 2, ""),
    (("movies", "ombies"), 1, ""),
    (("quies",), 3, "y"),
    (("aies", "eies", "iies", "oies", "uies", "yies"), 1, ""),
    (("ies",), 3, "y"),
    (("alves", "elves", "olves"), 3, "f"),
    (("deaves",), 1, ""),
    (("eaves", "arves"), 3, "f"),
    (("erves",), 1, ""),
    (("nives", "lives", "wives"), 3, "fe"),
    (("lves", "rves"), 3, "f"),
    (("aves", "eves", "oves", "sives", "tives", "hives", "fves"), 1, ""),
    (("ves",), 3, "fe"),
    (("bases", "diagnoses", "parentheses", "prognoses", "synopses", "theses", "opses", "yses"), 2, "is"),
    (("hoses", "doses", "roses", "ooses", "noses", "boses", "closes", "poses"), 1, ""),
    (("oses",), 2, "is"),
    (("ta", "ia"), 1, "um"),
    (("news",), 0, ""),
    (("s",), 1, ""),
)


@functools.lru_cache(maxsize=1 << 16)
def singular(word: str) -> str:
    """The singular of a lower-case word, or the word itself where no rule fits; in time linear in its length."""
    if word.endswith("'"):
        return singular(word.rstrip("'")) + "'s" if word.strip("'") else word
    if any(same.endswith(word) for same in _UNCHANGED) or word.endswith(_KEEPS_PLURAL):
        return word
    for plural, single in _IRREGULAR:
        if word.endswith(plural):
            return word.removesuffix(plural) + single
    if word.endswith("ae") and len(word) > 2:
        return word[:-1]
    for ends, cut, add in _ENDS:
        if word.endswith(ends):
            return word[: len(word) - cut] + add
    return word
