"Layers that store only their connections compute, train and rewire as masked layers do"
import os,pickle,pytest,subprocess,sys,torch
import torch.nn.functional as F
from copy import deepcopy
from dataclasses import dataclass
from hypothesis import given,strategies as st
from fastsparse_create.masking import *
from fastsparse_create.callback.dynamic import *
from fastsparse_create.callback.pruning import *
from fastsparse_create.compact import *
from fastsparse_create.sparse import inference
from fastsparse_create.sparse.inference import *
from fastsparse_create.sparse.linear import *
from fastsparse_create.sparsify import *
from utils import *

def masked_layer(d_in=12, d_out=7, sparsity=.7, seed=0, dtype=torch.float64, bias=True):
    "A linear layer and its mask"
    g = torch.Generator().manual_seed(seed)
    layer = nn.Linear(d_in, d_out, bias=bias, dtype=dtype)
    mask = torch.rand(d_out, d_in, generator=g)>=sparsity
    with torch.no_grad():
        for p in layer.parameters(): p.copy_(torch.randn(p.shape, generator=g))
        layer.weight.mul_(mask)
    return layer,mask

def pair(**kwargs):
    "The same layer masked and sparse"
    layer,mask = masked_layer(**kwargs)
    sparse = SparseLinear.from_linear(deepcopy(layer), mask)
    set_mask(attach_masks(layer, ['weight'])[0], mask)
    return layer,sparse,mask

def test_gradcheck():
    layer,mask = masked_layer(5, 4, .5)
    sparse,x = SparseLinear.from_linear(layer, mask),torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    def f(x, values, bias): return torch.func.functional_call(sparse, {'values':values, 'bias':bias}, x)
    def dense(x, values, bias): return F.linear(x, torch.zeros(4,5,dtype=torch.float64).masked_scatter(mask, values), bias)
    inputs = x,sparse.values.detach().requires_grad_(),sparse.bias.detach().requires_grad_()
    assert torch.autograd.gradcheck(f, inputs)
    torch.testing.assert_close(f(*inputs), dense(*inputs))
    g = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(f(*inputs), inputs, g), torch.autograd.grad(dense(*inputs), inputs, g))

@given(d_in=st.integers(1,20), d_out=st.integers(1,20), lead=st.lists(st.integers(0,4), max_size=3), density=st.floats(0,1),
       bias=st.booleans(), double=st.booleans(), seed=st.integers(0,99))
def test_same_as_masked(d_in, d_out, lead, density, bias, double, seed):
    dtype = torch.float64 if double else torch.float32
    layer,sparse,mask = pair(d_in=d_in, d_out=d_out, sparsity=1-density, seed=seed, dtype=dtype, bias=bias)
    a = torch.randn(*lead, d_in, dtype=dtype, requires_grad=True)
    b = a.detach().clone().requires_grad_()
    ya,yb = layer(a),sparse(b)
    torch.testing.assert_close(yb, ya)
    g = torch.randn_like(ya)
    ya.backward(g), yb.backward(g)
    torch.testing.assert_close(b.grad, a.grad)
    torch.testing.assert_close(sparse.values.grad, layer.weight.grad[mask])
    if bias: torch.testing.assert_close(sparse.bias.grad, layer.bias.grad)
    assert torch.equal(sparse.weight, layer.weight) and torch.equal(sparse.mask, mask)

@given(d_in=st.integers(1,12), d_out=st.integers(1,12), before=st.floats(0,1), after=st.floats(0,1), seed=st.integers(0,99))
def test_rewire_any_pattern(d_in, d_out, before, after, seed):
    layer,mask = masked_layer(d_in, d_out, 1-before, seed)
    sparse = SparseLinear.from_linear(layer, mask)
    p, = sparse_params(sparse)
    new = torch.rand(d_out, d_in)<after
    p.rewire(new)
    assert torch.equal(p.mask, new) and torch.equal(p.weight, layer.weight*(mask & new))
    torch.testing.assert_close(sparse(torch.eye(d_in, dtype=torch.float64))-layer.bias, (layer.weight*(mask & new)).t())

optimizers = dict(sgd=partial(SGD, mom=.9), adam=Adam, radam=RAdam, lamb=Lamb, rms=RMSProp, lookahead=lambda *a,**k: Lookahead(SGD(*a, mom=.9, **k), k=2), ranger=lambda *a,**k: Lookahead(RAdam(*a, **k), k=2),
                  torch_sgd=partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=.9)), torch_adam=partial(OptimWrapper, opt=torch.optim.Adam),
                  torch_adamw=partial(OptimWrapper, opt=torch.optim.AdamW))
raw = dict(raw_sgd=lambda ps,lr: torch.optim.SGD(ps, lr, momentum=.9), raw_adam=torch.optim.Adam, raw_amsgrad=partial(torch.optim.Adam, amsgrad=True))

def steps(model, opt, n=5, seed=0, d_in=12):
    g = torch.Generator().manual_seed(seed)
    for _ in range(n):
        model(torch.randn(4, d_in, dtype=torch.float64, generator=g)).square().mean().backward()
        opt.step(), opt.zero_grad()

