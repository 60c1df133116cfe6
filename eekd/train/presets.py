"""Recipes by name: the settings that a run starts from."""

from collections.abc import Callable
from functools import partial

from eekd.io.files import nearest
from eekd.train.checked import StudentName
from eekd.train.config import Config, Student, Teacher

PAPER = ("ce", "last", "attention")  # the students of recipes that are others'


def recommended(student: Student) -> tuple[StudentName, ...]:
    """The students that are trained where none are named: by docs/results/study.md, with what it is compared with.

    DKD needs one class for each image.
    """
    several = student.mixup or student.cutmix or student.label_smoothing
    return "ce", "last", "attention" if several else "attention_dkd"


def digits() -> Config:
    """scikit-learn's 8 x 8 digits: the whole method in a minute. The recipe for data of your own, too.

    python -m eekd.train --data digits
    """
    return Config()


def glyphs() -> Config:
    """Letters and digits of printed fonts, the demonstration: a perceptron learns from a residual network, five times.

    python -m eekd.train
    """
    return Config(
        data="glyphs",
        augment="none",  # so that the snapshots run over the training images once
        precision="fp32",  # which is fastest for networks as small as these, and the same on every processor
        teacher=Teacher(model="resnet8_s2", epochs=12, batch_size=128, schedule="cosine", snapshots=4),
        student=Student(
            model="mlp64", epochs=40, batch_size=128, lr=0.3, schedule="cosine", temperature=2.0, alpha=0.1
        ),
        seeds=5,
    )


def fashion_mnist_cpu() -> Config:
    """Fashion-MNIST made small enough for two CPU cores.

    python -m eekd.train --preset fashion-mnist-cpu
    """
    recipe: dict = dict(epochs=10, batch_size=128, schedule="cosine")
    return Config(
        data="fashion-mnist",
        train_limit=30_000,
        augment="none",  # ten epochs are too few to need more images than there are
        teacher=Teacher(model="resnet8", **recipe),
        student=Student(model="resnet8_w4", **recipe),
    )


CIFAR100_PAIRS = (
    "wrn_40_2-wrn_16_2", "wrn_40_2-wrn_40_1", "resnet56-resnet20", "resnet110-resnet20", "resnet110-resnet32",
    "resnet32x4-resnet8x4", "vgg13-vgg8", "vgg13-MobileNetV2", "ResNet50-MobileNetV2", "ResNet50-vgg8",
    "resnet32x4-ShuffleNetV1", "resnet32x4-ShuffleNetV2", "wrn_40_2-ShuffleNetV1",
)  # fmt: skip


def cifar100_crd(pair: str) -> Config:
    """CIFAR-100 by the recipe of RepDistiller (Tian et al., "Contrastive Representation Distillation", 2020).

    python -m eekd.train --preset cifar100-crd:resnet56-resnet20
    """
    teacher, student = pair.split("-")
    recipe: dict = dict(epochs=240, batch_size=64, nesterov=False, milestones=(0.625, 0.75, 0.875))
    lr = 0.01 if student.startswith(("MobileNet", "ShuffleNet")) else 0.05
    return Config(
        data="cifar100",
        teacher=Teacher(model=teacher, lr=0.05, **recipe),
        student=Student(model=student, lr=lr, temperature=4.0, alpha=0.1, **recipe),
        students=PAPER,
    )


def cifar100_eekd(pair: str) -> Config:
    """CIFAR-100 by the recipe of the method's authors (Wang et al., arXiv 2202.12488).

    python -m eekd.train --preset cifar100-eekd:resnet56-resnet20
    """
    teacher, student = pair.split("-")
    recipe: dict = dict(epochs=200, batch_size=128)
    phases = {"teacher": Teacher(model=teacher, **recipe), "student": Student(model=student, **recipe)}
    return Config(data="cifar100", students=PAPER, **phases)


def imagenet_r34_r18() -> Config:
    """ImageNet, ResNet-34 to ResNet-18, from a folder with train/CLASS/*.JPEG and val/CLASS/*.JPEG.

    The recipe of the figures that CRD, DKD and DIST publish, torchvision's for 100 epochs: 73.31 % of a teacher and
    69.75 % of a student alone. Here the teacher is trained, too, and both without the hundredth of the images that is
    held out to validate on. Temperature and alpha are those of the method's authors.

    python -m eekd.train --preset imagenet-r34-r18 --data path/to/imagenet
    """
    recipe: dict = dict(epochs=100, batch_size=256, nesterov=False, weight_decay=1e-4)
    return Config(
        data="imagenet",
        image_size=224,
        val_fraction=0.01,
        workers=8,
        precision="bf16",
        channels_last=True,
        teacher=Teacher(model="timm:resnet34", **recipe),
        student=Student(model="timm:resnet18", **recipe),
        students=PAPER,
    )


