"Quantization-aware training: what stays as it was, what is rounded, and what other callbacks, loops and libraries see of it."
import copy,os,pickle,subprocess,sys,warnings
import pytest,torch,torch.nn.functional as F
from fastai.basics import Adam,Callback,CancelFitException,DataLoaders,Learner,OptimWrapper,Path,SGD,accuracy,load_learner,noop,np,params,partial,random,ranger,set_seed
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import ProgressCallback
from fastai.callback.training import GradientAccumulation,GradientClip
from fastai.callback.tracker import SaveModelCallback
from fastai.vision.all import ImageDataLoaders,xresnet18
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet18
from fastsparse_create.callback.pruning import *
from fastsparse_create.callback.quantization import *
from fastsparse_create.callback.structured import *
from fastsparse_create.create.manager import *
from fastsparse_create.export.onnx import *
from fastsparse_create.masking import *
from fastsparse_create.quantization.convert import *
from fastsparse_create.quantization.core import *
from fastsparse_create.quantization.deploy import *
from fastsparse_create.quantization.layers import *
from fastsparse_create.sparsify import *
from fastsparse_create.thinning import *

def digits(bs=32, n=256):
    from sklearn.datasets import load_digits
    d = load_digits()
    x,y = torch.tensor(d.images, dtype=torch.float32)[:,None]/16,torch.tensor(d.target)
    return DataLoaders.from_dsets(list(zip(x[:n], y[:n])), list(zip(x[n:], y[n:])), bs=bs, num_workers=0)

class Block(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.conv1,self.bn1,self.relu,self.conv2,self.bn2 = nn.Conv2d(n,n,3,padding=1,bias=False),nn.BatchNorm2d(n),nn.ReLU(inplace=True),nn.Conv2d(n,n,3,padding=1,bias=False),nn.BatchNorm2d(n)
    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        return self.relu(out)

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1,16,3,padding=1), nn.BatchNorm2d(16), nn.ReLU(), Block(16), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256,10))

def learner(model=None, opt_func=Adam, cbs=(), n=256, **kwargs):
    set_seed(0)
    learn = Learner(digits(n=n), model or net(), loss_func=nn.CrossEntropyLoss(), opt_func=opt_func, metrics=accuracy, cbs=cbs, lr=3e-3, **kwargs)
    learn.remove_cbs([ProgressCallback])
    learn.logger = noop
    return learn

x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))

class At(Callback):
    "Calls `f(learn)` at each batch of training"
    order = -50
    def __init__(self, f): self.f = f
    def after_step(self): self.f(self.learn)

# what stays as it was

@pytest.mark.parametrize('opt_func', [partial(SGD, mom=.9), Adam, partial(OptimWrapper, opt=torch.optim.AdamW), ranger])
@pytest.mark.parametrize('start', [0., .5, 1.5])
def test_identity_of_everything_at_the_switch(opt_func, start):
    learn,seen = learner(opt_func=opt_func, splitter=lambda m: [params(m[:4]), params(m[4:])]),[]
    learn.create_opt()
    model,ps,names = learn.model,list(learn.model.parameters()),[n for n,_ in learn.model.named_parameters()]
    groups = [[id(p) for p in pg] for pg in learn.opt.param_lists]
    hook = model[0].register_forward_hook(lambda m,i,o: seen.append(type(m).__name__))
    modules = list(model.modules())
    learn.fit(2, slice(1e-3, 3e-3), cbs=QuantizationModifier(start))
    assert learn.model is model and all(a is b for a,b in zip(model.modules(), modules)) and is_quantized(model)
    assert all(a is b for a,b in zip(model.parameters(), ps)) and [n for n,_ in model.named_parameters()]==names
    assert [[id(p) for p in pg] for pg in learn.opt.param_lists]==groups
    assert set(seen)=={'Conv2d','QuantConv2d'}
    assert hook.id in model[0]._forward_hooks

def test_momentum_goes_on():
    learn,seen = learner(opt_func=partial(SGD, mom=.9)),{}
    def watch(learn):
        key = 'after' if is_quantized(learn.model) else 'before'
        if key=='before' or key not in seen: seen[key] = {id(p):learn.opt.state[p]['grad_avg'].clone() for p in learn.model.parameters()}
    learn.fit(2, cbs=[QuantizationModifier(1.), At(watch)])
    for p,(a,b) in zip(learn.model.parameters(), zip(seen['before'].values(), seen['after'].values())):
        assert (b-.9*a).norm()<=b.norm()+a.norm() and not b.equal(a) and b.ne(0).any()

