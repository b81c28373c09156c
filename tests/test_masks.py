"Mask calculators: exact numbers of zeros, ties by index, and pictures of what each pattern does"
import math,numpy as np,pytest,torch
from hypothesis import given,settings,strategies as st
from hypothesis.extra import numpy as hnp
from fastsparse_create.masks.core import *
from fastsparse_create.masks.core import _top_cuda
from fastsparse_create.masks.structured import *
from fastsparse_create.masks.nm import *

fast = settings(max_examples=150)
sparsities = st.one_of(st.floats(0, 1), st.sampled_from([0.,.25,.5,.75,1.]))
tied = st.sampled_from([0.,.5,1.,2.,-1.])
def scores(min_dims=1, max_dims=4, elements=None):
    "Tensors with many equal values, and with none"
    shapes = hnp.array_shapes(min_dims=min_dims, max_dims=max_dims, max_side=6)
    return shapes.flatmap(lambda s: hnp.arrays(np.float32, s, elements=elements or st.one_of(tied, st.floats(-10, 10, width=32)))).map(torch.from_numpy)

def picture(text):
    "Rows of `#` (kept) and `.` (masked)"
    return torch.tensor([[c=='#' for c in row] for row in text.split()])

def n_masked(mask): return (~mask).sum().item()

def promised(n, sparsity):
    "Zeros among `n`: below a sparsity of 1 one stays"
    return n if sparsity==1 else min(round(n*sparsity), max(0, n-1))

def obvious(flat, n_keep):
    "The slow and obvious way: highest first, among equals the first"
    kept = set(sorted(range(len(flat)), key=lambda i: (-flat[i],i))[:n_keep])
    return torch.tensor([i in kept for i in range(len(flat))], dtype=torch.bool)

# exact selection

@fast
@given(scores(), sparsities)
def test_exact_count_lowest_first_ties_by_index(x, sparsity):
    before = x.clone()
    mask = Unstructured()(x, sparsity)
    assert mask.dtype==torch.bool and mask.shape==x.shape and x.equal(before)
    assert n_masked(mask)==promised(x.numel(), sparsity)
    assert mask.flatten().equal(obvious(x.flatten().tolist(), x.numel()-promised(x.numel(), sparsity)))

@fast
@given(scores(), sparsities, sparsities)
def test_more_sparsity_masks_a_superset(x, a, b):
    a,b = sorted((a,b))
    assert not (Unstructured()(x, b)&~Unstructured()(x, a)).any()

@fast
@given(scores(), st.integers(0, 1300))
def test_selection_of_the_gpu_is_that_of_the_cpu(x, n_zero):
    n_zero = min(n_zero, x.numel())
    assert _top_cuda(x.flatten(), x.numel()-n_zero).equal(keep_highest(x, n_zero).flatten())

