"Powerpropagation: what is stored changes where a window opens and closes, what is computed doesn't"
import pickle,pytest
from copy import deepcopy
from functools import partial
from test_manager import adam,assert_equal_epochs,assert_resumes,assert_skips_overflows,by_fit,by_loop,managed,sgd
from utils import *
from fastsparse_create.callback.learning_rate import *
from fastsparse_create.callback.powerpropagation import *
from fastsparse_create.callback.pruning import *
from fastsparse_create.callback.quantization import *
from fastsparse_create.effective import *
from fastsparse_create.recipe.compile import Recipe
from fastsparse_create.selection import *
from fastsparse_create.sparsify import *

def powers(start=0., end=3., alpha=3., **kwargs): return PowerpropagationModifier(start, end, alpha=alpha, **kwargs)
def alphas(model): return [alpha_of(m) for m in model.modules() if type(m).__name__=='Linear']
def stored(model): return {n:s.param.detach().clone() for n,s in prunable(model).items()}
def read(model): return {n:getattr(*s.owners[0]).detach().clone() for n,s in prunable(model).items()}
def close(a, b, tol=1e-5): assert torch.allclose(a, b, rtol=tol, atol=tol)

x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))

# formulas

@pytest.mark.parametrize('alpha', [1.,1.5,2.,3.,4.5])
def test_power_and_its_gradient(alpha):
    w = torch.tensor([-1.5,-.2,-1e-3,0.,1e-3,.7,2.], dtype=torch.float64, requires_grad=True)
    y = power(w, alpha)
    assert y.equal(w.detach()*w.detach().abs()**(alpha-1))
    g, = torch.autograd.grad(y.sum(), w)
    close(g, alpha*w.detach().abs()**(alpha-1), 1e-12)
    nonzero = w.detach()[w!=0].requires_grad_()
    assert torch.autograd.gradcheck(lambda t: power(t, alpha), nonzero, eps=1e-8, atol=1e-5)
    close(root(y, alpha).detach(), w.detach(), 1e-12)
    with torch.no_grad(): assert power(w, alpha).equal(y)

def test_gradients_in_a_network():
    "The stored weight's gradient is that of the weight times alpha*|theta|**(alpha-1)"
    model,plain = mlp(),mlp()
    set_alpha(model, '__ALL_PRUNABLE__', 3.)
    plain.load_state_dict({**plain.state_dict(), **read(model)})
    for m in model,plain: m(x).square().sum().backward()
    for n,s in prunable(model).items(): close(s.param.grad, 3*s.param.detach().square()*dict(plain.named_parameters())[n].grad)

# the window

@pytest.mark.parametrize('opt_func', [partial(SGD, mom=.9), Adam, ranger, partial(OptimWrapper, opt=torch.optim.AdamW), partial(OptimWrapper, opt=torch.optim.Adagrad), partial(OptimWrapper, opt=torch.optim.NAdam)])
@pytest.mark.parametrize('start,end', [(0.,2.), (.5,1.5), (1.,3.)])
def test_function_is_the_same_at_both_ends(opt_func, start, end):
    learn = tiny_learner(opt_func=opt_func)
    before,after = Note('before_batch', lambda cb: cb.model(x).detach(), order=-1),Note('before_batch', lambda cb: (cb.model(x).detach(),alphas(cb.model)))
    learn.fit(4, 1e-3, cbs=[powers(start, end), before, after])
    for i,(b,(a,_)) in enumerate(zip(before.notes, after.notes)):
        if i==end*4: assert a.equal(b)
        else: close(a, b)
    assert [n[0] for _,n in after.notes]==[3. if start<=i/4<end else 1. for i in range(16)]
    assert all(type(m) is nn.Linear for m in (learn.model[0],learn.model[2],learn.model[4])) and list(learn.model.state_dict())==list(mlp().state_dict())

def test_window_up_to_the_end_of_training_closes_before_the_last_validation():
    learn = tiny_learner()
    seen = Note('after_epoch', lambda cb: alphas(cb.model)[0])
    learn.fit(3, cbs=[powers(0, 3), seen])
    assert seen.notes==[3.,3.,1.]

