"Pruning without training: least squares by brute force, all kinds of layers, all patterns, and nothing half done"
import logging
from copy import deepcopy
from itertools import combinations
import pytest,re,torch.nn.functional as F
from hypothesis import given,settings,strategies as st
from utils import *
from fastsparse_create.distribution import *
from fastsparse_create.least_squares import *
from fastsparse_create.masks.core import *
from fastsparse_create.masks.nm import *
from fastsparse_create.masks.structured import *
from fastsparse_create.one_shot import *
from fastsparse_create.quantization.convert import *
from fastsparse_create.selection import *

def gen(seed=0): return torch.Generator().manual_seed(seed)
def mixed(n, n_in, seed=0): return torch.randn(n, n_in, generator=gen(seed))@torch.randn(n_in, n_in, generator=gen(seed+1))+torch.randn(n_in, generator=gen(seed+2))
def zeros(model): return {p.name:int((~p.mask).sum()) for p in masked_params(model)}
def state(model): return {k:v.clone() for k,v in model.state_dict().items()}
def pruned(model, *args, **kwargs):
    res = deepcopy(model)
    return res,prune_one_shot_(res, *args, **kwargs)

@torch.no_grad()
def squared_error(model, other, batches): return sum((model.eval()(b)-other.eval()(b)).square().sum().item() for b in batches)

# layers as linear functions

layers = dict(linear=(nn.Linear(5,3),(2,4,5)), row=(nn.Linear(5,3),(5,)), conv=(nn.Conv2d(4,6,3,2,1),(3,4,9,7)), groups=(nn.Conv2d(4,6,3,2,1,groups=2,dilation=2),(3,4,9,7)),
              depthwise=(nn.Conv2d(4,8,(3,2),padding='same',dilation=2,groups=4),(3,4,9,7)), circular=(nn.Conv1d(4,6,5,padding=2,padding_mode='circular'),(3,4,9)),
              reflect=(nn.Conv2d(2,3,3,padding=(1,2),padding_mode='reflect'),(2,2,5,6)), conv3d=(nn.Conv3d(2,4,2,groups=2),(2,2,4,5,6)), unbatched=(nn.Conv2d(4,6,3),(4,9,7)))

@pytest.mark.parametrize('name', layers)
def test_layers_are_products(name):
    layer,shape = layers[name]
    x,groups = torch.randn(shape),getattr(layer, 'groups', 1)
    made = layer_inputs(layer, x)@layer.weight.flatten(1).unflatten(0, (groups,-1)).mT+layer.bias.view(groups,1,-1)
    torch.testing.assert_close(made, layer_outputs(layer, layer(x)))

# least squares

def solved(x, y, keep, centered):
    "By PyTorch: weights of the columns `keep`, and the error"
    if centered: x,y = x-x.mean(0),y-y.mean(0)
    w = torch.zeros(x.shape[1])
    w[keep] = torch.linalg.lstsq(x[:,keep], y, driver='gelsd').solution
    return w,(y-x@w).square().mean()/y.square().mean()

