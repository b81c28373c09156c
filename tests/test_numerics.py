"Numbers and layers out of the ordinary: masks come out right, or one clear error does"
import gc,pytest,resource,shutil
from torch.nn.utils import parametrize,weight_norm
from utils import *
from fastsparse_create.all import *
from fastsparse_create.callback.dynamic import *
from fastsparse_create.criteria import *
from fastsparse_create.distribution import *
from fastsparse_create.masks.core import *

nan,inf = math.nan,math.inf

def gmp(**kwargs): return GMPruningModifier(.1, .75, 0, 2, .5, **kwargs)
dynamic = dict(set=lambda: SET(.75, every=2), rigl=lambda: RigL(.75, every=2))
pruners = dict(local=gmp, glob=lambda: gmp(global_sparsity=True), acdc=lambda: ACDCPruningModifier(.75, 0, 2, .5), **dynamic)

def spoiled(value, where=(3,5)):
    model = mlp()
    with torch.no_grad(): model[2].weight[where] = value
    return model

# NaN and infinity

@pytest.mark.parametrize('make', pruners.values(), ids=pruners)
def test_nan_weights_are_refused(make):
    learn = tiny_learner(spoiled(nan, ...))
    with pytest.raises(ValueError, match='NaN'): learn.fit(2, cbs=make())

def test_nan_weights_are_refused_by_sparsify_model():
    model = spoiled(nan)
    with pytest.raises(ValueError, match='NaN'): sparsify_model(model, .5)
    assert not masked_params(model)

@pytest.mark.parametrize('value', [inf,-inf])
def test_infinite_weights_rank_highest(value):
    model = spoiled(value)
    sparsify_model(model, .5)
    p = masked_params(model)[1]
    assert p.mask[3,5] and p.n_kept==128 and model[2].weight[3,5]==value

@pytest.mark.parametrize('value', [nan,inf,-inf])
def test_masked_weights_and_gradients_are_zero_even_if_they_were_nan(value):
    "0 times NaN would be NaN"
    model = mlp()
    sparsify_model(model, .5)
    p = masked_params(model)[1]
    with torch.no_grad(): p.param[~p.mask] = value
    model(torch.ones(1,4)).sum().backward()
    assert not violations(model) and torch.isfinite(p.param).all() and not p.param.grad[~p.mask].any()
    p.param.grad.fill_(value)
    set_mask(p, p.mask.clone())
    assert not p.param.grad[~p.mask].any() and p.mask.sum()==128

class Spoil(Callback):
    "Gradients of one batch are what an overflow makes of them"
    order,run_valid = 10.1,False  # before those who look at gradients
    def __init__(self, value, at): self.value,self.at,self.n = value,at,0
    def before_step(self):
        if self.n==self.at: self.model[2].weight.grad.fill_(self.value)
        self.n += 1

@pytest.mark.parametrize('value', [nan,inf])
def test_rigl_refuses_gradients_that_are_nan(value):
    "They can't be ranked; infinite ones can"
    learn = tiny_learner(lr=0.)
    spoil = [Spoil(value, i) for i in range(9)]
    if value==inf: learn.fit(2, cbs=[dynamic['rigl'](), *spoil[2:3]])
    else:
        with pytest.raises(ValueError, match='NaN'): learn.fit(2, cbs=[dynamic['rigl'](), *spoil])
    assert sum(p.n_kept for p in masked_params(learn.model))==sum(p.numel-round(.75*p.numel) for p in masked_params(learn.model))

# Sizes and scores

@pytest.mark.parametrize('make', pruners.values(), ids=pruners)
def test_empty_parameters(make):
    "A layer without inputs, as automatic searches build them"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.none,self.rest = nn.Linear(0,4),mlp()
        def forward(self, x): return self.rest(x+self.none(x[:,:0]))
    learn = tiny_learner(Net())
    learn.fit(2, cbs=make())
    assert not violations(learn.model, learn.opt) and masked_params(learn.model)[-1].n_kept<32

