"""Cast one MXFP4 tensor in memory, and see when no exact NVFP4 form exists."""

import numpy as np

import fp4cast


def main() -> None:
    """Codes are packed E2M1, two a byte, [..., K/2]; scales are E8M0 bytes, 2^(byte - 127), [..., K/32]."""
    codes = np.random.default_rng(0).integers(0, 256, (4, 32), np.uint8)
    scales = np.array([[127, 119], [125, 124], [123, 122], [121, 120]], np.uint8)
    out = fp4cast.cast(codes, scales)
    print(f"exact: {out.exact}; codes not copied: {out.codes is codes}; tensor scale {out.tensor_scale}")
    print("block scales, E4M3 bytes:", out.block_scales.tolist())

    scales[0, 0] = 150  # 31 binades above the smallest block: too far for one tensor scale
    try:
        fp4cast.cast(codes, scales)
    except fp4cast.Fp4CastError as error:
        print("refused:", error)
    print("nearest values instead:", fp4cast.cast(codes, scales, inexact="nearest").exact)


if __name__ == "__main__":
    main()
