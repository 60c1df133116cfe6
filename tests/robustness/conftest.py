"""A run that nothing disturbed, marks on images, and a folder of image files."""

import itertools

import pytest
from faults import EACH, NETS, config_of

from eekd.data import Loader
from eekd.train import prepare, train


@pytest.fixture(scope="session")
def nets(tmp_path_factory):
    path = tmp_path_factory.mktemp("nets") / "nets.py"
    path.write_text(NETS)
    return path


@pytest.fixture(scope="session")
def run(nets, tmp_path_factory):
    """A session and a run of it that nothing disturbed, which tests only read."""
    session = prepare(config_of(nets, teacher="blowing"))
    return session, train(session.config, tmp_path_factory.mktemp("run") / "whole", session=session)


@pytest.fixture
def mark(monkeypatch):
    """mark(session, value, *steps) puts the value into a pixel of one image of each step; returns their indices."""
    batch = Loader._batch
    yield_of = {}

    def mark(session, value, *steps):
        loader = session.loader("train", session.config.teacher, train=True)
        for step in steps:
            loader.set_epoch(step // EACH)
            yield_of[step // EACH, loader.indices()[step % EACH][3].item()] = value

        def marked(self, *args):
            made = batch(self, *args)
            for (epoch, sample), value in yield_of.items() if self.train else ():
                if self.epoch == epoch:
                    made.images[made.index == sample, :, 1, 1] = value
            return made

        monkeypatch.setattr(Loader, "_batch", marked)
        return [sample for _, sample in yield_of]

    return mark


@pytest.fixture
def pictures(tmp_path):
    """A folder of image files."""
    image = pytest.importorskip("PIL.Image")
    for split, count in (("train", 100), ("val", 5), ("test", 5)):
        for c, n in itertools.product("ab", range(count)):
            (tmp_path / "data" / split / c).mkdir(parents=True, exist_ok=True)
            picture = image.new("L", (8, 8), n)
            picture.putpixel((n % 8, n // 8 % 8), 200 if c == "a" else 20)
            picture.save(tmp_path / "data" / split / c / f"{n}.png")
    return tmp_path / "data"
