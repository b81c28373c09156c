"When modifiers act, what they set, and what they refuse: schedules, pruning, learning rates, parameters, weight decay"
import math,pytest
from hypothesis import given,settings,strategies as st
from utils import *
from fastsparse_create.callback.learning_rate import *
from fastsparse_create.callback.pruning import *
from fastsparse_create.callback.training import *
from fastsparse_create.schedule import *
from fastsparse_create.selection import *
import copy,logging

class ProbeModifier(Modifier):
    "Remembers which epoch it was called for, and how much of the data had been seen"
    def __init__(self, start_epoch=-1., end_epoch=-1., update_frequency=-1.):
        super().__init__(start_epoch, end_epoch, update_frequency)
        self.seen,self.of_fit = [],[]
    def update(self, epoch):
        self.seen.append((round(epoch,6), self.now, self.training))
        self.of_fit.append(self.epoch+self.iter/self.n_iter)

def probe(n_epoch, *args, n_trn=4, fits=None, **kwargs):
    "The epochs of all updates in fits of a tiny learner"
    learn,mod = tiny_learner(n_trn=n_trn, bs=2),ProbeModifier(*args)
    for n in fits or [n_epoch]: learn.fit(n, cbs=mod, **kwargs)
    return mod.seen

def epochs(seen): return [e for e,_,_ in seen]

def sequential():
    "The layers of the conformance cases"
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8,16), nn.ReLU(), nn.Linear(16,32), nn.ReLU(), nn.Linear(32,16), nn.ReLU(), nn.Linear(16,8))

# ticks

@pytest.mark.parametrize('args,expected', [
    ((10,25,2), [*range(10,25,2),25]), ((0,15,1), [*range(16)]), ((0,4,1.5), [0,1.5,3,4]), ((1,2,10), [1,2]), ((2,2,1), [2]),
    ((0,1,0), [0,.25,.5,.75,1]), ((-1,1,-1), [0,.25,.5,.75,1]), ((2.5,3.5,.5), [2.5,3,3.5]), ((0,1,.01), [0,.25,.5,.75,1])])
def test_every_promised_update_happens_once(args, expected):
    assert epochs(probe(math.ceil(args[1]), *args))==expected

def test_a_tenth_of_an_epoch_does_not_drift():
    "21 updates in 2 epochs of 10 batches, where adding floats to the last one gave 16"
    seen = probe(2, 0, 2, .1, n_trn=10)
    assert epochs(seen)==[round(i*.1,6) for i in range(21)]
    assert all(abs(now-e)<1e-6 for e,now,_ in seen[:-1])

def test_updates_come_before_the_batch_at_which_they_fall():
    seen = probe(3, .6, 2.3, 1.)
    assert [(e,now) for e,now,_ in seen]==[(.6,.75),(1.6,1.75),(2.3,2.5)]

def test_updates_stop_where_training_stops():
    assert epochs(probe(3, 0, 10, 1))==[0,1,2,3]
    assert epochs(probe(3, 5, 10, 1))==[]
    assert epochs(probe(2, 0, -1, .5))==[0,.5,1,1.5,2]

def test_last_update_precedes_the_last_validation():
    learn = tiny_learner()
    learn.fit(4, cbs=GMPruningModifier(.05, .8, 0, 4, 1))
    assert learn.recorder.values[-1][-1]==measured_sparsity(learn.model)==pytest.approx(.8, abs=2e-3)

def hundredths(low, high): return st.integers(round(low*100), round(high*100)).map(lambda o: o/100)

@settings(max_examples=300)
@given(hundredths(-1,5), hundredths(0,6), hundredths(-1,3), st.integers(1,7), st.integers(1,6))
def test_plans_are_complete_and_in_order(start, length, frequency, n_iter, n_epoch):
    end = max(0,start)+length
    plan = plan_ticks(start, end, frequency, n_iter, n_epoch)
    batches = list(plan)
    assert batches==sorted(batches) and list(plan.values())==sorted(plan.values())
    assert all(0<=b<=n_iter*n_epoch and max(0,start)<=e<=end+1e-9 and e<=n_epoch+1e-5 for b,e in plan.items())
    assert all(-1e-5<=b/n_iter-e<1/n_iter+1e-5 for b,e in plan.items())
    if end<=n_epoch: assert plan[max(batches)]==pytest.approx(end)
    if max(0,start)<=n_epoch-1/n_iter: assert min(batches)==math.ceil(max(0,start)*n_iter-1e-6)

@settings(max_examples=100)
@given(hundredths(0,2), hundredths(0,3), hundredths(.1,2), st.integers(1,5), st.integers(1,4))
def test_plans_of_two_fits_are_the_plan_of_one(start, length, frequency, n_iter, n_first):
    "Nothing is lost or done twice where one fit ends and the next begins"
    whole = plan_ticks(start, start+length, frequency, n_iter, 6)
    first = plan_ticks(start, start+length, frequency, n_iter, n_first)
    second = plan_ticks(start, start+length, frequency, n_iter, 6, done=n_first)
    last = max(first.values(), default=-1)
    both = {**first, **{b+n_first*n_iter:e for b,e in second.items() if e>last}}
    assert list(both.values())==pytest.approx(list(whole.values())) and list(both)==list(whole)

@pytest.mark.parametrize('fits', [[3,3],[1,2,3],[1]*6])
def test_fits_continue_one_another(fits):
    assert epochs(probe(6, 0, 6, .5, fits=fits))==epochs(probe(6, 0, 6, .5))

def test_resumed_fit_takes_up_the_latest_update():
    "Of what was skipped, only the last counts"
    assert epochs(probe(4, 0, 4, .5, start_epoch=2))==[2,2.5,3,3.5,4]
    assert epochs(probe(4, 0, 4, .75, start_epoch=2))==[1.5,2.25,3,3.75,4]

def test_clock_of_a_resumed_fit_is_absolute():
    "Epoch 3 is what the resumed fit calls epoch 3, whatever the fits before it were called"
    learn,mod = tiny_learner(),ProbeModifier(0, 6, 1)
    for _ in range(2): learn.fit(1, cbs=mod)
    learn.fit(4, cbs=mod, start_epoch=2)
    assert [of_fit for (e,_,_),of_fit in zip(mod.seen, mod.of_fit) if e==3]==[3]

def test_cancelled_fit_goes_on_where_it_was():
    "Two batches of the second epoch are lost for fastai, but they were trained"
    @trusted
    class Cancel(Callback):
        run_valid = False
        def after_batch(self):
            if (self.epoch,self.iter)==(1,1): raise CancelFitException
    learn,mod = tiny_learner(),ProbeModifier(0, 3, .25)
    learn.fit(3, cbs=[mod,Cancel()])
    assert epochs(mod.seen)==[0,.25,.5,.75,1,1.25]
    learn.fit(2, cbs=mod)
    assert epochs(mod.seen)==[i*.25 for i in range(13)]

