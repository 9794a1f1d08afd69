"""``ParameterSpace``: the only flatten and unflatten, and the digest that tells states apart."""

import struct
from contextlib import suppress
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from subspace_optim._validation import ArgumentError
from subspace_optim.curvature import ParameterSpace
from subspace_optim.curvature.digests import digest, in_few_vectors
from subspace_optim.curvature.names import fits, near_misses
from tests.dense import TiedMLP

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Parameters(nn.Module):
    """A model that is no more than its parameters."""

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor))


def odd_shapes(dtype: torch.dtype = torch.float32) -> Parameters:
    """A scalar, a vector, an empty tensor, and two that are not contiguous."""
    numbers = torch.arange(40).to(dtype)
    return Parameters(
        scalar=numbers[0].clone(),
        vector=numbers[1:6].clone(),
        empty=numbers[:0].clone(),
        transposed=numbers[6:18].clone().view(3, 4).T,
        strided=numbers[18:30].clone().view(6, 2)[:, 1],
    )


# --- flatten and unflatten ----------------------------------------------------------------------


def test_flatten_puts_the_parameters_in_order_and_unflatten_puts_them_back():
    space = ParameterSpace(odd_shapes())
    expected = [0, *range(1, 6), *(6 + 4 * j + i for i in range(4) for j in range(3))]
    expected += [19, 21, 23, 25, 27, 29]
    flat = space.flatten(space.tensors)
    assert flat.tolist() == expected
    assert space.size == len(expected)
    assert space.names == ["scalar", "vector", "empty", "transposed", "strided"]
    for view, p in zip(space.unflatten(flat), space.tensors, strict=True):
        assert torch.equal(view, p)


def test_unflatten_gives_views_and_flatten_a_new_vector():
    space = ParameterSpace(odd_shapes())
    flat = torch.zeros(space.size)
    for view in space.unflatten(flat):
        view.add_(1)
    assert flat.tolist() == [1.0] * space.size
    copied = space.flatten(space.tensors)
    copied.fill_(-7)
    assert all((p >= 0).all() for p in space.tensors)


def test_zeros_stand_for_a_tensor_that_is_not_there():
    space = ParameterSpace(Parameters(a=torch.ones(2), b=torch.ones(3), c=torch.ones(1)))
    flat = space.flatten([torch.full((2,), 4.0), None, torch.full((1,), 5.0)])
    assert flat.tolist() == [4, 4, 0, 0, 0, 5]


def test_flatten_takes_sparse_tensors_and_another_dtype():
    space = ParameterSpace(Parameters(a=torch.ones(2), b=torch.ones(2)))
    precise = torch.tensor([1 + 2**-40, 0.0], dtype=torch.float64)
    flat = space.flatten([precise, precise.to_sparse()], torch.float64)
    assert flat.dtype == torch.float64
    assert torch.equal(flat, precise.repeat(2))


@pytest.mark.parametrize("length", [2, 4])
def test_flatten_wants_one_tensor_a_parameter(length):
    space = ParameterSpace(Parameters(a=torch.ones(2), b=torch.ones(2), c=torch.ones(2)))
    with pytest.raises(ValueError, match="zip"):
        space.flatten([torch.ones(2)] * length)


@pytest.mark.parametrize("dtype", FLOATS)
def test_vectors_are_float64_for_float64_parameters_and_float32_for_all_others(dtype):
    space = ParameterSpace(odd_shapes(dtype))
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert space.dtype == expected
    assert space.flatten(space.tensors).dtype == expected
    assert space.flatten(space.tensors)[-1] == 29


def test_one_float64_parameter_makes_all_vectors_float64():
    mixed = Parameters(a=torch.ones(1, dtype=torch.bfloat16), b=torch.ones(1, dtype=torch.float64))
    assert ParameterSpace(mixed).dtype == torch.float64


def tower(layers: int, seed: int = 0) -> nn.Sequential:
    """Many small tensors, under long names."""
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(layers)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_vector_of_many_small_tensors_is_what_one_by_one_gives(dtype):
    model = tower(100).to(dtype)
    space = ParameterSpace(model)
    numbers = [float(x) for p in model.parameters() for x in p.detach().double().flatten()]
    assert space.flatten(space.tensors).double().tolist() == numbers
    assert space.flatten(space.tensors, torch.float64).tolist() == numbers


