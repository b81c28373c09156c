"Pictures of masks that change: do they show what happened?"
import matplotlib; matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np,pytest,torch
from matplotlib.colors import to_rgb
from fastsparse_create.callback.dynamic import *
from fastsparse_create.callback.pruning import *
from fastsparse_create.mask_plots import *
from fastsparse_create.sparse.linear import *
from utils import *

@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close('all')

def made_up(n_layers=3, n=5):
    return [MaskUpdate(batch=10*(i+1), epoch=i+1., fraction=.3/(i+1), sparsities={f'layer{j}.weight':.9-.01*i*(j==1) for j in range(n_layers)},
                       churn=.2/(i+1), ever_active=.1+.05*i) for i in range(n)]

def recorder(updates, n_batches=80):
    res = Recorder()
    res.lrs,res.mask_updates = [.1]*n_batches,updates
    return res

@pytest.mark.parametrize('n_layers', [1,3,50])
def test_updates(n_layers):
    updates = made_up(n_layers)
    ax = recorder(updates).plot_mask_updates()
    moves,ever,layers = ax.child_axes
    assert [(l.get_label(),l.get_xdata().tolist(),l.get_ydata().tolist()) for l in moves.lines]==[
        ('dropped',[10,20,30,40,50],[u.fraction for u in updates]), ('new',[10,20,30,40,50],[u.churn for u in updates])]
    assert [l.get_ydata().tolist() for l in ever.lines]==[[u.ever_active for u in updates]]
    assert ever.get_ylim()==(0,1.1*updates[-1].ever_active) and layers.get_xlim()==moves.get_xlim()==(0,80)
    assert [t.get_text() for t in layers.get_yticklabels()]==list(updates[0].sparsities)
    shown = layers.collections[0].get_array().reshape(n_layers, 5)
    assert np.allclose(shown, [[1-u.sparsities[k] for u in updates] for k in updates[0].sparsities])
    assert [t.get_text() for t in layers.texts]==['90.0%','90.0% → 86.0%',*['90.0%']*(n_layers-2)][:n_layers]+['sparsity']
    ax.figure.canvas.draw()

def test_one_update_and_dense_and_empty_layers():
    u = MaskUpdate(batch=3, epoch=.5, fraction=0., sparsities={'a':0.,'b':1.}, churn=0., ever_active=.5)
    ax = recorder([u], 4).plot_mask_updates()
    assert [t.get_text() for t in ax.child_axes[2].texts]==['0.0%','100.0%','sparsity']
    ax.figure.canvas.draw()

def test_two_callbacks_have_layers_of_their_own():
    learn = tiny_learner(n_trn=10)
    learn.fit(2, cbs=[RigL(.9, every=4, params=['0']), SET(.5, every=3, params=['2'])])
    updates = learn.recorder.mask_updates
    assert {tuple(u.sparsities) for u in updates}=={('0.weight',),('2.weight',)}
    ax = learn.recorder.plot_mask_updates()
    moves,ever,layers = ax.child_axes
    names = list(dict.fromkeys(n for u in updates for n in u.sparsities))
    of_each = {n:[u for u in updates if n in u.sparsities] for n in names}
    assert {l.get_label():l.get_ydata().tolist() for l in ever.lines}=={n:[u.ever_active for u in us] for n,us in of_each.items()}
    assert {l.get_label():l.get_xdata().tolist() for l in moves.lines}=={f'{n}, {o}':[u.batch for u in us] for n,us in of_each.items() for o in ('dropped','new')}
    assert [t.get_text() for t in layers.get_yticklabels()]==names
    shown = np.ma.filled(layers.collections[0].get_array().reshape(2, len(updates)), np.nan)
    final = {n:[u.sparsities[n] for u in updates if n in u.sparsities][-1] for n in names}
    assert np.isfinite(shown[0]).all() and np.isnan(shown[1,0]) and np.allclose(shown[:,-1], [1-final[n] for n in names])
    ax.figure.canvas.draw()

def test_what_an_update_does_not_know_stays_as_it_was():
    values = [{'b':.9},{'a':.5},{'b':.8},{'b':.7,'c':0.},{'a':.4}]
    updates = [MaskUpdate(batch=i, epoch=i, fraction=.1, sparsities=s, churn=.1, ever_active=[.5,.2][i%2]) for i,s in enumerate(values)]
    _,ever,layers = recorder(updates).plot_mask_updates().child_axes
    assert [t.get_text() for t in layers.get_yticklabels()]==['b','a','c']
    expected = [[.1,.1,.2,.3,.3],[np.nan,.5,.5,.5,.6],[np.nan]*3+[1.,1.]]
    assert np.allclose(np.ma.filled(layers.collections[0].get_array().reshape(3, 5), np.nan), expected, equal_nan=True)
    assert [t.get_text() for t in layers.texts]==['90.0% → 70.0%','50.0% → 40.0%','0.0%','sparsity']
    assert ever.get_ylim()==(0,1.1*.5)

