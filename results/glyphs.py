"""Draws the characters of many freely licensed fonts, small and grey: the images that eekd.data calls glyphs.

python results/glyphs.py --size 16 --out eekd/data/glyphs.npz
python results/glyphs.py --size 28 --classes 94 --faces 8 --out data/glyphs94  # a folder of PNG, for --data

The fonts are Debian's, fetched by `apt-get download`, which needs no root; PIL draws them. Every font package goes
to one part only (training, validation or test), so that no design is in two, and gives --faces faces at most. A face
takes part where it has all characters, and none that looks like another. A folder is as --data reads it, with a picture
of examples beside it. An archive holds, of each part, images (N, size, size / 2) uint8, two pixels of 16 levels in a
byte, and labels (N). The JSON beside either names the characters, the checksum of all pixels, and every package with
its version, licence, part and faces.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageDraw, ImageFont

from eekd.info import environment

# Licence of the font files, an SPDX name as read from each package's copyright file, then what has it; & is AND.
# Packages of one line have a design in common; dkg-handwriting is named by the .sfd that its faces are made from.
PACKAGES = """
BSD-3-Clause 3270
OFL-1.1      allerta
OFL-1.1      anonymous-pro
OFL-1.1      apropal
OFL-1.1      arapey
OFL-1.1      averia-gwf averia-sans-gwf averia-serif-gwf
OFL-1.1&EPL-2.0&BSD-3-Clause b612
OFL-1.1      babelstone-modern
OFL-1.1      bajaderka
OFL-1.1      blankenburg
OFL-1.0      breip
OFL-1.1      bwht
OFL-1.1      cabin cabinsketch
OFL-1.1      cantarell
OFL-1.1      cardo
Apache-2.0   clear-sans
OFL-1.1      cmu
OFL-1.1      comfortaa
OFL-1.1      comic-neue
OFL-1.1      compagnon
OFL-1.1      courier-prime
OFL-1.1      crosextra-carlito lato
OFL-1.1      crosextra-caladea
OFL-1.1      dancingscript
Bitstream-Vera dejavu-core dejavu-extra MIT&Bitstream-Vera hack
OFL-1.1      dkg-handwriting
OFL-1.1      dosis
OFL-1.1      ebgaramond
OFL-1.1      elstob junicode
OFL-1.1      essays1743
OFL-1.1      eurofurence
OFL-1.1      fantasque-sans
MIT          fanwood
OFL-1.1      firacode
OFL-1.1      georgewilliams
Unlicense    glasstty
OFL-1.1      gnutypewriter
BSD-3-Clause go
public-domain goudybookletter
OFL-1.1      havana
OFL-1.1      hermit
OFL-1.1      humor-sans
OFL-1.0      inconsolata
OFL-1.1&Apache-2.0 inter
Apache-2.0   jetbrains-mono
OFL-1.1      joscelyn
OFL-1.1      junction
OFL-1.1      kalapi
OFL-1.1      karla karmilla
OFL-1.1      kaushanscript
OFL-1.1      klaudia-berenika
OFL-1.1      kristi
OFL-1.1      league-mono
OFL-1.1      league-spartan
OFL-1.1      leckerli-one
OFL-1.1      le-murmure
MIT          lindenhill
OFL-1.1      linuxlibertine
OFL-1.1      lobster lobstertwo
OFL-1.1      manrope
OFL-1.1      millimetre
OFL-1.1      monofur
MIT          monoid
OFL-1.1      mononoki
OFL-1.1      mplus
OFL-1.1      national-park
Apache-2.0   open-sans
OFL-1.1      opendin
OFL-1.1      oxygen
OFL-1.1      play
public-domain prociono
OFL-1.1      quattrocento
OFL-1.1      quicksand
OFL-1.1      radisnoir
Apache-2.0   roboto-unhinted roboto-slab
OFL-1.1      routed-gothic
OFL-1.1      sil-andika
OFL-1.1      sil-charis
OFL-1.1      sil-gentium sil-gentium-basic
OFL-1.1      solide-mirage
OFL-1.1      sora
OFL-1.1      stix
public-domain tuffy
OFL-1.1      vollkorn
OFL-1.1      yanone-kaffeesatz
OFL-1.1      yrsa-rasa
OFL-1.1      yusei-magic
MIT          agave
"""
CHARACTERS = {
    62: "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz",
    94: "".join(map(chr, range(33, 127))),
}
SCALE = 8  # drawn so much larger, then reduced by the mean
PARTS = {"train": 0.4, "val": 0.2, "test": 0.4}  # of the designs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="the .npz to write, or a folder: PART/CLASS/FACE.png")
    parser.add_argument("--size", type=int, default=16, help="pixels of a side")
    parser.add_argument("--classes", type=int, choices=CHARACTERS, default=62, help="letters and digits, or all ASCII")
    parser.add_argument("--faces", type=int, default=4, help="faces of a package at most")
    parser.add_argument("--packages", help="a folder to keep the packages in, or that has them")
    args = parser.parse_args()
    characters = CHARACTERS[args.classes]
    designs = [licences(line) for line in PACKAGES.strip().splitlines()]
    names = [f"fonts-{name}" for several in designs for name in several]
    with tempfile.TemporaryDirectory() as scratch:
        kept = Path(args.packages or scratch)
        kept.mkdir(exist_ok=True, parents=True)
        missing = [name for name in names if not any(kept.glob(f"{name}_*.deb"))]
        if missing:
            subprocess.run(["apt-get", "download", *missing], cwd=kept, check=True)
        drawn, packages = {part: [] for part in PARTS}, []
        for part, several in zip(parts(len(designs)), designs, strict=True):
            for name, licence in several.items():
                deb = next(kept.glob(f"fonts-{name}_*.deb"))
                folder = Path(scratch, "unpacked", name)
                folder.mkdir(parents=True)
                subprocess.run(["dpkg-deb", "-x", deb, folder], check=True)
                found = package_faces(folder, characters, args.size, args.faces)
                drawn[part] += [images for _, images in found]
                version = deb.stem.split("_")[1].replace("%3a", ":")
                about = {"version": version, "licence": licence, "part": part, "faces": [face for face, _ in found]}
                packages.append({"name": f"fonts-{name}"} | about)
    for part, several in drawn.items():
        print(f"{part}: {len(several)} faces, {len(several) * len(characters)} images")
    digest = write_archive(args.out, drawn) if args.out.endswith(".npz") else write_folder(args.out, drawn, characters)
    about = {"command": ["python", *sys.argv], "environment": environment() | {"pillow": PIL.__version__}}
    about |= {"size": args.size, "characters": characters, "sha256": digest, "packages": packages}
    Path(f"{args.out.removesuffix('.npz')}.json").write_text(json.dumps(about, indent=1) + "\n")


def checksum(drawn: dict[str, list[np.ndarray]]) -> str:
    """SHA-256 of all pixels, part by part and face by face: what two drawings must have in common to be the same."""
    return hashlib.sha256(b"".join(images.tobytes() for several in drawn.values() for images in several)).hexdigest()


def write_archive(path: str, drawn: dict[str, list[np.ndarray]]) -> str:
    arrays = {}
    for part, several in drawn.items():
        images, count = np.concatenate(several), len(several[0])
        arrays[f"{part}_images"] = images[..., ::2] << 4 | images[..., 1::2]
        arrays[f"{part}_labels"] = np.tile(np.arange(count, dtype=np.uint8), len(several))
    np.savez_compressed(path, **arrays)
    return checksum(drawn)


def write_folder(path: str, drawn: dict[str, list[np.ndarray]], characters: str) -> str:
    """PART/CLASS/FACE.png. A class is U+ and the character's number, for "/" and "." are no names of folders."""
    for part, several in drawn.items():
        for place, character in enumerate(characters):
            folder = Path(path, part, f"U+{ord(character):04X}")
            folder.mkdir(parents=True, exist_ok=True)
            for face, images in enumerate(several):
                Image.fromarray(images[place] * 17).save(folder / f"{face:03}.png")
    examples(drawn).save(f"{path}.png", optimize=True)
    return checksum(drawn)


