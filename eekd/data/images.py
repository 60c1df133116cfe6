"""One image: the bytes of a file in, an upright and opaque image of 8 bits a channel out."""

import io

import numpy as np

from eekd.io.files import stranger

# What Pillow may take bytes for, whatever their name: for others it starts programs, for EPS Ghostscript.
KINDS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM", "GIF")
ENDINGS = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
    ".pnm", ".gif",
)  # fmt: skip
GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N", "F")
_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_ORIENTATION = 0x0112  # Exif 2.3, 4.6.4 A: from 1, as stored, to 8
# How an image of that orientation is turned: Pillow's FLIP_LEFT_RIGHT, ROTATE_180, FLIP_TOP_BOTTOM, and so on.
_TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
# What stands in files that only look like images.
_OTHERS = {
    b"<svg": "SVG", b"<?xml": "XML or SVG", b"%!ps": "PostScript", b"%pdf": "PDF", b"8bps": "Photoshop's",
    b"\0\0\0\x0cjp  ": "JPEG 2000", b"\xff\x4f\xff\x51": "JPEG 2000", b"\0\0\0\x0cjxl ": "JPEG XL",
}  # fmt: skip
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"mif1": "HEIF", b"msf1": "HEIF"}  # ISO 14496-12, ftyp
_BRANDS |= dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"), "HEIC")


def open_image(data: bytes, name: str):
    """The Pillow image in `data`, of which only the header is read; ValueError with its name if there is none."""
    Image = _pillow()
    try:
        return Image.open(io.BytesIO(data), formats=KINDS)
    except Exception as error:  # a damaged file can make a decoder raise anything
        raise _damaged(data, name, error) from None


def decode_image(data: bytes, name: str, mode: str):
    """The Pillow image in `data`, upright, on white where it is transparent, in `mode`, which is "L" or "RGB".

    Of an animated image the first frame is read. 16 bits a pixel become 8. Raises ValueError with its name where there
    is no image, or one of 32 bits a pixel.
    """
    image = open_image(data, name)
    wide = image.mode[0] in "IF"  # I, I;16, I;16B, F: convert would clip them
    try:
        image.load()  # Exif data can stand behind the pixels
        turn = orientation(image)
        image = _narrowed(image) if wide else _on_white(image) if is_transparent(image) else image
        if image and turn in _TURNS:
            image = image.transpose(_TURNS[turn])  # pyright: ignore[reportArgumentType]
        image = image and image.convert(mode)
    except Exception as error:
        raise _damaged(data, name, error) from None
    if not image:
        raise ValueError(f"{name} must have 8 or 16 bits a pixel, got 32")
    return image


def orientation(image) -> int:
    """How an image is to be turned, from 1 (not at all) to 8."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged Exif data say nothing, and the pixels can be whole
        return 1


def is_transparent(image) -> bool:
    """Whether an image can have pixels that are seen through, judged by its header."""
    return image.mode in _ALPHA or "transparency" in image.info


def is_animated(image) -> bool:
    """Whether there is more than one frame, other than the preview of a photograph."""
    try:
        return getattr(image, "n_frames", 1) > 1 and image.format != "MPO"
    except Exception:  # found when it is decoded, if it matters for the first frame
        return False


def is_plain(image) -> bool:
    """Whether an image looks as its pixels are stored."""
    if is_transparent(image):
        return image.convert("RGBA").getextrema()[3] == (255, 255)
    return orientation(image) == 1 and image.mode[0] not in "IF"


def _on_white(image):
    full = image.convert("RGBA")
    if full.getextrema()[3] == (255, 255):
        return image
    paper = _pillow().new("RGBA", image.size, "white")
    paper.alpha_composite(full)
    return paper.convert("RGB")


def _narrowed(image):
    """An image of 16 bits in 8; None for one of 32 bits, whose range is not known."""
    values = np.asarray(image)
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # how Pillow holds their 16 bits
        values = values.clip(0, 65535).astype(np.uint16)
    if values.dtype.kind != "u" or values.dtype.itemsize != 2:
        return None
    return _pillow().fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))


def _pillow():
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("reading image files needs Pillow: pip install 'eekd[data]'") from None
    return Image


def _damaged(data: bytes, name: str, error: Exception) -> ValueError:
    what = stranger(data, "image", _OTHERS) or type(error).__name__
    if data[4:8] == b"ftyp" and data[8:12] in _BRANDS:
        what = f"{_BRANDS[data[8:12]]}, which is not read: convert it"
    what = "it is empty" if not data else "it is cut off" if "truncated" in str(error).lower() else what
    if type(error).__name__ == "DecompressionBombError":
        what = "DecompressionBombError: it has more pixels than Pillow reads"
    return ValueError(f"{name} is damaged or no image ({what})")
