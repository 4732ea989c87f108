"""The private API of Keras and KerasHub that the library needs.

Every symbol here uses private API, so each has its own test in
`tests/test_compat.py`. If a release moves one, that test fails and names the
symbol, before a user's `fit` fails.
"""

from keras_randadapt._compat.converters import exported_config
from keras_randadapt._compat.converters import transformers_converters
from keras_randadapt._compat.kerashub import check_before_export
from keras_randadapt._compat.layers import KeepsTrainingFlag
from keras_randadapt._compat.layers import alias_registered_class
from keras_randadapt._compat.layers import attach_sublayer
from keras_randadapt._compat.layers import call_context
from keras_randadapt._compat.layers import calls_in_graph
from keras_randadapt._compat.layers import causal_padding
from keras_randadapt._compat.layers import detach_sublayer
from keras_randadapt._compat.layers import flatten_layers
from keras_randadapt._compat.layers import instance_attributes
from keras_randadapt._compat.layers import is_in_call
from keras_randadapt._compat.layers import is_nnx_enabled
from keras_randadapt._compat.layers import is_saveable
from keras_randadapt._compat.layers import kernel_of
from keras_randadapt._compat.layers import layer_trainable_flag
from keras_randadapt._compat.layers import may_rematerialize
from keras_randadapt._compat.layers import name_scope
from keras_randadapt._compat.layers import no_automatic_dependency_tracking
from keras_randadapt._compat.layers import open_name_scope
from keras_randadapt._compat.layers import owned_variables
from keras_randadapt._compat.layers import refresh_torch_parameters
from keras_randadapt._compat.layers import restore_sublayer
from keras_randadapt._compat.layers import set_keras_mask
from keras_randadapt._compat.layers import set_layer_trainable_flag
from keras_randadapt._compat.layers import snake_case
from keras_randadapt._compat.layers import sublayers
from keras_randadapt._compat.layers import trainable_by_nature
from keras_randadapt._compat.layers import training_phase
from keras_randadapt._compat.layers import unpickle_model
from keras_randadapt._compat.layers import unrounded
from keras_randadapt._compat.layers import walk_attributes
from keras_randadapt._compat.optimizers import ShowsMovingAverage
from keras_randadapt._compat.optimizers import check_variables_are_known
from keras_randadapt._compat.optimizers import copy_weight_decay_exclusions
from keras_randadapt._compat.optimizers import exclude_from_weight_decay
from keras_randadapt._compat.optimizers import iterations
from keras_randadapt._compat.optimizers import set_weight_decay_exclusions
from keras_randadapt._compat.optimizers import track_optimizer_variable
from keras_randadapt._compat.optimizers import trained_variables
from keras_randadapt._compat.optimizers import variable_index
from keras_randadapt._compat.optimizers import weight_decay
from keras_randadapt._compat.optimizers import weight_decay_exclusions
from keras_randadapt._compat.plain_kernels import TABLES
from keras_randadapt._compat.plain_kernels import holds_table
from keras_randadapt._compat.plain_kernels import table_name
from keras_randadapt._compat.quantization import can_dequantize
from keras_randadapt._compat.quantization import dequantized_kernel
from keras_randadapt._compat.quantization import has_float_kernel
from keras_randadapt._compat.quantization import is_calibrated
from keras_randadapt._compat.quantization import kernel_shape
from keras_randadapt._compat.quantization import paired_quantized_variables
from keras_randadapt._compat.quantization import product_variables
from keras_randadapt._compat.quantization import quantized_kernel_of
from keras_randadapt._compat.quantization import quantized_variables
from keras_randadapt._compat.quantization import recorded_layer
from keras_randadapt._compat.quantization import unquantized_variables
from keras_randadapt._compat.steps import compiled_functions
from keras_randadapt._compat.steps import forget_jax_state
from keras_randadapt._compat.steps import fresh_step
from keras_randadapt._compat.steps import has_values
from keras_randadapt._compat.steps import is_compiling
from keras_randadapt._compat.steps import is_tracing
from keras_randadapt._compat.steps import reset_compiled_functions
from keras_randadapt._compat.steps import substituted_values
from keras_randadapt._compat.steps import sync_jax_state
from keras_randadapt._compat.steps import values_of_jax_state

__all__ = [
    "alias_registered_class",
    "attach_sublayer",
    "call_context",
    "calls_in_graph",
    "causal_padding",
    "check_before_export",
    "check_variables_are_known",
    "compiled_functions",
    "copy_weight_decay_exclusions",
    "detach_sublayer",
    "exclude_from_weight_decay",
    "flatten_layers",
    "forget_jax_state",
    "exported_config",
    "fresh_step",
    "has_values",
    "holds_table",
    "instance_attributes",
    "is_compiling",
    "is_in_call",
    "is_nnx_enabled",
    "is_saveable",
    "is_tracing",
    "iterations",
    "KeepsTrainingFlag",
    "kernel_of",
    "kernel_shape",
    "layer_trainable_flag",
    "may_rematerialize",
    "name_scope",
    "no_automatic_dependency_tracking",
    "open_name_scope",
    "owned_variables",
    "can_dequantize",
    "dequantized_kernel",
    "has_float_kernel",
    "is_calibrated",
    "product_variables",
    "recorded_layer",
    "paired_quantized_variables",
    "quantized_kernel_of",
    "quantized_variables",
    "unquantized_variables",
    "refresh_torch_parameters",
    "reset_compiled_functions",
    "restore_sublayer",
    "set_keras_mask",
    "set_layer_trainable_flag",
    "set_weight_decay_exclusions",
    "ShowsMovingAverage",
    "snake_case",
    "sublayers",
    "substituted_values",
    "sync_jax_state",
    "table_name",
    "TABLES",
    "track_optimizer_variable",
    "trainable_by_nature",
    "trained_variables",
    "training_phase",
    "transformers_converters",
    "unpickle_model",
    "unrounded",
    "values_of_jax_state",
    "variable_index",
    "walk_attributes",
    "weight_decay",
    "weight_decay_exclusions",
]