@pytest.mark.parametrize('name', [*optimizers, *raw])
@pytest.mark.parametrize('n_new', ['fewer','same','more'])
def test_rewire_keeps_bits(name, n_new):
    layer,mask = masked_layer()
    model = nn.Sequential(SparseLinear.from_linear(layer, mask))
    p,values = sparse_params(model)[0],model[0].values
    opt = {**optimizers, **raw}[name](list(model.parameters()), lr=.01)
    steps(model, opt)
    def dense(t): return torch.zeros(mask.shape, dtype=t.dtype).masked_scatter(p.mask, t)
    slots = memory(opt, values)
    before = [dense(t.detach()) for t in [values, *slots]]
    assert slots and all(b.count_nonzero() for b in before[1:])
    g,new = torch.Generator().manual_seed(1),mask.clone()
    drop = mask.nonzero()[torch.randperm(int(mask.sum()), generator=g)[:8]]
    grow = (~mask).nonzero()[torch.randperm(int((~mask).sum()), generator=g)[:dict(fewer=3, same=8, more=20)[n_new]]]
    new[drop[:,0],drop[:,1]] = False
    new[grow[:,0],grow[:,1]] = True
    loss = model(torch.randn(4, 12, dtype=torch.float64)).sum()  # whoever keeps the graph of an earlier step doesn't disturb the next
    p.rewire(new, opt)
    assert model[0].values is values and torch.equal(p.mask, new)
    after = [dense(t.detach()) for t in [values, *memory(opt, values)]]
    assert len(after)==len(before)
    for a,b in zip(after, before):
        assert torch.equal(a[mask & new], b[mask & new])
        assert not a[new & ~mask].any()
    steps(model, opt)
    assert values.isfinite().all() and len(values)==new.sum() and loss.requires_grad

@pytest.mark.parametrize('name', list(optimizers))
def test_trains_like_masked(name):
    torch.manual_seed(0)
    masked = nn.Sequential(nn.Linear(12,20), nn.ReLU(), nn.Linear(20,16), nn.ReLU(), nn.Linear(16,3)).double()
    sparsify_model(masked, .8)
    model = deepcopy(masked)
    report = sparse_layers_(model, .5, min_weights=0)
    assert [r.status for r in report.rows]==['sparse']*3
    for m in (masked,model):
        opt = optimizers[name](params(m), lr=.01)
        if not name.startswith('torch'): opt.set_hypers(wd=.1)
        steps(m, opt, 12)
    for a,b in zip(masked_params(masked), sparse_params(model)):
        assert a.name==b.name and torch.equal(a.mask, b.mask)
        torch.testing.assert_close(a.param.data*a.mask, b.weight, rtol=1e-7, atol=1e-9)

def test_learner_decays_values():
    "fastai's `Learner` takes weight decay off biases only"
    learn = tiny_learner(nn.Sequential(SparseLinear(4,16,.5), nn.ReLU(), SparseLinear(16,2,.5)), opt_func=partial(SGD, wd=.1))
    learn.create_opt()
    decays = {n:learn.opt.state[p].get('do_wd', True) for n,p in learn.model.named_parameters()}
    assert decays=={'0.values':True, '0.bias':False, '2.values':True, '2.bias':False}

@pytest.mark.parametrize('n_batches', [1,3])
def test_collected_gradient(n_batches):
    layer,mask = masked_layer()
    model = nn.Sequential(SparseLinear.from_linear(deepcopy(layer), mask), nn.Tanh(), nn.Linear(7,2).double())
    p, = sparse_params(model)
    model(torch.randn(4, 12, dtype=torch.float64)).sum().backward()
    assert p.grad is None
    model.zero_grad()
    p.collect(True)
    weight,total = p.weight.requires_grad_(),0
    for _ in range(n_batches):
        x = torch.randn(2, 3, 12, dtype=torch.float64)
        model(x).square().sum().backward()
        model[2](torch.tanh(F.linear(x, weight, model[0].bias))).square().sum().backward()
        p.collect(True)
    torch.testing.assert_close(p.grad, weight.grad)
    p.collect(False)
    assert p.grad is None
    p.collect(True)
    model[0].values.requires_grad_(False)
    model(x).sum().backward()
    assert p.grad is None

def test_no_grad_keeps_nothing():
    sparse = SparseLinear(12, 7, .5)
    with torch.no_grad(): assert sparse(torch.randn(2,12)).grad_fn is None
    p, = sparse_params(sparse)
    p.collect(True)
    with torch.no_grad(): sparse(torch.randn(2,12))
    assert p.grad is None

def test_round_trips(tmp_path):
    sparse,other,x = SparseLinear(12, 7, .5),SparseLinear(12, 7, .9, seed=1),torch.randn(3, 12)
    file = tmp_path/'m.pth'
    torch.save(sparse.state_dict(), file)
    opt = torch.optim.SGD(other.parameters(), .1, momentum=.9)
    other(x).sum().backward()
    values = other.values
    other.zero_grad()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.values is values and len(values)==len(sparse.values)
    for copied in (other, deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        assert torch.equal(copied(x), sparse(x)) and torch.equal(copied.mask, sparse.mask)
        copied(x).sum().backward()
        assert copied.values.grad.shape==sparse.values.shape
    opt.step()

@pytest.mark.parametrize('harm,message', [(dict(values=lambda t: t[1:]), 'values for'), (dict(col_indices=lambda t: t+12), 'columns outside'),
                                          (dict(crow_indices=lambda t: t.flip(0)), 'add up'), (dict(crow_indices=lambda t: t[1:]), 'crow_indices')])
def test_broken_state_changes_nothing(harm, message):
    sparse,other = SparseLinear(12, 7, .5),SparseLinear(12, 7, .9, seed=1)
    weight,state = other.weight.detach().clone(),sparse.state_dict()
    for k,f in harm.items(): state[k] = f(state[k])
    with pytest.raises(RuntimeError, match=message): other.load_state_dict(state)
    if message!='crow_indices': assert torch.equal(other.weight, weight)

def test_learner_export(tmp_path):
    learn = tiny_learner(nn.Sequential(SparseLinear(4,16,.5), nn.ReLU(), SparseLinear(16,2,.5)), path=tmp_path)
    learn.fit(1)
    learn.save('m', with_opt=True)
    before = weights(learn.model)
    p, = sparse_params(learn.model)[:1]
    p.rewire(torch.ones(16,4, dtype=torch.bool), learn.opt)
    learn.fit(1)
    learn.load('m', with_opt=True)
    assert same(before, weights(learn.model))
    learn.fit(1)
    learn.export()
    x = torch.randn(3,4)
    assert torch.equal(load_learner(tmp_path/'export.pkl').model(x), learn.model.cpu()(x))

@pytest.mark.parametrize('name', [*optimizers, *raw])
def test_optimizer_follows(name):
    "There and back in the middle of training"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12,20), nn.ReLU(), nn.Linear(20,3)).double()
    sparsify_model(model, .8)
    other = deepcopy(model)
    opt,opt2 = ({**optimizers, **raw}[name](list(m.parameters()), lr=.01) for m in (model,other))
    steps(model, opt), steps(other, opt2)
    sparse_layers_(other, .5, 0, opt=opt2)
    steps(model, opt), steps(other, opt2)
    dense_layers_(other, opt=opt2)
    steps(model, opt), steps(other, opt2)
    a,b = weights(model),weights(other)
    assert a.keys()==b.keys()
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-7, atol=1e-9)
    assert all(p.is_enforced for p in masked_params(other))