def examples(drawn: dict[str, list[np.ndarray]], faces: int = 12, most: int = 40) -> Image.Image:
    """Some faces of all parts, a row each, and some of their characters."""
    every = [images for several in drawn.values() for images in several]
    rows = [images[:: max(1, len(images) // most)][:most] for images in every[:: max(1, len(every) // faces)][:faces]]
    return Image.fromarray(255 - np.concatenate([np.concatenate([*row], 1) for row in rows]) * 17)


def licences(line: str) -> dict[str, str]:
    """The packages of a line, each with the licence before it: a word with a capital, or public-domain."""
    found, licence = {}, ""
    for word in line.split():
        if word[0].isupper() or word == "public-domain":
            licence = word.replace("&", " AND ")
        else:
            found[word] = licence
    return found


def parts(designs: int) -> list[str]:
    """The part of each of so many designs, drawn once and for all."""
    names = [name for name, share in PARTS.items() for _ in range(round(share * designs))]
    names = (names + ["test"] * designs)[:designs]
    random.Random(0).shuffle(names)
    return names


def package_faces(folder: Path, characters: str, size: int, most: int) -> list[tuple[str, np.ndarray]]:
    """Name and images of at most so many faces of a package, evenly chosen from those that will do."""
    faces = {}
    files = [path for path in folder.rglob("*") if path.suffix.lower() in (".ttf", ".otf") and path.exists()]
    for path in sorted(files):
        font = ImageFont.truetype(str(path), 64)
        name = " ".join(font.getname())
        if name not in faces and complete(font, characters):
            faces[name] = path
    step = max(1, len(faces) / most)
    chosen = [[*faces][int(i * step)] for i in range(min(most, len(faces)))]
    return [(name, face_images(faces[name], characters, size)) for name in chosen]


def complete(font: ImageFont.FreeTypeFont, characters: str) -> bool:
    """Whether a face has every character, each with a picture of its own: small capitals are no lower case."""
    pictures = [(mask.size, bytes(mask)) for mask in map(font.getmask, characters)]
    absent = font.getmask("\uffff")
    return (
        len(set(pictures)) == len(pictures)
        and (absent.size, bytes(absent)) not in pictures
        and all(width and height for (width, height), _ in pictures)
    )


def face_images(path: Path, characters: str, size: int) -> np.ndarray:
    """(characters, size, size) of 16 levels: one size and baseline for the face, each character in the middle."""
    side = size * SCALE
    boxes = [ImageFont.truetype(str(path), side).getbbox(c, anchor="ls") for c in characters]
    top, bottom = min(box[1] for box in boxes), max(box[3] for box in boxes)
    width = max(box[2] - box[0] for box in boxes)
    font = ImageFont.truetype(str(path), int(side * side / max(bottom - top, width) * 0.98))
    boxes = [font.getbbox(c, anchor="ls") for c in characters]
    top, bottom = min(box[1] for box in boxes), max(box[3] for box in boxes)
    baseline = (side - (bottom - top)) // 2 - top
    images = []
    for c, (left, _, right, _) in zip(characters, boxes, strict=True):
        image = Image.new("L", (side, side))
        ImageDraw.Draw(image).text(((side - left - right) // 2, baseline), c, 255, font, anchor="ls")
        images.append(np.asarray(image, np.float64).reshape(size, SCALE, size, SCALE).mean((1, 3)))
    return np.round(np.stack(images) / 17).astype(np.uint8)


if __name__ == "__main__":
    main()