def test_the_vector_of_one_parameter_has_memory_of_its_own():
    space = ParameterSpace(Parameters(p=torch.ones(3)))
    space.flatten(space.tensors).zero_()
    assert space.tensors[0].tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_found_wherever_it_is(value, dtype):
    model = Parameters(
        empty=torch.zeros(0, dtype=dtype),
        small=torch.zeros(2, 2, dtype=dtype),
        large=torch.zeros(5000, dtype=dtype),
        last=torch.zeros((), dtype=dtype),
    )
    space = ParameterSpace(model)
    assert space.is_finite()
    for name, at in [("small", (1, 0)), ("large", 4999), ("last", ())]:
        getattr(model, name).data[at] = value
        assert not space.is_finite()
        getattr(model, name).data[at] = 3
        assert space.is_finite()


# --- which parameters ---------------------------------------------------------------------------


def test_tied_parameters_count_once():
    space = ParameterSpace(TiedMLP())
    assert space.names == ["first.weight", "first.bias", "second.bias", "head.weight", "head.bias"]
    assert space.size == 9 + 3 + 3 + 6 + 2


def test_frozen_parameters_are_left_out():
    model = odd_shapes()
    model.vector.requires_grad_(False)
    space = ParameterSpace(model)
    assert "vector" not in space.names
    assert space.size == 19


def test_params_choose_and_order_the_coordinates():
    model = odd_shapes()
    space = ParameterSpace(model, iter([model.strided, model.scalar]))
    assert space.names == ["strided", "scalar"]
    assert space.flatten(space.tensors).tolist() == [19, 21, 23, 25, 27, 29, 0]
    assert ParameterSpace(model, model.vector).names == ["vector"]


def test_params_may_be_a_pattern_of_names_or_a_predicate():
    model = nn.ModuleDict({"head": odd_shapes(), "body": odd_shapes()})
    space = ParameterSpace(model, "body.*e*")
    assert space.names == ["body.vector", "body.empty", "body.transposed", "body.strided"]
    space = ParameterSpace(model, lambda name, p: name.startswith("head") and p.dim() == 1)
    assert space.names == ["head.vector", "head.empty", "head.strided"]
    with pytest.raises(ArgumentError, match=r"params is 'tail', .* such as 'head.scalar', 'head"):
        ParameterSpace(model, "tail")
    with pytest.raises(ArgumentError, match=r"params is 'Linear', .* what its `parameters\(\)`"):
        ParameterSpace(model, nn.Linear(1, 1))
    with pytest.raises(ArgumentError, match=r"called with the name and the tensor of each"):
        ParameterSpace(model, lambda *_: False)


def test_params_may_be_beginnings_and_several_patterns_beside_tensors():
    model = nn.ModuleDict({"head": odd_shapes(), "body": odd_shapes(), "head2": odd_shapes()})
    own = [name for name, _ in model.named_parameters() if name.startswith("head.")]
    assert ParameterSpace(model, "head").names == own  # and nothing of head2
    space = ParameterSpace(model, ["body.s*", model["head"].vector, "*.strided"])
    strided = [f"{part}.strided" for part in ("head", "head2")]
    assert space.names == ["body.scalar", "body.strided", "head.vector", *strided]
    with pytest.raises(ArgumentError, match="without repetition"):
        ParameterSpace(model, [model["head"].vector, "head.v*"])


NAMES = [f"blocks.{i}.{part}.weight" for i in (0, 1) for part in ("attn", "mlp")] + ["lm_head.bias"]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("*.atn.*", "Did you mean '*.attn.*'?"),
        ("block.*.attn.*", "Did you mean 'blocks.*.attn.*'?"),
        ("blocks.1.atn.wieght", "Did you mean 'blocks.1.attn.weight'?"),
        ("attn", "Did you mean '*.attn'?"),  # all of the name, or its beginning
        ("attn.*", "Did you mean '*.attn.*'?"),
        ("*.atn*.*", "Did you mean '*.attn*.*'?"),
        ("lmhead", "Did you mean 'lm_head'?"),
        ("module.lm_head.bias", "Did you mean 'lm_head.bias'?"),  # as a wrapper has it
        (
            "decoder.*.q",
            f"The parameters have names such as {NAMES[0]!r}, {NAMES[1]!r}, {NAMES[2]!r}.",
        ),
    ],
)
def test_a_pattern_that_means_nothing_is_told_what_it_may_have_meant(pattern, said):
    assert near_misses(pattern, NAMES) == said
    assert not any(fits(name, pattern) for name in NAMES)