@pytest.mark.parametrize('start', [0., 1.])
def test_masks_stay_exact(start):
    learn = learner()
    sparsify_model(learn, .8)
    masks = {p.name:p.mask.clone() for p in masked_params(learn.model)}
    def check(learn):
        for p in masked_params(learn.model):
            assert p.param[~masks[p.name]].eq(0).all() and p.mask.equal(masks[p.name])
            m = learn.model.get_submodule(p.name.rsplit('.', 1)[0])
            if isinstance(m, QuantizedLayer): assert m._weight()[~masks[p.name]].eq(0).all()
    learn.fit(2, cbs=[QuantizationModifier(start), At(check)])
    deployed = deploy_copy(learn.model, x)
    for name,mask in masks.items():
        codes = deployed.get_submodule(name.rsplit('.', 1)[0]).codes
        assert (codes.t() if codes.ndim==2 else codes)[~mask].eq(0).all()

def test_pruning_goes_on_in_quantized_layers():
    learn = learner()
    learn.fit(3, cbs=[QuantizationModifier(1.), GMPruningModifier(0., .9, 0, 3, .5)])
    assert measured_sparsity(learn.model)==pytest.approx(.9, abs=2e-3)

@pytest.mark.parametrize('start,off,frozen', [(1,2,3), (0,0,0), (.5,1.5,1.5)])
def test_schedule(start, off, frozen):
    learn,log = learner(),[]
    def watch(learn):
        q = is_quantized(learn.model)
        log.append((q, q and learn.model[0].observes=='never', not learn.model[1].training))
    learn.fit(4, cbs=[QuantizationModifier(float(start), disable_quantization_observer_epoch=float(off), freeze_bn_stats_epoch=float(frozen)), At(watch)])
    n = len(learn.dls.train)
    assert [[l[i] for l in log].index(True) for i in range(3)]==[int(e*n) for e in (start,off,frozen)]
    assert all(l==tuple(i>=int(e*n) for e in (start,off,frozen)) for i,l in enumerate(log))

# files

def test_saved_loaded_copied_exported(tmp_path):
    learn = learner()
    sparsify_model(learn, .5)
    learn.fit(1, cbs=QuantizationModifier(0.))
    model = learn.model.eval()
    expected = model(x).detach()
    assert copy.deepcopy(model)(x).equal(expected) and pickle.loads(pickle.dumps(model))(x).equal(expected)
    torch.save(model, tmp_path/'m.pt')
    assert torch.load(tmp_path/'m.pt', weights_only=False)(x).equal(expected)
    learn.path = tmp_path
    learn.save('qat')
    fresh = learner()
    fresh.path = tmp_path
    quantized_from_file(fresh, tmp_path/'models/qat.pth')
    fresh.load('qat')
    assert fresh.model.eval()(x).equal(expected) and fresh.opt.state_dict()['state'][0]['grad_avg'].equal(learn.opt.state_dict()['state'][0]['grad_avg'])
    fresh.fit(1, cbs=QuantizationModifier(0.))
    assert all(p.param[~p.mask].eq(0).all() for p in masked_params(fresh.model))

def test_an_exported_learner_predicts_the_same(tmp_path):
    from PIL import Image
    for i in range(12):
        (tmp_path/'ab'[i%2]).mkdir(exist_ok=True)
        Image.effect_noise((16,16), 40+20*(i%2)).save(tmp_path/'ab'[i%2]/f'{i}.png')
    dls = ImageDataLoaders.from_folder(tmp_path, valid_pct=.4, bs=4, num_workers=0, seed=0)
    learn = Learner(dls, nn.Sequential(nn.Conv2d(3,8,3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,2)), loss_func=nn.CrossEntropyLoss())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=QuantizationModifier(0.))
    learn.export('l.pkl')
    loaded = load_learner(tmp_path/'l.pkl')
    image = tmp_path/'a'/'0.png'
    with learn.no_bar(), loaded.no_bar(): assert loaded.predict(image)[2].equal(learn.predict(image)[2]) and is_quantized(loaded.model)

def test_the_best_epoch_may_lie_before_the_switch(tmp_path):
    learn = learner(path=tmp_path)
    class Worse(Callback):
        order = 60
        def after_validate(self): self.learn.recorder.log[2] = 1.-.1*self.epoch
    learn.fit(2, cbs=[QuantizationModifier(1.), SaveModelCallback(monitor='accuracy')])
    assert is_quantized(learn.model) and learn.model[0].input_range[0,2]>0
    learn.load('model')

