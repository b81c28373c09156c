"Whatever is permuted, the model computes what it did: operations one by one, random graphs, the usual architectures"
import io,numpy as np,pytest,torch
import torch.nn.functional as F
from copy import deepcopy
from dataclasses import dataclass
from fastai.optimizer import Adam,Lookahead,OptimWrapper,RAdam
from hypothesis import given,settings,strategies as st
from torch import nn,Tensor
from fastsparse_create.masking import *
from fastsparse_create.permutation.apply import *
from fastsparse_create.permutation.apply import _belongings,_indices,_move
from fastsparse_create.permutation.graph import *
from fastsparse_create.permutation import rules
from fastsparse_create.permutation.graph import _change,_map,_perturb
from fastsparse_create.selection import *
from utils import tiny_learner

def outputs(model, xb):
    model.eval()
    with torch.no_grad(): return [o.clone() for o in rules.tensors_in(rules.call_model(model, _map(torch.clone, xb)))]

def generic(model, seed=1):
    "Random weights, norms and statistics, so that no two channels are alike"
    _perturb(model, seed)
    return model

def shuffle(model, xb, seed=0):
    "Permute every group at random, with no safety net; names of the weights whose columns were permuted, and the change of the outputs"
    model = generic(model).double()
    xb = _map(lambda x: x.double() if x.is_floating_point() else x, xb)
    groups,_ = permutation_groups(model, xb)
    before,belongings,rng = outputs(model, xb),_belongings(model),torch.Generator().manual_seed(seed)
    shapes = {n:x[0].shape for n,x in belongings.items()}
    for g in groups: _move(belongings, _indices(g, torch.randperm(g.size, generator=rng), shapes))
    return {p.name for g in groups for p in g.columns},_change(before, outputs(model, xb))

def permute(model, xb, n_evaluations=2000, **kwargs):
    "`permute_channels`, and the relative change of the outputs"
    before = outputs(generic(model), xb)
    res = permute_channels(model, xb, n_evaluations=n_evaluations, **kwargs)
    assert all(o.before is None or o.after>=o.before for o in [res,*res.groups])
    return res,_change(before, outputs(model, xb))

# operations one by one

class Between(nn.Module):
    "A first layer, `f(self, h)`, a last layer; whatever else `f` needs as keywords"
    def __init__(self, f, first=None, last=None, **kwargs):
        super().__init__()
        self.f,self.first,self.last = f,first or nn.Conv2d(3,8,3,padding=1),last or nn.Conv2d(8,5,3)
        for k,v in kwargs.items(): self.register_buffer(k, v) if type(v)==Tensor else setattr(self, k, v)
    def forward(self, x): return self.last(self.f(self, self.first(x)))

def images(f, **kwargs): return Between(f, **kwargs),torch.randn(2,3,6,6)

def tokens(f, c=8, last=None, **kwargs): return Between(f, nn.Linear(5,c), last or nn.Linear(c,3), **kwargs),torch.randn(2,4,5)

def _set_first(h):
    h = h.clone()
    h[:,0] = 0
    return h

def _swap_halves(h):
    out = torch.zeros_like(h)
    out[:,:4],out[:,4:] = h[:,4:],h[:,:4]
    return out

def _halves_in_place(h):
    h[:,:4] *= 2
    h[:,4:].add_(h[:,:4])
    return h

