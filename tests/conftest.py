import pytest,torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile('repeatable', derandomize=True, deadline=None)
settings.load_profile('repeatable')

def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: takes about ten seconds or more')
    for ignored in ('ignore::FutureWarning', 'ignore::DeprecationWarning', 'ignore::UserWarning:torch.*', 'ignore::UserWarning:fastai.*',
                    'ignore:.*Pandas4Warning.*', 'ignore:.*lr_scheduler.step.*'):
        config.addinivalue_line('filterwarnings', ignored)

@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