@pytest.mark.parametrize('dist', [uniform,first_layer_dense_uniform,erdos_renyi,erdos_renyi_kernel,global_magnitude])
def test_distributions_of_empty_parameters(dist):
    ps = [torch.ones(0,4),torch.ones(8,8),torch.rand(4,8)]
    assert all(0<=s<=1 for s in dist(ps, .5))

@pytest.mark.parametrize('pattern', ['unstructured','block4','filter','channel','2:4'])
@pytest.mark.parametrize('value', [0.,1.,-inf,inf])
def test_equal_scores(pattern, value):
    "The count is exact, and among equals the first stay"
    mask = get_mask_type(pattern)(torch.full((8,8), value), .5)
    assert n_kept(mask)==32 and mask.flatten()[:2].all()

@pytest.mark.parametrize('make', pruners.values(), ids=pruners)
def test_equal_weights(make):
    model = mlp()
    with torch.no_grad():
        for p in model.parameters(): p.fill_(.1)
    learn = tiny_learner(model, lr=0.)
    learn.fit(2, cbs=make())
    ps = masked_params(model)
    assert sum(p.n_kept for p in ps)==(sum(p.numel-round(.75*p.numel) for p in ps) if make is not pruners['glob'] else 352-round(.75*352))

@pytest.mark.parametrize('sparsity', [0,1,0.,1.])
def test_extremes(sparsity):
    model = mlp()
    sparsify_model(model, sparsity)
    model(torch.ones(2,4)).sum().backward()
    assert all(p.n_kept==p.numel*(1-sparsity) for p in masked_params(model)) and measured_sparsity(model)==sparsity

def narrow(): return nn.Sequential(nn.Linear(4,16), nn.Linear(16,1), nn.Linear(1,2))

collapsing = dict(local=lambda: GMPruningModifier(.1, .9, 0, 2, .5), from_param=lambda: GMPruningModifier('__FROM_PARAM__', .9, 0, 2, .5), dict=lambda: GMPruningModifier(.1, {.9:['2.weight'], .8:['0.weight','1.weight']}, 0, 2, .5),
                  glob=lambda: GlobalMagnitudePruningModifier(.1, .98, 0, 2, .5), acdc=lambda: ACDCPruningModifier(.9, 0, 2, .5, global_sparsity=False), movement=lambda: MovementPruningModifier(.1, .9, 0, 2, .5),
                  obs=lambda: OBSPruningModifier(.1, .9, 0, 2, .5, global_sparsity=False, num_grads=2), mfac=lambda: MFACPruningModifier(.1, .9, 0, 2, .5, num_grads=2),
                  topkast=lambda: TopKASTPruningModifier(.9, .8, 0, 2, .5, global_sparsity=False), granet=lambda: GraNetPruningModifier(.2, .9, 0, 2, .5, global_sparsity=False),
                  rigl=lambda: RigL(.9, every=2, sparse_init_f=uniform), set=lambda: SET(.9, every=2, sparse_init_f=uniform, mask_type='constant_fan_in'), srigl=lambda: SRigLPruningModifier(.9, 0, 2, .5, sparsity_strategy='uniform'),
                  snfs=lambda: SNFS(.9, every=2, sparse_init_f=uniform, fraction=1., schedule='constant', T_end=1.))

@pytest.mark.parametrize('make', collapsing.values(), ids=collapsing)
def test_no_layer_collapses(make, caplog):
    "A layer of two weights keeps one at 90 %, and is named once; with a constant fan-in each output keeps an input"
    learn = tiny_learner(narrow(), n_trn=8)
    if make is collapsing['glob']:
        with torch.no_grad(): learn.model[2].weight.mul_(1e-9)
    learn.fit(3, cbs=make())
    assert all(p.n_kept for p in masked_params(learn.model)) and not violations(learn.model, learn.opt)
    assert caplog.text.count('0.weight (16 of 64 weights)' if make in (collapsing['set'],collapsing['srigl']) else '2.weight (1 of 2 weights)')==1