def test_no_end():
    learn = tiny_learner()
    learn.fit(2, cbs=powers(0, -1))
    y = learn.model(x)
    assert alphas(learn.model)==[3.]*3
    store_effective(learn.model)
    assert learn.model(x).equal(y) and type(learn.model[0]) is nn.Linear and list(learn.model.state_dict())==list(mlp().state_dict())

def test_alpha_of_one_changes_nothing():
    with_,without = tiny_learner(),tiny_learner()
    with_.fit(2, cbs=powers(0, 1, 1.))
    without.fit(2)
    assert same(weights(with_.model), weights(without.model))

@pytest.mark.parametrize('opt_func', [partial(SGD, mom=.9), Adam, ranger, partial(OptimWrapper, opt=torch.optim.AdamW), partial(OptimWrapper, opt=torch.optim.Adagrad)])
def test_optimizer_begins_anew_with_these_parameters_only(opt_func):
    learn = tiny_learner(opt_func=opt_func)
    def look(cb): return [bool(any(s.any() for s in memory(cb.opt, cb.model[i].weight if isinstance(cb.model[i].weight, nn.Parameter) else cb.model[i]._parameters['weight']) if not any(s is t for t in slow_weights(cb.opt, cb.model[i]._parameters['weight'])))) for i in (0,2)]
    notes = Note('before_batch', look)
    learn.fit(3, cbs=[powers(1, 2, params='0.weight'), notes])
    assert [n[0] for n in notes.notes]==[i not in (0,4,8) for i in range(12)] and [n[1] for n in notes.notes]==[i!=0 for i in range(12)]

def test_slow_weights_of_lookahead_follow():
    learn = tiny_learner(opt_func=ranger)
    learn.fit(3, lr=0., wd=0., cbs=powers(1, 2))
    for p in learn.model.parameters():
        for s in slow_weights(learn.opt, p): close(s, p.detach())

def test_trains_like_the_written_out_network():
    "The same as a module that computes powers by itself, trained by SGD"
    class PowerLinear(nn.Linear):
        def forward(self, x): return nn.functional.linear(x, self.weight*self.weight.abs()**2, self.bias)
    plain = mlp()
    own = nn.Sequential(PowerLinear(4,16), nn.ReLU(), PowerLinear(16,16), nn.ReLU(), PowerLinear(16,2))
    own.load_state_dict({k:root(v, 3.) if v.ndim>1 else v for k,v in plain.state_dict().items()})
    learn,expected = tiny_learner(plain),tiny_learner(own)
    learn.fit(2, cbs=powers(0, -1))
    expected.fit(2)
    for a,b in zip(stored(learn.model).values(), (p for p in own.parameters() if p.ndim>1)): close(a, b.detach())

# pruning

@pytest.mark.parametrize('swap', [False,True])
@pytest.mark.parametrize('is_global', [False,True])
def test_pruned_while_powers_train(swap, is_global):
    learn,witness = tiny_learner(),Witness()
    mods = [powers(0, 3, 2.), GMPruningModifier(.05, .8, 0, 2, .5, global_sparsity=is_global)]
    read_zeros = Note('after_pred', lambda cb: all(torch.equal(w==0, stored(cb.model)[n]==0) for n,w in read(cb.model).items()))
    learn.fit(4, cbs=[*mods[::1-2*swap], witness, read_zeros])
    assert witness.seen==[] and witness.steps==16 and all(read_zeros.notes)
    assert n_masked(learn.model)==(round(352*.8) if is_global else sum(round(n*.8) for n in (64,256,32))) and measured_sparsity(learn.model)==n_masked(learn.model)/352

def test_same_masks_as_of_the_powers():
    def masks(alpha):
        learn = tiny_learner(lr=0.)
        learn.fit(1, cbs=[powers(0, -1, alpha), GMPruningModifier(.5, .5, 0, 1, 1)])
        return {p.name:p.mask for p in masked_params(learn.model)}
    assert same(masks(1.), masks(3.))

