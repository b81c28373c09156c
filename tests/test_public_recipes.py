"Recipes in the styles that public repositories use compile as they are, or say which modifier is not there yet"
import pytest
from fastsparse_create.all import *

CARD = '''<!--
Copyright, licence, and whatever else stands above a recipe card: it is not read.
-->

---
# General Hyperparams
num_epochs: &num_epochs 240

# Pruning Hyperparams
pruning_start_epoch: &pruning_start_epoch 4
pruning_end_epoch: &pruning_end_epoch 100

training_modifiers:
  - !EpochRangeModifier
    start_epoch: 0
    end_epoch: *num_epochs

pruning_modifiers:
  - !GMPruningModifier
    params: __ALL_PRUNABLE__
    init_sparsity: 0.05
    final_sparsity: 0.75
    start_epoch: *pruning_start_epoch
    end_epoch: *pruning_end_epoch
    update_frequency: 1.0
---

# A network, pruned

It recovers 96 % of the baseline's accuracy.

---
'''

ANCHORS = '''
# Epoch and LR variables
num_epochs: &num_epochs 10.0
lr_step_epochs: &lr_step_epochs [43, 60]
warmup_epochs: &warmup_epochs 2

training_modifiers:
  - !EpochRangeModifier
    end_epoch: *num_epochs
    start_epoch: 0.0

  - !LearningRateModifier
    constant_logging: False
    end_epoch: -1.0
    init_lr: 0.0028
    log_types: __ALL__
    lr_class: MultiStepLR
    lr_kwargs: {'milestones': *lr_step_epochs, 'gamma': 0.1}
    start_epoch: 2
    update_frequency: -1.0

  - !LearningRateFunctionModifier
    start_epoch: 0
    end_epoch: *warmup_epochs
    lr_func: linear
    init_lr: 0
    final_lr: 1e-3
    param_groups: [0, 1]

pruning_modifiers:
  - !GMPruningModifier
    params:
    - layers.0.weight
    - layers.1.weight

    init_sparsity: 0.05
    final_sparsity: 0.8
    start_epoch: 0
    end_epoch: eval(0.8 * num_epochs)
    update_frequency: 0.4
    inter_func: cubic
    leave_enabled: True
    log_types: __ALL__
    mask_type: unstructured

regularization_modifiers:
  - !SetWeightDecayModifier
      start_epoch: 0
      weight_decay: 0.0
'''

BARE = '''
modifiers:
    - !GlobalMagnitudePruningModifier
        init_sparsity: 0.05
        final_sparsity: 0.8
        start_epoch: 0.0
        end_epoch: 30.0
        update_frequency: 1.0
        params: __ALL_PRUNABLE__

    - !SetLearningRateModifier
        start_epoch: 0.0
        learning_rate: 0.05

    - !LearningRateFunctionModifier
        start_epoch: 30.0
        end_epoch: 50.0
        lr_func: cosine
        init_lr: 0.05
        final_lr: 0.001

    - !TrainableParamsModifier
      params: __ALL__
'''

STAGED = '''
stage_1:
    training_modifiers:
      - !EpochRangeModifier
        start_epoch: 0.0
        end_epoch: 50.0
    pruning_modifiers:
      - !GMPruningModifier
        start_epoch: 0
        end_epoch: 40
        init_sparsity: 0.05
        final_sparsity: 0.85
        params: ["re:.*conv1.weight"]
        update_frequency: 0.5
stage_2:
    training_modifiers:
      - !EpochRangeModifier
        start_epoch: 50.0
        end_epoch: 52.0
      - !SetLearningRateModifier
        start_epoch: 50.0
        learning_rate: 0.0001
'''

@pytest.mark.parametrize('text,tags,epochs', [
    (CARD, ['EpochRangeModifier','GMPruningModifier'], 240),
    (ANCHORS, ['EpochRangeModifier','LearningRateModifier','LearningRateFunctionModifier','GMPruningModifier','SetWeightDecayModifier'], 10),
    (BARE, ['GlobalMagnitudePruningModifier','SetLearningRateModifier','LearningRateFunctionModifier','TrainableParamsModifier'], 50),
    (STAGED, ['EpochRangeModifier','GMPruningModifier','EpochRangeModifier','SetLearningRateModifier'], 52),
], ids=['card','anchors','bare','staged'])
def test_public_styles_compile(text, tags, epochs, tmp_path):
    path = tmp_path/('recipe.md' if text is CARD else 'recipe.yaml')
    path.write_text(text)
    recipe = Recipe.from_file(path)
    assert [type(m).__name__ for m in recipe.compile()]==tags and recipe.max_epochs==epochs
    assert [m.args() for m in Recipe.from_string(str(recipe)).compile()]==[m.args() for m in recipe.compile()]

def test_short_names_of_callbacks_are_no_tags_but_lead_to_them():
    with pytest.raises(RecipeError, match="there is no modifier 'RigL'; did you mean 'RigLPruningModifier'"): Recipe.from_string(BARE + '\nother_modifiers:\n    - !RigL\n        start_epoch: 0.0\n')
