"ASP's interface, its promises, and the checkpoint expectations of its reference"
import copy
import pytest, torch
from torch import nn
from fastsparse_create.all import *
from utils import mlp,tiny_learner,until_interrupted,Interrupt

def toy(n_in=8, hidden=32, n_out=8, batch=32):
    sizes = [n_in,hidden,hidden,hidden,n_out]
    return nn.Sequential(*(l for i,o in zip(sizes, sizes[1:]) for l in (nn.Linear(i, o), nn.LayerNorm([batch,o]))))

def train(model, optimizer, steps, batch=32):
    for _ in range(steps):
        x,y = torch.randn(batch, model[0].in_features),torch.randn(batch, model[-2].out_features)
        optimizer.zero_grad()
        (model(x)-y).square().sum().backward()
        optimizer.step()

def weights(model): return {k:v.clone() for k,v in model.state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

@pytest.mark.parametrize('pattern', ['m4n2_1d','m4n2_2d_best'])
@pytest.mark.parametrize('opt_func', [lambda ps: torch.optim.Adam(ps, 1e-3), lambda ps: torch.optim.SGD(ps, 1e-3, momentum=.9, weight_decay=1e-2)], ids=['adam','sgd'])
def test_resumed_from_checkpoint_is_uninterrupted_bit_for_bit(pattern, opt_func, tmp_path):
    def _start():
        model = toy()
        opt = opt_func(model.parameters())
        ASP.init_model_for_pruning(model, pattern, allow_recompute_mask=True)
        ASP.init_optimizer_for_pruning(opt)
        return model,opt
    torch.manual_seed(4873)
    model,opt = _start()
    train(model, opt, 60)
    ASP.compute_sparse_masks(model)
    train(model, opt, 60)
    torch.save({'model':model.state_dict(), 'opt':opt.state_dict()}, tmp_path/'part1.pth')
    torch.manual_seed(99875)
    train(model, opt, 40)

    resumed,resumed_opt = _start()
    state = torch.load(tmp_path/'part1.pth', weights_only=True)
    resumed.load_state_dict(state['model'])
    resumed_opt.load_state_dict(state['opt'])
    assert ASP.is_sparsity_enabled(resumed)
    torch.manual_seed(99875)
    train(resumed, resumed_opt, 40)
    assert same(weights(model), weights(resumed))
    assert [p.name for p in masked_params(model)]==['2.weight','4.weight','6.weight']

def test_which_layers_are_pruned():
    model = nn.ModuleDict({f'{o}x{i}':nn.Linear(i, o) for o,i in [(8,16),(16,8),(8,24),(8,32),(12,16),(4,16),(40,40),(10,512)]})
    report = ASP.init_model_for_pruning(model)
    assert report.pruned==['8x16.weight','8x32.weight']
    assert all('multiple of 8 outputs by 16 inputs' in why for why in report.skipped.values()) and len(report.skipped)==6
    frozen = nn.ModuleList([nn.Linear(16, 8).requires_grad_(False), nn.Linear(16, 8)])
    assert "0.weight: skipped, it doesn't train" in str(ASP.init_model_for_pruning(frozen))

def odd(): return nn.Sequential(nn.Linear(64,300), nn.ReLU(), nn.Linear(300,100), nn.ReLU(), nn.Linear(100,10))

def untouched(model): return not ASP.already_init_asp_model(model) and not masked_params(model) and not list(model.buffers())

@pytest.mark.parametrize('prune', [ASP.init_model_for_pruning, lambda m: ASP.prune_trained_model(m, torch.optim.SGD(m.parameters(), .1))])
def test_nothing_left_to_prune(prune):
    model = odd()
    with pytest.raises(ValueError, match=r'nothing is left to prune.* 0.weight: shape \(300, 64\) is no multiple of 8 outputs by 16 inputs'): prune(model)
    assert untouched(model)
    with pytest.raises(ValueError, match='no layer of the whitelist'): prune(nn.Sequential(nn.ReLU(), nn.LayerNorm(4)))

def test_nothing_left_to_prune_in_a_learner():
    learn = tiny_learner(odd(), shape=(64,), d_out=10, cbs=ASPCallback())
    for _ in range(2):
        with pytest.raises(ValueError, match='nothing is left to prune'): learn.fit(1)
        assert untouched(learn.model)

@pytest.mark.parametrize('optimizer,error,says', [
    (None, TypeError, 'optimizer must be a PyTorch or fastai optimizer, got None'),
    (torch.optim.SGD(nn.Linear(2,2).parameters(), .1), RuntimeError, 'holds no parameter')])
def test_the_optimizer_is_checked_before_anything_is_changed(optimizer, error, says):
    model = toy(16, 32)
    with pytest.raises(error, match=says): ASP.prune_trained_model(model, optimizer)
    assert untouched(model)
    with pytest.raises(error, match=says): ASP.init_optimizer_for_pruning(optimizer)

def test_the_optimizer_of_another_initialized_model_is_refused():
    model,other = toy(16, 32),nn.Linear(16, 8)
    ASP.init_model_for_pruning(other)
    with pytest.raises(RuntimeError, match='holds no parameter'): ASP.prune_trained_model(model, torch.optim.SGD(other.parameters(), .1))
    assert untouched(model)

@pytest.mark.parametrize('example', [None, torch.randn(4,16), torch.randn(4,5)])
def test_a_model_that_cannot_be_pruned_is_left_as_it_was(example):
    model = nn.Sequential(nn.Linear(16,32), nn.ReLU(), nn.Linear(32,8))
    if example is None or example.shape[1]==16: model[0].weight.data[0,0] = torch.nan
    before = weights(model)
    with pytest.raises(ValueError, match="NaN|doesn't run through the model"):
        ASP.prune_trained_model(model, torch.optim.SGD(model.parameters(), .1), example_input=example)
    assert untouched(model) and before.keys()==weights(model).keys()

@pytest.mark.parametrize('arg,value', [('whitelist',['Linear']), ('whitelist','Linear'), ('whitelist',nn.Linear), ('custom_layer_dict',{'Linear':['weight']})])
def test_classes_of_layers_are_checked(arg, value):
    with pytest.raises(TypeError, match=f'ASP: {arg} must be .*classes of layers'): ASP.init_model_for_pruning(nn.Linear(16,8), **{arg:value})

def test_several_models_in_one_process():
    models = [nn.Linear(16, 8), nn.Linear(32, 16)]
    opts = [torch.optim.SGD(m.parameters(), .1, momentum=.9) for m in models]
    for m,o in zip(models, opts): ASP.prune_trained_model(m, o)
    for m,o in zip(models, opts):
        m(torch.randn(4, m.in_features)).square().sum().backward()
        o.step()
    assert all(is_nm(m.weight, 2, 4) and m.weight.count_nonzero()==m.weight.numel()//2 for m in models)

def test_subclasses_attention_and_convolutions_are_pruned():
    class Mine(nn.Linear): pass
    model = nn.ModuleList([Mine(16, 8), nn.Conv2d(16, 8, 3), nn.MultiheadAttention(16, 2)])
    report = ASP.prune_trained_model(model, torch.optim.SGD(model.parameters(), .1))
    assert report.pruned==['0.weight','1.weight','2.in_proj_weight','2.out_proj.weight']
    assert all(is_nm(p.param, 2, 4) for p in masked_params(model))

def test_recompute_and_restore():
    model = toy(16, 40)
    opt = torch.optim.SGD(model.parameters(), .01, momentum=.9)
    ASP.init_model_for_pruning(model, allow_recompute_mask=True)
    ASP.init_optimizer_for_pruning(opt)
    dense = weights(model)
    ASP.compute_sparse_masks(model)
    cut = weights(model)
    ASP.compute_sparse_masks(model)
    assert same(cut, weights(model))
    ASP.restore_pruned_weights(model)
    assert same({k:v for k,v in dense.items()}, weights(model)) and not ASP.is_sparsity_enabled(model)
    train(model, opt, 5)
    assert measured_sparsity(model)<.05

def test_a_second_choice_needs_permission():
    model = nn.Linear(16, 8)
    ASP.prune_trained_model(model, torch.optim.SGD(model.parameters(), .1))
    with pytest.raises(RuntimeError, match='allow_recompute_mask'): ASP.compute_sparse_masks(model)
    with pytest.raises(RuntimeError, match='allow_recompute_mask'): ASP.restore_pruned_weights(model)

def test_an_optimizer_whose_steps_are_dense_moves_nothing_masked():
    class Drift(torch.optim.Optimizer):
        def __init__(self, params): super().__init__(params, {})
        @torch.no_grad()
        def step(self, closure=None):
            for g in self.param_groups:
                for p in g['params']: p.add_(1.)
    model = nn.Linear(16, 8)
    opt = Drift(model.parameters())
    ASP.prune_trained_model(model, opt)
    model(torch.randn(2,16)).sum().backward()
    opt.step()
    assert is_nm(model.weight, 2, 4) and opt.state_dict()

def test_permutation_keeps_the_function_and_more_magnitude():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16,64), nn.ReLU(), nn.Linear(64,64), nn.ReLU(), nn.Linear(64,8)).eval()
    x = torch.randn(4,16)
    plain,before = copy.deepcopy(model),model(x)
    report = ASP.init_model_for_pruning(model, example_input=x)
    ASP.compute_sparse_masks(model)
    ASP.prune_trained_model(plain, torch.optim.SGD(plain.parameters(), .1))
    assert report.permutation.permuted
    kept = [sum(p.param.abs().sum() for p in masked_params(m)) for m in (model,plain)]
    assert kept[0]>kept[1]
    assert not torch.allclose(model(x), before)  # pruned, of course