@pytest.mark.parametrize('n', [131_071,131_073,300_001])
@pytest.mark.parametrize('kind', ['normal','constant','few values','sorted','reversed','periodic','one outlier','half zeros','infinite'])
def test_long_arrays_are_selected_exactly(n, kind):
    "What is decided from a sample is decided like all else"
    x = torch.randn(n, generator=torch.Generator().manual_seed(0))
    if kind=='constant': x = torch.ones(n)
    if kind=='few values': x = (x*2).round()
    if kind=='sorted': x = x.sort().values
    if kind=='reversed': x = x.sort(descending=True).values
    if kind=='periodic': x = torch.where(torch.arange(n)%(n//(1<<15))==0, 5., x)
    if kind=='one outlier': x = torch.where(torch.arange(n)==n-1, 1e30, 0.)
    if kind=='half zeros': x = x.clamp(min=0)
    if kind=='infinite': x = torch.where(x>1, math.inf, torch.where(x<-1, -math.inf, x))
    order = torch.sort(x, descending=True, stable=True).indices
    for n_zero in (0,1,2,n//10,n//2,round(n*.9),round(n*.999),n-1,n):
        mask = keep_highest(x, n_zero)
        assert n_masked(mask)==n_zero and mask[order[:n-n_zero]].all(), n_zero

@pytest.mark.parametrize('dtype', [torch.float16,torch.bfloat16,torch.float32,torch.float64])
@pytest.mark.parametrize('n', [1000,200_000])
def test_every_precision_is_ranked_as_it_is(dtype, n):
    x = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    mask = keep_highest(x, round(n*.7))
    assert n_masked(mask)==round(n*.7) and x[mask].min()>=x[~mask].max()

def test_close_doubles_are_told_apart():
    x = 1+torch.arange(8, dtype=torch.float64)*1e-12
    assert keep_highest(x, 5).tolist()==[False]*5+[True]*3

@pytest.mark.parametrize('numel,sparsity,zeros', [(4,.5,2),(4,1.,4),(4,0.,0),(128,.8,102),(64,.8,51),(5,.5,2),(7,.5,4),(1,.5,0),(0,.5,0),
                                                  (2,.9,1),(4,.99,3),(1,.9,0),(1,1.,1),(0,.9,0),(0,1.,0)])
def test_number_of_zeros(numel, sparsity, zeros):
    "Half of an odd number rounds to the even neighbour, as Python's `round`; one is left below a sparsity of 1"
    assert n_zeros(numel, sparsity)==zeros==n_masked(Unstructured()(torch.ones(numel), sparsity))

@pytest.mark.parametrize('sparsity,zeros', [(0,0),(.1,1),(.3125,2),(.4375,4),(.8,6),(.95,7),(1,8)])
def test_counts_of_eight(sparsity, zeros):
    assert n_masked(Unstructured()(torch.tensor([.1,.9,.3,.7,.5,.2,.8,.4]), sparsity))==zeros

@pytest.mark.parametrize('sparsity', ['0.9', [.5], True, None, torch.tensor(.5)], ids=str)
def test_sparsity_is_a_number(sparsity):
    for f in (lambda: n_zeros(10, sparsity), lambda: Unstructured()(torch.ones(4), sparsity)):
        with pytest.raises(TypeError, match='sparsity must be a number, got'): f()

@pytest.mark.parametrize('sparsity', [-.1,1.1,math.nan,math.inf])
def test_sparsity_outside_of_0_to_1(sparsity):
    for f in (lambda: n_zeros(10, sparsity), lambda: Unstructured()(torch.ones(4), sparsity), lambda: global_masks([torch.ones(4)], sparsity)):
        with pytest.raises(ValueError, match='sparsity'): f()

@pytest.mark.parametrize('pattern', ['unstructured','[1, 2]','[2, 2]','filter','channel','block4'])
def test_nan_is_an_error(pattern):
    x = torch.ones(4,4)
    x[1,1] = math.nan
    for f in (lambda: get_mask_type(pattern)(x, .5), lambda: global_masks([x], .5, get_mask_type(pattern))):
        with pytest.raises(ValueError, match='NaN'): f()

def test_infinite_scores_are_no_nan():
    x = torch.tensor([math.inf,1,-math.inf,2])
    assert Unstructured()(x, .5).tolist()==[True,False,False,True]

def test_views_parameters_and_strides():
    x = torch.randn(6,8)
    assert Unstructured()(x.T, .5).equal(Unstructured()(x.T.contiguous(), .5))
    assert Unstructured()(torch.nn.Parameter(x), .5).equal(Unstructured()(x, .5))
    y = torch.randn(4,6,3,3)
    for name in ('unstructured','[2, 3]','filter','channel'):
        assert get_mask_type(name)(y.contiguous(memory_format=torch.channels_last), .5).equal(get_mask_type(name)(y, .5))

def test_selection_is_deterministic_and_uses_no_randomness():
    state = torch.get_rng_state(),str(np.random.get_state())
    x = torch.ones(300_000)
    assert Unstructured()(x, .3).equal(Unstructured()(x, .3)) and Unstructured()(x, .3)[:210_000].all()
    assert torch.get_rng_state().equal(state[0]) and str(np.random.get_state())==state[1]

# what stays when a sparsity leaves nothing

@pytest.mark.parametrize('pattern,kept', [('unstructured','.... ..#.'),('[1, 2]','.... ..##'),('block4','.... ####'),('[2, 2]','..## ..##'),('[-1, 1]','..#. ..#.'),
                                          ('filter','.... ####'),('channel','..#. ..#.'),('constant_fan_in','...# ..#.'),('[2, 4]','#### ####')])
def test_the_best_group_stays(pattern, kept):
    "At the highest sparsities one weight, or as many as go together; none if all are to go"
    x,mask_type = torch.tensor([[1,2,3,4],[1,2,9,1.]]),get_mask_type(pattern)
    for sparsity in (.9,.99,1-1e-9): assert mask_type(x, sparsity).equal(picture(kept)), sparsity
    assert mask_type.minimum(x.shape)==picture(kept).sum()
    assert not mask_type(x, 1.).any()

def test_of_an_incomplete_block_its_weights_stay():
    x = torch.tensor([[1,1,1,1,9.]])
    assert get_mask_type('block4')(x, .9).equal(picture('....#')) and get_mask_type('block4').minimum(x.shape)==4

@pytest.mark.parametrize('pattern', ['2:4','1:4','2:4-T','4:2:8'])
def test_patterns_within_groups_leave_enough(pattern):
    mask_type = get_mask_type(pattern)
    assert mask_type(torch.rand(8,8), mask_type.sparsity).any(1).all() and mask_type.minimum(torch.Size((8,8)))==0

# tiles

def test_square_tiles():
    x = torch.tensor([[9,9,1,1],[9,9,1,1],[2,2,5,5],[2,2,5,5.]])
    assert Block(2,2)(x, .5).equal(picture('##.. ##.. ..## ..##'))
    assert Block(2,2)(x, .75).equal(picture('##.. ##.. .... ....'))

def test_tiles_compete_by_their_mean():
    "One large weight doesn't save a tile"
    x = torch.tensor([[9,0,0,0, 3,3,3,3.]])
    assert Block(1,4)(x, .5).equal(picture('....####'))

def test_whole_dimensions():
    x = torch.tensor([[1,5,2],[1,5,3.]])
    assert Block(-1,1)(x, 1/3).equal(picture('.## .##'))
    assert Block(1,-1)(x, .5).equal(picture('... ###'))

def test_block4_runs_along_inputs_and_takes_an_incomplete_tail():
    x = torch.tensor([[1,1,1,1, 2,2,2,2, 3,3],[4,4,4,4, 5,5,5,5, 0,9.]])
    assert get_mask_type('block4')(x, 2/6).equal(picture('........## ##########'))
    conv = torch.zeros(1,4,1,2)
    conv[...,1] = 1
    assert get_mask_type('block4')(conv, .5).equal(conv.bool())

def test_equal_tiles_go_from_the_end():
    assert Block(1,2)(torch.ones(2,4), .5).equal(picture('#### ....'))

@pytest.mark.parametrize('shape', [(128,128),(16,64,3,3),(5,64,3,3),(8,12,5)])
@pytest.mark.parametrize('sparsity', [0.,.3,.8,1.])
def test_block4_is_one_by_four(shape, sparsity):
    x = torch.randn(shape).abs()
    assert get_mask_type('block4')(x, sparsity).equal(get_mask_type('[1, 4]')(x, sparsity))

tile_shapes = st.tuples(st.integers(1,3), st.integers(1,3), st.integers(1,4), st.integers(1,4), st.lists(st.integers(1,3), max_size=2))

@fast
@given(tile_shapes, sparsities, st.integers(0, 2**31))
def test_tiles_are_whole_and_counted_exactly(sizes, sparsity, seed):
    rows,cols,n_rows,n_cols,kernel = sizes
    x = torch.rand(rows*n_rows, cols*n_cols, *kernel, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    mask = Block(rows, cols)(x, sparsity)
    tiles = mask.flatten(2) if kernel else mask[...,None]
    tiles = tiles.unflatten(0, (n_rows,rows)).unflatten(2, (n_cols,cols)).transpose(1,2).flatten(2,3)
    assert (tiles.all(2)==tiles.any(2)).all()
    assert n_masked(tiles.all(2))==promised(tiles.all(2).numel(), sparsity) and mask.shape==x.shape and mask.is_contiguous()

@pytest.mark.parametrize('name,shape,message', [('[3, 1]',(4,4),'divide'),('[1, 3]',(4,4),'divide'),('[2, 2]',(8,),'dimensions'),('block4',(8,),'dimensions'),
                                                ('filter',(8,),'dimensions'),('channel',(8,),'dimensions')])
def test_shapes_that_do_not_fit(name, shape, message):
    with pytest.raises(ValueError, match=message): get_mask_type(name)(torch.ones(shape), .5)

# filters and channels

def test_filters_and_channels():
    x = torch.tensor([[1,1,9],[2,2,9],[3,3,9.]])
    assert get_mask_type('filter')(x, 1/3).equal(picture('... ### ###'))
    assert get_mask_type('channel')(x, 1/3).equal(picture('#.# #.# #.#'))

def test_filters_are_scored_by_their_norm():
    x = torch.tensor([[5,0,0,0],[3,3,3,3.]])  # norms 5 and 6, means 1.25 and 3, maxima 5 and 3
    assert get_mask_type('filter')(x, .5).equal(picture('.... ####'))
    x[1] = 2
    assert get_mask_type('filter')(x, .5).equal(picture('#### ....'))

@pytest.mark.parametrize('name,dim', [('filter',0),('channel',1)])
@fast
@given(scores(2), sparsities)
def test_slices_are_whole_and_counted_exactly(name, dim, x, sparsity):
    mask = get_mask_type(name)(x, sparsity)
    slices = mask.movedim(dim, 0).flatten(1)
    assert (slices.all(1)==slices.any(1)).all() and mask.shape==x.shape and mask.is_contiguous()
    assert n_masked(slices.all(1))==(promised(len(slices), sparsity) if len(slices)>1 else 0)

def test_only_channel_of_a_depthwise_layer_stays():
    assert get_mask_type('channel')(torch.ones(8,1,3,3), .9).all()

@pytest.mark.parametrize('name', ['filter','channel'])
def test_only_channel_of_a_depthwise_layer_stays_globally(name):
    "Two layers of which one has a single channel, or filter"
    single = torch.zeros(8,1,3,3) if name=='channel' else torch.zeros(1,8,3,3)
    masks = global_masks([single, torch.ones(4,4,3,3)], .5, get_mask_type(name))
    assert masks[0].all()

# across parameters

@fast
@given(st.lists(scores(max_dims=2), min_size=1, max_size=4), sparsities)
def test_global_masks_are_those_of_the_concatenation(xs, sparsity):
    masks = global_masks(xs, sparsity)
    assert [m.shape for m in masks]==[x.shape for x in xs] and all(m.dtype==torch.bool for m in masks)
    flat,n_layers = torch.cat([best_first(x.flatten()) for x in xs]),sum(x.numel()>0 for x in xs)
    n_zero = len(flat) if sparsity==1 else min(round(len(flat)*sparsity), len(flat)-n_layers)
    assert torch.cat([m.flatten() for m in masks]).equal(keep_highest(flat, n_zero))

def best_first(x): return x.index_fill(0, torch.tensor(x.numpy().argmax()), math.inf) if len(x) else x

@fast
@given(st.lists(scores(max_dims=2), min_size=1, max_size=5), sparsities)
def test_no_layer_is_cut_off(xs, sparsity):
    "Each layer keeps a weight; what is asked for is exact, if it leaves that many; what else is kept is better than what isn't"
    masks,n = global_masks(xs, sparsity),sum(x.numel() for x in xs)
    n_kept,n_layers = n-round(n*sparsity),sum(x.numel()>0 for x in xs)
    assert sum(map(n_masked, masks))==(n if sparsity==1 else n-max(n_kept, n_layers))
    if sparsity==1: return
    assert all(m.any() for m in masks if m.numel())
    alone = [m.sum()==1 for m in masks]
    worst = min((x[m].min() for x,m,a in zip(xs, masks, alone) if m.any() and not a), default=math.inf)
    assert worst>=max((x[~m].max() for x,m in zip(xs, masks) if not m.all()), default=-math.inf)

@pytest.mark.parametrize('bad', [0,1])
def test_global_masks_refuse_nan(bad):
    xs = [torch.rand(3), torch.rand(4)]
    xs[bad][2] = math.nan
    with pytest.raises(ValueError, match='NaN'): global_masks(xs, .5)

def test_layers_without_hope_keep_one_too():
    assert [m.tolist() for m in global_masks([torch.full((2,), -math.inf), torch.ones(2)], .5)]==[[True,False],[True,False]]

def test_global_masks_differ_among_layers():
    xs = [torch.rand(16,8), torch.rand(16,4)*.5]
    masks = global_masks(xs, .8)
    assert sum(map(n_masked, masks))==round(192*.8)
    assert n_masked(masks[0])/128<.8<n_masked(masks[1])/64

@pytest.mark.parametrize('pattern', ['unstructured','filter','[1, 2]'])
@pytest.mark.parametrize('sparsity', [0.,1.])
def test_global_extremes(sparsity, pattern):
    assert all(m.all()==(sparsity==0) and m.any()==(sparsity==0) for m in global_masks([torch.rand(3,4), torch.rand(5,2)], sparsity, get_mask_type(pattern)))

@pytest.mark.parametrize('pattern,left', [('unstructured',1),('filter',4),('[1, 2]',2)])
def test_fewer_weights_than_layers(pattern, left):
    "Each keeps its best group, and nothing else"
    masks = global_masks([torch.rand(4,4)*10**i for i in range(5)], .98, get_mask_type(pattern))
    assert [int(m.sum()) for m in masks]==[left]*5

@fast
@given(st.lists(st.tuples(st.integers(2,5), st.integers(2,5)), min_size=1, max_size=4), sparsities, st.integers(0, 2**31))
def test_global_filters_miss_the_target_by_less_than_one_filter(shapes, sparsity, seed):
    g = torch.Generator().manual_seed(seed)
    xs = [torch.rand(s, generator=g)+.1 for s in shapes]
    total,target = sum(x.numel() for x in xs),sparsity*sum(x.numel() for x in xs)
    masks = global_masks(xs, sparsity, Slice(0))
    assert abs(sum(map(n_masked, masks))-(total if sparsity==1 else min(target, total-sum(s[1] for s in shapes))))<=max(s[1] for s in shapes)+.5  # each keeps one
    assert all((m.all(1)==m.any(1)).all() for m in masks)

def test_global_blocks_with_tails_miss_the_target_by_less_than_one_block():
    "Tails of a single weight, all of them small, and whole blocks of four"
    x = torch.ones(1000,5)
    x[:,4] = .1
    masks = global_masks([x, torch.full((1000,1), 2.)], .5, get_mask_type('block4'))
    assert abs(sum(map(n_masked, masks))-3000)<=4

def test_global_mixed_precision():
    masks = global_masks([torch.tensor([1.,4.]).half(), torch.tensor([2.,3.], dtype=torch.float64)], .5)
    assert [m.tolist() for m in masks]==[[False,True],[False,True]]

def test_pattern_without_groups_is_no_global_pattern():
    class Checkers(MaskType):
        def __call__(self, scores, sparsity): return torch.ones_like(scores, dtype=torch.bool)
    with pytest.raises(ValueError, match='Checkers.*global'): global_masks([torch.ones(2,2)], .5, Checkers())

# names

@pytest.mark.parametrize('name,expected', [('unstructured','Unstructured()'),('block4','Block(1, 4)'),('[2, 2]','Block(2, 2)'),([2,2],'Block(2, 2)'),('[1,4]','Block(1, 4)'),
                                           ((1,-1),'Block(1, -1)'),([2,4,1,1],'Block(2, 4)'),('filter','Slice(0)'),('channel','Slice(1)')])
def test_every_name_gives_a_pattern_that_runs(name, expected):
    mask_type = get_mask_type(name)
    assert repr(mask_type)==expected and n_masked(mask_type(torch.rand(4,8,3,3), .5))==144

@pytest.mark.parametrize('name,near', [('unstructred','unstructured'),('blok4','block4'),('filters','filter'),('chanel','channel')])
def test_unknown_names_get_a_hint(name, near):
    with pytest.raises(ValueError, match=f'did you mean {near!r}'): get_mask_type(name)

@pytest.mark.parametrize('name', ['xyz','',None,3,'[2]','[a, b]'])
def test_nonsense_lists_what_there_is(name):
    with pytest.raises(ValueError, match='mask_type.*(unstructured|did you mean)'): get_mask_type(name)

@pytest.mark.parametrize('sizes', ['[0, 4]','[-2, 4]',[4,0]])
def test_impossible_tiles(sizes):
    with pytest.raises(ValueError, match='positive or -1'): get_mask_type(sizes)

def test_functions_are_patterns():
    f = lambda scores,sparsity: scores>0
    assert get_mask_type(f) is f