def test_what_is_asked_for_may_be_nothing(caplog):
    "A function of one's own, and a distribution that wants a layer without weights"
    model = narrow()
    sparsify_model(model, .9, sparse_init_f=lambda ps,s: [s,s,1.])
    assert [p.n_kept for p in masked_params(model)]==[6,2,0] and '2.weight (0 of 2 weights)' in caplog.text
    learn = tiny_learner(narrow())
    learn.fit(1, cbs=GMPruningModifier(.1, .5, 0, 1, .5, mask_type=lambda scores,sparsity: scores>9))
    assert '0.weight (0 of 64 weights)' in caplog.text

@pytest.mark.parametrize('mask_type,left', [('unstructured',1),('[1, 2]',2),('filter',2),('constant_fan_in',4),('[2, 1]',2)])
def test_small_layers_of_any_pattern_stay(mask_type, left, caplog):
    model = nn.Sequential(nn.Linear(64,64), nn.Linear(64,2), nn.Linear(2,4))
    sparsify_model(model, .99, ['0.weight','2.weight'], mask_type=mask_type)
    assert masked_params(model)[1].n_kept==left and 'sparsify_model: no more than the minimum is left of' in caplog.text and f'2.weight ({left} of 8 weights)' in caplog.text

def test_pruned_once_no_layer_collapses(caplog):
    model = narrow()
    prune_one_shot_(model, .9, [torch.randn(64,4)])
    assert [p.n_kept for p in masked_params(model)]==[6,2,1] and 'prune_one_shot_: no more than the minimum is left of 2.weight (1 of 2 weights)' in caplog.text

def test_whole_channels_are_not_told(caplog):
    "That a group keeps one is its own promise; biases and norms are no layers"
    learn = tiny_learner(mlp())
    learn.fit(2, cbs=StructuredPruningModifier(0., .95, 0, 2, 1, params=['0.weight','2.weight']))
    assert all(p.n_kept for p in masked_params(learn.model)) and 'minimum' not in caplog.text

@pytest.mark.parametrize('mask_type', ['unstructured','block4','[4, 4]','constant_fan_in','filter'])
def test_no_layer_gives_all_its_connections_away(mask_type):
    "One layer wants all, and an update exchanges all"
    learn = tiny_learner(mlp(), n_trn=8)
    learn.fit(3, cbs=SNFS(.6, every=2, fraction=1., schedule='constant', T_end=1., mask_type=mask_type, params=['0.weight','2.weight'],
                          redistribute_f=lambda param, mask, **_: torch.full_like(param, float(param.shape[1]==16))))
    assert len(learn.recorder.mask_updates)>5 and all(p.n_kept>=get_mask_type(mask_type).minimum(p.param.shape) for p in masked_params(learn.model))

@pytest.mark.parametrize('mask_type,is_global', [('unstructured',False),('block4',False),('filter',True),('block4',True)])
def test_gradients_reach_what_small_layers_keep(mask_type, is_global):
    learn = tiny_learner(nn.Sequential(nn.Linear(4,16), nn.Linear(16,1), nn.Linear(1,4), nn.Linear(4,1), nn.Linear(1,2)))
    cb = TopKASTPruningModifier(.9, .9, 0, 2, .5, global_sparsity=is_global, mask_type=mask_type)
    learn.fit(1, cbs=cb)
    assert all(p.mask.any() and not (p.mask & ~cb._reach[p.name]).any() for p in masked_params(learn.model))

def test_sparse_layers_begin_with_a_connection():
    assert SparseLinear(2, 2, sparsity=.99).values.numel()==1 and SparseLinear(2, 2, sparsity=1.).values.numel()==0

def test_going_on_with_what_small_layers_kept():
    "They have more than their share, which is no other sparsity"
    learn = tiny_learner(nn.Sequential(nn.Linear(2,32), nn.Linear(32,2)), shape=(2,))
    for _ in range(2): learn.fit(1, cbs=RigL(.9, every=2, mask_type='constant_fan_in', sparse_init_f=uniform))
    assert [p.n_kept for p in masked_params(learn.model)]==[32,6]

def test_layers_are_not_cut_off_globally(caplog):
    "The smallest weights, of one layer, but each layer keeps one, and the total is exact"
    model = mlp()
    with torch.no_grad(): model[2].weight.mul_(1e-9)
    learn = tiny_learner(model, lr=0.)
    learn.fit(2, cbs=GlobalMagnitudePruningModifier(.1, .95, 0, 2, .5))
    kept = [p.n_kept for p in masked_params(model)]
    assert kept[1]==1 and sum(kept)==352-round(.95*352) and caplog.text.count('2.weight (1 of 256 weights)')==1

