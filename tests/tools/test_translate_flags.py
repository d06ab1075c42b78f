"""Command lines of the programs that are built on DeiT's, and what they are here."""

import shlex

import pytest
import yaml

from config import load_config
from tools.translate_flags import DGE_FLAGS, EVIT_FLAGS, FLAGS, ROOT, WITHOUT, main, translate
from utils.arguments import parse_args

# The parsers of DilateFormer, DHVT, EViT and VTPACK; then what DeiT's has besides, and its submitit's.
COMMON = """--batch-size --epochs --model --input-size --drop --drop-path --model-ema --no-model-ema
--model-ema-decay --opt --opt-eps --opt-betas --clip-grad --momentum --weight-decay --sched --lr --lr-noise
--lr-noise-pct --lr-noise-std --warmup-lr --min-lr --decay-epochs --warmup-epochs --cooldown-epochs
--patience-epochs --decay-rate --color-jitter --aa --smoothing --train-interpolation --repeated-aug
--no-repeated-aug --reprob --remode --recount --resplit --mixup --cutmix --cutmix-minmax --mixup-prob
--mixup-switch-prob --mixup-mode --teacher-model --teacher-path --distillation-type --distillation-alpha
--distillation-tau --finetune --data-path --data-set --inat-category --output_dir --device --seed --resume
--start_epoch --eval --dist-eval --num_workers --pin-mem --no-pin-mem --world_size --dist_url
--model-ema-force-cpu"""
EVIT = """--test_speed --only_test_speed --fuse_token --base_keep_rate --shrink_epochs --shrink_start_epoch
--drop_loc --use-lmdb --visualize_mask --n_visualization"""
VTPACK = """--linear-warmup --no-linear-warmup --eval-epochs --checkpoint-epochs --no-tensorboard --pretrain
--dge-enable --dge-budget --dge-lr-scale"""
DEIT = """--bce-loss --unscale-lr --train-mode --no-train-mode --ThreeAugment --src --attn-only --cosub
--eval-crop-ratio --distributed"""
SUBMITIT = "--ngpus --nodes --timeout --job_dir --partition --use_volta32 --comment"

# What DeiT's own defaults are, where our recipe is not DeiT's.
LIKE_DEIT = {"DATA.BATCH_SIZE": 64}


def settings(words):
    return translate(words.split())[1]


def test_every_flag_of_the_five_programs_is_in_the_table():
    table = FLAGS | EVIT_FLAGS | DGE_FLAGS
    own = {"--model", *table, *WITHOUT}
    own |= {f"--no-{name[2:]}" for name, flag in table.items() if flag.opposite}
    assert own == set(f"{COMMON} {EVIT} {VTPACK} {DEIT} {SUBMITIT}".split())