def test_skipped_batches_do_not_lose_updates():
    @trusted
    class Skip(Callback):
        order,run_valid = -1,False
        def before_batch(self):
            if self.iter%2: raise CancelBatchException
    learn,mod = tiny_learner(),ProbeModifier(0, 2, .25)
    learn.fit(2, cbs=[mod,Skip()])
    assert epochs(mod.seen)[-1]==2 and mod.seen==sorted(mod.seen)

def test_accumulated_batches_count_as_data():
    assert epochs(probe(2, 0, 2, .5))==epochs(_accumulated())

def _accumulated():
    learn,mod = tiny_learner(bs=2),ProbeModifier(0, 2, .5)
    learn.fit(2, cbs=[mod,GradientAccumulation(4)])
    return mod.seen

def test_modifier_starts_anew_with_another_learner():
    mod = ProbeModifier(0, 1, .5)
    for _ in range(2): tiny_learner().fit(1, cbs=mod)
    assert epochs(mod.seen)==[0,.5,1]*2

def test_fine_tune_is_one_schedule():
    "One frozen epoch, two of all layers; the last update falls on the end"
    learn,mod = tiny_learner(splitter=halves),ProbeModifier(0, 3, .5)
    learn.fine_tune(2, cbs=mod)
    assert epochs(mod.seen)==[0,.5,1,1.5,2,2.5,3] and [t for *_,t in mod.seen]==[True]*7

@pytest.mark.parametrize('look', ['validate','lr_find','get_preds'])
def test_looking_moves_no_clock(look):
    learn,mod = tiny_learner(),ProbeModifier(0, 2, .5)
    learn.add_cb(mod)
    learn.fit(1)
    learn.lr_find(show_plot=False, num_it=6) if look=='lr_find' else getattr(learn, look)()
    assert epochs(mod.seen)==[0,.5,1]
    learn.fit(1)
    assert epochs(mod.seen)==[0,.5,1,1.5,2]

@pytest.mark.parametrize('look', ['validate','get_preds'])
def test_looking_during_a_fit_moves_no_clock(look):
    "A callback that validates on other data after each epoch: `before_fit` and `after_fit` come in the middle of a fit"
    def _run(*cbs):
        learn,mod = tiny_learner(),ProbeModifier(0, 3, .5)
        lrs = Note('after_pred', lambda cb: cb.opt.hypers[-1]['lr'])
        learn.fit(3, cbs=[mod, lrs, GMPruningModifier(0., .8, 0, 3, .5), LearningRateModifier('ExponentialLR', dict(gamma=.5), start_epoch=1), *cbs])
        return epochs(mod.seen),lrs.notes,measured_sparsity(learn.model)
    a,b = _run(),_run(Note('after_train', lambda cb: getattr(cb.learn, look)()))
    assert a[0]==b[0] and a[1]==pytest.approx(b[1]) and a[2]==b[2]

def test_training_set_needs_a_length():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self): return iter([(torch.ones(4), torch.ones(2))]*8)
    learn = tiny_learner(dls=DataLoaders(DataLoader(Endless(), bs=2), DataLoader(Endless(), bs=2)))
    with pytest.raises(Exception, match='known length'): learn.fit(1, cbs=ProbeModifier())

@pytest.mark.parametrize('kwargs,error,message', [
    (dict(start_epoch=3, end_epoch=2), ValueError, 'end_epoch 2 lies before start_epoch 3'), (dict(start_epoch=-2), ValueError, 'start_epoch must be at least -1, got -2'),
    (dict(end_epoch=-1.5), ValueError, 'end_epoch'), (dict(update_frequency=-2), ValueError, 'update_frequency'), (dict(start_epoch='1'), TypeError, "start_epoch must be a number, got '1'"),
    (dict(end_epoch=None), TypeError, 'end_epoch'), (dict(start_epoch=True), TypeError, 'start_epoch'), (dict(end_epoch=math.inf), ValueError, 'end_epoch'), (dict(start_epoch=math.nan), ValueError, 'start_epoch')])
def test_epochs_are_checked(kwargs, error, message):
    with pytest.raises(error, match=f'ProbeModifier.*{message}'): ProbeModifier(**kwargs)

# curves

@pytest.mark.parametrize('name,half', [('linear',2.5),('cubic',4.375),('inverse_cubic',1.031)])
def test_curves(name, half):
    assert [interpolate(x,0,1,0,5,name) for x in (-1,0,1,2)]==[0,0,5,5]
    assert interpolate(.5,0,1,0,5,name)==pytest.approx(half, abs=1e-3)

@pytest.mark.parametrize('name', list(inter_funcs))
def test_curves_are_exact_at_their_ends(name):
    assert interpolate(.1+.2, .3, 7.7, .05, .85, name)==pytest.approx(.05) and interpolate(7.7, .3, 7.7, .05, .85, name)==.85 and interpolate(3, 3, 3, 0, .8, name)==.8

def test_cubic_schedules_of_the_recipes():
    a,b = GMPruningModifier(.05, .85, 0, 40, 1),GMPruningModifier(.05, .8, 5, 20, 1)
    assert [a.sparsity_at(e, .05, .85) for e in (0,1,5,10,20,30,39,40)]==pytest.approx([.05,.108513,.314062,.5125,.75,.8375,.849988,.85], abs=1e-6)
    assert [b.sparsity_at(e, .05, .8) for e in (5,6,10,15,19,20)]==pytest.approx([.05,.190222,.577778,.772222,.799778,.8], abs=1e-6)

# gradual magnitude pruning

def sparsity_by_epoch(n_epoch, *mods, model=None, params=None, n_trn=1, **kwargs):
    "Measured at each batch, and after the last"
    learn = tiny_learner(model or sequential(), shape=(8,), d_out=8, n_trn=n_trn, bs=2, **kwargs)
    note = Note('after_pred', lambda cb: measured_sparsity(cb.model, params or '__ALL_PRUNABLE__'))
    learn.fit(n_epoch, cbs=[note,*mods])
    return note.notes+[measured_sparsity(learn.model, params or '__ALL_PRUNABLE__')],learn

def exact(sparsity, model=None, params='__ALL_PRUNABLE__'):
    "What `round(numel*sparsity)` zeros in each layer make"
    numels = [s.param.numel() for s in select(model or sequential(), params).values()]
    return sum(round(n*sparsity) for n in numels)/sum(numels)

@pytest.mark.parametrize('func', list(inter_funcs))
def test_sparsity_is_exactly_what_the_curve_promises(func):
    measured,_ = sparsity_by_epoch(17, GMPruningModifier(.05, .95, 0, 15, 1, inter_func=func))
    promised = [interpolate(e, 0, 15, .05, .95, func) for e in range(18)]
    assert measured==[exact(s) for s in promised] and measured==sorted(measured)

def test_first_forward_pass_of_the_window_is_sparse():
    measured,_ = sparsity_by_epoch(4, GMPruningModifier(.5, .8, 2, 3, 1))
    assert measured==[0,0,.5,exact(.8),exact(.8)]

