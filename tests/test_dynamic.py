"Dynamic sparse training: which connections are exchanged, when, and that nothing else is touched"
import inspect,os,pickle,subprocess,sys,pytest,torchvision
from hypothesis import example,given,settings,strategies as st
from utils import *
from fastsparse_create.sparse.linear import *
from fastsparse_create.callback.dynamic import *
from fastsparse_create.callback.dynamic_pruning import *
from fastsparse_create.callback.checkpoint import *
from fastsparse_create.callback.pruning import *
from fastsparse_create.create.manager import *
from fastsparse_create.criteria import *
from fastsparse_create import distribution
from fastsparse_create.distribution import *
from fastsparse_create.masks.core import *
from fastsparse_create.masks.structured import *
from fastsparse_create.masks.nm import *
from fastsparse_create.recipe.compile import Recipe
from fastsparse_create.schedule import drop_funcs
from fastsparse_create.selection import *

def masks(model): return {p.name:p.mask.clone() for p in masked_params(model)}
def n_kept(model): return {p.name:int(p.mask.sum()) for p in masked_params(model)}
def updated_at(learn): return [u.batch for u in learn.recorder.mask_updates]

# how sparse each layer is

def shapes(*sizes): return [torch.empty(s, device='meta') for s in sizes]
lenet_300,lenet_5 = shapes((300,784),(100,300),(10,100)),shapes((20,1,5,5),(50,20,5,5),(500,800),(10,500))

@pytest.mark.parametrize('params,sparsity,expected', [
    (shapes((2,4),(3,6),(2,4,6)), .5, [0,.31,.655]), (shapes((2,4),(3,6),(2,4,6)), .8, [.556,.70,.85]), (shapes((2,4),(3,6,7),(7,4)), .5, [0,.64,0]),
    (lenet_300, .8, [.8378,.5306,0]), (lenet_300, .9, [.9204,.7698,0]), (lenet_300, .95, [.9615,.8887,.0815]),
    (lenet_300, .98, [.9846,.9555,.6326]), (lenet_300, .99, [.9923,.9777,.8163]),
    (lenet_5, .9, [0,.9129,.9116,0]), (lenet_5, .95, [.2739,.9625,.9619,0]), (lenet_5, .98, [.7221,.9857,.9854,.5428])])
def test_published_erk(params, sparsity, expected):
    "Values of RigL's code and of jaxpruner's tests; for linear layers ER is the same"
    found = erdos_renyi_kernel(params, sparsity)
    assert found==pytest.approx(expected, abs=5e-3 if params[0].numel()==8 else 6e-5)
    if params is lenet_300: assert erdos_renyi(params, sparsity)==pytest.approx(found)
    total = sum(p.numel() for p in params)
    assert sum(s*p.numel() for s,p in zip(found, params))==pytest.approx(sparsity*total, abs=len(params)+1)

def test_other_powers_of_erk():
    "jaxpruner's vector for its square; a distribution of one's own is a function"
    params = shapes((2,4),(3,6),(2,4,6))
    assert distribution._proportional(params, .5, [(sum(p.shape)/p.numel())**2 for p in params])==pytest.approx([0,.033,.758], abs=1e-3)

@pytest.mark.parametrize('name,sparsity,n_layers,n_dense,expected', [
    ('resnet18', .9, 21, 3, {'conv1':0, 'layer1.0.conv1':.5773, 'layer4.0.conv2':.9492, 'fc':.6566}), ('resnet18', .8, 21, 4, {'fc':.2803}),
    ('resnet50', .9, 54, 1, {'conv1':.58, 'layer1.0.conv1':0, 'layer4.0.conv2':.9787, 'fc':.9274}), ('resnet50', .8, 54, 8, {'conv1':.1428, 'fc':.8518})])
def test_published_erk_of_resnets(name, sparsity, n_layers, n_dense, expected):
    with torch.device('meta'): sites = prunable(getattr(torchvision.models, name)())
    found = dict(zip(sites, erdos_renyi_kernel([s.param for s in sites.values()], sparsity)))
    assert len(found)==n_layers and sum(s==0 for s in found.values())==n_dense
    for layer,s in expected.items(): assert found[f'{layer}.weight']==pytest.approx(s, abs=1e-4), layer

def test_depthwise_and_only_kernels_count():
    "ER takes channels only, ERK the kernel as well"
    conv = shapes((64,32,3,3),(32,32,3,3),(16,32,1,1))
    er,erk = erdos_renyi(conv, .8),erdos_renyi_kernel(conv, .8)
    assert (1-er[0])/(1-er[1])==pytest.approx((96/(64*32))/(64/(32*32)))
    assert (1-erk[0])/(1-erk[1])==pytest.approx((102/(64*32*9))/(70/(32*32*9)))

@pytest.mark.parametrize('distribution', [uniform,erdos_renyi,erdos_renyi_kernel])
@pytest.mark.parametrize('shape,sparsity,ones', [((30,4),.5,60), ((1,2,1,4),.8,2), ((30,1),.1,27)])
def test_first_masks_are_exact_and_random(distribution, shape, sparsity, ones):
    model = nn.Module()
    model.conv = nn.Module()
    model.conv.weight = nn.Parameter(torch.randn(shape))
    def _masks(seed):
        sparsify_model(model, sparsity, ['conv.weight'], distribution, random_scores, seed=seed)
        return masks(model)['conv.weight']
    assert int(_masks(0).sum())==ones and _masks(0).equal(_masks(0)) and not _masks(0).equal(_masks(1))

@pytest.mark.parametrize('sparsity', [.5,.8,.9,.98])
@pytest.mark.parametrize('distribution', [uniform,first_layer_dense_uniform,erdos_renyi,erdos_renyi_kernel])
def test_masks_that_training_starts_with_are_exact(distribution, sparsity):
    learn = tiny_learner(mlp(20,40,10), shape=(20,), d_out=10)
    first = Note('before_batch', lambda cb: n_kept(cb.model), order=60)
    learn.fit(1, cbs=[RigL(sparsity, sparse_init_f=distribution), first])
    params = [p.param for p in masked_params(learn.model)]
    expected = [p.numel()-round(p.numel()*s) for p,s in zip(params, distribution(params, sparsity))]
    assert list(first.notes[0].values())==expected and first.notes[0]==first.notes[-1]

# what is dropped and what is grown

def drawn(rows): return torch.tensor([[float(c) if c not in '.x' else float(c=='x') for c in r] for r in rows.split()])

@pytest.mark.parametrize('kind,was,keep,grow,n_keep,n_total,expected', [
    # the smallest connections go, the largest gradients come
    ('unstructured', 'xx.. ..xx', '4100 0032', '9751 2693', 2, 4, 'xx.. .xx.'),
    # a position without a connection is never dropped nor kept, however high it scores
    ('unstructured', 'xx.. ..xx', '4199 9932', '0000 0090', 2, 3, 'xx.. ..x.'),
    # what was just dropped is grown again where its gradient is the largest
    ('unstructured', 'xx.. ..xx', '4132 1132', '0900 0008', 2, 4, 'xx.. ..xx'),
    # among equals: the first stay, the first are grown
    ('unstructured', 'xxxx ....', '1111 0000', '1111 1111', 2, 4, 'xxxx ....'),
    ('unstructured', 'xxxx ....', '1111 0000', '0001 1100', 2, 4, 'xx.x x...'),
    # gradients that are all zero: as many as promised nevertheless, the first ones
    ('unstructured', '.x.x .x.x', '0204 0103', '0000 0000', 2, 4, 'xx.x ...x'),
    # nothing to exchange, nothing there, nothing absent
    ('unstructured', '.x.x .x.x', '0204 0103', '9999 9999', 4, 4, '.x.x .x.x'),
    ('unstructured', '.... ....', '0000 0000', '9999 9999', 0, 0, '.... ....'),
    ('unstructured', 'xxxx xxxx', '1234 5678', '1234 5678', 5, 8, 'xxxx xxxx'),
    # fewer and more than before
    ('unstructured', 'xxxx ....', '1234 0000', '9000 0000', 1, 2, 'x..x ....'),
    ('unstructured', 'x... ....', '1000 0000', '0020 0003', 1, 3, 'x.x. ...x'),
    # more are to stay than there are: the number afterwards holds
    ('unstructured', 'x... ....', '1000 0000', '0020 0003', 2, 3, 'x.x. ...x'),
    # 2 of 4: the two that stay take places of their own groups
    ('2:4', 'xx..xx..', '43009100', '00120034', 3, 4, 'xx..x..x'),
    ('2:4', 'xx..xx..', '43002100', '00120034', 2, 4, 'xx....xx'),
    ('2:4', 'xx..xx..', '41002900', '00120034', 2, 4, 'x..x.x.x'),
    ('2:4', 'xx.. ..xx', '1100 0011', '0000 0000', 0, 4, 'xx.. xx..'),
    ('2:4', 'xx.. ..xx', '1200 0021', '0090 0900', 2, 4, '.xx. .xx.'),
    # constant fan-in: both rows keep two
    ('constant_fan_in', 'xx... ..xx.', '12000 00340', '00900 00009', 2, 4, 'x.x.. ..xx.'),
    ('constant_fan_in', 'xx... ..xx.', '19000 00840', '00700 70009', 2, 4, '.xx.. ..x.x'),
    # filters, channels, blocks: as a whole
    ('filter', 'xx xx .. ..', '11 99 00 00', '00 00 12 43', 2, 4, '.. xx .. xx'),
    ('filter', 'xx xx .. ..', '11 99 00 00', '70 00 12 43', 2, 4, 'xx xx .. ..'),
    ('channel', 'x.x. x.x.', '1030 1030', '0102 0102', 2, 4, '..xx ..xx'),
    ('block4', 'xxxx.... ....xxxx', '11110000 00002222', '00009000 11110000', 4, 8, '....xxxx ....xxxx'),
    ('[2, 2]', 'xx.. xx.. ..xx ..xx', '1100 1100 0021 0012', '0000 0001 9000 0000', 4, 8, '.... .... xxxx xxxx')])
def test_drawn_exchanges(kind, was, keep, grow, n_keep, n_total, expected):
    was,keep,grow,expected = map(drawn, (was,keep,grow,expected))
    found = drop_and_grow(was.bool(), keep, grow, n_keep, n_total, get_mask_type(kind))
    assert found.equal(expected.bool()), found.int()

