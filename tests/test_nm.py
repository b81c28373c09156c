"N:M masks: exactly N of every M, the highest by rank, in every layer, dtype and layout, and the same way all through a schedule"
import itertools,tracemalloc,numpy as np,pytest
from hypothesis import HealthCheck,given,settings,strategies as st
from scipy.optimize import linprog
from utils import *
from fastsparse_create.callback.pruning import *
from fastsparse_create.masks.core import *
from fastsparse_create.masks.nm import *
from fastsparse_create.masks.nm import _keep_n_on_device,_best_2_of_4,_optimal,_greedy,_bounded,_patterns
from fastsparse_create.recipe.parse import *

quick = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
names = dict(zip(('2:4','1:4','4:8','8:16','2:4-T','1:4-T','3:8-T','m4n2_2d_greedy','4:2:8'), (.5,.75,.5,.5,.5,.75,.625,.5,.75)))
every_pattern = pytest.mark.parametrize('name,final', names.items())

def drawn(text): return torch.tensor([[c=='X' for c in row] for row in text.split()])
def kept(scores, mask): return (scores.double()*mask).sum().item()

def by_stable_sort(scores, n, m, axis):
    "What every mask of runs must equal: of each run the first `n` in descending order, equal scores in the order of their index"
    groups = scores.movedim(axis, -1).unflatten(-1, (-1,m))
    best = groups.sort(dim=-1, descending=True, stable=True).indices[...,:n]
    return torch.zeros(groups.shape, dtype=torch.bool).scatter_(-1, best, True).flatten(-2).movedim(-1, axis)

# runs, by hand

@pytest.mark.parametrize('name,scores,mask', [
    ('2:4', [1,2,3,4, 8,7,6,5], '..XXXX..'),
    ('2:4', [0,0,0,0, 5,5,5,5], 'XX..XX..'),
    ('2:4', [3,1,1,1, 1,3,1,1, 1,1,1,3, 1,1,2,2], 'XX..XX..X..X..XX'),
    ('2:4', [-1,-1,0,-1, -1,5,-1,0], 'X.X..X.X'),
    ('1:4', [1,2,3,4, 4,4,4,4], '...XX...'),
    ('3:4', [1,2,3,4, 4,4,4,4], '.XXXXXX.'),
    ('2:2', [1,2,3,4], 'XXXX'),
    ('1:2', [1,2,4,3], '.XX.'),
    ('2:8', [1,8,2,7,3,6,4,5], '.X.X....'),
    ('1:10', [0,0,0,9,0,0,9,0,0,0], '...X......'),
    ('3:10', [0,0,0,9,0,0,9,0,0,0], 'X..X..X...'),
    ('m4n2_1d', [1,2,3,4], '..XX'), ('mn_1d_best', [1,2,3,4], '..XX'), ('m4n1_1d', [1,2,3,4], '...X'),
])
def test_runs_by_hand(name, scores, mask):
    calculator = get_mask_type(name)
    assert torch.equal(calculator(torch.tensor([scores]).float(), calculator.sparsity), drawn(mask))

def test_known_2_of_4():
    w = torch.tensor([[1.,2,3,4,-8,7,-6,5]])
    assert get_mask_type('2:4')(w.abs(), .5).long().tolist()==[[0,0,1,1,1,1,0,0]]

def test_ranks_not_sums():
    inf = torch.inf
    assert torch.equal(NM(2,4)(torch.tensor([[1e8,1,2,3, inf,1,2,3, -inf,-inf,-inf,1, inf,inf,inf,inf]]), .5), drawn('X..XX..XX..XXX..'))
    assert torch.equal(NM(5,10)(torch.tensor([[inf,-inf,1,2,3,4,inf,0,0,0]]), .5), drawn('X..XXXX...'))
    close = 1+torch.arange(4, dtype=torch.float64)*1e-15
    assert torch.equal(NM(2,4)(close, .5)[None], drawn('..XX'))

