"`from fastsparse_create.all import *`: the public names of all modules"

from .masks.core import *
from .masks.structured import *
from .masks.nm import *
from .permutation.search import *
from .permutation.apply import *
from .selection import *
from .distribution import *
from .criteria import *
from .masking import *
from .schedule import *
from .callback.core import *
from .callback.pruning import *
from .callback.learning_rate import *
from .callback.training import *
from .callback.dynamic import *
from .callback.dynamic_pruning import *
from .sparsify import *
from .asp import *
from .recipe.expression import RecipeError
from .recipe.compile import *
from .recipe.generate import *
from .report import *
from .flops import *
from .plots import *
from .mask_plots import *
from .export import *