@pytest.mark.parametrize(
    ("name", "value", "state"),
    [("vector", None, "gone"), ("vector", torch.ones(2), r"of shape \(2,\)")],
)
def test_a_parameter_that_is_gone_or_of_another_shape_is_named(name, value, state):
    model = nn.ModuleDict({"head": odd_shapes()})
    space = ParameterSpace(model)
    setattr(model["head"], name, None if value is None else nn.Parameter(value))
    with pytest.raises(ArgumentError, match=f"parameter 'head.{name}' is '{state}', .* of .5,"):
        _ = space.tensors
    del model["head"]
    with pytest.raises(
        ArgumentError, match=r"parameter 'head.scalar' is 'gone', but must be of \(\)"
    ):
        _ = space.tensors


def _frozen() -> nn.Module:
    return odd_shapes().requires_grad_(False)


def _half_frozen(model: nn.Module) -> list[Tensor]:
    model.vector.requires_grad_(False)
    return [model.scalar, model.vector]


@pytest.mark.parametrize(
    ("make", "choose", "message"),
    [
        (
            _frozen,
            lambda model: None,
            r"params is \[\], but must be at least one .* no parameter that requires a gradient",
        ),
        (
            odd_shapes,
            lambda model: [],
            r"params is \[\], but must be at least one parameter\. Leave `params` out",
        ),
        (
            odd_shapes,
            lambda model: [model.scalar, nn.Parameter(torch.zeros(3, 4))],
            r"params\[1\] is \(3, 4\), but must be a parameter of the model",
        ),
        (
            odd_shapes,
            lambda model: [model.vector, "scaler"],
            r"params is 'scaler', but must be a pattern of .* name. Did you mean 'scalar'\?",
        ),
        (odd_shapes, _half_frozen, r"parameter 'vector' is 'frozen', but must be trainable"),
        (
            lambda: Parameters(a=torch.zeros(2), z=torch.zeros(2, dtype=torch.complex64)),
            lambda model: None,
            r"parameter 'z' is torch.complex64, but must be real",
        ),
        (
            lambda: Parameters(s=torch.eye(2).to_sparse()),
            lambda model: None,
            r"parameter 's' is torch.sparse_coo, but must be dense",
        ),
        (
            odd_shapes,
            lambda model: [model.scalar, model.vector, model.scalar],
            r"params is 'a list of 3', but must be without repetition",
        ),
        (
            lambda: Parameters(a=torch.zeros(2), b=torch.zeros(2, device="meta")),
            lambda model: None,
            r"devices of params is 'cpu, meta', but must be one device",
        ),
    ],
    ids=[
        "all_frozen",
        "empty",
        "foreign",
        "name",
        "one_frozen",
        "complex",
        "sparse",
        "twice",
        "two_devices",
    ],
)
def test_parameters_that_cannot_be_used_are_named(make, choose, message):
    model = make()
    with pytest.raises(ArgumentError, match=message):
        ParameterSpace(model, choose(model))


def test_lazy_layers_have_to_see_a_batch_first():
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
    with pytest.raises(
        ArgumentError, match=r"'0\.weight' is 'uninitialized'.* Call the model on a"
    ):
        ParameterSpace(model)
    model(torch.ones(3, 2))
    assert ParameterSpace(model).size == 4 * 2 + 4 + 4 + 4


def test_frozen_and_complex_parameters_do_no_harm_where_they_are_not_asked_for():
    model = Parameters(a=torch.zeros(2), z=torch.zeros(2, dtype=torch.complex64))
    assert ParameterSpace(model, [model.a]).names == ["a"]
    model.z.requires_grad_(False)
    assert ParameterSpace(model).names == ["a"]


def test_inside_of_a_promise_parameters_are_looked_up_once_and_after_it_anew():
    model = tower(2)
    space = ParameterSpace(model)
    before, new = space.tensors, nn.Linear(3, 3)
    with suppress(KeyError), space.looked_up_once():
        model[0][0] = new
        assert all(a is b for a, b in zip(space.tensors, before, strict=True))
        raise KeyError
    assert space.tensors[0] is new.weight


def test_a_module_that_was_replaced_is_followed_and_one_that_is_gone_is_named():
    model = nn.Sequential(tower(3), nn.Linear(3, 3))
    space = ParameterSpace(model, "0.*")
    model[0] = other = tower(3, seed=1)
    assert all(a is b for a, b in zip(space.tensors, other.parameters(), strict=True))
    model[0][1] = nn.Identity()
    with pytest.raises(ArgumentError, match=r"parameter '0\.1\.0\.weight' is 'gone'"):
        space.tensors  # noqa: B018