@pytest.mark.parametrize('name', list(optimizers))
def test_learner_goes_on(name):
    "A `Learner` trains what its layers were swapped for, with the memories of its optimizer"
    def learner(): return sparse_learner(.7, model=mlp().double(), opt_func=optimizers[name], lr=.01, dtype=torch.float64)
    learn,other = learner(),learner()
    learn.fit(3)
    other.fit(1)
    before = memory(other.opt, other.model[0].weight)
    sparse_layers_(other, .5, 0)
    values = {p.name:p.param.detach().clone() for p in sparse_params(other.model)}
    assert len(values)==3 and len(memory(other.opt, other.model[0].values))==len(before)>0
    other.fit(1)
    assert not any(torch.equal(p.param, values[p.name]) for p in sparse_params(other.model))
    assert [p.name for p in dense_layers_(other)]==list(values)
    other.fit(1)
    a,b = weights(learn.model),weights(other.model)
    assert a.keys()==b.keys() and not violations(other.model, other.opt)
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-6, atol=1e-9)

def test_learner_with_another_optimizer():
    "One that is given goes before the one of the `Learner`, which may have none yet"
    learn = sparse_learner(.7)
    sparse_layers_(learn, .5, 0)
    assert learn.opt is None
    opt = torch.optim.SGD(learn.model.parameters(), .1)
    dense_layers_(learn, opt)
    assert learn.model[0].weight is opt.param_groups[0]['params'][0]

@pytest.mark.parametrize('names', ['__ALL_PRUNABLE__','__ALL__','0',['0.weight','__all_prunable__'],r're:\d\.weight'])
def test_nothing_left_to_swap(names):
    model = nn.Sequential(nn.Linear(8,8))
    sparsify_model(model, .9)
    assert len(sparse_layers_(model, .5, 0, names).rows)==1
    report = sparse_layers_(model, .5, 0, names)
    assert not report.rows and repr(report) and report._repr_html_() and report.to_df().empty
    assert not sparse_layers_(nn.Sequential(nn.ReLU())).rows
    for wrong in ('1.weight',['0.weight','heat'],'re:1'):
        with pytest.raises(ValueError, match='matches no parameter'): sparse_layers_(model, .5, 0, wrong)
    with pytest.raises(TypeError, match='string'): sparse_layers_(model, params=[3])

@dataclass
class Row:
    layer:str; n:int; share:float; ms:float; input:str; status:str

def test_report_is_a_table():
    "Numbers to the right, texts to the left, a dash for nothing"
    report = LayerReport([Row('body.0', 12345, .95, None, '', 'dense'), Row('1', 7, .9499, 12.5, '4×<2>', 'sparse')], 'one & all')
    assert repr(report).splitlines()==[
        'layer        n   share       ms  input  status',
        '----------------------------------------------',
        'body.0  12,345  0.9500        –  –      dense',
        '1            7  0.9499  12.5000  4×<2>  sparse',
        '----------------------------------------------',
        'one & all']
    html = report._repr_html_()
    assert html.count('<tr>')==3 and '4×&lt;2&gt;' in html and 'one &amp; all' in html and 'None' not in html and 'nan' not in html.lower()

def test_why_not():
    shared,hooked = nn.Linear(8,8),nn.Linear(8,8)
    hooked.register_forward_hook(lambda *_: None)
    tied = nn.Linear(8,8)
    tied.weight = shared.weight
    class Own(nn.Linear): pass
    model = nn.ModuleDict(dict(conv=nn.Conv2d(3,8,1), shared=shared, tied=tied, hooked=hooked, own=Own(8,8), float16=nn.Linear(8,8).half(), small=nn.Linear(2,2), full=nn.Linear(8,8)))
    report = sparse_layers_(model, .9, 20)
    status = {r.layer.split('.')[0]:r.status for r in report.rows}
    assert status==dict(conv='Conv2d is no plain Linear', shared='shared by several layers', hooked='has hooks', own='Own is no plain Linear',
                        float16='float16', small='fewer than 20 weights', full='sparsity below 0.9')
    assert 'sparsity below' in repr(report) and not sparse_params(model)
    root = nn.Linear(8,8)
    with torch.no_grad(): root.weight.zero_()
    assert 'the model itself' in sparse_layers_(root, .9, 0).rows[0].status
    with pytest.raises(ValueError, match='min_sparsity'): sparse_layers_(model, 1.5)
    with pytest.raises(ValueError, match='to_linear'): dense_layers_(SparseLinear(3,3))
    assert dense_layers_(model)==[]

def test_same_layer_twice():
    layer,_ = masked_layer(8, 8)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    x = torch.randn(2, 8, dtype=torch.float64)
    y = model(x)
    sparse_layers_(model, .1, 0)
    assert model[0] is model[2] and isinstance(model[0], SparseLinear)
    torch.testing.assert_close(model(x), y)
    p, = sparse_params(model)
    weight = p.weight.requires_grad_()
    p.collect(True)
    model(x).sum().backward()
    F.linear(F.linear(x, weight, model[0].bias).relu(), weight, model[0].bias).sum().backward()
    torch.testing.assert_close(p.grad, weight.grad)