def test_resumed_equals_uninterrupted(tmp_path):
    def mods(): return [QuantizationModifier(.5, disable_quantization_observer_epoch=1.5, freeze_bn_stats_epoch=1.5)]
    class Order(Callback):
        def before_epoch(self): self.dls.train.rng = random.Random(self.epoch)
    whole = learner(opt_func=partial(SGD, mom=.9), path=tmp_path)
    whole.fit(2, cbs=[*mods(), Order()])
    first = learner(opt_func=partial(SGD, mom=.9), path=tmp_path)
    class Stop(Callback):
        order = 100
        def after_epoch(self):
            self.learn.save('half')
            raise CancelFitException()
    first.fit(2, cbs=[*mods(), Order(), Stop()])
    second = learner(opt_func=partial(SGD, mom=.9), path=tmp_path)
    quantized_from_file(second, tmp_path/'models/half.pth')
    second.load('half')
    second.fit(2, start_epoch=1, cbs=[*mods(), Order()])
    for (n,a),b in zip(whole.model.state_dict().items(), second.model.state_dict().values()): assert a.equal(b), n
    assert second.model[0].observes=='never'

# other callbacks, loops and libraries

class CPUMixedPrecision(MixedPrecision):
    "bfloat16 on the CPU"
    def before_fit(self):
        super().before_fit()
        self.autocast,self.learn.scaler = torch.autocast('cpu', dtype=torch.bfloat16),torch.amp.GradScaler('cpu', enabled=False)

def test_mixed_precision_is_switched_off_and_stays_off(caplog):
    learn,seen = learner(cbs=CPUMixedPrecision('bf16')),[]
    learn.model[6].register_forward_hook(lambda m,i,o: seen.append((learn.training, torch.is_autocast_enabled('cpu'))))
    caplog.set_level('INFO', 'fastsparse_create')
    learn.fit(2, cbs=(qat := QuantizationModifier(1.5)))
    n = len(learn.dls.train)
    train = [on for training,on in seen if training]
    assert train[:n+n//2]==[True]*(n+n//2) and not any(train[n+n//2+1:]) and len(train)>=2*n
    assert sum('mixed precision is switched off' in r.message for r in caplog.records)==1
    assert not torch.is_autocast_enabled('cpu')
    seen.clear()
    learn.fit(1, cbs=qat)
    assert seen and not any(on for _,on in seen)

def test_gradient_accumulation_and_clipping():
    learn = learner()
    learn.fit(1, cbs=[QuantizationModifier(.5), GradientAccumulation(64), GradientClip(.1)])
    assert is_quantized(learn.model) and np.isfinite(learn.recorder.losses[-1])

def test_freeze_and_unfreeze():
    learn = learner(splitter=lambda m: [params(m[:4]), params(m[4:])])
    learn.fit(1, cbs=QuantizationModifier(0.))
    learn.freeze()
    assert not learn.model[0].weight.requires_grad and learn.model[6].weight.requires_grad
    learn.fit(1)
    learn.unfreeze()
    before = learn.model[0].weight.clone()
    learn.fit(1)
    assert not learn.model[0].weight.equal(before) and is_quantized(learn.model)

def test_lr_find_and_predictions_change_nothing(tmp_path):
    learn = learner(path=tmp_path, cbs=QuantizationModifier(0.))
    learn.lr_find(show_plot=False, num_it=5)
    assert not is_quantized(learn.model)
    learn.get_preds()
    assert not is_quantized(learn.model)
    learn.fit(1)
    ranges = learn.model[0].input_range.clone()
    learn.get_preds(), learn.validate()
    assert learn.model[0].input_range.equal(ranges)

def test_a_plain_loop_gives_the_same_model():
    data = [(torch.randn(16,1,8,8, generator=(g := torch.Generator().manual_seed(i))), torch.randint(0,10,(16,), generator=g)) for i in range(6)]
    learn = Learner(DataLoaders(data, data), net(), loss_func=F.cross_entropy, opt_func=partial(OptimWrapper, opt=torch.optim.SGD), lr=.05)
    learn.remove_cbs([ProgressCallback]), setattr(learn, 'logger', noop)
    learn.fit(2, wd=0., cbs=QuantizationModifier(.5))
    model = net()
    opt = torch.optim.SGD(model.parameters(), .05)
    manager = LoopManager(model, opt, len(data), 2, [QuantizationModifier(.5)])
    for _ in range(2):
        model.train()
        for xb,yb in data:
            F.cross_entropy(model(xb), yb).backward()
            opt.step()
            opt.zero_grad()
    manager.finalize()
    for (n,a),b in zip(learn.model.state_dict().items(), model.state_dict().values()): assert torch.allclose(a, b, atol=1e-6), n

def test_compiled():
    model = net().eval()
    quantize_(model, x)
    expected = model(x).detach()
    got = torch.compile(model, backend='aot_eager')(x).detach()
    assert (got-expected).norm()<=.02*expected.norm()

@pytest.mark.parametrize('backend', ['eager','aot_eager'])
def test_a_compiled_model_is_quantized_in_the_midst_of_a_fit(backend):
    torch._dynamo.reset()
    learn = learner(n=64)
    raw,before = learn.model,copy.deepcopy(learn.model)
    learn.model = torch.compile(raw, backend=backend)
    learn.fit(2, 1e-3, cbs=QuantizationModifier(1.))
    assert is_quantized(raw) and not any(p.equal(q) for p,q in zip(raw.parameters(), before.parameters()))
    with torch.no_grad(): compiled,expected = learn.model.eval()(x),raw.eval()(x)
    assert (compiled-expected).norm()<=.02*expected.norm()
    plain = learner(n=64)
    plain.fit(2, 1e-3, cbs=QuantizationModifier(1.))
    with torch.no_grad(): assert (plain.model.eval()(x)-expected).norm()<=.1*expected.norm()

def test_switch_in_a_compiled_model():
    model = net()
    compiled = torch.compile(model, backend='eager')
    before = compiled.eval()(x).detach()
    quantize_(compiled, x)
    after = compiled(x).detach()
    assert after.equal(model(x)) and not after.equal(before)

_ranks = '''
import sys,torch,torch.distributed as dist
from torch import nn
sys.path.insert(0, {tests!r})
from test_quantization import *
rank = int(sys.argv[1])
dist.init_process_group('gloo', init_method={init!r}, rank=rank, world_size=2)
model = net()
ddp = nn.parallel.DistributedDataParallel(model)
opt = torch.optim.SGD(model.parameters(), .05)
manager = LoopManager(ddp, opt, 4, 2, [QuantizationModifier(.5)])
for e in range(2):
    ddp.train()
    for i in range(4):
        g = torch.Generator().manual_seed(10*i+rank)
        F.cross_entropy(ddp(torch.randn(8,1,8,8, generator=g)), torch.randint(0,10,(8,), generator=g)).backward()
        opt.step()
        opt.zero_grad()
manager.finalize()
assert is_quantized(model)
for t in [*model.parameters(), *(b for m in quantized_modules(model).values() for n,b in m.named_buffers(recurse=False) if n.endswith('_range'))]:
    other = t.detach().clone()
    dist.broadcast(other, 0)
    assert torch.allclose(other, t, atol=1e-6)
dist.destroy_process_group()
'''

def test_ranks_agree(tmp_path):
    code = _ranks.format(tests=str(Path(__file__).parent), init=f"file://{tmp_path/'init'}")
    ranks = [subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code, str(r)], stderr=subprocess.PIPE, text=True, env={**os.environ, 'OMP_NUM_THREADS':'1'}) for r in range(2)]
    errors = [r.communicate(timeout=300)[1] for r in ranks]
    assert all(r.returncode==0 for r in ranks), errors