@pytest.mark.parametrize('n_in,n_keep', [(3,1),(3,2),(6,3)])
@pytest.mark.parametrize('bias', [False,True])
@pytest.mark.parametrize('seed', range(5))
def test_a_neuron_by_brute_force(n_in, n_keep, bias, seed):
    x,model = mixed(200, n_in, seed),nn.Linear(n_in,1,bias=bias)
    with torch.no_grad(): y = model(x)[:,0]
    after,report = pruned(model, 1-n_keep/n_in, [x[:80],x[80:]], damp=1e-6)
    keep = after.weight_mask[0].nonzero()[:,0].tolist()
    w,error = solved(x, y, keep, bias)
    torch.testing.assert_close(after.weight[0].detach(), w, rtol=1e-3, atol=1e-3)
    assert report.rows[0].error==pytest.approx(error.item(), rel=1e-2, abs=1e-5)
    if bias: torch.testing.assert_close(after(x).mean(), y.mean(), rtol=1e-3, atol=1e-3)
    every = sorted(solved(x, y, list(k), bias)[1].item() for k in combinations(range(n_in), n_keep))
    assert error<=every[len(every)//4]+1e-6

def test_neurons_of_three_inputs_keep_the_best():
    "Of two inputs that are nearly the same, the one that goes has its weight taken over"
    x = torch.randn(500, 3, generator=gen())
    x[:,1] = x[:,0]+.1*x[:,1]
    model = nn.Linear(3, 2, bias=False)
    model.weight.data = tensor([[1.,.8,.6],[.5,-2,1.]])
    after,_ = pruned(model, 1/3, [x], damp=1e-6, mask_type=lambda scores,s: NM(2,3)(scores, s))
    errors = {k:solved(x, model(x)[:,0].detach(), list(k), False)[1] for k in combinations(range(3), 2)}
    assert min(errors, key=errors.get)==(0,2) and after.weight_mask[0].tolist()==[True,False,True]
    assert after.weight[0,0]>1.7

@given(groups=st.integers(1,3), n=st.integers(2,60), n_in=st.integers(1,12), n_out=st.integers(1,6), centered=st.booleans(), share=st.floats(0,1), seed=st.integers(0,99))
@settings(max_examples=100)
def test_no_worse_than_the_same_mask_without_a_fit(groups, n, n_in, n_out, centered, share, seed):
    x,w = torch.stack([mixed(n, n_in, seed+i) for i in range(groups)]),torch.randn(groups, n_out, n_in, generator=gen(seed))
    moments = Moments(centered)
    for i in range(0, n, 25): moments.add(x[:,i:i+25], x[:,i:i+25]@w.mT+1)
    fit = LeastSquares(moments, w, damp=0.)
    masks = Unstructured()(w.abs(), share),fit.sparse(Unstructured(), share)[1],torch.rand(w.shape, generator=gen(seed))<share
    for mask in masks:
        fitted = fit.refit(mask)
        assert not fitted[~mask].any() and fitted.isfinite().all()
        assert moments.error(fitted)<=moments.error(w*mask)+1e-4
    assert (~masks[1]).sum()==(w.numel() if share==1 else min(round(w.numel()*share), w.numel()-1))

@pytest.mark.parametrize('centered', [False,True])
def test_moments_in_batches(centered):
    x,y = 100+mixed(90, 4).double()[None],mixed(90, 3, 7).double()[None]-50
    whole,parts = Moments(centered),Moments(centered)
    whole.add(x, y)
    for part in (slice(0,0),slice(0,1),slice(1,40),slice(40,90)): parts.add(x[:,part], y[:,part])
    for a,b in zip(whole.products(), parts.products()): torch.testing.assert_close(a, b)
    assert parts.n==90
    design = torch.cat([x[0], torch.ones(90,1).double()], 1) if centered else x[0]
    least = (y[0]-design@torch.linalg.lstsq(design, y[0]).solution).square().sum()/((y[0]-y[0].mean(0)) if centered else y[0]).square().sum()
    fitted = LeastSquares(parts, torch.zeros(1,3,4).double(), damp=0.).refit(torch.ones(1,3,4, dtype=torch.bool))
    assert parts.error(fitted)==pytest.approx(least.item(), rel=1e-2)
    if centered: torch.testing.assert_close((x@fitted.mT+parts.bias(fitted)[:,None]).mean(1), y.mean(1))

def test_large_means_do_not_cancel():
    x = 1e4+torch.randn(1,1000,3, generator=gen())
    moments = Moments(centered=True)
    for xs in x.split(100, 1): moments.add(xs, xs[...,:1])
    torch.testing.assert_close(moments.products()[0][0], x[0].double().T.cov(correction=0).float(), rtol=1e-2, atol=1e-3)

@pytest.mark.parametrize('damp', [0.,.05])
def test_inputs_that_say_nothing(damp):
    "Constant inputs go first, the largest of them last; a layer of nothing else is pruned by magnitude"
    x,w = mixed(50, 4)[None],torch.randn(1,3,4, generator=gen())
    x[...,1:3] = 0
    w[0,:,1],w[0,:,2] = 5,9
    moments = Moments()
    moments.add(x, x@w.mT)
    fit = LeastSquares(moments, w, damp)
    assert fit.live.tolist()==[0,3]
    assert (~fit.sparse(Unstructured(), .25)[1])[0].nonzero()[:,1].tolist()==[1]*3
    torch.testing.assert_close(fit.refit(torch.ones(1,3,4).bool()), w, rtol=1e-3, atol=1e-3)
    nothing = Moments(centered=True)
    nothing.add(x*0+3, x@w.mT*0)
    fit = LeastSquares(nothing, w, damp)
    assert fit.sparse(Unstructured(), .5)[1].equal(Unstructured()(w.abs(), .5)) and fit.refit(w>0).equal(w*(w>0))
    assert nothing.error(w)==0

# kinds of layers

def test_convolution_is_the_linear_layer_of_its_patches():
    conv,x = nn.Conv2d(3,8,3,2,1),torch.randn(6,3,9,9, generator=gen())
    linear = nn.Linear(27,8)
    linear.weight.data,linear.bias.data = conv.weight.data.flatten(1).clone(),conv.bias.data.clone()
    (a,_),(b,_) = pruned(conv, .6, [x[:4],x[4:]]),pruned(linear, .6, [F.unfold(t, 3, 1, 1, 2).mT for t in (x[:4],x[4:])])
    assert a.weight_mask.flatten(1).equal(b.weight_mask)
    for p,q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p.view(q.shape), q, rtol=1e-3, atol=1e-4)