every_shape = pytest.mark.parametrize('shape', [(1,),(5,),(4,5),(2,9,1),(2,2,4,4)], ids=str)

@every_shape
@pytest.mark.parametrize('sparsity', [0,.5,.95])
@pytest.mark.parametrize('fraction', [0,.3,1])
def test_every_shape_keeps_its_number(shape, sparsity, fraction):
    was = keep_highest(torch.rand(shape), n_zeros(math.prod(shape), sparsity))
    weight,grad,n = torch.randn(shape)*was,torch.randn(shape),int(was.sum())
    new = drop_and_grow(was, weight.abs(), grad.abs(), n-int(fraction*n), n)
    assert new.shape==was.shape and new.dtype==torch.bool and int(new.sum())==n
    assert new.equal(was) or 0<sparsity and fraction>0
    dropped,grown = was&~new,new&~was
    if grown.any():
        assert weight[dropped].abs().max()<=weight[was].abs().sort().values[int(fraction*n)-1]
        assert grad[grown].abs().min()>=grad[~was&~new].abs().max()

@pytest.mark.parametrize('shape', [torch.Size((8,10)),torch.Size((6,7)),torch.Size((4,9,3))], ids=str)
@given(sparsity=st.floats(0, 1), fraction=st.floats(0, 1), seed=st.integers(0, 99))
@settings(max_examples=15)
def test_incomplete_blocks_keep_their_number(shape, sparsity, fraction, seed):
    "The last block of a row may be smaller, the number of blocks is constant"
    g,kind = torch.Generator().manual_seed(seed),get_mask_type('block4')
    mask = kind(torch.rand(shape, generator=g), sparsity)
    def _blocks(m): return int((kind.pool(m.float())>0).sum())
    n = _blocks(mask)
    for _ in range(6):
        had = int(mask.sum())
        mask = drop_and_grow(mask, torch.rand(shape, generator=g), torch.rand(shape, generator=g), had-int(fraction*had), had, kind)
        assert _blocks(mask)==n and kind.spread(kind.pool(mask.float())>0, shape).equal(mask)

patterns = {'2:4':lambda m: m.flatten().view(-1,4).sum(1).eq(2).all(), 'constant_fan_in':lambda m: m.flatten(1).sum(1).unique().numel()==1,
            'filter':lambda m: m.flatten(1).float().mean(1).unique().tolist()==[0,1], 'block4':lambda m: m.view(-1,4).sum(1).unique().tolist()==[0,4],
            '[2, 2]':lambda m: m.view(8,2,8,2).sum((1,3)).unique().tolist()==[0,4]}

@pytest.mark.parametrize('kind', patterns)
@pytest.mark.parametrize('method', [RigL,SET])
def test_patterns_hold_from_the_first_step_to_the_last(kind, method):
    learn,witness = tiny_learner(n_trn=10, opt_func=Adam, lr=.01),Witness()
    seen = Note('after_batch', lambda cb: masks(cb.model)['2.weight'])
    learn.fit(2, cbs=[method(.5, every=3, mask_type=kind, params=['2.weight'], T_end=1., schedule='constant', sparse_init_f=uniform), seen, witness])
    assert witness.seen==[] and updated_at(learn)==due(3, 10, 2, 1., method is SET)
    assert all(patterns[kind](m) and int(m.sum())==128 for m in seen.notes)
    assert not seen.notes[0].equal(seen.notes[-1])

@pytest.mark.parametrize('method', [RigL,SET])
def test_number_that_is_exchanged(method):
    "The share of each layer, rounded down, and all of it new if what was dropped may not come back"
    learn = tiny_learner(n_trn=10)
    seen = Note('after_batch', lambda cb: masks(cb.model))
    learn.fit(1, cbs=[method(.6, every=5, fraction=.37, schedule='constant', T_end=1., grow_f=lambda param, mask, **_: (~mask).float()), seen])
    update,(was,now) = learn.recorder.mask_updates[0],(seen.notes[updated_at(learn)[0]-i] for i in (1,0))
    expected = [min(int(.37*int(m.sum())), int((~m).sum())) for m in was.values()]
    assert [int((now[n]&~m).sum()) for n,m in was.items()]==expected and update.churn==sum(expected)/sum(int(m.sum()) for m in was.values())

def test_regrown_connections_keep_value_and_momentum():
    "All are dropped, and all come back"
    learn = sparse_learner(.6, opt_func=Adam, n_trn=6)
    def _same(param, mask, **_): return mask.float()
    before,after = Note('before_step', state, order=1),Note('after_step', state, order=1000)
    learn.fit(1, cbs=[RigL(every=5, fraction=1., grow_f=_same, T_end=1.), before, after])
    assert updated_at(learn)==[5] and learn.recorder.mask_updates[0].churn==0
    assert same_state(before.notes[5], after.notes[5]) and any(s.count_nonzero() for _,_,slots in after.notes[5].values() for s in slots)

# between layers

@pytest.mark.parametrize('had,zeros,scores,official,exact', [
    ((100,100,100), (900,900,900), (1,1,2), (38,38,75), [38,37,75]),  # the official code grows 151 for 150 that it drops
    ((100,400,40), (900,3600,60), (1,.5,3), (110.4,80.4,79.2), [127,63,80]),  # it fills to 99 %, and gives what is left over in equal parts
    ((23520,3000,100), (211680,27000,900), (.1,.5,2), (5161.25,7209.25,940.5), [2060,10300,950])])