def test_nothing_warns(tmp_path):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        model = net().train()
        quantize_(model, x)
        model(x).sum().backward()
        deploy_copy(model.eval(), x)
        export_onnx(model, tmp_path/'m.onnx', x, int8=True, tol=1.)
    assert not [w for w in seen if 'fastsparse' in str(w.filename) or issubclass(w.category, (DeprecationWarning,FutureWarning)) and 'quant' in str(w.message)]

# kinds of models

def test_every_activation_is_rounded_in_evaluation():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    for p in encoder.parameters(): p.requires_grad_(False)
    xb,padding = torch.randn(3,5,16),torch.tensor([[False]*5, [False]*4+[True], [False]*5])
    quantize_(encoder, xb)
    observe(encoder, 'always')
    n = {k:m.input_range[0,2].item() for k,m in quantized_modules(encoder).items()}
    with torch.no_grad(): encoder(xb), encoder(xb, src_key_padding_mask=padding)
    assert len(n)==8 and all(m.input_range[0,2]==n[k]+2 for k,m in quantized_modules(encoder).items())

def test_hugging_face():
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)).eval()
    batch = dict(input_ids=torch.randint(0,50,(4,9)), attention_mask=torch.ones(4,9).long())
    before = model(**batch).logits
    report = quantize_(model, batch)
    assert not [r for r in report.rows if r.why_not] and (model(**batch).logits-before).norm()<.1*before.norm()
    model.train()(**batch, labels=torch.tensor([0,1,0,1])).loss.backward()
    assert all(p.grad is not None for p in model.parameters())

def test_a_last_norm_of_zero_stays_finite():
    learn,qat = learner(xresnet18(n_out=10, c_in=1), n=64),QuantizationModifier(0.)
    learn.fit(1, cbs=qat)
    assert np.isfinite(np.array(learn.recorder.losses)).all() and not [r for r in qat.report.rows if r.why_not]

def test_awd_lstm_says_what_it_leaves():
    from fastai.text.all import AWD_LSTM,get_text_classifier
    model = get_text_classifier(AWD_LSTM, 40, 2)
    why = {r.layer:r.why_not for r in quantize_(model, torch.randint(2,40,(3,12))).rows}
    assert 'LSTM is not supported' in why.values() and "the example doesn't call it" in why.values()
    assert [n for n,w in why.items() if not w]==['1.layers.0.2','1.layers.1.2']