def test_a_sparse_model_stays_so():
    learn = sparse_learner(.6)
    learn.fit(3, cbs=[powers(1, 2), w:=Witness()])
    assert w.seen==[] and measured_sparsity(learn.model)==n_masked(learn.model)/352

# layers

class _First(nn.Module):
    def forward(self, x): return x[0] if isinstance(x, tuple) else x

@pytest.mark.parametrize('layer,shape', [(nn.Linear(6, 5), (4,6)), (nn.Conv1d(3, 4, 3), (2,3,8)), (nn.Conv2d(3, 4, 3), (2,3,8,8)), (nn.Conv3d(2, 3, 2), (2,2,4,4,4)),
    (nn.ConvTranspose1d(3, 4, 3), (2,3,8)), (nn.ConvTranspose2d(3, 4, 3), (2,3,8,8)), (nn.ConvTranspose3d(2, 3, 2), (2,2,4,4,4)), (nn.RNNCell(6, 5), (4,6)),
    (nn.TransformerEncoderLayer(8, 2, 16, dropout=0., batch_first=True), (2,5,8))], ids=lambda o: type(o).__name__)
def test_layers(layer, shape):
    layer,inp = deepcopy(layer),torch.randn(shape)
    y = layer(inp).detach()
    changed = set_alpha(layer, '__ALL_PRUNABLE__', 2.5)
    assert changed
    for mode in True,False:
        layer.train(mode)
        close(layer(inp).detach(), y)
        with torch.no_grad(): close(layer(inp), y)
    layer.train()
    layer(inp).square().sum().backward()
    assert all(s.param.grad is not None for s in changed)
    set_alpha(layer, '__ALL_PRUNABLE__', 1.)
    close(layer(inp).detach(), y)

def test_tied_weights_change_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.Linear(4, 4),nn.Linear(4, 4)
            self.b.weight = self.a.weight
        def forward(self, x): return self.b(self.a(x))[:,:2]
    torch.manual_seed(0)
    model = Tied()
    y = model(x).detach()
    set_alpha(model, '__ALL_PRUNABLE__', 2.)
    close(model(x).detach(), y)
    learn = tiny_learner(model)
    learn.fit(2, cbs=powers(0, 1))
    assert learn.model.a.weight is learn.model.b.weight

def test_refused_before_anything_changes():
    model = nn.Sequential(nn.LSTM(4, 4, batch_first=True))
    before = weights(model)
    with pytest.raises(ValueError, match="'0.weight_ih_l0' can't be computed"): tiny_learner(model).fit(1, cbs=powers())
    assert same(before, weights(model))

@pytest.mark.parametrize('make,error,message', [
    (lambda: powers(alpha=.9), ValueError, 'alpha must be at least 1'), (lambda: powers(alpha='2'), TypeError, 'alpha'), (lambda: powers(2, 1), ValueError, 'end_epoch 1 lies before'),
    (lambda: powers(params=1), TypeError, 'params'), (lambda: powers(strict=1), TypeError, 'strict')])
def test_arguments(make, error, message):
    with pytest.raises(error, match=message): make()

def test_params_that_match_nothing():
    with pytest.raises(ValueError, match="did you mean '2.weight'"): tiny_learner().fit(1, cbs=powers(params=['2.wieght']))
    tiny_learner().fit(1, cbs=powers(params=['2.wieght'], strict=False))

def test_two_at_once_are_refused():
    with pytest.raises(ValueError, match="change '2.weight' at the same time"): tiny_learner().fit(1, cbs=[powers(0, 2, params='2.weight'), powers(1, 3)])
    learn = tiny_learner()
    learn.fit(3, cbs=[powers(0, 1, 2.), powers(1, 2, 3.), powers(2, 3, 2., params='0.weight')])
    assert alphas(learn.model)==[1.]*3