def test_official_redistribution_and_ours(had, zeros, scores, official, exact):
    "Shares follow the mean momentum in both; ours are whole, exact in total, and what overflows is shared by the same rule"
    dropped = [n//2 for n in had]
    found = water_fill(sum(dropped), scores, [z+d for z,d in zip(zeros, dropped)])
    assert found==exact and sum(found)==sum(dropped)
    caps = [.99*(z+d) for z,d in zip(zeros, dropped)]
    assert [o>=c for o,c in zip(official, caps)]==[f>=c for f,c in zip(found, caps)]

@given(st.lists(st.tuples(st.floats(0, 1.7e308)|st.floats(0, 1), st.integers(0, 10**7)), min_size=1, max_size=8), st.floats(0, 1))
@example([(5e-324,100)]*2, .1)
@example([(1.7e308,100)]*3, .1)
@example([(0.,3),(1.,4)], 1.)
def test_what_is_shared_is_exact(layers, share):
    weights,caps = map(list, zip(*layers))
    total = int(share*sum(caps))
    found = water_fill(total, weights, caps)
    assert sum(found)==total and all(type(n) is int and 0<=n<=c for n,c in zip(found, caps))
    for i,a in enumerate(found):
        for j,b in enumerate(found):
            if weights[i]>=weights[j] and caps[i]>a: assert a>=b-1, (i,j)

def test_bad_shares():
    for weights in ([1,-1],[1,math.nan],[1,math.inf]):
        with pytest.raises(ValueError, match='finite and not negative'): water_fill(2, weights, [4,4])
    with pytest.raises(ValueError, match="can't be shared among caps of 8"): water_fill(9, [1,1], [4,4])

def test_dense_layer_becomes_sparse_again():
    "Connections first flow to the last layer until it is full, then out of it"
    learn,turns = sparse_learner(.6, n_trn=10),[]
    def _needs(param, mask, **_):
        turns.append(param.shape)
        wanted = (param.shape[0]==2)==(len(turns)<=9)
        return torch.full_like(param, float(wanted))
    total = sum(n_kept(learn.model).values())
    learn.fit(2, cbs=SNFS(every=2, redistribute_f=_needs, schedule='constant', T_end=1.))
    last = [u.sparsities['4.weight'] for u in learn.recorder.mask_updates]
    assert last[2]==0 and last[-1]>.8 and sum(n_kept(learn.model).values())==total and violations(learn.model, learn.opt)==[]

def test_windowed_mean_is_close_to_the_endless_one():
    "The 44 last gradients hold 99 % of a running mean with decay .9"
    learn,dst,errors,mean = sparse_learner(.6, n_trn=60),SNFS(every=50, num_grads=44, T_end=1.),[],{}
    def _add(cb):
        for p in masked_params(cb.model): mean[p.name] = .9*mean.get(p.name, 0)+p.param.grad
    def _compare(cb):
        if dst._is_due: errors.extend(((dst._gathered[n]-m).norm()/m.norm()).item() for n,m in mean.items())
    learn.fit(2, cbs=[dst, Note('before_step', _add, order=10.3), Note('after_step', _compare, order=10.1)])
    assert len(errors)==6 and 0<max(errors)<.05

# invariants, after every step

def state(cb): return {p.name:(p.mask.clone(), p.param.detach().clone(), [m.clone() for m in memory(cb.opt, p.param)]) for p in masked_params(cb.model)}

def same_state(a, b):
    return a.keys()==b.keys() and all(m.equal(m2) and w.equal(w2) and all(x.equal(y) for x,y in zip(s,s2)) for (m,w,s),(m2,w2,s2) in zip(a.values(), b.values()))

@trusted
class Before(Callback):
    "Looks just before the exchange"
    def __init__(self, event): self.order = 1 if event=='before_step' else 10.15; setattr(self, event, self._look)
    def _look(self): self.last = state(self)

@trusted
class Watch(Callback):
    "Looks just after it, and remembers what it saw"
    order,run_valid = 1000,False
    def __init__(self, before, total_only=False, shrinks=False): store_attr()
    def before_fit(self): self.n,self.masks,self.n_updates,self.steps = None,None,0,0
    def before_batch(self):
        if self.n is None: self.n,self.masks = n_kept(self.model),masks(self.model)
    def after_step(self):
        self.steps += 1
        assert violations(self.model, self.opt)==[]
        self._count(n_kept(self.model))
        updates = self.recorder.mask_updates
        if len(updates)==self.n_updates: assert same(masks(self.model), self.masks), 'masks changed without an update'
        else: self._compare(updates[-1])
        self.masks,self.n_updates = masks(self.model),len(updates)

    def _count(self, n):
        if self.shrinks: assert all(n[k]<=self.n[k] for k in n)
        elif self.total_only: assert sum(n.values())==sum(self.n.values())
        else: assert n==self.n

    def _compare(self, update):
        n_new,n = 0,0
        for name,(mask,w,slots) in state(self).items():
            mask0,w0,slots0 = self.before.last[name]
            kept,new = mask&mask0,mask&~mask0
            for now,then in zip([w,*slots], [w0,*slots0]):
                assert now[kept].equal(then[kept]) and now[new].count_nonzero()==0 and now[~mask].count_nonzero()==0, name
            assert len(slots)==len(slots0)
            if name in update.sparsities: assert update.sparsities[name]==pytest.approx(1-mask.float().mean().item())
            n_new,n = n_new+int(new.sum()),n+int(mask.sum())
        assert update.churn==pytest.approx(n_new/max(1, n)) and 0<=update.fraction<=1 and 0<=update.ever_active<=1

def watched(learn, method, *cbs, epochs=3, **kwargs):
    before = Before('before_step' if getattr(method, 'replace_step', True) else 'after_step')
    watch = Watch(before, **kwargs)
    learn.fit(epochs, cbs=[method, before, watch, *cbs])
    return watch

@trusted
class Overflow(Callback):
    "Like `MixedPrecision` that finds inf in some gradients: no step, but `after_step` follows"
    order,run_valid = 10,False
    def __init__(self, *at): self.at = at
    def before_step(self):
        if self.epoch*self.n_iter+self.iter in self.at:
            for p in self.model.parameters(): p.grad.fill_(math.inf)
            raise CancelStepException()

def wrapped(opt, **kwargs): return partial(OptimWrapper, opt=partial(opt, **kwargs))
optimizers = dict(sgd=partial(SGD, mom=.9), adam=Adam, ranger=ranger, lamb=Lamb, torch_sgd=wrapped(torch.optim.SGD, momentum=.9, weight_decay=.01), torch_adamw=wrapped(torch.optim.AdamW))
methods = dict(set=(SET,{}), snfs=(partial(SNFS, num_grads=2),dict(total_only=True)), rigl=(RigL,{}),
               granet=(lambda s,every,sparse_init_f: GraNetPruningModifier(s-.2, s+.3, 0, 2.5, every/8, sparsity_strategy=sparse_init_f.__name__),dict(shrinks=True)))
surroundings = dict(alone=lambda: [], accumulation=lambda: [GradientAccumulation(16)], clip=lambda: [GradientClip(.05)], overflow=lambda: [Overflow(2,3,8,9)],
                    scaled=lambda: [ScaledPrecision()], all=lambda: [ScaledPrecision(), GradientAccumulation(24), GradientClip(.05), Stranger()])
distributions = [uniform,first_layer_dense_uniform,erdos_renyi,erdos_renyi_kernel]

@pytest.mark.parametrize('distribution', distributions)
@pytest.mark.parametrize('around', surroundings)
@pytest.mark.parametrize('opt', optimizers)
@pytest.mark.parametrize('method', methods)
def test_invariants_after_every_step(method, opt, around, distribution):
    make,promise = methods[method]
    learn = tiny_learner(mlp(), opt_func=optimizers[opt], n_trn=8, lr=.01)
    watch = watched(learn, make(.6, every=3, sparse_init_f=distribution), *surroundings[around](), **promise)
    assert watch.n_updates>=(1 if around=='all' else 2) and watch.steps>=8

def drift(p, lr, drift_avg=None, **_):
    "A step that moves all weights, masked or not, and remembers it"
    p.data.add_(lr)
    return {'drift_avg':torch.ones_like(p) if drift_avg is None else drift_avg.add_(1)}

@pytest.mark.parametrize('method', [SET,RigL,partial(SNFS, num_grads=2)], ids=['set','rigl','snfs'])
@pytest.mark.parametrize('fraction', [.02,.3,1.])
def test_what_grows_is_0_whatever_the_optimizer_does(method, fraction):
    learn = tiny_learner(mlp(30,60,4), shape=(30,), d_out=4, n_trn=8, opt_func=partial(Optimizer, cbs=[drift]), lr=.01)
    assert watched(learn, method(.6, every=2, fraction=fraction, schedule='constant'), total_only=True).n_updates>2

class Zoo(nn.Module):
    "Layers of many kinds, each with an input of its own"
    def __init__(self, a, b, kernel, vocab):
        super().__init__()
        self.linear,self.conv1,self.conv2 = nn.Linear(a,b),nn.Conv1d(a,b,kernel,padding=kernel),nn.Conv2d(a,b,(kernel,1),padding=kernel)
        self.embedding,self.gru,self.attention = nn.Embedding(vocab,b),nn.GRU(a,b,batch_first=True),nn.MultiheadAttention(2*a,2,batch_first=True)
        self.a,self.bias = a,nn.Parameter(torch.zeros(2))
    def forward(self, x):
        x = x.repeat(1, self.a)
        seq,pair,image = x.view(len(x),-1,self.a),x[:,:2*self.a,None].transpose(1,2),x.view(len(x),self.a,2,2)
        ids = (x.abs()*3).long()%self.embedding.num_embeddings
        outs = [self.linear(seq),self.conv1(seq.transpose(1,2)),self.conv2(image),self.embedding(ids),self.gru(seq)[0],self.attention(pair,pair,pair)[0]]
        return torch.stack([o.tanh().flatten(1).mean(1) for o in outs], 1).sum(1, keepdim=True)+self.bias

names = ['linear.weight','conv1.weight','conv2.weight','embedding.weight','gru','attention']

@given(a=st.integers(1, 5), b=st.integers(1, 9), kernel=st.integers(1, 3), vocab=st.integers(1, 12), every=st.integers(1, 9)|st.floats(.05, 1.5), T_end=st.floats(.1, 1),
       fraction=st.floats(0, 1), schedule=st.sampled_from(list(drop_funcs)), sparsity=st.floats(0, .98), method=st.sampled_from(['set','rigl','snfs']),
       distribution=st.sampled_from(distributions), opt=st.sampled_from(['sgd','adam','torch_adamw']), accumulate=st.booleans())
@example(a=1, b=1, kernel=1, vocab=1, every=1, T_end=.25, fraction=1., schedule='cosine', sparsity=0., method='set', distribution=uniform, opt='sgd', accumulate=True)
@example(a=1, b=1, kernel=1, vocab=1, every=1, T_end=1., fraction=1., schedule='cosine', sparsity=.96875, method='set', distribution=uniform, opt='sgd', accumulate=False)
@settings(max_examples=30)
def test_invariants_of_all_layers_and_schedules(a, b, kernel, vocab, every, T_end, fraction, schedule, sparsity, method, distribution, opt, accumulate):
    make,promise = methods[method]
    torch.manual_seed(0)
    learn = tiny_learner(Zoo(a,b,kernel,vocab), opt_func=optimizers[opt], n_trn=6, bs=4, lr=.01)
    dst = make(sparsity, every=every, T_end=T_end, fraction=fraction, schedule=schedule, sparse_init_f=distribution, params=names)
    watch = watched(learn, dst, *([GradientAccumulation(8)] if accumulate else []), epochs=2, **promise)
    assert len(masked_params(learn.model))==8
    for u in learn.recorder.mask_updates: assert (u.batch-accumulate)/6<2*T_end and u.fraction<=fraction and u.batch+(not dst.replace_step)>=(every if isinstance(every,int) else every*6)-1e-6

# when

def due(every, n_iter, n_epoch, T_end, follows):
    "After `every` steps each: an update that follows a step belongs to the last of these, another one takes the place of one more. Or on multiples of epochs"
    counts = isinstance(every, int)
    unit = every+(not follows) if counts else every*n_iter
    multiples = sorted({math.ceil(k*unit-1e-6) for k in range(1, 1+int(n_iter*n_epoch/unit)+1)})
    late = follows or counts
    return [m-late for m in multiples if m-late<T_end*n_epoch*n_iter-1e-9 and m-late<n_iter*n_epoch]

@pytest.mark.parametrize('every', [1,2,5])
def test_steps_between_updates(every):
    "The sequence of the authors' test: `every` steps of the optimizer, then an update in the place of one"
    learn,stepped = tiny_learner(n_trn=20),[]
    learn.create_opt()
    step = learn.opt.step
    learn.opt.step = lambda *args,**kwargs: (stepped.append(learn.train_iter),step(*args, **kwargs))
    learn.fit(1, cbs=RigL(.6, every=every, T_end=1.))
    assert [int(i in stepped) for i in range(20)]==([*[1]*every,0]*20)[:20] and updated_at(learn)==[i for i in range(20) if i not in stepped]

@pytest.mark.parametrize('every,replaces_most', [(1e-9,True),(.1,True),(.19,True),(.2,False),(1,False)])
def test_updates_instead_of_training_are_warned_of(every, replaces_most, caplog):
    tiny_learner(n_trn=10).fit(1, cbs=RigL(.6, every=every, T_end=1.))
    assert ('updates take the place of most steps' in caplog.text)==replaces_most

@pytest.mark.parametrize('method', [RigL,SET])
@pytest.mark.parametrize('every', [1,5,29,.25,1.,.77,1.5])
@pytest.mark.parametrize('T_end', [.3,1.])
def test_updates_fall_on_multiples(method, every, T_end):
    learn = tiny_learner(n_trn=10)
    learn.fit(3, cbs=method(.6, every=every, T_end=T_end))
    assert updated_at(learn)==due(every, 10, 3, T_end, method is SET)
    assert [u.epoch for u in learn.recorder.mask_updates]==pytest.approx([b/10 for b in updated_at(learn)])

@pytest.mark.parametrize('schedule,f', [('cosine',lambda x: (1+math.cos(math.pi*x))/2), ('constant',lambda x: 1), ('linear',lambda x: 1-x), ('exponential',lambda x: (1-x)**3), (lambda x: x,lambda x: x)])
def test_fraction_falls_until_T_end(schedule, f):
    learn = tiny_learner(n_trn=10)
    learn.fit(4, cbs=RigL(.6, every=4, schedule=schedule))
    assert [u.fraction for u in learn.recorder.mask_updates]==pytest.approx([.3*f(b/30) for b in range(4, 30, 5)])

@pytest.mark.parametrize('method', [RigL,SET,SNFS])
def test_fraction_0_is_static(method):
    learn = sparse_learner(.6, n_trn=10)
    before = masks(learn.model)
    learn.fit(2, cbs=method(every=2, fraction=0.))
    assert same(before, masks(learn.model)) and updated_at(learn)==[]

def test_dense_network_stays_dense():
    learn = tiny_learner(n_trn=10)
    watch = watched(learn, RigL(0., every=3))
    assert watch.n_updates>0 and n_masked(learn.model)==0

@pytest.mark.parametrize('method', [RigL,SET])
def test_accumulation_counts_steps(method):
    learn = tiny_learner(n_trn=10)
    learn.fit(4, cbs=[method(.6, every=3, T_end=1.), GradientAccumulation(16)])
    assert updated_at(learn)==[2*b+1 for b in due(3, 20, 1, 1., method is SET)]

@pytest.mark.parametrize('method', [RigL,partial(SNFS, num_grads=2)], ids=['rigl','snfs'])
def test_accumulation_is_a_larger_batch(method):
    "The same connections and, to rounding, the same weights"
    def _run(bs, *cbs):
        learn = tiny_learner(mlp().double(), dls=tiny_dls(80//bs, bs, dtype=torch.float64))
        learn.fit(4, cbs=[method(.6, every=2, T_end=1., schedule='constant'), *cbs])
        return learn
    small,large = _run(8, GradientAccumulation(16)),_run(16)
    assert len(updated_at(small))==len(updated_at(large)) and updated_at(large)==due(2, 5, 4, 1., method is not RigL) and same(masks(small.model), masks(large.model))
    for a,b in zip(small.model.parameters(), large.model.parameters()): torch.testing.assert_close(a, b)

@pytest.mark.parametrize('every', [5,.5])
def test_overflow_leaves_the_update_pending(every):
    learn = tiny_learner(n_trn=10)
    watched(learn, RigL(.6, every=every, T_end=1.), Overflow(5,6,7,13))
    assert updated_at(learn)==([8,10,15,20,25] if every==.5 else [8,15,21,27])

def test_update_replaces_the_step():
    learn,steps = sparse_learner(.6, n_trn=10, opt_func=Adam),[]
    learn.create_opt()
    step = learn.opt.step
    learn.opt.step = lambda *args,**kwargs: (steps.append(learn.epoch*10+learn.iter), step(*args, **kwargs))
    biases = Note('after_batch', lambda cb: [p.detach().clone() for p in cb.model.parameters() if p.ndim==1])
    left = Note('after_batch', lambda cb: max([0.]+[p.grad.abs().max().item() for p in cb.model.parameters() if p.grad is not None]))
    learn.fit(2, cbs=[RigL(every=4, T_end=1.), biases, left])
    assert updated_at(learn)==[4,9,14,19] and steps==[b for b in range(20) if b not in (4,9,14,19)] and set(left.notes)=={0.}
    for b in range(1, 20): assert all(x.equal(y) for x,y in zip(biases.notes[b-1], biases.notes[b]))==(b in (4,9,14,19))

def test_clipping_sees_masked_gradients():
    learn,norms = tiny_learner(n_trn=10),[]
    def _norm(cb): return torch.stack([p.grad.norm() for p in cb.model.parameters()]).norm().item()
    def _masked(cb): return math.sqrt(sum((p.grad*masks(cb.model).get(n, torch.ones(()))).square().sum().item() for n,p in cb.model.named_parameters()))
    dense,before,after = Note('before_step', _masked, order=10.3),Note('before_step', _norm, order=10.9),Note('before_step', _norm, order=11.5)
    learn.fit(2, cbs=[RigL(.9, every=4), GradientClip(.1), dense, before, after])
    dense.notes = [n for b,n in enumerate(dense.notes) if b not in updated_at(learn)]
    assert len(before.notes)==20-len(updated_at(learn)) and before.notes==pytest.approx(dense.notes) and after.notes==pytest.approx([min(.1, n) for n in before.notes], rel=1e-4)

def test_two_callbacks_share_a_replaced_step():
    learn = tiny_learner(n_trn=10)
    first,second = RigL(.6, every=4, params=['0.weight']),RigL(.8, every=4, params=['2.weight'])
    seen,steps = Note('after_batch', lambda cb: masks(cb.model)),Note('before_step', lambda cb: cb.iter, order=12)
    learn.fit(2, cbs=[first, second, seen, steps, Witness()])
    assert updated_at(learn)==[4,4,9,9,14,14] and len(steps.notes)==17 and violations(learn.model, learn.opt)==[]
    for b in range(1, 20):
        changed = [n for n in seen.notes[0] if not seen.notes[b][n].equal(seen.notes[b-1][n])]
        assert changed==(['0.weight','2.weight'] if b in (4,9,14) else []) or b==14

def test_frozen_layers_are_untouched_whatever_gradient_is_left():
    "Layers that trained before, with gradients of 0 left over, are frozen all the same"
    for method in (RigL,SET,SNFS):
        learn = sparse_learner(.6, n_trn=10, splitter=halves, cbs=Stranger())
        learn.fit(1)
        learn.freeze()
        assert learn.model[0].weight.grad is not None
        before,w = masks(learn.model),weights(learn.model)
        learn.fit(2, cbs=method(every=4, T_end=1.))
        assert learn.model[0].weight_mask.equal(before['0.weight']) and learn.model[0].weight.equal(w['0.weight']) and not learn.model[4].weight_mask.equal(before['4.weight'])

def test_looking_changes_nothing():
    def _run(look):
        learn,rigl = tiny_learner(n_trn=10),RigL(.6, every=4)
        learn.add_cb(rigl)
        learn.fit(2)
        look(learn)
        learn.fit(2)
        return weights(learn.model),masks(learn.model)
    plain = _run(noop)
    for look in (lambda l: l.validate(), lambda l: l.get_preds(), lambda l: l.lr_find(show_plot=False, num_it=12), lambda l: l.get_preds(ds_idx=0)):
        assert all(same(a, b) for a,b in zip(plain, _run(look)))

def test_looking_at_the_end_of_an_epoch_changes_nothing():
    def _run(look):
        learn = tiny_learner(n_trn=10)
        busy = []
        def _look(cb):
            if busy: return
            busy.append(1)
            with learn.no_logging(): look(learn)
            busy.clear()
        learn.fit(3, cbs=[RigL(.6, every=4), Note('after_train', _look)])
        return masks(learn.model)
    assert same(_run(noop), _run(lambda l: l.model.eval()(torch.randn(3,4))))

# one seed, one network

def trained(cbs, fit=lambda learn,cbs: learn.fit(4, cbs=cbs), **kwargs):
    learn = tiny_learner(n_trn=10, **kwargs)
    learn.recorder.train_metrics = False
    fit(learn, cbs)
    return {**weights(learn.model),**{f'mask of {k}':m for k,m in masks(learn.model).items()}}

def looped(cbs, opt=partial(torch.optim.SGD, lr=.05, momentum=.9), hypers=()):
    "The same training, in somebody's own loop, with a learning rate and a momentum for each step if `hypers` has some"
    model,data,hypers = mlp(),list(tiny_dls(10).train),iter(hypers)
    opt = opt(model.parameters())
    manager = LoopManager(model, opt, len(data), 4, cbs)
    for _ in range(4):
        for xb,yb in data:
            opt.param_groups[0].update(next(hypers, {}))
            opt.zero_grad()
            MSELossFlat()(model(xb), yb).backward()
            opt.step()
    manager.finalize()
    return {**weights(model),**{f'mask of {k}':m for k,m in masks(model).items()}}

recipes = dict(
    SET=("!SETPruningModifier\n  final_sparsity: .6", SETPruningModifier, lambda: SET(.6, every=.4)),
    SNFS=("!SNFSPruningModifier\n  final_sparsity: .6", SNFSPruningModifier, lambda: SNFS(.6, every=.4)),
    RigL=("!RigLPruningModifier\n  final_sparsity: .6\n  num_grads: 1", RigLPruningModifier, lambda: RigL(.6, every=.4)))

@pytest.mark.parametrize('name', recipes)
def test_callback_recipe_and_plain_loop_are_one(name):
    text,modifier,callback = recipes[name]
    recipe = Recipe.from_string(f"modifiers:\n- {text}\n  start_epoch: 0\n  end_epoch: 3\n  update_frequency: .4\n- !EpochRangeModifier\n  start_epoch: 0\n  end_epoch: 4\n")
    opt = dict(opt_func=wrapped(torch.optim.SGD, momentum=.9))
    runs = [trained([callback()], **opt), trained([modifier(.6, 0, 3, .4)], **opt), trained(recipe.callbacks(), **opt), looped([callback()]), looped([modifier(.6, 0, 3, .4)])]
    assert all(same(runs[0], r) for r in runs[1:])
    assert not same(runs[0], trained([modifier(.6, 0, 3, .4, seed=1)], **opt))

@pytest.mark.parametrize('name', recipes)
def test_one_cycle_recipe_and_plain_loop_are_one(name):
    text,_,callback = recipes[name]
    recipe,hypers = Recipe.from_string(f"modifiers:\n- {text}\n  start_epoch: 0\n  end_epoch: 3\n  update_frequency: .4\n- !EpochRangeModifier\n  start_epoch: 0\n  end_epoch: 4\n"),[]
    note = Note('after_pred', lambda cb: hypers.append(dict(lr=cb.opt.hypers[-1]['lr'], momentum=cb.opt.hypers[-1]['mom'])) if cb.training else None)
    def fit(learn, cbs): learn.fit_one_cycle(4, .05, wd=0., cbs=cbs)
    opt = dict(opt_func=wrapped(torch.optim.SGD, momentum=.9))
    first = trained([callback(), note], fit, **opt)
    assert len(hypers)==40 and len({h['momentum'] for h in hypers})>30
    assert same(first, trained(recipe.callbacks(), fit, **opt)) and same(first, looped([callback()], hypers=hypers)) and not same(first, looped([callback()]))

@pytest.mark.parametrize('method', [SET,SNFS,RigL])
def test_one_cycle_repeats(method):
    def _run(seed=0): return trained([method(.6, every=3, seed=seed)], lambda learn,cbs: learn.fit_one_cycle(4, .05, cbs=cbs))
    torch.manual_seed(1)
    first = _run()
    torch.manual_seed(2)
    assert same(first, _run()) and not same(first, _run(3))

def test_no_global_randomness():
    "What is left of the generators is what a dense training leaves"
    def _left(cbs):
        torch.manual_seed(0)
        np.random.seed(0)
        trained(cbs)
        return torch.get_rng_state().tolist(),np.random.get_state()[1].tolist()
    assert _left([SET(.6, every=3)])==_left([])

def test_random_growth_is_that_of_the_name():
    "In another order of layers, the same connections"
    def _run(order):
        made = dict(a=nn.Linear(4,16), b=nn.Linear(16,16), c=nn.Linear(16,2))
        with torch.no_grad():
            for i,p in enumerate(p for k in 'abc' for p in made[k].parameters()): p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        model = nn.ModuleDict({k:made[k] for k in order})
        model.forward = lambda x: model['c'](model['b'](model['a'](x).relu()).relu())
        learn = tiny_learner(model, n_trn=10)
        learn.fit(3, cbs=SET(.6, every=3))
        return masks(learn.model)
    a,b = _run('abc'),_run('cab')
    assert list(a)!=list(b) and all(a[k].equal(b[k]) for k in a)

def test_layers_and_updates_draw_differently():
    learn = sparse_learner(.9, model=nn.Sequential(nn.Linear(30,30), nn.Linear(30,30)), shape=(30,), d_out=30, n_trn=10)
    seen = Note('after_batch', lambda cb: masks(cb.model))
    learn.fit(1, cbs=[SET(every=4, fraction=1., keep_f=random_scores, schedule='constant', T_end=1.), seen])
    (a,b),(c,d) = (seen.notes[i].values() for i in (3,7))
    assert not any(x.equal(y) for x,y in ((a,b),(a,c),(b,d),(c,d)))

def test_split_fits_of_a_modifier_are_one():
    def _run(make, *epochs):
        modifier = make()
        return trained(None, lambda learn,_: [learn.fit(n, cbs=modifier) for n in epochs])
    for make in (lambda: SETPruningModifier(.6, .5, 3.5, .5), lambda: RigLPruningModifier(.6, .5, 3.5, .5), lambda: SNFSPruningModifier(.6, 0, 4, 1.), lambda: GraNetPruningModifier(.3, .8, .5, 3.5, .5)):
        whole = _run(make, 4)
        assert same(whole, _run(make, 1,1,2)) and same(whole, _run(make, 3,1))

resumable = dict(
    set=lambda: SET(.6, every=4), set_epochs=lambda: SET(.6, every=.4), rigl=lambda: RigL(.6, every=4), rigl_epochs=lambda: RigL(.6, every=.4),
    snfs=lambda: SNFS(.6, every=10, T_end=1.), snfs_epochs=lambda: SNFS(.6, every=1., T_end=1.),  # their windows lie within an epoch
    granet=lambda: GraNetPruningModifier(.3, .8, 0, 3.5, .4), granet_local=lambda: GraNetPruningModifier(.3, .8, .5, 3., .4, global_sparsity=False),
    acdc=lambda: ACDCPruningModifier(.8, 0, 4, 1), acdc_halves=lambda: ACDCPruningModifier(.8, .5, 4, .75), acdc_local=lambda: ACDCPruningModifier(.8, 0, 3, 1, global_sparsity=False),
    set_modifier=lambda: SETPruningModifier(.6, .5, 3, .4), rigl_modifier=lambda: RigLPruningModifier(.6, .5, 3, .4))

@pytest.mark.parametrize('name', resumable)
def test_resumed_is_uninterrupted(name, tmp_path):
    def _learner(): return tiny_learner(n_trn=10, path=tmp_path, opt_func=Adam, lr=.01)
    whole = _learner()
    whole.fit(4, cbs=[resumable[name](), SaveModelCallback(every_epoch=True, with_opt=True, fname='epoch')])
    for epoch in (1,2):
        learn = _learner()
        masks_from_file(learn.model, tmp_path/f'models/epoch_{epoch-1}.pth')
        learn.load(f'epoch_{epoch-1}')
        learn.fit(4, cbs=resumable[name](), start_epoch=epoch)
        assert same(weights(whole.model), weights(learn.model)) and same(masks(whole.model), masks(learn.model)), epoch

@pytest.mark.parametrize('name', ['set','rigl','snfs','granet'])
def test_resumed_knows_what_was_ever_active(name, tmp_path):
    "All that the recorder has of the updates is that of an uninterrupted fit"
    def _learner(): return tiny_learner(n_trn=10, path=tmp_path, opt_func=Adam, lr=.01)
    whole,learn = _learner(),_learner()
    whole.fit(4, cbs=resumable[name]())
    until_interrupted(learn.fit, 4, cbs=[resumable[name](), CheckpointCallback(tmp_path), Interrupt('before_batch', 5, 2)])
    learn = _learner()
    learn.fit(4, cbs=[resumable[name](), CheckpointCallback(tmp_path, resume=True)])
    of_whole = {u.batch:u for u in whole.recorder.mask_updates}
    assert learn.recorder.mask_updates and all(u==of_whole[u.batch] for u in learn.recorder.mask_updates)

@pytest.mark.parametrize('method', [SET,SNFS,RigL])
def test_masks_that_went_are_made_anew(method):
    "The same callback trains sparsely again, if masks were made permanent or the model is another one"
    learn,cb = tiny_learner(n_trn=10),method(.6, every=3)
    learn.fit(2, cbs=cb)
    make_permanent(learn.model)
    learn.fit(2, cbs=cb)
    assert measured_sparsity(learn.model)==pytest.approx(.6, abs=.02) and all(u.churn>0 for u in learn.recorder.mask_updates[:3])
    learn.model = mlp()
    learn.create_opt()
    learn.fit(2, cbs=cb)
    assert measured_sparsity(learn.model)==pytest.approx(.6, abs=.02) and 0<learn.recorder.mask_updates[0].ever_active<.7

@pytest.mark.parametrize('mask_type,groups', [('constant_fan_in',(64,32,5)),('filter',(20,64,32)),('channel',(64,32,5)),('block4',(4,4,4))])
def test_groups_are_redistributed_without_drift(mask_type, groups):
    "The total stays within a group a layer of what it was, however many updates there are"
    set_seed(0)
    model = nn.Sequential(nn.Linear(20,64), nn.ReLU(), nn.Linear(64,32), nn.ReLU(), nn.Linear(32,5))
    learn,seen = tiny_learner(model, dls=tiny_dls(30, 8, (20,), 5)),Note('after_step', lambda self: sum(n_kept(self.model).values()))
    learn.fit(6, cbs=[SNFS(.8, every=2, mask_type=mask_type, T_end=1., schedule='constant'), seen])
    assert len(set(seen.notes))>1 and max(abs(n-seen.notes[0]) for n in seen.notes)<=sum(groups)

@pytest.mark.parametrize('make', [lambda: RigL(.8), lambda: SNFS(schedule='linear'), lambda: RigLPruningModifier(.8, 0, 3, .5)])
def test_callbacks_can_be_pickled(make): assert repr(pickle.loads(pickle.dumps(make())))==repr(make())

# several processes

_ddp = '''
import sys; sys.path.insert(0, sys.argv[3])
from utils import *
from fastsparse_create.callback.dynamic import *
import torch.distributed as dist
rank = int(sys.argv[1])
dist.init_process_group('gloo', init_method=f'file://{sys.argv[2]}', rank=rank, world_size=2)
def agree(t):
    both = [torch.empty_like(t) for _ in range(2)]
    dist.all_gather(both, t.detach().contiguous())
    return both[0].equal(both[1])
for make in (lambda s: SET(s, every=3), lambda s: RigL(s, every=3), lambda s: SNFS(s, every=5)):
    for broadcasts in (True,False):
        for prepared in (True,False):
            torch.manual_seed(0)
            model = mlp()
            if prepared: sparsify_model(model, .6)
            net = nn.parallel.DistributedDataParallel(model, broadcast_buffers=broadcasts)
            torch.manual_seed(rank)
            learn = tiny_learner(net, seed=rank, n_trn=8, opt_func=Adam, lr=.01)
            first = Note('before_batch', lambda cb: [p.mask.clone() for p in masked_params(model)], order=60)
            learn.fit(2, cbs=[make(None if prepared else .6), first])
            assert len(learn.recorder.mask_updates)>=2 and not first.notes[0][1].equal(model[2].weight_mask)
            for t in [*model.parameters(), *(p.mask for p in masked_params(model))]: assert agree(t), (broadcasts, prepared)
            assert violations(model, learn.opt)==[]
assert not agree(learn.dls.train.one_batch()[0])
dist.barrier()
print('agreed', flush=True)
os._exit(0)
'''

@pytest.mark.slow
def test_ranks_exchange_the_same_connections(tmp_path):
    "Each rank has batches of its own; none is told what the other does"
    root = Path(__file__).parent
    args,env = [sys.executable, '-W', 'ignore', '-c', _ddp],{**os.environ, 'OMP_NUM_THREADS':'1', 'PYTHONPATH':str(root.parent)}
    ranks = [subprocess.Popen([*args, str(r), str(tmp_path/'store'), str(root)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for r in range(2)]
    said = [p.communicate(timeout=120) for p in ranks]
    assert [out for out,_ in said]==['agreed\n']*2, said

# large layers: short cuts

def picked(scores, eligible, n, lowest):
    "The slow and obvious way"
    where = np.flatnonzero(eligible)
    best_first = np.lexsort((-where,scores[where]) if lowest else (where,-scores[where]))
    return np.sort(where[best_first[:n]])

@pytest.mark.parametrize('kind', ['normal','ties','equal','blocks','inf'])
@pytest.mark.parametrize('share', [.002,.5,1.])
def test_pick_of_long_arrays(kind, share):
    rng,size = np.random.default_rng(0),131073+5000
    scores = dict(normal=lambda: rng.normal(size=size).astype('f'), ties=lambda: rng.integers(0, 40, size).astype('f'), equal=lambda: np.zeros(size, 'f'),
                  blocks=lambda: np.repeat(rng.normal(size=size//1000+1), 1000)[:size], inf=lambda: np.where(rng.random(size)<.3, np.inf, rng.normal(size=size)))[kind]()
    eligible = rng.random(size)<share
    n_eligible = np.count_nonzero(eligible)
    for lowest in (False,True):
        for n in {0,1,n_eligible//300,n_eligible//2,n_eligible-1,n_eligible}:
            found = pick(scores, eligible, n, lowest)
            assert np.array_equal(np.sort(found), picked(scores, eligible, n, lowest)), (n,lowest)

@pytest.mark.parametrize('ties', [False,True])
@pytest.mark.parametrize('dtype', [torch.float32,torch.bfloat16,torch.float64])
def test_exchange_of_large_layers(ties, dtype):
    shape,g = (363,367),torch.Generator().manual_seed(0)
    def _scores(): return (torch.randint(0, 9, shape, generator=g) if ties else torch.rand(shape, generator=g)).to(dtype)
    mask,keep,grow = torch.rand(shape, generator=g)<.1,_scores(),_scores()
    n = int(mask.sum())
    found = drop_and_grow(mask, keep, grow, n-n//3, n)
    keep,grow,expected = keep.flatten().double().numpy(),grow.flatten().double().numpy(),mask.flatten().numpy().copy()
    expected[picked(keep, expected, n//3, True)] = False
    expected[picked(grow, ~expected, n//3, False)] = True
    assert np.array_equal(found.flatten().numpy(), expected)

@pytest.mark.parametrize('method', [RigL,SNFS,SET])
@pytest.mark.parametrize('size', [16,400])
def test_nan_is_named_and_changes_nothing(method, size):
    learn = tiny_learner(mlp(4, size, 2), n_trn=6)
    def _poison(cb):
        if cb.iter>=4: (cb.model[2].weight.data if method is SET else cb.model[2].weight.grad)[masked_params(cb.model)[1].mask.logical_xor(torch.tensor(method is RigL))] = math.nan
    seen = Note('before_step', lambda cb: masks(cb.model), order=1)
    with pytest.raises(ValueError, match=r'2\.weight: .*(NaN|nan)'): learn.fit(1, cbs=[method(.9, every=5, T_end=1., schedule='constant'), Note('before_step', _poison, order=5), seen])
    assert same(seen.notes[0], masks(learn.model)) and updated_at(learn)==[]

@pytest.mark.parametrize('dtype', [torch.float32,torch.float64,torch.bfloat16,torch.float16])
@pytest.mark.parametrize('layout', ['plain','channels_last','tied','tied_apart'])
@pytest.mark.parametrize('n_changes', [0,1,5,60,400])
@pytest.mark.parametrize('by_positions', [False,True])
def test_rewire_of_few_and_of_many(dtype, layout, n_changes, by_positions):
    "New: all 0; kept: the same bits, -0 included; and what is cached of the mask follows"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16,16,3), nn.Conv2d(16,16,3)).to(dtype)
    if layout=='channels_last': model = model.to(memory_format=torch.channels_last)
    if layout.startswith('tied'): model[1].weight = model[0].weight
    sparsify_model(model, .5, criterion=random_scores)
    if layout=='tied_apart': model[1]._buffers['weight_mask'] = model[0].weight_mask.clone()  # as after a move to another device
    p = masked_params(model)[0]
    p.param.data[p.mask&(torch.rand(p.mask.shape)<.1)] = -0.
    opt = torch.optim.Adam(model.parameters(), eps=1e-3)
    p.param.grad = torch.randn_like(p.param)*p.mask
    opt.step()
    mask_tensors([p.param], [p.mask])  # cached from now on
    was,held,slots = p.mask.clone(),p.param.detach().clone(),[s.clone() for s in memory(OptimWrapper(opt=opt), p.param)]
    new = was.clone()
    for old in (True,False):
        where = (was==old).nonzero()[torch.randperm(int((was==old).sum()))[:n_changes]]
        new[tuple(where.T)] = not old
    if by_positions: p.exchange((was&~new).flatten().nonzero().flatten(), (new&~was).flatten().nonzero().flatten(), OptimWrapper(opt=opt))
    else: p.rewire(new, OptimWrapper(opt=opt))
    assert p.mask.equal(new) and len(slots)==2 and p.param.stride()==held.stride()
    for now,then in zip([p.param.detach(), *memory(OptimWrapper(opt=opt), p.param)], [held,*slots]):
        assert now.equal(then*(was&new)) and now[was&new].signbit().equal(then[was&new].signbit())
    for x in (torch.randn_like(p.param), torch.randn(p.param.shape), torch.randn_like(p.param, dtype=torch.float64)):
        x = x.detach()
        before = x.clone()
        mask_tensors([x], [p.mask])
        assert x.equal(before.masked_fill(~new, 0))
    if layout.startswith('tied'): assert model[1].weight_mask.equal(new) and len(masked_params(model))==1

def test_rewire_refuses_another_shape():
    p = masked_params(sparse_learner().model)[0]
    with pytest.raises(ValueError, match=r'0\.weight: a mask of shape \(4, 16\)'): p.rewire(torch.ones(4,16).bool())

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encode,self.hidden,self.decode = nn.Linear(4,16,bias=False),nn.Linear(4,4),nn.Linear(4,16,bias=False)
        self.decode.weight = self.encode.weight
    def forward(self, x): return self.decode(self.hidden(self.encode(x)@self.encode.weight))[:,:2]

@pytest.mark.parametrize('method', [RigL,SET,SNFS])
def test_tied_weights_are_exchanged_once(method):
    learn = tiny_learner(Tied(), n_trn=10)
    watched(learn, method(.6, every=3), total_only=method is SNFS)
    assert len(masked_params(learn.model))==2 and learn.model.encode.weight_mask.equal(learn.model.decode.weight_mask) and learn.model.encode.weight is learn.model.decode.weight

@pytest.mark.parametrize('method', [RigL,SET,SNFS])
@pytest.mark.parametrize('dtype', [torch.float32,torch.float64,torch.bfloat16])
@pytest.mark.parametrize('around', [ChannelsLast,Stranger])
def test_layouts_and_precisions(method, dtype, around):
    learn = tiny_learner(convnet().to(dtype), shape=(3,8,8), n_trn=8, dtype=dtype, cbs=around())
    watch = watched(learn, method(.6, every=3), total_only=method is SNFS, epochs=2)
    assert watch.n_updates>=3 and all(p.dtype==dtype for p in learn.model.parameters())

# what is refused

@pytest.mark.parametrize('kwargs,error,message', [
    (dict(sparsity=1), ValueError, 'sparsity must be below 1, got 1'), (dict(sparsity=1.2), ValueError, r'sparsity must be in \[0, 1\], got 1.2'),
    (dict(sparsity=-.1), ValueError, r'sparsity must be in \[0, 1\], got -0.1'), (dict(sparsity='.9'), TypeError, "sparsity must be a number, got '.9'"),
    (dict(seed=None), TypeError, 'seed must be a whole number, got None'), (dict(seed=1.5), TypeError, 'seed must be a whole number, got 1.5'),
    (dict(sparsity=math.nan), ValueError, 'sparsity must be in'), (dict(sparsity=[.5,.5]), TypeError, 'sparsity must be a number'),
    (dict(fraction=1.1), ValueError, r'fraction must be in \[0, 1\], got 1.1'), (dict(fraction=None), TypeError, 'fraction must be a number, got None'),
    (dict(keep_f=torch.abs), TypeError, 'keep_f is called with keyword arguments'), (dict(every=0), ValueError, 'every must be above 0, got 0'), (dict(every=-.5), ValueError, 'every must be at least 0, got -0.5'),
    (dict(every=True), TypeError, 'every must be a number, got True'), (dict(every='1'), TypeError, "every must be a number, got '1'"), (dict(every=math.inf), ValueError, 'every must be'),
    (dict(T_end=0), ValueError, 'T_end must be above 0, got 0'), (dict(T_end=1.5), ValueError, r'T_end must be in \[0, 1\], got 1.5'),
    (dict(schedule='cosin'), ValueError, "schedule 'cosin' is not known, did you mean 'cosine'"), (dict(schedule=3), ValueError, 'schedule 3 is not known'),
    (dict(replace_step=1), TypeError, 'replace_step must be True or False, got 1'),
    (dict(num_grads=-1), ValueError, 'num_grads must be at least 0, got -1'), (dict(num_grads=1.5), ValueError, 'num_grads must be a whole number, got 1.5'),
    (dict(num_grads=0), ValueError, "num_grads must be at least 1 for the criterion 'gradient', got 0"), (dict(grad_decay=2), ValueError, r'grad_decay must be in \[0, 1\], got 2'),
    (dict(params=3), TypeError, 'params must be a string or a list of strings, got 3'),
    (dict(keep_f='magnitude'), TypeError, "keep_f must be a function, got 'magnitude'"), (dict(grow_f=None), TypeError, 'grow_f must be a function, got None'),
    (dict(redistribute_f='gradient'), TypeError, "redistribute_f must be a function, got 'gradient'"), (dict(sparse_init_f='uniform'), TypeError, "sparse_init_f must be a function, got 'uniform'"),
    (dict(mask_type='4:8-T'), ValueError, "mask_type '4:8-T' can't be exchanged one by one"),
    (dict(mask_type='2:4', sparsity=.9), ValueError, "sparsity must be 0.5 for mask_type '2:4', got 0.9"),
    (dict(mask_type='2:4', redistribute_f=gradient), ValueError, "mask_type '2:4' has the same sparsity everywhere")])
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=f'^RigL: .*{message}'): RigL(**kwargs)

def test_unknown_pattern_is_named():
    with pytest.raises(ValueError, match="mask_type: 'blok4' is not known, did you mean 'block4'"): RigL(mask_type='blok4')

windowed = [SETPruningModifier,SNFSPruningModifier,RigLPruningModifier,SRigLPruningModifier,GraNetPruningModifier]
def recipe_args(cls, **kwargs): return {**dict(final_sparsity=.8, start_epoch=0, end_epoch=3, update_frequency=.5), **(dict(init_sparsity=.5) if cls is GraNetPruningModifier else {}), **kwargs}

@pytest.mark.parametrize('cls', windowed)
@pytest.mark.parametrize('kwargs,error,message', [
    (dict(final_sparsity=1), ValueError, r'final_sparsity must be between \(0, 1\), got 1'), (dict(final_sparsity=0), ValueError, r'final_sparsity must be between \(0, 1\), got 0'),
    (dict(final_sparsity='.8'), TypeError, "final_sparsity must be a number, got '.8'"), (dict(start_epoch=-2), ValueError, 'start_epoch must be at least -1, got -2'),
    (dict(start_epoch='0'), TypeError, "start_epoch must be a number, got '0'"), (dict(end_epoch=None), TypeError, 'end_epoch must be a number, got None'),
    (dict(start_epoch=3), ValueError, 'end_epoch must lie after start_epoch 3, .*got 3'), (dict(end_epoch=-1), ValueError, 'end_epoch must lie after start_epoch 0, .*got -1'),
    (dict(update_frequency=0), ValueError, 'update_frequency must be above 0, got 0'), (dict(update_frequency=-1), ValueError, 'update_frequency must be at least 0, got -1'),
    (dict(params=1), TypeError, 'params must be a string or a list of strings, got 1'), (dict(leave_enabled=None), TypeError, 'leave_enabled must be True or False, got None'),
    (dict(sparsity_strategy='erk'), ValueError, "sparsity_strategy 'erk' is not known"), (dict(init_update_fraction=2), ValueError, r'init_update_fraction must be in \[0, 1\], got 2'),
    (dict(schedule='cosin'), ValueError, "schedule 'cosin' is not known, did you mean 'cosine'")])
def test_bad_recipe_arguments(cls, kwargs, error, message):
    with pytest.raises(error, match=f'^{cls.__name__}: .*{message}'): cls(**recipe_args(cls, **kwargs))

@pytest.mark.parametrize('cls,kwargs,error,message', [
    (RigLPruningModifier, dict(global_sparsity=True), ValueError, 'global_sparsity must be false'), (RigLPruningModifier, dict(momentum_buffer_reset=False), ValueError, 'momentum_buffer_reset must be true'),
    (RigLPruningModifier, dict(num_grads=0), ValueError, 'num_grads must be at least 1, got 0'), (RigLPruningModifier, dict(num_grads=2.5), ValueError, 'num_grads must be a whole number, got 2.5'),
    (SNFSPruningModifier, dict(mask_type='2:4', final_sparsity=.5), ValueError, 'has the same sparsity everywhere'),
    (SETPruningModifier, dict(mask_type='2:4'), ValueError, "sparsity must be 0.5 for mask_type '2:4', got 0.8"),
    (GraNetPruningModifier, dict(init_sparsity=.8), ValueError, 'final_sparsity must be above init_sparsity 0.8, got 0.8'), (GraNetPruningModifier, dict(init_sparsity=-.5), ValueError, r'init_sparsity must be in \[0, 1\], got -0.5'),
    (GraNetPruningModifier, dict(inter_func='cubik'), ValueError, "inter_func 'cubik' is not known, did you mean 'cubic'"), (GraNetPruningModifier, dict(global_sparsity=1), TypeError, 'global_sparsity must be True or False, got 1'),
    (SRigLPruningModifier, dict(min_salient=1.5), ValueError, r'min_salient must be in \[0, 1\], got 1.5')])
def test_bad_arguments_of_one(cls, kwargs, error, message):
    with pytest.raises(error, match=f'^{cls.__name__}: .*{message}'): cls(**recipe_args(cls, **kwargs))

@pytest.mark.parametrize('cls', windowed)
def test_modifiers_repeat_themselves(cls):
    modifier = cls(**recipe_args(cls, params=['0.weight'], seed=3))
    assert repr(cls(**modifier.args()))==repr(modifier) and 'seed=3' in repr(modifier)

@pytest.mark.parametrize('method', [SET,RigL,SNFS])
def test_contradicting_sparsity_is_refused_before_anything_changes(method):
    learn = sparse_learner(.6)
    before = weights(learn.model),masks(learn.model)
    with pytest.raises(ValueError, match=f"{method.__name__}: sparsity 0.9 was asked for, but the model's masks have 0.5994: ask for that"): learn.fit(1, cbs=method(.9, every=2))
    assert same(before[0], weights(learn.model)) and same(before[1], masks(learn.model))
    learn.fit(1, cbs=method(.6, every=2))

@pytest.mark.parametrize('kind', ['2:4','constant_fan_in','block4','filter'])
def test_masks_of_another_pattern_are_refused(kind):
    learn = sparse_learner(.5)
    with pytest.raises(ValueError, match=f"the mask of '0.weight' is not of mask_type '{kind}'"): learn.fit(1, cbs=RigL(every=2, mask_type=kind, params=['0.weight','2.weight']))

@pytest.mark.parametrize('kind,mask_type,fraction,is_told', [
    ('2:4','unstructured',.3,True), ('1:4','unstructured',.3,True), ('1:8','unstructured',.3,True), ('4:8','unstructured',.3,True), ('2:4','2:4',.3,False), ('unstructured','unstructured',.3,False), ('2:4','unstructured',0,False)])
def test_an_nm_pattern_that_would_be_lost_is_told(kind, mask_type, fraction, is_told, caplog):
    "Of the layers that have it, by its own name: 2:4 is 4:8 as well"
    learn = tiny_learner(mlp(16,32,2), shape=(16,))
    sparsify_model(learn, ifnone(getattr(get_mask_type(kind), 'sparsity', None), .5), ['0.weight'], uniform, mask_type=kind)
    if mask_type=='unstructured': sparsify_model(learn, .5, ['2.weight'])
    learn.fit(1, cbs=RigL(every=2, fraction=fraction, mask_type=mask_type))
    told = f"RigL: masks are {kind}, which is lost when connections are exchanged one by one, mask_type='{kind}' keeps it: 0.weight\n"
    assert caplog.text.count('masks are')==caplog.text.count(told)==is_told

def test_masks_of_frozen_layers_keep_what_they_have_learned():
    "Weights that are frozen have been trained elsewhere: the largest stay, as they are; later fits go on from there"
    learn = tiny_learner()
    learn.model[0].requires_grad_(False)
    before = learn.model[0].weight.clone()
    learn.fit(1, 0., cbs=RigL(.5, fraction=0, sparse_init_f=uniform, params=['0.weight','2.weight']))
    fresh = tiny_learner()
    fresh.fit(1, 0., cbs=RigL(.5, fraction=0, sparse_init_f=uniform, params=['2.weight']))
    (p,q),(random,) = masked_params(learn.model),masked_params(fresh.model)
    assert p.mask.equal(keep_highest(before.abs(), before.numel()//2)) and p.param.equal(before*p.mask)
    assert q.mask.equal(random.mask) and q.param.equal(random.param)

def test_presets_are_classes_that_fastai_makes():
    learn = tiny_learner()
    learn.add_cb(RigL)
    assert [type(cb) for cb in learn.cbs if isinstance(cb, DynamicSparseTrainingCallback)]==[RigL] and isinstance(learn.dynamic_sparse_training, RigL)
    learn.remove_cb(RigL)
    assert not any(isinstance(cb, DynamicSparseTrainingCallback) for cb in learn.cbs)

@pytest.mark.parametrize('method,kwargs', [(SET,SET_kwargs),(SNFS,SNFS_kwargs),(RigL,RigL_kwargs)])
def test_presets_show_their_defaults(method, kwargs):
    shown = {n:p.default for n,p in inspect.signature(method).parameters.items()}
    usual = {n:p.default for n,p in inspect.signature(DynamicSparseTrainingCallback).parameters.items()}
    made = method()
    assert shown=={**usual, **kwargs} and all(getattr(made, n)==v for n,v in shown.items())

def test_presets_can_be_the_base_of_ones_own():
    class Weakest(RigL, abstract=True):
        def __init__(self, sparsity=.8, **kwargs): super().__init__(sparsity, **kwargs)
    cb = Weakest(every=7)
    assert cb.args()=={**RigL(.8, every=7).args()} and repr(cb)==repr(RigL(.8, every=7)).replace('RigL', 'Weakest')
    tiny_learner().fit(1, cbs=cb)

def test_numbers_of_numpy_are_numbers():
    found = []
    for number in (int,np.int64):
        learn = tiny_learner()
        learn.fit(2, cbs=SET(.5, every=number(3), seed=number(7)))
        found.append((masks(learn.model),[u.batch for u in learn.recorder.mask_updates]))
    assert same(found[0][0], found[1][0]) and found[0][1]==found[1][1]

def test_no_drop_fraction_without_a_fit():
    cb,learn = RigL(.6, every=2),tiny_learner()
    for _ in range(2):
        with pytest.raises(RuntimeError, match='RigL: T_end is a share of a fit'): cb.fraction_at(1.)
        assert not hasattr(cb, 'window')
        learn.fit(1, cbs=cb)
    learn.add_cb(cb)
    learn.fit(2)
    assert cb.fraction_at(cb.window[0])==.3

def test_two_owners_of_a_layer_are_refused():
    with pytest.raises(ValueError, match="both prune '2.weight'"): tiny_learner().fit(1, cbs=[RigL(.6, params=['0.weight','2.weight']), SET(.6, params=['2.weight'])])

@pytest.mark.parametrize('grow,message', [(lambda param, **_: torch.rand(3), r'0\.weight: .*gave scores of shape \(3,\), expected \(16, 4\)'), (lambda param, **_: param*math.nan, r'0\.weight: .*NaN')])
def test_custom_criteria_that_are_wrong(grow, message):
    with pytest.raises(ValueError, match=message): tiny_learner().fit(1, cbs=RigL(.6, every=2, grow_f=grow))

def test_redistribution_that_is_negative():
    with pytest.raises(ValueError, match=r'0\.weight: .*-1 in the mean.*finite and not negative'): tiny_learner().fit(1, cbs=SNFS(.6, every=2, redistribute_f=lambda param, **_: -torch.ones_like(param)))

@pytest.mark.parametrize('schedule', [lambda x: 4., lambda x: -1., lambda x: math.nan])
def test_schedule_that_leaves_its_range(schedule):
    with pytest.raises(ValueError, match=r'RigL: fraction .*schedule.*must be in \[0, 1\]'): tiny_learner().fit(1, cbs=RigL(.6, every=2, schedule=schedule))

@pytest.mark.parametrize('method,every,T_end,n_acc,is_futile', [
    (RigL,15,.75,None,True), (RigL,14,.75,None,False), (SET,15,.75,None,False), (SET,16,.75,None,True), (RigL,1.5,.75,None,True), (RigL,1.4,.75,None,False), (SET,1.5,.75,None,False),
    (RigL,100,1.,None,True), (RigL,20,1.,None,True), (SET,20,1.,None,False), (RigL,10,1.,16,True), (SET,10,1.,16,False), (RigL,9,1.,16,False), (RigL,9,.9,16,True)])
def test_futile_updates_are_warned_of(method, every, T_end, n_acc, is_futile, caplog):
    learn = tiny_learner(n_trn=10)
    learn.fit(2, cbs=[method(.6, every=every, T_end=T_end), *([GradientAccumulation(n_acc)] if n_acc else [])])
    assert (updated_at(learn)==[])==is_futile==('connections stay as they are, the first update' in caplog.text), caplog.text

# phases, and a rising sparsity

def sparsity(model): return n_masked(model)/sum(p.mask.numel() for p in masked_params(model))

@pytest.mark.parametrize('is_global', [True,False])
def test_phases(is_global):
    "Dense, compressed, dense, compressed: the last phase is compressed, as is what follows it"
    learn = tiny_learner(n_trn=10, opt_func=Adam, lr=.01)
    acdc,witness = ACDCPruningModifier(.8, 1, 5, 1, global_sparsity=is_global),Witness()
    seen = Note('after_batch', lambda cb: sparsity(cb.model))
    learn.fit(6, cbs=[acdc, seen, witness])
    total = sum(p.mask.numel() for p in masked_params(learn.model))
    assert witness.seen==[] and seen.notes==pytest.approx([0]*20+[.8]*10+[0]*10+[.8]*20, abs=.5/total+1e-9 if is_global else .005)
    if not is_global: assert all(n==p.mask.numel()-round(p.mask.numel()*.8) for p,n in zip(masked_params(learn.model), n_kept(learn.model).values()))

@pytest.mark.parametrize('start,end,frequency,dense', [(0,4,1,[0,2]), (0,5,1,[0,2]), (0,3,1,[0]), (0,8,2,[0,1,4,5]), (1,7,2,[1,2]), (0,2,2,[]), (-1,4,1,[0,2])])
def test_dense_phases_by_hand(start, end, frequency, dense):
    acdc = ACDCPruningModifier(.8, start, end, frequency)
    assert [e for e in range(max(0, start), end+2) if acdc.is_dense(e)]==dense

@pytest.mark.parametrize('resets', [True,False])
def test_momentum_where_a_dense_phase_begins(resets):
    learn = tiny_learner(n_trn=10, opt_func=Adam, lr=.01)
    seen = Note('before_backward', lambda cb: [m.clone() for p in masked_params(cb.model) for m in memory(cb.opt, p.param)])
    learn.fit(4, cbs=[ACDCPruningModifier(.8, 0, 4, 1, momentum_buffer_reset=resets), seen])
    assert all((m.count_nonzero()==0)==resets for m in seen.notes[20]) and all(m.count_nonzero() for b in (9,10,19,21,30) for m in seen.notes[b])

def test_phases_end_released():
    learn = tiny_learner(n_trn=10)
    learn.fit(4, cbs=ACDCPruningModifier(.8, 0, 2, 1, leave_enabled=False))
    assert measured_sparsity(learn.model)<.5 and not any(p.is_enforced for p in masked_params(learn.model))

@pytest.mark.parametrize('is_global', [True,False])
@pytest.mark.parametrize('inter_func', ['cubic','linear'])
@pytest.mark.parametrize('init,final', [(0.,.9),(.5,.95),(.8,.85)])
def test_granet_rises_as_planned(is_global, inter_func, init, final):
    "From an ERK distribution, whose layers may be sparser than what is asked of all of them; the last value is exact"
    learn = tiny_learner(mlp(20,60,4), shape=(20,), d_out=4, n_trn=10)
    granet,seen = GraNetPruningModifier(init, final, 0, 3, .5, global_sparsity=is_global, inter_func=inter_func),Note('after_batch', lambda cb: (n_masked(cb.model),n_kept(cb.model)))
    watched(learn, granet, seen, epochs=4, shrinks=is_global) if is_global else learn.fit(4, cbs=[granet, seen])
    sizes = [p.mask.numel() for p in masked_params(learn.model)]
    for b,(n,kept) in enumerate(seen.notes):
        s = granet.sparsity_at(min(3, (b+1)//5*.5))
        if b>=4: assert n==(round(sum(sizes)*s) if is_global else sum(round(m*s) for m in sizes)), b
        else: assert n==pytest.approx(sum(sizes)*init, abs=len(sizes))
    assert not is_global or list(kept.values())!=[m-round(m*final) for m in sizes]
    assert all(u.churn>0 for u in learn.recorder.mask_updates[1:3]) and violations(learn.model, learn.opt)==[]

@pytest.mark.parametrize('method', [GraNetPruningModifier,RigLPruningModifier,SETPruningModifier,SNFSPruningModifier])
def test_late_windows_start_from_the_largest_weights(method):
    learn = tiny_learner(n_trn=10)
    before,after = Note('before_batch', lambda cb: weights(cb.model), order=1),Note('after_pred', lambda cb: masks(cb.model))
    args = (.5,.8) if method is GraNetPruningModifier else (.5,)
    learn.fit(4, cbs=[method(*args, 1.5, 3, .5, sparsity_strategy='uniform'), before, after])
    assert all(m.all() for m in after.notes[14].values())
    for n,m in after.notes[15].items(): assert m.equal(Unstructured()(before.notes[15][n].abs(), .5))

@pytest.mark.parametrize('method', [GraNetPruningModifier,RigLPruningModifier,SETPruningModifier,SNFSPruningModifier])
@pytest.mark.parametrize('leave_enabled', [True,False])
def test_windows_end(method, leave_enabled):
    learn = tiny_learner(n_trn=10)
    seen = Note('after_batch', lambda cb: masks(cb.model))
    learn.fit(4, cbs=[method(*((.5,.8) if method is GraNetPruningModifier else (.8,)), 0, 2, .5, leave_enabled=leave_enabled), seen])
    assert all(same(seen.notes[20], m) for m in seen.notes[20:]) and sparsity(learn.model)==pytest.approx(.8, abs=.01)
    assert (measured_sparsity(learn.model)>.7)==leave_enabled and all(u.epoch<2 for u in learn.recorder.mask_updates)

@pytest.mark.parametrize('min_salient,gives_up', [(0.,False),(.9,True)])
def test_units_that_are_given_up_stay_empty(min_salient, gives_up):
    "All others of a layer have the same fan-in, and the last layer keeps its units"
    learn,witness = tiny_learner(mlp(12,32,4), shape=(12,), d_out=4, n_trn=10, opt_func=Adam, lr=.01),Witness()
    seen = Note('after_batch', lambda cb: [m.flatten(1).sum(1) for m in masks(cb.model).values()])
    learn.fit(4, cbs=[SRigLPruningModifier(.8, 0, 3, .3, min_salient=min_salient, schedule='constant', init_update_fraction=.5), witness, seen])
    assert witness.seen==[]
    for was,fan_ins in zip(seen.notes, seen.notes[1:]):
        for before,now,first in zip(was, fan_ins, seen.notes[0]):
            assert now[now>0].unique().numel()==1 and not (now>0)[before==0].any() and now.sum()<=first.sum()
        assert fan_ins[-1].gt(0).all()
    assert any((now==0).any() for now in seen.notes[-1])==gives_up

def test_stored_layers_collect_whole_accumulations():
    "An update that is planned for the midst of an accumulation falls on its end, and is scored on all of it"
    def _run(is_stored):
        learn = sparse_learner(.6, n_trn=10, dtype=torch.float64, model=mlp().double())
        if is_stored: sparse_layers_(learn.model, .5, 1)
        learn.fit(3, cbs=[RigL(every=.5, T_end=1.), GradientAccumulation(24)])
        return [p.mask for p in (sparse_params if is_stored else masked_params)(learn.model)]
    masked,stored = _run(False),_run(True)
    assert len(masked)==len(stored) and all(map(torch.equal, masked, stored))

def test_units_that_are_given_up_hand_on_their_connections():
    "A layer has the promised number of connections, less than one a unit"
    learn = tiny_learner(model=nn.Sequential(nn.Linear(4,64), nn.ReLU(), nn.Linear(64,64), nn.ReLU(), nn.Linear(64,2)), n_trn=20)
    learn.fit(4, cbs=SRigLPruningModifier(.8, 0, 3.5, .25, min_salient=.9, init_update_fraction=.5))
    p = masked_params(learn.model)[1]
    units = p.mask.any(1).sum().item()
    total = 64*ConstantFanIn().fan_in(torch.Size((64,64)), erdos_renyi_kernel([q.param for q in masked_params(learn.model)], .8)[1])
    assert units<64 and p.mask.sum()==min(total//units, 64)*units

def mixed_learner():
    "The hidden layer is stored, the others are masked"
    learn = tiny_learner(model=nn.Sequential(nn.Linear(4,64), nn.ReLU(), nn.Linear(64,64), nn.ReLU(), nn.Linear(64,2)), n_trn=20)
    sparsify_model(learn.model, .8)
    sparse_layers_(learn.model, .5, 4000)
    assert len(sparse_params(learn.model))==1
    return learn

def test_stored_and_masked_layers_stand_in_model_order():
    learn = mixed_learner()
    learn.fit(2, cbs=RigL(.8, every=5, sparse_init_f=uniform))
    assert list(learn.recorder.mask_updates[-1].sparsities)==['0.weight','2.weight','4.weight']

@pytest.mark.parametrize('cbs', [lambda: RigL(.8, every=5, sparse_init_f=uniform), lambda: SET(every=5), lambda: GraNetPruningModifier(.8, .9, 0, 1.5, .25, sparsity_strategy='uniform')], ids=['rigl','set','granet'])
def test_stored_and_masked_layers_train_together(cbs):
    learn = mixed_learner()
    learn.fit(2, cbs=cbs())
    final = .9 if 'GraNet' in type(cbs()).__name__ else .8
    assert abs(learn.recorder.values[-1][-1]-final)<.01

@pytest.mark.parametrize('make,message', [
    (lambda: SET(.9, grow_f=lambda p, grad, **_: grad.abs()), 'num_grads must be at least 1'),
    (lambda: RigL(.9, grow_f=lambda p: p.abs()), r'add \*\*_ to its arguments'),
    (lambda: RigL(.9, keep_f='magnitude'), "keep_f must be a function, got 'magnitude'"),
    (lambda: sparsify_model(mlp(), .9, sparse_init_f='erdos_renyi'), 'sparse_init_f must be a function'),
    (lambda: sparsify_model(mlp(), .9, criterion=gradient), 'no gradients yet'),
    (lambda: sparsify_model(mlp(), .9, criterion=lambda p: p.abs()), r'add \*\*_'),
])
def test_criteria_are_checked_before_training(make, message):
    with pytest.raises((TypeError,ValueError), match=message): make()

def test_scores_must_be_a_tensor():
    learn = sparse_learner(.6)
    with pytest.raises(TypeError, match=r'0\.weight: .* must give a tensor of scores, got None'): learn.fit(2, cbs=RigL(every=1, grow_f=lambda p, **_: None))