def test_unet():
    from fastai.vision.all import create_unet_model
    from torchvision.models import resnet18 as body
    model = create_unet_model(body, 3, (32,32), pretrained=False, self_attention=True).eval()
    xb = torch.randn(2,3,32,32)
    report = quantize_(model, xb)
    assert {r.why_not for r in report.rows}=={'', 'its weight is computed anew in each step, as by weight or spectral norm'}
    deploy_copy(model, xb)(xb)

# agreement with the runtime

@torch.no_grad()
def exact_rms(file, model, x=x):
    "Difference of a file from a model, relative to its outputs, on any processor"
    y = model(x)
    return float((OnnxModel(file, exact=True)(x)-y).norm()/y.norm())

def test_a_trained_model_in_onnxruntime(tmp_path):
    learn = learner(n=600)
    sparsify_model(learn, .7)
    learn.fit_one_cycle(5, cbs=QuantizationModifier(3., disable_quantization_observer_epoch=4., freeze_bn_stats_epoch=4.))
    xs,ys = (torch.stack(o) for o in zip(*[(xb,torch.tensor(yb)) for xb,yb in learn.dls.valid.dataset]))
    export_onnx(learn.model, tmp_path/'m.onnx', xs[:8], int8=True, samples=xs)
    with torch.no_grad(): logits = learn.model.eval()(xs)
    got = OnnxModel(tmp_path/'m.onnx', exact=True)(xs)
    differs = got.argmax(1)!=logits.argmax(1)
    assert len(xs)>1000 and differs.float().mean()<=.005 and (got-logits).norm()<=.03*logits.norm()
    top = logits.topk(2, 1).values
    assert ((top[:,0]-top[:,1])[differs]<.1*logits.std()).all()
    assert abs((got.argmax(1)==ys).float().mean()-(logits.argmax(1)==ys).float().mean())<=.005
    assert onnx_ops(tmp_path/'m.onnx', optimized=True)['QLinearConv']==3

@pytest.mark.parametrize('scheme', ['default','tensorrt','reduce_range',{'weights':{'num_bits':4}},{'weights':{'strategy':'tensor'}},{'input_activations':{'num_bits':6}}])
def test_schemes_in_onnxruntime(scheme, tmp_path):
    model = net()
    with torch.no_grad():
        for _ in range(3): model.train()(x)
    model.eval()
    quantize_(model, x, scheme)
    export_onnx(model, tmp_path/'m.onnx', x, int8=True)
    assert exact_rms(tmp_path/'m.onnx', model)<=.06

# bit by bit

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_rounded_weights_are_multiples_of_their_scale(dtype):
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        w = torch.randn(8, 30, generator=g, dtype=dtype)*10**torch.randint(-6,3,(8,1), generator=g).to(dtype)
        args = QuantizationArgs(8, True, 'channel')
        q,s = quantize_weight(w, args),weight_scale(w, args)
        assert (q-w).abs().le(s*.500001).all() and (q/s).round().abs().max()==127

def test_broken_batches_do_not_spoil_ranges():
    model = net().train()
    quantize_(model, x)
    before = {n:b.clone() for n,b in model.named_buffers() if n.endswith('_range')}
    model(torch.full_like(x, torch.nan)), model(torch.full_like(x, torch.inf))
    for n,b in model.named_buffers():
        if n.endswith('_range'): assert b.isfinite().all()
    assert model[0].input_range.equal(before['0.input_range'])

# activations that backward computes again

class Checkpointed(nn.Module):
    def __init__(self, how=None, shared=False):
        super().__init__()
        torch.manual_seed(0)
        self.how,self.stem,self.block1,self.head = how,nn.Conv2d(1,16,3,padding=1),Block(16),nn.Linear(16,10)
        self.block2 = self.block1 if shared else Block(16)
    def forward(self, x):
        x = self.stem(x)
        for b in (self.block1,self.block2): x = b(x) if self.how is None else checkpoint(b, x, use_reentrant=self.how=='reentrant')
        return self.head(x.mean((2,3)))

@pytest.mark.parametrize('how', ['reentrant','by hooks'])
@pytest.mark.parametrize('shared', [False,True])
def test_checkpointing_changes_nothing(how, shared):
    found = []
    for h in (None,how):
        model = Checkpointed(h, shared).train()
        quantize_(model, x)
        for i in range(3):
            model.zero_grad()
            F.cross_entropy(model(x*(i+1)), torch.arange(64)%10).backward()
        found.append([p.grad for p in model.parameters()]+[m.get_buffer(k) for m in quantized_modules(model).values() for k in ('input_range','output_range') if k in m._buffers])
    assert all(a.equal(b) for a,b in zip(*found))

# which layers