@pytest.mark.parametrize('updates', [[],None])
def test_no_update_was_recorded(updates):
    with pytest.raises(ValueError, match='no update of masks was recorded'): recorder(updates).plot_mask_updates()
    with pytest.raises(ValueError, match='no update of masks was recorded'): tiny_learner().recorder.plot_mask_updates()

def test_given_axes_are_used():
    _,axs = plt.subplots(1, 2)
    learn = trained(SET(.5, every=2, params=['2.weight']))
    assert learn.recorder.plot_mask_updates(axs[0]) is axs[0]
    assert plot_mask_history(learn, ax=axs[1]) is axs[1]

def trained(*cbs, params='2.weight', every=.5, n_epoch=2, **kwargs):
    learn = tiny_learner(cbs=MaskHistory(params, every), n_trn=10, **kwargs)
    learn.fit(n_epoch, cbs=cbs)
    return learn

def test_real_updates():
    learn = trained(RigL(.5, every=3, params=['2.weight']))
    updates,(moves,_,_) = learn.recorder.mask_updates,learn.recorder.plot_mask_updates().child_axes
    assert moves.lines[1].get_ydata().tolist()==[u.churn for u in updates] and len(updates)>2

@pytest.mark.parametrize('method', [SET,RigL])
def test_history_is_what_was(method):
    seen = Note('before_batch', lambda cb: masked_params(cb.model)[0].mask.clone())
    learn = trained(method(.5, every=2, params=['2.weight'], T_end=1.), seen)
    history = learn.mask_history
    assert history.epochs==[0,.5,1,1.5,2] and history.names==['2.weight']
    for i,batch in enumerate([0,5,10,15]): assert history.mask('2.weight', i).equal(seen.notes[batch])
    assert history.mask('2.weight').equal(masked_params(learn.model)[0].mask)
    assert not history.mask('2.weight', 0).equal(history.mask('2.weight'))