safe = { # at least the last layer's columns are permuted
    'relu': lambda: images(lambda s,h: h.relu()),
    'batchnorm': lambda: images(lambda s,h: s.n(h), n=nn.BatchNorm2d(8)),
    'syncbatchnorm': lambda: images(lambda s,h: s.n(h), n=nn.SyncBatchNorm(8)),
    'functional_batch_norm': lambda: images(lambda s,h: F.batch_norm(h, s.mean, s.var, s.w), mean=torch.randn(8), var=torch.rand(8)+.5, w=nn.Parameter(torch.rand(8))),
    'instancenorm_tracking': lambda: images(lambda s,h: s.n(h), n=nn.InstanceNorm2d(8, affine=True, track_running_stats=True)),
    'instancenorm': lambda: images(lambda s,h: s.n(h), n=nn.InstanceNorm2d(8)),
    'groupnorm': lambda: images(lambda s,h: s.n(h), n=nn.GroupNorm(2,8)),
    'functional_group_norm': lambda: images(lambda s,h: F.group_norm(h, 2)),
    'prelu': lambda: images(lambda s,h: s.n(h), n=nn.PReLU(8)),
    'hardswish': lambda: images(lambda s,h: F.hardswish(h, inplace=True)),
    'dropout': lambda: images(lambda s,h: F.dropout(s.n(h), training=s.training), n=nn.Dropout2d()),
    'softmax': lambda: images(lambda s,h: h.softmax(1)),
    'normalize': lambda: images(lambda s,h: F.normalize(h)),
    'standardize': lambda: images(lambda s,h: (h-h.mean(1, keepdim=True))/h.std(1, keepdim=True)),
    'amax': lambda: images(lambda s,h: h-h.amax(1, keepdim=True)),
    'glu': lambda: images(lambda s,h: F.glu(s.n(h), 1), n=nn.Conv2d(8,16,1)),
    'channel_shuffle': lambda: images(lambda s,h: h.view(2,2,4,6,6).transpose(1,2).reshape(2,8,6,6)),
    'channel_shuffle_module': lambda: images(lambda s,h: s.n(h), n=nn.ChannelShuffle(2)),
    'chunk_swapped_cat': lambda: images(lambda s,h: torch.cat(h.chunk(2,1)[::-1], 1)),
    'split_and_cat': lambda: images(lambda s,h: torch.cat(h.split([3,5],1), dim=1)),
    'cat_negative_dim': lambda: images(lambda s,h: torch.cat([h,s.n(h)], -3), n=nn.Conv2d(8,6,1), last=nn.Conv2d(14,5,1)),
    'cat_keywords': lambda: images(lambda s,h: torch.cat(tensors=[h,s.n(h)], dim=1), n=nn.Conv2d(8,6,1), last=nn.Conv2d(14,5,1)),
    'cat_and_add': lambda: images(lambda s,h: torch.cat([h,s.n(h)],1)+s.m(h), n=nn.Conv2d(8,6,1), m=nn.Conv2d(8,14,1), last=nn.Conv2d(14,5,1)),
    'pad_channels': lambda: images(lambda s,h: F.pad(h, (0,0,0,0,2,2))+s.m(h), m=nn.Conv2d(8,12,1), last=nn.Conv2d(12,5,1)),
    'crop_channels': lambda: images(lambda s,h: F.pad(h, (0,0,0,0,-2,-2)), last=nn.Conv2d(4,5,1)),
    'pad_space': lambda: images(lambda s,h: F.pad(F.pad(h, (1,1,1,1), mode='reflect'), (1,0))),
    'pool': lambda: images(lambda s,h: F.avg_pool2d(F.max_pool2d(h, 2, 1), 2, 1)),
    'interpolate': lambda: images(lambda s,h: F.interpolate(h, scale_factor=2, mode='bilinear')),
    'flip_space': lambda: images(lambda s,h: h.flip(2).roll((1,1), (2,3))),
    'shift_channels': lambda: images(lambda s,h: torch.cat([h[:,4:],h[:,:4]], 1)),
    'unfold': lambda: images(lambda s,h: F.unfold(h, 3).unsqueeze(-1), last=nn.Conv2d(72,5,1)),
    'pixel_unshuffle': lambda: images(lambda s,h: F.pixel_unshuffle(h, 2), last=nn.Conv2d(32,5,1)),
    'repeat': lambda: images(lambda s,h: h.repeat(1,2,1,1), last=nn.Conv2d(16,5,1)),
    'buffer_added': lambda: images(lambda s,h: h+s.i, i=torch.randn(8,1,1)),
    'parameter_multiplied': lambda: images(lambda s,h: h*s.i, i=nn.Parameter(torch.randn(1,8,1,1))),
    'functional_conv': lambda: images(lambda s,h: F.conv2d(h, s.w), w=nn.Parameter(torch.randn(8,8,1,1))),
    'einsum': lambda: images(lambda s,h: torch.einsum('bchw,dc->bdhw', h, s.w), w=nn.Parameter(torch.randn(8,8))),
    'squeeze_excite': lambda: images(lambda s,h: h*s.n(h), n=nn.Sequential(nn.AdaptiveAvgPool2d(1),nn.Conv2d(8,4,1),nn.ReLU(),nn.Conv2d(4,8,1),nn.Sigmoid())),
    'grouped_conv': lambda: images(lambda s,h: s.n(h), n=nn.Conv2d(8,16,3,groups=2), last=nn.Conv2d(16,5,1)),
    'grouped_conv_after_cat': lambda: images(lambda s,h: s.n(torch.cat([h,s.m(h)],1)), m=nn.Conv2d(8,8,1), n=nn.Conv2d(16,16,3,groups=4), last=nn.Conv2d(16,5,1)),
    'depthwise_conv': lambda: images(lambda s,h: s.n(h), n=nn.Conv2d(8,16,3,groups=8), last=nn.Conv2d(16,5,1)),
    'transposed_conv': lambda: images(lambda s,h: s.n(h), n=nn.ConvTranspose2d(8,8,2,2)),
    'transposed_grouped_conv': lambda: images(lambda s,h: s.n(h), n=nn.ConvTranspose2d(8,16,2,2,groups=2), last=nn.Conv2d(16,5,1)),
    'transposed_depthwise_conv': lambda: images(lambda s,h: s.n(h), n=nn.ConvTranspose2d(8,16,2,2,groups=8), last=nn.Conv2d(16,5,1)),
    'weight_norm': lambda: images(lambda s,h: s.n(h), n=nn.utils.parametrizations.weight_norm(nn.Conv2d(8,8,1))),
    'spectral_norm': lambda: images(lambda s,h: s.n(h), n=nn.utils.parametrizations.spectral_norm(nn.Conv2d(8,8,1))),
    'in_place': lambda: images(lambda s,h: h.relu_().add_(1).mul_(s.i), i=nn.Parameter(torch.randn(8,1,1))),
    'in_place_on_halves': lambda: images(lambda s,h: _halves_in_place(h)),
    'written_in_halves': lambda: images(lambda s,h: _swap_halves(h)),
    'module_used_twice': lambda: images(lambda s,h: s.n(s.n(h).relu()), n=nn.Conv2d(8,8,1)),
    'checkpointed': lambda: images(lambda s,h: torch.utils.checkpoint.checkpoint(s.n, h, use_reentrant=False), n=nn.Conv2d(8,8,1)),
    'linear_on_space': lambda: images(lambda s,h: s.n(h.flatten(2)).view_as(h), n=nn.Linear(9,9), first=nn.Conv2d(3,9,4), last=nn.Conv2d(9,5,3)),
    'token_mixing': lambda: tokens(lambda s,h: s.n(h.transpose(1,2)).transpose(1,2)+h, n=nn.Linear(4,4), c=4),
    'layernorm': lambda: tokens(lambda s,h: s.n(h), n=nn.LayerNorm(8)),
    'rmsnorm': lambda: tokens(lambda s,h: s.n(h), n=nn.RMSNorm(8)),
    'flattened_tokens': lambda: tokens(lambda s,h: s.n(h.flatten(1)), n=nn.Linear(32,8)),
    'class_token': lambda: tokens(lambda s,h: (torch.cat([s.t.expand(2,-1,-1),h], 1)+s.pos)[:,0], t=nn.Parameter(torch.randn(1,1,8)), pos=nn.Parameter(torch.randn(1,5,8))),
    'gru': lambda: tokens(lambda s,h: s.n(h)[0], n=nn.GRU(8,8)),
    'lstm': lambda: tokens(lambda s,h: s.n(h)[0], n=nn.LSTM(8,8,2,bidirectional=True), last=nn.Linear(16,3)),
    'attention_module': lambda: tokens(lambda s,h: s.n(h,h,h)[0]+h, n=nn.MultiheadAttention(8,2,batch_first=True)),
    'cross_attention_module': lambda: tokens(lambda s,h: s.n(h,s.m(h),s.m(h))[0]+h, n=nn.MultiheadAttention(8,2,kdim=6,vdim=6,add_bias_kv=True), m=nn.Linear(8,6)),
    'transformer_encoder': lambda: tokens(lambda s,h: s.n(h), n=nn.TransformerEncoder(nn.TransformerEncoderLayer(8,2,16,batch_first=True), 2)),
    'transformer_decoder': lambda: tokens(lambda s,h: s.n(h,h), n=nn.TransformerDecoder(nn.TransformerDecoderLayer(8,2,16,batch_first=True), 1)),
    'channels_to_space': lambda: images(lambda s,h: F.pixel_shuffle(h,2), first=nn.Conv2d(3,16,3,padding=1), last=nn.Conv2d(4,5,1)),
}