# --- the digest ---------------------------------------------------------------------------------


def space_of(*tensors: Tensor) -> ParameterSpace:
    return ParameterSpace(Parameters(**{f"p{i}": t for i, t in enumerate(tensors)}))


def randn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=100)
@given(data=st.data(), dtype=st.sampled_from(FLOATS), seed=st.integers(0, 99))
def test_any_single_bit_changes_the_digest(data, dtype, seed):
    space = space_of(randn(5, 3, dtype=dtype, seed=seed), randn(7, dtype=dtype, seed=seed + 1))
    before = space.digest()
    p = data.draw(st.sampled_from(space.tensors))
    width = p.element_size()
    bits = p.data.view(-1).view(INTEGERS[width])
    element = data.draw(st.integers(0, len(bits) - 1))
    bit = data.draw(st.integers(0, 8 * width - 1))
    mask = struct.unpack("q", struct.pack("Q", 1 << bit))[0]
    flipped = torch.tensor(mask).to(bits.dtype)
    bits[element] ^= flipped  # through `.data`: no version counter moves
    assert space.digest() != before
    bits[element] ^= flipped
    assert space.digest() == before


def _negate(p: Tensor) -> None:
    p.neg_()


def _negate_a_pair(p: Tensor) -> None:
    p[[0, 3]] = -p[[0, 3]]


def _swap_rows(p: Tensor) -> None:
    p[[1, 4]] = p[[4, 1]]


def _permute_rows(p: Tensor) -> None:
    p.copy_(p.roll(1, dims=0))


def _negate_one_raise_another(p: Tensor) -> None:
    p[0] *= -1
    p[1] *= 2