def test_schedule_that_ends_with_training_is_completed():
    "`sparsity 0.05 -> 0.8` in 2 of 2 epochs ended at 0.703 elsewhere"
    measured,_ = sparsity_by_epoch(2, GMPruningModifier(.05, .8, 0, 2, -1), n_trn=4)
    assert measured==[exact(interpolate(i/4, 0, 2, .05, .8, 'cubic')) for i in range(9)]

def test_updates_off_the_grid_have_planned_values():
    measured,_ = sparsity_by_epoch(3, GMPruningModifier(.05, .8, .6, 2.3, 1), n_trn=4)
    at = [exact(interpolate(e, .6, 2.3, .05, .8, 'cubic')) for e in (.6,1.6,2.3)]
    assert measured==[0]*3+[at[0]]*4+[at[1]]*3+[at[2]]*3

def test_no_start_means_from_the_first_batch():
    assert sparsity_by_epoch(3, GMPruningModifier(.25, .75, -1, 2, 1))[0]==sparsity_by_epoch(3, GMPruningModifier(.25, .75, 0, 2, 1))[0]

def test_number_of_zeros_of_each_layer():
    learn = tiny_learner(nn.Sequential(nn.Linear(8,16), nn.Linear(16,4)), shape=(8,), d_out=4)
    learn.fit(1, cbs=GMPruningModifier(.8, .8, 0, 1, 1))
    assert [int((p.param==0).sum()) for p in masked_params(learn.model)]==[102,51]

@pytest.mark.parametrize('mask_type', ['unstructured','block4','[2, 2]',[1,4],'filter','channel'])
@pytest.mark.parametrize('cls', [GMPruningModifier,MagnitudePruningModifier,GlobalMagnitudePruningModifier])
def test_every_pattern_reaches_its_target_gradually(cls, mask_type):
    "And what is cut stays cut while sparsity rises"
    masks = Note('after_pred', lambda cb: [p.mask.clone() for p in masked_params(cb.model)])
    measured,learn = sparsity_by_epoch(5, masks, cls(.25, .75, 0, 4, 1, mask_type=mask_type))
    tolerance = .04 if cls is GlobalMagnitudePruningModifier else 0
    assert measured==pytest.approx([interpolate(e, 0, 4, .25, .75, 'cubic') for e in range(6)], abs=tolerance+.04)
    assert measured[-1]==pytest.approx(.75, abs=tolerance)
    for before,after in zip(masks.notes, masks.notes[1:]): assert not any((b&~a).any() for a,b in zip(before,after))

def test_the_smallest_go_first():
    learn = tiny_learner(lr=0.)
    w = learn.model[2].weight
    with torch.no_grad(): w.copy_(torch.arange(1, 257).view(16,16)*torch.where(torch.arange(16)%2==0, 1, -1)/100)
    gone = Note('after_pred', lambda cb: (w==0).sum().item())
    learn.fit(3, cbs=[gone, GMPruningModifier(.25, .75, 0, 2, 1, '2.weight', inter_func='linear')])
    assert gone.notes[::4]==[64,128,192] and (w.flatten()[:192]==0).all() and (w.flatten()[192:]!=0).all()

def test_smallest_filters_go_first():
    learn = tiny_learner(lr=0.)
    w = learn.model[2].weight
    with torch.no_grad(): w.copy_(torch.arange(1,17)[:,None]/100*torch.ones(16))
    learn.fit(2, cbs=GMPruningModifier(.25, .75, 0, 1, .25, '2.weight', mask_type='filter'))
    assert (w!=0).any(1).tolist()==[False]*12+[True]*4

def test_global_threshold_cuts_small_layers_deeper():
    model = sequential()
    with torch.no_grad(): model[2].weight.mul_(.2)
    measured,learn = sparsity_by_epoch(2, GlobalMagnitudePruningModifier(.05, .8, 0, 1, .5), model=model)
    by_layer = [measured_sparsity(model, [n]) for n in ('0.weight','2.weight','4.weight','6.weight')]
    total = sum(p.param.numel() for p in masked_params(model))
    assert measured[-1]==round(total*.8)/total and max(by_layer)==by_layer[1]>.95 and len(set(by_layer))==4

def test_from_param_starts_where_each_layer_is():
    model = sequential()
    with torch.no_grad(): model[0].weight[:8],model[4].weight[:4] = 0.,0.
    note = Note('after_pred', lambda cb: [measured_sparsity(cb.model, [f'{i}.weight']) for i in (0,2,4)])
    sparsity_by_epoch(3, GMPruningModifier('__FROM_PARAM__', .75, 0, 2, 1, inter_func='linear'), note, model=model)
    assert note.notes==[[.5,0,.25],[.625,.375,.5],[.75,.75,.75]]

def test_from_param_looks_when_its_window_opens():
    "The pruner before it has made zeros by then"
    measured,_ = sparsity_by_epoch(4, GMPruningModifier(.5, .5, 0, 1, 1), GMPruningModifier('__FROM_PARAM__', .75, 2, 3, 1, inter_func='linear'))
    assert measured==[.5,.5,.5,.75,.75]

def test_from_param_survives_a_resume(tmp_path):
    def _gmp(): return GMPruningModifier('__FROM_PARAM__', .8, 0, 4, 1, inter_func='linear')
    whole,resumed = tiny_learner(path=tmp_path),tiny_learner(path=tmp_path)
    whole.fit(4, cbs=[_gmp(), SaveModelCallback(every_epoch=True)])
    masks_from_file(resumed.model, tmp_path/'models/model_1.pth')
    seen = Note('after_pred', lambda cb: measured_sparsity(cb.model))
    resumed.fit(4, cbs=[_gmp(), seen], start_epoch=2)
    assert seen.notes[::4]==pytest.approx([.4,.6], abs=3e-3)

def test_sparsity_by_layer():
    gmp = GMPruningModifier(0., {.9:['2.weight'], .5:['re:0','2.weight'], .25:'4'}, 0, 1, .5, params=[])
    learn = tiny_learner()
    learn.fit(1, cbs=gmp)
    assert [measured_sparsity(learn.model, [n]) for n in ('0.weight','2.weight','4.weight')]==[.5,round(256*.9)/256,.25]

def test_empty_params_mean_all_prunable():
    assert sparsity_by_epoch(1, GMPruningModifier(.5, .5, 0, 1, 1, params=[]))[0][-1]==.5

def test_falling_sparsity_lets_weights_return():
    measured,_ = sparsity_by_epoch(3, GMPruningModifier(.75, .25, 0, 2, 1, inter_func='linear'))
    assert len(measured)==4 and measured_masks(_)==.25

def measured_masks(learn): return n_masked(learn.model)/sum(p.param.numel() for p in masked_params(learn.model))

def test_leave_enabled_false_lets_weights_train_again():
    measured,learn = sparsity_by_epoch(3, GMPruningModifier(.5, .5, 0, 2, 1, leave_enabled=False), lr=.1, n_trn=4)
    assert measured[4]==.5 and measured[-1]<.25 and measured_masks(learn)==.5