def test_transformer_layer():
    "Model code that reads `weight` gets a dense copy with gradients"
    model = nn.TransformerEncoderLayer(8, 2, 32, dropout=0., batch_first=True)
    sparsify_model(model, .5, ['linear1','linear2'])
    other,x = deepcopy(model),torch.randn(2, 5, 8)
    sparse_layers_(other, .5, 0, ['linear1','linear2'])
    for training in (True,False): torch.testing.assert_close(other.train(training)(x), model.train(training)(x))
    other.linear1.weight.sum().backward()
    assert torch.equal(other.linear1.values.grad, torch.ones_like(other.linear1.values))

def test_autocast():
    sparse,x = SparseLinear(12, 7, .5),torch.randn(3, 12)
    with torch.autocast('cpu', torch.bfloat16): y = sparse(x.bfloat16())
    assert y.dtype==torch.float32
    y.sum().backward()
    assert sparse.values.grad.dtype==torch.float32

def test_tensor_subclasses():
    layer,sparse,_ = pair(dtype=torch.float32)
    x = TensorImage(torch.randn(3, 12))
    torch.testing.assert_close(sparse(x), layer(x))
    CrossEntropyLossFlat()(sparse(x), TensorCategory(torch.tensor([0,1,2]))).backward()
    assert sparse.values.grad is not None

def wide(n=512, sparsity=.97):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(n,n), nn.ReLU(), nn.Linear(n,n), nn.ReLU(), nn.Linear(n,4))
    sparsify_model(model, sparsity, ['0.weight','2.weight'])
    return model

def mixed():
    "Layers of all kinds, each 90 % zeros"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3,8,3,2,1), nn.ReLU(), nn.Conv2d(8,16,1), nn.Conv2d(16,16,1,stride=2), nn.Conv2d(16,16,3,dilation=2,bias=False), nn.Conv2d(16,16,3,padding=1,groups=2),
                          nn.Conv2d(16,16,3,padding='same'), nn.Conv2d(16,8,(1,3),padding=(0,1)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,4))
    sparsify_model(model, .9)
    return model

@pytest.mark.parametrize('slow', ['dense','sparse'])
def test_inference_decides_by_time(monkeypatch, slow):
    "Every layer is swapped if all sparse kernels are faster, none if they are slower, and outputs stay"
    monkeypatch.setattr(inference, '_fastest', lambda candidates, n: {k:10. if (k=='dense')==(slow=='dense') else 1. for k in candidates})
    for model,x in ((mixed(),torch.randn(2,3,33,33)), (wide(64),torch.randn(5,64)), (wide(64),torch.randn(2,3,64))):
        before = weights(model)
        fast,report = to_sparse_inference(model, x, min_sparsity=.5)
        assert same(before, weights(model)) and model.training and not fast.training
        torch.testing.assert_close(fast(x), model.eval()(x), rtol=1e-5, atol=1e-6)
        other = torch.cat([x,x+1])
        torch.testing.assert_close(fast(other), model(other), rtol=1e-5, atol=1e-6)
        kept = [r for r in report.rows if r.status in ('embedding bag','CSR')]
        assert bool(kept)==(slow=='dense') and not any(p.requires_grad for p in fast.parameters())
    assert {'no sparse kernel for this Conv2d'}<={r.status for r in to_sparse_inference(mixed(), torch.randn(2,3,33,33))[1].rows}

def test_inference_rolls_back(monkeypatch):
    "What changes outputs becomes dense again, by itself or as part of the model"
    monkeypatch.setattr(inference, '_fastest', lambda candidates, n: {k:10. if k=='dense' else 1. for k in candidates})
    model,x = wide(64),torch.randn(5,64)
    fast,report = to_sparse_inference(model, x, tol=0.)
    assert torch.equal(fast(x), model(x))
    worst = iter([1.,float('nan'),0.])
    monkeypatch.setattr(inference, 'largest_difference', lambda a,b: next(worst) if isinstance(b, torch.Tensor) else 0.)
    fast,report = to_sparse_inference(model, x)
    assert sum('rolled back' in r.status for r in report.rows)==2 and not sparse_params(fast) and torch.equal(fast(x), model(x))

def test_inference_measures():
    model,x = wide(),torch.randn(64,512)
    fast,report = to_sparse_inference(model, x)
    for r in report.rows:
        if r.status in ('embedding bag','CSR'): assert r.sparse_ms<.9*r.dense_ms and r.input=='64×512'
    assert report.rows[2].status in ('sparsity below 0.5','dense, transposed')
    assert largest_difference(fast(x), model(x))<1e-5
    assert {'layer','input','dense_ms','sparse_ms','status'}<set(report.to_df().columns) and 'layers sparse' in repr(report)

@pytest.mark.parametrize('bias', [True,False])
@pytest.mark.parametrize('shape', [(5,),(2,3),()])
def test_transposed_linear_is_a_linear_layer(shape, bias):
    "As the head of a network of sparse layers it has the same outputs and gradients, can be masked, become sparse itself, and be quantized"
    torch.manual_seed(0)
    plain = nn.Sequential(SparseLinear(8,16,.5), nn.ReLU(), nn.Linear(16,12,bias=bias), nn.ReLU(), nn.Linear(12,3,bias=bias)).double()
    model,x = deepcopy(plain),torch.randn(*shape, 8, dtype=torch.double)
    for i in (2,4): model[i].__class__ = TransposedLinear
    for m in (plain,model): m(x).square().sum().backward()
    torch.testing.assert_close(model(x), plain(x))
    for a,b in zip(model.parameters(), plain.parameters()): torch.testing.assert_close(a.grad, b.grad)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(x), model(x)) and [*again.state_dict()]==[*plain.state_dict()]
    sparsify_model(model, .75, '2.weight')
    assert sparse_layers_(model, .5, 0).rows[0].status=='sparse' and [type(m) for m in model[::2]]==[SparseLinear,SparseLinear,TransposedLinear]
    dense_layers_(model)
    assert [type(m) for m in model[::2]]==[nn.Linear,nn.Linear,TransposedLinear]
    make_permanent(model)[2].weight.data[3] = 0.
    small,report = compact(model, x.reshape(-1,8))
    assert small[4].in_features<12 and type(small[4]) is TransposedLinear
    torch.testing.assert_close(small(x), model(x))

