// Every function of elementary.cuh, for tests/core/test_elementary.py: unrounded, and as it is stored.
#include "../../../kernels/common/canonical_nan.cuh"
#include "../../../kernels/exact/elementary.cuh"

enum Function { EXP, EXPM1, LOG, LOG1P, ACTIVATION, SLOPE };

DEVICE Double value(int function, int activation, Double x) {
  switch (function) {
    case EXP: return exp(x);
    case EXPM1: return expm1(x);
    case LOG: return log(x);
    case LOG1P: return log1p(x);
    case ACTIVATION: return activation_of(activation, x);
  }
  return slope_of(activation, x);
}

KERNEL elementary(double* wide, float* narrow, const float* x, int function, int activation, int n) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    const Double result = value(function, activation, (double)x[i]);
    wide[i] = result.value;
    narrow[i] = round_to_float(result);
  }
}