def test_groups_are_convolutions_side_by_side():
    "With the same number of weights cut in each"
    conv,x = nn.Conv2d(4,6,3,groups=2),torch.randn(5,4,8,8, generator=gen())
    def _half(scores, share): return torch.cat([Unstructured()(s, share) for s in scores.split(3)]) if len(scores)==6 else Unstructured()(scores, share)
    both,_ = pruned(conv, .5, [x], mask_type=_half)
    for i in range(2):
        one = nn.Conv2d(2,3,3)
        one.weight.data,one.bias.data = conv.weight.data[3*i:3*i+3].clone(),conv.bias.data[3*i:3*i+3].clone()
        prune_one_shot_(one, .5, [x[:,2*i:2*i+2]])
        torch.testing.assert_close(both.weight[3*i:3*i+3], one.weight, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(both.bias[3*i:3*i+3], one.bias, rtol=1e-3, atol=1e-4)

class GPTConv1D(nn.Module):
    "As of Transformers: inputs by outputs"
    def __init__(self, n_out, n_in):
        super().__init__()
        self.weight,self.bias = nn.Parameter(torch.randn(n_in, n_out)),nn.Parameter(torch.randn(n_out))
    def forward(self, x): return x@self.weight+self.bias
GPTConv1D.__name__ = 'Conv1D'

def test_inputs_first():
    linear,turned,x = nn.Linear(8,4),GPTConv1D(4,8),mixed(60, 8)
    turned.weight.data,turned.bias.data = linear.weight.data.T.clone(),linear.bias.data.clone()
    for mask_type in ('unstructured','2:4'):
        (a,_),(b,_) = pruned(linear, .5, [x], mask_type=mask_type),pruned(turned, .5, [x], mask_type=mask_type)
        assert a.weight_mask.equal(b.weight_mask.T)
        torch.testing.assert_close(a.weight, b.weight.T, rtol=1e-3, atol=1e-4)

def small_nets():
    conv = nn.Sequential(nn.Conv2d(3,8,3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8,8,3,groups=8,bias=False), nn.BatchNorm2d(8), nn.Conv2d(8,12,1), nn.ReLU(), nn.Conv2d(12,8,3,padding=1,groups=2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32,4))
    return dict(mlp=(mlp(8,16,4), [mixed(40, 8, i) for i in (0,10)]), conv=(conv, [torch.randn(8,3,12,12, generator=gen(i)) for i in range(3)]),
                conv1d=(nn.Sequential(nn.Conv1d(2,8,5), nn.ReLU(), nn.Conv1d(8,8,3)), [torch.randn(8,2,20, generator=gen())]),
                conv3d=(nn.Sequential(nn.Conv3d(1,8,2), nn.ReLU(), nn.Conv3d(8,4,2)), [torch.randn(6,1,5,5,5, generator=gen())]),
                transformer=(nn.Sequential(nn.Linear(8,16), nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2), nn.Linear(16,4)), [torch.randn(6,5,8, generator=gen(i)) for i in range(2)]))

@pytest.mark.parametrize('name', small_nets())
@pytest.mark.parametrize('share', [.3,.6])
def test_networks_change_less_than_by_magnitude(name, share):
    torch.manual_seed(0)
    model,batches = small_nets()[name]
    after,report = pruned(model, share, batches)
    by_size = deepcopy(model)
    sparsify_model(by_size, share)
    assert {r.status for r in report.rows}=={'fitted'}
    assert zeros(after)=={n:round(s.param.numel()*share) for n,s in prunable(model).items()}
    assert not violations(after) and squared_error(after, model, batches)<.8*squared_error(by_size, model, batches)
    assert [type(m) for m in after.modules()]==[type(m) for m in model.modules()]