def two_blocks():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1,16,3), Block(16), Block(16), nn.Flatten(), nn.Linear(576,10)).eval()

@pytest.mark.parametrize('kwargs', [dict(submodules=['1']), dict(ignore=['2','0','4']), dict(ignore=['re:[024]'])])
def test_nothing_is_rounded_outside(kwargs):
    model = two_blocks()
    quantize_(model, x, **kwargs)
    assert {n.split('.')[0] for n in quantized_modules(model)}=={'1'}

def test_a_class_stands_for_what_is_in_it():
    model = two_blocks()
    quantize_(model, x, ignore=['Block'])
    assert set(quantized_modules(model))=={'0','4'}
    model = two_blocks()
    quantize_(model, x, scheme_overrides={'Block':{'weights':{'num_bits':4}}, '2':'tensorrt'})
    assert model[1].conv1.scheme.weights.num_bits==4 and model[2].conv1.scheme.input_activations.symmetric

def test_activations_stay_where_they_are_ignored():
    model = two_blocks()
    quantize_(model, x, ignore=['ReLU'])
    assert not [n for n in quantized_modules(model) if n.endswith('relu')] and {'1.conv2','2.conv1'}<=set(quantized_modules(model))

def test_a_model_is_quantized_in_two_steps():
    model,whole = two_blocks(),two_blocks()
    quantize_(model, x, submodules=['0','1'])
    quantize_(model, x, submodules=['2','4'])
    quantize_(whole, x)
    assert set(quantized_modules(model))==set(quantized_modules(whole))
    for m in quantized_modules(model).values(): assert len(m._forward_hooks)<=1 and len(m._load_state_dict_pre_hooks)==1
    assert (model(x)-whole(x)).norm()<=.03*whole(x).norm()
    assert (deploy_copy(model, x)(x)-model(x)).norm()<=.01*model(x).norm()

def test_a_layer_that_wants_other_integers_rounds_for_itself():
    model = two_blocks()
    rows = {r.layer:r.inputs for r in quantize_(model, x, scheme_overrides={'1.conv2':{'input_activations':{'num_bits':4}}}).rows}
    assert rows['1.conv2']=='uint4' and rows['2.conv2']==''
    seen = []
    handle = model[1].conv2.register_forward_pre_hook(lambda m,i: seen.append(m._input(i[0])))
    model(x), handle.remove()
    assert len(seen[0].unique())<=16

def test_weights_outside_of_layers_are_reported():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.w,self.drop,self.head = nn.Parameter(torch.randn(8,8)),nn.Dropout(.1),nn.Linear(8,3)
        def forward(self, x): return self.head(self.drop(x@self.w))
    report = quantize_(nn.Sequential(Own()), torch.randn(2,8))
    assert {r.layer:r.why_not for r in report.rows}=={'0':'what it has of its own stays in floats: w', '0.head':''}

@pytest.mark.parametrize('dtype', [torch.half,torch.bfloat16])
def test_half_precision_is_refused(dtype):
    model = net().to(dtype)
    with pytest.raises(ValueError, match='half precision'): quantize_(model, x.to(dtype))
    assert not is_quantized(model)

def test_models_without_data():
    with torch.device('meta'): model,xm = net(),torch.empty(4,1,8,8)
    quantize_(model, xm)
    assert all(b.is_meta for b in model.buffers()) and model(xm).shape==(4,10)

def test_quantized_in_inference_mode():
    model = net().eval()
    with torch.inference_mode():
        quantize_(model, x)
        expected = model(x).clone()
    assert model(x).equal(expected)
    model.train()(x).sum().backward()
    assert model[0].input_range[0,2]==2

def test_wrong_arguments_change_nothing():
    model = net()
    for error,kwargs in ((TypeError,dict(ignore=3)), (TypeError,dict(ignore=[3])), (TypeError,dict(scheme_overrides=['3'])), (ValueError,dict(submodules=['3.conv'])), (ValueError,dict(ignore='re:(')), (TypeError,dict(scheme=8))):
        with pytest.raises(error): quantize_(model, x, **kwargs)
    with pytest.raises(ValueError, match='run on the example'): quantize_(model, x[0,0])
    assert not is_quantized(model) and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

@pytest.mark.parametrize('use_buffers', [False,True])
def test_running_averages_follow(use_buffers):
    class Average(Callback):
        order = 50
        def before_fit(self): self.average = AveragedModel(self.learn.model, use_buffers=use_buffers)
        def after_batch(self):
            if self.training: self.average.update_parameters(self.learn.model)
    learn = learner(cbs=Average())
    learn.fit(2, cbs=QuantizationModifier(1.))
    average = learn.average.average.module
    assert set(quantized_modules(average))==set(quantized_modules(learn.model)) and average[0].input_range[0,2]>0
    assert average.eval()(x).isfinite().all()