frozen = { # the channels between first and last layer have an order
    'flip': lambda: images(lambda s,h: h.flip(1)),
    'flip_added': lambda: images(lambda s,h: h+h.flip(1)),
    'roll': lambda: images(lambda s,h: h.roll(1,1)),
    'cumsum': lambda: images(lambda s,h: h.cumsum(1)),
    'sort': lambda: images(lambda s,h: h.sort(1).values),
    'argmax': lambda: images(lambda s,h: h*h.argmax(1, keepdim=True)),
    'topk': lambda: images(lambda s,h: h.topk(4,1).values, last=nn.Conv2d(4,5,1)),
    'index_by_buffer': lambda: images(lambda s,h: h[:,s.i], i=torch.randperm(8)),
    'index_select': lambda: images(lambda s,h: h.index_select(1,s.i), i=torch.randperm(8)),
    'gather': lambda: images(lambda s,h: h.gather(1,s.i.expand(2,8,6,6)), i=torch.randperm(8).view(1,8,1,1)),
    'boolean_index': lambda: images(lambda s,h: h.index_put((h<0,), torch.zeros((), dtype=h.dtype))),
    'every_other': lambda: images(lambda s,h: h[:,::2], last=nn.Conv2d(4,5,1)),
    'reversed_stack': lambda: images(lambda s,h: torch.stack(h.unbind(1)[::-1], 1)),
    'set_first': lambda: images(lambda s,h: _set_first(h)),
    'add_arange': lambda: images(lambda s,h: h+torch.arange(8).view(1,-1,1,1).to(h)),
    'detour_by_data': lambda: images(lambda s,h: h.data.flip(1)),
    'generated_conv': lambda: images(lambda s,h: F.conv2d(h, s.n(h.mean((0,2,3))).view(8,8,1,1))*h, n=nn.Linear(8,64)),
    'local_response_norm': lambda: images(lambda s,h: s.n(h), n=nn.LocalResponseNorm(3)),
    'numpy': lambda: images(lambda s,h: torch.from_numpy(np.flip(h.numpy(),1).copy())),
    'decision_by_item': lambda: images(lambda s,h: h.relu() if h.sum().item()>0 else h),
    'decision_by_bool': lambda: images(lambda s,h: h.relu() if (h>0).any() else h),
    'decision_by_list': lambda: images(lambda s,h: h.relu() if h.flatten().tolist()[0]>0 else h),
    'bilinear': lambda: tokens(lambda s,h: s.n(h,h), n=nn.Bilinear(8,8,8)),
}

@pytest.mark.parametrize('name', [*safe,*frozen])
def test_operation(name):
    torch.manual_seed(0)
    model,xb = {**safe,**frozen}[name]()
    columns,change = shuffle(deepcopy(model), xb)
    assert change<1e-12
    assert ('last.weight' in columns)==(name in safe)
    res,change = permute(model, xb)
    assert change<1e-4 and not any('rolled back' in g.status for g in res.groups)

# structures

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c = nn.Linear(8,8),nn.Linear(8,8),nn.Linear(8,3)
        self.b.weight = self.a.weight
    def forward(self, x): return self.c(self.b(self.a(x).relu()).relu())

class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c = nn.Linear(5,8),nn.Linear(8,16),nn.Linear(5,3)
    def forward(self, x): return self.c(F.linear(F.linear(self.b(self.a(x).relu()).relu(), self.b.weight.t()), self.a.weight.t()))

class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb,self.hidden,self.out = nn.Embedding(16,8,padding_idx=0),nn.Linear(8,8),nn.Linear(8,16,bias=False)
        self.out.weight = self.emb.weight
    def forward(self, x): return self.out(self.hidden(self.emb(x)).relu())

