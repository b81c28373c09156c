"Is what a forward pass finds the same if most of it isn't computed?"
import pytest,torch
from copy import deepcopy
from torch import nn
from fastsparse_create.forward_cache import *
from fastsparse_create.masking import *

class Block(nn.Module):
    def __init__(self, inplace=True):
        super().__init__()
        self.conv1,self.bn1,self.act,self.conv2,self.bn2 = nn.Conv2d(4,4,3,padding=1),nn.BatchNorm2d(4),nn.ReLU(inplace),nn.Conv2d(4,4,3,padding=1),nn.BatchNorm2d(4)
    def forward(self, x):
        out = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        out += x
        return self.act(out)

class Pairs(nn.Module):
    "Gives a tuple, and changes the first of it later"
    def __init__(self): super().__init__(); self.a,self.b = nn.Linear(4,4),nn.Linear(4,4)
    def forward(self, x): return self.a(x),(self.b(x),None)

class Lists(nn.Module):
    "Gives a list, to which somebody appends"
    def __init__(self): super().__init__(); self.a = nn.Linear(4,4)
    def forward(self, x): return [self.a(x)]

class Uses(nn.Module):
    def __init__(self): super().__init__(); self.pairs,self.lists,self.c,self.d = Pairs(),Lists(),nn.Linear(4,4),nn.Linear(4,4)
    def forward(self, x):
        a,(b,_) = self.pairs(x)
        found = self.lists(a)
        found.append(b)
        a.mul_(2)
        x = self.c(sum(found)+a)
        return self.d(x+len(found)+found[0])

class Recalls(nn.Module):
    "Modules whose calls leave something for others"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c = nn.Linear(4,4),nn.Linear(4,4),nn.Linear(4,4)
        self.seen = {}
    def forward(self, x):
        self.seen['x'] = x = self.a(x)
        return self.c(self.b(x)*self.seen['x'])

class Hooked(nn.Module):
    "A hook inside of a module leaves something for later, as those of U-Nets do; another one changes what its module gives"
    def __init__(self):
        super().__init__()
        self.body,self.b,self.c,self.stored = nn.Sequential(nn.Linear(4,4), nn.Linear(4,4)),nn.Linear(4,4),nn.Linear(4,4),[None]
        self.body[0].register_forward_hook(lambda m,x,out: self.stored.__setitem__(0, out))
        self.b.register_forward_hook(lambda m,x,out: 2*out)
    def forward(self, x): return self.c(self.b(self.body(x))+self.stored[0])

class HookedElsewhere(Hooked):
    "The same, out of sight: only the hook tells"
    def __init__(self):
        super().__init__()
        del self.stored
        self.body[0]._forward_hooks.clear()
        self.body[0].register_forward_hook(lambda m,x,out: _elsewhere.__setitem__(id(self), out))
    def forward(self, x): return self.c(self.b(self.body(x))+_elsewhere[id(self)])
_elsewhere = {}

class Loops(nn.Module):
    "Some batches call a layer more often than the first"
    def __init__(self): super().__init__(); self.a,self.b,self.c = nn.Linear(4,4),nn.Linear(4,4),nn.Linear(4,4)
    def forward(self, x):
        x = self.a(x)
        for _ in range(len(x)%3+1): x = self.b(x).relu()
        return self.c(x)

class Tied(nn.Module):
    def __init__(self): super().__init__(); self.first,self.second,self.last = nn.Sequential(nn.Linear(4,4), nn.ReLU()),nn.Linear(4,4),nn.Linear(4,4)
    def forward(self, x): return self.last(self.first[0](self.second(self.first(x))))