@pytest.mark.parametrize('mask_type,share', [('unstructured',.37),('2:4',.5),('1:4',.75),('2:4',.3),('2:4-T',.5),('block4',.5),('[2, 2]',.5),('channel',.5),('filter',.5),('constant_fan_in',.5)])
def test_patterns(mask_type, share):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4,8,3), nn.ReLU(), nn.Conv2d(8,8,3,groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(32,8), nn.ReLU(), nn.Linear(8,4))
    calculator = get_mask_type(mask_type)
    after,report = pruned(model, share, [torch.randn(32,4,6,6, generator=gen())], mask_type=mask_type)
    for p in masked_params(after):
        assert calculator(p.mask.float(), share).sum()==p.mask.sum() and not p.param[~p.mask].any()
        if mask_type in ('channel','filter','block4'): assert calculator(p.mask.float()+.1*torch.rand(p.mask.shape), share).equal(p.mask)
        if mask_type in ('2:4','2:4-T') and share==.5: assert is_nm(p.param, 2, 4)
        if mask_type=='2:4-T': assert is_nm(p.param, 2, 4, axis=0)
    assert all(r.error<1 for r in report.rows)

def test_sparsities_by_layer():
    model,x = mlp(8,16,4),[mixed(60, 8)]
    after,report = pruned(model, .6, x, sparse_init_f=erdos_renyi)
    expected = layer_sparsities(erdos_renyi, {n:s.param for n,s in prunable(model).items()}, .6)
    assert [r.sparsity for r in report.rows]==pytest.approx(expected, abs=.02) and len(set(expected))>1
    after,report = pruned(model, .6, x, ['2.weight'])
    assert zeros(after)=={'2.weight':round(256*.6)} and [r.layer for r in report.rows]==['2.weight']

def test_dense_layers_make_up_for_those_before():
    def _last_dense(params, s): return [s]*(len(params)-1)+[0.]
    torch.manual_seed(0)
    model,x = mlp(8,16,4),[mixed(100, 8)]
    left,_ = pruned(model, .7, x, ['0.weight','2.weight'])
    taken,_ = pruned(model, .7, x, sparse_init_f=_last_dense)
    assert not taken[4].weight.equal(model[4].weight) and squared_error(taken, model, x)<squared_error(left, model, x)

# how they are called

def test_shared_inputs_share_a_pass():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.q,self.k,self.v,self.o = (nn.Linear(6,6) for _ in range(4))
            self.passes = 0
        def forward(self, x):
            self.passes += 1
            return self.o(self.q(x)*self.k(x)+self.v(x))
    model,x = Net(),mixed(30, 6)
    prune_one_shot_(model, .5, [x])
    assert model.passes==2+2  # the order, what can be skipped, and a pass for q, k and v, and one for o

def test_passes_end_with_the_layer():
    class Last(nn.Module):
        passes = 0
        def forward(self, x):
            Last.passes += 1
            return x
    model = nn.Sequential(mlp(), Last())
    prune_one_shot_(model, .5, [mixed(20, 4)])
    assert Last.passes==2  # to see the order, and what can be skipped

def test_activations_in_place():
    class Net(nn.Module):
        def __init__(self, inplace):
            super().__init__()
            self.a,self.b,self.c,self.act = nn.Linear(6,6),nn.Linear(6,6),nn.Linear(6,6),nn.ReLU(inplace)
        def forward(self, x):
            a,b = self.act(self.a(x)),self.act(self.b(x))
            b += a
            return self.c(b)+self.c(a)
    results = []
    for inplace in (False,True):
        torch.manual_seed(0)
        results.append(pruned(Net(inplace), .5, mixed(60, 6).split(30))[0])
    assert same(*map(state, results))

def test_a_weight_in_two_layers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.Linear(6,6),nn.Linear(6,6)
            self.b.weight = self.a.weight
        def forward(self, x): return self.b(self.a(x).relu())+self.a(x)
    torch.manual_seed(0)
    model,x = Net(),[mixed(80, 6)]
    after,report = pruned(model, .5, x)
    assert after.a.weight is after.b.weight and report.rows[0].status=='fitted'
    assert after.a.bias.equal(model.a.bias) and after.b.bias.equal(model.b.bias)
    by_size = deepcopy(model)
    sparsify_model(by_size, .5)
    assert squared_error(after, model, x)<squared_error(by_size, model, x)