@pytest.mark.parametrize(
    "change", [_negate, _negate_a_pair, _swap_rows, _permute_rows, _negate_one_raise_another]
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_changes_of_several_elements_do_not_cancel(dtype, change):
    p = (torch.arange(24) + 1).to(dtype).view(6, 4)  # whole numbers: few bits, which may cancel
    space = space_of(p.clone(), p[:1].clone())
    before = space.digest()
    with torch.no_grad():
        change(space.tensors[0])
    assert space.digest() != before


@pytest.mark.parametrize("dtype", FLOATS)
def test_no_exchange_of_ones_and_twos_goes_unseen(dtype):
    """The worst values: 1.0 and 2.0 differ in high bits only, which a wide sum shifts out."""
    space = space_of(torch.tensor([1.0, 2.0]).repeat(24).to(dtype))
    p, before = space.tensors[0].data, space.digest()
    unseen = 0
    for i in range(0, 48, 2):
        for j in range(1, 48, 2):
            p[i], p[j] = 2, 1
            unseen += space.digest() == before
            p[i], p[j] = 1, 2
    assert unseen == 0


@pytest.mark.parametrize("dtype", FLOATS)
def test_equal_contents_have_equal_digests(dtype):
    p = randn(6, 4, dtype=dtype, seed=0)
    strided = torch.zeros(6, 8, dtype=dtype)
    strided[:, ::2] = p
    digests = {space_of(t).digest() for t in (p, p.clone(), p.T.contiguous().T, strided[:, ::2])}
    assert len(digests) == 1


@pytest.mark.slow
def test_any_of_many_small_tensors_changes_the_digest():
    model = tower(350)
    space = ParameterSpace(model)
    seen = {space.digest()}
    for p in space.tensors:
        p.data.view(-1).view(torch.int32)[-1] ^= 1  # each time another state
        seen.add(space.digest())
    assert len(seen) == 701


def test_an_exchange_of_two_of_many_small_tensors_changes_the_digest():
    space = ParameterSpace(tower(40))
    before = space.digest()
    weights = space.tensors[::2]
    for a, b in pairwise(weights):
        a.data, b.data = b.data, a.data
        assert space.digest() != before
        a.data, b.data = b.data, a.data
    assert space.digest() == before


def test_where_one_tensor_ends_and_the_next_begins_changes_the_digest():
    zeros = torch.zeros(6)
    cuts = [[6], [2, 4], [1, 2, 3], [1] * 6]
    assert len({int(digest(zeros.split(cut))) for cut in cuts}) == len(cuts)


SIZES = st.sampled_from([0, 1, 3, 17, 4095, 4096, 4097, 9000])


@settings(max_examples=40)
@given(
    sizes=st.lists(SIZES, max_size=90),
    dtypes=st.lists(st.sampled_from([*FLOATS, torch.bool, torch.int64]), min_size=1, max_size=3),
)
def test_few_vectors_hold_every_element_once_and_no_copy_is_large(sizes, dtypes):
    """Counted by how often each value comes: tensor i holds i, modulo what its dtype tells."""
    tensors = [
        torch.full((size,), i % 2 if dtype == torch.bool else i).to(dtype)
        for i, (size, dtype) in enumerate(zip(sizes, dtypes * len(sizes), strict=False))
    ]
    owned = {t.untyped_storage().data_ptr() for t in tensors if t.numel()}
    found = list(in_few_vectors(tensors))
    assert sum(count for _, count in found) == len(tensors)
    for dtype in set(dtypes):
        expected = [x for t in tensors if t.dtype == dtype for x in t.tolist()]
        got = [x for vector, _ in found if vector.dtype == dtype for x in vector.tolist()]
        assert sorted(got) == sorted(expected)
    for vector, _ in found:
        if vector.numel() and vector.untyped_storage().data_ptr() not in owned:
            assert vector.numel() < 2**18 + 2**12


def test_tensors_of_several_dtypes_count_together():
    tensors = [torch.zeros(2, dtype=d) for d in (*FLOATS, torch.bool, torch.int64, torch.complex64)]
    seen = {int(digest(tensors))}
    for t in tensors:
        t[1] = 1
        seen.add(int(digest(tensors)))
        t[1] = 0
    assert len(seen) == 1 + len(tensors)


def test_a_tensor_that_moves_to_the_next_parameter_changes_the_digest():
    a, b = randn(4, dtype=torch.float32, seed=0), randn(4, dtype=torch.float32, seed=1)
    assert space_of(a, b).digest() != space_of(b, a).digest()


def test_the_digest_reaches_every_element_of_a_large_tensor():
    """Long tensors are read in pieces; the pieces must not be blind to each other's order."""
    n = (1 << 20) + 3
    space = space_of(torch.zeros(2 * n))
    p, seen = space.tensors[0].data, {space.digest()}
    for element in (0, 3, (1 << 20) - 1, 1 << 20, n, 2 * n - 1):
        p[element] = 1
        seen.add(space.digest())
        p[element] = 0
    assert len(seen) == 7


LAYOUTS = {
    "sparse_coo": lambda dense: dense.to_sparse(),
    "sparse_csr": lambda dense: dense.to_sparse_csr(),
    "sparse_csc": lambda dense: dense.to_sparse_csc(),
    "sparse_bsr": lambda dense: dense.to_sparse_bsr((2, 2)),
    "sparse_bsc": lambda dense: dense.to_sparse_bsc((2, 2)),
    "nested": lambda dense: torch.nested.nested_tensor([dense, dense[:1]]),
    "jagged": lambda dense: torch.nested.nested_tensor([dense, dense[:1]], layout=torch.jagged),
    "conjugated": lambda dense: torch.complex(dense, dense).conj(),
    "negated": lambda dense: torch.complex(dense, dense).conj().imag,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_tensors_of_all_layouts_have_a_digest_of_what_they_hold(layout):
    """A buffer may be a sparse adjacency matrix."""
    dense = torch.zeros(4, 6)
    dense[0, 1], dense[2, 3], dense[3, 5] = 1.0, 2.0, 3.0
    make = LAYOUTS[layout]
    seen = {int(digest([make(dense)]))}
    assert int(digest([make(dense.clone())])) in seen
    for row, column, value in [(0, 1, 1.5), (2, 3, -2.0), (1, 0, 1.0), (3, 5, 0.0)]:
        other = dense.clone()
        other[row, column] = value
        seen.add(int(digest([make(other)])))
    moved = dense.roll(2, dims=1)  # the same values in other places
    assert len(seen | {int(digest([make(moved)]))}) == 6


def test_the_digest_of_a_sparse_tensor_does_not_see_in_which_order_its_entries_were_given():
    indices, values = torch.tensor([[2, 0, 1], [1, 0, 1]]), torch.tensor([1.0, 2.0, 3.0])
    first = torch.sparse_coo_tensor(indices, values, (3, 2), check_invariants=True)
    second = torch.sparse_coo_tensor(
        indices.flip(1), values.flip(0), (3, 2), check_invariants=True
    ).coalesce()
    assert int(digest([first])) == int(digest([second]))