class ThreeLinears(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c,self.aux = nn.Linear(8,8),nn.Linear(8,8),nn.Linear(8,3),nn.Linear(8,3)
    def forward(self, x): return self.c(self.b(self.a(x).relu()).relu())

class ManyOutputs(ThreeLinears):
    def forward(self, x):
        h = self.a(x).relu()
        g = self.b(h)
        return {'out':self.c(g), 'features':[h]}

class KeepsFeatures(ThreeLinears):
    def forward(self, x):
        self.features = self.a(x).relu()
        return self.c(self.b(self.features))

class Auxiliary(ThreeLinears):
    def forward(self, x):
        h = self.a(x).relu()
        return (self.c(self.b(h)),self.aux(h)) if self.training else self.c(self.b(h))

class OrderedAuxiliary(ThreeLinears):
    def forward(self, x):
        h = self.a(x).relu()
        return (self.c(self.b(h)),self.aux(h.flip(1))) if self.training else self.c(self.b(h))

class Keywords(ThreeLinears):
    def forward(self, x, *, scale): return self.c(self.b(self.a(x)*scale))

class Collisions(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.ModuleList([nn.Linear(8,8), nn.Linear(8,8)])
        self.layer11,self.layer_11,self.out = nn.Linear(8,8),nn.Linear(8,8),nn.Linear(8,3)
    def forward(self, x): return self.out(self.layer_11(self.layer11(self.layer1[1](self.layer1[0](x).relu())+x).relu()))

class HandWrittenAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp,self.qkv,self.proj,self.out = nn.Linear(5,16),nn.Linear(16,48),nn.Linear(16,16),nn.Linear(16,3)
    def forward(self, x):
        h = self.inp(x)
        q,k,v = self.qkv(h).reshape(*x.shape[:2],3,2,8).permute(2,0,3,1,4)
        a = ((q@k.transpose(-1,-2)/8**.5).softmax(-1)@v).transpose(1,2).flatten(2)
        return self.out(h+self.proj(a))

class RotaryAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp,self.q,self.k,self.v,self.proj,self.out = nn.Linear(5,16),nn.Linear(16,16),nn.Linear(16,16),nn.Linear(16,16),nn.Linear(16,16),nn.Linear(16,3)
        self.register_buffer('angles', torch.rand(4,8))
    def rotate(self, x):
        a,b = x.chunk(2,-1)
        return x*self.angles.cos()+torch.cat([-b,a],-1)*self.angles.sin()
    def forward(self, x):
        h = self.inp(x)
        q,k,v = (l(h).view(*x.shape[:2],2,8).transpose(1,2) for l in (self.q,self.k,self.v))
        a = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        return self.out(h+self.proj(a.transpose(1,2).reshape(h.shape)))

class TinyUnet(nn.Module):
    def __init__(self):
        super().__init__()
        def block(i, o): return nn.Sequential(nn.Conv2d(i,o,3,padding=1), nn.BatchNorm2d(o), nn.ReLU(inplace=True))
        self.down1,self.down2,self.up2,self.up1 = block(3,8),block(8,16),block(24,8),block(11,8)
        self.out = nn.Conv2d(8,2,1)
    def forward(self, x):
        a = self.down1(x)
        b = F.interpolate(self.down2(F.max_pool2d(a, 2)), scale_factor=2)
        return self.out(self.up1(torch.cat([x,self.up2(torch.cat([a,b],1))],1)))

structures = { # model, example, weights whose columns are permuted
    'tied_to_the_input': (Tied, lambda: torch.randn(2,8), set()),
    'tied_autoencoder': (Autoencoder, lambda: torch.randn(2,5), {'b.weight'}),
    'tied_embedding': (LanguageModel, lambda: torch.randint(16,(2,4)), {'hidden.weight'}),
    'many_outputs': (ManyOutputs, lambda: torch.randn(2,8), {'c.weight'}),
    'features_kept': (KeepsFeatures, lambda: torch.randn(2,8), {'c.weight'}),
    'auxiliary_head': (Auxiliary, lambda: torch.randn(2,8), {'b.weight','c.weight','aux.weight'}),
    'ordered_auxiliary_head': (OrderedAuxiliary, lambda: torch.randn(2,8), {'c.weight'}),
    'unused_layer': (ThreeLinears, lambda: torch.randn(2,8), {'b.weight','c.weight'}),
    'arguments': (Keywords, lambda: {'x':torch.randn(2,8), 'scale':torch.randn(2,1)}, {'b.weight','c.weight'}),
    'names_that_collide': (Collisions, lambda: torch.randn(2,8), {'layer1.1.weight','layer_11.weight','out.weight'}),
    'layernorm_over_the_batch': (lambda: nn.Sequential(nn.Linear(8,8), nn.LayerNorm([8,8]), nn.Linear(8,8)), lambda: torch.randn(8,8), {'2.weight'}),
    'hand_written_attention': (HandWrittenAttention, lambda: torch.randn(2,4,5), {'qkv.weight','proj.weight','out.weight'}),
    'rotary_attention': (RotaryAttention, lambda: torch.randn(2,4,5), {'q.weight','k.weight','v.weight','proj.weight','out.weight'}),
    'unet': (TinyUnet, lambda: torch.randn(2,3,8,8), {'down2.0.weight','up2.0.weight','up1.0.weight','out.weight'}),
    'one_channel': (lambda: nn.Sequential(nn.Conv2d(1,8,3), nn.ReLU(), nn.Flatten(), nn.Linear(128,4)), lambda: torch.randn(2,1,6,6), {'3.weight'}),
    'conv1d': (lambda: nn.Sequential(nn.Conv1d(2,8,3), nn.BatchNorm1d(8), nn.MaxPool1d(2), nn.Conv1d(8,8,1), nn.Flatten(), nn.Linear(24,3)), lambda: torch.randn(2,2,8), {'3.weight','5.weight'}),
    'conv3d': (lambda: nn.Sequential(nn.Conv3d(2,8,1), nn.BatchNorm3d(8), nn.MaxPool3d(2), nn.Conv3d(8,8,1), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8,3)),
               lambda: torch.randn(2,2,4,4,4), {'3.weight','6.weight'}),
}

@pytest.mark.parametrize('name', structures)
def test_structure(name):
    torch.manual_seed(0)
    make,example,expected = structures[name]
    model,xb = make(),example()
    columns,change = shuffle(deepcopy(model), xb)
    assert change<1e-12 and columns==expected
    res,change = permute(model, xb)
    assert change<1e-4 and not any('rolled back' in g.status for g in res.groups)

# random graphs

class Drawn(nn.Module):
    "A graph with a node for each of `steps`: what it does, and from which earlier nodes; the last two are returned"
    def __init__(self, steps):
        super().__init__()
        self.plan,self.layers,widths = [],nn.ModuleList(),[3]
        for op,i,j in steps:
            i,j = i%len(widths),j%len(widths)
            layer,width,j = getattr(self, op)(widths, i, j)
            self.layers.append(layer)
            self.plan.append((op, i, j))
            widths.append(width)
        self.heads = nn.ModuleList(nn.Conv2d(w,4,1) for w in widths[-2:])

    def forward(self, x):
        nodes = [x]
        for (op,i,j),layer in zip(self.plan, self.layers):
            inputs = [nodes[i]] if j is None else [nodes[i],nodes[j]]
            nodes.append(layer(*inputs))
        return [head(h) for head,h in zip(self.heads, nodes[-2:])]

    def conv(self, widths, i, j): return nn.Conv2d(widths[i], 8, 1+2*(j%2), padding=j%2), 8, None
    def conv_wide(self, widths, i, j): return nn.Conv2d(widths[i], 12, 1), 12, None
    def depthwise(self, widths, i, j): return nn.Conv2d(widths[i], 2*widths[i], 1, groups=widths[i]), 2*widths[i], None
    def grouped(self, widths, i, j):
        groups = 4 if widths[i]%4==0 else 1
        return nn.Conv2d(widths[i], 8, 1, groups=groups), 8, None
    def norm(self, widths, i, j): return [nn.BatchNorm2d, nn.InstanceNorm2d, lambda w: nn.GroupNorm(1, w), nn.PReLU][j%4](widths[i]), widths[i], None
    def relu(self, widths, i, j): return nn.ReLU(), widths[i], None
    def add(self, widths, i, j): return (Apply(torch.add), widths[i], j) if widths[i]==widths[j] else (Apply(gate), widths[i], j)
    def cat(self, widths, i, j): return Apply(lambda a,b: torch.cat([a,b], 1)), widths[i]+widths[j], j
    def swap(self, widths, i, j): return Apply(lambda a: torch.cat([a[:,j%a.shape[1]:],a[:,:j%a.shape[1]]], 1)), widths[i], None
    def head(self, widths, i, j): return Apply(lambda a: a[:,:max(1,a.shape[1]//2)]), max(1,widths[i]//2), None
    def shuffle(self, widths, i, j):
        n = next(n for n in (4,3,2,1) if widths[i]%n==0)
        return Apply(lambda a: a.unflatten(1, (n,-1)).transpose(1,2).flatten(1,2)), widths[i], None
    def attention(self, widths, i, j):
        n = next(n for n in (4,3,2,1) if widths[i]%n==0)
        return Apply(lambda a: heads_attention(a, n)), widths[i], None
    def softmax(self, widths, i, j): return Apply(lambda a: a.softmax(1)-a.mean(1, keepdim=True)), widths[i], None
    def ordered(self, widths, i, j):
        return Apply([lambda a: a.flip(1), lambda a: a.cumsum(1), lambda a: a.sort(1).values, lambda a: a+torch.arange(a.shape[1]).view(-1,1,1)][j%4]), widths[i], None
    def transposed(self, widths, i, j): return Apply(lambda a: a.transpose(1,2).contiguous().view_as(a) if a.shape[1]==a.shape[2] else a), widths[i], None
    def in_place(self, widths, i, j): return Apply(lambda a: a.clone().mul_(2).add_(a.amax(1, keepdim=True))), widths[i], None

class Apply(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f
    def forward(self, *args): return self.f(*args)

def gate(a, b): return a*b.mean(1, keepdim=True).sigmoid()

def heads_attention(a, n):
    h = a.flatten(2).unflatten(1, (n,-1)).transpose(-1,-2)
    return F.scaled_dot_product_attention(h, h, h).transpose(-1,-2).flatten(1,2).view_as(a)

steps = st.tuples(st.sampled_from([k for k in vars(Drawn) if not k.startswith('_') and k!='forward']), st.integers(0,20), st.integers(0,20))

@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(steps, min_size=2, max_size=10))
def test_random_graphs(drawn):
    torch.manual_seed(0)
    model = Drawn(drawn)
    _,change = shuffle(model, torch.randn(2,3,8,8))
    assert change<1e-9

# architectures

def tv(name, **kwargs):
    import torchvision
    return getattr(torchvision.models, name)(num_classes=10, **kwargs)

def xresnet():
    from fastai.vision.models.xresnet import xresnet18
    return xresnet18(n_out=10)

def unet():
    from fastai.vision.learner import create_body
    from fastai.vision.models.unet import DynamicUnet
    return DynamicUnet(create_body(tv('resnet18'), pretrained=False, cut=-2), 3, (64,64))

def timm_model(name):
    import timm
    return timm.create_model(name, num_classes=10)

def tabular():
    from fastai.tabular.model import TabularModel
    return TabularModel([(5,8),(7,8)], 3, 2, [64,32])

def awd_lstm():
    from fastai.text.models.awdlstm import AWD_LSTM,awd_lstm_lm_config
    from fastai.text.models.core import get_language_model
    return get_language_model(AWD_LSTM, 20, {**awd_lstm_lm_config, 'emb_sz':16, 'n_hid':24, 'n_layers':2})

def image(size, bs=1): return lambda: torch.randn(bs,3,size,size)

fast = { # model, example, how many weights at least have columns that are free
    'mlp': (lambda: nn.Sequential(nn.Linear(4,16), nn.ReLU(), nn.Linear(16,16), nn.ReLU(), nn.Linear(16,2)), lambda: torch.randn(3,4), 2),
    'transformer': (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16,2,32,batch_first=True), 2), lambda: torch.randn(2,5,16), 4),
    'resnet18': (lambda: tv('resnet18'), image(64), 20),
    'mobilenet_v2': (lambda: tv('mobilenet_v2'), image(64), 35),
    'mobilenet_v3_small': (lambda: tv('mobilenet_v3_small'), image(64), 42),
    'shufflenet_v2': (lambda: tv('shufflenet_v2_x0_5'), image(64), 15),
    'squeezenet': (lambda: tv('squeezenet1_1'), image(64), 25),
    'mnasnet': (lambda: tv('mnasnet0_5'), image(64), 35),
    'efficientnet_b0': (lambda: tv('efficientnet_b0'), image(64), 64),
    'regnet_y_400mf': (lambda: tv('regnet_y_400mf'), image(64), 69),
    'googlenet': (lambda: tv('googlenet', init_weights=False), image(64), 63),
    'densenet121': (lambda: tv('densenet121'), image(64), 120),
    'timm_resnet18': (lambda: timm_model('resnet18'), image(64), 20),
    'timm_mobilenetv3': (lambda: timm_model('mobilenetv3_small_050'), image(64), 42),
    'timm_efficientnet_lite0': (lambda: timm_model('efficientnet_lite0'), image(64), 33),
    'timm_regnetx_002': (lambda: timm_model('regnetx_002'), image(64), 31),
    'timm_convnext_atto': (lambda: timm_model('convnext_atto'), image(64), 28),
    'timm_vit_tiny': (lambda: timm_model('vit_tiny_patch16_224'), image(224), 49),
    'xresnet18': (xresnet, image(64), 22),
    'tabular': (tabular, lambda: (torch.randint(5,(4,2)), torch.randn(4,3)), 3),
}

heavy = {
    'resnet50': (lambda: tv('resnet50'), image(64), 53),
    'resnext50': (lambda: tv('resnext50_32x4d'), image(64), 37),
    'vgg11_bn': (lambda: tv('vgg11_bn'), image(32), 10),
    'convnext_tiny': (lambda: tv('convnext_tiny'), image(64), 40),
    'swin_t': (lambda: tv('swin_t'), image(64), 52),
    'vit_b_16': (lambda: tv('vit_b_16'), image(224), 49),
    'inception_v3': (lambda: tv('inception_v3', init_weights=False), image(299), 90),
    'unet': (unet, image(64), 35),
    'timm_hrnet': (lambda: timm_model('hrnet_w18_small'), image(64), 85),
    'timm_res2net': (lambda: timm_model('res2net50_26w_4s'), image(64), 80),
    'timm_nf_regnet': (lambda: timm_model('nf_regnet_b0'), image(64), 60),
    'timm_xcit': (lambda: timm_model('xcit_nano_12_p16_224'), image(224), 60),
}

def check_architecture(make, example, at_least):
    torch.manual_seed(0)
    columns,change = shuffle(make(), example())
    assert change<1e-9
    assert len(columns)>=at_least

@pytest.mark.parametrize('name', fast)
def test_architecture(name): check_architecture(*fast[name])

@pytest.mark.slow
@pytest.mark.parametrize('name', heavy)
def test_heavy_architecture(name): check_architecture(*heavy[name])

@pytest.mark.parametrize('name,at_least', [('resnet18',20), ('mobilenet_v2',34), ('squeezenet',25)])
def test_permuted_for_more_magnitude(name, at_least):
    torch.manual_seed(0)
    make,example,_ = fast[name]
    model = make()
    res,change = permute(model, example(), n_evaluations=150_000)
    assert change<1e-4 and res.after>res.before
    assert len(res.permuted)>=at_least
    assert not any('rolled back' in g.status for g in res.groups)

def test_awd_lstm():
    torch.manual_seed(0)
    model,xb = awd_lstm(),torch.randint(20,(2,6))
    model(xb)[0].sum().backward()  # leaves weights with a history, which can't be copied
    model.reset()
    before = model.eval()(xb)[0]
    res = permute_channels(model, xb, n_evaluations=2000)
    model.reset()
    assert _change([before], [model(xb)[0]])<1e-4
    assert len(res.groups)==4 and not any("can't be run" in g.status for g in res.groups)

# the safety net

@pytest.fixture
def faulty_flip(monkeypatch):
    "As if a flip didn't care for the order"
    monkeypatch.setitem(rules._rules, 'flip', rules._rules['hardswish'])

class Bad(nn.Module):
    def forward(self, x): return x.flip(1)

def faulty_model(): return nn.Sequential(nn.Linear(4,16), nn.ReLU(), nn.Linear(16,16), Bad(), nn.Linear(16,16), nn.ReLU(), nn.Linear(16,4))

def test_wrong_group_is_rolled_back(faulty_flip):
    res,change = permute(faulty_model(), torch.randn(3,4))
    assert change<1e-5
    assert {g.weights[0]:g.status.split(':')[0] for g in res.groups}=={'0.weight':'frozen', '2.weight':'permuted', '4.weight':'rolled back', '6.weight':'permuted'}

def test_wrong_group_in_a_branch_that_starts_at_zero_is_rolled_back(faulty_flip):
    torch.manual_seed(0)
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first,self.branch,self.last = nn.Linear(4,16),faulty_model()[2:5],nn.Linear(16,4)
            nn.init.zeros_(self.branch[-1].weight), nn.init.zeros_(self.branch[-1].bias)
        def forward(self, x): return self.last(self.first(x)+self.branch(self.first(x)))
    model = Residual()
    res = permute_channels(model, torch.randn(3,4), n_evaluations=2000)
    assert [g.status.split(':')[0] for g in res.groups if 'branch.4.weight' in g.weights]==['rolled back']

def test_forgotten_statistics_are_noticed(monkeypatch):
    monkeypatch.setitem(rules._rules, 'native_batch_norm', lambda t, a, outs: [t.axes(a.input)]+[[rules.new_axis(n) for n in o.shape] for o in outs[1:]])
    model = nn.Sequential(nn.Conv2d(3,8,3), nn.BatchNorm2d(8), nn.Conv2d(8,4,3))
    res = permute_channels(model, torch.randn(2,3,8,8))
    assert [g.status.split(':')[0] for g in res.groups]==['rolled back','frozen']

def test_random_outputs_are_not_permuted_by_luck():
    class Noisy(nn.Module):
        def forward(self, x): return x+torch.randn_like(x)
    model = nn.Sequential(nn.Linear(4,16), nn.ReLU(), nn.Linear(16,16), Noisy(), nn.Linear(16,4))
    res,_ = permute(model, torch.randn(3,4))
    assert res.permuted==['2.weight']

# models that can't be rehearsed

class Fails(nn.Module):
    def forward(self, x): raise KeyError('no such thing')

class Stubborn(nn.Linear):
    def __deepcopy__(self, memo): raise TypeError("can't be copied")

class NeedsTarget(ThreeLinears):
    def forward(self, x, y=None):
        out = super().forward(x)
        return F.mse_loss(out, y) if self.training else out

def test_model_that_cannot_be_rehearsed_is_left_alone():
    model = nn.Sequential(nn.Linear(4,8), nn.Linear(8,8), Stubborn(8,4))
    before = [p.clone() for p in model.parameters()]
    res = permute_channels(model, torch.randn(2,4))
    assert res.permuted==[] and all("can't be copied" in g.status for g in res.groups)
    assert all(torch.equal(a, b) for a,b in zip(before, model.parameters()))

@pytest.mark.parametrize('last,xb,why', [(Fails(),torch.randn(2,4),"'no such thing'"), (nn.Linear(9,4),torch.randn(2,4),'.*shapes.*'), (nn.Linear(8,4),torch.randn(2,5),'.*shapes.*'),
                                         (nn.Linear(8,4),(torch.randn(2,4),torch.randn(2,1)),'.*takes 2 positional arguments.*'), (nn.Linear(8,4),{'y':torch.randn(2,4)},".*'y'.*")])
def test_example_that_does_not_run_is_refused(last, xb, why):
    model = nn.Sequential(nn.Linear(4,8), nn.BatchNorm1d(8), nn.Linear(8,8), last)
    before = {k:v.clone() for k,v in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"^permute_channels: the example doesn't run through the model: {why}$"): permute_channels(model, xb)
    assert model.training and before.keys()==model.state_dict().keys() and all(torch.equal(before[k], v) for k,v in model.state_dict().items())

def test_there_is_an_example():
    with pytest.raises(ValueError, match='xb must be an example that the model accepts, got None'): permute_channels(small_net(), None)

def test_model_that_cannot_train_on_the_example_is_left_alone():
    assert permute_channels(NeedsTarget(), torch.randn(2,8)).permuted==[]
    assert permute_channels(NeedsTarget(), (torch.randn(2,8),torch.randn(2,3)), n_evaluations=2000).permuted

def test_model_in_half_precision():
    torch.manual_seed(0)
    class Insists(nn.Module):
        def forward(self, x): return x.bfloat16()
    model = nn.Sequential(Insists(), nn.Linear(8,16), nn.ReLU(), nn.Linear(16,16), nn.ReLU(), nn.Linear(16,4)).bfloat16()
    before = model(xb:=torch.randn(4,8)).detach()
    res = permute_channels(model, xb, n_evaluations=2000)
    assert res.permuted==['3.weight','5.weight'] and model[1].weight.dtype==torch.bfloat16
    assert (model(xb)-before).abs().max()<.05

def test_parts_in_single_precision_are_no_mistake():
    class Upcast(nn.Module):
        def forward(self, x): return F.layer_norm(x.float(), x.shape[-1:]).to(x.dtype)
    model = nn.Sequential(nn.Linear(8,16), Upcast(), nn.Linear(16,16), Upcast(), nn.Linear(16,4))
    assert permute(model, torch.randn(4,8))[0].permuted==['2.weight','4.weight']

def test_memory_shared_by_parameters_is_left_alone():
    model = nn.Sequential(*(nn.Linear(8,8) for _ in range(5)))
    model[1].weight = nn.Parameter(model[0].weight.data)
    res,change = permute(model, torch.randn(2,8))
    assert change<1e-5 and res.permuted==['3.weight','4.weight']
    assert [g.status for g in res.groups if g.weights==['2.weight']]==['frozen: memory that is shared with another parameter']

# what moves along

def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3,16,3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16,32,3), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32,4))

