"""What differences over seeds decide: a claim, or which method to take."""

from math import ceil, sqrt
from statistics import mean, stdev

from eekd import statistics
from eekd.compare.methods import representatives
from eekd.compare.plots import points
from eekd.statistics import ROUNDING, interval, paired, sign

HOLDS, CONTRADICTED, UNDECIDED, MISSING = "holds", "contradicted", "undecided", "not measured"
REFERENCES = "ce", "last"  # which a method must be better than
MOST_SEEDS = 10_000

Scores = dict[str, dict[int, float]]  # accuracies by method and seed


def verdict(difference: dict | None, above: bool) -> str:
    """Whether a difference is above 0 (or, not above, below it), as claimed: decided by its interval alone."""
    if difference is None:
        return MISSING
    side = sign(difference)
    return UNDECIDED if not side else HOLDS if (side > 0) == above else CONTRADICTED


def together(verdicts: list[str]) -> str:
    """The verdict on a claim of several parts: contradicted by one, upheld only by all."""
    for result in (CONTRADICTED, MISSING, UNDECIDED):
        if result in verdicts:
            return result
    return HOLDS


def seeds_needed(differences: list[float]) -> int | None:
    """At how many seeds Student's 95 % interval would leave out 0, if mean and spread of the differences stay.

    None where that is unknown, or more than MOST_SEEDS.
    """
    if len(differences) < 2 or not (middle := abs(mean(differences))) or (spread := stdev(differences)) < ROUNDING:
        return None
    from scipy.special import stdtrit

    n = max(2, ceil((1.96 * spread / middle) ** 2))  # a little less than it takes
    while n <= MOST_SEEDS and stdtrit(n - 1, 0.975) * spread / sqrt(n) >= middle:
        n += 1
    return n if n <= MOST_SEEDS else None


def reference(val: Scores, base: str) -> str | None:
    """The name that stands for `base`: its own, or that of a variant; None without any."""
    return representatives({name: (len(scores), mean(scores.values())) for name, scores in val.items()}).get(base)


def advice(val: Scores) -> dict:
    """Which method to take by validation accuracies, over seeds that all methods in it have.

    The seeds and methods are those that make most cells; `text` names the methods that are left out.
    `take` is, of the methods whose 95 % intervals over `ce` and over `last` lie above 0, of these two over the other,
    the one with the highest mean, or None; where these are not compared, `reference` says what stands for them. Where
    another has a higher mean, `best`, or none is taken, `against` is the method that it would have to be better than,
    and `seeds` says about how many would decide. `text` says it in words. The intervals are not corrected for how many
    methods there are.
    """
    seeds = _most(val)
    left_out = [name for name, scores in val.items() if not scores.keys() >= {*seeds}]
    val = {name: {seed: val[name][seed] for seed in seeds} for name in val if name not in left_out}
    result = {"take": None, "best": None, "against": None, "seeds": None, "n": len(seeds), "text": ""}
    if len(val) < 2 or not seeds:
        return result
    ranked = sorted(val, key=lambda name: -mean(val[name].values()))
    references = [reference(val, base) for base in REFERENCES]

    def rivals(name: str) -> list[str]:
        others = [other for other in ranked if other != name]
        return [other for other in others if other in references] or others

    def leads(name: str, other: str) -> bool:
        return verdict(paired(val[name], val[other]), True) == HOLDS

    take = next((name for name in ranked if all(leads(name, other) for other in rivals(name))), None)
    best, sentences, number = ranked[0], [], statistics.seeds(len(seeds))
    if take:
        over = " and ".join(f"{_points(paired(val[take], val[other]))} over {other}" for other in rivals(take))
        accuracy = mean(val[take].values())
        sentences.append(f"For your data take {take}: {accuracy:.2%} of the validation images, {over} ({number}).")
    if take != best:
        against = take or next(other for other in rivals(best) if not leads(best, other))
        differences = [val[best][seed] - val[against][seed] for seed in seeds]
        needed = seeds_needed(differences)
        enough = f"about {needed} seeds would decide" if needed else "seeds alone will hardly decide"
        if len(seeds) < 2 or stdev(differences) < ROUNDING:
            enough = "more seeds would tell it from chance"
        sentences.append(
            f"Undecided between {best} and {against}: {_points(interval(differences))} on validation images "
            f"({number}); {enough}."
        )
        result |= {"against": against, "seeds": needed}
    if left_out:
        sentences.append(f"Left out, since they lack seeds that the others have: {', '.join(left_out)}.")
    return result | {"take": take, "best": best, "text": " ".join(sentences)}


def _most(val: Scores) -> list[int]:
    """The seeds of most cells, if every method that lacks one of them is left out."""

    def cells(seeds: set[int]) -> tuple[int, int]:
        return len(seeds) * sum(scores.keys() >= seeds for scores in val.values()), len(seeds)

    return sorted(max(({*a} & {*b} for a in val.values() for b in val.values()), key=cells, default=set()))


def _points(difference: dict | None) -> str:
    return f"{points(difference)} points"
