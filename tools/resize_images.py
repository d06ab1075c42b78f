"""Copy a tree of images with their shorter side reduced, once, so that every epoch decodes less.

python tools/resize_images.py /data/imagenet /fast/imagenet --side 256 --workers 8
python main.py --cfg ... --data-path /fast/imagenet

Folders and file names stay, so the copy is read as the original is; files that are no images come along.
Images are decoded and resized by PIL and written in their own format. An image whose shorter side is not
longer than --side is copied byte for byte: nothing is enlarged, or compressed twice for nothing; so is one
of more than 8 bits per channel, which PIL cannot resize in its own format. A file appears under its name
when it is complete, so the same command continues after an interruption; existing files are kept. Files that
cannot be read are reported, left out, and make the exit status 1.

Random resized crops of reduced images are cut from fewer pixels: with --side 256 a crop of 8 % of the area
is enlarged about three times to fill 224 pixels. Published recipes cut from the originals.
"""

import argparse
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
# Modes that PIL can resize with a filter, and every format can store; others become RGB.
MODES = ("L", "RGB")


def resize_tree(
    source: str | Path, target: str | Path, side: int, *, quality: int = 90, workers: int = 0
) -> dict[str, Any]:
    """Copy `source` to `target` with images of a shorter side of at most `side` pixels.

    Args:
        quality: of JPEG and lossy WebP files, 1 to 100.
        workers: processes; 0 works in this one.

    Returns:
        How many files were `resized`, `copied` and `kept` (they existed), and the `damaged` ones as
        {path: reason}.

    Raises:
        FileNotFoundError: there is no such folder.
        OSError: a file cannot be written, or copied; what was done stays.
        ValueError: there is no file, one folder lies in the other, or a number is out of its range.
    """
    source, target = Path(source), Path(target)
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is no folder")
    inner, outer = source.resolve(), target.resolve()
    if inner == outer or inner in outer.parents or outer in inner.parents:
        raise ValueError(
            f"{target} must lie outside of {source}: the originals are not to be changed"
        )
    if side < 1 or not 1 <= quality <= 100:
        raise ValueError(f"--side {side} must be positive and --quality {quality} from 1 to 100")
    files = _files_below(source)
    if not files:
        raise ValueError(f"{source} has no file: is it the right folder?")
    work = partial(_convert, source, target, side, quality)
    counts: Counter[str] = Counter()
    damaged = {}
    with _mapper(workers) as run:
        outcomes = tqdm(run(work, files), total=len(files), unit="file", disable=None)
        for name, (outcome, reason) in zip(files, outcomes, strict=True):
            counts[outcome] += 1
            if outcome == "damaged":
                damaged[str(source / name)] = reason
    return {name: counts[name] for name in ("resized", "copied", "kept")} | {"damaged": damaged}


def _files_below(root: Path) -> list[Path]:
    """All files, relative to `root`, sorted; through links to folders too, as the loaders go."""
    return sorted(
        (Path(folder) / name).relative_to(root)
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
    )


@contextmanager
def _mapper(workers: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """`map` in this process, or over worker processes."""
    if not workers:
        yield map
        return
    # Spawned, not forked: the parent may have threads.
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        yield partial(pool.map, chunksize=16)


def _convert(source: Path, target: Path, side: int, quality: int, name: Path) -> tuple[str, str]:
    """One file -> what became of it, and why."""
    path, result = source / name, target / name
    if result.exists():
        return "kept", ""
    result.parent.mkdir(parents=True, exist_ok=True)
    reduced = None
    if name.suffix.lower() in SUFFIXES:
        try:
            reduced = _reduced(path, side)
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            return "damaged", f"{type(error).__name__}: {error}"
    temporary = result.with_name(f".{result.name}.{os.getpid()}")
    try:
        if reduced is None:
            shutil.copyfile(path, temporary)
        else:
            image, stored_as = reduced
            image.save(temporary, stored_as, quality=quality)
        os.replace(temporary, result)
    finally:
        temporary.unlink(missing_ok=True)
    return "copied" if reduced is None else "resized", ""


def _reduced(path: Path, side: int) -> tuple[Image.Image, str | None] | None:
    """The reduced image and its format; None if it is to be copied. Damaged ones raise what PIL raises."""
    with Image.open(path) as image:
        image.load()  # also of images that are copied: damaged ones must be found
        if min(image.size) <= side or image.mode[0] in "IF":
            return None
        scale = side / min(image.size)
        size = tuple(max(side, round(scale * length)) for length in image.size)
        plain = image if image.mode in MODES else image.convert("RGB")
        reduced = plain.resize(size, Image.Resampling.BICUBIC)
        # Neither EXIF nor colour profiles: loaders look at neither, and PIL has not applied them.
        reduced.info.clear()
        return reduced, image.format


def main(argv: Sequence[str] | None = None) -> int:
    """Command line -> a tree of files, and a summary; 1 if files were damaged."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="folder with images, at any depth")
    parser.add_argument("target", help="folder to write to, made if it does not exist")
    parser.add_argument("--side", type=int, required=True, help="shorter side in pixels")
    parser.add_argument("--quality", type=int, default=90, help="of JPEG files (default: 90)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--report", help="JSON file for what became of the files")
    args = parser.parse_args(argv)
    try:
        report = resize_tree(
            args.source, args.target, args.side, quality=args.quality, workers=args.workers
        )
    except (ValueError, OSError) as error:  # the folders, the numbers, or what cannot be written
        parser.error(str(error))
    print("\n".join(_lines(report)))
    if args.report:
        Path(args.report).write_text(json.dumps(report, indent=2) + "\n")
    return 1 if report["damaged"] else 0


def _lines(report: dict[str, Any]) -> Iterator[str]:
    for path, reason in report["damaged"].items():
        yield f"damaged: {path}: {reason}"
    counts = dict(report, damaged=len(report["damaged"]))
    yield ", ".join(f"{count} {name}" for name, count in counts.items())


if __name__ == "__main__":
    sys.exit(main())