def test_released_weights_stay_free():
    "Neither the next fit nor a look at the model holds them again"
    gmp = GMPruningModifier(.5, .5, 0, 1, 1, leave_enabled=False)
    learn = tiny_learner(cbs=gmp)
    learn.fit(2)
    free = measured_sparsity(learn.model)
    assert free<.25
    learn.validate()
    assert measured_sparsity(learn.model)==free
    learn.fit(1)
    assert measured_sparsity(learn.model)<=free

def test_released_weights_survive_a_resume(tmp_path):
    def _gmp(): return GMPruningModifier(.5, .5, 0, 1, 1, leave_enabled=False)
    whole,resumed = tiny_learner(path=tmp_path),tiny_learner(path=tmp_path)
    whole.fit(4, cbs=[_gmp(), SaveModelCallback(every_epoch=True, with_opt=True)])
    attach_masks(resumed.model, enforce=False)
    resumed.create_opt()
    resumed.load('model_1')
    assert measured_sparsity(resumed.model)<.25
    resumed.fit(4, cbs=_gmp(), start_epoch=2)
    assert same(weights(resumed.model), weights(whole.model))

@pytest.mark.parametrize('swap', [False,True])
def test_successor_holds_what_its_predecessor_lets_go(swap):
    "Whichever comes first in the list"
    mods = [GMPruningModifier(.25, .25, 0, 2, 1, leave_enabled=False), GMPruningModifier(.5, .75, 2, 3, 1)]
    measured,learn = sparsity_by_epoch(5, *(mods[::-1] if swap else mods), n_trn=4)
    assert measured[:8]==[.25]*8 and measured[8:]==[.5]*4+[.75]*9 and violations(learn.model, learn.opt)==[]

@pytest.mark.parametrize('swap', [False,True])
def test_successor_starts_from_its_own_value(swap):
    mods = [GMPruningModifier(.25, .25, 0, 2, 1), GMPruningModifier(.5, .75, 2, 3, 1)]
    measured,_ = sparsity_by_epoch(4, *(mods[::-1] if swap else mods), n_trn=2)
    assert measured==[.25]*4+[.5]*2+[.75]*3

@pytest.mark.parametrize('swap', [False,True])
def test_constant_then_gradual(swap):
    model = sequential()
    sparsify_model(model, .25)
    mods = [ConstantPruningModifier(start_epoch=0, end_epoch=2), GMPruningModifier('__FROM_PARAM__', .75, 2, 3, 1)]
    measured,_ = sparsity_by_epoch(5, *(mods[::-1] if swap else mods), model=make_permanent(model), n_trn=4)
    assert measured==[.25]*12+[.75]*9

def test_released_layer_frees_no_other():
    "Two weights of one module"
    learn = tiny_learner(nn.Sequential(nn.Unflatten(1, (4,1)), nn.RNN(1, 8, batch_first=True), _Last(), nn.Linear(8,2)))
    learn.fit(3, cbs=[GMPruningModifier(.5, .5, 0, 1, 1, '1.weight_ih_l0', leave_enabled=False), GMPruningModifier(.5, .5, 0, 1, 1, '1.weight_hh_l0')])
    assert measured_sparsity(learn.model, ['1.weight_ih_l0'])<.5==measured_sparsity(learn.model, ['1.weight_hh_l0'])

class _Last(nn.Module):
    def forward(self, x): return x[0][:,-1]

def test_masks_outside_of_the_window_keep_everything():
    learn,seen = tiny_learner(),Note('after_pred', lambda cb: (n_masked(cb.model), [n for n,_ in cb.model.named_buffers()]))
    learn.fit(2, cbs=[seen, GMPruningModifier(.5, .8, 1.5, 2, .5)])
    assert [n for n,_ in seen.notes[:6]]==[0]*6 and seen.notes[6][0]>0 and all(names==seen.notes[0][1] for _,names in seen.notes)

def test_weights_that_are_nan_are_named():
    learn = tiny_learner()
    with torch.no_grad(): learn.model[2].weight[0,0] = math.nan
    with pytest.raises(Exception, match='2.weight.*NaN'): learn.fit(1, cbs=GMPruningModifier(.5, .8, 0, 1, 1))

def test_function_as_pattern():
    seen = []
    def lower_half(scores, sparsity):
        seen.append(round(sparsity,3))
        return (torch.arange(scores.shape[1])<scores.shape[1]*(1-sparsity)).expand(scores.shape)
    learn = tiny_learner()
    learn.fit(1, cbs=GMPruningModifier(.25, .5, 0, 1, 1, '2.weight', mask_type=lower_half))
    assert seen==[.25,.5] and (learn.model[2].weight[:,8:]==0).all() and measured_sparsity(learn.model)==.5

gmp = partial(GMPruningModifier, .05, .8, 0, 5, 1)
@pytest.mark.parametrize('make,error,message', [
    (lambda: GMPruningModifier('0.05', .8, 0, 5, 1), ValueError, "init_sparsity.*'__FROM_PARAM__'"), (lambda: GMPruningModifier(-.1, .8, 0, 5, 1), ValueError, 'init_sparsity'),
    (lambda: GMPruningModifier(1.1, .8, 0, 5, 1), ValueError, 'init_sparsity'), (lambda: GMPruningModifier(None, .8, 0, 5, 1), TypeError, 'init_sparsity'),
    (lambda: GMPruningModifier(.05, 1., 0, 5, 1), ValueError, 'final_sparsity'), (lambda: GMPruningModifier(.05, 0, 0, 5, 1), ValueError, 'final_sparsity'),
    (lambda: GMPruningModifier(.05, 80, 0, 5, 1), ValueError, 'final_sparsity'), (lambda: GMPruningModifier(.05, 'a lot', 0, 5, 1), TypeError, 'final_sparsity'),
    (lambda: GMPruningModifier(.05, None, 0, 5, 1), TypeError, 'final_sparsity'),
    (lambda: GMPruningModifier(.05, {1.5:['a']}, 0, 5, 1, []), ValueError, 'final_sparsity'), (lambda: GMPruningModifier(.05, {.5:['a']}, 0, 5, 1, ['b']), ValueError, 'params'),

    (lambda: GMPruningModifier(.05, {.5:['a'],.6:['b']}, 0, 5, 1, [], global_sparsity=True), ValueError, 'global'), (lambda: gmp(inter_func='cubik'), ValueError, "inter_func.*did you mean 'cubic'"),
    (lambda: gmp(mask_type='blok4'), ValueError, "mask_type.*did you mean 'block4'"), (lambda: gmp(phased=True), ValueError, 'ACDCPruningModifier'),
    (lambda: gmp(score_type='movement'), ValueError, "score_type.*MovementPruningModifier"), (lambda: GMPruningModifier(.05, .8, 5, 4, 1), ValueError, 'end_epoch'),
    (lambda: GMPruningModifier(.05, .8, 0, -1, 1), ValueError, 'end_epoch'), (lambda: GMPruningModifier(.05, .8, 0, 5, -2), ValueError, 'update_frequency'), (lambda: GMPruningModifier(.05, .8, -2, 5, 1), ValueError, 'start_epoch')])
