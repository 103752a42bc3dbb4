"""Schedules against cases worked by hand."""

import pytest

from smi.errors import InputError
from smi.inversion.schedules import Event, Schedule, dense, make_schedule, patch_rebirth, scale_events, sparse

pytestmark = pytest.mark.fast


def actives(schedule):
    return [stage.active for stage in schedule.stages()]


def test_smi_keeps_the_published_counts():
    schedule = sparse(196)
    assert actives(schedule) == [196, 137, 95, 66, 46]
    assert [event.iteration for event in schedule.events] == [50, 100, 200, 300]
    assert schedule.images_per_trajectory == 1
    assert round(schedule.sparsity, 2) == 0.77


def test_counts_that_are_whole_but_for_rounding():
    assert actives(sparse(10, prune_at=[1], prune_ratio=0.1)) == [10, 9]  # 10 * (1 - 0.1) is 9.0, 10 * 0.3 is 3.0000000000000004
    assert actives(sparse(10, prune_at=[1], prune_ratio=0.7)) == [10, 3]


@pytest.mark.parametrize(("division", "patches"), [(2, 98), (4, 49), (7, 28)])
def test_pri_divides_the_patches(division, patches):
    schedule = patch_rebirth(196, division=division)
    assert schedule.images_per_trajectory == division
    assert schedule.patches_per_image == patches
    assert [event.count for event in schedule.events] == [patches] * (division - 1)
    assert [event.iteration for event in schedule.events] == [k * (4000 // division) for k in range(1, division)]
    assert {(event.which, event.fate) for event in schedule.events} == {("highest", "emit")}


def test_pri_drops_what_is_left_over_at_the_end():
    schedule = patch_rebirth(64, 70, division=7)  # 7 * 9 = 63
    assert schedule.patches_per_image == 9
    assert schedule.events[-1] == Event(70, 1, "lowest", "drop")
    assert actives(schedule) == [64, 55, 46, 37, 28, 19, 10]
    assert [(stage.start, stage.stop) for stage in schedule.stages()] == [(k, k + 10) for k in range(0, 70, 10)]


def test_dense_is_one_stage():
    assert [(stage.start, stage.stop, stage.active, stage.event) for stage in dense(9, 5).stages()] == [(0, 5, 9, None)]


def test_stages_cover_every_iteration_once():
    for schedule in (dense(196), sparse(196), patch_rebirth(196, division=7), patch_rebirth(50, 99, division=3)):
        covered = [t for stage in schedule.stages() for t in range(stage.start, stage.stop)]
        assert covered == list(range(schedule.iterations))


def test_events_scale_and_stay_distinct():
    assert scale_events((50, 100, 200, 300), 4000) == [50, 100, 200, 300]
    assert scale_events((50, 100, 200, 300), 400) == [5, 10, 20, 30]
    assert scale_events((50, 100, 200, 300), 20) == [1, 2, 3, 4]


def test_no_augmentation_before_and_at_an_event():
    assert sparse(196).still_iterations() == {49, 50, 99, 100, 199, 200, 299, 300}
    assert patch_rebirth(64, 70, division=7).still_iterations() == {9, 10, 19, 20, 29, 30, 39, 40, 49, 50, 59, 60, 69}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: patch_rebirth(196, division=197), "division must lie between 1 and the number of patches, 196"),
        (lambda: patch_rebirth(196, division=0), "division must lie between"),
        (lambda: patch_rebirth(196, 3, division=7), "needs at least 7 iterations"),
        (lambda: sparse(196, prune_at=[100, 50]), "events must come in order"),
        (lambda: sparse(196, prune_at=[50, 50]), "events must come in order"),
        (lambda: sparse(196, prune_at=[0]), "events must come in order"),
        (lambda: sparse(196, 100, prune_at=[101]), "from 1 to 100"),
        (lambda: sparse(4, prune_at=[1, 2, 3], prune_ratio=0.5), "leave at least 1"),
        (lambda: sparse(196, prune_ratio=1.5), "prune_ratio must lie between 0 and 1"),
        (lambda: dense(196, 0), "iterations must be at least 1"),
        (lambda: Schedule(9, 9, (Event(1, 1, "middle", "drop"),)), "'lowest' or 'highest'"),
        (lambda: Schedule(9, 9, (Event(1, 4, "highest", "emit"),)), "same number of patches"),
        (lambda: make_schedule("sparse", 196, 100), "unknown method 'sparse': it must be one of dense, smi, pri"),
        (lambda: make_schedule("dense", 196, 100, division=2), "'dense' does not take division"),
    ],
)
def test_bad_schedules_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_own_schedule_may_mix_fates():
    schedule = Schedule(10, 9, (Event(2, 4, "lowest", "drop"), Event(5, 3, "highest", "emit")))
    assert schedule.images_per_trajectory == 2
    assert schedule.patches_per_image == 3