@pytest.mark.parametrize('opt_func', [lambda ps: torch.optim.AdamW(ps, lr=1e-2, amsgrad=True), lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=.9),
                                      lambda ps: OptimWrapper(ps, torch.optim.RMSprop, lr=1e-2), lambda ps: Lookahead(RAdam(ps, lr=1e-2)), lambda ps: Adam(ps, lr=1e-2)])
def test_training_goes_on_as_it_would_have(opt_func):
    def run(permuted):
        model = generic(small_net()).double()
        opt = opt_func(list(model.parameters()))
        def steps(seed):
            g = torch.Generator().manual_seed(seed)
            model.train()
            for _ in range(8):
                model(torch.randn(8,3,8,8,generator=g,dtype=torch.float64)).square().mean().backward()
                opt.step()
                opt.zero_grad()
        steps(0)
        if permuted: assert permute_channels(model, torch.randn(2,3,8,8), optimizer=opt, n_evaluations=2000).permuted==['3.weight','8.weight']
        steps(1)
        return outputs(model, torch.randn(2,3,8,8,generator=torch.Generator().manual_seed(2),dtype=torch.float64))
    assert _change(run(False), run(True))<1e-9

def test_masks_gradients_and_averages_move_along():
    model = generic(small_net())
    attach_masks(model)
    for p in masked_params(model): set_mask(p, torch.rand_like(p.param)>.5)
    ema = torch.optim.swa_utils.AveragedModel(model)
    xb = torch.randn(2,3,8,8)
    model(xb).sum().backward()
    before,average = outputs(model, xb),outputs(ema, xb)
    params,grads = list(model.parameters()),{n:p.grad.clone() for n,p in model.named_parameters()}
    res = permute_channels(model, xb, ema=ema, n_evaluations=2000)
    assert res.permuted and all(a is b for a,b in zip(params, model.parameters()))
    assert _change(before, outputs(model, xb))<1e-5 and _change(average, outputs(ema, xb))<1e-5
    for p in masked_params(model): assert not p.param[~p.mask].count_nonzero() and 0<p.mask.float().mean()<1
    order = channel_order(model)
    for n,p in model.named_parameters():
        expected = grads[n]
        for d in range(p.ndim): expected = expected.index_select(d, order.get((n,d), torch.arange(p.shape[d])))
        assert torch.equal(p.grad, expected)
    restore_channel_order(model, ema=ema)
    assert _change(average, outputs(ema, xb))<1e-5
    for p in masked_params(model): assert not p.param[~p.mask].count_nonzero()

