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

known_defects = {  # beginning of a test's id -> why it fails; a fix must take the line out
    'test_invariant.py::test_several_forward_passes': "the forward hook's product invalidates the graph of an earlier forward pass",
    'test_invariant.py::test_saving_between': "saving invalidates the graph of the forward pass before it",
    'test_invariant.py::test_layer_that_a_learner_uses_twice': "the forward hook's product invalidates the graph of an earlier forward pass",
    'test_invariant.py::test_every_kind_of_model_in_a_plain_loop[rolled]': "the forward hook's product invalidates the graph of an earlier forward pass",
    'test_invariant.py::test_every_kind_of_model_in_a_learner[rolled]': "the forward hook's product invalidates the graph of an earlier forward pass",
    'test_invariant.py::test_permanent_model_is_ordinary[rolled]': "the forward hook's product invalidates the graph of an earlier forward pass",
    'test_invariant.py::test_removed_hook_frees': "enforcement is switched off for all weights of a module at once",
    'test_modifiers.py::test_released_layer_frees_no_other': "enforcement is switched off for all weights of a module at once",
    'test_modifiers.py::test_every_pattern_reaches_its_target_gradually[GMPruningModifier-filter]': "masked filters score highest",
    'test_modifiers.py::test_every_pattern_reaches_its_target_gradually[GMPruningModifier-channel]': "masked channels score highest",
    'test_modifiers.py::test_every_pattern_reaches_its_target_gradually[MagnitudePruningModifier-filter]': "masked filters score highest",
    'test_modifiers.py::test_every_pattern_reaches_its_target_gradually[MagnitudePruningModifier-channel]': "masked channels score highest",
    'test_modifiers.py::test_every_pattern_reaches_its_target_gradually[GlobalMagnitudePruningModifier-filter]': "masked filters score highest",
    'test_modifiers.py::test_every_pattern_reaches_its_target_gradually[GlobalMagnitudePruningModifier-channel]': "masked channels score highest",
    'test_modifiers.py::test_smallest_filters_go_first': "masked filters score highest",
    'test_invariant.py::test_fit_after_interrupted_rehearsal_prunes[lr_find]': "an interrupted lr_find leaves run=False, so that the next fit does nothing",
    'test_invariant.py::test_fit_after_interrupted_rehearsal_exchanges[lr_find]': "an interrupted lr_find leaves run=False, so that the next fit does nothing",
    'test_modifiers.py::test_successor_holds': "a pruner that ends takes the hooks of its successor away",
    'test_modifiers.py::test_constant_then_gradual': "a pruner that ends takes the hooks of its successor away",
    'test_modifiers.py::test_successor_starts_from_its_own_value[True]': "the last update of a pruner overwrites the first of its successor",
    'test_modifiers.py::test_released_weights_stay_free': "the next before_fit, validate's too, holds released weights again",
    'test_modifiers.py::test_released_weights_survive_a_resume': "a resumed fit cuts released weights again",
    'test_invariant.py::test_resumed_in_a_fresh_learner_is_uninterrupted[sgd]': "masks_from_file can't read learn.save's files with optimizer state",
    'test_invariant.py::test_resumed_in_a_fresh_learner_is_uninterrupted[adam]': "masks_from_file can't read learn.save's files with optimizer state",
    'test_invariant.py::test_resumed_in_a_fresh_learner_is_uninterrupted[lookahead]': "masks_from_file can't read learn.save's files with optimizer state",
    'test_invariant.py::test_masks_of_the_model_itself': "any boolean buffer whose name ends in _mask is taken for a pruning mask",
    'test_invariant.py::test_file_is_read_into_wrapped_model': "masks_from_file doesn't unwrap the model",
    'test_invariant.py::test_unfit_file_changes_nothing': "masks are attached before the file is known to fit",
    'test_invariant.py::test_mask_that_is_set_between': "set_mask leaves the gradient that is there unmasked",
    'test_invariant.py::test_compiled_model_in_a_plain_loop': "compiled forward passes register no gradient hooks",
    'test_invariant.py::test_every_kind_of_model_in_a_plain_loop[parent]': "gradient hooks come with the owner's forward pass, which is never called",
    'test_invariant.py::test_every_kind_of_model_forwards_zeros[parent]': "the owner's forward pass, which masks the weight, is never called",
    'test_invariant.py::test_distributed_ranks_agree': "DDP's broadcast of buffers doesn't change _version: the cached factors of the other ranks are stale",
    'test_invariant.py::test_skipped_layer_is_vouched_for_once': "vouch lasts beyond the forward pass for layers that weren't called",
    'test_invariant.py::test_interrupted_forward_vouches': "vouch lasts beyond an interrupted forward pass",
    'test_invariant.py::test_permanent_model_is_ordinary[attention': "vouch leaves _vouched on modules that aren't called",
    'test_invariant.py::test_permanent_model_is_ordinary[encoder]': "vouch leaves _vouched on modules that aren't called",
    'test_invariant.py::test_permanent_model_is_ordinary[parent]': "vouch leaves _vouched on modules that aren't called",
    'test_invariant.py::test_callback_of_functions': "fastai's Callback(event=function) is trusted",
    'test_invariant.py::test_not_even_nan': "0 times inf is nan",
    'test_modifiers.py::test_clock_of_a_resumed_fit': "start_epoch is added to the epochs of earlier fits",
    'test_modifiers.py::test_window_of_rest_that_a_resume_skips': "the original requires_grad is asked for before it was noted",
    'test_modifiers.py::test_window_of_rest_within_one_batch': "the original requires_grad is asked for before it was noted",
    'test_modifiers.py::test_rest_goes_on_when_fine_tune_unfreezes': "unfreeze between two fits undoes the modifier",
    'test_modifiers.py::test_parameter_is_not_set_again': "a resumed fit sets the parameter again",
    'test_modifiers.py::test_window_without_init_lr_goes_on': "the next fit starts from the learner's rate, not from that of the window's opening",
    'test_modifiers.py::test_from_param_survives_a_resume': "a resumed fit takes the sparsity that it finds for the initial one",
    'test_modifiers.py::test_arguments_of_the_wrong_type': "types of arguments are not checked",
    'test_masks.py::test_only_channel_of_a_depthwise_layer_stays_globally': "global selection doesn't know that the only slice of a layer must stay",
    'test_masks.py::test_global_blocks_with_tails': "blocks are counted with their mean size, tails too",
}

def pytest_collection_modifyitems(items):
    for item in items:
        for start,reason in known_defects.items():
            if item.nodeid.removeprefix('tests/').startswith(start): item.add_marker(pytest.mark.xfail(strict=True, reason=reason))
