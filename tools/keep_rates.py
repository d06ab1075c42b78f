"""Score, time and count a checkpoint at several keep rates: the weights stay, only the tokens get fewer.

    python tools/keep_rates.py --cfg configs/evit/evit_small_r07_fuse.yaml --data-path /data/imagenet \
        --resume output/evit_small_r07_fuse/default/checkpoints/best.pth --rates 1 0.9 0.7 0.5

For EViT and for mixers with a keep rate. One rate alone: `main.py --eval --opts MODEL.EVIT.KEEP_RATE 0.5`.
Prints a table, and writes `keep_rates.json` into the run's folder, or to --output.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from config import load_config, output_dir  # noqa: E402  found through the line above
from data import build_data  # noqa: E402
from engine import evaluate  # noqa: E402
from models.mixers.queries import check_keep_rate  # noqa: E402
from modes.build import build_placed, load_weights, source_of  # noqa: E402
from modes.results import count_model, time_model  # noqa: E402
from tasks import build_task  # noqa: E402
from utils.amp import Amp  # noqa: E402
from utils.arguments import add_opts  # noqa: E402
from utils.distributed import init_distributed  # noqa: E402
from utils.files import check_output  # noqa: E402


def measure(config: Any, rates: Sequence[float]) -> list[dict[str, float]]:
    """One record per rate: keep_rate, acc1 and acc5 (percent), loss, gmacs, img_per_s with its range.

    Raises:
        ValueError: the model keeps all tokens, a rate is not in (0, 1], TEST.TTA is on, or there are no
            weights.
    """
    if config.TEST.TTA != "none":
        raise ValueError(
            f"TEST.TTA='{config.TEST.TTA}' must be 'none': one view of each image is scored"
        )
    runtime = init_distributed(config.DEVICE)
    amp = Amp(runtime.device, config.AMP_DTYPE, config.AMP_ENABLE, config.AMP_OPT_LEVEL)
    source = source_of(config, "eval", output_dir(config) / "checkpoints" / "last.pth")
    data = build_data(config, splits=("val",), device=runtime.device)
    model = build_placed(config, data.num_classes, runtime.device)
    if not hasattr(model, "set_keep_rate"):
        raise ValueError(
            f"MODEL.TYPE='{config.MODEL.TYPE}' keeps all tokens; keep rates are those of evit, and of mixers "
            "of metaformer with keep_rate"
        )
    load_weights(config, model, source, data.classes)
    task = build_task(config, data.num_classes)
    records = []
    for rate in rates:
        model.set_keep_rate(rate)
        scores = evaluate(
            model,
            task,
            data.val,
            device=runtime.device,
            amp=amp,
            channels_last=config.CHANNELS_LAST,
        )
        speed = time_model(config, amp, model, runtime.device)
        records.append(
            dict(
                keep_rate=rate,
                **{name: scores[name] for name in ("acc1", "acc5", "loss", "images")},
                gmacs=count_model(config, model).gmacs,
                **{name: speed[name] for name in ("img_per_s", "img_per_s_min", "img_per_s_max")},
                batch_size=speed["batch_size"],
                dtype=speed["dtype"],
                device=speed["device"],
            )
        )
    return records


def to_table(records: Sequence[dict[str, float]]) -> str:
    """Records as a table in Markdown."""
    lines = ["| keep rate | top-1 (%) | top-5 (%) | GMACs | images/s |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['keep_rate']:g} | {r['acc1']:.2f} | {r['acc5']:.2f} | {r['gmacs']:.4f} | "
        f"{r['img_per_s']:.1f} |"
        for r in records
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Command line -> the records, which are printed and written too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--cfg", metavar="FILE", required=True, help="the experiment's YAML file")
    parser.add_argument("--resume", metavar="FILE", required=True, help="checkpoint")
    parser.add_argument("--data-path", default=None, help="root folder of the dataset")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[1.0, 0.9, 0.8, 0.7, 0.6, 0.5], help="in (0, 1]"
    )
    parser.add_argument("--output", type=Path, help="JSON file, instead of the run's folder")
    add_opts(parser)
    args = parser.parse_args(argv)
    flags = {"MODEL.RESUME": args.resume, "EVAL_MODE": True}
    if args.data_path is not None:
        flags["DATA.DATA_PATH"] = args.data_path
    try:
        config = load_config(args.cfg, args.opts, flags)
        path = args.output or output_dir(config) / "keep_rates.json"
        check_output(path, "--output")
        for rate in args.rates:
            check_keep_rate(rate)
        records = measure(config, args.rates)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(to_table(records))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, indent=2) + "\n")
    return records


if __name__ == "__main__":
    main()