def test_quantization_waits():
    with pytest.raises(ValueError, match='quantization starts at epoch 1, before this has ended'): tiny_learner().fit(3, cbs=[powers(0, 2), QuantizationModifier(1.)])
    learn = tiny_learner()
    learn.fit(3, cbs=[powers(0, 1.5), QuantizationModifier(1.5)])
    assert [type(m).__name__ for m in learn.model if hasattr(m, 'weight')]==['QuantLinear']*3

def test_recipe():
    text = 'modifiers:\n  - !PowerpropagationModifier\n    start_epoch: 0.0\n    end_epoch: 2.0\n    params: __ALL_PRUNABLE__\n    alpha: 2.0\n  - !EpochRangeModifier\n    start_epoch: 0.0\n    end_epoch: 3.0\n'
    recipe = Recipe.from_string(text)
    assert str(Recipe.from_string(str(recipe)))==str(recipe) and recipe.compile()[0].alpha==2.
    learn = tiny_learner()
    learn.fit(3, cbs=recipe.callbacks())

# other callbacks

def test_several_fits_are_one():
    whole,parts,mod = tiny_learner(),tiny_learner(),powers(1, 3)
    whole.fit(4, cbs=powers(1, 3))
    for _ in range(4): parts.fit(1, cbs=mod)
    assert same(weights(whole.model), weights(parts.model))

def test_lr_find_in_the_window():
    learn = tiny_learner(cbs=powers(0, 3), n_trn=8)
    learn.fit(1)
    before = stored(learn.model)
    learn.lr_find(show_plot=False, num_it=6)
    assert same(before, stored(learn.model)) and alphas(learn.model)==[3.]*3

def test_accumulated_gradients_of_other_weights_are_dropped():
    learn = tiny_learner(n_trn=8)
    grads = Note('before_batch', lambda cb: [s.param.grad for s in prunable(cb.model).values()], order=50)
    learn.fit(2, cbs=[powers(.375, 1.375), GradientAccumulation(16), grads])
    assert [all(g is None for g in gs) for gs in grads.notes][3] and alphas(learn.model)==[1.]*3

def test_running_averages_follow():
    from torch.optim.swa_utils import AveragedModel
    @trusted
    class Average(Callback):
        def before_fit(self): self.average = AveragedModel(self.model)
        def after_step(self): self.average.update_parameters(self.model)
    learn,average = tiny_learner(lr=0.),Average()
    y = learn.model(x).detach()
    learn.fit(3, wd=0., cbs=[average, powers(1, 2)])
    close(average.average(x).detach(), y, 1e-4)

# checkpoints

@pytest.mark.parametrize('name', ['sgd','adam','ranger'])
def test_resumed_in_a_fresh_learner_is_uninterrupted(name, tmp_path):
    opt_func = dict(sgd=partial(SGD, mom=.9), adam=Adam, ranger=ranger)[name]
    whole,resumed = (tiny_learner(path=tmp_path, opt_func=opt_func) for _ in range(2))
    def cbs(): return [powers(0, 3), GMPruningModifier(0., .8, 0, 4, .5)]
    whole.fit(4, cbs=[*cbs(), SaveModelCallback(every_epoch=True, with_opt=True)])
    attach_masks(resumed.model)
    set_alpha(resumed.model, '__ALL_PRUNABLE__', 1.)
    resumed.create_opt()
    resumed.load('model_1')
    assert alphas(resumed.model)==[3.]*3
    resumed.fit(4, cbs=cbs(), start_epoch=2)
    assert same(weights(whole.model), weights(resumed.model)) and alphas(resumed.model)==[1.]*3 and violations(resumed.model, resumed.opt)==[]

def test_best_epoch_within_the_window_is_translated(tmp_path):
    learn = tiny_learner(path=tmp_path)
    first = Note('after_epoch', lambda cb: cb.model(x).detach())
    learn.fit(3, cbs=[powers(0, 2), SaveModelCallback(monitor='train_loss', comp=np.greater), first])
    close(learn.model(x).detach(), first.notes[0])
    assert alphas(learn.model)==[1.]*3

