"""Batches are pure functions of (step, seed); nothing of the user's changes; the ends of data are told."""

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset, WeightedRandomSampler

from bilevel.data import DataSource, Full, Loader, Shuffled
from bilevel.layout import named_leaves
from bilevel.status import DataExhausted, InvalidProblem


class Noisy(Dataset):
    """Augments with all three random states."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.tensor([index, torch.rand(()).item(), random.random(), np.random.rand()])  # noqa: NPY002


class Stream(IterableDataset):
    """Has no length, and draws it."""

    def __iter__(self):
        yield from (torch.tensor([float(i), torch.rand(())]) for i in range(3 + int(torch.randint(4, ()))))


def generator():
    return torch.Generator().manual_seed(5)


X, T = torch.arange(20.0).reshape(10, 2), torch.arange(10)
SOURCES = {
    "full": lambda: Full((X, T)),
    "shuffled": lambda: Shuffled((X, T), 3),
    "shuffled_rest": lambda: Shuffled({"x": X, "t": T}, 3, drop_last=False, with_index=True),
    "shuffled_axis": lambda: Shuffled(X.reshape(2, 5, 2), 2, axis=1),
    "list": lambda: Loader([torch.tensor([float(i)]) for i in range(4)]),
    "augmented": lambda: Loader(DataLoader(Noisy(), batch_size=3, shuffle=True)),
    "own_generator": lambda: Loader(DataLoader(Noisy(), batch_size=3, shuffle=True, generator=generator())),
    "with_replacement": lambda: Loader(
        DataLoader(Noisy(), batch_size=2, sampler=RandomSampler(Noisy(), True, 70, generator=generator()))
    ),
    "weighted": lambda: Loader(DataLoader(Noisy(), batch_size=2, sampler=WeightedRandomSampler(torch.ones(10), 8))),
    "stream": lambda: Loader(DataLoader(Stream(), batch_size=2)),
}


def same(one, other):
    pairs = zip(named_leaves(one), named_leaves(other), strict=True)
    return all(a == b and torch.equal(u, v) for (a, u), (b, v) in pairs)


def random_state():
    return torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002


def equal_states(one, other):
    return torch.equal(one[0], other[0]) and one[1] == other[1] and all(map(np.array_equal, one[2], other[2]))


@pytest.mark.parametrize("name", SOURCES)
def test_batch_is_a_pure_function_of_step_and_seed(name):
    make = SOURCES[name]
    source = make()
    forward = {(step, seed): source.batch(step, seed) for seed in (0, 1) for step in range(12)}
    calls = [*forward, *forward]
    random.Random(0).shuffle(calls)
    scrambled = make()
    for step, seed in calls:
        torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
        assert same(scrambled.batch(step, seed), forward[step, seed]), (step, seed)
    assert same(make().batch(11, 1), forward[11, 1])
    if source.deterministic:
        assert all(same(batch, forward[0, 0]) for batch in forward.values())
    elif name != "list":
        assert not same(forward[0, 0], forward[0, 1])


@pytest.mark.parametrize("name", SOURCES)
def test_global_random_states_do_not_move(name):
    source = SOURCES[name]()
    before = random_state()
    for step in (0, 1, 7, 2):
        source.batch(step, 3)
    assert equal_states(random_state(), before)


def test_states_come_back_after_an_error_in_the_loader():
    class Broken(Dataset):
        broken = True

        def __len__(self):
            return 4

        def __getitem__(self, index):
            torch.rand(1)
            if self.broken and index == 2:
                raise OSError("disk")
            return torch.tensor([float(index)])

    data = Broken()
    source = Loader(DataLoader(data))
    before = random_state()
    first = source.batch(1, 0)
    with pytest.raises(OSError, match="disk"):
        source.batch(2, 0)
    assert equal_states(random_state(), before)
    assert torch.equal(source.batch(1, 0), first)
    data.broken = False
    assert float(source.batch(2, 0)) == 2.0


def test_generators_of_the_user_come_back():
    own, sampling = generator(), generator()
    loader = DataLoader(Noisy(), batch_size=2, sampler=RandomSampler(Noisy(), generator=sampling), generator=own)
    before = own.get_state(), sampling.get_state()
    source = Loader(loader)
    for step in (0, 6, 2):
        source.batch(step, 0)
    assert torch.equal(own.get_state(), before[0])
    assert torch.equal(sampling.get_state(), before[1])


def test_users_tensors_do_not_change():
    x, t = X.clone(), T.clone()
    for name in ("full", "shuffled", "shuffled_rest", "shuffled_axis"):
        for step in range(6):
            SOURCES[name]().batch(step, 0)
    assert torch.equal(x, X)
    assert torch.equal(t, T)
    source = Shuffled((X, T), 3, with_index=True)
    first = [leaf.clone() for leaf in source.batch(0, 0)]
    for leaf in source.batch(0, 0):
        leaf.zero_()
    assert same(source.batch(0, 0), tuple(first))
    assert torch.equal(x, X)


def test_full_never_copies():
    data = {"x": X, "both": [T, (X,)]}
    batch = Full(data).batch(3, 0)
    assert batch["x"] is X
    assert batch["both"][1][0] is X
    marker = object()
    assert Full((X, marker)).batch(0, 0)[1] is marker


def test_arrays_keep_memory_and_dtype_where_they_can():
    array = np.arange(6.0).reshape(3, 2)
    tensor = Full(array).batch(0, 0)
    assert tensor.dtype == torch.float64
    assert tensor.data_ptr() == array.ctypes.data
    frozen = array.copy()
    frozen.flags.writeable = False
    assert torch.equal(Full(frozen).batch(0, 0), tensor)
    assert torch.equal(Full(array[::-1]).batch(0, 0), tensor.flip(0))
    assert Shuffled((array, np.arange(3, dtype=np.int32)), 2).batch(0, 0)[1].dtype == torch.int32
    with pytest.raises(InvalidProblem, match="'x' is an array of dtype object, which tensors lack"):
        Full({"x": np.array(["a", None])})


def test_each_epoch_covers_the_data_in_a_new_order():
    source = Shuffled((X, T), 2)
    assert len(source) == 5
    orders = []
    for epoch in range(3):
        batches = [source.batch(5 * epoch + position, 0) for position in range(5)]
        assert all(torch.equal(x, X[t]) for x, t in batches)
        orders.append(torch.cat([t for _, t in batches]).tolist())
        assert sorted(orders[-1]) == list(range(10))
    assert len({tuple(order) for order in orders}) == 3


def test_last_batch_of_an_epoch():
    dropped, kept = Shuffled(T, 4), Shuffled(T, 4, drop_last=False)
    assert (len(dropped), len(kept)) == (2, 3)
    assert [len(dropped.batch(step, 0)) for step in range(4)] == [4, 4, 4, 4]
    assert [len(kept.batch(step, 0)) for step in range(4)] == [4, 4, 2, 4]
    assert Shuffled(T, 10).batch(9, 0).sort().values.tolist() == list(range(10))


def test_index_is_appended():
    batch, index = Shuffled(T, 3, with_index=True).batch(0, 0)
    assert torch.equal(batch, index)
    assert len(Shuffled((X, T), 3, with_index=True).batch(0, 0)) == 3
    as_list = Shuffled([X, T], 3, with_index=True).batch(0, 0)
    assert isinstance(as_list, list)
    assert torch.equal(as_list[2], as_list[1])
    as_dict = Shuffled({"t": T}, 3, with_index=True).batch(0, 0)
    assert torch.equal(as_dict["index"], as_dict["t"])
    with pytest.raises(InvalidProblem, match="'index', which the data already have"):
        Shuffled({"index": T}, 3, with_index=True)


def test_blocks_share_their_indices():
    blocks = torch.stack([T, T + 100])
    batch = Shuffled(blocks, 4, axis=1).batch(2, 7)
    assert batch.shape == (2, 4)
    assert torch.equal(batch[0] + 100, batch[1])
    assert torch.equal(Shuffled(blocks, 4, axis=-1).batch(2, 7), batch)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Shuffled(T, 11), "batch_size=11 exceeds the 10 examples"),
        (lambda: Shuffled(T, 0), "must be a positive int, got 0"),
        (lambda: Shuffled(T, 2.0), "must be a positive int, got 2.0"),
        (lambda: Shuffled(T, 2, axis=1), r"'data' has no axis 1 to draw examples from: \(10,\)"),
        (lambda: Shuffled((X, "text"), 2), r"'\[1\]' has no axis 0 to draw examples from: str"),
        (lambda: Shuffled({"x": X, "t": T[:9]}, 2), r"differ: {'x': 10, 't': 9}"),
        (lambda: Shuffled((X, T.to("meta")), 2), "devices differ"),
        (lambda: Shuffled(T, 2).batch(-1, 0), "step must be >= 0"),
        (lambda: Loader([X]).batch(-1, 0), "step must be >= 0"),
        (lambda: Loader(iter([X])), "a list_iterator gives them once or not at all; pass a DataLoader"),
        (lambda: Loader(x for x in [X]), "a generator gives them once"),
        (lambda: Loader(3), "a int gives them once or not at all"),
        (lambda: Loader(DataLoader(Noisy(), num_workers=1, persistent_workers=True)), "persistent_workers=False"),
        (lambda: Loader(DataLoader(Noisy(), num_workers=1, in_order=False)), "in_order=True"),
    ],
)
def test_unusable_sources_are_refused(make, message):
    with pytest.raises(InvalidProblem, match=message):
        make()


def stop_early():
    class Short(list):
        def __len__(self):
            return 4

    return Short([X, X])


class Once:
    """Hides that it can be iterated only once."""

    def __init__(self):
        self.batches = iter([X, X])

    def __iter__(self):
        return self.batches


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Full((X, T[:0])), r"empty batch: '\[1\]' has shape \(0,\)"),
        (lambda: Full(torch.zeros(0)), r"empty batch: 'data' has shape \(0,\)"),
        (lambda: Shuffled(X[:0], 1), "empty batch"),
        (lambda: Shuffled([], 1), "hold no tensor"),
        (lambda: Loader([]), "loader has length 0"),
        (lambda: Loader(DataLoader(TensorDataset(X[:3]), batch_size=4, drop_last=True)), "loader has length 0"),
        (lambda: Loader([X[:0]]).batch(0, 0), "empty batch"),
        (lambda: Loader(set_of_nothing()).batch(0, 0), "gave no batch at all"),
        (lambda: Loader(stop_early()).batch(2, 0), "has length 4 but gave 2 batches in epoch 0"),
        (lambda: [Loader(source).batch(step, 0) for source in [Once()] for step in [5]], "must start anew each time"),
    ],
)
def test_the_end_of_data_is_told(make, message):
    with pytest.raises(DataExhausted, match=message):
        make()


def set_of_nothing():
    class Nothing:
        def __iter__(self):
            return iter(())

    return Nothing()


def test_loader_reads_on_over_epochs():
    batches = [torch.tensor([float(i)]) for i in range(3)]
    source = Loader(batches)
    assert [int(source.batch(step, 0)) for step in range(8)] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert int(Loader(batches).batch(10**9, 0)) == 1


def test_loader_takes_one_batch_for_the_next_step():
    class Counted:
        taken = started = 0

        def __len__(self):
            return 5

        def __iter__(self):
            self.started += 1
            for i in range(5):
                self.taken += 1
                yield torch.tensor([float(i)])

    loader = Counted()
    source = Loader(loader)
    for step in range(5):
        source.batch(step, 0)
        source.batch(step, 0)
    assert (loader.taken, loader.started) == (5, 1)
    source.batch(2, 0)
    assert (loader.taken, loader.started) == (8, 2)


def test_epochs_of_a_loader_differ_and_cover():
    source = Loader(DataLoader(TensorDataset(T), batch_size=5, shuffle=True))
    epochs = [torch.cat([source.batch(2 * epoch + i, 0)[0] for i in range(2)]).tolist() for epoch in range(2)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))


def test_augmentation_differs_from_batch_to_batch():
    source = SOURCES["augmented"]()
    noise = torch.cat([source.batch(step, 0)[:, 1:] for step in range(8)])
    assert all(len(column.unique()) == len(noise) for column in noise.T)


def test_an_empty_batch_is_told_each_time():
    source = Loader([X, X[:0]])
    source.batch(0, 0)
    for _ in range(2):
        with pytest.raises(DataExhausted, match="empty batch"):
            source.batch(1, 0)


def test_workers_give_pure_batches():
    make = lambda: Loader(DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=1))  # noqa: E731
    source = make()
    second, third = source.batch(1, 0).clone(), source.batch(2, 0).clone()
    before = random_state()
    assert torch.equal(source.batch(1, 0), second)
    assert torch.equal(make().batch(2, 0), third)
    assert equal_states(random_state(), before)


def test_loader_survives_copy_and_pickle():
    source = SOURCES["list"]()
    source.batch(1, 0)
    for twin in (copy.deepcopy(source), pickle.loads(pickle.dumps(source))):
        assert same(twin.batch(2, 0), source.batch(2, 0))


@pytest.mark.parametrize("name", SOURCES)
def test_to_moves_the_batches(name):
    moved = SOURCES[name]().to("cpu")
    assert type(moved) is type(SOURCES[name]())
    assert same(moved.batch(4, 1), SOURCES[name]().batch(4, 1))
    if name in ("full", "list"):
        assert all(leaf.device.type == "meta" for _, leaf in named_leaves(SOURCES[name]().to("meta").batch(0, 0)))


def test_a_source_of_ones_own():
    class Constant(DataSource):
        deterministic = True

        def batch(self, step, seed):
            return X

    assert Constant().batch(0, 0) is X
    with pytest.raises(InvalidProblem, match=r"Constant cannot be moved to cpu; override to\(\)"):
        Constant().to("cpu")


def test_permutations_are_drawn_on_the_device(device):
    source = Shuffled((X, T), 3, with_index=True).to(device)
    x, t, index = source.batch(4, 0)
    assert x.device.type == t.device.type == index.device.type == device
    assert torch.equal(t, index)