@pytest.mark.parametrize('n', [0,1.5,'2'])
def test_calibration_steps_are_whole(n):
    with pytest.raises((ValueError,TypeError), match='num_calibration_steps'): QuantizationModifier(0., num_calibration_steps=n)

def test_random_generators_are_left_alone():
    "Neither an example nor calibration draws from them, and two of them see the same batches"
    ranges = []
    for seed in 1,2:
        learn = learner()
        learn.dls.train = learn.dls.train.new(shuffle=True)
        set_seed(seed)
        states = random.getstate(),np.random.get_state()[1].copy(),torch.get_rng_state()
        quantize_(learn)
        calibrate_(learn, n=1)
        assert random.getstate()==states[0] and (np.random.get_state()[1]==states[1]).all() and torch.equal(torch.get_rng_state(), states[2])
        ranges.append({k:v for k,v in learn.model.state_dict().items() if k.endswith('_range')})
    assert ranges[0].keys()==ranges[1].keys() and all(torch.equal(ranges[0][k], ranges[1][k]) for k in ranges[0])

def test_one_modifier():
    with pytest.raises(ValueError, match='give one'): learner().fit(1, cbs=[QuantizationModifier(0., submodules=['0']), QuantizationModifier(0., submodules=['3'])])

# embeddings, transposed convolutions, attention

def test_an_embedding_with_one_scale_has_that_of_the_table():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20,8), nn.Flatten(), nn.Linear(24,4)).eval()
    with torch.no_grad(): model[0].weight[19] *= 50
    i = torch.randint(0,19,(5,3))
    quantize_(model, i, {'weights':{'strategy':'tensor'}})
    assert model[0](i).equal(model[0](torch.cat([i, torch.full((1,3),19)]))[:5])
    assert deploy_copy(model, i)[0](i).equal(model[0](i))

@pytest.mark.parametrize('groups', [1,2,4])
@pytest.mark.parametrize('bias', [True,False])
def test_transposed_convolutions_are_deployed(groups, bias, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1,4,3), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4,8,3,groups=groups,bias=bias), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8,2,1)).eval()
    quantize_(model, x)
    assert (deploy_copy(model, x)(x)-model(x)).norm()<=.01*model(x).norm()
    export_onnx(model, tmp_path/'m.onnx', x, int8=True)
    assert exact_rms(tmp_path/'m.onnx', model)<=.01

@pytest.mark.parametrize('tol', [None,.9])
def test_saturating_sums_are_told(tmp_path, caplog, tol):
    "Files are right on any processor; of one that lets sums of products saturate, a warning says so, and what to do"
    torch.manual_seed(0)
    model,x = nn.Sequential(nn.Linear(64, 8)).eval(),torch.rand(16, 64)+.5
    nn.init.uniform_(model[0].weight, .9, 1.), nn.init.zeros_(model[0].bias)
    quantize_(model, x)
    found = export_onnx(model, tmp_path/'m.onnx', x, int8=True, tol=tol)
    assert exact_rms(tmp_path/'m.onnx', model, x)<=.01
    assert (found.rel_rms>.1)==found.saturates==("m.onnx: ONNX Runtime's sums of 8-bit products saturate on this processor" in caplog.text)==("'reduce_range'" in caplog.text)
    quantize_(reduced := nn.Sequential(copy.deepcopy(dequantize_(model)[0])), x, 'reduce_range')
    in_half = export_onnx(reduced, tmp_path/'r.onnx', x, int8=True, tol=tol)
    assert in_half.rel_rms<=.02 and not in_half.saturates

def test_what_was_not_observed_is_not_rounded():
    torch.manual_seed(0)
    attention,s,t = nn.MultiheadAttention(8,2,batch_first=True).eval(),torch.randn(3,5,8),torch.randn(3,7,8)
    quantize_(attention, (s,s,s))
    assert torch.allclose(deploy_copy(attention, (s,s,s))(s,t,t)[0], attention(s,t,t)[0], atol=1e-6)
    model = net().eval()
    quantize_(model)
    with pytest.raises(ValueError, match='calibrate_ the model first'): deploy_copy(model, x)
    with pytest.raises(ValueError, match='no batch'): calibrate_(model, [])

# more files

def test_modules_with_two_names_are_restored(tmp_path):
    def make():
        torch.manual_seed(0)
        conv = nn.Conv2d(8,8,3,padding=1)
        return nn.Sequential(nn.Conv2d(1,8,3), conv, nn.ReLU(), conv, nn.ReLU()).eval()
    model = make()
    quantize_(model, x)
    torch.save(model.state_dict(), tmp_path/'m.pth')
    assert quantized_from_file(make(), tmp_path/'m.pth')(x).equal(model(x))

