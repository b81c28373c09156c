"The pages of `docs`: what they promise is tested, what they show runs"
import re
from copy import deepcopy
from pathlib import Path
import pytest,torch
from fastai.basics import DataLoader,DataLoaders,Learner,accuracy,no_random,noop
from sklearn.datasets import load_digits
from torch import nn
from fastsparse_create.masking import measured_sparsity

ROOT = Path(__file__).resolve().parent.parent
PROMISES = [line for line in (ROOT/'docs'/'promises.md').read_text(encoding='utf-8').splitlines() if line.startswith('| ') and not line.startswith('| promise')]

@pytest.mark.parametrize('row', PROMISES, ids=lambda row: row.split('|')[1].strip()[:60])
def test_a_promise_has_tests(row):
    links = re.findall(r'\[(test_\w+)\]\(\.\./(tests/test_\w+\.py)\)', row)
    assert links and row.count('](')==len(links)
    for name,file in links: assert re.search(rf'^def {name}\(', (ROOT/file).read_text(encoding='utf-8'), re.M), f'{file}: {name}'

def test_pages_link_to_what_there_is():
    for page in (*(ROOT/'docs').glob('*.md'), *ROOT.glob('*.md')):
        for target in re.findall(r'\]\(([^)#\s]+)[^)]*\)', page.read_text(encoding='utf-8')):
            assert target.startswith('http') or (page.parent/target).exists(), f'{page.name}: {target}'

RECIPE = '''
training_modifiers:
  - !EpochRangeModifier {start_epoch: 0.0, end_epoch: 2.0}
pruning_modifiers:
  - !GMPruningModifier {params: __ALL_PRUNABLE__, init_sparsity: 0.05, final_sparsity: 0.8, start_epoch: 0.0, end_epoch: 2.0, update_frequency: 0.5}
'''

def train_one_epoch(model, optimizer, loader):
    model.train()
    for xb,yb in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(xb), yb).backward()
        optimizer.step()

def names():
    "What the page says that there is"
    digits = load_digits()
    items = list(zip(torch.tensor(digits.data/16).float(), torch.tensor(digits.target)))[:320]
    dls = DataLoaders(DataLoader(items, bs=32, shuffle=True), DataLoader(items[:64], bs=64))
    with no_random(): model = nn.Sequential(nn.Linear(64,64), nn.ReLU(), nn.Linear(64,64), nn.ReLU(), nn.Linear(64,10))
    learn = Learner(dls, deepcopy(model), loss_func=nn.CrossEntropyLoss(), metrics=accuracy)
    learn.logger = noop
    return dict(model=model, optimizer=torch.optim.SGD(model.parameters(), .1, momentum=.9), loader=dls.train, dls=dls, learn=learn, train_one_epoch=train_one_epoch,
                nn=nn, Learner=Learner, accuracy=accuracy)

BLOCKS = re.findall(r'```python\n(.*?)```', (ROOT/'docs'/'migration.md').read_text(encoding='utf-8'), re.S)
EXPECTED = {'Recipe.from_file':.8, 'create.initialize':.75, 'ASP.':.5, 'DynamicSparseTrainingCallback':.9, 'GlobalMagnitude':.9}

@pytest.mark.parametrize('block', BLOCKS[1:], ids=lambda b: b.strip().splitlines()[0])
def test_what_becomes_of_other_libraries_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('recipe.yaml').write_text(RECIPE)
    there = names()
    exec(BLOCKS[0], there)
    exec(block, there)
    model = there['learn'].model if 'learn.' in block else there['model']
    expected = next(v for k,v in EXPECTED.items() if k in block)
    assert measured_sparsity(model)==pytest.approx(expected, abs=.1), block