@pytest.mark.parametrize('opt_func', [lambda ps: torch.optim.Adafactor(ps, lr=1e-3), lambda ps: torch.optim.LBFGS(ps, lr=1e-3)])
def test_optimizer_that_cannot_follow_is_refused(opt_func):
    model = small_net()
    opt = opt_func(list(model.parameters()))
    def closure():
        loss = model(torch.ones(2,3,8,8)).square().mean()
        loss.backward()
        return loss
    opt.step(closure) if isinstance(opt, torch.optim.LBFGS) else (closure(), opt.step())
    before = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match='before its first step'): permute_channels(model, torch.randn(2,3,8,8), optimizer=opt)
    assert all(torch.equal(before[k], v) for k,v in model.state_dict().items())

def test_the_model_is_left_as_it_was():
    model,xb = small_net(),torch.randn(2,3,8,8)
    model[3].eval()
    called,modes,rng = [],[m.training for m in model.modules()],torch.get_rng_state()
    model[0].register_forward_hook(lambda m, *_: called.append(m is model[0]))
    stats = model[1].running_mean.clone()
    permutation_groups(model, xb)
    assert [m.training for m in model.modules()]==modes and torch.equal(torch.get_rng_state(), rng) and torch.equal(model[1].running_mean, stats)
    assert not any(called) and not any(m._forward_pre_hooks for m in model.modules())