@pytest.mark.parametrize('kind', ['embedding bag','CSR','embedding bags of 512 features'])
def test_inference_kernels_say_what_they_take(kind):
    "Autocast may have made inputs another dtype; anything else is named"
    layer = nn.Linear(700, 5)
    sparsify_model(layer, .8)
    x = torch.randn(128, 700)
    fast = inference._kernels(layer, [x])[kind](layer).eval()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        for t in (x,x.bfloat16()): torch.testing.assert_close(fast(t), layer.float()(t).float(), rtol=.05, atol=.05)
    for wrong,error,words in ((x[:,:5],ValueError,'expected inputs with 700 features, got shape'), (x.double(),TypeError,'inputs must be torch.float32')):
        with pytest.raises(error, match=words): fast(wrong)
    assert kind=='embedding bag' or {n.rpartition('.')[2] for n,_ in fast.named_buffers()}=={'crow_indices','col_indices','values'}

def test_inference_transposes_what_follows(monkeypatch):
    "Dense layers that get activations feature by feature give theirs so, too, down to the end; those that don't stay what they are"
    monkeypatch.setattr(inference, '_fastest', lambda candidates, n: {k:10. if k=='dense' else 1. for k in candidates})
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8,64), nn.ReLU(), nn.Linear(64,64,bias=False), nn.ReLU(), nn.Linear(64,6,bias=False), nn.GELU(), nn.Linear(6,3), nn.Softmax(-1))
    sparsify_model(model, .9, ['2.weight'])
    for x in (torch.randn(5,8), torch.randn(2,3,8)):
        fast,report = to_sparse_inference(model, x)
        assert [type(fast[i]).__name__ for i in (0,2,4,6)]==['Linear','SparseLinear','TransposedLinear','TransposedLinear']
        assert [r.status for r in report.rows]==['sparsity below 0.5','embedding bag','dense, transposed','dense, transposed'] and '1 of 4 layers sparse' in report.summary
        for other in (x, x[:1], x[0]): torch.testing.assert_close(fast(other), model.eval()(other), rtol=1e-5, atol=1e-6)

def test_inference_splits_by_what_a_cache_holds():
    "Parts are the smaller, the more rows there are, as long as they are few and worth a call; each gives the same"
    layer = nn.Linear(1400, 5)
    sparsify_model(layer, .8)
    for shapes,widths in (((16,),[]), ((128,),[512,1024]), ((512,),[128,256]), ((2,256),[128,256]), ((4096,),[]), ((8,),[]), ((1,512),[128,256])):
        x = torch.randn(*shapes, 1400)
        kernels = inference._kernels(layer, [x[:1],x])
        assert [k for k in kernels if 'bags' in k]==[f'embedding bags of {w} features' for w in widths]
        for make in kernels.values(): torch.testing.assert_close(make(layer)(x), layer(x), rtol=1e-5, atol=1e-5)

def test_inference_of_sparse_layers():
    model,x = wide(),torch.randn(8,512)
    sparse_layers_(model)
    fast,_ = to_sparse_inference(model, x)
    assert len(sparse_params(model))==2 and largest_difference(fast(x), model(x))<1e-5

def test_inference_unused_and_shared():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.unused = nn.Linear(8,8),nn.Linear(8,8)
            self.b = nn.Linear(8,8)
            self.b.weight = self.a.weight
        def forward(self, x, scale): return {'out':self.b(self.a(x))*scale, 'n':3}
    model = M()
    sparsify_model(model, .9)
    fast,report = to_sparse_inference(model, (torch.randn(2,8), torch.tensor(2.)))
    assert [r.status for r in report.rows]==['shared by several layers','not used by the example']

@pytest.mark.parametrize('split', [False,True])
def test_inference_of_models_that_read_weights(split, monkeypatch):
    "A layer that is not only called has a weight to be read, whatever its kernel"
    class Reads(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b = nn.Linear(256,64),nn.Linear(64,8)
        def forward(self, x): return self.b(self.a(x).relu())+self.a.weight.mean()+self.b.weight.sum()
    model,x = Reads().eval(),torch.randn(16,256)
    sparsify_model(model, .9)
    best = 'embedding bags' if split else 'CSR'
    monkeypatch.setattr(inference, '_part_widths', lambda module, inputs: [100])
    monkeypatch.setattr(inference, '_fastest', lambda candidates, n: {k:.5 if k.startswith(best) else 10. if k=='dense' else 1. for k in candidates})
    fast,report = to_sparse_inference(model, x)
    assert all(r.status.startswith(best) for r in report.rows)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)

def test_inference_of_layers_that_run_in_one_piece(monkeypatch):
    "PyTorch's transformer layers read the weights of linear layers that they don't call; if they call them, what they get is seen"
    monkeypatch.setattr(inference, '_fastest', lambda candidates, n: {k:10. if k=='dense' else 1. for k in candidates})
    for batch_first in (True,False):
        model,x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first).eval(),torch.randn(3,5,16)
        sparsify_model(model, .9)
        fast,report = to_sparse_inference(model, x)
        assert {r.layer:r.status=='not used by the example' for r in report.rows if r.layer.startswith('linear')}=={'linear1':batch_first,'linear2':batch_first}
        with torch.no_grad(): torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)