x = torch.randn(3,7,4, generator=torch.Generator().manual_seed(0))
images = torch.randn(3,2,4,6,6, generator=torch.Generator().manual_seed(0))
nets = dict(residual=(lambda: nn.Sequential(Block(), nn.Sequential(Block(), Block()), Block(False)), images), uses=(Uses,x), recalls=(Recalls,x), hooked=(Hooked,x), elsewhere=(HookedElsewhere,x),
            loops=(Loops,[*x,x[0,:3],x[0,:2]]), tied=(Tied,x), nested=(lambda: nn.Sequential(nn.Sequential(nn.Linear(4,4), nn.Sequential(nn.Linear(4,4), nn.ReLU(True))), nn.Linear(4,4)), x),
            transformer=(lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 3), x))

def found(make, batches, limit, skippable=None):
    "Inputs and outputs of all layers in turn, each of which changes once it was looked at"
    torch.manual_seed(0)
    model = make().eval()
    layers = []
    watch(model, batches[0], [m for m in model.modules() if isinstance(m, (nn.Linear,nn.Conv2d))], lambda m,*_: layers.append(m) if m not in layers else None)
    cache,res = ForwardCache(model, list(batches), skippable_modules(model, batches[0]) if skippable is None else skippable(model), limit),[]
    for i,layer in enumerate(layers):
        for b in range(len(batches)): res.append([tuple(t.clone() for t in call[1:]) for call in cache.calls(b, [layer], 1, lambda m,args,kwargs,out: (args[0],out), set(layers[i:]))])
        layer.weight.data.mul_(1.5)
    assert not any('forward' in vars(m) for m in model.modules())
    return res,cache

@pytest.mark.parametrize('name', nets)
@pytest.mark.parametrize('limit', [1<<30,1000,3000])
@torch.no_grad()
def test_same_as_computed(name, limit):
    make,batches = nets[name]
    plain,_ = found(make, batches, 0)
    quick,cache = found(make, batches, limit)
    assert len(plain)==len(quick) and sum(cache.sizes)<=limit
    for a,b in zip(plain, quick):
        assert len(a)==len(b) and all(s.equal(t) for u,v in zip(a, b) for s,t in zip(u, v))
    assert (limit<1<<30 or name in ('recalls','hooked')) or any(cache.kept)

def test_what_can_be_skipped():
    model = nn.Sequential(Block(), nn.Sequential(Block(), nn.ReLU()))
    assert not skippable_modules(model, images[0])  # batch norms take note of what passes
    model.eval()
    expected = {'0','1','0.conv1','0.bn1','0.conv2','0.bn2','1.0','1.0.conv1','1.0.bn1','1.0.conv2','1.0.bn2','1.1'}
    names = {m:n for n,m in model.named_modules()}
    def _skipped(): return {names[m] for m in skippable_modules(model, images[0])}
    assert _skipped()==expected
    handle = model[1][0].conv1.register_forward_hook(lambda *_: None)
    assert _skipped()==expected-{'1','1.0'}
    handle.remove()
    model[0].forward = lambda x: x
    assert _skipped()==expected-{n for n in expected if n[0]=='0'}
    del model[0].forward
    attach_masks(model)
    assert _skipped()==expected
    assert not skippable_modules(Recalls(), x[0])

def test_only_complete_modules_are_kept():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(4,4), nn.Linear(4,4)), nn.Linear(4,4))
    cache = ForwardCache(model, [x[0]], list(model.modules())[1:])
    for layer,kept in ((model[0][0],set()), (model[0][1],{model[0][0]}), (model[1],{model[0]})):
        cache.calls(0, [layer], 1, lambda *_: (), {layer})
        assert set(cache.kept[0])==kept
    assert cache.sizes[0]==x[0].numel()*4

def test_a_failing_pass_leaves_no_trace():
    model = nn.Sequential(nn.Linear(4,4), nn.Linear(4,4))
    cache = ForwardCache(model, [x[0]], list(model))
    cache.calls(0, [model[1]], 1, lambda *_: ())
    def _fails(*_): raise RuntimeError('no')
    with pytest.raises(RuntimeError, match='no'): cache.calls(0, [model[1]], 1, _fails)
    assert not any('forward' in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())
