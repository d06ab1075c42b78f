"""Image folders -> one LMDB file per split, for disks that are slow with many small files.

python tools/folder_to_lmdb.py /data/imagenet                       # writes /data/imagenet/{train,val}.lmdb
python tools/folder_to_lmdb.py /data/imagenet /fast/imagenet --splits val
python main.py --cfg ... --data-path /fast/imagenet --opts DATA.DATASET lmdb

Reads FOLDER/<split>/<class>/<image>. Image files are stored as they are, with their names, classes and
checksums (data/formats/lmdb.py has the layout). A file appears under its name when it is complete: after
an interruption nothing is left behind, finished splits are kept, and the same command does the rest.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.formats.imagenet import FolderImages
from data.formats.lmdb import write_lmdb
from data.registry import SPLITS


def convert(folder: Path, target: Path, split: str) -> Path:
    """Write one split to `target/<split>.lmdb`, unless it is there -> the file.

    Raises:
        ValueError, OSError: the images are not there, or cannot be read or written; nothing is left.
    """
    path = target / f"{split}.lmdb"
    if path.exists():
        print(f"{path} is there already: kept (delete it to have it written anew)")
        return path
    images = FolderImages(folder, split)
    named = [
        (Path(file), Path(file).relative_to(folder / split).as_posix(), label)
        for file, label in images.samples
    ]
    target.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(named), desc=split, unit="image", disable=None) as bar:
        write_lmdb(path, named, images.classes, lambda done: bar.update(done - bar.n))
    print(
        f"{path}: {len(named)} images of {len(images.classes)} classes, "
        f"{path.stat().st_size / 2**20:.1f} MiB"
    )
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Command line -> files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="has <split>/<class>/<image>")
    parser.add_argument(
        "target", type=Path, nargs="?", help="folder to write to (default: the same one)"
    )
    parser.add_argument("--splits", nargs="+", choices=SPLITS, help="default: those that exist")
    args = parser.parse_args(argv)
    splits = args.splits or [split for split in SPLITS if (args.folder / split).is_dir()]
    if not splits:
        parser.error(f"{args.folder} has neither train/ nor val/ with <class>/<image> inside")
    try:
        for split in splits:
            convert(args.folder, args.target or args.folder, split)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