@pytest.mark.parametrize('name', [*names, '2:4', '8:16'])
@pytest.mark.parametrize('dtype', [torch.float16,torch.bfloat16,torch.float32,torch.float64])
def test_nan_is_an_error(name, dtype):
    scores = torch.rand(16,16).to(dtype)
    scores[5,7] = torch.nan
    with pytest.raises(ValueError, match='NaN'): get_mask_type(name).pattern(scores)

# runs, against sorting

@st.composite
def problems(draw):
    m = draw(st.integers(1, 20))
    shape = [draw(st.integers(1, 4)) for _ in range(draw(st.integers(1, 4)))]
    axis = draw(st.integers(0, len(shape)-1))
    shape[axis] *= m
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randint(-2, draw(st.integers(0, 50)), shape, generator=generator), draw(st.integers(1, m)), m, axis

@quick
@given(problems())
def test_runs_equal_sorting_for_every_dtype(problem):
    scores,n,m,axis = problem
    expected = by_stable_sort(scores, n, m, axis)
    for dtype in (torch.float16,torch.bfloat16,torch.float32,torch.float64,torch.int64):
        mask = NM(n,m,axis)(scores.to(dtype), 1-n/m)
        assert torch.equal(mask, expected) and mask.dtype==torch.bool and mask.is_contiguous()
    assert torch.equal(_keep_n_on_device(scores.float(), n, m, axis), expected)
    assert is_nm(expected, n, m, axis) and (n==1 or not is_nm(expected, n-1, m, axis))

