"""One program for every experiment: train, evaluate (--eval), time (--throughput), count (--info).

python main.py --cfg configs/demo.yaml
torchrun --nproc_per_node 8 main.py --cfg configs/dfvt/dfvt_tiny.yaml --data-path /data/imagenet
"""

from collections.abc import Sequence

from config import load_config
from modes import MODES, check, train
from utils.arguments import parse_args
from utils.distributed import cleanup, init_distributed


def main(argv: Sequence[str] | None = None) -> None:
    """Command line -> config -> processes -> the mode that was asked for."""
    parser, args, flags = parse_args(argv)
    try:
        config = load_config(args.cfg, args.opts, flags)
        runtime = init_distributed(config.DEVICE, args.local_rank)
        check(config, runtime)
    except (ValueError, FileNotFoundError) as error:
        cleanup()
        parser.error(str(error))
    mode = next((run for key, run in MODES.items() if config[key]), train)
    try:
        mode(config, runtime)
    finally:
        cleanup()


if __name__ == "__main__":
    main()