def test_why_channels_are_not_permuted_is_reported():
    assert 'channels are not permuted, as there is no example_input' in str(ASP.init_model_for_pruning(nn.Linear(16,8)))
    assert 'permuted' not in str(ASP.init_model_for_pruning(nn.Linear(16,8), allow_permutation=False))
    model = nn.Linear(16,8)
    report = ASP.init_model_for_pruning(model, lambda w: w>0, example_input=torch.randn(2,16))
    ASP.compute_sparse_masks(model)
    assert 'channels are not permuted for a mask_calculator that is a function' in str(report) and report.permutation is None

def test_only_training_prunes(tmp_path):
    learn = tiny_learner(mlp(16, 32), shape=(16,), path=tmp_path, cbs=ASPCallback())
    before = weights(learn.model)
    learn.create_opt()
    learn.validate()
    learn.get_preds()
    learn.lr_find(num_it=20, show_plot=False)
    assert same(before, weights(learn.model)) and not ASP.already_init_asp_model(learn.model)
    learn.fit(1)
    assert is_nm(learn.model[2].weight, 2, 4) and learn.model[2].weight.count_nonzero()==32*16
    assert learn.recorder.metric_names[-2]=='sparsity' and learn.final_record[-1]==pytest.approx(.5)
    learn.validate()

def test_later_fits_prune_nothing_anew():
    learn = tiny_learner(mlp(16, 32), shape=(16,), cbs=[ASPCallback('2:4'),Interrupt('before_step', 2)])
    until_interrupted(learn.fit, 2)
    mask = masked_params(learn.model)[0].mask.clone()
    learn.remove_cbs(Interrupt)
    learn.fit(1)
    assert mask.equal(masked_params(learn.model)[0].mask) and is_nm(learn.model[2].weight, 2, 4)

def test_custom_layers_and_functions():
    class Table(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.randn(8,16))
        def forward(self, x): return x@self.w.T
    model = Table()
    report = ASP.init_model_for_pruning(model, lambda w: w>=w.median(), custom_layer_dict={Table:['w']})
    ASP.compute_sparse_masks(model)
    assert report.pruned==['w'] and abs(measured_sparsity(model)-.5)<.02

def test_optimizer_of_another_model_is_refused():
    with pytest.raises(RuntimeError, match='holds no parameter'): ASP.init_optimizer_for_pruning(torch.optim.SGD(nn.Linear(2,2).parameters(), .1))