def test_fewer_weights_than_layers():
    "One threshold that leaves two weights for three layers: each keeps its best"
    learn = tiny_learner(mlp(), lr=0.)
    learn.fit(2, cbs=GlobalMagnitudePruningModifier(.1, .995, 0, 2, .5))
    assert [p.n_kept for p in masked_params(learn.model)]==[1,1,1]

# Dtypes and layouts

@pytest.mark.parametrize('dtype', [torch.float16,torch.bfloat16,torch.float64])
@pytest.mark.parametrize('make', pruners.values(), ids=pruners)
def test_dtypes(make, dtype):
    learn = tiny_learner(mlp().to(dtype), dtype=dtype, lr=1e-3)
    learn.loss_func = lambda pred,y: F.mse_loss(pred.float(), y.float())  # fastai's smoothed loss can't be of half precision
    learn.fit(2, cbs=make())
    ps = masked_params(learn.model)
    assert not violations(learn.model, learn.opt) and all(p.param.dtype==dtype and p.param.isfinite().all() for p in ps)
    assert sum(p.n_kept for p in ps)==(sum(p.numel-round(.75*p.numel) for p in ps) if make is not pruners['glob'] else 352-round(.75*352))

@pytest.mark.parametrize('make', pruners.values(), ids=pruners)
def test_channels_last(make):
    "The same masks and weights as without, in the memory format of the model"
    res = []
    for fmt in torch.contiguous_format,torch.channels_last:
        learn = tiny_learner(convnet().to(memory_format=fmt), shape=(3,8,8))
        learn.fit(2, cbs=make())
        res.append({n:p.mask.clone() for n,p in ((p.name,p) for p in masked_params(learn.model))})
        for p in masked_params(learn.model):
            if p.param.ndim==4: assert all(t.is_contiguous(memory_format=fmt) for t in (p.param,p.mask,*memory(learn.opt, p.param))), p.name
        assert not violations(learn.model, learn.opt)
    if make is not pruners['set']: assert same(*res)

def test_channels_last_files(tmp_path):
    model = convnet().to(memory_format=torch.channels_last)
    sparsify_model(model, .5)
    torch.save(model.state_dict(), tmp_path/'a.pth')
    again = convnet().to(memory_format=torch.channels_last)
    masks_from_file(again, tmp_path/'a.pth')
    assert same(dict(again.state_dict()), dict(model.state_dict())) and again[3].weight.is_contiguous(memory_format=torch.channels_last)

# Compiled models

compiles = pytest.mark.skipif(shutil.which('g++') is None and shutil.which('c++') is None, reason='torch.compile needs a C++ compiler')

def trained(model, raw, steps=4):
    opt = torch.optim.SGD(raw.parameters(), lr=.1, momentum=.9)
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        opt.zero_grad()
        model(torch.randn(8,4,generator=g)).pow(2).mean().backward()
        opt.step()
    return raw

@pytest.mark.parametrize('first', ['masks','compile'])
@pytest.mark.parametrize('backend', ['eager',pytest.param('inductor', marks=compiles)])
def test_compiled_models(first, backend):
    "Masked before or after it was compiled, with masks that change in between, a model is what it is without"
    if backend=='inductor' and first=='compile': pytest.skip('one compilation shows it')
    res = []
    for compiled in False,True:
        torch._dynamo.reset()
        raw = mlp()
        if first=='masks': sparsify_model(raw, .5)
        model = torch.compile(raw, backend=backend) if compiled else raw
        if first=='compile':
            trained(model, raw, 1)
            sparsify_model(model, .5)
        trained(model, raw)
        for p in masked_params(model): set_mask(p, p.mask.flip(0))
        trained(model, raw)
        model(torch.zeros(1,4))
        assert len(masked_params(model))==3
        res.append(weights(raw))
    for k,v in res[0].items(): torch.testing.assert_close(res[1][k], v)

