// Per-sample gradients: norms, clipping, and the gradients themselves. A sample's dW is the outer product of its da and
// its h, and its db is its da.
//
//     add_norms    norms_b  = sqrt(norms_b^2 + |da_b|^2 (|h_b|^2 + 1))      layer by layer
//     clip_rows    da_bo   *= factor min(1, max_norm / norms_b)             NaN where the norm is not finite
//     outer_rows   dw_boi   = da_bo h_bi,  db_bo = da_bo
//
// After the last layer norms_b is the norm of the sample's whole gradient.
//
// Shapes: da (B, nO) and h (B, nI) row by row with a pitch each; norms (B) in double.
//
// A warp takes a row, its lanes every 32nd column. A block of 8 warps takes every gridDim-th group of 8 rows. Rows are
// independent, so there is no barrier. With B = 1024: 128 blocks, a row a warp.
//
// Squares are added in double, 64 to a lane at a time and then from lane to lane: the order depends on the width alone.
// Squares of floats are exact in double, and neither overflow nor underflow. Rows of doubles are scaled by a power of
// two.
//
// Variants: Accum (float or double) of results, Element of da and h. 256 threads.
#include "../common/block_sum.cuh"
#include "../common/canonical_nan.cuh"

// The scale of a row: 1 for floats, for doubles a power of two near the largest magnitude.
DEVICE double unit_of_row(float) { return 1; }
DEVICE double unit_of_row(double largest) {
  return power_of_two(max(-1000, min(1000, (int)((uint64)__double_as_longlong(largest) >> 52) - 1023)));
}

// sqrt(sum_j row_j^2 + more), more 0 or 1, in every lane.
template <typename T>
DEVICE Double norm_of_row(const T* row, int n, double more) {
  Accum largest = Accum(more);
  if (sizeof(Accum) == 8) {
    for (int j = threadIdx.x % 32; j < n; j += 32) largest = Larger()(largest, (Accum)fabs(to_accum(row[j])));
    largest = warp_max(largest);
  }
  const double unit = unit_of_row(largest);
  const Double factor = 1 / unit;
  Double total = 0.0;
  for (int first = threadIdx.x % 32; first < n; first += 32 * 64) {
    Double sum = 0.0;
    for (int j = first; j < min(n, first + 32 * 64); j += 32) {
      const Double x = Double((double)to_accum(row[j])) * factor;
      sum = sum + x * x;
    }
    total = total + sum;
  }
  return root(Double(warp_sum(total.value)) + Double(more) * factor * factor) * Double(unit);
}

// sqrt(a^2 + b^2) of numbers that are not negative.
DEVICE Double norm_of(Double a, Double b) {
  if (sizeof(Accum) == 4) return root(a * a + b * b);
  const Double larger = Larger()(a.value, b.value), smaller = a.value == larger.value ? b : a;
  if (!(larger.value > 0) || !is_finite(larger.value)) return a + b;
  const Double ratio = smaller / larger;
  return larger * root(Double(1.0) + ratio * ratio);
}

//   first  whether this layer is the first: norms are not read
//   out_b  where norms are written to as well, or null
KERNEL __launch_bounds__(256) add_norms(
    const Element* da_bo, int da_pitch, const Element* h_bi, int h_pitch, double* norms_b, Accum* out_b, int first,
    int n_batch, int n_out, int n_in) {
  for (int b = blockIdx.x * 8 + threadIdx.x / 32; b < n_batch; b += gridDim.x * 8) {
    const Double norm_da = norm_of_row(da_bo + (int64)b * da_pitch, n_out, 0);
    const Double layer = norm_da * norm_of_row(h_bi + (int64)b * h_pitch, n_in, 1);
    if (threadIdx.x % 32 != 0) continue;
    const Double norm = first ? layer : norm_of(norms_b[b], layer);
    norms_b[b] = norm.value;
    if (out_b) out_b[b] = canonical_nan((Accum)norm.value);
  }
}

KERNEL __launch_bounds__(256) clip_rows(
    Element* da_bo, int da_pitch, const double* norms_b, double max_norm, double factor, int n_batch, int n_out) {
  for (int b = blockIdx.x * 8 + threadIdx.x / 32; b < n_batch; b += gridDim.x * 8) {
    const Double norm = norms_b[b], clipped = norm.value > max_norm ? Double(max_norm) / norm : Double(1.0);
    // A subnormal factor keeps few digits, or none: it is taken in two parts, whose second is a power of two.
    const bool single = sizeof(Accum) == 4;
    const Double whole = clipped * Double(factor), lift = power_of_two(single ? 100 : 1000);
    const bool subnormal = whole.value < power_of_two(single ? -126 : -1022);
    const Accum by = (Accum)(subnormal ? Double(max_norm) * lift / norm * Double(factor) : whole).value;
    const Accum rest = subnormal ? (Accum)(1 / lift.value) : Accum(1);
    Element* da = da_bo + (int64)b * da_pitch;
    for (int o = threadIdx.x % 32; o < n_out; o += 32)
      to_element_canonical(
          canonical_nan(is_finite(norm.value) ? to_accum(da[o]) * by * rest : Accum(__uint_as_float(0x7fc00000u))), da[o]);
  }
}

// A warp takes one output of a sample. Adding +0 makes -0 and 0 one.
//   stride  numbers from one sample's gradient to the next
KERNEL __launch_bounds__(256) outer_rows(
    const Element* da_bo, int da_pitch, const Element* h_bi, int h_pitch, Accum* dw_boi, Accum* db_bo, int64 stride,
    int n_batch, int n_out, int n_in) {
  const Rounded<Accum> zero = Accum(0);
  const int64 rows = (int64)n_batch * n_out, step = (int64)gridDim.x * 8;
  for (int64 row = (int64)blockIdx.x * 8 + threadIdx.x / 32; row < rows; row += step) {
    const int b = (int)(row / n_out), o = (int)(row % n_out);
    const Rounded<Accum> da = Accum(to_accum(da_bo[(int64)b * da_pitch + o]));
    const Element* h = h_bi + (int64)b * h_pitch;
    Accum* dw = dw_boi + b * stride + (int64)o * n_in;
    for (int i = threadIdx.x % 32; i < n_in; i += 32)
      dw[i] = canonical_nan((da * Rounded<Accum>(Accum(to_accum(h[i]))) + zero).value);
    if (threadIdx.x % 32 == 0) db_bo[b * stride + o] = canonical_nan((da + zero).value);
  }
}
