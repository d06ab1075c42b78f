"""DomainNet and PACS: the same classes in several domains, read one by one or jointly."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from data.formats.imagenet import FolderImages
from data.listing import JoinedImages, ListedImages, Listing, class_names, joined, read_list
from data.registry import ImageDataset, register_dataset
from utils.spelling import nearest

DOMAINNET = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
PACS = ("art_painting", "cartoon", "photo", "sketch")

LAYOUT = (
    "<domain>_train.txt and <domain>_test.txt with lines of `<domain>/<class>/<image> label`, or "
    "<domain>/{train,val}/<class>/<image>"
)


@register_dataset("domainnet", num_classes=345)
def domainnet(root: str, split: str, *, domains: Sequence[str] = ()) -> ImageDataset:
    """Some of the six domains of DomainNet (arXiv:1812.01754), or all of them; 345 classes.

    As the official list files have it, or in folders as in DHVT. "val" is the official test split.

    Raises:
        ValueError: an unknown domain, one that is named twice, a damaged line, a label out of range,
            domains that number their classes differently.
        FileNotFoundError: a domain has neither list files nor folders, or a listed image is missing.
    """
    return _domains(Path(root), split, domains, DOMAINNET, 345)


@register_dataset("pacs", num_classes=7, node="DOMAINNET")
def pacs(root: str, split: str, *, domains: Sequence[str] = ()) -> ImageDataset:
    """Some of the four domains of PACS (arXiv:1710.03077), in the layouts of DomainNet; 7 classes."""
    return _domains(Path(root), split, domains, PACS, 7)


def _domains(
    root: Path, split: str, domains: Sequence[str], known: Sequence[str], num_classes: int
) -> ImageDataset:
    for domain in domains:
        if domain not in known:
            raise ValueError(
                f"DATA.DOMAINNET.DOMAINS={list(domains)}: unknown domain '{domain}'; did you mean one of "
                f"{nearest(domain, known)}? All: {list(known)}"
            )
        if list(domains).count(domain) > 1:
            raise ValueError(f"DATA.DOMAINNET.DOMAINS={list(domains)} names '{domain}' twice")
    domains = domains or known
    lists = {
        name: [root / f"{domain}_{ending}.txt" for domain in domains]
        for name, ending in (("train", "train"), ("val", "test"))
    }
    folders = [root / domain / split for domain in domains]
    if all(path.is_file() for path in lists[split]):
        present = {
            name: [read_list(path) for path in paths]
            for name, paths in lists.items()
            if all(path.is_file() for path in paths)
        }
        return _listed(root, present, split, num_classes)
    if all(path.is_dir() for path in folders):
        parts = [FolderImages(root / domain, split) for domain in domains]
        return parts[0] if len(parts) == 1 else JoinedImages(parts, str(root))
    listed = any(path.is_file() for path in lists[split])
    absent = [str(path) for path in (lists[split] if listed else folders) if not path.exists()]
    raise FileNotFoundError(
        f"{root.absolute()} lacks {', '.join(absent)}; DATA.DATA_PATH must hold {LAYOUT}, for the domains "
        f"{list(domains)} (DATA.DOMAINNET.DOMAINS)"
    )


def _listed(
    root: Path, lists: Mapping[str, Sequence[Listing]], split: str, num_classes: int
) -> ImageDataset:
    """Domains of list files; classes are named by the lists of both splits, as far as they are there.

    Raises:
        ValueError: a label is one class here and another one there.
    """
    meaning: dict[int, tuple[str, str]] = {}
    for listing in itertools.chain.from_iterable(lists.values()):
        for label, names in listing.folders.items():
            for name in names:
                known, source = meaning.setdefault(label, (name, listing.source))
                if known != name:
                    raise ValueError(
                        f"label {label} is '{known}' in {source} and '{name}' in {listing.source}: the "
                        "lists must number their classes in the same way"
                    )
    folders = {label: {name} for label, (name, _) in meaning.items()}
    return ListedImages(root, joined(lists[split]), class_names(folders, num_classes))