# the record

def test_original_order_is_restored_after_two_permutations_and_training():
    model,xb = generic(small_net()),torch.randn(2,3,8,8)
    twin = deepcopy(model)
    for m,is_permuted in ((model,True),(twin,False)):
        for n in (2,1):
            if is_permuted: assert permute_channels(m, xb, n, 4, n_evaluations=2000, seed=n).permuted
            for p in m.parameters(): p.data.mul_(1.5)
    copy = restore_channel_order(deepcopy(model))
    assert all(torch.equal(a, b) for a,b in zip(copy.parameters(), twin.parameters()))
    assert channel_order(copy)=={} and copy.state_dict().keys()==twin.state_dict().keys() and channel_order(model)!={}

def test_checkpoints_of_permuted_models():
    model,fresh,tracked,xb = generic(small_net()),small_net(),small_net(),torch.randn(2,3,8,8)
    plain = deepcopy(model.state_dict())
    permute_channels(model, xb, n_evaluations=2000)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    with pytest.raises(RuntimeError, match='channel_order'): fresh.load_state_dict(state)
    track_channel_order(tracked)
    tracked.load_state_dict(state)
    assert {k:v.tolist() for k,v in channel_order(tracked).items()}=={k:v.tolist() for k,v in channel_order(model).items()}
    wrapped = nn.Sequential(deepcopy(tracked), nn.Identity())
    wrapped.load_state_dict(wrapped.state_dict())
    restore_channel_order(tracked)
    assert all(torch.equal(v, plain[k]) for k,v in tracked.state_dict().items())
    model.load_state_dict(plain)
    assert channel_order(model)=={}