@pytest.mark.parametrize(
    ("words", "variant", "expected"),
    [
        # The published commands: each is its recipe here.
        (
            "--model deit_dge_s124_small_patch16_256 --batch-size 32 --input-size 256 --warmup-epochs 20 "
            "--dge-enable --dge-budget 0.5 --dge-lr-scale 1.0 --dist-eval",
            "dge/deit_dge_s124_small_patch16_256",
            {},
        ),
        (
            "--model deit_small_patch16_shrink_base --fuse_token --base_keep_rate 0.7 --input-size 224 "
            "--sched cosine --lr 2e-5 --min-lr 2e-6 --weight-decay 1e-6 --batch-size 256 "
            "--shrink_start_epoch 0 --warmup-epochs 0 --shrink_epochs 0 --epochs 30 --drop_loc (3,6,9)",
            "evit/evit_small_r07_fuse",
            {
                "TRAIN.BASE_LR": 2e-5, "TRAIN.MIN_LR": 2e-6, "TRAIN.WEIGHT_DECAY": 1e-6,
                "TRAIN.EPOCHS": 30, "TRAIN.WARMUP_EPOCHS": 0, "MODEL.EVIT.SHRINK_EPOCHS": 0,
                "MODEL.EVIT.SHRINK_START_EPOCH": 0,
            },
        ),
        (
            "--model dilateformer_tiny --batch-size 128 --lr 1e-3 --drop-path 0.1 --warmup-epochs 10",
            "dilateformer/dilateformer_tiny",
            {},
        ),
        (
            "--model dhvt_tiny_cifar_patch4 --batch-size 256 --lr 1e-3 --input-size 32 --data-set CIFAR",
            "dhvt/dhvt_tiny_cifar_patch4",
            {},
        ),
        # Defaults of the programs hold where the recipe differs: EViT's are a trap of its own.
        (
            "--model deit_small_patch16_shrink_base",
            "evit/evit_small_r07_drop",
            LIKE_DEIT | {"MODEL.EVIT.SHRINK_EPOCHS": 0},
        ),
        ("--model dilateformer_tiny --lr 1e-3", "dilateformer/dilateformer_tiny", LIKE_DEIT),
        (
            "--model deit_base_patch16_shrink_base --base_keep_rate 0.5 --shrink_epochs 100 --batch-size 256",
            "evit/evit_base_r07_drop",
            {"MODEL.EVIT.KEEP_RATE": 0.5},
        ),
        (
            "--model pvt_dge_s124_tiny_256 --input-size 256 --batch-size 32 --warmup-epochs 20",
            "dge/pvt_dge_s124_tiny_256",
            {"MODEL.PVT_DGE.BUDGET": 1.0, "MODEL.PVT_DGE.BUDGET_WEIGHT": 0.0},
        ),
        # One by one.
        (
            "--model deit_small_distilled_patch16_224 --batch-size 128 --distillation-type hard "
            "--teacher-path t.pth --distillation-tau 2",
            "deit/deit_small_distilled_patch16_224",
            {
                "TRAIN.DISTILLATION.TYPE": "hard", "TRAIN.DISTILLATION.TEACHER": "timm:regnety_160",
                "TRAIN.DISTILLATION.TEACHER_WEIGHTS": "t.pth", "TRAIN.DISTILLATION.TAU": 2.0,
            },
        ),
        (
            "--model deit_tiny_patch16_224 --batch-size 128 --no-repeated-aug --no-pin-mem --model-ema "
            "--opt-betas 0.9 0.95 --aa none --finetune a.pth --eval",
            "deit/deit_tiny_patch16_224",
            {
                "AUG.REPEATED_AUG": False, "DATA.PIN_MEMORY": False, "TRAIN.EMA.ENABLE": True,
                "TRAIN.EMA.EVALUATE": False, "TRAIN.OPTIMIZER.BETAS": [0.9, 0.95],
                "AUG.AUTO_AUGMENT": "none", "MODEL.PRETRAINED": "a.pth", "EVAL_MODE": True,
            },
        ),
        (
            "--model dhvt_tiny_imagenet_patch16 --batch-size 128 --warmup-epochs 10 --data-set clipart",
            "dhvt/dhvt_tiny_imagenet_patch16",
            {"DATA.DATASET": "domainnet", "DATA.DOMAINNET.DOMAINS": ["clipart"]},
        ),
        # Its programs are told the folder of the domain.
        (
            "--model dhvt_tiny_imagenet_patch16 --batch-size 128 --warmup-epochs 10 --data-set clipart "
            "--data-path ./data/domain/clipart/",
            "dhvt/dhvt_tiny_imagenet_patch16",
            {
                "DATA.DATASET": "domainnet", "DATA.DOMAINNET.DOMAINS": ["clipart"],
                "DATA.DATA_PATH": "data/domain",
            },
        ),
        # A variant has the classes of its own data.
        (
            "--model dhvt_tiny_cifar_patch4 --data-set CIFAR-10 --input-size 32 --batch-size 256 --lr 1e-3",
            "dhvt/dhvt_tiny_cifar_patch4",
            {"DATA.DATASET": "cifar10", "MODEL.NUM_CLASSES": None},
        ),
        (
            "--model dhvt_tiny_imagenet_patch16 --batch-size 128 --warmup-epochs 10 --use-lmdb",
            "dhvt/dhvt_tiny_imagenet_patch16",
            {"DATA.DATASET": "lmdb"},
        ),
        (
            "--model dhvt_tiny_imagenet_patch16 --batch-size 128 --warmup-epochs 10 --use-lmdb "
            "--data-set clipart",
            "dhvt/dhvt_tiny_imagenet_patch16",
            {"DATA.DATASET": "domainnet", "DATA.DOMAINNET.DOMAINS": ["clipart"]},
        ),
        (
            "--model deit_tiny_patch16_224 --batch-size 128 --opt lamb --sched step --dr 0.2 "
            "--decay-epochs 40.0",
            "deit/deit_tiny_patch16_224",
            {
                "TRAIN.OPTIMIZER.NAME": "lamb",
                "TRAIN.LR_SCHEDULER.NAME": "step", "TRAIN.LR_SCHEDULER.DECAY_RATE": 0.2,
                "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": 40,
            },
        ),
        # DeiT III's published settings.
        (
            "--model deit_small_patch16_224 --batch-size 256 --lr 4e-3 --epochs 800 --weight-decay 0.05 "
            "--sched cosine --input-size 224 --eval-crop-ratio 1.0 --reprob 0.0 --smoothing 0.0 "
            "--warmup-epochs 5 --drop 0.0 --seed 0 --opt fusedlamb --warmup-lr 1e-6 --mixup .8 --cutmix 1.0 "
            "--drop-path 0.05 --unscale-lr --repeated-aug --bce-loss --color-jitter 0.3 --ThreeAugment",
            "deit/deit_small_patch16_224",
            {
                "DATA.BATCH_SIZE": 256, "TRAIN.BASE_LR": 4e-3, "TRAIN.EPOCHS": 800, "TEST.CROP_RATIO": 1.0,
                "AUG.REPROB": 0.0, "MODEL.LABEL_SMOOTHING": 0.0, "TRAIN.OPTIMIZER.NAME": "fused_lamb",
                "MODEL.DROP_PATH_RATE": 0.05, "TRAIN.LR_SCALING": "none", "TRAIN.LOSS": "bce",
                "TRAIN.BCE_THRESHOLD": 0.0, "AUG.COLOR_JITTER": 0.3, "AUG.AUTO_AUGMENT": "3a",
            },
        ),
        # Its augmentation erases nothing, whatever --reprob says, and has a jitter of its own.
        (
            "--model deit_tiny_patch16_224 --batch-size 128 --ThreeAugment --src --reprob 0.25",
            "deit/deit_tiny_patch16_224",
            {
                "AUG.AUTO_AUGMENT": "3a", "AUG.CROP": "simple", "AUG.REPROB": 0.0, "AUG.COLOR_JITTER": 0.3,
            },
        ),
        # Only that augmentation looks at --src.
        ("--model deit_tiny_patch16_224 --src --batch-size 128", "deit/deit_tiny_patch16_224", {}),
    ],
)  # fmt: skip
def test_a_command_line_becomes_a_variant_and_what_differs_from_it(words, variant, expected):
    path, differing, _, _ = translate(words.split())
    assert path.relative_to(ROOT).as_posix() == f"configs/{variant}.yaml"
    assert differing == expected