def test_pruning_arguments(make, error, message):
    with pytest.raises(error, match=message): make()

@pytest.mark.parametrize('cls', [MagnitudePruningModifier,GlobalMagnitudePruningModifier])
@pytest.mark.parametrize('arg', ['global_sparsity','phased','score_type'])
def test_named_variants_have_no_variants(cls, arg):
    with pytest.raises(TypeError, match=arg): cls(.05, .8, 0, 5, 1, **{arg:True})

@pytest.mark.parametrize('params,message', [('2.wieght',"2.wieght.*did you mean '2.weight'"), (['re:nothing.*'],'nothing'), ('re:(','regular expression')])
def test_unknown_params_are_named_before_anything_changes(params, message):
    learn = tiny_learner()
    before = list(learn.model.state_dict())
    with pytest.raises(Exception, match=message): learn.fit(1, cbs=[gmp(params='0.weight'), GMPruningModifier(.05, .8, 6, 7, 1, params)])
    assert list(learn.model.state_dict())==before

@pytest.mark.parametrize('b,overlaps', [((0,2),True),((1,3),True),((2,4),False),((5,6),False)])
def test_overlapping_pruners_are_refused(b, overlaps):
    learn = tiny_learner()
    mods = [GMPruningModifier(.05, .5, 0, 2, 1, ['2.weight']), MagnitudePruningModifier(.5, .8, *b, 1, ['re:2'])]
    if not overlaps: return learn.fit(1, cbs=mods)
    with pytest.raises(Exception, match='GMPruningModifier.*MagnitudePruningModifier.*2.weight'): learn.fit(1, cbs=mods)
    assert masked_params(learn.model)==[]

def test_pruners_of_different_layers_are_welcome():
    learn = tiny_learner()
    learn.fit(2, cbs=[GMPruningModifier(.05, .5, 0, 2, 1, '2.weight'), GMPruningModifier(.05, .75, 0, 2, 1, '4.weight')])
    assert [measured_sparsity(learn.model, [n]) for n in ('2.weight','4.weight')]==[.5,.75]

# masks that are held

def test_constant_pruning_holds_zeros_from_the_first_batch():
    model = sequential()
    sparsify_model(model, .5)
    measured,learn = sparsity_by_epoch(3, ConstantPruningModifier(), model=make_permanent(model), n_trn=4)
    assert measured==[.5]*13 and violations(learn.model, learn.opt)==[]

def test_constant_pruning_that_starts_late_holds_the_zeros_of_the_beginning():
    model = sequential()
    sparsify_model(model, .5)
    make_permanent(model)
    measured,_ = sparsity_by_epoch(3, ConstantPruningModifier(start_epoch=1, end_epoch=2), model=model, n_trn=4, lr=.1)
    assert measured[1]<.5 and measured[4:8]==[.5]*4 and measured[-1]<.5

def test_constant_pruning_warns_where_there_is_nothing_to_hold(caplog):
    tiny_learner().fit(1, cbs=ConstantPruningModifier())
    assert 'no zeros' in caplog.text

def test_constant_pruning_acts_at_start_and_end_only():
    assert list(ConstantPruningModifier(start_epoch=2, end_epoch=10).ticks(4, 12).values())==[2,10]
    assert list(ConstantPruningModifier().ticks(4, 12).values())[0]==0

def test_modifiers_for_a_sparse_model():
    model = sequential()
    sparsify_model(model, .5, ['2.weight','4.weight'])
    with torch.no_grad(): model[0].weight.flatten()[:10] = 0
    assert [m.params for m in ConstantPruningModifier.from_sparse_model(make_permanent(model))]==[['2.weight'],['4.weight']]

# learning rates

def rates(n_epoch, *mods, n_trn=4, lr=.5, fits=None, groups=False, fit=None, **kwargs):
    "The learning rate of each batch, or those of all groups"
    learn = tiny_learner(n_trn=n_trn, bs=2, lr=lr, splitter=halves)
    note = Note('after_pred', lambda cb: [h['lr'] for h in cb.opt.hypers] if groups else cb.opt.hypers[-1]['lr'], order=200)
    for n in fits or [n_epoch]: (fit or learn.fit.__func__)(learn, n, cbs=[note,*mods], **kwargs)
    return note.notes

def close(a, b, abs=1e-7): assert len(a)==len(b) and a==pytest.approx(b, abs=abs)

@pytest.mark.parametrize('start', [0,5,-1])
@pytest.mark.parametrize('func', ['linear','cosine'])
def test_function_of_the_learning_rate(func, start):
    got = rates(12, LearningRateFunctionModifier(func, .1, .001, start, 10), n_trn=2)
    x = [min(1, (i/2-max(0,start))/(10-max(0,start))) for i in range(24)]
    curve = [.1+o*(.001-.1) if func=='linear' else .001+(.1-.001)*(1+math.cos(math.pi*o))/2 for o in x]
    close(got, [.5 if o<0 else c for o,c in zip(x,curve)])

def test_rising_cosine():
    got = rates(2, LearningRateFunctionModifier('cosine', .001, .1, 0, 2))
    close(got, [.001+(.1-.001)*(1+math.cos(math.pi*i/8+math.pi))/2 for i in range(8)])

def test_linear_rate_leaves_others_alone_before_and_stays_after():
    got = rates(4, LearningRateFunctionModifier('linear', .1, .001, 1, 3))
    close(got, [.5]*4+[.1,.087625,.07525,.062875,.0505,.038125,.02575,.013375]+[.001]*4)

def test_cyclic_linear():
    cycle = [.1,.092857,.085714,.078571,.071429,.064286,.057143,.05]
    close(rates(10, LearningRateFunctionModifier('cyclic_linear', .1, .05, 0, 10, cycle_epochs=2)), cycle*5, 1e-6)

def test_cyclic_linear_of_single_batches_and_its_end():
    close(rates(2, LearningRateFunctionModifier('cyclic_linear', .1, .05, 0, 2, cycle_epochs=1), n_trn=1), [.1,.1])
    close(rates(4, LearningRateFunctionModifier('cyclic_linear', .1, .05, 0, 2, cycle_epochs=2), n_trn=2), [.1,.1-.05/3,.1-.1/3,.05]+[.05]*4)

def test_incomplete_cycle_is_shortened():
    got = rates(3, LearningRateFunctionModifier('cyclic_linear', .1, .05, 0, 3, cycle_epochs=2), n_trn=3)
    close(got, [.1,.09,.08,.07,.06,.05,.1,.075,.05])

