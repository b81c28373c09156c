"The published FastSparse example runs with nothing but its import changed"
import fastai.vision.all as vision
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

EXAMPLE = '''
from fastai.vision.all import *
from fastsparse_create.all import *

path = untar_data(URLs.MNIST)
dls = ImageDataLoaders.from_folder(path, 'training', 'testing')
learn = cnn_learner(dls, resnet34, metrics=error_rate, pretrained=False)
sparse_hooks = sparsify_model(learn.model, sparsity=0.9)
cbs = DynamicSparseTrainingCallback(**RigL_kwargs)

learn.fit_one_cycle(1, cbs=cbs)

for h in sparse_hooks: h.remove()
'''

def write_digits(path, n=200):
    digits = load_digits()
    for i,(image,label) in enumerate(zip(digits.images[:n], digits.target)):
        folder = path/('testing' if i%4==0 else 'training')/str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image*15.9).astype(np.uint8)).resize((28,28)).save(folder/f'{i}.png')
    return path

@pytest.mark.parametrize('change', [('RigL_kwargs', 'RigL_kwargs'), ('**RigL_kwargs', '**{**RigL_kwargs, "every":1}'), ('cbs=cbs', '')], ids=['as-is','updates','fixed'])
def test_example_runs_and_ends_sparse(tmp_path, monkeypatch, change):
    path = write_digits(tmp_path)
    monkeypatch.setattr(vision, 'untar_data', lambda url: path)
    names = {}
    exec(EXAMPLE.replace(*change), names)
    from fastsparse_create.all import masked_params, measured_sparsity
    params = masked_params(names['learn'].model)
    zeros = sum(round(p.param.numel()*.9) for p in params)
    assert sum(int((~p.mask).sum()) for p in params)==zeros
    assert all(p.param[~p.mask].eq(0).all() for p in params)
    assert not names['sparse_hooks'][0].param.is_enforced
    assert measured_sparsity(names['learn'].model)>=zeros/sum(p.param.numel() for p in params)  # what was grown last is still 0