def test_inference_of_a_model_that_is_slower_as_a_whole(monkeypatch):
    monkeypatch.setattr(inference, '_fastest', lambda candidates, n: {k:10. if (k=='dense')==('sparse' not in candidates) else 1. for k in candidates})
    model,x = wide(64).eval(),torch.randn(5,64)
    fast,report = to_sparse_inference(model, x)
    assert report.summary==f'0 of {len(report.rows)} layers sparse' and torch.equal(fast(x), model(x))
    assert any(r.status.startswith('the model is slower with ') for r in report.rows) and all(type(a) is type(b) for a,b in zip(fast, model))

def test_inference_leaves_a_forward_of_its_own():
    model,x = nn.Sequential(nn.Linear(8,8), nn.Linear(8,2)).eval(),torch.randn(2,8)
    sparsify_model(model, .9)
    model[1].forward = partial(torch.sum, dim=1)
    fast,report = to_sparse_inference(model, x)
    assert report.rows[1].status=='has hooks, or a forward of its own' and torch.equal(fast(x), model(x)) and 'forward' not in vars(fast[0])

@pytest.mark.parametrize('wrong', [dict(tol=-1), dict(tol='a'), dict(min_sparsity=2), dict(n_rounds=0), dict(n_rounds='3'), dict(n_rounds=1.5), dict(n_rounds=True)], ids=str)
def test_inference_refuses_arguments(wrong):
    with pytest.raises(ValueError, match=f'to_sparse_inference: {first(wrong)} must be'): to_sparse_inference(wide(8), torch.randn(2,8), **wrong)

@pytest.mark.parametrize('example', [None, torch.randn(2,5), (torch.randn(2,8),None)])
def test_inference_says_what_it_needs(example):
    model = nn.Sequential(nn.Linear(8,8))
    sparsify_model(model, .9)
    with pytest.raises(ValueError, match="to_sparse_inference: the model can't be run on the example"): to_sparse_inference(model, example)

@given(sizes=st.lists(st.integers(1,12), min_size=2, max_size=5), density=st.floats(0,.6), norm=st.booleans(), act=st.sampled_from([nn.ReLU,nn.Sigmoid,nn.GELU,nn.Identity]),
       bias=st.booleans(), seed=st.integers(0,999))
def test_compact_is_exact(sizes, density, norm, act, bias, seed):
    torch.manual_seed(seed)
    layers = []
    for i,o in zip(sizes, sizes[1:]): layers += [nn.Linear(i,o,bias=bias), *([nn.BatchNorm1d(o)] if norm else []), act(), nn.Dropout(.5)]
    model = nn.Sequential(*layers[:-3 if norm else -2]).eval()
    with torch.no_grad():
        for m in model:
            if isinstance(m, nn.Linear): m.weight.mul_(torch.rand(m.weight.shape)<density)
            if isinstance(m, nn.BatchNorm1d):
                for t in (m.weight,m.bias,m.running_mean): t.normal_()
                m.running_var.uniform_(.5, 2)
    small,report = compact(model)
    x = torch.randn(7, sizes[0], dtype=torch.float64)
    assert largest_difference(deepcopy(small).double()(x), deepcopy(model).double()(x))<1e-5
    torch.testing.assert_close(small(x.float()), model(x.float()), rtol=1e-4, atol=1e-5)
    hidden = [m for m in small if isinstance(m, nn.Linear)]
    assert not any('rolled back' in r.status for r in report.rows) and [r.left for r in report.rows]==[m.out_features for m in hidden]
    for a,b in zip(hidden, hidden[1:]):
        assert a.out_features==b.in_features==len(a.weight)
        if a.out_features>1: assert a.weight.any(1).all() and b.weight.any(0).all()

class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c,self.d = nn.Linear(6,8),nn.Linear(8,8),nn.Linear(8,8),nn.Linear(8,3)
    def forward(self, x):
        x = F.relu(self.a(x))
        return self.d(x+self.c(torch.tanh(self.b(x))))

def test_compact_stops_at_what_it_does_not_know():
    model = Residual()
    with torch.no_grad():
        for m in (model.a,model.b,model.c): m.weight[:3] = 0
    small,report = compact(model)
    status = {r.layer:r.status for r in report.rows}
    assert status=={'a':'read in 2 places', 'b':'compacted', 'c':'add may mix units', 'd':'an output of the model'}
    assert small.b.out_features==5 and model.b.out_features==8
    x = torch.randn(4,6)
    torch.testing.assert_close(small(x), model(x))

@pytest.mark.parametrize('build,status', [
    (lambda: [nn.Linear(6,8), nn.LayerNorm(8), nn.Linear(8,2)], 'LayerNorm 1 may mix units'),
    (lambda: [nn.Linear(6,8), nn.Softmax(1), nn.Linear(8,2)], 'Softmax 1 may mix units'),
    (lambda: [nn.Linear(6,8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8,2)], 'BatchNorm1d 1 may mix units'),
    (lambda: (lambda l: [nn.Linear(6,8), l, nn.ReLU(), l])(nn.Linear(8,8)), '1 is used several times, or shares parameters')])
def test_compact_reasons(build, status):
    model = nn.Sequential(*build())
    with torch.no_grad(): model[0].weight[:3] = 0
    small,report = compact(model)
    assert report.rows[0].status==status and same(weights(small), weights(model))

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Linear(6,8),nn.Linear(8,6)
    def forward(self, x): return F.linear(self.b(F.relu(self.a(x))), self.a.weight)

class Reshaped(nn.Module):
    "Tracing sees nothing wrong, but the model counts on a size"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.scale = nn.Linear(6,8),nn.Linear(8,6),nn.Parameter(torch.ones(8))
        self.a.register_forward_hook(lambda m,args,out: out*self.scale)
    def forward(self, x): return self.b(F.relu(self.a(x)))