def test_permuted_model_is_pickled_and_loaded():
    model,xb = generic(small_net()),torch.randn(2,3,8,8)
    permute_channels(model, xb, n_evaluations=2000)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    loaded.load_state_dict(model.state_dict())
    assert _change(outputs(model, xb), outputs(loaded, xb))==0

def test_restoring_a_changed_model_is_refused():
    model,xb = generic(small_net()),torch.randn(2,3,8,8)
    permute_channels(model, xb, n_evaluations=2000)
    model[8] = nn.Identity()
    with pytest.raises(ValueError, match='8.weight'): restore_channel_order(model)

# arguments and report

def test_patterns_and_params():
    model,xb = nn.Sequential(nn.Linear(4,48), nn.ReLU(), nn.Linear(48,18), nn.ReLU(), nn.Linear(18,48), nn.ReLU(), nn.Linear(48,4)),torch.randn(3,4)
    res,change = permute(model, xb, n=2, m=8)
    assert change<1e-4 and res.permuted==['2.weight','6.weight'] and res.pattern=='2:8'
    assert {g.weights[0]:g.status for g in res.groups}['4.weight']=='frozen: 18 columns, which is no multiple of 8'
    res,_ = permute(model, xb, params=['6','4'])
    assert res.permuted==['6.weight']
    assert permute(model, xb, params=[])[0].groups==[]
    assert permute(model, xb, n='2:8')[0].pattern=='2:8'
    for n in ('2x4','4:2','',2.,None):
        with pytest.raises(ValueError, match='n of m must be whole numbers'): permute_channels(model, xb, n)
    with pytest.raises(ValueError, match='did you mean'): permute_channels(model, xb, params='4.wieght')

def test_finished_pattern_is_left_alone():
    model = generic(nn.Sequential(nn.Linear(4,16), nn.ReLU(), nn.Linear(16,4)))
    model[2].weight.data[:,torch.arange(16)%4>1] = 0
    res = permute_channels(model, torch.randn(3,4))
    assert [g.status for g in res.groups]==['identity is best','frozen: an input of the model']
    assert channel_order(model)=={}

def test_same_seed_same_permutation():
    orders = []
    for seed in (0,0,1):
        model = generic(small_net())
        permute_channels(model, torch.randn(2,3,8,8), seed=seed, n_evaluations=2000)
        orders.append({k:v.tolist() for k,v in channel_order(model).items()})
    assert orders[0]==orders[1]!=orders[2]

def test_weights_that_are_not_finite_are_named():
    model = small_net()
    model[3].weight.data[0,0,0,0] = torch.nan
    with pytest.raises(ValueError, match="'3.weight' holds NaN"): permute_channels(model, torch.randn(2,3,8,8))

def test_report():
    res,_ = permute(small_net(), torch.randn(2,3,8,8))
    text = repr(res)
    assert text.splitlines()[0].split()==['weights','channels','before','after','status']
    assert 'frozen: an input of the model' in text and 'permuted' in text.splitlines()[2]
    df = res.to_df()
    assert list(df.columns)==['weights','channels','before','after','status'] and len(df)==len(res.groups)==3
    assert (df.after>=df.before)[:2].all()

@dataclass
class Answer:
    value:Tensor

class Answers(ThreeLinears):
    def forward(self, x): return Answer(self.b(self.a(x)))

def test_outputs_in_objects_stay_in_order():
    torch.manual_seed(0)
    model,xb = Answers(),torch.randn(2,8)
    before = model(xb).value
    res = permute_channels(model, xb, n_evaluations=2000)
    assert res.permuted==['b.weight'] and torch.allclose(before, model(xb).value, atol=1e-5)

def test_wrapped_models_and_inputs():
    from fastai.torch_core import TensorBase
    model = generic(small_net())
    res = permute_channels(nn.DataParallel(model), TensorBase(torch.randn(2,3,8,8)), n_evaluations=2000)
    assert res.permuted==['3.weight','8.weight'] and ('3.weight',1) in channel_order(model)

@pytest.mark.parametrize('is_trained', [False,True])
def test_learners(is_trained):
    learn = tiny_learner(generic(small_net()), shape=(3,8,8), d_out=4, opt_func=Adam)
    if is_trained: learn.fit(1)
    x,before = torch.randn(2,3,8,8),deepcopy(learn.model.state_dict())
    memory = deepcopy(learn.opt.state[learn.model[3].weight]) if is_trained else {}
    res = permute_channels(learn, x, '2:4', n_evaluations=2000)
    order = channel_order(learn)
    assert res.permuted==['3.weight','8.weight'] and order and 'channel_order' in learn.model.state_dict()
    for k in ('grad_avg','sqr_avg') if is_trained else ():
        expected = memory[k]
        for d in (0,1): expected = expected.index_select(d, order['3.weight',d])
        assert torch.equal(learn.opt.state[learn.model[3].weight][k], expected)
    restore_channel_order(learn)
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
    if is_trained: assert torch.equal(learn.opt.state[learn.model[3].weight]['grad_avg'], memory['grad_avg'])

def test_a_given_optimizer_is_preferred_to_that_of_a_learner():
    learn = tiny_learner(generic(small_net()), shape=(3,8,8), d_out=4)
    learn.fit(1)
    opt = torch.optim.Adafactor(learn.model.parameters(), lr=1e-3)
    learn.model(torch.randn(2,3,8,8)).sum().backward()
    opt.step()
    with pytest.raises(ValueError, match='before its first step'): permute_channels(learn, torch.randn(2,3,8,8), optimizer=opt)
