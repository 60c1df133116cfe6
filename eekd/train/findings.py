"""What a run's table shows that its user did not want, and what to try."""

import math

from eekd.train.checked import title_of
from eekd.train.seeds import verdict


def findings(rows: list[dict], classes: int, images: int) -> list[str]:
    """Sentences on the rows of summary.json: networks at chance, a weak ensemble, students that a teacher harmed.

    Judged by accuracy on the validation images, of which there are `images`, since what is tried next may not be chosen
    by test images. One run cannot tell a small difference from chance: a sentence says where it may be that.
    """
    rows = [row for row in rows if row["val_accuracy"] is not None]
    networks = [row for row in rows if row["kind"] in ("snapshot", "student")]
    guessing = [row for row in networks if guesses(row["val_accuracy"], classes, images)]
    sentences = [_at_chance(row, [r for r in rows if r["kind"] == "snapshot"]) for row in guessing]
    last = next((row for row in rows if row["kind"] == "teacher"), None)
    ensemble = next((row for row in rows if row["kind"] == "ensemble"), None)
    if last and ensemble and "chance" not in (lost := _lost(ensemble, last, images)) and lost:
        sentences.append(
            f"The ensemble of snapshots is {lost} below the last of them: early snapshots are weak. Try --students "
            "last or attention, fewer --teacher.snapshots, or a longer teacher."
        )
    alone = next((row for row in rows if row["kind"] == "student" and row["name"] == "ce"), None)
    below = {row["name"]: _lost(row, alone, images) for row in rows if row["kind"] == "student" and alone}
    below = {name: lost for name, lost in below.items() if lost}
    if below:
        names = ", ".join(f"{name} by {lost}" for name, lost in below.items())
        sentences.append(
            f"Students below the one without a teacher (ce): {names}. Try --seeds 5 to see whether that is chance, a "
            "larger --student.alpha, a lower --student.temperature, or more --student.epochs."
        )
    return sentences


def guesses(accuracy: float, classes: int, images: int) -> bool:
    """Whether an accuracy on so many images is within two standard errors of what guessing reaches, or below."""
    chance = 1 / classes
    return accuracy <= chance + 2 * math.sqrt(chance * (1 - chance) / images)


def _at_chance(row: dict, snapshots: list[dict]) -> str:
    title, accuracy = title_of(row["name"]), f"{row['val_accuracy']:.1%} of the validation images are right"
    sentence = f"{title[0].upper() + title[1:]} is no better than chance: {accuracy}. "
    if row["kind"] == "student":
        return sentence + "Try a lower --student.lr, or more --student.epochs."
    if row["name"] == snapshots[-1]["name"]:
        return sentence + (
            "It is the finished teacher: look at --teacher.mean and --teacher.std, at the order of the classes "
            "(--classes), and at --teacher.lr."
        )
    return sentence + "Try fewer --teacher.snapshots, a longer teacher, or --students last or attention."


def _lost(row: dict, other: dict, images: int) -> str:
    """By how many points `row` is below `other`, in words; "" where it is not."""
    lost, share = other["val_accuracy"] - row["val_accuracy"], other["val_accuracy"]
    if lost <= 0:
        return ""
    may_be_chance = lost < 2 * math.sqrt(2 * share * (1 - share) / images)
    if interval := row.get("over_ce"):  # over several seeds
        may_be_chance = verdict(interval) == "undecided"
    return f"{100 * lost:.2f} points" + " (which may be chance)" * may_be_chance
