"""Calibration: channel statistics of every kernel, by probes, by taps, or block by block."""

from rabit_jax.calibration.flax_models import calibrate_flax
from rabit_jax.calibration.outliers import record_limbs
from rabit_jax.calibration.probes import calibrate

__all__ = ["calibrate", "calibrate_flax", "record_limbs"]