@pytest.mark.parametrize('cls,status', [(Tied,'shares parameters'), (Reshaped,'rolled back')])
def test_compact_leaves_models_whole(cls, status):
    model = cls()
    with torch.no_grad(): model.a.weight[:3] = 0
    small,report = compact(model)
    assert status in report.rows[0].status and same(weights(small), weights(model))
    assert not any(r.no_inputs or r.no_outputs for r in report.rows)

def conv_chain(padding_mode='zeros', padding=1, pool=nn.MaxPool2d(2)):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3,8,3,padding=1,bias=False), nn.BatchNorm2d(8), nn.PReLU(8), pool, nn.Conv2d(8,6,3,padding=padding,padding_mode=padding_mode), nn.ReLU(),
                          nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24,2))
    with torch.no_grad():
        model[1].bias.normal_(), model[1].running_mean.normal_()
        model[0].weight[:2] = 0
        model[4].weight[:,4:5] = 0
        model[4].weight[3] = 0
        model[8].weight[:,16:20] = 0
    return model.eval()

@pytest.mark.parametrize('kwargs,left', [({},[7,4]), (dict(padding=0),[5,4]), (dict(padding_mode='reflect'),[5,4]), (dict(pool=nn.AvgPool2d(2)),[7,4]), (dict(pool=nn.AvgPool2d(3,1,1)),[8,4])])
def test_compact_convolutions(kwargs, left):
    model,x = conv_chain(**kwargs),torch.randn(2,3,16,16)
    small,report = compact(model, x)
    assert [r.left for r in report.rows[:2]]==left, report
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('build,shape,status', [
    (lambda: [nn.Conv2d(1,8,3), nn.Flatten(), nn.BatchNorm1d(288), nn.ReLU(), nn.Linear(288,10)], (2,1,8,8), 'BatchNorm1d 2 works on 288 features, not on its 8 units'),
    (lambda: [nn.Conv2d(1,8,3), nn.Flatten(), nn.PReLU(288), nn.Linear(288,10)], (2,1,8,8), 'PReLU 2 works on 288 features, not on its 8 units'),
    (lambda: [nn.Linear(16,8), nn.BatchNorm1d(5), nn.Linear(8,4)], (2,5,16), 'BatchNorm1d 1 works on 5 features, not on its 8 units'),
    (lambda: [nn.Linear(16,8), nn.PReLU(5), nn.Linear(8,4)], (2,5,16), 'PReLU 1 works on 5 features, not on its 8 units'),
    (lambda: [nn.Linear(16,8), nn.BatchNorm1d(8), nn.Linear(8,4)], (2,8,16), 'rolled back'),
    (lambda: [nn.Linear(16,8), nn.PReLU(8), nn.Linear(8,4)], (2,8,16), 'rolled back'),
    (lambda: [nn.Conv2d(1,8,3), nn.Flatten(), nn.PReLU(), nn.Linear(288,10)], (2,1,8,8), 'compacted'),
    (lambda: [nn.Conv2d(1,8,3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8), nn.PReLU(8), nn.Dropout1d(), nn.Linear(8,10)], (2,1,8,8), 'compacted')])
def test_compact_norms_of_other_things_than_units(build, shape, status):
    torch.manual_seed(0)
    model,x = nn.Sequential(*build()),torch.randn(shape)
    for _ in range(3): model(torch.randn(shape)+1)
    with torch.no_grad(): model.eval()[0].weight[2] = 0
    small,report = compact(model, x)
    assert report.rows[0].status.startswith(status) and report.rows[0].left==(7 if status=='compacted' else 8)
    torch.testing.assert_close(small(x), model(x))

def test_compact_keeps_what_it_is_not_about():
    model = nn.Sequential(nn.Linear(6,8), nn.ReLU(), nn.Linear(8,2), nn.Dropout())
    sparsify_model(model, .9)
    model[2].weight.requires_grad_(False)
    model[1].eval()
    small,_ = compact(model)
    assert not masked_params(small) and masked_params(model)
    assert [m.training for m in small.modules()]==[m.training for m in model.modules()] and not small[2].weight.requires_grad
    sparse_layers_(model, .5, 0)
    assert len(sparse_params(model))==2 and not sparse_params(compact(model)[0])

def test_compact_says_what_it_needs():
    with pytest.raises(ValueError, match='as xb'): compact(nn.Sequential(nn.Embedding(5,4), nn.Linear(4,3), nn.Linear(3,2)))
    with pytest.raises(ValueError, match='as xb'): compact(conv_chain(), torch.randn(2,4,16,16))
    small,report = compact(nn.Sequential(nn.Embedding(5,4), nn.Linear(4,3), nn.Linear(3,2)), torch.tensor([1,2]))
    assert len(report.rows)==2
    class Dynamic(nn.Module):
        def forward(self, x): return x if x.sum()>0 else -x
    assert "can't be traced" in repr(compact(Dynamic())[1])
    assert repr(compact(nn.Linear(3,2))[1])

@pytest.mark.parametrize('method', ['SET','RigL','SNFS'])
@pytest.mark.parametrize('opt_func', [partial(SGD, mom=.9), Adam])
def test_finds_the_connections_that_masks_find(method, opt_func):
    "Dynamic sparse training of sparse layers and of masked ones: the same connections, the same weights"
    masked = nn.Sequential(nn.Linear(4,24), nn.ReLU(), nn.Linear(24,24), nn.ReLU(), nn.Linear(24,2)).double()
    sparsify_model(masked, .7)
    model = deepcopy(masked)
    sparse_layers_(model, .5, 0)
    for m in (masked,model):
        learn = tiny_learner(m, opt_func=opt_func, lr=.01, n_trn=10, dtype=torch.float64)
        learn.fit(4, cbs=dict(SET=SET,RigL=RigL,SNFS=SNFS)[method](every=5))
        assert len(learn.recorder.mask_updates)>=4
    for a,b in zip(masked_params(masked), sparse_params(model)):
        assert a.name==b.name and torch.equal(a.mask, b.mask)
        torch.testing.assert_close(a.param.data, b.weight, rtol=1e-6, atol=1e-9)