def test_history_takes_a_bit_for_each_weight():
    history = trained(model=half(mlp())).mask_history
    assert {bits.nbytes for p in history._pictures for bits,_ in p.values()}=={16*16//8}

def half(model, name='2.weight'):
    sparsify_model(model, .5, name)
    return model

def test_fits_follow_upon_one_another():
    learn = trained(model=half(mlp()), every=1)
    learn.fit(1)
    assert learn.mask_history.epochs==[0,1,2,3]

def test_clock_is_that_of_the_updates():
    class At(Callback):
        run_valid,order = False,90
        def __init__(self): self.now = []
        def before_batch(self): self.now.append(self.learn.dynamic_sparse_training.now)
    dynamic,clock = SET(.5, every=2, params=['2.weight']),At()
    learn = tiny_learner(cbs=[MaskHistory('2.weight', 1e-3), dynamic, clock], n_trn=8)
    stop = Interrupt('before_batch', 4, 1)
    until_interrupted(learn.fit, 2, cbs=stop)
    assert learn.mask_history.epochs==clock.now==[i/8 for i in range(12)]
    learn.fit(2)
    assert learn.mask_history.epochs==[*clock.now,3.5]==[i/8 for i in range(29)]
    assert {u.epoch for u in learn.recorder.mask_updates}<=set(learn.mask_history.epochs)

def test_interrupted_fits_go_on_from_there():
    learn = tiny_learner(half(mlp()), cbs=MaskHistory('2.weight'), n_trn=8)
    until_interrupted(learn.fit, 2, cbs=Interrupt('before_batch', 4, 1))
    learn.fit(2)
    assert learn.mask_history.epochs==[0,1,1.5,2.5,3.5]

def test_what_is_trained_anew_takes_the_place_of_what_was_there():
    learn = trained(model=half(mlp()), n_epoch=3)
    learn.fit(3, start_epoch=1)
    assert learn.mask_history.epochs==[0,.5,1,1.5,2,2.5,3] and len(learn.mask_history._pictures)==7
    learn.fit(1)
    assert learn.mask_history.epochs[-1]==4

def test_another_model_has_its_own_history():
    learn = trained(model=half(mlp()))
    other = tiny_learner(model=half(mlp()), cbs=learn.mask_history)
    other.fit(1)
    assert other.mask_history.epochs==[0,.5,1]

@pytest.mark.parametrize('every,epochs', [(.3,[0,.3,.6,.9,1]), (2,[0,1]), (.01,[0,.1,.2,.3,.4,.5,.6,.7,.8,.9,1])])
def test_moments(every, epochs):
    assert trained(model=half(mlp()), every=every, n_epoch=1).mask_history.epochs==pytest.approx(epochs)

def test_dense_until_there_is_a_mask():
    learn = trained(GMPruningModifier(.3, .8, 1, 2, .5, params=['2.weight','4.weight']), params=['2','4'])
    history = learn.mask_history
    assert history.names==['2.weight','4.weight'] and history.mask('2.weight', 0).all()
    assert 1-history.mask('2.weight').float().mean()==pytest.approx(.8, abs=.01)

def test_stored_sparsely():
    model = half(mlp())
    sparse_layers_(model, .4, 1, params=['2.weight'])
    learn = trained(model=model, params='__ALL_PRUNABLE__')
    assert learn.mask_history.names==['2.weight']
    assert learn.mask_history.mask('2.weight').equal(model[2].mask)

def test_training_is_the_same_with_and_without():
    def run(*cbs):
        learn = tiny_learner(cbs=cbs)
        learn.fit(2, cbs=SET(.5, every=2))
        return weights(learn.model)
    assert same(run(), run(MaskHistory(every=.2)))

def test_only_training_is_kept():
    learn = trained(model=half(mlp()))
    learn.validate()
    learn.get_preds()
    assert learn.mask_history.epochs==[0,.5,1,1.5,2]

def pixels(ax): return np.asarray(ax.images[0].get_array())

def test_grid_shows_what_is_new():
    learn = trained(SET(.5, every=2, params=['2.weight'], T_end=1.))
    history = learn.mask_history
    panels = plot_mask_history(learn).child_axes
    assert len(panels)==5
    colors = {True:to_rgb('#ff7f0e'), False:to_rgb('#3182bd')}
    for i,panel in enumerate(panels):
        kept = history.mask('2.weight', i)
        before = history.mask('2.weight', i-1) if i else kept
        expected = [[colors[not b] if k else (1,1,1) for k,b in zip(*rows)] for rows in zip(kept.tolist(), before.tolist())]
        assert np.allclose(pixels(panel), expected, atol=1e-6)
        new = (kept&~before).sum()/kept.sum()
        assert panel.get_title()==f'epoch {i/2:g}'+f', {new:.0%} new'*(i>0)

@pytest.mark.parametrize('n,shown', [(1,[0]), (2,[0,2]), (3,[0,1,2]), (100,[0,.5,1,1.5,2])])
def test_grid_of_some_pictures(n, shown):
    panels = plot_mask_history(trained(model=half(mlp())), n=n).child_axes
    assert [float(p.get_title().removeprefix('epoch ').split(',')[0]) for p in panels]==shown

def test_big_masks_and_convolutions():
    model = convnet()
    sparsify_model(model, .5, '3')
    panel, = plot_mask_history(trained(model=model, shape=(3,8,8), params='3'), n=1).child_axes
    assert pixels(panel).shape==(8,72,3)
    model = nn.Sequential(nn.Linear(4,300), nn.ReLU(), nn.Linear(300,2))
    sparsify_model(model, .98, '2')
    panel, = plot_mask_history(trained(model=model, params='2'), n=1).child_axes
    assert pixels(panel).shape==(2,100,3) and panel.get_xlim()==(0,300)

def test_film(tmp_path):
    learn = trained(SET(.5, every=2, params=['2.weight'], T_end=1.), n_epoch=1)
    film = animate_mask_history(learn, '2')
    film.save(tmp_path/'mask.gif', writer='pillow')
    from PIL import Image
    assert Image.open(tmp_path/'mask.gif').n_frames==3
    assert 'epoch' in film._fig.axes[0].get_title()
    assert not plt.get_fignums()

def test_history_in_question():
    with pytest.raises(ValueError, match='the learner has no MaskHistory'): plot_mask_history(tiny_learner())
    with pytest.raises(ValueError, match='no mask was kept'): animate_mask_history(trained())
    learn = trained(model=half(mlp(), ['2','4']), params='__ALL_PRUNABLE__')
    with pytest.raises(ValueError, match="None stands for 2 weights, choose one of 2.weight, 4.weight"): plot_mask_history(learn)
    with pytest.raises(ValueError, match="'3' stands for 0 weights, choose one of 2.weight, 4.weight"): plot_mask_history(learn.mask_history, '3')
    assert plot_mask_history(learn, '4.weight').get_title('left').startswith('4.weight  2×16  50.0% sparse')

def test_wrong_arguments():
    with pytest.raises(TypeError, match='params must be a string'): MaskHistory(3)
    with pytest.raises(ValueError, match='every must be above 0'): MaskHistory(every=0)
    with pytest.raises(ValueError, match='is no regular expression'): MaskHistory(['0','re:('])
    learn = tiny_learner(cbs=MaskHistory('2.wieght'))
    with pytest.raises(ValueError, match="'2.wieght' matches no parameter of the model; did you mean '2.weight'"): learn.fit(1)
