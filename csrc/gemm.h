// Vector arithmetic and a register-blocked matrix product for the CPU.
//
// No include guard: this file is compiled once per instruction set. Before each inclusion define SIMPLEX_ISA (the namespace
// to put the code in) and SIMPLEX_VECTOR_BYTES. GCC cannot clone templates for several targets, and the right register
// block differs between targets, so `target_clones` would serve neither need.

namespace simplex::SIMPLEX_ISA {

#define SIMPLEX_INLINE inline __attribute__((always_inline))

template <class T>
struct Simd {
  static constexpr int64_t kLanes = SIMPLEX_VECTOR_BYTES / sizeof(T);
  typedef T Vec __attribute__((vector_size(SIMPLEX_VECTOR_BYTES)));
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Int IntVec __attribute__((vector_size(SIMPLEX_VECTOR_BYTES)));
};

template <class T>
using Vec = typename Simd<T>::Vec;

template <class T>
SIMPLEX_INLINE Vec<T> load(const T* p) {
  Vec<T> x;
  std::memcpy(&x, p, sizeof(x));  // one unaligned load
  return x;
}

template <class T>
SIMPLEX_INLINE void store(T* p, Vec<T> x) {
  std::memcpy(p, &x, sizeof(x));
}

template <class T>
SIMPLEX_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};  // not x + 0, which would turn -0 into +0 and so cost an instruction
}

template <class T>
SIMPLEX_INLINE T sum(Vec<T> x) {
  T total = 0;
  for (int64_t i = 0; i < Simd<T>::kLanes; ++i) total += x[i];
  return total;
}

// The largest lane that is not NaN.
template <class T>
SIMPLEX_INLINE T maximum(Vec<T> x) {
  T largest = std::numeric_limits<T>::lowest();
  for (int64_t i = 0; i < Simd<T>::kLanes; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

// Polynomials for 2^r on [-1/2, 1/2], interpolated at Chebyshev nodes; relative error 2.6e-9 (float), 5e-18 (double).
template <class T>
constexpr std::array<float, 7> kExp2 = {1.0f,           0.693147207f,   0.240226509f,  0.0555032723f,
                                        0.00961805668f, 0.00134004282f, 0.000154614447f};
template <>
constexpr std::array<double, 12> kExp2<double> = {1.0,
                                                  0.693147180559945309,
                                                  0.240226506959101596,
                                                  0.055504108664821627,
                                                  0.00961812910758725667,
                                                  0.00133335581464064707,
                                                  0.000154035304637243542,
                                                  0.0000152527338415567726,
                                                  1.32154325359123762e-6,
                                                  1.01780570877339411e-7,
                                                  7.07419429728852101e-9,
                                                  4.45581790833606449e-10};

// e^x for any x short of overflow: exactly 1 at 0, exactly 0 where the result is not well inside the normal numbers, NaN for
// NaN. The error of x * log2(e) is relative to x: subtract the maximum first, and it only touches what hardly matters.
template <class T>
SIMPLEX_INLINE Vec<T> exp_small(Vec<T> x) {
  using Limits = std::numeric_limits<T>;
  using IntVec = typename Simd<T>::IntVec;
  constexpr int kMantissa = Limits::digits - 1;
  // Adding 1.5 * 2^mantissa rounds x to an integer n and leaves n in the low bits of the sum.
  constexpr T kRound = T(1.5) * (int64_t(1) << kMantissa);
  x *= T(1.4426950408889634);
  const Vec<T> shifted = x + kRound;
  const Vec<T> r = x - (shifted - kRound);
  constexpr auto& c = kExp2<T>;
  Vec<T> y = splat(c.back());
  for (size_t i = 2; i <= c.size(); ++i) y = y * r + c[c.size() - i];
  IntVec n;
  std::memcpy(&n, &shifted, sizeof(n));
  const IntVec exponent = (n + (Limits::max_exponent - 1)) << kMantissa;
  Vec<T> power;
  std::memcpy(&power, &exponent, sizeof(power));
  return x < T(Limits::min_exponent) ? Vec<T>{} : y * power;
}

// A matrix element (i, j) lies at data[i * row + j * column].
template <class T>
struct Strided {
  const T* data;
  int64_t row, column;
};

// 32 vector registers (AVX-512, NEON) hold 8 x 2 accumulators with room to spare, 16 hold 6 x 2.
constexpr int kBlockM = SIMPLEX_VECTOR_BYTES == 64 ? 8 : 6;

// C[M x N*lanes] = A[M x depth] B, or += where accumulate.
template <int M, int N, class T>
SIMPLEX_INLINE void gemm_block(int64_t depth, Strided<T> a, const T* b, int64_t ldb, T* c, int64_t ldc, bool accumulate) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  Vec<T> acc[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) acc[i][j] = accumulate ? load(c + i * ldc + j * kLanes) : Vec<T>{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> row[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) row[j] = load(b + k * ldb + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const Vec<T> factor = splat(a.data[i * a.row + k * a.column]);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) acc[i][j] += factor * row[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) store(c + i * ldc + j * kLanes, acc[i][j]);
}

// All rows of one column panel, so that the panel of B stays in the first-level cache. A function of its own for every M
// keeps the accumulators of the remainder in registers, too.
template <int N, class T, int M = kBlockM>
void gemm_panel(int64_t m, int64_t depth, Strided<T> a, const T* b, int64_t ldb, T* c, int64_t ldc, bool accumulate) {
  for (; m >= M; m -= M, a.data += M * a.row, c += M * ldc) gemm_block<M, N>(depth, a, b, ldb, c, ldc, accumulate);
  if constexpr (M > 1) {
    if (m > 0) gemm_panel<N, T, M - 1>(m, depth, a, b, ldb, c, ldc, accumulate);
  }
}

// C[m x n] = A[m x depth] B[depth x n], or += where accumulate. n is a multiple of the vector length; B's and C's rows are contiguous.
template <class T>
void gemm(int64_t m, int64_t n, int64_t depth, Strided<T> a, const T* b, int64_t ldb, T* c, int64_t ldc, bool accumulate) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  int64_t j = 0;
  for (; j + 2 * kLanes <= n; j += 2 * kLanes) gemm_panel<2, T>(m, depth, a, b + j, ldb, c + j, ldc, accumulate);
  if (j < n) gemm_panel<1, T>(m, depth, a, b + j, ldb, c + j, ldc, accumulate);
}

}  // namespace simplex::SIMPLEX_ISA
