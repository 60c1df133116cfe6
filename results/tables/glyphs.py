"""The table of docs/results/glyphs.md."""

from tables import head, table_row


def glyphs(record: dict) -> str:
    """Packages, faces and images of each part of a data set that results/glyphs.py drew."""
    lines, classes = head("part", "packages", "faces", "images"), len(record["characters"])
    for part in dict.fromkeys(package["part"] for package in record["packages"]):
        faces = [len(package["faces"]) for package in record["packages"] if package["part"] == part]
        lines.append(table_row(part, f"{len(faces)}", f"{sum(faces)}", f"{sum(faces) * classes:,}"))
    return "\n".join([*lines, "", f"{classes} classes. SHA-256 of all pixels: `{record['sha256']}`."])


TABLES = {"packages": glyphs}
