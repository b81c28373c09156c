__version__ = "0.1.0"

def __getattr__(name):
    "`create`, when it is asked for: fastai and torch take seconds to import"
    if name!='create': raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    return import_module('.create', __name__)