def test_steps():
    got = rates(10, LearningRateModifier('StepLR', dict(gamma=.9, step_size=3), .1, 0), n_trn=2)
    close(got, [.1*.9**(i//6) for i in range(20)])

def test_steps_end_with_their_window():
    got = rates(14, LearningRateModifier('StepLR', dict(gamma=.5, step_size=2), .01, 5, 11), n_trn=2)
    close(got, [.5]*10+[.01]*4+[.005]*4+[.0025]*4+[.0025]*6)

def test_exponential_decays_each_epoch():
    close(rates(4, LearningRateModifier('ExponentialLR', dict(gamma=.5), .1), n_trn=2), [.1,.1,.05,.05,.025,.025,.0125,.0125])

def test_milestones_are_absolute():
    got = rates(14, LearningRateModifier('MultiStepLR', dict(gamma=.95, milestones=[5,8]), .1, 3, 13), n_trn=2)
    close(got, [.5]*6+[.1]*4+[.095]*6+[.09025]*12)
    got = rates(11, LearningRateModifier('MultiStepLR', dict(gamma=.9, milestones=[2,5.5,10]), .1, 0), n_trn=2)
    close(got, [.1]*4+[.09]*7+[.081]*9+[.0729]*2)

def test_warm_restarts():
    got = rates(4, LearningRateModifier('CosineAnnealingWarmRestarts', dict(lr_min=.001, cycle_epochs=2), .1, 0), n_trn=2)
    one = [.001+(.1-.001)*(1+math.cos(math.pi*i/4))/2 for i in range(4)]
    close(got, one*2)

def test_window_without_init_lr_begins_with_the_current_rate():
    close(rates(3, LearningRateModifier('ExponentialLR', dict(gamma=.5), start_epoch=1), n_trn=2), [.5,.5,.5,.5,.25,.25])
    close(rates(3, SetLearningRateModifier(.1), LearningRateModifier('ExponentialLR', dict(gamma=.5), start_epoch=1), n_trn=2), [.1,.1,.1,.1,.05,.05])

def test_window_without_init_lr_goes_on_in_the_next_fit():
    mods = lambda: (SetLearningRateModifier(.1), LearningRateModifier('ExponentialLR', dict(gamma=.5), start_epoch=1))
    close(rates(4, *mods(), n_trn=2, fits=[2,2]), rates(4, *mods(), n_trn=2))

def test_set_learning_rate_stays():
    close(rates(3, SetLearningRateModifier(.01, start_epoch=1.5), n_trn=2), [.5]*3+[.01]*3)

def test_later_window_wins_and_what_it_leaves_stays():
    got = rates(4, SetLearningRateModifier(.1), LearningRateFunctionModifier('linear', .02, .01, 1, 2), n_trn=2)
    close(got, [.1,.1,.02,.015,.01,.01,.01,.01])
    assert got==rates(4, LearningRateFunctionModifier('linear', .02, .01, 1, 2), SetLearningRateModifier(.1), n_trn=2)

def test_later_set_ends_an_earlier_function():
    close(rates(3, LearningRateFunctionModifier('linear', .2, .1, 0, 2), SetLearningRateModifier(.01, start_epoch=1), n_trn=2), [.2,.175]+[.01]*4)

def test_discriminative_rates_keep_their_proportions():
    got = rates(2, LearningRateFunctionModifier('linear', .1, .02, 0, 2), n_trn=2, groups=True, lr=slice(.05,.5))
    close([b for _,b in got], [.1,.08,.06,.04])
    assert all(a/b==pytest.approx(.1) for a,b in got)

def test_groups_are_chosen_by_index():
    got = rates(2, LearningRateFunctionModifier('linear', .1, .02, 0, 2, param_groups=[0]), n_trn=2, groups=True)
    close([a for a,_ in got], [.1,.08,.06,.04])
    assert {b for _,b in got}=={.5}
    assert rates(1, SetLearningRateModifier(.1, param_groups=[-1]), groups=True)==[[.5,.1]]*4
    with pytest.raises(Exception, match='param_groups 2.*groups 0 to 1'): rates(1, SetLearningRateModifier(.1, param_groups=[2]))

def test_two_modifiers_of_two_groups():
    got = rates(1, SetLearningRateModifier(.1, [0]), SetLearningRateModifier(.2, [1]), groups=True)
    assert got==[[.1,.2]]*4

def test_modifier_wins_over_one_cycle_inside_of_its_window(caplog):
    one_cycle = rates(4, fit=fit_one_cycle, n_trn=2)
    got = rates(4, LearningRateFunctionModifier('linear', .1, .05, 1, 2), fit=fit_one_cycle, n_trn=2)
    close(got[2:4], [.1,.075])
    assert got[:2]==one_cycle[:2] and 'both set the learning rate' in caplog.text
    assert len([r for r in caplog.records if 'both set' in r.message])==1

fit_one_cycle = lambda learn,n,**kwargs: learn.fit_one_cycle(n, **kwargs)

def test_recorder_sees_the_modifiers_rate():
    learn = tiny_learner()
    learn.fit(1, cbs=LearningRateFunctionModifier('linear', .1, .02, 0, 1))
    close([float(o) for o in learn.recorder.lrs], [.1,.08,.06,.04])

def test_resumed_rate():
    mod = lambda: LearningRateFunctionModifier('cosine', .1, .001, 0, 4)
    assert rates(4, mod(), start_epoch=2)==rates(4, mod())[8:]

def test_fine_tune_rates_are_one_schedule():
    whole = rates(3, LearningRateFunctionModifier('linear', .1, .01, 0, 3))
    fine_tune = lambda learn,n,**kwargs: learn.fine_tune(n, **kwargs)
    close(rates(2, LearningRateFunctionModifier('linear', .1, .01, 0, 3), fit=fine_tune), whole)

def test_lr_find_is_not_disturbed():
    def _find(*cbs):
        learn = tiny_learner(cbs=list(cbs))
        learn.lr_find(show_plot=False, num_it=6)
        return [float(o) for o in learn.recorder.lrs]
    assert _find(SetLearningRateModifier(.1))==_find()

lrf = partial(LearningRateFunctionModifier, 'linear', .1, .001, 0, 5)
@pytest.mark.parametrize('make,error,message', [
    (lambda: SetLearningRateModifier(0.), ValueError, 'learning_rate'), (lambda: SetLearningRateModifier(1.5), ValueError, 'learning_rate'), (lambda: SetLearningRateModifier(-.1), ValueError, 'learning_rate'),
    (lambda: SetLearningRateModifier(None), TypeError, 'learning_rate'), (lambda: SetLearningRateModifier('0.1'), TypeError, 'learning_rate'),
    (lambda: LearningRateFunctionModifier('linaer', .1, .001, 0, 5), ValueError, "lr_func.*did you mean 'linear'"), (lambda: LearningRateFunctionModifier('linear', 1.1, .001, 0, 5), ValueError, 'init_lr'),
    (lambda: LearningRateFunctionModifier('linear', .1, -.1, 0, 5), ValueError, 'final_lr'), (lambda: LearningRateFunctionModifier('linear', .1, .001, 5, 5), ValueError, 'end_epoch'),
    (lambda: LearningRateFunctionModifier('linear', .1, .001, 0, -1), ValueError, 'end_epoch'), (lambda: lrf(cycle_epochs=0), ValueError, 'cycle_epochs'), (lambda: lrf(cycle_epochs=-1), ValueError, 'cycle_epochs'),

    (lambda: LearningRateModifier('Step', dict(gamma=.9, step_size=1)), ValueError, "lr_class.*did you mean 'StepLR'"), (lambda: LearningRateModifier('StepLR', dict(gamma=.9)), ValueError, 'step_size must be in lr_kwargs'),
    (lambda: LearningRateModifier('StepLR', dict(gamma=.9, step=1)), ValueError, "step.*did you mean 'step_size'"), (lambda: LearningRateModifier('StepLR', dict(step_size=1)), ValueError, 'gamma must be in lr_kwargs for StepLR'),
    (lambda: LearningRateModifier('ExponentialLR', {}), ValueError, 'gamma'), (lambda: LearningRateModifier('MultiStepLR', dict(gamma=.9)), ValueError, 'milestones'), (lambda: LearningRateModifier('StepLR', None), TypeError, 'lr_kwargs'),
    (lambda: LearningRateModifier('StepLR', dict(gamma='a', step_size=1)), TypeError, 'gamma'), (lambda: LearningRateModifier('StepLR', dict(gamma=.9, step_size=0)), ValueError, 'step_size'),
    (lambda: LearningRateModifier('MultiStepLR', dict(gamma=.9, milestones=[1]), .1, 1, 5), ValueError, 'milestones'), (lambda: LearningRateModifier('MultiStepLR', dict(gamma=.9, milestones=[5]), .1, 1, 5), ValueError, 'milestones'),

    (lambda: LearningRateModifier('CosineAnnealingWarmRestarts', dict(lr_min=.1)), ValueError, 'cycle_epochs'), (lambda: LearningRateModifier('ExponentialLR', dict(gamma=.9), 0.), ValueError, 'init_lr'),
    (lambda: SetWeightDecayModifier(-.1), ValueError, 'weight_decay'), (lambda: SetWeightDecayModifier(None), TypeError, 'weight_decay'),

    (lambda: GradualParamModifier('0.bias', 0, 1, 2, 2, 1), ValueError, 'end_epoch'), (lambda: GradualParamModifier('0.bias', 0, 1, 0, -1, 1), ValueError, 'end_epoch'),
    (lambda: GradualParamModifier('0.bias', 0, 1, 0, 1, 1, inter_func='quadratic'), ValueError, 'inter_func')])
def test_training_arguments(make, error, message):
    with pytest.raises(error, match=f'Modifier.*{message}'): make()

wrong_types = dict(
    final_sparsity_list=(lambda: GMPruningModifier(.05, [.5,.6], 0, 5, 1), 'final_sparsity'), final_sparsity_empty=(lambda: GMPruningModifier(.05, {}, 0, 5, 1, []), 'final_sparsity'),
    params_number=(lambda: gmp(params=3), 'params'), params_numbers=(lambda: gmp(params=[3]), 'params'), params_of_trainable=(lambda: TrainableParamsModifier(3), 'params'),
    leave_enabled=(lambda: gmp(leave_enabled='no'), 'leave_enabled'), trainable=(lambda: TrainableParamsModifier(trainable='no'), 'trainable'), param_groups_number=(lambda: lrf(param_groups=0), 'param_groups'),
    param_groups_names=(lambda: lrf(param_groups=['0']), 'param_groups'), milestones=(lambda: LearningRateModifier('MultiStepLR', dict(gamma=.9, milestones=3), .1), 'milestones'),
    val=(lambda: SetParamModifier('0.bias', 'zero'), 'val'))

@pytest.mark.parametrize('name', list(wrong_types))
def test_arguments_of_the_wrong_type_are_named(name):
    make,message = wrong_types[name]
    with pytest.raises((TypeError,ValueError), match=message): make()

# weight decay, trainable and set parameters

def test_weight_decay_from_an_epoch_on():
    learn = tiny_learner(splitter=halves)
    wds = Note('after_pred', lambda cb: [h['wd'] for h in cb.opt.hypers])
    learn.fit(3, wd=.1, cbs=[wds, SetWeightDecayModifier(.01, start_epoch=1, param_groups=[1])])
    assert [list(map(float,o)) for o in wds.notes[::4]]==[[.1,.1],[.1,.01],[.1,.01]]
    learn.fit(1, wd=.1, cbs=[wds, SetWeightDecayModifier(.5)])
    assert wds.notes[-1]==[.5,.5]
    with pytest.raises(Exception, match='param_groups 5'): learn.fit(1, cbs=SetWeightDecayModifier(.5, param_groups=[5]))

def test_weight_decay_in_the_next_fit():
    learn,mod = tiny_learner(),SetWeightDecayModifier(.01, start_epoch=1)
    wds = Note('after_pred', lambda cb: cb.opt.hypers[0]['wd'])
    for _ in range(3): learn.fit(1, wd=.1, cbs=[wds,mod])
    assert wds.notes[::4]==[.1,.01,.01]

def trains(n_epoch, *mods, name='2.weight', fits=None, fit=None, **kwargs):
    "Did the parameter change, epoch by epoch?"
    learn = tiny_learner(splitter=halves)
    p = dict(learn.model.named_parameters())[name]
    values = Note('after_batch', lambda cb: p.detach().clone())
    first = p.detach().clone()
    for n in fits or [n_epoch]: (fit or learn.fit.__func__)(learn, n, cbs=[values,*mods], **kwargs)
    ends = [first]+values.notes[3::4]
    return [not a.equal(b) for a,b in zip(ends, ends[1:])]

def test_parameters_rest_in_their_window():
    "With momentum: a gradient of zeros would still move them"
    assert trains(4, TrainableParamsModifier('2.weight', False, start_epoch=1, end_epoch=3))==[True,False,False,True]
    assert trains(2, TrainableParamsModifier('2.weight', False))==[False,False]
    assert trains(2, TrainableParamsModifier('2.weight', False), name='0.weight')==[True,True]
    assert trains(2, TrainableParamsModifier('re:2', False), name='2.bias')==[False,False]

def test_parameters_are_made_trainable():
    learn = tiny_learner()
    learn.model[0].requires_grad_(False)
    seen = Note('after_pred', lambda cb: [p.requires_grad for p in cb.model[0].parameters()])
    learn.fit(3, cbs=[seen, TrainableParamsModifier('__ALL__', True, start_epoch=1, end_epoch=2)])
    assert seen.notes[::4]==[[False,False],[True,True],[False,False]]

def test_window_of_rest_that_a_resume_skips():
    assert trains(3, TrainableParamsModifier('2.weight', False, start_epoch=0, end_epoch=1), start_epoch=2)[0]

def test_resume_within_a_window_of_rest():
    assert trains(4, TrainableParamsModifier('2.weight', False, start_epoch=0, end_epoch=3), start_epoch=2)==[False,True]

def test_window_of_rest_within_one_batch():
    assert trains(2, TrainableParamsModifier('2.weight', False, start_epoch=.1, end_epoch=.2))==[True,True]

def test_rest_goes_on_in_the_next_fit():
    mod = lambda: TrainableParamsModifier('2.weight', False, start_epoch=1, end_epoch=3)
    assert trains(4, mod(), fits=[2,2])==trains(4, mod(), fits=[1]*4)==[True,False,False,True]

def test_rest_goes_on_when_fine_tune_unfreezes():
    fine_tune = lambda learn,n,**kwargs: learn.fine_tune(n, **kwargs)
    assert trains(2, TrainableParamsModifier('2.weight', False), fit=fine_tune)==[False]*3

def test_unmatched_parameters():
    with pytest.raises(Exception, match="did you mean '2.weight'"): trains(1, TrainableParamsModifier(['2.wieght']))
    assert trains(1, TrainableParamsModifier(['2.wieght'], False, params_strict=False))==[True]

def test_frozen_while_accumulating():
    learn = tiny_learner()
    w = learn.model[2].weight
    values = Note('after_batch', lambda cb: w.detach().clone())
    learn.fit(3, cbs=[values, GradientAccumulation(24), TrainableParamsModifier('2.weight', False, start_epoch=1)])
    assert values.notes[4].equal(values.notes[-1]) and not values.notes[0].equal(values.notes[3])

def set_value(n_epoch, *mods, fits=None, name='4.bias', lr=.05, event='after_pred', **kwargs):
    learn = tiny_learner(lr=lr)
    p = dict(learn.model.named_parameters())[name]
    values = Note(event, lambda cb: p.detach().clone())
    for n in fits or [n_epoch]: learn.fit(n, cbs=[values,*mods], **kwargs)
    return values.notes,learn

def test_parameter_is_set_once():
    values,_ = set_value(3, SetParamModifier('4.bias', [7.,8.], start_epoch=1))
    assert values[4].tolist()==[7,8] and values[5].tolist()!=[7,8] and values[3].abs().max()<2 and (values[8]<7).all()

def test_parameter_is_set_once_over_fits_and_resumes():
    values,_ = set_value(2, SetParamModifier('4.bias', 7.), fits=[1,1])
    assert values[0].tolist()==[7,7] and all((v<7).all() for v in values[1:])

def test_parameter_is_not_set_again_by_a_resume():
    values,_ = set_value(3, SetParamModifier('4.bias', 7.), start_epoch=2)
    assert values[0].abs().max()<2

def test_masks_outlast_set_parameters():
    learn = sparse_learner(.5)
    seen = Note('after_pred', lambda cb: violations(cb.model, cb.opt))
    learn.fit(2, cbs=[seen, SetParamModifier('2.weight', 1.), GradualParamModifier('0.weight', 0., 1., 0, 2, .5)])
    assert sum(seen.notes, [])==[] and violations(learn.model)==[]

def test_shape_of_values_is_checked_first():
    learn = tiny_learner()
    before = weights(learn.model)
    with pytest.raises(Exception, match=r"val of shape \(3,\).*4.bias.*\(2,\)"): learn.fit(1, cbs=SetParamModifier('4.bias', [1.,2.,3.]))
    with pytest.raises(Exception, match='final_val'): learn.fit(1, cbs=GradualParamModifier('4.bias', 0., [1.,2.,3.], 0, 1, 1))
    assert same(before, weights(learn.model))

@pytest.mark.parametrize('func,expected', [('linear',[0,.25,.5,.75]),('cubic',[0,.578125,.875,.984375]),('inverse_cubic',[0,1-.75**(1/3),1-.5**(1/3),1-.25**(1/3)])])
def test_gradual_parameter(func, expected):
    values,learn = set_value(2, GradualParamModifier('4.bias', 0., 1., 0, 2, .5, func), lr=0.)
    got = [v[0].item() for v in values]+[learn.model[4].bias[0].item()]
    assert got==pytest.approx([e for e in expected for _ in range(2)]+[1.], abs=1e-6)

def test_gradual_parameter_over_two_fits():
    one,_ = set_value(2, GradualParamModifier('4.bias', [0.,1.], [1.,0.], 0, 2, .25))
    two,_ = set_value(2, GradualParamModifier('4.bias', [0.,1.], [1.,0.], 0, 2, .25), fits=[1,1])
    assert all(a.equal(b) for a,b in zip(one,two))

# what all modifiers share

everything = [lambda: GMPruningModifier(.05, .8, 0, 2, 1, '2.weight'), lambda: MagnitudePruningModifier('__FROM_PARAM__', .8, 0, 2, 1), lambda: GlobalMagnitudePruningModifier(.05, .8, 0, 2, 1, mask_type='block4'),
              lambda: GMPruningModifier(.05, {.8:['2.weight']}, 0, 2, 1, []), lambda: ConstantPruningModifier(), lambda: SetLearningRateModifier(.1), lambda: LearningRateFunctionModifier('cosine', .1, .01, 0, 2),
              lambda: LearningRateModifier('StepLR', dict(gamma=.5, step_size=1)), lambda: EpochRangeModifier(0, 2), lambda: TrainableParamsModifier(), lambda: SetParamModifier('4.bias', 1.),
              lambda: GradualParamModifier('4.bias', 0., 1., 0, 2, 1), lambda: SetWeightDecayModifier(.1), lambda: SparsificationLoggingModifier()]
every_modifier = pytest.mark.parametrize('make', everything, ids=lambda f: type(f()).__name__)

@every_modifier
def test_arguments_make_an_equal_modifier(make):
    mod = make()
    twin = type(mod)(**mod.args())
    assert twin.args()==mod.args() and repr(twin)==repr(mod) and modifiers[type(mod).__name__] is type(mod)

@every_modifier
def test_modifier_shadows_nothing(make):
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learn = tiny_learner()
        learn.fit(2, cbs=make())
    assert learn.lr==.05 and isinstance(learn.opt, Optimizer)

@every_modifier
def test_modifier_prints_nothing_and_leaves_randomness_alone(make, capsys):
    def _state(*cbs):
        torch.manual_seed(0)
        tiny_learner().fit(2, cbs=list(cbs))
        return torch.get_rng_state()
    assert _state(make()).equal(_state()) and capsys.readouterr().out==''

@every_modifier
def test_modifier_can_be_copied_and_pickled(make):
    import pickle
    learn,mod = tiny_learner(),make()
    for m in (copy.deepcopy(mod), pickle.loads(pickle.dumps(mod))):
        assert m.args()==mod.args()
        learn.fit(1, cbs=m)

def test_logging_of_sparsity(caplog):
    with caplog.at_level(logging.INFO, 'fastsparse_create'): tiny_learner().fit(2, cbs=[GMPruningModifier(.5, .5, 0, 1, 1), SparsificationLoggingModifier()])
    lines = [r.message for r in caplog.records if 'sparsity' in r.message and 'epoch' in r.message]
    assert len(lines)==3 and '2.weight 0.5000' in lines[-1] and 'sparsity 0.5000' in lines[-1]