@pytest.mark.parametrize('params,expected', [
    ('__ALL_PRUNABLE__',['0.weight','2.weight','4.weight']), ('__ALL__',['0.weight','2.weight','4.weight']), ('re:.*weight',['0.weight','2.weight','4.weight']),
    ('re:[02].weight',['0.weight','2.weight']), (['2','4.weight'],['2.weight','4.weight']), ('2.weight',['2.weight']), (['module.2.weight'],['2.weight'])])
def test_params_stand_for_sparse_and_masked_layers(params, expected):
    model = mlp(d_hid=64)
    sparsify_model(model, .8)
    sparse_layers_(model, .5, 4000)
    learn = tiny_learner(model)
    learn.fit(1, cbs=RigL(every=2, params=params))
    assert list(learn.recorder.mask_updates[-1].sparsities)==expected and [p.name for p in sparse_params(model)]==['2.weight']

@pytest.mark.parametrize('cls', [GMPruningModifier,GlobalMagnitudePruningModifier,MagnitudePruningModifier])
def test_pruning_says_that_sparse_layers_stay(cls, caplog):
    "Their connections are for drop-and-grow to change; by name they are refused"
    model = mlp(d_hid=64)
    sparsify_model(model, .8)
    sparse_layers_(model, .5, 4000)
    p, = sparse_params(model)
    connections,learn = p.mask.clone(),tiny_learner(model)
    refused = cls(.1, .9, 0., 1., .5, params=[p.name])
    for cb in (refused,refused,*(cls(.1, .9, 0., 1., .5, params=o) for o in (p.name, p.name.removesuffix('.weight'), [f're:{p.name}'], ['0.weight',p.name]))):
        with pytest.raises(ValueError, match=f"{cls.__name__}: only dynamic sparse training exchanges connections of SparseLinear layers, .*leave them out of params: {p.name}"): learn.fit(1, cbs=cb)
    pruner = cls(.1, .9, 0., 2., .5)
    for _ in range(2): learn.fit(1, cbs=pruner)
    learn.fit(1, cbs=ConstantPruningModifier('re:.*weight'))
    assert caplog.text.count(f"{cls.__name__}: SparseLinear layers stay as they are, dense_layers_ makes them dense: {p.name}")==1
    assert p.mask.equal(connections)

_ranks = '''
import os,sys,torch,torch.distributed as dist
from torch import nn
from fastsparse_create.sparse.linear import *
rank = int(sys.argv[1])
dist.init_process_group('gloo', init_method=f'file://{sys.argv[2]}', rank=rank, world_size=2)
net = nn.parallel.DistributedDataParallel(nn.Sequential(SparseLinear(4,16,.5), nn.ReLU(), nn.Linear(16,2)))
p, = sparse_params(net)
assert p.name=='0.weight'
p.collect(True)
net(torch.randn(8, 4, generator=torch.Generator().manual_seed(rank))).square().mean().backward()
grad,kept = p.grad,p.mask
torch.testing.assert_close(grad[kept], p.param.grad)
dist.barrier()
print('agreed', flush=True)
os._exit(0)
'''

@pytest.mark.slow
def test_ranks_score_the_same_gradient(tmp_path):
    "A dense gradient is averaged over ranks as `DistributedDataParallel` does it"
    root = Path(__file__).parent.parent
    args,env = [sys.executable, '-W', 'ignore', '-c', _ranks],{**os.environ, 'OMP_NUM_THREADS':'1', 'PYTHONPATH':str(root)}
    ranks = [subprocess.Popen([*args, str(r), str(tmp_path/'store')], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for r in range(2)]
    for r in ranks: assert 'agreed' in (out := r.communicate(timeout=120)[0]), out

def _mest(param, grad, **_): return param.abs()+grad.abs()

@pytest.mark.parametrize('method', [RigL, partial(SNFS, num_grads=4), partial(RigL, keep_f=_mest, num_grads=2)], ids=['rigl','snfs','mest'])
def test_a_scaler_changes_nothing(method):
    "Scales are powers of 2, so that nothing is rounded; a masked layer is compared with a stored one in each update"
    def trained(*cbs):
        model = mlp(d_hid=64)
        sparsify_model(model, .8)
        assert len(sparse_layers_(model, .5, 4000).rows)==3 and len(sparse_params(model))==1
        learn = tiny_learner(model, n_trn=20)
        learn.fit(2, cbs=[method(every=6, T_end=1.), *cbs])
        return learn.model.state_dict()
    plain,scaled = trained(),trained(ScaledPrecision())
    for n,t in plain.items(): assert t.equal(scaled[n]), n

@pytest.mark.parametrize('factor', [1.,2.**-16,.3,3e-5])
def test_collected_gradient_is_scaled_as_the_values_are(factor):
    _,layer,_ = pair(dtype=torch.float32)
    p = sparse_params(nn.Sequential(layer))[0]
    p.collect(True)
    g = torch.Generator().manual_seed(1)
    layer(torch.randn(8, 12, generator=g)).square().sum().backward()
    expected = p.grad*factor
    layer.values.grad.mul_(factor)
    torch.testing.assert_close(p.grad, expected)
    assert factor==.3 or factor==3e-5 or p.grad.equal(expected)

@pytest.mark.parametrize('spoil', [lambda g: g.zero_(), lambda g: g.fill_(math.nan), lambda g: g.fill_(math.inf), lambda g: g.neg_()])
def test_collected_gradient_where_that_of_the_values_says_nothing(spoil):
    _,layer,_ = pair(dtype=torch.float32)
    p = sparse_params(nn.Sequential(layer))[0]
    p.collect(True)
    layer(torch.randn(8, 12, generator=torch.Generator().manual_seed(1))).square().sum().backward()
    expected = p.grad
    spoil(layer.values.grad)
    assert p.grad.equal(expected)