def test_a_buffer_that_is_called_a_mask_is_none(tmp_path):
    class Masked(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.register_buffer('attn_mask', torch.ones(4).bool())
    def make(): return nn.Sequential(Masked(), nn.Linear(4,2))
    model = make()
    with torch.no_grad(): model[1].weight[0,0] = 0
    quantize_(model, torch.randn(3,4))
    torch.save(model.state_dict(), tmp_path/'m.pth')
    assert not masked_params(quantized_from_file(make(), tmp_path/'m.pth'))

def test_another_scheme_is_refused():
    a,b = net(),net()
    quantize_(a, x, 'tensorrt'), quantize_(b, x)
    with pytest.raises(RuntimeError, match='another scheme'): b.load_state_dict(a.state_dict())

def _bytes(*rows): return torch.tensor(rows, dtype=torch.uint8)

@pytest.mark.parametrize('damage', [
    {'0.quantization':torch.zeros(2,2,dtype=torch.uint8)}, {'0.quantization':torch.zeros(3,4)}, {'0.quantization':3}, {'0.quantization':_bytes(*[[255]*4]*3)}, {'0.quantization':_bytes([8,0,0,0],[8,0,1,0],[0]*4)},
    {'0.input_range':torch.zeros(1,3).expand(10**10,3)}, {'0.input_range':torch.zeros(2,4)}, {'0.input_range':torch.zeros(3)}, {'0.input_range':torch.zeros(0,3)}, {'6.output_range':torch.zeros(1,3)},
    {'3.bn2.input_range':torch.zeros(1,3)}, {'6.weight':torch.zeros(3,3)}, {'more':torch.zeros(1)}, {'6.weight_mask':torch.zeros(3,3).bool()}, {'6.none_mask':torch.zeros(3,3).bool()}, {'3.conv1.weight':None}])
def test_damaged_files_change_nothing(damage, tmp_path):
    model = net()
    quantize_(model, x)
    torch.save({k:v for k,v in {**model.state_dict(), **damage}.items() if v is not None}, tmp_path/'m.pth')
    fresh = net()
    with pytest.raises(ValueError, match='m.pth'): quantized_from_file(fresh, tmp_path/'m.pth')
    assert not is_quantized(fresh) and not masked_params(fresh) and list(fresh.state_dict())==list(net().state_dict())
    assert all(a.equal(b) for a,b in zip(fresh.state_dict().values(), net().state_dict().values()))

# with other ways of making models smaller

@pytest.mark.parametrize('start', [0.,1.,2.5])
def test_channels_removed_and_quantized(start, tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1,16,3,padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), Block(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16,10))
    learn = learner(make())
    learn.fit(3, cbs=[StructuredPruningModifier(0.,.5,0.,2.,.5), LayerThinningModifier(update_epochs=[2.]), QuantizationModifier(start)])
    model = learn.model.eval()
    assert model[0].out_channels==8 and is_quantized(model)
    export_onnx(model, tmp_path/'m.onnx', x, int8=True)
    assert exact_rms(tmp_path/'m.onnx', model)<=.03
    torch.save(model.state_dict(), tmp_path/'m.pth')
    fresh = make()
    thin_like(fresh, tmp_path/'m.pth'), quantized_from_file(fresh, tmp_path/'m.pth')
    assert fresh.eval()(x).equal(model(x))

def test_a_switch_after_the_first_epoch_of_many_processes(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f"file://{tmp_path/'init'}", rank=0, world_size=1)
    try: (learn := learner()).fit(2, cbs=QuantizationModifier(1.5))
    finally: torch.distributed.destroy_process_group()
    assert is_quantized(learn.model)

def test_layers_that_are_stored_sparsely_are_reported():
    from fastsparse_create.sparse.linear import SparseLinear,TransposedLinear
    report = quantize_(nn.Sequential(SparseLinear(4,16,.5), nn.ReLU(), nn.Linear(16,2)), torch.randn(2,4))
    assert report.summary=='1 of 2 layers quantized' and 'dense_layers_' in report.rows[0].why_not
    assert quantize_(nn.Sequential(SparseLinear(4,16,.5), nn.ReLU(), TransposedLinear(16,2)), torch.randn(2,4)).summary==report.summary
    with pytest.raises(ValueError, match='no layer can be quantized: 0: it stores only its connections'): quantize_(nn.Sequential(SparseLinear(4,16,.5)), torch.randn(2,4))

def test_batches_that_are_none():
    model = nn.Sequential(nn.Linear(4,16), nn.ReLU(), nn.Linear(16,2))
    quantize_(model, torch.randn(2,4))
    with pytest.raises(TypeError, match='expected batches, got a tensor'): calibrate_(model, torch.randn(6,4))
    with pytest.raises(TypeError, match='without labels'): calibrate_(model, [(torch.randn(6,4),torch.zeros(6))])
