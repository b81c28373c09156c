"The command as tests run it: the folder that it writes, or the sentence that ends it."
import csv
import pytest
from fastsparse_create.cli import main
from fastsparse_create.experiment import core as module

def run(tmp_path, *args, command='training-aware'):
    "The folder that the command writes"
    assert main([command, *map(str, args), '--working-dir', str(tmp_path)])==0
    folder, = tmp_path.iterdir()
    return folder

def rows(folder, name='metrics.csv'): return list(csv.DictReader((folder/name).open()))

def refused(capsys, *args, command='training-aware'):
    "The sentence that ends a command"
    with pytest.raises(SystemExit) as e: main([command, *map(str, args)])
    assert e.value.code==2
    text = capsys.readouterr().err.strip()
    assert '\n' not in text and text.startswith('fastsparse.run')
    return text

@pytest.fixture
def quick(monkeypatch):
    "No report and no ONNX files: these take most of the time of a small run"
    monkeypatch.setattr(module, 'experiment_page', lambda exp: '')
    monkeypatch.setattr(module.Experiment, '_deploy', lambda self, out: (module.pd.DataFrame([{'what':'nothing', 'metric':0., 'ms':0., 'times_as_fast':0., 'MB':0.}]),None))

__all__ = ['quick','refused','rows','run']