def test_flags_without_counterpart_are_named_where_they_are_given():
    _, _, remarks, _ = translate(
        ["--model", "deit_tiny_patch16_224", "--cooldown-epochs", "5", "--dist-eval"]
    )
    assert [remark.split(":")[0] for remark in remarks] == ["--cooldown-epochs", "--dist-eval"]


@pytest.mark.parametrize(
    ("flags", "remarked"), [("", False), ("--opt lamb", True), ("--opt lamb --opt-eps 1e-7", False)]
)
def test_an_eps_that_would_be_the_optimizers_own_is_said(flags, remarked):
    remarks = translate(["--model", "deit_tiny_patch16_224", *flags.split()])[2]
    assert any(remark.startswith("--opt-eps: with 1e-08") for remark in remarks) == remarked


@pytest.mark.parametrize(
    ("launch", "start"),
    [
        ("", "python main.py"),
        ("python -u main.py", "python -u main.py"),
        ("torchrun --nproc_per_node gpu main_dhvt.py", "torchrun --nproc_per_node gpu main.py"),
        (
            "torchrun --nnodes=2 --nproc-per-node=4 a.py",
            "torchrun --nnodes=2 --nproc-per-node=4 main.py",
        ),
        (
            "python -m torch.distributed.launch --nproc_per_node=8 --use_env seeds/dhvt/train.py",
            "python -m torch.distributed.launch --nproc_per_node=8 --use_env main.py",
        ),
    ],
)
def test_the_program_may_have_any_name_and_its_launcher_stays(launch, start):
    """Half the processes would be another learning rate."""
    words = f"{launch} --model deit_tiny_patch16_224 --batch-size 128".split()
    _, differing, remarks, started = translate(words)
    assert (differing, remarks, started) == ({}, [], start.split())