@pytest.mark.parametrize('n,m', [(2,4),(2,3),(3,7),(8,16)])
@pytest.mark.parametrize('shape,axis', [((3*400,7*99),0), ((7*200,3*16*7*7),1), ((2,3*16*7,33,17),1), ((3*16*7,),0), ((2,16*7,70000//7),1)])
def test_runs_over_chunks(n, m, shape, axis):
    shape = [s//m*m if d==axis else s for d,s in enumerate(shape)]
    scores = torch.randint(0, 1000, shape).float()
    assert torch.equal(NM(n,m,axis)(scores, 1-n/m), by_stable_sort(scores, n, m, axis))

def test_layout_in_memory_does_not_matter():
    scores = torch.rand(8,16,3,3)
    for n,m,axis in ((2,4,1),(8,16,1),(1,2,0)):
        expected = NM(n,m,axis)(scores, 1-n/m)
        assert torch.equal(NM(n,m,axis)(scores.to(memory_format=torch.channels_last), 1-n/m), expected)
        assert torch.equal(NM(n,m,axis)(scores.permute(3,2,1,0).contiguous().permute(3,2,1,0), 1-n/m), expected)
    w = torch.nn.Parameter(torch.randn(8,8))
    assert not NM(2,4)(w.abs(), .5).requires_grad
    for empty in (torch.rand(0,16), torch.rand(16,0)):
        for name in ('2:4','8:16','2:4-T','4:8-T','m4n2_2d_greedy','4:2:8'): assert get_mask_type(name).pattern(empty).shape==empty.shape

@pytest.mark.parametrize('layer', [nn.Linear(16,6), nn.Conv1d(16,6,3), nn.Conv2d(16,6,3), nn.Conv3d(16,6,2), nn.Conv2d(16,8,3,groups=2), nn.Conv2d(12,6,1,groups=3)])
def test_groups_run_along_the_inputs(layer):
    scores = layer.weight.detach().abs()
    mask = get_mask_type('2:4')(scores, .5)
    rows,expected = (t.flatten(2).movedim(1,-1).reshape(-1, t.shape[1]) if t.ndim>2 else t for t in (scores,mask))
    assert torch.equal(NM(2,4)(rows, .5), expected)

# what is left over

def test_remainders():
    scores = torch.tensor([[1.,2,3,4, 1,3]])
    with pytest.raises(ValueError, match=r"NM\(2, 4\) needs a multiple of 4 along dimension 1, got shape \(1, 6\).*'dense' or 'pad'"): NM(2,4)(scores, .5)
    assert torch.equal(NM(2,4,remainder='dense')(scores, .5), drawn('..XXXX'))
    assert torch.equal(NM(2,4,remainder='pad')(scores, .5), drawn('..XXXX'))
    assert torch.equal(NM(1,4,remainder='pad')(scores, .75), drawn('...X.X'))
    assert torch.equal(NM(1,4,remainder='pad')(scores[:,4:], .75), drawn('.X'))
    assert torch.equal(NM(1,4,remainder='dense')(scores[:,4:], .75), drawn('XX'))
    assert torch.equal(NM(2,4,remainder='pad')(torch.full((1,3), -torch.inf), .5), drawn('XX.'))

@pytest.mark.parametrize('remainder', ['dense','pad'])
@pytest.mark.parametrize('make,n,m', [(NM,2,4),(NM,8,16),(Transposable,2,4),(Transposable,3,8),(partial(Transposable,greedy=True),2,4),(partial(VNM,4),2,8)])
@pytest.mark.parametrize('shape', [(7,10),(8,13),(9,16),(5,6,3),(3,3)])
def test_remainders_of_every_pattern(remainder, make, n, m, shape):
    scores,calculator = torch.rand(shape),make(n, m, remainder=remainder)
    mask = calculator(scores, calculator.sparsity)
    sizes = calculator._sizes(shape)
    full = tuple(slice(s-s%sizes.get(d,1)) for d,s in enumerate(shape))
    if remainder=='pad': assert is_nm(mask, n, m) and (not isinstance(calculator, Transposable) or is_nm(mask, n, m, 0))
    else:
        assert torch.equal(mask[full], type(calculator)._keep(calculator, scores[full]))
        mask[full] = True
        assert mask.all()

def test_shapes_that_never_fit():
    for name,shape in (('2:4-T',(8,)),('4:2:8',(8,)),('2:4',())):
        with pytest.raises(ValueError, match='dimensions'): get_mask_type(name)(torch.rand(shape), .5)
    with pytest.raises(ValueError, match='3 or more dimensions'): NM(2,4,axis=2)(torch.rand(4,4), .5)
    with pytest.raises(ValueError, match='multiple of 4 along dimension 0'): get_mask_type('2:4-T')(torch.rand(6,4), .5)
    with pytest.raises(ValueError, match='multiple of 4 along dimension 1'): NM(2,4)(nn.Conv2d(8,8,3,groups=8).weight, .5)
    assert NM(2,4).unfit((8,8))=='' and 'multiple of 4' in NM(2,4).unfit((8,6)) and NM(2,4,remainder='pad').unfit((8,6))==''

@pytest.mark.parametrize('make', [lambda: NM(0,4), lambda: NM(5,4), lambda: NM(2,4,axis=-1), lambda: NM(2,4,remainder='drop'), lambda: Transposable(3,2),
                                  lambda: VNM(0,2,8), lambda: VNM(4,4,8), lambda: VNM(4,2,3), lambda: get_mask_type('0:4')])
def test_impossible_patterns(make):
    with pytest.raises(ValueError, match='mask_type'): make()

# schedules

@every_pattern
@pytest.mark.parametrize('sparsity', [0., .1, .33, .48])
def test_between_patterns_zeros_are_exact_and_groups_keep_enough(name, final, sparsity):
    calculator,scores = get_mask_type(name),torch.rand(32,32)
    n,m,mask,pattern = calculator.n,calculator.m,calculator(scores, sparsity),calculator.pattern(scores)
    assert (~mask).sum().item()==round(scores.numel()*sparsity)
    assert (pattern & ~mask).sum()==0
    assert mask.view(32,-1,m).sum(2).min()>=n

@every_pattern
def test_ends_of_a_schedule(name, final):
    calculator,scores = get_mask_type(name),torch.rand(16,16)
    assert calculator.sparsity==final and calculator(scores, 0).all()
    for near in (final-.01, final, final+.01): assert torch.equal(calculator(scores, near), calculator.pattern(scores))
    assert not torch.equal(calculator(scores, final-.02), calculator.pattern(scores))
    with pytest.raises(ValueError, match=f"a share of {final:g}, it can't reach a sparsity of {final+.02:g}"): calculator(scores, final+.02)

def test_no_mask_between_patterns_keeps_more():
    "All masks of two groups of four with 3 zeros, at most two a group"
    scores = torch.rand(1,8)
    masks = [torch.tensor([i not in zeros for i in range(8)]) for zeros in itertools.combinations(range(8), 3)]
    best = max(kept(scores, mask) for mask in masks if mask.view(2,4).sum(1).min()>=2)
    assert kept(scores, NM(2,4)(scores, 3/8))==best

@every_pattern
@quick
@given(st.integers(0, 2**31), st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_what_is_masked_stays_masked(name, final, seed, sparsities):
    "Weights drift between the updates, however far"
    generator,calculator = torch.Generator().manual_seed(seed),get_mask_type(name)
    mask = torch.ones(16,16, dtype=torch.bool)
    for sparsity in [*sorted(sparsities), 1., 1.]:
        scores = torch.randn(16,16, generator=generator).abs().exp().masked_fill(~mask, -1)
        new = calculator(scores, sparsity*final)
        assert not (new & ~mask).any()
        mask = new
    assert torch.equal(mask, calculator(torch.rand(16,16, generator=generator).masked_fill(~mask, -1), final))

# tiles

def all_masks(n, m):
    "Every m by m mask with `n` in each row and column"
    rows = [r for r in itertools.product([0,1], repeat=m) if sum(r)==n]
    return torch.tensor([tile for tile in itertools.product(rows, repeat=m) if all(sum(c)==n for c in zip(*tile))], dtype=torch.bool)

def by_linear_program(tile, n):
    m = len(tile)
    sums = np.concatenate([np.kron(np.eye(m), np.ones((1,m))), np.kron(np.ones((1,m)), np.eye(m))])
    return -linprog(-tile.ravel(), A_eq=sums, b_eq=np.full(2*m, n), bounds=(0,1)).fun

def test_the_90_patterns():
    ours = {p.tobytes() for p in _patterns}
    assert len(_patterns)==len(ours)==90 and ours=={p.numpy().tobytes() for p in all_masks(2,4)}

@pytest.mark.parametrize('text', ['X.X. X.X. .X.X .X.X', 'XX.. .XX. ..XX X..X', 'XX.. XX.. ..XX ..XX', 'X..X .XX. X..X .XX.'])
@pytest.mark.parametrize('name', ['m4n2_2d_best','m4n2_2d_greedy','2:4-T'])
def test_tiles_by_hand(name, text):
    assert torch.equal(get_mask_type(name)(drawn(text).float()+.5*torch.rand(4,4), .5), drawn(text))

def test_best_is_not_greedy():
    "Greed takes 9, then must take the zeros beside it"
    scores = torch.tensor([[9.,8,0,0],[8,0,7,0],[0,7,0,0],[0,0,0,0]])
    best,greedy = (get_mask_type(f'm4n2_2d_{how}')(scores, .5) for how in ('best','greedy'))
    assert kept(scores, best)==max(kept(scores, m) for m in all_masks(2,4))>=kept(scores, greedy)

@quick
@given(st.integers(0, 2**31), st.sampled_from([torch.float16,torch.bfloat16,torch.float32,torch.float64]), st.sampled_from([(2,4),(1,4),(3,4),(2,3)]))
def test_small_tiles_against_brute_force(seed, dtype, nm):
    n,m = nm
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(4*m,3*m,2, generator=generator).abs().mul(4).round().div(4).to(dtype)
    mask,masks = Transposable(n,m)(scores, 1-n/m),all_masks(n,m).double()
    for i,j,k in itertools.product(range(4), range(3), range(2)):
        tile,ours = (t[i*m:i*m+m, j*m:j*m+m, k].double() for t in (scores,mask))
        assert (ours.sum(0)==n).all() and (ours.sum(1)==n).all()
        assert (tile*ours).sum()==(masks*tile).sum((1,2)).max()

@pytest.mark.parametrize('n,m', [(2,4),(1,5),(2,8),(4,8),(5,8),(8,16),(3,16),(16,32)])
@pytest.mark.parametrize('kind', ['normal','ties','masked','zeros'])
def test_large_tiles_are_exactly_optimal(n, m, kind):
    rng = np.random.default_rng(n)
    tiles = np.abs(rng.standard_normal((4,m,m)))
    if kind=='ties': tiles = np.round(tiles)
    if kind=='masked': tiles = np.where(rng.random(tiles.shape)<.4, -1, tiles)
    if kind=='zeros': tiles *= 0
    masks,values = _optimal(tiles, n),_bounded(tiles)
    assert (masks.sum(1)==n).all() and (masks.sum(2)==n).all()
    for tile,mask in zip(values,masks): assert abs((tile*mask).sum()-by_linear_program(tile, n))<1e-9*max(1, abs(tile).sum())

def test_two_ways_to_the_same_optimum():
    tiles = np.random.default_rng(0).standard_normal((500,4,4))
    tiles[:250] = np.abs(tiles[:250])
    values,a,b = _bounded(tiles),_best_2_of_4(tiles, 2),_optimal(tiles, 2)
    np.testing.assert_allclose((values*a).sum((1,2)), (values*b).sum((1,2)), rtol=1e-6)

@pytest.mark.parametrize('name', ['m4n2_2d_best','m4n2_2d_greedy','4:8-T','1:4-T'])
def test_infinite_tiles(name):
    "As many infinities as possible are kept, as few of the lowest, and what is finite counts beside them"
    calculator = get_mask_type(name)
    n,m = calculator.n,calculator.m
    scores = torch.rand(m,m)
    scores[0,0] = scores[1,1] = torch.inf
    scores[2,0] = scores[m-1,1] = -torch.inf
    mask = calculator(scores, calculator.sparsity)
    assert mask[0,0] and mask[1,1] and not mask[2,0] and not mask[m-1,1]
    assert (mask.sum(0)==n).all() and (mask.sum(1)==n).all()
    huge = torch.rand(m,m)*torch.finfo(torch.float32).max
    if 'greedy' not in name: assert torch.equal(calculator(huge, calculator.sparsity), calculator(huge.double()/1e30, calculator.sparsity))

def by_greed(tile, n):
    m,keep = len(tile),np.zeros(tile.shape, bool)
    for i in np.argsort(-tile.ravel(), kind='stable'):
        r,c = divmod(i, m)
        keep[r,c] = keep[r].sum()<n and keep[:,c].sum()<n
    return keep

@pytest.mark.parametrize('n,m', [(2,4),(3,4),(4,8),(1,4)])
def test_greedy_is_greedy_and_complete(n, m):
    tiles = np.random.default_rng(0).random((200,m,m))
    ours,best = _greedy(tiles, n),_optimal(tiles, n)
    theirs = np.stack([by_greed(t, n) for t in tiles])
    done = theirs.sum((1,2))==n*m
    assert 0<done.sum() and np.array_equal(ours[done], theirs[done])
    assert (ours.sum(1)==n).all() and (ours.sum(2)==n).all()
    assert ((tiles*ours).sum((1,2))<=(tiles*best).sum((1,2))+1e-9).all()

@pytest.mark.parametrize('weight', [nn.Linear(24,16).weight, nn.Conv1d(8,16,3).weight, nn.Conv2d(8,12,3).weight, nn.Conv2d(16,8,2,groups=2).weight, nn.Conv3d(4,8,2).weight])
@pytest.mark.parametrize('name', ['m4n2_2d_best','m4n2_2d_greedy','2:4-T'])
def test_tiles_in_every_layer(weight, name):
    mask = get_mask_type(name)(weight.detach().abs(), .5)
    for axis in (0,1): assert (mask.unflatten(axis, (-1,4)).sum(axis+1)==2).all()

def test_kept_magnitude_of_normal_weights():
    scores = torch.randn(256,256).abs()
    share = {name:kept(scores, get_mask_type(name)(scores, .5))/scores.sum().item() for name in ('m4n2_1d','m4n2_2d_best','m4n2_2d_greedy','4:8-T','8:16-T')}
    assert share['m4n2_1d']==pytest.approx(.744, abs=.003)
    assert share['m4n2_2d_best']==pytest.approx(.702, abs=.003)
    assert share['m4n2_2d_greedy']<share['m4n2_2d_best']<share['4:8-T']<share['8:16-T']

def test_tiles_need_little_memory():
    scores = torch.rand(2048,2048)
    tracemalloc.start()
    get_mask_type('m4n2_2d_best').pattern(scores)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak<scores.numel()+16*2**20

# V:N:M

def test_vnm_of_one_row_is_nm():
    scores = torch.rand(8,32)
    assert torch.equal(VNM(1,2,8)(scores, .75), NM(2,8)(scores, .75))

@pytest.mark.parametrize('v,n,m,shape', [(4,2,8,(16,32)),(16,2,8,(16,8,3,3)),(8,1,12,(8,24,5)),(2,3,4,(4,8)),(8,2,20,(8,40))])
def test_vnm_structure(v, n, m, shape):
    calculator = VNM(v,n,m)
    mask = calculator(torch.rand(shape), calculator.sparsity)
    tiles = mask.flatten(2).movedim(1,-1) if mask.ndim>2 else mask[:,None]
    tiles = tiles.unflatten(-1, (-1,m)).unflatten(0, (-1,v))
    assert (tiles.sum(-1)==n).all() and tiles.any(1).sum(-1).max()<=4

def test_vnm_by_hand():
    scores = torch.tensor([[9.,1,1,1,1,2,0,0],[0,1,1,1,1,3,0,0]])
    assert torch.equal(VNM(2,2,8)(scores, .75), drawn('X....X.. .X...X..'))

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@every_pattern
def test_the_gpu_agrees(name, final):
    scores,calculator = torch.randint(0, 100, (48,64)).float(),get_mask_type(name)
    for sparsity in (final/2, final): assert torch.equal(calculator(scores.cuda(), sparsity).cpu(), calculator(scores, sparsity))

# in training

class Custom(nn.Linear): pass

class EveryLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1,self.c2,self.c3 = nn.Conv1d(8,16,3,padding=1),nn.Conv2d(16,16,3,padding=1,groups=2),nn.Conv3d(16,16,1)
        self.attention,self.head = nn.MultiheadAttention(16, 2, batch_first=True),Custom(16,8)

    def forward(self, x):
        x = self.c1(x[:,:,None].expand(-1,-1,4))
        x = self.c3(self.c2(x[...,None])[...,None]).flatten(2).transpose(1,2)
        return self.head(self.attention(x, x, x)[0]).mean(1)

@pytest.mark.parametrize('opt_func', [partial(SGD, mom=.9), Adam, partial(Adam, decouple_wd=False)])
@pytest.mark.parametrize('name,final', [(n,f) for n,f in names.items() if n!='8:16'])
def test_gradual_pruning_of_every_layer(name, final, opt_func):
    torch.manual_seed(0)
    learn,witness = tiny_learner(EveryLayer(), opt_func, .01, shape=(8,), d_out=8),Witness()
    learn.fit(3, cbs=[GMPruningModifier(0., final, 0, 2, .5, mask_type=name), witness])
    n,m,ps = get_mask_type(name).n,get_mask_type(name).m,masked_params(learn.model)
    assert witness.seen==[] and len(ps)==6
    assert all(is_nm(p.param, n, m) and measured_sparsity(learn.model, [p.name])==final for p in ps)
    if 'T' in name or '2d' in name: assert all(is_nm(p.param, n, m, 0) for p in ps)

def test_one_line():
    model = EveryLayer()
    sparsify_model(model, .5, mask_type='2:4')
    assert measured_sparsity(model)==.5 and all(is_nm(p.param, 2, 4) for p in masked_params(model))
    frozen = weights(model)
    sparsify_model(model, .5, mask_type='2:4')
    assert same(frozen, weights(model))

def test_resume_keeps_the_masks(tmp_path):
    learn = tiny_learner(EveryLayer(), shape=(8,), d_out=8, path=tmp_path)
    learn.fit(2, cbs=GMPruningModifier(0., .5, 0, 1, .5, mask_type='m4n2_2d_best'))
    masks = {p.name:p.mask.clone() for p in masked_params(learn.model)}
    learn.save('half')
    other = tiny_learner(EveryLayer(), shape=(8,), d_out=8, path=tmp_path)
    masks_from_file(other.model, tmp_path/'models'/'half.pth')
    other.fit(2)
    assert same(masks, {p.name:p.param!=0 for p in masked_params(other.model)})

def test_impossible_targets_are_refused_before_training():
    with pytest.raises(ValueError, match="layers can't compete"): GlobalMagnitudePruningModifier(0., .5, 0, 1, .5, mask_type='2:4')
    for final in (.3,.8):
        with pytest.raises(ValueError, match='final_sparsity must be 0.5'): GMPruningModifier(0., final, 0, 1, .5, mask_type='2:4')

def test_layers_that_do_not_fit_stay_dense_unless_they_are_named():
    image = nn.Sequential(nn.Conv2d(3,8,3), nn.Conv2d(8,8,3))
    for params,words in (('0.weight','0.weight: .*multiple of 4'), (['__ALL_PRUNABLE__','0'],'multiple of 4'), ('re:0','multiple of 4')):
        with pytest.raises(ValueError, match=words): sparsify_model(image, .5, params, mask_type='2:4')
        assert not masked_params(image)
    sparsify_model(image, .5, mask_type='2:4')
    assert [p.name for p in masked_params(image)]==['1.weight'] and is_nm(image[1].weight, 2, 4)

@pytest.mark.parametrize('name', ['2:4','1:16','64:2:8','4:8-T','m4n2_2d_best','m16n8_1d'])
def test_recipes_spell_patterns_without_quotes(name):
    text = f"modifiers:\n  - !GMPruningModifier\n    init_sparsity: 0.\n    final_sparsity: .5\n    start_epoch: 0\n    end_epoch: 1\n    update_frequency: 1\n    mask_type: {name}\n"
    data = parse_recipe(text)
    (modifier,), = data.stages.values()
    assert modifier.args['mask_type']==name and callable(get_mask_type(name))
    (again,), = parse_recipe(dump_recipe(data)).stages.values()
    assert again.args['mask_type']==name
    if ':' in name and '-' not in name: assert f"'{name}'" in dump_recipe(data) or f'"{name}"' in dump_recipe(data)

@pytest.mark.parametrize('layer', [nn.ConvTranspose2d(16,8,3), nn.ConvTranspose1d(8,4,3,groups=2)], ids=['2d','grouped'])
def test_groups_run_along_inputs_where_these_come_first(layer):
    model = nn.Sequential(layer)
    sparsify_model(model, .5, mask_type='2:4')
    assert is_nm(layer.weight_mask.movedim(0, 1), 2, 4)
    learn = tiny_learner(model=nn.Sequential(nn.Unflatten(1, (8,1)), nn.ConvTranspose1d(8,4,3), nn.Flatten(), nn.Linear(12,2)), shape=(8,))
    learn.fit(2, cbs=[MagnitudePruningModifier(0., .5, 0, 1, .5, ['1.weight'], mask_type='2:4')])
    assert is_nm(masked_params(learn.model)[0].mask.movedim(0, 1), 2, 4)

def test_filters_of_transposed_convolutions_are_their_outputs():
    model = nn.Sequential(nn.ConvTranspose2d(6,4,3))
    sparsify_model(model, .5, mask_type='filter')
    assert sorted(model[0].weight_mask.sum((0,2,3)).tolist())==[0,0,54,54]
