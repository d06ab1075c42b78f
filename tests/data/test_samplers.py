"""Which images make up which batch, on one process and on many."""

import logging
from itertools import chain

import pytest

from data.samplers import EvalBatchSampler, TrainBatchSampler


def flat(batches):
    return list(chain.from_iterable(batches))


def indices(batches):
    return [[key.index for key in batch] for batch in batches]


def epoch(world_size, batch_size, num_samples=101, number=0, **options):
    """Batches of every process of one epoch: [rank][batch][place]."""
    ranks = []
    for rank in range(world_size):
        sampler = TrainBatchSampler(
            num_samples, batch_size, rank=rank, world_size=world_size, **options
        )
        sampler.set_position(number)
        ranks.append(indices(sampler))
    return ranks


@pytest.mark.parametrize("world_size", [1, 2, 3, 40])
def test_every_image_is_evaluated_once_in_the_same_batches_on_any_number_of_processes(world_size):
    """Trap 13: padding samplers count images twice; Swin weights batch means by local sizes."""
    whole = indices(EvalBatchSampler(101, 8))
    parts = [
        indices(EvalBatchSampler(101, 8, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert sorted(flat(parts)) == whole
    assert flat(whole) == list(range(101))
    for rank, part in enumerate(parts):
        sampler = EvalBatchSampler(101, 8, rank=rank, world_size=world_size)
        assert len(sampler) == len(part)
        assert sampler.indices() == flat(part)


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 12), (2, 6), (3, 4)])
def test_an_epoch_draws_no_image_twice_and_all_processes_have_as_many_full_batches(
    world_size, batch_size
):
    ranks = epoch(world_size, batch_size)
    assert {len(batches) for batches in ranks} == {101 // 12}
    drawn = [index for batches in ranks for batch in batches for index in batch]
    assert len(drawn) == len(set(drawn)) == 8 * 12


@pytest.mark.parametrize("repeats", [1, 3])
def test_global_batches_do_not_depend_on_the_number_of_processes(repeats):
    def global_batches(world_size, batch_size):
        ranks = epoch(world_size, batch_size, repeats=repeats)
        return [sorted(flat(parts)) for parts in zip(*map(tuples, ranks), strict=True)]

    def tuples(batches):
        return [tuple(batch) for batch in batches]

    assert global_batches(1, 12) == global_batches(2, 6) == global_batches(3, 4)


def test_every_epoch_has_another_order_that_the_seed_decides():
    assert epoch(1, 10, number=0) == epoch(1, 10, number=0)
    assert epoch(1, 10, number=0) != epoch(1, 10, number=1)
    assert epoch(1, 10, seed=1) != epoch(1, 10, seed=5)


def test_an_epoch_can_start_in_the_middle():
    """Trap 16: resuming must restore the sampler's position."""
    sampler = TrainBatchSampler(101, 10, seed=3)
    sampler.set_position(4)
    whole = list(sampler)
    sampler.set_position(4, start_batch=7)
    assert list(sampler) == whole[7:]
    assert len(sampler) == len(whole) == 10
    with pytest.raises(ValueError, match="start_batch=11 must be from 0 to 10"):
        sampler.set_position(4, start_batch=11)


def test_a_saved_position_continues_on_another_number_of_processes(caplog):
    one = TrainBatchSampler(101, 12)
    one.set_position(2)
    state = one.state(next_batch=5)
    rest = []
    for rank in range(3):
        sampler = TrainBatchSampler(101, 4, rank=rank, world_size=3)
        assert sampler.load_state(state) == (2, 5)
        rest.append(indices(sampler))
    one.set_position(2, 5)
    for batch, *parts in zip(indices(one), *rest, strict=True):
        assert sorted(batch) == sorted(flat(parts))
    assert not caplog.records


def test_a_saved_position_that_cannot_be_kept_exactly_warns(caplog):
    state = TrainBatchSampler(101, 12).state(next_batch=1)
    with caplog.at_level(logging.WARNING):
        assert TrainBatchSampler(101, 5, seed=9).load_state(state) == (0, 2)
    assert "seed was 0 and is 9" in caplog.text
    assert "2 images are seen again" in caplog.text


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (dict(fixed_shards=True), dict(world_size=2), "shards was 1 and is 2"),
        (dict(repeats=3), dict(), "repeats was 3 and is 1"),
    ],
)
def test_a_saved_position_in_an_epoch_of_another_order_warns(before, after, message, caplog):
    """Zip files whose images each process keeps; repeated augmentation switched off."""
    state = TrainBatchSampler(96, 8, **before).state(next_batch=2)
    with caplog.at_level(logging.WARNING):
        TrainBatchSampler(96, 4, **(before if after else {}), **after).load_state(state)
    assert message in caplog.text


def test_positions_of_older_checkpoints_are_taken_as_they_are(caplog):
    state = TrainBatchSampler(96, 8, repeats=3).state(next_batch=2)
    del state["repeats"], state["shards"]
    assert TrainBatchSampler(96, 8, repeats=3).load_state(state) == (0, 2)
    assert not caplog.records


def test_repeated_augmentation_spreads_the_copies_of_an_image_over_the_processes():
    samplers = [TrainBatchSampler(300, 8, rank=r, world_size=3, repeats=3) for r in range(3)]
    epochs = [[key for batch in sampler for key in batch] for sampler in samplers]
    assert len(samplers[0]) == 300 // 24
    for copies in zip(*epochs, strict=True):
        assert len({key.index for key in copies}) == 1
        assert [key.copy for key in copies] == [0, 1, 2]
    assert len({key.index for key in epochs[0]}) == 8 * (300 // 24)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_repeated_augmentation_is_the_same_on_any_number_of_processes(world_size):
    """The same images with the same copies, batch by batch; copies on different processes, as in DeiT.

    Process r has places r, r + world_size, ... of the sequence i, i, i, j, j, j, ... .
    """
    samplers = [
        TrainBatchSampler(120, 12 // world_size, rank=r, world_size=world_size, repeats=3)
        for r in range(world_size)
    ]
    whole = list(TrainBatchSampler(120, 12, repeats=3))
    batches = [list(parts) for parts in zip(*samplers, strict=True)]
    assert [sorted(flat(parts)) for parts in batches] == [sorted(batch) for batch in whole]
    for parts in batches:
        shares = {}  # image -> number of its copies on each process
        for rank, part in enumerate(parts):
            for key in part:
                shares.setdefault(key.index, [0] * world_size)[rank] += 1
        assert all(sum(share) == 3 for share in shares.values())
        assert all(max(share) - min(share) <= 1 for share in shares.values())
    drawn = flat(whole)
    assert len(set(drawn)) == len(drawn) == 3 * len({key.index for key in drawn})


def test_with_fixed_shards_a_process_draws_its_own_share_only():
    ranks = epoch(3, 4, fixed_shards=True)
    assert {len(batches) for batches in ranks} == {101 // 12}
    for rank, batches in enumerate(ranks):
        drawn = flat(batches)
        assert {index % 3 for index in drawn} == {rank}
        assert len(drawn) == len(set(drawn))
        sampler = TrainBatchSampler(101, 4, rank=rank, world_size=3, fixed_shards=True)
        assert set(drawn) <= set(sampler.indices())
    assert epoch(1, 10, fixed_shards=True) == epoch(1, 10)


def test_less_data_than_one_global_batch_is_an_error_with_the_numbers():
    with pytest.raises(
        ValueError, match=r"has 101 images.* needs 128 .*DATA.BATCH_SIZE.*at most 50"
    ):
        TrainBatchSampler(101, 64, world_size=2)