# Models that are not there yet, and layers that compute their weights

def test_meta_models():
    "Masks need values: one clear error, or values first"
    with torch.device('meta'): model = nn.Sequential(nn.Linear(4,8), nn.Linear(8,2))
    with pytest.raises(ValueError, match='meta'): sparsify_model(model, .5)
    assert not masked_params(model)
    model.to_empty(device='cpu')
    for m in model: m.reset_parameters()
    sparsify_model(model, .5)
    assert measured_sparsity(model)==.5

class Double(nn.Module):
    def forward(self, x): return 2*x

wraps = {'weight_norm':(weight_norm,'weight_v'), 'parametrized weight_norm':(nn.utils.parametrizations.weight_norm,'parametrizations.weight.original1'),
         'parametrized':(lambda m: parametrize.register_parametrization(m, 'weight', Double()),'parametrizations.weight.original')}

@pytest.mark.parametrize('wrap,attr', wraps.values(), ids=wraps)
@pytest.mark.parametrize('make', [gmp,lambda **kwargs: gmp(global_sparsity=True, **kwargs),lambda **kwargs: RigL(.75, every=2, **kwargs)], ids=['local','global','rigl'])
def test_computed_weights(wrap, attr, make):
    "Dense unless what they are computed from is named; then what is computed is 0 where that is masked, or a name is refused where that would divide by 0"
    for named in False,True:
        model = mlp()
        wrap(model[2])
        learn,cbs = tiny_learner(model),make(**(dict(params=['0',f'2.{attr}']) if named else {}))
        if named and attr!='parametrizations.weight.original':
            with pytest.raises(ValueError, match='weight_norm divides by'): learn.fit(2, cbs=cbs)
            assert not masked_params(model)
            continue
        learn.fit(2, cbs=cbs)
        assert not violations(model, learn.opt)
        p = [p for p in masked_params(model) if p.name.startswith('2.')]
        assert [o.name for o in p]==([f'2.{attr}'] if named else [])
        if not named: continue
        model(torch.ones(1,4))
        assert (model[2].weight==0).equal(~p[0].mask)

@pytest.mark.parametrize('wrap,attr', wraps.values(), ids=wraps)
def test_wrapped_after_masking_is_refused(wrap, attr):
    model = mlp()
    sparsify_model(model, .5)
    wrap(model[2])
    with pytest.raises(RuntimeError, match='was parametrized after it was masked'): model(torch.ones(1,4))

# Long runs

@trusted
class Memory(Callback):
    "Megabytes that the process holds, from time to time"
    order,run_valid = 1000,False
    def __init__(self, every): self.every,self.held = every,[]
    def after_batch(self):
        if self.train_iter%self.every: return
        for record in (self.recorder.losses,self.recorder.lrs,self.recorder.sparsities): record.clear()  # a number a step, as it should be
        gc.collect()
        self.held.append(int(Path('/proc/self/statm').read_text().split()[1])*resource.getpagesize()/1e6)

@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='needs /proc')
def test_ten_thousand_steps_of_rigl():
    "Masks, weights and momentum stay what they are counted to be, and nothing piles up but the record of the updates"
    learn,memory = tiny_learner(n_trn=1000, bs=1, lr=1e-3),Memory(1000)
    rigl = RigL(.75, every=10, T_end=1.)
    sizes = {n:p.numel()-round(.75*p.numel()) for n,p in learn.model.named_parameters() if p.ndim>1}
    with learn.no_bar(), learn.no_logging(): learn.fit(10, cbs=[rigl, memory])
    updates = learn.recorder.mask_updates
    ps = masked_params(learn.model)
    assert learn.train_iter==10_000 and len(updates)==909 and sum(p.n_kept for p in ps)==sum(sizes.values())
    assert all(u.sparsities==updates[0].sparsities for u in updates) and not violations(learn.model, learn.opt)
    assert len(learn.model._forward_pre_hooks)==1 and all(len(m._forward_pre_hooks)<=1 and len(m._state_dict_pre_hooks)<=1 for m in learn.model.modules())
    assert memory.held[-1]-memory.held[2]<4, memory.held  # a thousand updates are on record