@pytest.mark.parametrize(
    ("flags", "expected"), [("", "--nodes 2 --gpus 8"), ("--ngpus 4", "--nodes 2 --gpus 4")]
)
def test_a_job_of_submitit_is_one_of_ours(flags, expected):
    """Its machines and GPUs are defaults that nobody sees, and the learning rate depends on them."""
    words = f"python run_with_submitit.py --model deit_tiny_patch16_224 {flags} --timeout 100"
    remarks = translate(words.split())[2]
    assert f"`python tools/submit.py {expected} --` in place of `python main.py`" in remarks[-1]
    assert any(remark.startswith("--timeout: tools/submit.py --time") for remark in remarks)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model deit_tiny_patch16_224 --lrr 1", "unknown flag --lrr; near it are ['--lr'"),
        (
            "--model deit_tiny_patch16",
            "deit_tiny_patch16: there is no such variant; near it are ['deit_",
        ),
        ("--model dfformer_s18", "start from configs/dfformer/dfformer_s18.yaml"),
        (
            "./distributed_train.sh 8 /data --model dfformer_s18 -b 128 --opt adamw --lr 1e-3 --amp",
            "start from configs/dfformer/dfformer_s18.yaml",
        ),
        (
            "--model deit_tiny_patch16_224 --fuse_token",
            "--fuse_token is not a flag of --model deit",
        ),
        ("--model deit_tiny_patch16_224 --epochs many", "argument --epochs: invalid int value"),
        ("--model deit_tiny_patch16_224 --sched tanh", "LR_SCHEDULER.NAME='tanh' must be one of"),
        ("--model deit_tiny_patch16_224 --data-set MNIST", "--data-set MNIST must be one of"),
        (
            "--model deit_small_patch16_shrink_base --drop_loc 3,x",
            "--drop_loc '3,x' must be layers",
        ),
    ],
)
def test_what_cannot_be_translated_is_named(words, message, capsys):
    with pytest.raises(SystemExit):
        main(["--", *words.split()])
    assert message in capsys.readouterr().err


def test_the_line_and_the_file_say_the_same(tmp_path, capsys):
    """Launcher, values in brackets, and a file far from the variant's."""
    target = tmp_path / "mine.yaml"
    words = "python -m torch.distributed.launch --nproc_per_node=4 --use_env main.py --eval --resume b.pth "
    words += (
        "--model dhvt_tiny_imagenet_patch16 --data-set sketch --data-path /d --opt-betas 0.9 0.95"
    )
    main(["--yaml", str(target), "--", *words.split()])
    line = shlex.split(capsys.readouterr().out.splitlines()[0])
    assert line[: line.index("--cfg")] == words.split()[:6]
    _, args, flags = parse_args(line[line.index("--cfg") :])
    assert flags["EVAL_MODE"] is True
    assert flags["DATA.DATA_PATH"] == "/d"
    config = load_config(ROOT / args.cfg, args.opts, flags)
    assert config.DATA.DOMAINNET.DOMAINS == ["sketch"]
    assert load_config(target) == config
    assert next(iter(yaml.safe_load(target.read_text()))) == "BASE"


def test_the_defaults_are_checked_like_flags():
    """A recipe of DeiT's own is DeiT's command line, but for the batch of its scripts."""
    assert settings("--model deit_small_patch16_224") == LIKE_DEIT