class Routed(nn.Module):
    "Rows come in an order, and in a number, that the first layer decides on"
    def __init__(self, drops):
        super().__init__()
        self.first,self.second,self.drops = nn.Linear(6,6),nn.Linear(6,6),drops
    def forward(self, x):
        x = self.first(x)
        x = x[x[:,0].argsort()]
        return self.second(x[x[:,0]>0] if self.drops else x)

@pytest.mark.parametrize('drops', [False,True])
def test_order_by_what_the_model_sees(drops):
    "Where inputs can't be compared with those of the dense model, a layer is fitted to its own outputs"
    torch.manual_seed(0)
    model,x = Routed(drops),[mixed(300, 6)]
    model.first.weight.data[0],model.first.bias.data[0] = tensor([.5,.6,.55,.5,.6,.5]),0
    after,report = pruned(model, .5, x)
    y = after.first(x[0]).detach()
    y = y[y[:,0]>0] if drops else y
    assert (after.second(y)-model.second(y)).square().mean()<.3*model.second(y).var(0).mean()
    assert report.rows[1].error<.3

def test_layers_that_some_batches_reach():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.c = (nn.Linear(6,6) for _ in range(3))
        def forward(self, x, through): return self.c(self.b(self.a(x)) if through else self.a(x))
    x = mixed(40, 6)
    for batches,status in (([(x,True),(x,False)],'fitted'), ([(x,False),(x,True)],"the first batch doesn't reach it")):
        _,report = pruned(Net(), .5, batches)
        assert {r.layer:r.status for r in report.rows}=={'a.weight':'fitted', 'b.weight':status, 'c.weight':'fitted'}

def test_batches_are_what_models_are_called_with():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.Linear(6,6),nn.Linear(3,6)
        def forward(self, x, other): return self.a(input=x)+self.b(other)
    torch.manual_seed(0)
    model,x,y = Net(),mixed(40, 6),mixed(40, 3)
    after = [pruned(model, .5, batches)[0] for batches in ([(x,y)], [dict(other=y, x=x)], ((x[i:i+20],y[i:i+20]) for i in (0,20)))]
    for a in after[1:]:
        for p,q in zip(a.parameters(), after[0].parameters()): torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)

def test_single_rows_and_empty_batches():
    model,x = mlp(),mixed(30, 4)
    (a,_),(b,_) = pruned(model, .5, [x]),pruned(model, .5, [*x.split(1), x[:0]])
    for p,q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-2)
    one,report = pruned(model, .5, [x[:1]])
    assert zeros(one)==zeros(a) and all(p.isfinite().all() for p in one.parameters())

# layers that can't be fitted

class Same(nn.Conv2d):
    def forward(self, x): return super().forward(F.pad(x, (0,1,0,1)))

class Standardized(nn.Conv2d):
    def forward(self, x): return self._conv_forward(x, (self.weight-self.weight.mean((1,2,3), keepdim=True))/self.weight.std((1,2,3), keepdim=True), self.bias)

class Gated(nn.Linear):
    def forward(self, x): return super().forward(x),x

@pytest.mark.parametrize('layer,x,reason', [
    (Same(3,4,2), torch.randn(2,3,6,6), 'more than to multiply'), (Standardized(3,4,2), torch.randn(2,3,6,6), 'more than to multiply'), (Gated(6,6), torch.randn(5,6), 'more than to multiply'),
    (nn.ConvTranspose2d(3,4,2), torch.randn(2,3,6,6), 'weight of ConvTranspose2d is not supported'), (nn.LSTM(6,6), torch.randn(3,2,6), 'weight_.h_l0 of LSTM is not supported'),
    (nn.utils.parametrizations.spectral_norm(nn.Linear(6,6)), torch.randn(5,6), 'not supported')])
def test_by_magnitude(layer, x, reason, caplog):
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.layer,self.other = layer,nn.Linear(3,3)
        def forward(self, x, y): return self.layer(x),self.other(y)
    model = Net()
    names = [n for n,p in model.named_parameters() if p.ndim>1]
    with caplog.at_level(logging.INFO): after,report = pruned(model, .5, [(x,mixed(20,3))], names)
    by_size = deepcopy(model)
    sparsify_model(by_size, .5, names)
    for a,b in zip(masked_params(after), masked_params(by_size)):
        if a.name!='other.weight': assert a.mask.equal(b.mask) and a.param.equal(b.param)
    assert {r.layer:r.status for r in report.rows}.pop('other.weight')=='fitted'
    assert all(re.search(reason, r.status) and r.error is None for r in report.rows if r.layer!='other.weight')
    assert re.search(reason, caplog.text) and len(caplog.records)==1 and f'{len(names)} weights fitted' in report.summary

