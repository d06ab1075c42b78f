"""The first images of a COCO json that have objects, as a json of their own: for a run that must overfit.

python tools/coco_subset.py /data/coco/annotations/instances_train2017.json ten.json --images 10
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> None:
    """Command line -> the file, and a line that says what is in it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="json of COCO's format")
    parser.add_argument("target", type=Path, help="json to write; it must not exist")
    parser.add_argument("--images", type=int, default=10, help="how many (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.target.exists():
        parser.error(f"{args.target} exists already: name another file, or remove it")
    try:
        content = json.loads(args.source.read_bytes())
        chosen = subset(content, args.images)
    except (OSError, ValueError) as error:
        parser.error(f"{args.source}: {error}")
    try:
        args.target.write_text(json.dumps(chosen))
    except OSError as error:
        parser.error(f"target {args.target}: {error.strerror}")
    print(f"{args.target}: {len(chosen['images'])} images, {len(chosen['annotations'])} objects")


def subset(content: dict, count: int) -> dict:
    """The first `count` images with an object that is no crowd; crowds are left out, categories stay.

    Raises:
        ValueError: there are not so many, or the content is not that of a file of instances.
    """
    for part, key in (("images", "id"), ("annotations", "image_id")):
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(
            isinstance(entry, dict) and isinstance(entry.get(key), (int, str)) for entry in entries
        ):
            raise ValueError(
                f"'{part}' must be a list of objects with '{key}', as in COCO's instances_train2017.json"
            )
    objects = [entry for entry in content["annotations"] if not entry.get("iscrowd")]
    found = {entry["image_id"] for entry in objects}
    images = [image for image in content["images"] if image["id"] in found]
    if not 1 <= count <= len(images):
        raise ValueError(
            f"--images {count} must be from 1 to {len(images)}, the images with objects"
        )
    kept = {image["id"] for image in images[:count]}
    return content | dict(
        images=images[:count],
        annotations=[entry for entry in objects if entry["image_id"] in kept],
    )


if __name__ == "__main__":
    main()
