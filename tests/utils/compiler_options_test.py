"""Compiler options that a release may lack."""

import jax
import pytest

from qwenla_jax.utils.compiler_options import accepted


def test_only_options_that_the_compiler_has_are_passed_on():
    wanted = {"xla_there_is_no_such_option": True, "xla_backend_optimization_level": 0}
    left = accepted(wanted)
    assert "xla_there_is_no_such_option" not in left and left.items() <= wanted.items()
    assert jax.jit(lambda x: 2 * x, compiler_options=left)(3.0) == 6
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        jax.jit(lambda x: 2 * x, compiler_options=wanted)(3.0)


def test_a_value_of_another_kind_is_no_missing_option():
    with pytest.raises(jax.errors.JaxRuntimeError):
        accepted({"xla_backend_optimization_level": "text"})