def imagenet_deit_s() -> Config:
    """ImageNet, DeiT-S by DeiT's recipe, taught by a convolutional network, as DeiT is.

    Student: Touvron et al., "Training data-efficient image transformers & distillation through attention" (2021), with
    temperature and alpha of its soft distillation. The settings are the defaults of its `main.py`, apart from these: a
    step has 1008 images and not 1024, which three views of an image divide; RandAugment has a fixed strength; erased
    rectangles have one colour and not noise; and each image is mixed in a share of its own.
    Teacher: the RegNetY-16GF that taught DeiT, but trained here, for there are no snapshots of theirs. Its recipe is
    pycls's (Radosavovic et al., "Designing Network Design Spaces", 2020): learning rate 0.2 for 256 images, here
    scaled to 512. Which recipe the teacher of the DeiT paper had is not known to us.

    torchrun --nproc-per-node 8 -m eekd.train --preset imagenet-deit-s --data path/to/imagenet
    """
    return Config(
        data="imagenet",
        image_size=224,
        augment="imagenet",
        interpolation="bicubic",
        val_fraction=0.01,
        workers=8,
        precision="bf16",
        teacher=Teacher(
            model="timm:regnety_160",
            epochs=100,
            batch_size=512,
            lr=0.4,
            weight_decay=5e-5,
            schedule="cosine",
            warmup_epochs=5,
        ),
        student=Student(
            model="timm:deit_small_patch16_224",
            model_args=("drop_path_rate=0.1",),
            epochs=300,
            batch_size=1008,
            repeats=3,
            optimizer="adamw",
            lr=1e-3,
            weight_decay=0.05,
            schedule="cosine",
            warmup_epochs=5,
            min_lr=1e-5,
            auto_augment="rand",
            erasing=0.25,
            mixup=0.8,
            cutmix=1.0,
            label_smoothing=0.1,
            ema=0.99996,
            temperature=3.0,
            alpha=0.9,
        ),
    )


def finetune() -> Config:
    """A few thousand images of your own, teacher and student from timm's pre-trained weights.

    Small learning rates, smaller still in the layers in front; the student sees mixed images for longer (Beyer et al.,
    "Knowledge distillation: A good teacher is patient and consistent", 2022).

    python -m eekd.train --preset finetune --data path/to/images
    """
    recipe: dict = dict(
        weights="timm",
        batch_size=32,
        optimizer="adamw",
        weight_decay=0.05,
        schedule="cosine",
        clip_grad=1.0,
        auto_augment="trivial",
    )
    return Config(
        data="images",
        image_size=224,
        augment="imagenet",
        workers=4,
        teacher=Teacher(
            model="timm:resnet50", epochs=20, lr=3e-4, layer_decay=0.9, warmup_epochs=2, label_smoothing=0.1, **recipe
        ),
        student=Student(
            model="timm:mobilenetv3_large_100",
            epochs=60,
            lr=5e-4,
            warmup_epochs=3,
            ema=0.998,
            mixup=0.2,
            temperature=2.0,
            alpha=0.2,
            **recipe,
        ),
    )


PRESETS: dict[str, Callable[[], Config]] = {
    "glyphs": glyphs,
    "digits": digits,
    "fashion-mnist-cpu": fashion_mnist_cpu,
    **{f"cifar100-crd:{pair}": partial(cifar100_crd, pair) for pair in CIFAR100_PAIRS},
    **{f"cifar100-eekd:{pair}": partial(cifar100_eekd, pair) for pair in CIFAR100_PAIRS},
    "imagenet-r34-r18": imagenet_r34_r18,
    "imagenet-deit-s": imagenet_deit_s,
    "finetune": finetune,
}


def preset(name: str) -> Config:
    """The preset of that name; ValueError names the nearest one."""
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}{nearest(name, PRESETS)}")
    return PRESETS[name]()


def preset_or_file(name: str | None, file: str | None, default: str) -> Config:
    """A preset's settings or a file's, where a command line may name either."""
    if name and file:
        raise ValueError(f"--config must not be given with --preset, got {file} and {name}")
    return Config.load(file) if file else preset(name or default)