def test_files_of_other_windows(tmp_path):
    learn = tiny_learner(path=tmp_path)
    learn.save('plain')
    y = learn.model(x).detach()
    learn.fit(2, cbs=powers(1, 3))
    learn.save('open')
    z = learn.model(x).detach()
    learn.load('plain')
    close(learn.model(x).detach(), y)
    assert alphas(learn.model)==[3.]*3
    learn.load('open')
    assert learn.model(x).equal(z)
    with pytest.raises(RuntimeError, match='weight_power'): tiny_learner(path=tmp_path).load('open')

@pytest.mark.parametrize('copy_', [deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['deepcopy','pickle'])
def test_copies_compute_the_same(copy_):
    learn = tiny_learner()
    learn.fit(2, cbs=powers(0, 3))
    copied = copy_(learn.model)
    assert copied(x).equal(learn.model(x)) and same(stored(copied), stored(learn.model))
    fresh = mlp()
    set_alpha(fresh, '__ALL_PRUNABLE__', 1.)
    fresh.load_state_dict(copied.state_dict())
    assert fresh(x).equal(learn.model(x))

def test_export(tmp_path):
    learn = tiny_learner(path=tmp_path, cbs=powers(0, 3))
    learn.fit(2)
    learn.export('e.pkl')
    loaded,dls = load_learner(tmp_path/'e.pkl'),tiny_dls()
    assert loaded.model(x).equal(learn.model(x))
    loaded.dls = dls
    for l in learn,loaded: l.fit(2)
    assert alphas(loaded.model)==alphas(learn.model)==[1.]*3

@pytest.mark.parametrize('error', [ValueError,KeyboardInterrupt])
def test_interrupted_forward_pass_breaks_nothing(error):
    class Fails(nn.Module):
        n = -1
        def forward(self, x):
            self.n += 1
            if self.n==5: raise error
            return x
    learn,mod = tiny_learner(nn.Sequential(*mlp(), Fails())),powers(0, 3)
    with pytest.raises(error): learn.fit(3, cbs=mod)
    deepcopy(learn.model)
    learn.fit(4, cbs=mod)
    assert alphas(learn.model)==[1.]*3

@pytest.mark.parametrize('when', ['before','called','after'])
def test_compiled(when):
    from torch._dynamo import reset
    reset()
    expected,learn = tiny_learner(),tiny_learner()
    expected.fit(3, cbs=powers(0, 2))
    if when!='after': learn.model = torch.compile(learn.model, backend='eager')
    if when=='called': learn.model(x).sum().backward(), learn.model.zero_grad()
    mod = powers(0, 2)
    learn.fit(1, cbs=mod)
    if when=='after': learn.model = torch.compile(learn.model, backend='eager')
    learn.fit(2, cbs=mod)
    for a,b in zip(weights(expected.model).values(), weights(learn.model).values()): close(a, b)

# plain loops

cases = dict(
    half  = lambda: [powers(.5, 3.)],
    whole = lambda: [powers(0., 4.)],
    never = lambda: [powers(1., -1)],
    gmp   = lambda: [powers(0., 3., 2.), GMPruningModifier(.05, .8, .5, 3.5, .25)],
    some  = lambda: [powers(0., 1., 2., params='0.weight'), powers(1., 3., 4., params=['0.weight','2.weight']), LearningRateFunctionModifier('cosine', .05, .001, .5, 3.5)],
)

@pytest.mark.parametrize('opt_func', [sgd,adam], ids=['sgd','adam'])
@pytest.mark.parametrize('name', cases)
def test_equals_fit(name, opt_func): assert_equal_epochs(by_fit(opt_func, cases[name]), by_loop(opt_func, cases[name]))

@pytest.mark.parametrize('at,first', [(1,'model'), (8,'manager'), (13,'manager'), (16,'model'), (21,'model'), (30,'manager')])
@pytest.mark.parametrize('name', cases)
def test_resumed_loop(name, at, first): assert_resumes(cases[name], at, first, noop)

@pytest.mark.parametrize('name', ['half','gmp'])
def test_overflows_are_no_steps(name): assert_skips_overflows(sgd, cases[name])
