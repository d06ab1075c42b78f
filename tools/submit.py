"""Run a main.py command as a Slurm job, through submitit; what is preempted is queued again and goes on.

    python tools/submit.py --nodes 2 --gpus 8 --time 2-00:00:00 --partition gpu -- \\
        --cfg configs/swin/swin_tiny_patch4_window7_224.yaml --data-path /data/imagenet
    python tools/submit.py --local --gpus 0 --processes 2 -- --cfg configs/_base_/smoke_cls.yaml

What follows `--` is the command line of main.py; it is checked before anything is submitted. One process is
started per GPU. Before Slurm takes the machines away, at the end of the time or for a more important job,
submitit queues the job again (`--requeues` times at the end of its time), and main.py continues from its own
last.pth. That one is written after every epoch, and every SAVE_STEPS optimizer steps.

`--local` runs the job on this machine, in the background; a job of one machine needs no Slurm.
Needs submitit: pip install submitit.
"""

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from config import MODE_KEYS, load_config, output_dir  # noqa: E402  found through the line above
from utils.arguments import parse_args  # noqa: E402

TIMEOUT_MIN = 24 * 60


class MainJob:
    """What submitit pickles and runs in every process of the job: `main.py` with some arguments."""

    def __init__(self, arguments: Sequence[str], root: Path, folder: Path) -> None:
        self.arguments, self.root, self.folder = list(arguments), str(root), str(folder)

    def __call__(self) -> None:
        import submitit

        os.chdir(self.folder)  # paths of the command are relative to where it was submitted
        os.environ.update(launch_environment(submitit.JobEnvironment()))
        if self.root not in sys.path:
            sys.path.insert(0, self.root)
        from main import main

        main(self.arguments)

    def checkpoint(self) -> Any:
        """What submitit queues when the job is preempted: the same command, which continues by itself."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def launch_environment(job: Any) -> dict[str, str]:
    """torchrun's variables for this process of a `submitit.JobEnvironment`."""
    # Two jobs on one machine must not meet at one port; below 32768 no client socket takes it.
    number = int(re.sub(r"\D", "", str(job.job_id)) or 0)
    return dict(
        MASTER_ADDR=job.hostnames[0] if job.num_nodes > 1 else "127.0.0.1",
        MASTER_PORT=os.environ.get("MASTER_PORT") or str(10000 + number % 20000),
        RANK=str(job.global_rank),
        LOCAL_RANK=str(job.local_rank),
        WORLD_SIZE=str(job.num_tasks),
        LOCAL_WORLD_SIZE=str(job.num_tasks // job.num_nodes),  # as many on each machine
    )


def minutes(text: str) -> int:
    """Minutes of a time as Slurm writes it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S; seconds are rounded up.

    Raises:
        argparse.ArgumentTypeError: another form.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: give minutes, H:M:S or D-H:M:S")
    days, *rest = match.groups()
    numbers = [int(part) for part in rest if part is not None]
    if days is not None:
        hours, mins, seconds = numbers + [0] * (3 - len(numbers))
    elif len(numbers) == 3:
        hours, mins, seconds = numbers
    else:
        hours, (mins, seconds) = 0, numbers + [0] * (2 - len(numbers))
    total = (24 * int(days or 0) + hours) * 60 + mins + (seconds > 0)
    if total < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no time to run in")
    return total


def parameters(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Keywords of submitit's `AutoExecutor.update_parameters`; what was not given is left to Slurm."""
    extra = dict(requeue=True)  # Slurm's own word for jobs that may be started again
    for pair in options.extra:
        key, equals, value = pair.partition("=")
        extra[key.removeprefix("--")] = value if equals else True
    given = dict(
        name=options.name or name,
        timeout_min=options.time,
        nodes=options.nodes,
        tasks_per_node=options.processes or max(options.gpus, 1),
        gpus_per_node=options.gpus or None,  # a cluster without GPUs refuses 0 of them
        cpus_per_task=options.cpus_per_task,
        mem_gb=options.mem,
        slurm_signal_delay_s=options.signal_delay,
        slurm_partition=options.partition,
        slurm_account=options.account,
        slurm_qos=options.qos,
        slurm_constraint=options.constraint,
        slurm_comment=options.comment,
        slurm_exclude=options.exclude,
        slurm_nodelist=options.nodelist,
        slurm_setup=options.setup or None,
        slurm_additional_parameters=extra,
    )
    return {key: value for key, value in given.items() if value is not None}


def submit(arguments: Sequence[str], options: argparse.Namespace) -> Any:
    """Check the command of main.py and hand it to submitit -> the submitit job.

    Raises:
        ValueError: submitit or Slurm is missing, or the command or the request is wrong.
    """
    _, own, flags = parse_args(arguments)
    config = load_config(own.cfg, own.opts, flags)
    if not config.TRAIN.AUTO_RESUME and not any(config[key] for key in MODE_KEYS):
        raise ValueError(
            "TRAIN.AUTO_RESUME=False: a job that is queued again would start over and overwrite what it had. "
            "Leave it True, and give the run a folder of its own with --tag"
        )
    submitit = _import_submitit()
    folder = Path(options.folder or output_dir(config) / "jobs").absolute()
    requeues = options.requeues
    try:
        executor = submitit.AutoExecutor(
            folder,
            cluster="local" if options.local else "slurm",
            local_max_num_timeout=requeues,
            slurm_max_num_timeout=requeues,
        )
        executor.update_parameters(**parameters(options, config.MODEL.NAME))
    except RuntimeError as error:
        raise ValueError(
            f"there is no Slurm here ({error}): log in to the cluster, or give --local to run on this machine"
        ) from error
    _pickle_by_value()
    return executor.submit(MainJob(arguments, ROOT, Path.cwd()))


def _import_submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise ValueError(
            "tools/submit.py needs submitit, which is not installed: pip install submitit"
        ) from error
    return submitit


def _pickle_by_value() -> None:
    """A job must not need this module: it may run where `tools` cannot be imported."""
    import cloudpickle

    if __name__ != "__main__":  # that one is always pickled by value
        cloudpickle.register_pickle_by_value(sys.modules[__name__])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="submit.py",
        description=__doc__.splitlines()[0],
        usage="submit.py [options] -- --cfg FILE [arguments of main.py]",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--nodes", type=int, default=1, help="machines")
    add("--gpus", type=int, default=1, help="GPUs per machine; 0 trains on CPUs")
    add("--processes", type=int, help="processes per machine; one per GPU if not given")
    add("--time", type=minutes, default=TIMEOUT_MIN, help="minutes, H:M:S or D-H:M:S (one day)")
    add("--cpus-per-task", type=int, help="CPU cores per process: loader workers, and one")
    add("--mem", type=float, help="memory per machine, GB")
    for name in ("partition", "account", "qos", "constraint", "comment", "exclude", "nodelist"):
        add(f"--{name}", help=f"as in sbatch --{name}")
    more: dict[str, Any] = dict(nargs="+", action="extend", default=[])
    add("--extra", metavar="KEY=VALUE", help="any other option of sbatch", **more)
    add("--setup", metavar="LINE", help="shell lines before the job", **more)
    add("--name", help="of the job; the model's if not given")
    add("--requeues", type=int, default=10, help="how often a job whose time is up goes on")
    add("--signal-delay", type=int, default=120, help="seconds of warning before the end")
    add("--folder", help="for logs; OUTPUT/MODEL.NAME/TAG/jobs if not given")
    add("--local", action="store_true", help="run on this machine, without Slurm")
    add("--wait", action="store_true", help="wait for the job and fail if it does")
    return parser


def main(args: Sequence[str] | None = None) -> Any:
    """Command line -> the submitted job."""
    args = list(sys.argv[1:] if args is None else args)
    parser = _parser()
    if "--" not in args:
        own, arguments = args, []
    else:
        split = args.index("--")
        own, arguments = args[:split], args[split + 1 :]
    options = parser.parse_args(own)
    if not arguments:
        parser.error(
            "what main.py is to run comes after --, as in: submit.py --gpus 8 -- --cfg FILE"
        )
    _check(parser, vars(options))
    try:
        job = submit(arguments, options)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"job {job.job_id}: main.py {' '.join(arguments)}")
    print(f"logs: {job.paths.stdout} and {job.paths.stderr}, for each process", flush=True)
    if options.wait:
        job.results()  # raises what the job raised
        print(f"job {job.job_id} is done")
    return job


def _check(parser: argparse.ArgumentParser, options: Mapping[str, Any]) -> None:
    """Exit with status 2 at a number that asks for nothing."""
    least = dict(nodes=1, gpus=0, processes=1, cpus_per_task=1, requeues=0, signal_delay=1)
    for name, low in least.items():
        if options[name] is not None and options[name] < low:
            flag = name.replace("_", "-")
            parser.error(f"--{flag} {options[name]} must be at least {low}")
    if options["local"] and options["nodes"] > 1:
        parser.error(f"--local is this machine only, --nodes {options['nodes']} are asked for")


if __name__ == "__main__":
    main()
