"""One program for every experiment: train, evaluate (--eval), time (--throughput), count (--info).

python main.py --cfg configs/demo.yaml
torchrun --nproc_per_node 8 main.py --cfg configs/dfvt/dfvt_tiny.yaml --data-path /data/imagenet
"""

import logging
import signal
import sys
from collections.abc import Sequence

from config import load_config
from modes import MODES, check, train
from utils.arguments import parse_args
from utils.distributed import barrier, cleanup, init_distributed, is_main

_LOG = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line -> config -> processes -> the mode that was asked for."""
    parser, args, flags = parse_args(argv)
    try:
        config = load_config(args.cfg, args.opts, flags)
        runtime = init_distributed(config.DEVICE, args.local_rank)
        check(config, runtime)
    except (ValueError, OSError) as error:
        # Once they know each other all processes are here, with the same error: one says it.
        try:
            if is_main():
                parser.error(str(error))
            sys.exit(2)
        finally:
            barrier()  # a launcher ends all when the first is gone: not before it is said
            cleanup()
    mode = next((run for key, run in MODES.items() if config[key]), train)
    mode(config, runtime)
    # Not where it failed: the others may be waiting for this process, and leaving together waits for them. It
    # ends instead, and the launcher ends them.
    cleanup()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        _LOG.warning(
            "interrupted; the same command goes on from last.pth, if TRAIN.AUTO_RESUME is on"
        )
        sys.exit(128 + signal.SIGINT)