def test_too_many_inputs(monkeypatch):
    import fastsparse_create.one_shot as module
    monkeypatch.setattr(module, '_most_inputs', 8)
    _,report = pruned(mlp(8,16,4), .5, [mixed(30, 8)])
    assert [r.status for r in report.rows]==['fitted','16 inputs are too many','16 inputs are too many']

@pytest.mark.parametrize('kwargs', [{}, dict(add_bias_kv=True), dict(kdim=4, vdim=4)])
def test_attention(kwargs):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention,self.last = nn.MultiheadAttention(8, 2, batch_first=True, **kwargs),nn.Linear(8,8)
        def forward(self, x, memory): return self.last(self.attention(x, memory, memory, need_weights=False)[0])
    torch.manual_seed(0)
    model,x,memory = Net(),torch.randn(4,5,8),torch.randn(4,7,kwargs.get('kdim', 8))
    _,report = pruned(model, .5, [(x,memory)])
    status = {r.layer:r.status for r in report.rows}
    assert status['last.weight']=='fitted' and (status['attention.out_proj.weight']=='fitted')==('add_bias_kv' not in kwargs)
    assert status.get('attention.in_proj_weight', '')!='fitted'
    if not kwargs:
        _,report = pruned(model, .5, [(x,x)])
        assert {r.status for r in report.rows}=={'fitted'}

# what is there before

def test_masks_that_are_there():
    torch.manual_seed(0)
    model,x = mlp(8,16,4),[mixed(100, 8)]
    sparsify_model(model, .5, mask_type='2:4')
    after,_ = pruned(model, .8, x)
    for a,b in zip(masked_params(after), masked_params(model)): assert not (a.mask&~b.mask).any() and is_nm(a.param, 2, 4)
    assert zeros(after)=={n:round(s.param.numel()*.8) for n,s in prunable(model).items()}
    twice,_ = pruned(after, .2, x)
    assert zeros(twice)=={n:round(s.param.numel()*.2) for n,s in prunable(model).items()} and not any(t.param[~a.mask].any() for t,a in zip(masked_params(twice), masked_params(after)))

@pytest.mark.parametrize('share', [.3,.75])
@pytest.mark.parametrize('mask_type', ['unstructured','2:4','block4','channel'])
def test_zeros_without_masks_stay(mask_type, share):
    torch.manual_seed(0)
    model,x = mlp(8,16,4),[mixed(100, 8)]
    params = {n:s.param for n,s in prunable(model).items()}
    for p,had in zip(params.values(), (.9,.1,.6)): p.data[torch.rand(p.shape, generator=gen())<had] = 0
    after,report = pruned(model, min(share, .5) if mask_type=='2:4' else share, x, mask_type=mask_type)
    assert {r.status for r in report.rows}=={'fitted'}
    for n,p in params.items():
        now = after.get_parameter(n)
        assert not now[p==0].any() and (now!=0).sum()<=(p!=0).sum()
        if mask_type=='unstructured': assert (now==0).sum()==max((p==0).sum(), round(p.numel()*share))
        if mask_type=='2:4' and share>.5: assert is_nm(now, 2, 4)

@pytest.mark.parametrize('dtype', [torch.float64,torch.bfloat16])
def test_dtypes(dtype):
    model,x = mlp(8,16,4),mixed(100, 8)
    reference,_ = pruned(model, .5, [x])
    after,report = pruned(model.to(dtype), .5, [x.to(dtype)])
    assert all(p.dtype==dtype for p in after.parameters()) and all(r.error<.2 for r in report.rows)
    if dtype==torch.float64:
        for p,q in zip(after.parameters(), reference.parameters()): torch.testing.assert_close(p.float(), q, rtol=1e-2, atol=1e-3)

def test_modes_hooks_and_random_numbers():
    model = nn.Sequential(mlp(), nn.Dropout())
    model[0].eval()
    before,modes = torch.get_rng_state(),[m.training for m in model.modules()]
    prune_one_shot_(model, .5, [mixed(20, 4)])
    assert torch.get_rng_state().equal(before) and [m.training for m in model.modules()]==modes
    assert not any(m._forward_hooks for m in model.modules()) and all(p.requires_grad and p.grad is None for p in model.parameters())
    a,b = (pruned(mlp(), .5, [mixed(20, 4)])[0] for _ in range(2))
    assert same(state(a), state(b))

