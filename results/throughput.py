"""Images a second that are decoded and augmented: eekd's loader beside torchvision's ImageFolder and DataLoader.

python results/throughput.py                      # results/throughput.json
python results/throughput.py --images 64 --rounds 1 --workers 0 --json /tmp/throughput.json    # a try

The images are JPEGs of photographs, cut from those that scikit-learn brings, 500 × 375 as most of ImageNet's are. Both
sides crop, resize to 224 × 224, mirror, normalise and, in the second set of transforms, apply TrivialAugment and erase;
with the same workers, in turns, whole epochs after one to warm up.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from eekd.data import Encoded, Loader, Split
from eekd.info import environment

SIZE, MEAN, STD = 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TRANSFORMS = {"crop and flip": {}, "with TrivialAugment and erasing": {"auto_augment": "trivial", "erasing": 0.25}}


def photographs(folder: Path, count: int) -> None:
    """Writes `count` JPEGs of two classes, and one of each to validate and test on."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    draw = random.Random(0)
    for label, photograph in enumerate(load_sample_images().images):
        image = Image.fromarray(photograph)
        for number in range(-2, count // 2):
            scale = draw.uniform(0.6, 1.0)
            width, height = int(image.width * scale), int(image.height * scale)
            left, top = draw.randint(0, image.width - width), draw.randint(0, image.height - height)
            part = image.resize((500, 375), box=(left, top, left + width, top + height))
            place = folder / ("train" if number >= 0 else ("val", "test")[number]) / str(label)
            place.mkdir(parents=True, exist_ok=True)
            part.save(place / f"{number + 2:05}.jpg", quality=90)


def ours(folder: Path, batch: int, workers: int, more: dict) -> Loader:
    files = sorted((folder / "train").glob("*/*.jpg"))
    labels = torch.tensor([int(path.parent.name) for path in files])
    # As `load` leaves images that do not fit into memory.
    split = Split(Encoded([str(path) for path in files], channels=3, image_size=SIZE), labels, MEAN, STD)
    return Loader(split, batch_size=batch, augment="imagenet", workers=workers, drop_last=True, **more)


def torchvisions(folder: Path, batch: int, workers: int, more: dict):
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    steps = [v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip()]
    steps += [v2.TrivialAugmentWide()] * bool(more)
    steps += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    steps += [v2.RandomErasing(more["erasing"])] if more else []
    data, options = ImageFolder(str(folder / "train"), v2.Compose(steps)), {}
    if workers:
        options = {"persistent_workers": True}
    return torch.utils.data.DataLoader(
        data, batch_size=batch, shuffle=True, num_workers=workers, drop_last=True, **options
    )


def seconds_of(loader, epoch: int) -> float:
    if isinstance(loader, Loader):
        loader.set_epoch(epoch)
    start, shape = time.perf_counter(), None
    for batch in loader:
        shape = tuple(batch[0].shape[1:])
    assert shape == (3, SIZE, SIZE)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("throughput.json"))
    args = parser.parse_args()
    rows, sides = [], {"eekd": ours, "torchvision": torchvisions}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        photographs(folder, args.images)
        images = args.images // args.batch * args.batch
        for transforms, more in TRANSFORMS.items():
            for workers in args.workers:
                loaders = {name: make(folder, args.batch, workers, more) for name, make in sides.items()}
                times = {name: [] for name in loaders}
                for epoch in range(args.rounds + 1):
                    for name, loader in loaders.items():
                        times[name].append(seconds_of(loader, epoch))
                rates = {name: sorted(images / t for t in found[1:]) for name, found in times.items()}
                row = {"transforms": transforms, "workers": workers, "images per second": rates}
                rows.append(row | {"ratio": median(rates["eekd"]) / median(rates["torchvision"])})
                shown = ", ".join(f"{name} {median(found):.0f}" for name, found in rates.items())
                print(f"{transforms}, {workers} workers: {shown} images a second", flush=True)
                del loaders
    args.json.write_text(json.dumps({
        "command": ["python", *sys.argv], "environment": environment(), "size": SIZE, "batch": args.batch,
        "images": images, "loaders": rows,
    }, indent=2) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()
