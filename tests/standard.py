"""Standard NVFP4 again, with ml_dtypes' rounding."""

import ml_dtypes
import numpy as np


def standard_nvfp4(weights):
    """Standard NVFP4 again, on values in FP32 and with ml_dtypes' rounding."""
    x = weights.astype(np.float32).reshape(-1, 16)
    scale = np.float32(np.abs(x).max()) / np.float32(6 * 448)
    wanted = np.abs(x).max(axis=1) / (np.float32(6) * scale)
    scales = np.clip(wanted, 2.0**-9, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    steps = scales[:, None] * float(scale)
    return (np.clip(x / steps, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(float) * steps).reshape(-1)


def equally_near(exact, ours, theirs) -> bool:
    """FP32 may put what lies within its precision of a tie on the other side; it must not err more than that."""
    return np.allclose(np.abs(ours - exact), np.abs(theirs - exact), rtol=1e-6, atol=0)