# nothing half done

class Fails(nn.Module):
    "At the second look at a batch of 7, when the first layer is pruned"
    looks = 0
    def forward(self, x):
        Fails.looks += len(x)==7
        if Fails.looks==2: raise RuntimeError('out of luck')
        return x

x4 = mixed(20, 4)
nan = x4.clone()
nan[3,2] = math.nan

@pytest.mark.parametrize('args,error,message', [
    (dict(batches=[x4,nan]), ValueError, "inputs or outputs of '0.weight' hold NaN or infinity"), (dict(batches=[nan]), ValueError, "inputs or outputs of '0.weight' hold NaN"), (dict(batches=[x4*1e25]), ValueError, "hold NaN or infinity"),
    (dict(batches=[]), ValueError, 'there is no batch'), (dict(batches=None), ValueError, 'give batches, or a Learner'), (dict(batches=[x4[:0]]), ValueError, "no layer can be fitted: 0.weight: the first batch doesn't reach it"),
    (dict(batches=[mixed(20,5)]), ValueError, "the model can't be run on a batch: RuntimeError: .*mat1"), (dict(batches=[x4,mixed(20,5)]), RuntimeError, 'mat1'),
    (dict(batches=[x4,x4[:7]]), RuntimeError, 'out of luck'),
    (dict(sparsity=1.2), ValueError, r'sparsity must be in \[0,1\], got 1.2'), (dict(params=['0.weigth']), ValueError, "did you mean '0.weight'"), (dict(mask_type='2:5'), ValueError, 'multiple of 5'),
    (dict(mask_type='2:4', sparsity=.8), ValueError, "can't reach a sparsity of 0.8"), (dict(sparse_init_f=lambda p,s: [s]), ValueError, '1 sparsities for 3'), (dict(sparse_init_f=.5), TypeError, 'must be a function'),
    (dict(damp=-1), ValueError, 'damp must be 0 or more, got -1'), (dict(damp='much'), ValueError, "damp must be 0 or more, got 'much'"), (dict(damp=math.nan), ValueError, 'damp must be 0 or more'), (dict(mask_type='2:3:4:5'), ValueError, "mask_type: '2:3:4:5' is not known")])
def test_errors_change_nothing(args, error, message):
    Fails.looks = 0
    first,*rest = mlp()
    model = nn.Sequential(first, Fails(), *rest)
    model[2].eval()
    before,modes = state(model),[m.training for m in model.modules()]
    with pytest.raises(error, match=message): prune_one_shot_(model, **{**dict(sparsity=.5, batches=[x4]), **args})
    assert same(before, state(model)) and not masked_params(model) and [m.training for m in model.modules()]==modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

def test_interrupt_in_attention():
    class Stop(nn.Module):
        def forward(self, x): raise KeyboardInterrupt
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8), Stop())
    before = state(model)
    with pytest.raises(KeyboardInterrupt): prune_one_shot_(model, .5, [torch.randn(3,2,8)])
    assert same(before, state(model)) and type(model[0].self_attn) is nn.MultiheadAttention and not hasattr(model[0].self_attn, 'scheme')

def test_nothing_to_fit():
    with pytest.raises(ValueError, match='no layer can be fitted: 0.weight: weight of ConvTranspose1d is not supported'): prune_one_shot_(nn.Sequential(nn.ConvTranspose1d(3,4,2)), .5, [torch.randn(2,3,6)])
    model = mlp()
    quantize_(model, x4)
    with pytest.raises(ValueError, match='the model is quantized'): prune_one_shot_(model, .5, [x4])

# afterwards

def test_learner():
    learn = tiny_learner(n_trn=6)
    learn.fit(1)
    before = torch.get_rng_state()
    prune_one_shot_(learn, .6, n=3)
    assert torch.get_rng_state().equal(before) and not violations(learn.model, learn.opt)
    assert zeros(learn.model)=={n:round(s.param.numel()*.6) for n,s in prunable(learn.model).items()}
    witness = Witness()
    learn.fit(2, cbs=witness)
    assert not witness.seen and measured_sparsity(learn.model)>.59

def test_a_learners_batches():
    learn = tiny_learner(n_trn=100)
    assert len(calibration_batches(learn))==512//8 and len(calibration_batches(learn, n=5))==5
    for b,(x,_) in zip(calibration_batches(learn, n=2), learn.dls.train): assert torch.equal(b[0], x)
    assert len(calibration_batches(learn, [1,2,3]))==3 and calibration_batches(None, iter([1,2,3]), 2)==[1,2]

