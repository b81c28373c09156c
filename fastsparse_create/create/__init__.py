"`create.initialize` makes a plain PyTorch loop train by a recipe"
from .api import *
from .schemas import *