def test_quantization_afterwards():
    model,x = convnet(),torch.randn(16,3,12,12, generator=gen())
    prune_one_shot_(model, .5, [x])
    expected = zeros(model)
    quantize_(model, x)
    calibrate_(model, [x,x])
    assert zeros(model)==expected and not violations(model) and (model.eval()(x)).isfinite().all()
    make_permanent(model)
    assert not masked_params(model) and measured_sparsity(model, '__ALL_PRUNABLE__')>.49

def test_unet():
    "Features go from one half to the other by hooks"
    vision = pytest.importorskip('fastai.vision.all')
    from fastai.vision.models.unet import DynamicUnet
    torch.manual_seed(0)
    body = nn.Sequential(nn.Sequential(nn.Conv2d(3,8,3,2,1), nn.ReLU()), nn.Sequential(nn.Conv2d(8,16,3,2,1), nn.ReLU()))
    model,x = DynamicUnet(body, 3, (16,16)).eval(),torch.randn(4,3,16,16, generator=gen())
    after,report = pruned(model, .5, [x])
    by_size = deepcopy(model)
    sparsify_model(by_size, .5)
    assert {r.status for r in report.rows}=={'fitted'} and squared_error(after, model, [x])<squared_error(by_size, model, [x])

# batch norms

def test_update_bn_is_pytorchs():
    model,batches = nn.Sequential(convnet(), nn.Dropout(), nn.Linear(2,4), nn.BatchNorm1d(4, track_running_stats=False)),[torch.randn(8,3,12,12, generator=gen(i))*3+1 for i in range(3)]
    model[1].eval()
    other = deepcopy(model)
    torch.optim.swa_utils.update_bn(batches, other)
    before,modes,rng = state(model),[m.training for m in model.modules()],torch.get_rng_state()
    update_bn_(model, batches)
    after = state(model)
    assert {k for k in after if not after[k].equal(before[k])}=={'0.1.running_mean','0.1.running_var'}
    for k in ('0.1.running_mean','0.1.running_var'): torch.testing.assert_close(after[k], other.state_dict()[k])
    assert [m.training for m in model.modules()]==modes and torch.get_rng_state().equal(rng) and model[0][1].momentum==.1

@pytest.mark.parametrize('batches,message', [([torch.randn(4,3,12,12), torch.full((4,3,12,12), math.nan)], 'not finite'), ([torch.randn(4,2,12,12)], 'to have 3 channels'), ([], 'no batch'), (None, 'give batches')])
def test_update_bn_changes_all_or_nothing(batches, message):
    model = convnet()
    before = state(model)
    with pytest.raises((ValueError,RuntimeError), match=message): update_bn_(model, batches)
    assert same(before, state(model))

def test_update_bn_without_norms():
    model = mlp()
    before = state(model)
    update_bn_(model, [x4])
    assert same(before, state(model))

# accuracy

@pytest.mark.slow
def test_digits():
    "Mean of two seeds, 80 % sparse: within three points of the dense network, where magnitude loses everything"
    from sklearn.datasets import load_digits
    digits = load_digits()
    order = torch.randperm(1797, generator=gen(42))
    x,y = torch.tensor(digits.images/16).float()[order,None],torch.tensor(digits.target)[order]
    def _block(i, o, stride): return nn.Sequential(nn.Conv2d(i,o,3,stride,1,bias=False), nn.BatchNorm2d(o), nn.ReLU())
    def _accuracy(model): return model.eval()(x[1437:]).argmax(1).eq(y[1437:]).float().mean().item()
    accuracies = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = nn.Sequential(_block(1,12,1), _block(12,24,2), _block(24,24,1), _block(24,48,2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48,10))
        dls = DataLoaders(DataLoader(Tensors(x[:1437], y[:1437]), bs=64, shuffle=True), DataLoader(Tensors(x[1437:], y[1437:]), bs=360))
        learn = tiny_learner(model, dls=dls)
        learn.loss_func = CrossEntropyLossFlat()
        learn.fit_one_cycle(12, .1)
        after,_ = pruned(model, .8, [x[:256]])
        by_size = deepcopy(model)
        sparsify_model(by_size, .8)
        accuracies.append([_accuracy(m) for m in (model,after,by_size)])
    dense,fitted,by_size = (sum(a)/2 for a in zip(*accuracies))
    assert fitted>dense-.03 and by_size<.5, accuracies
